"""scores_logsumexp against contrasts written out by hand, and losses composed of it."""

from __future__ import annotations

import math

import pytest
import torch

from cpc_ext.ops import info_nce, scores_logsumexp
from cpc_ext.ops.scores_logsumexp import scores_logsumexp_reference
from tests.ops.contrast.draw import DTYPES, draw

CPU = torch.device("cpu")
OPTIONS = {
    "plain": {},
    "exclude": {"excluded": 0},
    "several excluded": {"excluded": 4},
    "ranges": {"ranges": True},
    "same group": {"contrast": "same"},
    "other groups": {"contrast": "other"},
    "bias": {"bias": torch.float16},
    "scale": {"scale": torch.tensor(0.7, requires_grad=True)},
    "everything": {
        "excluded": 2,
        "ranges": True,
        "contrast": "other",
        "bias": torch.float32,
        "scale": torch.tensor(-0.9, requires_grad=True),
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option(device, name, dtype):
    draw((13, 9, 6), dtype, measure="log_sum", **OPTIONS[name]).check(device)


@pytest.mark.parametrize("shape", [(3, 0, 2), (0, 3, 2), (3, 4, 0), (1, 1, 1), (65, 130, 17)])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_shapes(device, shape, batch):
    draw(shape, measure="log_sum", batch=batch).check(device)


def test_the_log_of_nothing(device):
    """It is -inf, and nothing learns of it."""
    problem = draw((4, 6, 3), measure="log_sum", scale=torch.tensor(0.5, requires_grad=True), bias=torch.float32)
    problem.given["key_range"] = torch.tensor([[0, 0], [6, 6], [0, 6], [5, 6]])
    arguments = problem.arguments(device)
    sums = scores_logsumexp(**arguments)
    assert sums[:2].tolist() == [-math.inf] * 2
    inputs = [arguments[name] for name in problem.learns]
    gradients = torch.autograd.grad(sums[:2].sum(), inputs, retain_graph=True)
    assert not any(gradient.any() for gradient in gradients)
    of_queries = torch.autograd.grad(sums, inputs[0], torch.ones_like(sums))[0]
    assert not of_queries[:2].any()
    assert of_queries[2:].any(1).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_info_nce_made_of_it(device, dtype):
    problem = draw((9, 11, 6), dtype, targets=True, bias=dtype, scale=torch.tensor(0.7, dtype=dtype))
    arguments = problem.arguments(device)
    losses = info_nce(**arguments, reduction="none").loss
    targets = arguments.pop("targets")
    positive = (arguments["queries"] * arguments["keys"][targets]).sum(1) * 0.7 + arguments["key_bias"][targets]
    made = scores_logsumexp(**arguments) - positive
    torch.testing.assert_close(made, losses)
    inputs = [arguments[name] for name in problem.learns]
    upstream = torch.linspace(-1, 1, 9, dtype=dtype, device=device)
    for one, other in zip(
        torch.autograd.grad(made, inputs, upstream), torch.autograd.grad(losses, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_any_upstream_gradient(device):
    """What is made of the sums decides what they are worth: one of none, one of a sign of its own."""
    problem = draw((5, 7, 4), torch.float64, measure="log_sum", bias=torch.float64)
    results = []
    for arguments, function in (
        (problem.arguments(device), scores_logsumexp),
        (problem.arguments(CPU), scores_logsumexp_reference),
    ):
        sums = function(**arguments)
        value = (sums[0] * sums[1]).tanh() - sums[2].exp()
        results.append(torch.autograd.grad(value, [arguments[name] for name in problem.learns]))
        assert not results[-1][0][3:].any()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("spread", [1e2, 1e4])
def test_large_scores(device, spread):
    problem = draw((5, 70, 4), torch.float64, measure="log_sum", scale=spread)
    problem.check(device)


def test_gradients_by_finite_differences():
    problem = draw((4, 6, 3), torch.float64, measure="log_sum", excluded=2, contrast="other", bias=torch.float64)
    problem.given["groups"][0].clamp_(min=0)
    problem.learns["scale"] = torch.tensor(problem.given.pop("scale"), dtype=torch.float64)
    arguments = problem.arguments(CPU)

    def sums(*tensors):
        return scores_logsumexp(**arguments | dict(zip(problem.learns, tensors, strict=True)))

    assert torch.autograd.gradcheck(sums, [arguments[name] for name in problem.learns])
