"""Weights of queries, and the mean or sum of their losses: computed by our own calls, without launches of PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cpc_ext.ops import _contrast, _contrast_arguments, _contrast_weights, info_nce
from cpc_ext.ops._library import with_workspace
from cpc_ext.ops.info_nce import info_nce_reference

# Rows of one part of CUDA's sums, of several, and of as many as there are at most.
SIZES = [(2, 0), (1, 1), (3, 100), (1, 8192), (1, 8193), (2, 10_001)]
# Sums are in double, the reference's in the type itself.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def draw(batch, rows, places, dtype, device):
    """Weights of which some are 0, and targets of which some queries have none."""
    generator = torch.Generator().manual_seed(batch * rows + places)
    weights = torch.rand(batch, rows, generator=generator, dtype=dtype)
    weights[torch.rand(batch, rows, generator=generator) < 0.2] = 0
    targets = torch.randint(-1, 2, (batch, rows, places), generator=generator)
    return weights.to(device), targets.to(device)


def by_hand(targets, weights, *, mean):
    """Compute losses in float64, row by row."""
    shape = weights.shape if targets is None else targets.shape[:-1]
    expected = torch.ones(shape, dtype=torch.float64) if weights is None else weights.double().cpu().clone()
    if targets is not None:
        for at in torch.cartesian_prod(*map(torch.arange, shape)) if expected.numel() else ():
            if all(target == -1 for target in targets[tuple(at)].tolist()):
                expected[tuple(at)] = 0
    total = float(expected.sum())
    return expected / total if mean and total > 0 else expected


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("given", ["targets", "weights", "both"])
@pytest.mark.parametrize("places", [0, 1, 3])
def test_weights_of_a_few_queries(device, places, given, mean, dtype):
    for batch, rows in ((2, 0), (1, 1), (3, 40)):
        weights, targets = draw(batch, rows, places, dtype, device)
        targets = targets if given != "weights" else None
        weights = weights if given != "targets" else None
        expected = by_hand(targets, weights, mean=mean)
        for weigh in (_contrast_weights.weigh, _contrast_weights.weigh_plainly):
            actual = weigh(targets, weights, dtype, mean)
            assert actual.dtype == dtype
            torch.testing.assert_close(actual.double().cpu(), expected, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("batch", "rows"), SIZES)
def test_weights_of_many_queries(device, batch, rows, mean, dtype):
    weights, targets = draw(batch, rows, 2, dtype, device)
    for values in (weights, torch.zeros_like(weights), weights.mT.contiguous().mT):
        expected = _contrast_weights.weigh_plainly(targets, values.double(), torch.float64, mean)
        actual = _contrast_weights.weigh(targets, values, dtype, mean)
        torch.testing.assert_close(actual.double(), expected, rtol=TOLERANCE[dtype], atol=0)
        assert torch.equal(actual, _contrast_weights.weigh(targets, values, dtype, mean))
    absent = torch.full_like(targets, -1)
    assert not _contrast_weights.weigh(absent, weights, dtype, mean).any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("batch", "rows"), SIZES)
def test_reducing_losses(device, batch, rows, mean, dtype):
    native = _contrast.native
    weights, _ = draw(batch, rows, 1, dtype, device)
    losses, _ = draw(batch, rows, 0, dtype, device)
    ranks = torch.randint(3, (batch, rows), generator=torch.Generator().manual_seed(1)).to(device)

    def reduced(losses, weights):
        loss, accuracy = (torch.full((), 7, dtype=dtype, device=device) for _ in range(2))
        with_workspace(native.info_nce_reduced, losses, losses, ranks, weights, loss, accuracy, mean)
        return loss.double(), accuracy.double()

    for given in (None, weights, torch.zeros_like(weights)):
        wanted = _contrast.reduced(
            losses.double(), ranks, None if given is None else given.double(), "mean" if mean else "sum"
        )
        torch.testing.assert_close(reduced(losses, given), wanted, rtol=TOLERANCE[dtype], atol=1e-12)
    if rows < 2:
        return
    # Queries of weight 0 are ignored even if their loss is NaN; queries with a weight count.
    for place in ((0, 0), (-1, -1)):
        weights[place], losses[place] = 0, torch.inf
        assert reduced(losses, weights)[0].isfinite()
        weights[place] = 1
        assert reduced(losses, weights)[0].isinf()
        losses[place] = 0


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("present", ["none", "one", "most", "all"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("samples", [None, 4])
def test_queries_without_positives(device, samples, weighted, present, reduction, dtype):
    generator = torch.Generator().manual_seed(3)
    queries, keys = (torch.randn(2, 7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    options = {"targets": torch.randint(7, (2, 7), generator=generator)}
    if present != "all":
        options["targets"][0, 1] = options["targets"][1, 3] = -1
    if present in ("none", "one"):
        options["targets"][:] = -1
    if present == "one":
        options["targets"][1, 2] = 4
    if samples:
        options["negatives"] = torch.randint(7, (2, 7, samples), generator=generator)
    if weighted:
        options["weights"] = torch.rand(2, 7, generator=generator, dtype=torch.float64)
        options["weights"][1, 2] = 0
    options = {name: value.to(device) for name, value in options.items()}

    def results(contrast, dtype):
        inputs = [tensor.to(device, dtype).requires_grad_() for tensor in (queries, keys)]
        loss, accuracy, rank = contrast(*inputs, reduction=reduction, **options)
        return [one.double() for one in (loss.detach(), accuracy, *torch.autograd.grad(loss, inputs))], rank

    actual, rank = results(info_nce, dtype)
    expected, expected_rank = results(info_nce_reference, torch.float64)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert torch.equal(rank, expected_rank)


@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("weighted", [False, True])
def test_pytorch_launches_nothing_around_the_forward_pass(device, monkeypatch, samples, weighted):
    """On CUDA a launch of a few values takes as long as the contrast; and the backward pass only scales."""
    # As on CUDA, where values are not read.
    for module in (_contrast_arguments, _contrast_weights):
        monkeypatch.setattr(module, "values_at_hand", lambda _: False)
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(6, 4, generator=generator).to(device).requires_grad_() for _ in range(2))
    options = {"targets": torch.tensor([0, -1, 3, 2, 1, 5])}
    if samples:
        options["negatives"] = torch.randint(6, (6, samples), generator=generator)
    if weighted:
        options["weights"] = torch.rand(6, generator=generator)
    options = {name: value.to(device) for name, value in options.items()}

    def launches(call):
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            result = call()
        memory = {"empty", "empty_like", "new_empty", "empty_strided", "view", "reshape", "as_strided", "detach", "to"}
        names = [event.key.removeprefix("aten::") for event in profiled.key_averages() if "aten::" in event.key]
        return result, sorted(set(names) - memory)

    output, forward = launches(lambda: info_nce(queries, keys, **options))
    assert forward == []
    _, backward = launches(output.loss.backward)
    assert backward == ["fill_", "mul", "ones_like"]


@pytest.mark.parametrize("mean", [False, True])
def test_the_op_of_weights(mean):
    weights, targets = draw(2, 5, 3, torch.float64, "cpu")
    for given in ((targets, None), (None, weights), (targets, weights)):
        torch.library.opcheck(torch.ops.cpc_ext.info_nce_weights, (*given, torch.float64, mean))
    with pytest.raises(ValueError, match="targets or weights must be given"):
        _contrast_weights.weigh(None, None, torch.float64, mean)
    with pytest.raises(ValueError, match="targets or weights must be given"):
        _contrast_weights.weigh_plainly(None, None, torch.float64, mean)
    with pytest.raises(ValueError, match="row_weights must be float32 or float64"):
        _contrast_weights.weigh(targets, None, torch.float16, mean)
