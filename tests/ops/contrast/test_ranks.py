"""Ranks and accuracies: equal keys tie at any position, and a tie counts as a miss."""

from __future__ import annotations

import itertools

import pytest
import torch

from cpc_ext.ops import info_nce
from cpc_ext.ops._contrast import Results, contrast_op
from cpc_ext.ops._contrast_arguments import ContrastOptions, flat_problem
from tests.ops.contrast.draw import DTYPES, draw


def run(queries, keys, measure, thresholds=None, **options) -> Results:
    """Run the op as in a ring of ranks: returns the best positives' scores, or takes them as thresholds."""
    problem, _ = flat_problem(queries, keys, ContrastOptions(**options), measure)
    thresholds = None if thresholds is None else thresholds.unsqueeze(0)
    return Results(*contrast_op(*problem, None, thresholds, "none", [False] * 5 + [True]))


@pytest.fixture
def every(request: pytest.FixtureRequest) -> int:
    """The step between tested shapes or positions: 7 on the emulated device, which divides none of their numbers."""
    return 7 if request.node.callspec.params["device"] == "emulated" else 1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_collapsed_encoder_ranks_last(device, every, dtype, symmetric):
    """All keys are equal, so no query tells its own from any other, whatever their number and size."""
    generator = torch.Generator().manual_seed(0)
    shapes = itertools.product(
        (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 64, 65, 100), (2, 3, 7, 8, 9, 47, 48, 49, 63, 65, 97)
    )
    for dim, size in itertools.islice(shapes, 0, None, every):
        one = torch.randn(dim, generator=generator).to(dtype)
        queries = torch.randn(size, dim, generator=generator).to(dtype)
        result = info_nce(queries.to(device), one.expand(size, dim).to(device), scale=0.37, symmetric=symmetric)
        assert result.accuracy == 0, (dim, size)
        assert (result.rank == size - 1).all(), (dim, size)


@pytest.mark.parametrize("samples", [None, 50])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_copy_of_the_positive_ties_at_every_place(device, every, dtype, samples):
    """One copy among keys that score lower or higher, moved along all of N."""
    generator = torch.Generator().manual_seed(1)
    for num_keys, dim in ((67, 33), (130, 7), (9, 64)):
        keys = torch.randn(num_keys, dim, generator=generator).to(dtype)
        positive = num_keys // 3
        # A query of each place has a batch entry to itself, in which the copy lies there.
        places = torch.arange(0, num_keys, every)
        count = len(places)
        queries = torch.randn(1, dim, generator=generator).to(dtype).expand(count, dim)
        entries = keys.repeat(count, 1, 1)
        entries[torch.arange(count), places] = keys[positive]
        negatives = None
        if samples:
            negatives = torch.randint(num_keys, (count, 1, samples), generator=generator)
            negatives[:, 0, -1] = places
            negatives = negatives.to(device)
        result = info_nce(
            queries.unsqueeze(1).to(device),
            entries.to(device),
            torch.full((count, 1), positive, device=device),
            negatives=negatives,
            scale=0.37,
        )
        scores = (entries.double() @ queries[0].double()) * 0.37
        higher = scores > scores[:, positive : positive + 1] + 1e-4
        for m, (place, rank) in enumerate(zip(places.tolist(), result.rank.squeeze(1).tolist(), strict=True)):
            contrasted = range(num_keys) if negatives is None else negatives[m, 0].tolist()
            expected = sum(n != positive and (n == place or bool(higher[m, n])) for n in contrasted)
            assert rank == expected, (num_keys, dim, place)


@pytest.mark.parametrize("samples", [None, 6])
def test_exact_scores_have_exact_ranks(device, samples):
    """Small integers, of which many tie: those that are level with the best positive count."""
    problem = draw((40, 30, 3), positives=3, excluded=2, ranges=True, contrast="other", samples=samples, scale=0.5)
    problem.learns = {name: tensor.mul(2).round() for name, tensor in problem.learns.items()}
    problem.learns["key_bias"] = torch.randint(-1, 2, (30,), generator=torch.Generator().manual_seed(0)).float()
    _, by_hand = problem.exactly()
    assert (by_hand.least < by_hand.most).sum() > 2
    assert torch.equal(problem.run(device).rank.cpu(), by_hand.most)


def test_more_keys_than_a_float_counts():
    """Each of them ties with the positive."""
    count = 2**24 + 51
    result = info_nce(torch.ones(2, 1), torch.ones(count, 1))
    assert result.rank.tolist() == [count - 1] * 2


