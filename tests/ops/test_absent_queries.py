"""info_nce ignores queries of weight 0, whatever their values."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import grad

from cpc_ext.ops import info_nce
from cpc_ext.ops.info_nce import info_nce_reference

ABSENT = torch.tensor([False, True, False, False, True, False, True, False, False])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def problem(device, dtype, samples, *, keys=11, dim=6, of_absent=math.nan):
    """Return queries, keys and options, with NaN in the absent queries."""
    generator = torch.Generator().manual_seed(0)
    rows = len(ABSENT)
    queries, keys = (torch.randn(n, dim, generator=generator, dtype=torch.float64) for n in (rows, keys))
    queries[ABSENT] = of_absent
    options = {"targets": torch.randint(len(keys), (rows,), generator=generator), "scale": 0.7}
    if samples:
        options["negatives"] = torch.randint(len(keys), (rows, samples), generator=generator)
    weights = (torch.rand(rows, generator=generator) + 0.5) * ~ABSENT
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    tensors = [tensor.to(device, dtype).requires_grad_() for tensor in (queries, keys, weights)]
    return tensors, options


@pytest.mark.parametrize("of_absent", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_results_and_gradients_are_those_without_the_absent_queries(device, reduction, dtype, samples, of_absent):
    (queries, keys, weights), options = problem(device, dtype, samples, of_absent=of_absent)
    loss, accuracy, _ = info_nce(queries, keys, weights=weights, reduction=reduction, **options)
    present = ~ABSENT.to(device)
    exact = [tensor.detach().double().requires_grad_() for tensor in (queries[present], keys, weights[present])]
    kept = {name: value[present] if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    expected, expected_accuracy, _ = info_nce_reference(
        exact[0], exact[1], weights=exact[2], reduction=reduction, **kept
    )
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    if reduction == "none":
        assert not loss[~present].any()
        loss, accuracy = loss[present], accuracy[present]
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    torch.testing.assert_close(accuracy.double(), expected_accuracy, **tolerance)
    of_queries, of_keys, of_weights = grad(loss.sum(), (queries, keys, weights))
    assert not of_queries[~present].any()
    assert not of_weights[~present].any() or of_absent == 1e30  # A finite loss has a slope in the query's weight.
    wanted = grad(expected.sum(), exact)
    for one, other in zip((of_queries[present], of_keys, of_weights[present]), wanted, strict=True):
        torch.testing.assert_close(one.double(), other, **tolerance)


def test_a_finite_query_of_weight_0_has_a_slope_in_its_weight(device):
    (queries, keys, weights), options = problem(device, torch.float64, None, of_absent=0.3)
    exact = [tensor.detach().cpu().requires_grad_() for tensor in (queries, keys, weights)]
    (ours,) = grad(info_nce(queries, keys, weights=weights, **options).loss, weights)
    options = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    (expected,) = grad(info_nce_reference(*exact[:2], weights=exact[2], **options).loss, exact[2])
    assert expected[ABSENT].all()
    torch.testing.assert_close(ours.cpu(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_keys_that_only_absent_queries_contrast_get_zeros(device, reduction):
    queries = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(device)
    keys = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).to(device)
    keys[[0, 5]] = math.nan
    targets, negatives = (torch.tensor(value, device=device) for value in ([1, 0, 2, 3], [[2], [5], [4], [1]]))
    weights = torch.tensor([1.0, 0.0, 2.0, 3.0], device=device)
    queries[1] = math.nan
    for tensor in (queries, keys, weights):
        tensor.requires_grad_()
    loss = info_nce(queries, keys, targets, negatives=negatives, weights=weights, reduction=reduction).loss.sum()
    of_queries, of_keys, of_weights = grad(loss, (queries, keys, weights))
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in (of_queries, of_keys, of_weights))
    assert not of_queries[1].any()
    assert not of_keys[[0, 5]].any()
    assert of_keys[[1, 2, 3, 4]].any(1).all()


def test_a_batch_entry_whose_queries_are_all_absent(device):
    queries, keys = (torch.randn(2, n, 5, generator=torch.Generator().manual_seed(n)).to(device) for n in (3, 4))
    keys[1], queries[1] = math.nan, math.inf
    weights = torch.tensor([[1.0, 2, 3], [0, 0, 0]], device=device)
    alone = [tensor[:1].clone().requires_grad_() for tensor in (queries, keys)]
    queries.requires_grad_(), keys.requires_grad_()
    ours = info_nce(queries, keys, weights=weights)
    expected = info_nce(*alone, weights=weights[:1])
    torch.testing.assert_close(ours[:2], expected[:2])
    assert torch.equal(ours.rank[:1], expected.rank)
    for one, other in zip(grad(ours.loss, (queries, keys)), grad(expected.loss, alone), strict=True):
        torch.testing.assert_close(one[:1], other)
        assert not one[1].any()


def test_rows_that_a_mask_leaves_out_of_unreduced_losses(device):
    (queries, keys, _), options = problem(device, torch.float32, None)
    present = ~ABSENT.to(device)
    losses = info_nce(queries, keys, reduction="none", **options).loss
    assert losses[~present].isnan().all()
    of_queries, of_keys = grad(losses[present].mean(), (queries, keys))
    assert of_queries[present].any(1).all()
    assert not of_queries[~present].any()
    assert of_keys.isfinite().all()
