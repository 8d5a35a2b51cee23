"""Log-mel spectra against their definition, sample by sample and frequency by frequency."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cpc_ext.measures.log_mel import log_mel, mel_filters, stack_frames


def by_hand(samples, mels):
    """A Fourier sum over each Hann window, triangles between corners on the mel scale, their logarithm."""
    window = [0.5 - 0.5 * math.cos(2 * math.pi * n / 400) for n in range(400)]
    mel = [2595 * math.log10(1 + f / 700) for f in (0, 8000)]
    corners = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(*mel, mels + 2)]
    frequencies = np.arange(257) * 16000 / 512
    waves = np.exp(-2j * np.pi * np.outer(frequencies / 16000, np.arange(400)))
    rows = []
    for start in range(0, len(samples) - 399, 160):
        power = abs(waves @ (samples[start : start + 400] * window)) ** 2 / np.square(window).sum()
        bands = []
        for low, peak, high in zip(corners[:-2], corners[1:-1], corners[2:], strict=True):
            heights = np.minimum((frequencies - low) / (peak - low), (high - frequencies) / (high - peak))
            bands.append(power[heights > 0] @ heights[heights > 0])
        rows.append([math.log(max(band, 1e-10)) for band in bands])
    return rows


def test_it_is_the_definition():
    noise = 0.1 * torch.randn(800, generator=torch.Generator().manual_seed(0))
    wave = torch.cat([noise, torch.zeros(560)])
    for mels in (40, 23):
        actual = log_mel(wave, mels=mels)
        assert actual.dtype == torch.float32
        np.testing.assert_allclose(actual, by_hand(wave.double().numpy(), mels), atol=2e-4)
    assert actual[-1].eq(math.log(1e-10)).all()


@pytest.mark.parametrize(
    ("samples", "frames"),
    [(0, 0), (399, 0), (400, 1), (559, 1), (560, 2), (179_360, 1119), (81_520, 508)],  # The last two are LibriSpeech's.
)
def test_frames_are_as_many_as_labels(samples, frames):
    assert log_mel(torch.zeros(samples)).shape == (frames, 40)


def test_a_frame_is_centred_where_its_label_is():
    """A click at a sample is heard most in the frame whose centre is there."""
    for label in (0, 3, 7):
        wave = torch.zeros(2000)
        wave[160 * label + 200] = 1
        assert log_mel(wave).mean(1).argmax() == label


def test_a_tone_is_in_the_bands_around_its_frequency():
    wave = torch.sin(2 * math.pi * 1000 * torch.arange(800) / 16000)
    peaks = [700 * (10 ** (m / 2595) - 1) for m in np.linspace(0, 2595 * math.log10(1 + 8000 / 700), 42)[1:-1]]
    nearest = np.argmin(abs(np.array(peaks) - 1000))
    assert log_mel(wave).argmax(1).eq(int(nearest)).all()


def test_types_of_samples():
    wave = torch.randint(-(2**15), 2**15, (900,), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    expected = log_mel(wave.double() / 2**15)
    for same in (wave, wave.float() / 2**15):
        torch.testing.assert_close(log_mel(same), expected)
    with pytest.raises(TypeError, match=r"waveform: expected int16 or floating samples, got torch.int32"):
        log_mel(wave.int())
    with pytest.raises(ValueError, match=r"waveform: expected \[samples\], got \[1, 900\]"):
        log_mel(wave[None])


def test_filters():
    filters = mel_filters(40)
    assert filters.shape == (40, 257)
    assert filters.max() <= 1
    # Neighbouring triangles add up to one between the first peak and the last.
    inside = slice(int(filters[0].argmax()) + 1, int(filters[-1].argmax()))
    torch.testing.assert_close(filters.sum(0)[inside], torch.ones(257)[inside])
    with pytest.raises(ValueError, match="mels: expected fewer, as some of 200 bands lie between two frequencies"):
        mel_filters(200)


def test_stacked_frames():
    frames = torch.arange(8).view(4, 2)
    assert torch.equal(stack_frames(frames, 0), frames)
    assert stack_frames(frames, 1).tolist() == [
        [0, 1, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 5],
        [2, 3, 4, 5, 6, 7],
        [4, 5, 6, 7, 6, 7],
    ]
    assert stack_frames(frames[:1], 2).tolist() == [[0, 1] * 5]
    assert stack_frames(frames[:0], 2).shape == (0, 10)
