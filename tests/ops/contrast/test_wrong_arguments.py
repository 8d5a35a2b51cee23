"""Wrong arguments of the contrastive ops: errors that name them, or NaN rows on devices whose values are not read."""

from __future__ import annotations

import math

import pytest
import torch

from cpc_ext.ops import info_nce, scores_logsumexp
from tests.ops.contrast.draw import draw

Q, K = torch.zeros(3, 2), torch.zeros(4, 2)
INDICES = torch.zeros(3, dtype=torch.int64)
RANGES = torch.tensor([[0, 4], [1, 1], [2, 3]])
GROUPS = (INDICES, torch.zeros(4, dtype=torch.int64))


def ranges(begin: int, end: int) -> torch.Tensor:
    return torch.tensor([[0, 4], [begin, end], [2, 3]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"queries": None}, TypeError, "queries must be a tensor, got NoneType"),
        ({"queries": Q.long()}, TypeError, "queries must be floating, got torch.int64"),
        ({"queries": Q.to(torch.float8_e4m3fn)}, TypeError, "queries must be floating with 16 bits or more"),
        ({"queries": Q.to_sparse()}, TypeError, "queries must be a dense tensor"),
        ({"queries": Q[0]}, ValueError, r"queries must be \[\*, M, D\], got shape \(2,\)"),
        ({"keys": K[0]}, ValueError, r"keys must be \[\*, N, D\], got shape \(2,\)"),
        ({"keys": K[:, :1]}, ValueError, r"keys must have the leading dimensions and the D of queries \(3, 2\)"),
        ({"keys": K.to("meta")}, ValueError, "keys must be on the queries' device cpu, got meta"),
        ({"keys": K[:2]}, ValueError, r"more queries \(3\) than keys \(2\)"),
        ({"targets": [0, 1, 2]}, TypeError, "targets must be a tensor or None, got list"),
        ({"targets": INDICES.float()}, TypeError, "targets must be integers, got torch.float32"),
        ({"targets": INDICES[:2]}, ValueError, r"targets must have shape \(3\) or \(3, P\), got \(2,\)"),
        ({"targets": INDICES.view(1, 3)}, ValueError, r"targets must have shape \(3\) or \(3, P\), got \(1, 3\)"),
        ({"targets": INDICES + 4}, IndexError, r"targets must be in 0..3 for 4 keys, or -1 for none, got 4..4"),
        ({"targets": INDICES - 2}, IndexError, r"targets must be in 0..3 for 4 keys, or -1 for none, got -2..-2"),
        ({"targets": INDICES.view(3, 1) + torch.tensor([-1, 4])}, IndexError, "targets must be in 0..3 .* got -1..4"),
        ({"negatives": INDICES}, ValueError, r"negatives must have shape \(3, S\), got \(3,\)"),
        ({"negatives": INDICES[:2].view(2, 1)}, ValueError, r"negatives must have shape \(3, S\), got \(2, 1\)"),
        ({"negatives": INDICES.view(3, 1) + 9}, IndexError, "negatives must be in 0..3"),
        ({"negatives": INDICES.view(3, 1) - 1}, IndexError, "negatives must be in 0..3 for 4 keys, got -1"),
        ({"exclude": INDICES.bool()}, TypeError, "exclude must be integers, got torch.bool"),
        ({"exclude": INDICES[:1]}, ValueError, r"exclude must have shape \(3\) or \(3, E\), got \(1,\)"),
        ({"exclude": INDICES + 4}, IndexError, "exclude must be in 0..3 for 4 keys, or -1 for none"),
        ({"exclude": INDICES - 2}, IndexError, "exclude must be in 0..3"),
        ({"exclude": INDICES}, ValueError, "exclude must not name a positive key"),
        (
            {"exclude": torch.tensor([[-1, 3]] * 3), "targets": torch.tensor([[0, -1], [1, 3], [2, 0]])},
            ValueError,
            "exclude must not name a positive key",
        ),
        ({"key_range": RANGES.float()}, TypeError, "key_range must be integers, got torch.float32"),
        ({"key_range": RANGES[:, 0]}, ValueError, r"key_range must have shape \(3, 2\), got \(3,\)"),
        ({"key_range": RANGES.T.contiguous()}, ValueError, r"key_range must have shape \(3, 2\), got \(2, 3\)"),
        ({"key_range": ranges(3, 2)}, IndexError, r"key_range must be .* for 4 keys, got \[3, 2\]"),
        ({"key_range": ranges(-1, 2)}, IndexError, r"key_range must be .* for 4 keys, got \[-1, 2\]"),
        ({"key_range": ranges(1, 5)}, IndexError, r"key_range must be .* for 4 keys, got \[1, 5\]"),
        ({"key_range": ranges(5, 5)}, IndexError, r"key_range must be .* for 4 keys, got \[5, 5\]"),
        ({"key_bias": torch.zeros(3)}, ValueError, r"key_bias must have shape \(4\), got \(3,\)"),
        ({"key_bias": torch.zeros(4).long()}, TypeError, "key_bias must be floating, got torch.int64"),
        ({"key_bias": 1.0}, TypeError, "key_bias must be a tensor or None, got float"),
        ({"groups": GROUPS}, ValueError, 'groups needs contrast="same" or "other"'),
        ({"contrast": "same"}, ValueError, 'contrast="same" needs groups'),
        ({"contrast": "mine", "groups": GROUPS}, ValueError, 'contrast must be "all", "same" or "other", got \'mine\''),
        ({"contrast": None}, ValueError, 'contrast must be "all", "same" or "other", got None'),
        ({"groups": INDICES, "contrast": "same"}, TypeError, r"groups must be a pair \(query_groups, key_groups\)"),
        ({"groups": GROUPS[:1], "contrast": "same"}, TypeError, "groups must be a pair"),
        ({"groups": "ab", "contrast": "same"}, TypeError, "groups must be a pair"),
        ({"groups": (None, INDICES), "contrast": "same"}, TypeError, "query_groups must be a tensor, got None"),
        ({"groups": GROUPS[::-1], "contrast": "other"}, ValueError, r"query_groups must have shape \(3\), got \(4,\)"),
        ({"groups": (INDICES, INDICES), "contrast": "other"}, ValueError, r"key_groups must have shape \(4\)"),
        ({"groups": (INDICES, GROUPS[1].float()), "contrast": "other"}, TypeError, "key_groups must be integers"),
        ({"weights": INDICES}, TypeError, "weights must be floating, got torch.int64"),
        ({"weights": torch.ones(4)}, ValueError, r"weights must have shape \(3\), got \(4,\)"),
        ({"weights": torch.tensor([1.0, -0.5, 0])}, ValueError, "weights must not be negative, got -0.5"),
        ({"scale": "1"}, TypeError, "scale must be a number or a tensor, got str"),
        ({"scale": True}, TypeError, "scale must be a number or a tensor, got bool"),
        ({"scale": None}, TypeError, "scale must be a number or a tensor, got NoneType"),
        ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ({"scale": -math.nan}, ValueError, "scale must be finite, got nan"),
        ({"scale": 10**400}, ValueError, "scale must be finite, got 1000"),
        (
            {"scale": torch.ones(1)},
            ValueError,
            r"scale must be a number or a tensor without dimensions, got shape \(1,",
        ),
        ({"scale": torch.tensor(math.nan)}, ValueError, "scale must be finite, got nan"),
        ({"scale": torch.tensor(-math.inf, requires_grad=True)}, ValueError, "scale must be finite, got -inf"),
        ({"scale": torch.tensor(1j)}, TypeError, "scale must be a real number, got torch.complex64"),
        ({"scale": torch.tensor(True)}, TypeError, "scale must be a real number, got torch.bool"),
        ({"symmetric": True}, ValueError, "symmetric needs as many keys as queries, got 4 keys, 3 queries"),
        (
            {"symmetric": True, "keys": K[:3], "negatives": INDICES.view(3, 1)},
            ValueError,
            "symmetric contrasts all keys and queries: it takes no negatives",
        ),
        (
            {"symmetric": True, "keys": K[:3], "targets": INDICES.view(3, 1)},
            ValueError,
            r"symmetric needs one positive a query, got targets \(3, 1\)",
        ),
        (
            {"symmetric": True, "keys": K[:3], "targets": torch.tensor([0, 2, 2])},
            ValueError,
            "symmetric needs targets that are a permutation of the keys",
        ),
        ({"symmetric": True, "keys": K[:3], "targets": torch.tensor([0, 1, 3])}, ValueError, "a permutation"),
        ({"symmetric": True, "keys": K[:3], "targets": torch.tensor([0, 1, -1])}, ValueError, "a permutation"),
        ({"reduction": "max"}, ValueError, 'reduction must be "mean", "sum" or "none", got \'max\''),
    ],
)
def test_named_errors(change, error, message):
    with pytest.raises(error, match=message):
        info_nce(**{"queries": Q, "keys": K, **change})
    if (
        change.keys() <= {"exclude", "key_range", "key_bias", "groups", "contrast", "scale"}
        and "positive" not in message
    ):
        with pytest.raises(error, match=message):
            scores_logsumexp(Q, K, **change)


