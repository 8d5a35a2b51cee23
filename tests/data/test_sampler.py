"""The epoch sampler: complete seeded epochs, exact resumption, disjoint shares of several processes."""

import itertools

import numpy as np
import pytest

from cpc_ext.data import EpochSampler


def epochs(sampler: EpochSampler, count: int) -> list[np.ndarray]:
    return [batch for _ in range(count) for batch in sampler]


def test_an_epoch_visits_each_image_at_most_once():
    sampler = EpochSampler(10, 3)
    first, second = list(sampler), list(sampler)
    assert len(first) == len(sampler) == 3
    assert len(set(np.concatenate(first).tolist())) == 9
    assert not np.array_equal(np.concatenate(first), np.concatenate(second))


def test_last_batch_is_smaller_when_kept():
    batches = list(EpochSampler(10, 3, drop_last=False))
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert sorted(np.concatenate(batches).tolist()) == list(range(10))
    assert len(EpochSampler(9, 3, drop_last=False)) == 3


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("done", range(10))
def test_restored_sampler_goes_on_exactly(done, drop_last):
    def sampler():
        return EpochSampler(10, 3, seed=5, drop_last=drop_last)

    def endless(source):
        while True:
            yield from source

    expected = list(itertools.islice(endless(sampler()), 12))
    interrupted = sampler()
    list(itertools.islice(endless(interrupted), done))
    restored = sampler()
    restored.load_state_dict(interrupted.state_dict())
    for batch, want in zip(itertools.islice(endless(restored), 12 - done), expected[done:], strict=True):
        np.testing.assert_array_equal(batch, want)


@pytest.mark.parametrize(("drop_last", "mean"), [(True, 4.0), (False, 10 / 3)])
def test_the_mean_batch_is_that_of_an_epoch(drop_last, mean):
    assert EpochSampler(10, 4, drop_last=drop_last).mean_batch == mean


def test_processes_share_each_batch():
    whole = list(EpochSampler(50, 12, seed=1))
    parts = [list(EpochSampler(50, 12, seed=1, rank=rank, world_size=3)) for rank in range(3)]
    for batch, shares in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(batch, np.concatenate(shares))


def test_state_goes_on_with_another_number_of_processes():
    two = EpochSampler(50, 12, seed=1, rank=1, world_size=2)
    next(iter(two))
    three = EpochSampler(50, 12, seed=1, rank=2, world_size=3)
    three.load_state_dict(two.state_dict())
    whole = list(EpochSampler(50, 12, seed=1))
    np.testing.assert_array_equal(next(iter(three)), whole[1][8:])


def test_seed_decides_the_order():
    same = [np.concatenate(list(EpochSampler(100, 10, seed=seed))) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(same[0], same[1])
    assert not np.array_equal(same[0], same[2])


def test_seeds_and_epochs_share_no_order():
    """Not even those whose sum is the same: runs of neighbouring seeds would repeat each other's epochs."""
    orders = set()
    for seed in range(6):
        sampler = EpochSampler(100, 100, seed=seed)
        orders.update(tuple(batch.tolist()) for batch in epochs(sampler, 6))
    assert len(orders) == 36


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"count": 5, "batch_size": 6}, "at most 5 images, got 6"),
        ({"count": 5, "batch_size": 3, "world_size": 2}, "expected a multiple of the 2 processes, got 3"),
        ({"count": 0, "batch_size": 1, "drop_last": False}, "batch_size"),
        ({"count": 5, "batch_size": 0}, "batch_size"),
        ({"count": 5, "batch_size": 1, "rank": 1}, "rank"),
        ({"count": 5, "batch_size": 1, "world_size": 2, "drop_last": False}, "drop_last"),
    ],
)
def test_impossible_batches_are_errors(arguments, named):
    with pytest.raises(ValueError, match=named):
        EpochSampler(**arguments)


def test_state_of_another_order_is_refused():
    state = EpochSampler(10, 3).state_dict()
    with pytest.raises(ValueError, match="expected batch_size 2, got 3"):
        EpochSampler(10, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="no batch 3"):
        EpochSampler(10, 3).load_state_dict(state | {"batch": 3})
