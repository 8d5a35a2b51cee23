"""Sampling of windows: the windows in a batch of each kind, exact resumption, processes' shares, left-out sound."""

import itertools

import numpy as np
import pytest

from cpc_ext.data import WaveformSet, WindowSampler

pytestmark = pytest.mark.filterwarnings("ignore:(?s).*too few same-sequence windows:UserWarning")

WINDOW = 1000
# Samples of the recordings of three speakers.
LENGTHS = {0: (3500, 2100), 1: (1000, 7800, 4400), 2: (9900,)}


def recordings(lengths=LENGTHS, *, known: bool = True) -> WaveformSet:
    each = [length for of_speaker in lengths.values() for length in of_speaker]
    speakers = [speaker for speaker, of_speaker in lengths.items() for _ in of_speaker]
    return WaveformSet(
        samples=np.zeros(sum(each), np.int16),
        starts=np.append(0, np.cumsum(each)),
        names=[f"{speaker}-{number}" for number, speaker in enumerate(speakers)],
        speakers=np.array(speakers, np.int64) if known else None,
    )


def sampler(kind: str, batch_size: int = 2, **options) -> WindowSampler:
    return WindowSampler(recordings(), batch_size, **{"window": WINDOW, "kind": kind, **options})


def recording_of(positions: np.ndarray) -> np.ndarray:
    return np.searchsorted(recordings().starts, positions, side="right") - 1


def epoch(source: WindowSampler) -> list[np.ndarray]:
    batches = list(source)
    assert len(batches) == len(source)
    return batches


EVERY = [
    (kind, cross)
    for kind in ("recordings", "uniform", "same-speaker", "same-sequence", "sequential")
    for cross in (True, False)
]


@pytest.mark.parametrize(("kind", "cross"), EVERY)
def test_windows_lie_in_the_sound_and_do_not_overlap(kind, cross):
    source = sampler(kind, cross_borders=cross)
    for _ in range(20):
        batches = epoch(source)
        starts = np.sort(np.concatenate(batches))
        assert all(batch.dtype == np.int64 and batch.shape == (2,) for batch in batches)
        assert starts[0] >= 0
        assert starts[-1] + WINDOW <= len(recordings().samples)
        assert (np.diff(starts) >= WINDOW).all()


@pytest.mark.parametrize("kind", ["recordings", "uniform", "same-speaker", "same-sequence", "sequential"])
def test_windows_that_cross_no_borders(kind):
    source = sampler(kind, cross_borders=False)
    for _ in range(20):
        starts = np.concatenate(epoch(source))
        np.testing.assert_array_equal(recording_of(starts), recording_of(starts + WINDOW - 1))


@pytest.mark.parametrize("kind", ["uniform", "sequential", "same-speaker"])
def test_windows_that_may_cross_borders_do(kind):
    source = sampler(kind, cross_borders=True)
    starts = np.concatenate([np.concatenate(epoch(source)) for _ in range(20)])
    assert (recording_of(starts) != recording_of(starts + WINDOW - 1)).any()
    speakers = recordings().speakers
    ends = speakers[recording_of(starts + WINDOW - 1)]
    assert (speakers[recording_of(starts)] != ends).any() == (kind != "same-speaker")


@pytest.mark.parametrize("cross", [True, False])
def test_a_batch_is_of_one_speaker_or_recording(cross):
    for kind, of in (("same-speaker", recordings().speakers), ("same-sequence", np.arange(6))):
        source = sampler(kind, cross_borders=cross)
        met = set()
        for batch in itertools.chain(*[epoch(source) for _ in range(5)]):
            (group,) = set(of[recording_of(batch)].tolist())
            met.add(group)
        # Recordings shorter than three and a half windows give one or two windows; two make a batch.
        assert met == {0, 1, 2} if kind == "same-speaker" else met == {0, 3, 4, 5}


def test_uniform_batches_mix_speakers():
    source = sampler("uniform", 4)
    speakers = recordings().speakers
    assert any(len(set(speakers[recording_of(batch)].tolist())) == 3 for _ in range(5) for batch in epoch(source))


def test_places_of_a_sequential_batch_go_through_shares_of_the_sound():
    source = sampler("sequential", 3)
    for _ in range(3):
        batches = np.array(epoch(source))
        assert batches.shape == (9, 3)  # The sound has room for 28.7 windows.
        assert (np.diff(batches, axis=0) == WINDOW).all()
        assert (np.diff(batches, axis=1) == 9 * WINDOW).all()


def test_cuts_begin_at_another_place_every_epoch():
    """Anywhere within half a window and more: no sample is always at a cut."""
    for kind, cross in (("uniform", True), ("uniform", False), ("same-sequence", True)):
        source = sampler(kind, cross_borders=cross)
        offsets = []
        for _ in range(200):
            first = min(int(start) for batch in epoch(source) for start in batch)
            offsets.append(first)
        assert min(offsets) < 50
        assert max(offsets) > WINDOW // 2 - 50
        assert len(set(offsets)) > 100


def test_a_window_of_every_recording_begins_anywhere_on_the_grid_of_labels():
    source = sampler("recordings", 6)
    begins = np.array([np.sort(batch) - recordings().starts[:-1] for _ in range(500) for batch in epoch(source)])
    assert begins.shape == (500, 6)
    assert (begins % 160 == 0).all()
    for recording, length in enumerate(itertools.chain(*LENGTHS.values())):
        assert set(begins[:, recording].tolist()) == set(range(0, length - WINDOW + 1, 160))


