"""info_nce against the formula written out row by row."""

import math

import pytest
import torch

from cpc_ext.ops import info_nce
from cpc_ext.ops.info_nce import info_nce_reference


def problem(queries=6, keys=9, dim=4, batch=(), dtype=torch.float64, samples=5):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(*batch, queries, dim, generator=generator, dtype=dtype, requires_grad=True)
    k = torch.randn(*batch, keys, dim, generator=generator, dtype=dtype, requires_grad=True)
    targets = torch.randint(keys, (*batch, queries), generator=generator)
    negatives = torch.randint(keys, (*batch, queries, samples), generator=generator)
    return q, k, targets, negatives


def by_formula(queries, keys, targets, negatives=None, scale=1.0, exclude=None):
    """Losses and correctness of [M, D] queries and [N, D] keys, one row after the other."""
    losses, rights = [], []
    for m, query in enumerate(queries):
        target = int(targets[m])
        contrasted = list(range(len(keys))) if negatives is None else [target, *negatives[m].tolist()]
        if exclude is not None:
            contrasted = [n for n in contrasted if n != int(exclude[m])]
        scores = torch.stack([scale * query @ keys[n] for n in contrasted])
        positive = scale * query @ keys[target]
        losses.append(-torch.log(positive.exp() / scores.exp().sum()))
        rights.append(float(all(positive > s for n, s in zip(contrasted, scores, strict=True) if n != target)))
    return torch.stack(losses), torch.tensor(rights, dtype=queries.dtype)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize("implementation", [info_nce, info_nce_reference])
def test_equals_formula(implementation, sampled, excluding):
    queries, keys, targets, negatives = problem()
    negatives = negatives if sampled else None
    exclude = (targets + 2) % 9 if excluding else None

    loss, accuracy = implementation(
        queries, keys, targets, negatives=negatives, scale=0.7, exclude=exclude, reduction="none"
    )
    expected_loss, expected_accuracy = by_formula(queries, keys, targets, negatives, 0.7, exclude)

    torch.testing.assert_close(loss, expected_loss, atol=1e-12, rtol=0)
    torch.testing.assert_close(accuracy, expected_accuracy)
    actual = torch.autograd.grad(loss.sum(), (queries, keys))
    for one, other in zip(actual, torch.autograd.grad(expected_loss.sum(), (queries, keys)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("sampled", [False, True])
def test_batch_entries_contrast_their_own_keys(sampled):
    queries, keys, targets, negatives = problem(batch=(2, 3))
    negatives = negatives if sampled else None
    loss, accuracy = info_nce(queries, keys, targets, negatives=negatives, reduction="none")
    assert loss.shape == accuracy.shape == (2, 3, 6)
    for index in [(0, 0), (0, 2), (1, 1)]:
        one = info_nce(
            queries[index],
            keys[index],
            targets[index],
            negatives=negatives[index] if sampled else None,
            reduction="none",
        )
        torch.testing.assert_close(loss[index], one.loss)
        torch.testing.assert_close(accuracy[index], one.accuracy)


def test_default_targets_are_the_diagonal():
    queries, keys, _, _ = problem()
    torch.testing.assert_close(info_nce(queries, keys).loss, info_nce(queries, keys, torch.arange(6)).loss)


def test_reductions_and_weights():
    queries, keys, targets, _ = problem()
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0, 1.5], dtype=torch.float64)
    losses, rights = by_formula(queries, keys, targets)

    mean = info_nce(queries, keys, targets, weights=weights)
    torch.testing.assert_close(mean.loss, (weights * losses).sum() / weights.sum())
    torch.testing.assert_close(mean.accuracy, (weights * rights).sum() / weights.sum())
    assert not mean.accuracy.requires_grad
    total = info_nce(queries, keys, targets, weights=weights, reduction="sum")
    torch.testing.assert_close(total.loss, (weights * losses).sum())
    torch.testing.assert_close(total.accuracy, mean.accuracy)
    rows = info_nce(queries, keys, targets, weights=weights, reduction="none")
    torch.testing.assert_close(rows.loss, weights * losses)
    torch.testing.assert_close(rows.accuracy, rights)
    torch.testing.assert_close(info_nce(queries, keys, targets).loss, losses.mean())


def test_ties_are_wrong_but_copies_of_the_positive_do_not_count():
    keys = torch.tensor([[1.0], [1.0], [0.0]])
    queries = torch.tensor([[1.0]])
    targets = torch.tensor([0])
    assert info_nce(queries, keys, targets).accuracy == 0
    output = info_nce(queries, keys, targets, negatives=torch.tensor([[0, 2]]))
    assert output.accuracy == 1
    torch.testing.assert_close(output.loss, torch.tensor(math.log(2 * math.e + 1) - 1))
    assert info_nce(torch.zeros(3, 1), torch.zeros(3, 1)).accuracy == 0


