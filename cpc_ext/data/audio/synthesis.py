"""Speech synthesis by a source-filter model: pulses and noise pass through filters that change every 5 ms.

The filters are applied to short-time spectra. The spectrum of each window is multiplied by the response of the vocal
tract at that time, a product of resonances (formants), and the windows are overlapped and added. So one product filters
all windows of an utterance, and NumPy is fast enough.
Source of the model: Fant 1960; of the cascade of formants, Klatt 1980.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cpc_ext.data.audio.dataset import SAMPLE_RATE

HOP = 80
_WINDOW, _FFT = 4 * HOP, 512
_FREQUENCIES = np.fft.rfftfreq(_FFT, 1 / SAMPLE_RATE)
_HANN = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)).astype(np.float32)
# e^-iω and e^-2iω, the delays of one and two samples in a resonance's response.
_DELAY = np.exp(-2j * np.pi * _FREQUENCIES / SAMPLE_RATE).astype(np.complex64)
_DELAY_2 = (_DELAY * _DELAY).astype(np.complex64)


@dataclass(frozen=True)
class Course:
    """Parameters of an utterance at T points in time, 5 ms apart.

    pitch: Hz, [T]. voicing, aspiration, frication: amplitudes of the sources, [T]: pulses and noise that the vocal
        tract filters, and noise produced at its front.
    formants, bandwidths: frequencies and bandwidths of the vocal tract's resonances, Hz, [T, F].
    noise_centre, noise_width: centre and width of the frication's spectrum, Hz, [T].
    tilt: Hz above which the pulses' spectrum falls by 6 dB an octave.
    """

    pitch: np.ndarray
    voicing: np.ndarray
    aspiration: np.ndarray
    frication: np.ndarray
    formants: np.ndarray
    bandwidths: np.ndarray
    noise_centre: np.ndarray
    noise_width: np.ndarray
    tilt: float


def synthesize(course: Course, rng: np.random.Generator) -> np.ndarray:
    """Synthesize an utterance: float32 [80 (T - 1)]."""
    pulses = _pulses(_samples(course.pitch), course.tilt, rng)
    noise = rng.standard_normal((2, len(pulses)), dtype=np.float32)
    through_tract = _spectra(pulses * _samples(course.voicing) + noise[0] * _samples(course.aspiration))
    through_tract *= _tract(course.formants, course.bandwidths)
    # The peak of the frication's filter is 1; that of a formant would grow with its frequency.
    distance = (_FREQUENCIES.astype(np.float32) - course.noise_centre[:, None]) / course.noise_width[:, None]
    through_tract += _spectra(noise[1] * _samples(course.frication)) / (1 + distance * distance)
    return _added(np.fft.irfft(through_tract, _FFT).astype(np.float32, copy=False))[: len(pulses)]


def _samples(frames: np.ndarray) -> np.ndarray:
    """Interpolate values at every 5 ms, [T], linearly to every sample, [80 (T - 1)]."""
    share = np.arange(HOP, dtype=np.float32) / HOP
    frames = frames.astype(np.float32)
    line: np.ndarray = (frames[:-1, None] * (1 - share) + frames[1:, None] * share).ravel()
    return line


def _pulses(pitch: np.ndarray, tilt: float, rng: np.random.Generator) -> np.ndarray:
    """Return decaying pulses, one for each period of a pitch [N], of slightly varying strength; float32 [N].

    They are scaled so that pulses of a single sample would have a power of 1.
    """
    cycles = np.cumsum(pitch.astype(np.float64)) / SAMPLE_RATE + rng.random()
    (at,) = np.nonzero(np.diff(np.floor(cycles), prepend=np.floor(cycles[0])))
    step = pitch[at] / SAMPLE_RATE
    # A period ends between two samples.
    late = (cycles[at] - np.floor(cycles[at])) / step
    decay = 2 * np.pi * tilt / SAMPLE_RATE
    times = np.arange(round(6 / decay))
    shapes = decay * np.exp(-decay * (times + late[:, None])) * (rng.normal(1, 0.05, len(at)) / np.sqrt(step))[:, None]
    pulses = np.bincount((at[:, None] + times).ravel(), shapes.ravel(), len(pitch) + len(times))
    return pulses[: len(pitch)].astype(np.float32)


def _spectra(sound: np.ndarray) -> np.ndarray:
    """Return the spectra, complex64 [T, 257], of windows of 20 ms, centred at every 5 ms of a sound [80 (T - 1)]."""
    padded = np.pad(sound, _WINDOW // 2)
    windows = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::HOP]
    return np.fft.rfft(windows * _HANN, _FFT).astype(np.complex64, copy=False)


def _tract(formants: np.ndarray, bandwidths: np.ndarray) -> np.ndarray:
    """Return the response, complex64 [T, 257], of a cascade of resonances, each with a gain of 1 at 0 Hz."""
    radius = np.exp(-np.pi * bandwidths / SAMPLE_RATE)
    linear = (-2 * radius * np.cos(2 * np.pi * formants / SAMPLE_RATE)).astype(np.float32)
    square = (radius * radius).astype(np.float32)
    weakening = np.ones((len(formants), len(_DELAY)), np.complex64)
    for formant in range(formants.shape[1]):
        weakening *= 1 + linear[:, formant, None] * _DELAY + square[:, formant, None] * _DELAY_2
    response: np.ndarray = (1 + linear + square).prod(axis=1, keepdims=True) / weakening
    return response


def _added(windows: np.ndarray) -> np.ndarray:
    """Overlap and add windows [T, 512], one every 5 ms; the sound begins at the middle of the first window."""
    parts = -(-_FFT // HOP)
    pieces = np.pad(windows, ((0, 0), (0, parts * HOP - _FFT))).reshape(len(windows), parts, HOP)
    sound = np.zeros((len(windows) + parts - 1, HOP), np.float32)
    for part in range(parts):
        sound[part : part + len(windows)] += pieces[:, part]
    # Four Hann windows overlap at any sample, and sum to two.
    return sound.ravel()[_WINDOW // 2 :] / 2