def test_last_batches_are_smaller_when_kept():
    full = sampler("same-sequence", 4, cross_borders=False)
    kept = sampler("same-sequence", 4, cross_borders=False, drop_last=False)
    # Windows of the recordings: 3, 1, 1, 7, 3, 9.
    assert sorted(map(len, epoch(full))) == [4, 4, 4]
    assert sorted(map(len, epoch(kept))) == [1, 1, 1, 3, 3, 3, 4, 4, 4]
    assert sum(map(len, epoch(sampler("uniform", 5, drop_last=False)))) == 28


@pytest.mark.parametrize(("kind", "cross"), EVERY)
@pytest.mark.parametrize("done", [0, 1, 4, 7])
def test_restored_sampler_goes_on_exactly(kind, cross, done):
    def endless(source):
        while True:
            yield from source

    expected = list(itertools.islice(endless(sampler(kind, cross_borders=cross, seed=5)), 9))
    interrupted = sampler(kind, cross_borders=cross, seed=5)
    list(itertools.islice(endless(interrupted), done))
    restored = sampler(kind, cross_borders=cross, seed=5)
    state = interrupted.state_dict()
    assert all(type(value) is int for value in state.values())
    restored.load_state_dict(state)
    for batch, want in zip(itertools.islice(endless(restored), 9 - done), expected[done:], strict=True):
        np.testing.assert_array_equal(batch, want)


@pytest.mark.parametrize(("kind", "cross"), EVERY)
def test_processes_share_each_batch(kind, cross):
    whole = epoch(sampler(kind, 3, cross_borders=cross, seed=1))
    parts = [epoch(sampler(kind, 3, cross_borders=cross, seed=1, rank=rank, world_size=3)) for rank in range(3)]
    for batch, shares in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(batch, np.concatenate(shares))


@pytest.mark.parametrize("kind", ["recordings", "uniform", "same-speaker", "same-sequence"])
@pytest.mark.parametrize("drop_last", [True, False])
def test_the_mean_batch_is_that_of_an_epoch(kind, drop_last):
    """What a run says that it takes a second follows from this: most batches of a speaker's windows are not full."""
    source = sampler(kind, drop_last=drop_last)
    sizes = [len(batch) for batch in epoch(source)]
    assert source.mean_batch == sum(sizes) / len(sizes)
    assert (source.mean_batch < 2) == (not drop_last and kind.startswith("same"))


def test_orders_follow_from_the_seed():
    for kind in ("recordings", "uniform", "same-speaker", "same-sequence", "sequential"):
        one, again, other = (np.concatenate(epoch(sampler(kind, seed=seed))) for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, again)
        assert not np.array_equal(one, other)


def test_state_of_other_windows_is_refused():
    state = sampler("uniform").state_dict()
    for kind, options in (
        ("sequential", {}),
        ("uniform", {"window": 999}),
        ("uniform", {"cross_borders": False}),
        ("uniform", {"seed": 1}),
        ("uniform", {"batch_size": 3}),
    ):
        with pytest.raises(ValueError, match="sampler state: expected"):
            sampler(kind, **options).load_state_dict(state)
    for kept, message in ((True, "go on with several, as before"), (False, "go on with one, as before")):
        state_of_another = sampler("same-speaker", drop_last=kept).state_dict()
        with pytest.raises(ValueError, match=message):
            sampler("same-speaker", drop_last=not kept).load_state_dict(state_of_another)
    longer = WindowSampler(recordings({0: (28701,)}), 2, window=WINDOW, kind="uniform")
    with pytest.raises(ValueError, match="expected samples 28701, got 28700"):
        longer.load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "random"}, "kind: expected one of recordings, uniform"),
        ({"kind": "uniform", "window": 0}, "window: expected at least 1"),
        ({"kind": "uniform", "window": 30_000}, "window: expected at most 28700 samples, got 30000"),
        ({"kind": "recordings", "window": 10_000}, "window: expected at most 9900 samples, got 10000"),
        ({"kind": "recordings", "batch_size": 7}, "batch_size: expected at most 6 recordings windows, got 7"),
        ({"kind": "same-speaker", "batch_size": 13}, "batch_size: expected at most 12 same-speaker windows, got 13"),
        ({"kind": "sequential", "batch_size": 29}, "batch_size: expected at most 28 sequential windows, got 29"),
        ({"kind": "sequential", "drop_last": False}, "drop_last"),
        ({"kind": "uniform", "batch_size": 3, "world_size": 2}, "expected a multiple of the 2 processes, got 3"),
    ],
)
def test_impossible_windows_are_errors(options, named):
    with pytest.raises(ValueError, match=named):
        sampler(**options)


def test_one_speaker_must_be_known():
    with pytest.raises(ValueError, match="no speakers"):
        WindowSampler(recordings(known=False), 2, window=WINDOW, kind="same-speaker")


def test_what_no_batch_holds_is_said(recwarn):
    sampler("uniform", window=2000)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"left out 1 recordings:\n.*shorter than a window of 2000 samples \(1-2\)"):
        sampler("uniform", window=2000, cross_borders=False)
    with pytest.warns(UserWarning, match=r"2: too few same-sequence windows for a batch of 2 \(0-1, 1-2\)"):
        sampler("same-sequence")
    with pytest.warns(UserWarning, match="1 of 3 speakers have too few windows for a batch of 6"):
        sampler("same-speaker", 6)
