"""Speech data sets: one int16 array with the samples of all recordings, and the positions at which they begin.

All recordings lie end to end, with each speaker's next to each other, so that one index identifies a window: the sample
at which it begins. Nothing is scaled or copied here; that happens later, on the training device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAMPLE_RATE = 16_000
# The grid of labels is that of LibriSpeech's forced alignments: windows of 25 ms every 10 ms inside a recording.
LABEL_STEP, LABEL_WINDOW = 160, 400
LABEL_CENTRE = LABEL_WINDOW // 2


def label_count(samples: int) -> int:
    """Return the number of labels of a recording with this many samples; label i is the phone at sample 160 i + 200."""
    return max(0, 1 + (samples - LABEL_WINDOW) // LABEL_STEP)


@dataclass(frozen=True, eq=False, repr=False)
class WaveformSet:
    """Recordings at 16 kHz, with their speakers and phones where these are known.

    samples: int16 [N], in memory or memory-mapped: R recordings end to end, in the order of their speakers.
    starts: int64 [R + 1], the sample at which each recording begins; the last entry is N.
    names: one for each recording, "SPEAKER-CHAPTER-NUMBER" or the path of its file.
    speakers: int64 [R], ascending indices into the data set's speakers, or None.
    phones: uint8 or int16 [P], indices into the data set's phone names, on the grid of :func:`label_count`; or None.
    phone_starts: int64 [R + 1], the index in phones at which each recording's labels begin; the last entry is P. None
        if and only if phones is None. A recording has fewer labels than its grid has places if its alignment ends early
        or is not known.

    Raises ValueError if these do not fit together.
    """

    samples: np.ndarray
    starts: np.ndarray
    names: Sequence[str]
    speakers: np.ndarray | None = None
    phones: np.ndarray | None = None
    phone_starts: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.samples.ndim != 1 or self.samples.dtype != np.int16:
            raise ValueError(f"samples: expected int16 [N], got {self.samples.dtype} {list(self.samples.shape)}")
        _check_starts("starts", self.starts, len(self.names), len(self.samples))
        if self.speakers is not None:
            if self.speakers.shape != (len(self),) or self.speakers.dtype != np.int64:
                raise ValueError(
                    f"speakers: expected int64 [{len(self)}], got {self.speakers.dtype} {list(self.speakers.shape)}"
                )
            if len(self) and (self.speakers[0] < 0 or (np.diff(self.speakers) < 0).any()):
                raise ValueError("speakers: expected ascending indices, so that a speaker's recordings are neighbours")
        if (self.phones is None) != (self.phone_starts is None):
            raise ValueError("phones: expected together with phone_starts")
        if self.phones is not None and self.phone_starts is not None:
            self._check_phones(self.phones, self.phone_starts)

    def _check_phones(self, phones: np.ndarray, starts: np.ndarray) -> None:
        if phones.ndim != 1 or phones.dtype not in (np.uint8, np.int16):
            raise ValueError(f"phones: expected uint8 or int16 [P], got {phones.dtype} {list(phones.shape)}")
        _check_starts("phone_starts", starts, len(self), len(phones))
        if len(phones) and phones.min() < 0:
            raise ValueError(f"phones: expected indices from 0, got {phones.min()}")
        for number, (samples, count) in enumerate(zip(np.diff(self.starts), np.diff(starts), strict=True)):
            if count > label_count(samples):
                raise ValueError(
                    f"phones: expected at most {label_count(samples)} of the {samples} samples of "
                    f"{self.names[number]}, got {count}"
                )

    def __len__(self) -> int:
        return len(self.names)

    def recording(self, index: int) -> np.ndarray:
        """Return the samples of a recording, int16, as a view. Raises IndexError if there is no such recording."""
        return self.samples[self._part(self.starts, index)]

    def phones_of(self, index: int) -> np.ndarray:
        """Return the phones of a recording, empty if they are not known. Raises ValueError if the set has no phones."""
        if self.phones is None or self.phone_starts is None:
            raise ValueError("the recordings have no phone labels")
        return self.phones[self._part(self.phone_starts, index)]

    @property
    def known_speakers(self) -> np.ndarray:
        """The speakers. Raises ValueError if the set has none."""
        if self.speakers is None:
            raise ValueError("the recordings have no speakers")
        return self.speakers

    def speakers_at(self, positions: np.ndarray) -> np.ndarray | None:
        """Return the speaker at each of these samples, int64 in the shape of positions, or None if the set has none."""
        if self.speakers is None:
            return None
        return self.speakers[np.searchsorted(self.starts, positions, side="right") - 1]

    def _part(self, starts: np.ndarray, index: int) -> slice:
        if not 0 <= index < len(self):
            raise IndexError(f"recording: expected 0..{len(self) - 1}, got {index}")
        return slice(int(starts[index]), int(starts[index + 1]))

    def __repr__(self) -> str:
        known = [name for name in ("speakers", "phones") if getattr(self, name) is not None]
        minutes = len(self.samples) / SAMPLE_RATE / 60
        return f"WaveformSet({len(self)} recordings, {minutes:.1f} minutes, {' and '.join(known) or 'no'} labels)"


def _check_starts(name: str, starts: np.ndarray, parts: int, total: int) -> None:
    if starts.shape != (parts + 1,) or starts.dtype != np.int64:
        raise ValueError(f"{name}: expected int64 [{parts + 1}], got {starts.dtype} {list(starts.shape)}")
    if starts[0] != 0 or starts[-1] != total or (np.diff(starts) < 0).any():
        raise ValueError(f"{name}: expected to ascend from 0 to {total}, got {starts[0]} to {starts[-1]}")


@dataclass(frozen=True, eq=False)
class SpeechDataset:
    """Recordings to learn from, and recordings held out for testing.

    train: recordings for probes, and for models if unlabeled is None.
    speakers, phone_names: names of the indices in the sets' speakers and phones; empty if the sets have none.
    unlabeled: more recordings, which models learn from in place of train. Their phones are not used.

    Raises ValueError if a set has an index without a name.
    """

    name: str
    train: WaveformSet
    test: WaveformSet | None
    speakers: tuple[str, ...] = ()
    phone_names: tuple[str, ...] = ()
    sample_rate: int = SAMPLE_RATE
    unlabeled: WaveformSet | None = None

    def __post_init__(self) -> None:
        for part, waveforms in (("train", self.train), ("test", self.test), ("unlabeled", self.unlabeled)):
            for label, names in (("speakers", self.speakers), ("phones", self.phone_names)):
                indices = None if waveforms is None else getattr(waveforms, label)
                if indices is not None and len(indices) and indices.max() >= len(names):
                    raise ValueError(f"{part}: expected {label} below {len(names)}, got {indices.max()}")

    @property
    def pretrain(self) -> WaveformSet:
        """Recordings that models learn from: unlabeled if given, else train."""
        return self.train if self.unlabeled is None else self.unlabeled