@pytest.mark.parametrize("sampled", [False, True])
def test_gradients_by_finite_differences(sampled):
    queries, keys, targets, negatives = problem(3, 4, 2, samples=2)
    weights = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    negatives = negatives if sampled else None
    assert torch.autograd.gradcheck(
        lambda q, k: info_nce(q, k, targets, negatives=negatives, weights=weights, scale=1.3).loss, (queries, keys)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampled", [False, True])
def test_half_precision_sums_in_float32(dtype, sampled):
    queries, keys, targets, negatives = problem(dim=64, dtype=torch.float32)
    queries, keys = (tensor.detach().to(dtype).requires_grad_() for tensor in (queries, keys))
    negatives = negatives if sampled else None
    output = info_nce(queries, keys, targets, negatives=negatives)
    exact = info_nce(queries.double(), keys.double(), targets, negatives=negatives)
    assert output.loss.dtype == output.accuracy.dtype == torch.float32
    torch.testing.assert_close(output.loss.double(), exact.loss, atol=1e-5, rtol=1e-5)
    output.loss.backward()
    assert queries.grad.dtype == keys.grad.dtype == dtype


def test_different_dtypes_are_promoted():
    queries, keys, targets, _ = problem()
    assert info_nce(queries.float(), keys.bfloat16(), targets).loss.dtype == torch.float32
    assert info_nce(queries, keys.float(), targets).loss.dtype == torch.float64


@pytest.mark.parametrize("keys", [0, 4])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_queries(keys, sampled, reduction):
    queries = torch.zeros(0, 3, requires_grad=True)
    negatives = torch.zeros(0, 5, dtype=torch.int64) if sampled else None
    output = info_nce(queries, torch.zeros(keys, 3), negatives=negatives, reduction=reduction)
    assert output.loss.sum() == output.accuracy.sum() == 0
    output.loss.sum().backward()
    assert queries.grad.shape == (0, 3)


def test_empty_batch_and_no_negatives():
    assert info_nce(torch.zeros(0, 2, 3), torch.zeros(0, 4, 3), reduction="none").loss.shape == (0, 2)
    output = info_nce(torch.ones(2, 3), torch.ones(2, 3), negatives=torch.zeros(2, 0, dtype=torch.int32))
    assert output.loss == 0
    assert output.accuracy == 1


def test_large_scores_do_not_overflow():
    output = info_nce(torch.tensor([[1e4], [1e4]]), torch.tensor([[1e4], [-1e4]]))
    assert output.loss == 1e8
    assert output.accuracy == 0.5


Q, K = torch.zeros(3, 2), torch.zeros(4, 2)
INDICES = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": None}, TypeError, "queries must be a tensor, got NoneType"),
        ({"queries": Q.long()}, TypeError, "queries must be floating, got torch.int64"),
        ({"queries": Q[0]}, ValueError, r"queries must be \[\*, M, D\], got shape \(2,\)"),
        ({"keys": K[0]}, ValueError, r"keys must be \[\*, N, D\], got shape \(2,\)"),
        ({"keys": K[:, :1]}, ValueError, r"keys must have the leading dimensions and the D of queries \(3, 2\)"),
        ({"keys": K.to("meta")}, ValueError, "keys must be on the queries' device cpu, got meta"),
        ({"keys": K[:2]}, ValueError, r"more queries \(3\) than keys \(2\)"),
        ({"targets": [0, 1, 2]}, TypeError, "targets must be a tensor or None, got list"),
        ({"targets": INDICES.float()}, TypeError, "targets must be integers, got torch.float32"),
        ({"targets": INDICES[:2]}, ValueError, r"targets must have shape \(3\), got \(2,\)"),
        ({"targets": INDICES + 4}, IndexError, r"targets must be in 0..3 for 4 keys, got 4..4"),
        ({"targets": INDICES - 1}, IndexError, r"targets must be in 0..3 for 4 keys, got -1..-1"),
        ({"negatives": INDICES}, ValueError, r"negatives must have shape \(3, S\), got \(3,\)"),
        ({"negatives": INDICES[:2].view(2, 1)}, ValueError, r"negatives must have shape \(3, S\), got \(2, 1\)"),
        ({"negatives": INDICES.view(3, 1) + 9}, IndexError, "negatives must be in 0..3"),
        ({"exclude": INDICES.bool()}, TypeError, "exclude must be integers, got torch.bool"),
        ({"exclude": INDICES + 4}, IndexError, "exclude must be in 0..3"),
        ({"exclude": INDICES}, ValueError, "exclude must not name the positive key"),
        ({"weights": INDICES}, TypeError, "weights must be floating, got torch.int64"),
        ({"weights": torch.ones(4)}, ValueError, r"weights must have shape \(3\), got \(4,\)"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ({"reduction": "max"}, ValueError, 'reduction must be "mean", "sum" or "none", got \'max\''),
    ],
)
def test_wrong_arguments(change, error, message):
    with pytest.raises(error, match=message):
        info_nce(**{"queries": Q, "keys": K, **change})