def test_ranks_are_of_the_best_positive(device):
    queries, keys = torch.ones(1, 1, device=device), torch.tensor([[1.0], [5], [3], [4], [2]], device=device)

    def rank(*targets, **options):
        return int(info_nce(queries, keys, torch.tensor([targets], device=device), **options).rank)

    assert [rank(n) for n in range(5)] == [4, 0, 2, 1, 3]
    assert rank(0, 2) == 2
    assert rank(0, 3, -1) == 1
    assert rank(3, exclude=torch.tensor([[1]], device=device)) == 0
    assert rank(0, key_range=torch.tensor([[2, 4]], device=device)) == 2
    assert rank(0, negatives=torch.tensor([[1, 1, 0, 4]], device=device)) == 3
    assert rank(2, key_bias=torch.tensor([0.0, 0, 0, 0, 1], device=device)) == 3
    assert rank(1, scale=-1) == 4
    assert rank(1, scale=0) == 4


def test_weighted_accuracy(device):
    queries, keys = torch.eye(4, device=device), torch.eye(4, device=device)
    targets = torch.tensor([0, 1, 1, 3], device=device)
    weights = torch.tensor([1.0, 2, 3, 0.5], device=device)
    result = info_nce(queries, keys, targets, weights=weights)
    assert result.rank.tolist() == [0, 0, 3, 0]
    assert float(result.accuracy) == pytest.approx(3.5 / 6.5)
    assert info_nce(queries, keys, targets, weights=weights, reduction="none").accuracy.tolist() == [1, 1, 0, 1]


def test_a_score_that_is_no_number_is_not_below(device):
    keys = torch.tensor([[1.0], [torch.nan], [0.0], [torch.nan]], device=device)
    result = info_nce(torch.ones(3, 1, device=device), keys, torch.tensor([0, 1, 2], device=device), reduction="none")
    assert result.rank.tolist() == [2, 3, 3]
    assert not result.accuracy.any()


# --- What contrasts over several processes are made of ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"contrast": "other"}, {"ranges": True}, {"bias": torch.float32}],
                         ids=["plain", "groups", "ranges", "bias"])  # fmt: skip
def test_log_sums_and_ranks_of_parts_of_the_keys(device, dtype, options):
    """Log-sums of parts merge to that of all, and counts above a positive's score add up to its rank."""
    problem = draw((9, 20, 6), dtype, targets=True, **options)
    arguments = problem.arguments(device)
    whole = info_nce(**arguments, reduction="none")
    targets, queries, keys = (arguments.pop(name) for name in ("targets", "queries", "keys"))
    ranges = arguments.pop("key_range", None)

    def of(name, part, thresholds=None, **more):
        """Run the op on a part of the keys."""
        begin, end = part
        given = {key: value for key, value in arguments.items() if key not in ("key_bias", "groups")} | more
        if "key_bias" in arguments:
            given["key_bias"] = arguments["key_bias"][begin:end]
        if "groups" in arguments:
            given["groups"] = (arguments["groups"][0], arguments["groups"][1][begin:end])
        if ranges is not None:
            given["key_range"] = (ranges - begin).clamp(0, end - begin)
        return run(queries, keys[begin:end], name, thresholds, **given)

    def positive_of(part):
        begin, end = part
        inside = (targets >= begin) & (targets < end)
        return torch.where(inside, targets - begin, -1)

    with torch.no_grad():
        parts = [(0, 7), (7, 8), (8, 20)]
        bests = torch.stack([of("softmax", part, targets=positive_of(part)).bests[0] for part in parts])
        assert (bests.isfinite().sum(0) == 1).all()  # The positive lies in one of them.
        best = bests.amax(0)
        ranks = 0
        sums = []
        for part in parts:
            exclude = positive_of(part)
            result = of("log_sum", part, exclude=exclude, thresholds=best)
            ranks = ranks + result.rank[0]
            sums.append(result.loss[0])
        total = torch.stack([*sums, best]).logsumexp(0)
    assert torch.equal(ranks, whole.rank)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(total - best, whole.loss.detach(), atol=tolerance, rtol=tolerance)


def test_thresholds_count_what_reaches_them(device):
    queries, keys = torch.ones(4, 1, device=device), torch.tensor([[1.0], [5], [3], [4], [2]], device=device)
    thresholds = torch.tensor([3.0, 3.5, -torch.inf, torch.nan], device=device)
    result = run(queries, keys, "log_sum", thresholds)
    assert result.rank.tolist() == [[3, 2, 5, 5]]
