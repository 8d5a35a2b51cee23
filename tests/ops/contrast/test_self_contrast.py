"""Queries that are their own keys: contrasts by hand, and the same as with keys that are a copy of them."""

from __future__ import annotations

import math

import pytest
import torch

from cpc_ext.ops import info_nce, scores_logsumexp
from tests.ops.contrast.draw import DTYPES, Problem, assert_same_bits, draw
from tests.ops.test_info_nce import peak_bytes

CPU = torch.device("cpu")


def own(size: int, *batch: int) -> torch.Tensor:
    return torch.arange(size).expand(*batch, size)


def drawn(size: int, dim: int, dtype: torch.dtype = torch.float64, batch: tuple[int, ...] = (), **options) -> Problem:
    """Pairs of queries, each the other's positive; ``groups`` "same" or "other", whose members are contrasted."""
    groups = options.pop("groups", None)
    excluded = {"exclude": own(size, *batch)} if options.pop("apart", size > 2) else {}
    problem = draw((size, size, dim), dtype, batch=batch, alone=True, permuted=True, **options, **excluded)
    if groups is not None:
        of_queries = torch.randint(0, 3, (*batch, size), generator=torch.Generator().manual_seed(size))
        problem.given |= {"groups": (of_queries, of_queries.clone()), "contrast": groups}
    return problem


# Options with which pairs are symmetric; others must be contrasted as queries and keys.
MUTUAL = {
    "pairs": {},
    "with themselves": {"apart": False},
    "weights": {"weights": True},
    "same group": {"groups": "same"},
    "other groups": {"groups": "other"},
    "scale": {"scale": torch.tensor(-0.7, requires_grad=True)},
}
ONE_WAY = {
    "ranges": {"ranges": True},
    "excluded": {"excluded": 2, "apart": False},
    "bias": {"bias": torch.float32},
    "sampled": {"samples": 4},
    "groups that differ": {"contrast": "other"},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MUTUAL | ONE_WAY)
def test_each_option(device, name, dtype):
    drawn(12, 6, dtype, **(MUTUAL | ONE_WAY)[name]).check(device)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch", [(2, 2), (0,)])
@pytest.mark.parametrize("name", ["pairs", "weights", "excluded"])
def test_reductions_and_batches(device, batch, reduction, name):
    drawn(8, 5, batch=batch, **(MUTUAL | ONE_WAY)[name]).check(device, reduction)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [0, 1, 2])
def test_few_queries(device, size, dim):
    drawn(size, dim).check(device)


@pytest.mark.parametrize("targets", ["several", "one way", "none"])
def test_positives(device, targets):
    """Several, which name each other or do not, and none but the queries themselves."""
    size = 14
    problem = draw((size, size, 5), torch.float64, alone=True)
    pairs = torch.stack([own(size).roll(size // 2), own(size), torch.full((size,), -1)], -1)
    if targets == "several":
        problem.given["targets"] = pairs
    elif targets == "one way":
        problem.given["targets"] = own(size).roll(1)
    problem.check(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MUTUAL)
@pytest.mark.parametrize("size", [384, 386, 770])
def test_superblocks(size, name, dtype):
    """A superblock is 384 queries: here are one, one and a little, several."""
    drawn(size, 9, dtype, **MUTUAL[name]).check(CPU, by_reference=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dim", [3, 325])
def test_more_scores_than_are_kept_and_keys_than_a_chunk_has(dim, dtype):
    """Beside the same with a copy as keys, which has other code on the CPU."""
    size = 6000 if dim == 3 else 800
    problem = drawn(size, dim, dtype)
    alone = problem.run(CPU)
    copied = Problem(problem.learns | {"keys": problem.learns["queries"].clone()}, problem.given).run(CPU)
    torch.testing.assert_close(alone.loss, copied.loss)
    unequal = (alone.rank != copied.rank).sum()
    assert unequal == 0 if dtype == torch.float64 else unequal < size / 20
    expected = copied.gradients["queries"] + copied.gradients["keys"]
    allowed = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype] * float(expected.abs().max())
    torch.testing.assert_close(alone.gradients["queries"], expected, atol=allowed, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_collapsed_encoder_ranks_last(device, dtype):
    sizes = [2, 7, 48, 65] + ([500] if device.type == "cpu" else [])
    for dim in (1, 3, 16, 33):
        for size in sizes:
            one = torch.randn(dim, generator=torch.Generator().manual_seed(dim)).to(device, dtype).expand(size, dim)
            result = info_nce(one, one, scale=0.37)
            assert (result.rank == size - 1).all(), (dim, size)


@pytest.mark.parametrize("size", [20, 450])
def test_log_sums(device, size):
    """With any gradient of each, and of none, of a query whose group nobody else is in."""
    values = torch.randn(size, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    groups = own(size) // 3
    upstream = torch.linspace(-1, 1, size, dtype=torch.float64)
    gradients = []
    for copied in (False, True):
        queries = values.to(device, copy=True).requires_grad_()
        keys = queries * 1 if copied else queries
        log_sums = scores_logsumexp(
            queries, keys, scale=0.6, exclude=own(size).to(device), groups=(groups.to(device),) * 2, contrast="same"
        )
        upstream = torch.where(log_sums.isneginf(), 0, upstream.to(device))
        gradients += torch.autograd.grad(log_sums, queries, upstream)
    assert torch.isneginf(log_sums).sum() == (size % 3 == 1)
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_queries_of_weight_0_are_keys_all_the_same():
    problem = drawn(12, 6, weights=True)
    absent = problem.learns["weights"] == 0
    assert 1 < absent.sum() < 9
    without = problem.run(CPU).gradients["queries"]
    assert (without[absent] != 0).any(1).all()
    problem.learns["queries"][absent] = math.nan
    assert problem.run(CPU).loss.isnan()


@pytest.mark.parametrize("name", ["pairs", "excluded"])
def test_same_bits_for_any_number_of_threads(name):
    problem = drawn(1000, 20, torch.float32, **(MUTUAL | ONE_WAY)[name])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = problem.run(CPU)
        for n in (2, 3):
            torch.set_num_threads(n)
            assert_same_bits(problem.run(CPU), alone)
    finally:
        torch.set_num_threads(threads)


def test_a_bounded_part_of_the_scores_is_kept():
    problems = [drawn(size, 8, torch.float32) for size in (4096, 8192)]
    peaks = [peak_bytes(lambda problem=problem: problem.run(CPU)) for problem in problems]
    assert peaks[1] < (8 << 20) + (16 << 20)
    assert peaks[1] - peaks[0] < 8 << 20


def test_opcheck_without_keys(device):
    problem = drawn(10, 4)
    queries = problem.arguments(device)["queries"]
    arguments = [queries.unsqueeze(0), None, None, None, own(10).view(1, 10, 1).to(device)]
    arguments += [None] * 5 + [0.7, "log_sum", "all", False, None, None, "mean", [True] + [False] * 5]
    torch.library.opcheck(torch.ops.cpc_ext.info_nce.default, tuple(arguments))
