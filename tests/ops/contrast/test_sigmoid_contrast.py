"""sigmoid_contrast against contrasts written out by hand and against the published formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.ops import sigmoid_contrast
from cpc_ext.ops.sigmoid_contrast import sigmoid_contrast_reference
from tests.ops.contrast.draw import DTYPES, draw

OPTIONS = {
    "plain": {},
    "targets": {"targets": True},
    "positives": {"positives": 3},
    "bias": {"bias": -10.0},
    "learned": {
        "scale": torch.tensor(3.0, requires_grad=True),
        "learned_bias": -2.0,
    },
    "everything": {
        "positives": 3,
        "weights": True,
        "scale": torch.tensor(-0.9, requires_grad=True),
        "learned_bias": 0.5,
    },
}


def problem(name, shape=(9, 11, 6), dtype=torch.float32, **options):
    options = OPTIONS[name] | options
    bias, learned = options.pop("bias", None), options.pop("learned_bias", None)
    drawn = draw(shape, dtype, measure="sigmoid", **options)
    if bias is not None:
        drawn.given["bias"] = bias
    if learned is not None:
        drawn.learns["bias"] = torch.tensor(learned)
    return drawn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option(device, name, dtype):
    problem(name, dtype=dtype).check(device)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch", [(2, 3), (0,)])
def test_reductions_and_batches(device, batch, reduction):
    problem("everything", batch=batch).check(device, reduction)


@pytest.mark.parametrize("wide", ["queries", "keys"])
def test_a_bias_is_not_rounded_to_the_narrower_type(wide):
    learns = problem("plain").learns
    learns[wide] = learns[wide].double()
    exact = {name: value.double() for name, value in learns.items()}
    expected = sigmoid_contrast(**exact, bias=-10.1)
    torch.testing.assert_close(sigmoid_contrast(**learns, bias=-10.1), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 4, 0), (1, 1, 1), (65, 130, 17)])
def test_shapes(device, shape):
    problem("learned", shape).check(device)


def test_as_published(device):
    """SigLIP's pseudocode (arXiv 2303.15343, algorithm 1), with its temperature and bias to begin with."""
    images, texts = (F.normalize(tensor, dim=1) for tensor in draw((8, 8, 6), torch.float64).learns.values())
    log_scale = torch.tensor(math.log(10), dtype=torch.float64)
    results = []
    for home in (torch.device("cpu"), device):
        inputs = [tensor.clone().to(home).requires_grad_() for tensor in (images, texts, log_scale)]
        inputs.append(torch.tensor(-10.0, dtype=torch.float64, device=home, requires_grad=True))
        a, b, t, bias = inputs
        if len(results) == 0:
            labels = 2 * torch.eye(8) - 1
            loss = -F.logsigmoid(labels * (a @ b.T * t.exp() + bias)).sum() / 8
        else:
            loss = sigmoid_contrast(a, b, scale=t.exp(), bias=bias)
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other.cpu())


def test_small_losses_keep_their_precision(device):
    """A trained model's are near 0, those of strangers at the bias of -10 nearer still."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]], device=device, requires_grad=True)
    keys = torch.eye(2, device=device)
    losses = sigmoid_contrast(queries, keys, scale=30, bias=-15.0, reduction="none")
    exact = 2 * math.log1p(math.exp(-15))
    torch.testing.assert_close(losses.double().cpu(), torch.full((2,), exact, dtype=torch.float64), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), queries)
    slope = 30 / (1 + math.exp(15))
    expected = torch.tensor([[-slope, slope], [slope, -slope]])
    torch.testing.assert_close(gradient.cpu(), expected, rtol=1e-5, atol=0)


def test_large_scores_do_not_overflow(device):
    queries = torch.tensor([[1e4], [-1e4]], device=device, requires_grad=True)
    losses = sigmoid_contrast(queries, torch.ones(2, 1, device=device), bias=1.0, reduction="none")
    assert losses.tolist() == [10001, 9999]
    assert torch.autograd.grad(losses.sum(), queries)[0].tolist() == [[1], [-1]]


def test_rows_without_a_positive_are_absent(device):
    drawn = problem("positives", dtype=torch.float64)
    result = drawn.run(device, "none")
    assert result.loss[2] == 0
    assert not result.gradients["queries"][2].any()
    assert result.loss[3:].all()


@pytest.mark.parametrize("bias", [0, -3, torch.tensor(-3.0), torch.tensor(2), torch.tensor(0.5, requires_grad=True)],
                         ids=repr)  # fmt: skip
def test_biases_of_any_kind(device, bias):
    queries, keys = (tensor.to(device) for tensor in draw((4, 5, 3)).learns.values())
    given = bias.to(device) if isinstance(bias, torch.Tensor) else bias
    loss = sigmoid_contrast(queries, keys, bias=given)
    torch.testing.assert_close(
        loss.cpu(), sigmoid_contrast_reference(queries.cpu(), keys.cpu(), bias=float(torch.as_tensor(bias)))
    )
    assert loss.requires_grad == (isinstance(bias, torch.Tensor) and bias.requires_grad)


def test_gradients_by_finite_differences():
    drawn = problem("everything", (4, 5, 3), torch.float64)
    drawn.learns = {name: tensor.detach().double() for name, tensor in drawn.learns.items()}
    drawn.learns["weights"] += 0.5
    arguments = drawn.arguments(torch.device("cpu"))
    assert torch.autograd.gradcheck(
        lambda *tensors: sigmoid_contrast(**arguments | dict(zip(drawn.learns, tensors, strict=True))),
        [arguments[name] for name in drawn.learns],
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"bias": torch.zeros(3)},
            ValueError,
            r"bias must be a number or .* got shape \(3,\)",
        ),
        ({"bias": "1"}, TypeError, "bias must be a number or a tensor, got str"),
        ({"bias": None}, TypeError, "bias must be a number or a tensor, got NoneType"),
        ({"bias": True}, TypeError, "bias must be a number or a tensor, got bool"),
        ({"bias": math.nan}, ValueError, "bias must be finite, got nan"),
        ({"bias": torch.tensor(math.inf)}, ValueError, "bias must be finite, got inf"),
        ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ({"queries": None}, TypeError, "queries must be a tensor, got NoneType"),
        ({"keys": torch.zeros(2)}, ValueError, "keys must be"),
        ({"weights": -torch.ones(3)}, ValueError, "weights must not be negative"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, ValueError, r"targets must have shape \(3\) or \(3, P\)"),
        ({"reduction": "max"}, ValueError, "reduction must be"),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        sigmoid_contrast(**{"queries": torch.zeros(3, 2), "keys": torch.zeros(4, 2), **change})