def test_log_sums_have_no_positives():
    """So that there may be more queries than keys, and none that cannot be excluded."""
    sums = scores_logsumexp(torch.zeros(3, 2), torch.zeros(2, 2), exclude=torch.tensor([0, 1, -1]))
    torch.testing.assert_close(sums, torch.tensor([1.0, 1, 2]).log())


WRONG = {
    "targets": [-2, 11, 2**62, -(2**63)],
    "negatives": [-1, 11, 2**62],
    "exclude": [-2, 11, 2**62],
    "key_range": [[-1, 3], [4, 3], [4, 12], [12, 12], [0, 2**62], [-(2**63), 2**63 - 1]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
@pytest.mark.parametrize("samples", [None, 3])
def test_rows_that_are_wrong(device, request, name, value, samples):
    """An IndexError on the CPU. Elsewhere that row is no number, and no other row notices."""
    if name == "negatives" and samples is None:
        return
    problem = draw((9, 11, 6), positives=2, excluded=2, ranges=True, samples=samples, bias=torch.float32, seed=1)
    problem.given["exclude"][4], problem.given["targets"][4] = torch.tensor([3, 4]), torch.tensor([5, 6])
    if samples:
        problem.given["negatives"][4] = torch.tensor([1, 2, 7])
    problem.given["key_range"][4] = torch.tensor([0, 11])
    wrong = draw((9, 11, 6), positives=2, seed=1)
    wrong.learns, wrong.given = (
        problem.learns,
        {key: tensor.clone() if isinstance(tensor, torch.Tensor) else tensor for key, tensor in problem.given.items()},
    )
    if name == "key_range":
        wrong.given[name][4] = torch.tensor(value)
    else:
        wrong.given[name][4, -1] = value
    assert_one_row_is_no_number(device, request, wrong, problem, 4, IndexError, f"{name} must be")


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_positive_that_is_excluded(device, request, samples, place):
    problem = draw((9, 11, 6), positives=3, samples=samples)
    problem.given["targets"][4] = torch.tensor([3, 8, -1])
    problem.given["exclude"] = torch.full((9, 3), -1)
    wrong = draw((9, 11, 6), positives=3, samples=samples)
    wrong.given |= {"targets": problem.given["targets"], "exclude": problem.given["exclude"].clone()}
    wrong.given["exclude"][4, place] = 8
    assert_one_row_is_no_number(device, request, wrong, problem, 4, ValueError, "exclude must not name a positive")


def assert_one_row_is_no_number(device, request, wrong, right, row, error, message):
    """Assert that a wrong problem gives NaN in that row and right results elsewhere; on the CPU, that it is refused."""
    if request.node.callspec.params["device"] == "cpu":
        with pytest.raises(error, match=message):
            wrong.run(device)
        return
    good = torch.arange(9) != row
    results, expected = wrong.run(device, "none"), right.run(device, "none")
    assert results.loss[row].isnan()
    assert results.accuracy[row] == 0
    assert results.rank[row] == -1
    assert results.gradients["queries"][row].isnan().all()
    for one, other in ((results.loss, expected.loss), (results.rank, expected.rank)):
        assert torch.equal(one[good], other[good])
    # The row does not contribute to other gradients either, as if it were absent.
    right.learns["weights"] = good.float()
    expected = right.run(device, "none")
    assert torch.equal(results.gradients["queries"][good], expected.gradients["queries"][good])
    for name in ("keys", "key_bias"):
        if name in results.gradients:
            torch.testing.assert_close(results.gradients[name], expected.gradients[name])


@pytest.mark.parametrize("wrong", [[0, 2, 2], [0, 1, 3], [-1, 1, 2]])
def test_targets_that_are_no_permutation_elsewhere(device, request, wrong):
    """Every loss is no number then, where the values are not at hand: here under a transform."""
    queries, keys = (tensor.to(device) for tensor in draw((3, 3, 2)).learns.values())
    targets = torch.tensor([wrong], device=device)
    losses = torch.vmap(lambda targets: info_nce(queries, keys, targets, symmetric=True, reduction="none").loss)
    right = torch.tensor([[2, 0, 1]], device=device)
    expected = info_nce(queries, keys, right[0], symmetric=True, reduction="none").loss
    torch.testing.assert_close(losses(right)[0], expected)
    assert losses(targets).isnan().all()
