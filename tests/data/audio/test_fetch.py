"""Batches of windows by their first samples: correct windows of memory and mapped files, errors outside the sound."""

import numpy as np
import pytest
import torch

from cpc_ext.data import WaveformFetcher, WaveformSet

SAMPLES = np.random.default_rng(0).integers(-32768, 32768, 500).astype(np.int16)


def waveforms(samples: np.ndarray = SAMPLES, speakers: np.ndarray | None = None) -> WaveformSet:
    return WaveformSet(samples, np.array([0, 200, len(samples)]), ["a", "b"], speakers)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("resident", [False, True])
def test_windows_are_cut_where_they_begin(tmp_path, resident):
    SAMPLES.tofile(tmp_path / "samples.bin")
    mapped = np.memmap(tmp_path / "samples.bin", np.int16, "r")
    starts = np.array([190, 0, 420, 190])
    for samples in (SAMPLES, mapped):
        fetch = WaveformFetcher(waveforms(samples), window=80, resident=resident)
        assert fetch.resident == resident
        batch = fetch(starts)
        assert batch.dtype == torch.int16
        assert batch.shape == (4, 1, 80)
        np.testing.assert_array_equal(batch[:, 0].numpy(), [SAMPLES[start : start + 80] for start in starts])


def test_a_batch_is_a_copy():
    samples = SAMPLES.copy()
    WaveformFetcher(waveforms(samples), window=80)([1, 2]).zero_()
    np.testing.assert_array_equal(samples, SAMPLES)


def test_labels_are_of_who_speaks_where_a_window_begins():
    fetch = WaveformFetcher(waveforms(speakers=np.array([3, 7])), window=80)
    assert fetch.labels(np.array([199, 200, 0])).tolist() == [3, 7, 3]
    assert WaveformFetcher(waveforms(), window=80).labels(np.array([0])) is None


@pytest.mark.parametrize("resident", [False, True])
def test_windows_outside_are_errors(resident):
    fetch = WaveformFetcher(waveforms(), window=80, resident=resident)
    assert fetch([]).shape == (0, 1, 80)
    for start in (-1, 421):
        with pytest.raises(IndexError, match=r"starts: expected 0\.\.420"):
            fetch([0, start])
    for starts in ([0.5], [[0]], [True]):
        with pytest.raises(TypeError, match="starts: expected integers"):
            fetch(starts)
    for window in (0, 501):
        with pytest.raises(ValueError, match=r"window: expected 1\.\.500 samples"):
            WaveformFetcher(waveforms(), window=window)


@pytest.mark.cuda
@pytest.mark.parametrize("resident", [False, True, None])
def test_on_cuda(resident):
    fetch = WaveformFetcher(waveforms(speakers=np.array([3, 7])), "cuda", 80, resident=resident)
    batch = fetch([5, 420])
    assert (batch.device.type, fetch.resident) == ("cuda", resident is not False)
    np.testing.assert_array_equal(batch[:, 0].cpu().numpy(), [SAMPLES[5:85], SAMPLES[420:]])
    assert fetch.labels(np.array([5, 420])).tolist() == [3, 7]
