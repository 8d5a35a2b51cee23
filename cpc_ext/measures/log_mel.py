"""Log-mel spectra of speech, to compare learned features with, on the grid of LibriSpeech's labels.

A waveform at 16 kHz has one frame every 10 ms, for the windows that lie inside the file; frame i belongs to label i.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cpc_ext.data.audio.dataset import LABEL_STEP, LABEL_WINDOW, SAMPLE_RATE

__all__ = ["log_mel", "mel_filters", "stack_frames"]

_FFT = 512
# The least energy of a band, for samples in -1 to 1: about that of the noise of rounding to 16 bits, which digital
# silence lacks.
_FLOOR = 1e-10


def log_mel(waveform: Tensor, *, mels: int = 40) -> Tensor:
    """Return the log energy in bands, float32 [1 + (samples - 400) // 160, mels]; no frames for a shorter waveform.

    Args:
        waveform: [samples] at 16 kHz, int16 or floating in -1 to 1.
        mels: number of bands.

    Raises:
        ValueError: a waveform of another shape.
        TypeError: samples of another type.
    """
    if waveform.ndim != 1:
        raise ValueError(f"waveform: expected [samples], got {list(waveform.shape)}")
    if waveform.dtype == torch.int16:
        waveform = waveform.float() / 2**15
    elif not waveform.is_floating_point():
        raise TypeError(f"waveform: expected int16 or floating samples, got {waveform.dtype}")
    if len(waveform) < LABEL_WINDOW:
        return waveform.new_empty(0, mels, dtype=torch.float32)
    window = torch.hann_window(LABEL_WINDOW, device=waveform.device)
    frames = waveform.float().unfold(0, LABEL_WINDOW, LABEL_STEP) * window
    power = torch.fft.rfft(frames, n=_FFT).abs().square() / window.square().sum()
    filters = mel_filters(mels).to(power)
    bands: Tensor = power @ filters.T
    return bands.clamp(min=_FLOOR).log()


@functools.cache
def mel_filters(mels: int) -> Tensor:
    """Return triangular filters over the frequencies 0 to 8000 Hz of a spectrum of 257 values, float32 [mels, 257].

    Their corners are equally spaced on the mel scale, m = 2595 log10(1 + f / 700); each has its peak of 1 at the corner
    at which its neighbours end.

    Raises:
        ValueError: so many bands that one lies between two frequencies.
    """
    highest = 2595 * torch.tensor(1 + SAMPLE_RATE / 2 / 700, dtype=torch.float64).log10()
    corners = 700 * (10 ** (torch.linspace(0, 1, mels + 2, dtype=torch.float64) * highest / 2595) - 1)
    frequencies = torch.linspace(0, SAMPLE_RATE / 2, _FFT // 2 + 1, dtype=torch.float64)
    low, peak, high = (corners[part, None] for part in (slice(-2), slice(1, -1), slice(2, None)))
    filters = torch.minimum((frequencies - low) / (peak - low), (high - frequencies) / (high - peak)).clamp(min=0)
    if not bool(filters.any(1).all()):
        raise ValueError(f"mels: expected fewer, as some of {mels} bands lie between two frequencies")
    return filters.float()


def stack_frames(frames: Tensor, context: int) -> Tensor:
    """Concatenate each frame with ``context`` neighbours before and after, [L, D] → [L, (2 context + 1) D].

    The earliest comes first. At the edges, the first and last frame are repeated.
    """
    places = torch.arange(len(frames))[:, None] + torch.arange(-context, context + 1)
    return frames[places.clamp(0, max(0, len(frames) - 1))].flatten(1)
