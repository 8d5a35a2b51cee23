"""info_nce in both directions at once, against contrasts written out by hand and against two calls."""

from __future__ import annotations

import math

import pytest
import torch

from cpc_ext.ops import info_nce
from cpc_ext.ops.info_nce import info_nce_reference
from tests.ops.contrast.draw import DTYPES, assert_same_bits, draw

SHAPE = 11, 11, 6
OPTIONS = {
    "plain": {},
    "permuted": {"permuted": True},
    "weights": {"weights": True},
    "permuted weights": {"permuted": True, "weights": True},
    "ranges": {"permuted": True, "ranges": True},
    "exclude": {"excluded": 0},
    "several excluded": {"permuted": True, "excluded": 3},
    "same group": {"permuted": True, "contrast": "same"},
    "other groups": {"contrast": "other"},
    "bias": {"permuted": True, "bias": torch.float32},
    "scale": {"scale": torch.tensor(0.7, requires_grad=True)},
    "everything": {
        "permuted": True,
        "weights": True,
        "ranges": True,
        "excluded": 2,
        "contrast": "other",
        "bias": torch.float32,
        "scale": torch.tensor(-0.9, requires_grad=True),
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option(device, name, dtype):
    draw(SHAPE, dtype, symmetric=True, **OPTIONS[name]).check(device)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch", [(2, 2), (0,)])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_reductions_and_batches(device, batch, reduction, name):
    draw((7, 7, 5), batch=batch, symmetric=True, **OPTIONS[name]).check(device, reduction)


@pytest.mark.parametrize("size", [0, 1, 2])
@pytest.mark.parametrize("dim", [0, 1])
def test_few_pairs(device, size, dim):
    draw((size, size, dim), symmetric=True).check(device)


@pytest.mark.parametrize("size", [48, 65, 130])
def test_blocks(device, size):
    for options in ({}, OPTIONS["everything"]):
        draw((size, size, 17), symmetric=True, **options).check(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"weights": True}, {"bias": torch.float32, "contrast": "other"}],
                         ids=["plain", "weights", "groups"])  # fmt: skip
@pytest.mark.parametrize("shape", [(400, 70), (1700, 8)])
def test_is_the_mean_of_two_calls(shape, dtype, options):
    """Sizes beyond what by hand takes long, and with more scores than are kept. A key's bias is that of its query."""
    size, dim = shape
    problem = draw((size, size, dim), dtype, symmetric=True, **options)
    arguments = problem.arguments(torch.device("cpu"))
    both = info_nce(**arguments)
    rows = {name: value for name, value in arguments.items() if name != "symmetric"}
    row_losses = info_nce(**rows)
    assert torch.equal(row_losses.rank, both.rank)
    columns = rows | {"queries": arguments["keys"].double(), "keys": arguments["queries"].double()}
    if "key_bias" in arguments:  # It is that of all scores of a column, so it is none to its own softmax.
        columns.pop("key_bias")
    if "groups" in arguments:
        columns["groups"] = arguments["groups"][::-1]
    if "weights" in arguments:  # Absent queries are excluded, here by a bias.
        columns["key_bias"] = torch.where(arguments["weights"] == 0, -math.inf, 0.0).detach().double()
        present = arguments["weights"] != 0
        columns = {
            name: value[present] if name in ("queries", "weights") else value for name, value in columns.items()
        } | {"targets": present.nonzero().squeeze(1)}
    expected = (row_losses.loss.double() + info_nce(**columns).loss) / 2
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(both.loss.double(), expected, atol=tolerance, rtol=tolerance)
    inputs = [arguments[name] for name in ("queries", "keys")]
    for one, other in zip(torch.autograd.grad(both.loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        allowed = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2**-6}[dtype]
        torch.testing.assert_close(one, other, atol=allowed * float(other.abs().max()), rtol=allowed)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("of_absent", [math.nan, math.inf])
def test_absent_queries_may_hold_anything(device, permuted, reduction, of_absent):
    """Neither direction sees them; others' results are those of finite ones."""
    problem = draw(SHAPE, symmetric=True, weights=True, permuted=permuted)
    absent = problem.learns["weights"] == 0
    assert 1 < absent.sum() < 9
    problem.learns["weights"] = problem.learns["weights"].float()
    expected = problem.run(device, reduction)
    problem.learns["queries"] = problem.learns["queries"].clone()
    problem.learns["queries"][absent] = of_absent
    actual = problem.run(device, reduction)
    if reduction == "none":
        assert not actual.loss[absent].any()
        assert torch.equal(actual.loss[~absent], expected.loss[~absent])
    else:
        torch.testing.assert_close(actual.loss, expected.loss)
    for name in ("queries", "keys"):
        torch.testing.assert_close(actual.gradients[name], expected.gradients[name])
    assert not actual.gradients["queries"][absent].any()
    torch.testing.assert_close(actual.gradients["weights"][~absent], expected.gradients["weights"][~absent])


@pytest.mark.parametrize("weighted", [False, True])
def test_a_pair_whose_loss_nobody_asks_for_is_still_contrasted(device, weighted):
    """Its upstream gradient is 0, as is that of an absent query, but others' columns have it."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(70, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    upstream = torch.arange(70).remainder(3).bool().double()
    weights = torch.arange(70).remainder(4).ne(1).double() if weighted else None

    def gradients(contrast, device, dtype):
        inputs = [tensor.to(device, dtype).requires_grad_() for tensor in (queries, keys)]
        options = {"weights": None if weights is None else weights.to(device, dtype)}
        loss = contrast(*inputs, symmetric=True, reduction="none", **options).loss
        return torch.autograd.grad(loss, inputs, upstream.to(loss))

    expected = gradients(info_nce_reference, "cpu", torch.float64)
    for one, other in zip(gradients(info_nce, device, torch.float64), expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-12, rtol=0)


def test_pairs_that_agree_in_order_or_not(device):
    """An order of the queries, told by targets, changes losses, ranks and gradients by that order alone."""
    problem = draw(SHAPE, torch.float64, symmetric=True, bias=torch.float64, ranges=True, weights=True)
    expected = problem.run(device, "none")
    order = torch.rand(11, generator=torch.Generator().manual_seed(3)).argsort()
    for name in ("queries", "weights"):
        problem.learns[name] = problem.learns[name][order]
    problem.given |= {"targets": order, "key_range": problem.given["key_range"][order]}
    actual = problem.run(device, "none")
    assert torch.equal(actual.loss, expected.loss[order])
    assert torch.equal(actual.rank, expected.rank[order])


def test_same_bits_for_any_number_of_threads():
    problem = draw((700, 700, 33), symmetric=True, weights=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = problem.run(torch.device("cpu"))
        for n in (2, 3):
            torch.set_num_threads(n)
            assert_same_bits(problem.run(torch.device("cpu")), alone)
    finally:
        torch.set_num_threads(threads)
