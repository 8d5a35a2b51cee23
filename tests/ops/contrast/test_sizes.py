"""Sizes at the edges of the kernels' blocks of queries and keys, and empty dimensions."""

from __future__ import annotations

import pytest
import torch

from cpc_ext.ops import info_nce, scores_logsumexp, sigmoid_contrast
from tests.ops.contrast.draw import DTYPES, draw
from tests.ops.contrast.test_options import OPTIONS

CPU = torch.device("cpu")
EVERYTHING = OPTIONS["everything"]


@pytest.mark.parametrize("measure", ["softmax", "log_sum", "sigmoid"])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (8, 48, 16), (9, 49, 17), (16, 47, 15), (7, 96, 8), (15, 97, 33), (17, 63, 64), (65, 64, 65),
     (64, 65, 3), (130, 129, 31)], ids=str,
)  # fmt: skip
def test_edges_of_blocks(device, shape, measure):
    options = {name: value for name, value in EVERYTHING.items() if measure == "softmax" or name in ("scale",)}
    if measure == "sigmoid":
        options["positives"] = 2
    elif measure == "log_sum":
        options |= {"excluded": 2, "ranges": True}
    draw(shape, measure=measure, **options).check(device)


@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 49, 17), (65, 33, 64), (33, 5, 130)], ids=str)
@pytest.mark.parametrize("samples", [0, 1, 17, 64])
def test_edges_of_blocks_of_samples(device, shape, samples):
    draw(shape, samples=samples, **EVERYTHING).check(device)


@pytest.mark.parametrize("places", [2, 8, 33])
@pytest.mark.parametrize("samples", [None, 9])
def test_many_positives_and_exclusions(device, places, samples):
    draw((19, 90, 8), positives=places, excluded=places + 1, samples=samples).check(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(383, 500, 70), (385, 90, 9), (770, 100, 1030)], ids=str)
def test_blocks_of_queries(shape, dtype):
    draw(shape, dtype, **EVERYTHING).check(CPU, by_reference=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(400, 4100, 5), (3, 9000, 7), (1500, 1100, 2)], ids=str)
def test_more_scores_than_are_computed_at_once(shape, dtype):
    draw(shape, dtype, **EVERYTHING).check(CPU, by_reference=True)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_more_scores_of_both_directions_than_are_kept(batch):
    size = 1500 if batch else 2100
    draw((size, size, 4), batch=batch, symmetric=True, weights=True, ranges=True).check(CPU, by_reference=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"targets": True, "weights": True}, {"positives": 2}, EVERYTHING], ids=len)
def test_chunks_of_keys(device, monkeypatch, dtype, options):
    """Gradients of all parts, of more features than one tile has."""
    monkeypatch.setenv("CPC_EMULATION_POWERS_KIB", "512")
    draw((5, 600, 250), dtype, **options).check(device)


def test_groups_of_queries_in_both_directions(device, monkeypatch):
    monkeypatch.setenv("CPC_EMULATION_POWERS_KIB", "512")
    draw((1030, 1030, 4), torch.bfloat16, symmetric=True, weights=True, scale=0.7).check(device, by_reference=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operands_at_any_address(device, dtype):
    """Products copy 16 bytes at a time, which rows need not begin at."""
    values = torch.randn(90 * 16 + 1, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    moved, still = (
        [view[: 60 * 16].view(60, 16), view[30 * 16 :].view(60, 16)] for view in (values[1:], values[1:].clone())
    )
    results = []
    for queries, keys in (moved, still):
        inputs = [tensor.detach().requires_grad_() for tensor in (queries, keys)]
        loss = info_nce(*inputs).loss
        results.append([loss, *torch.autograd.grad(loss, inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 3), (0, 0, 3), (3, 4, 0)], ids=str)
@pytest.mark.parametrize("samples", [None, 2])
def test_nothing_in_a_dimension(device, shape, samples):
    options = {name: value for name, value in EVERYTHING.items() if name != "positives"}
    draw(shape, samples=samples if shape[1] else None, **options).check(device)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_queries(device, reduction):
    queries, keys = torch.zeros(0, 3, device=device, requires_grad=True), torch.ones(4, 3, device=device)
    for loss in (
        info_nce(queries, keys, reduction=reduction).loss,
        sigmoid_contrast(queries, keys, bias=-10.0, reduction=reduction),
        scores_logsumexp(queries, keys),
        info_nce(queries, keys[:0], symmetric=True, reduction=reduction).loss,
    ):
        assert loss.sum() == 0
        assert torch.autograd.grad(loss.sum(), queries)[0].shape == (0, 3)


def test_no_keys(device):
    queries = torch.ones(3, 2, device=device, requires_grad=True)
    sums = scores_logsumexp(queries, torch.ones(0, 2, device=device))
    assert (sums == -torch.inf).all()
    assert not torch.autograd.grad(sums, queries, torch.ones_like(sums))[0].any()
    nobody = torch.full((3, 2), -1, device=device)
    for loss in (
        info_nce(queries, torch.ones(0, 2, device=device), nobody).loss,
        sigmoid_contrast(queries, torch.ones(0, 2, device=device), nobody),
    ):
        assert loss == 0
        assert not torch.autograd.grad(loss, queries)[0].any()
