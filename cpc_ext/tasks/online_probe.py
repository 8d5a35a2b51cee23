"""Probes during training: nearest-neighbour accuracy on held-out images or frames, and effective rank.

A probe measures the same few images or recordings every time. It fits nothing, draws no random numbers and leaves the
model unchanged, so that a run goes on as if it had not been measured.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpc_ext.data import SAMPLE_RATE, Dataset, SpeechDataset, WaveformSet
from cpc_ext.data.spread import spread
from cpc_ext.figures import ProbeCurve
from cpc_ext.measures.effective_rank import effective_rank
from cpc_ext.measures.knn import knn_accuracy
from cpc_ext.measures.probe import encode
from cpc_ext.measures.speech_frames import FrameMaker, RecordingFrames
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.run_log import read_metrics

__all__ = ["PROBED", "RANK", "FrameProbe", "ImageProbe", "probe_curve", "probed_recordings"]

# Names of the accuracy and the rank in the logged metrics.
PROBED = "knn_accuracy"
RANK = "effective_rank"
# Number of labelled images, or frames, that vote, and of those to classify. Encoding them takes a second or two on two
# CPU cores, and the accuracy has a standard error of at most 2.3 %. Evaluations of whole data sets take 200 neighbours,
# but so few images do not have that many near ones.
_LABELLED, _ASKED = 1000, 500
_NEIGHBOURS = 20
# Total length in seconds of the recordings that the frames come from.
_SECONDS = {"train": 60.0, "test": 30.0}


class ImageProbe:
    """Classifies some of a data set's test images by their nearest neighbours among labelled training images.

    Attributes:
        chance: the accuracy of always naming the commonest class.

    Raises:
        TrainingError: training or test images without labels.
    """

    def __init__(self, dataset: Dataset, device: torch.device) -> None:
        train, test = dataset.train, dataset.test
        if train is None or test is None or train.labels is None or test.labels is None:
            raise TrainingError(
                f"--probe-every: {dataset.name} has no labels of training and of test images to measure an encoder by"
            )
        self._sets = [(each, spread(count, len(each))) for each, count in ((train, _LABELLED), (test, _ASKED))]
        self._labels = [torch.from_numpy(images.known_labels[chosen]) for images, chosen in self._sets]
        self._classes = len(dataset.classes)
        self._device = device
        self.chance = _commonest(self._labels[1])

    def found(self, features: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the fraction of images classified correctly, and the effective rank of the labelled ones' encodings.

        features: maps uint8 [B, C, H, W] on the device to [B, D].
        """
        known, asked = (encode(images, features, self._device, chosen=chosen) for images, chosen in self._sets)
        return _found(known, self._labels[0], asked, self._labels[1], self._classes)


class FrameProbe:
    """Classifies frames of some test recordings by their nearest neighbours among frames of training recordings.

    Attributes:
        chance: the accuracy of always naming the commonest phone.

    Raises:
        TrainingError: training or test recordings without known phones.
    """

    def __init__(self, dataset: SpeechDataset) -> None:
        train, test = dataset.train, dataset.test
        if test is None or train.phones is None or test.phones is None:
            raise TrainingError(
                f"--probe-every: {dataset.name} has no phones of training and of test recordings to measure an "
                "encoder by"
            )
        self._sets = [
            (each, probed_recordings(each, _SECONDS[part])) for part, each in (("train", train), ("test", test))
        ]
        self._classes = len(dataset.phone_names)
        recordings = self._sets[1][1]
        self.chance = _commonest(torch.from_numpy(np.concatenate([test.phones_of(int(each)) for each in recordings])))

    def found(self, make: FrameMaker) -> dict[str, float]:
        """Return the fraction of frames whose phone is found, and the effective rank of the labelled frames.

        make: computes the frames of a recording.
        """
        (known, labels), (asked, expected) = (
            _some_frames(RecordingFrames.of(waveforms, make, recordings), count)
            for (waveforms, recordings), count in zip(self._sets, (_LABELLED, _ASKED), strict=True)
        )
        return _found(known, labels, asked, expected, self._classes)


def probed_recordings(waveforms: WaveformSet, seconds: float) -> np.ndarray:
    """Choose recordings that last about ``seconds`` together, spread over the set; at least one, at most all.

    If phones are known for only some recordings, about ``seconds`` of these are chosen in addition, as the others might
    contain none of them.
    """
    chosen = _lasting(waveforms, np.arange(len(waveforms)), seconds)
    if waveforms.phone_starts is not None:
        chosen = np.union1d(chosen, _lasting(waveforms, np.flatnonzero(np.diff(waveforms.phone_starts)), seconds))
    return chosen


def probe_curve(metrics: Path, probe: ImageProbe | FrameProbe | None) -> ProbeCurve | None:
    """Return the curve of a run's probe results so far; None if there are none. probe: the run's, if it has one."""
    records = read_metrics(metrics, having=(PROBED,))
    if not records:
        return None
    chance = None if probe is None else probe.chance
    return ProbeCurve([record["step"] for record in records], [record[PROBED] for record in records], chance)


def _lasting(waveforms: WaveformSet, those: np.ndarray, seconds: float) -> np.ndarray:
    """Choose recordings out of ``those``, spread evenly, that last about ``seconds`` together."""
    total = np.diff(waveforms.starts)[those].sum() / SAMPLE_RATE
    count = len(those) if total <= seconds else max(1, int(len(those) * seconds / total))
    chosen: np.ndarray = those[spread(count, len(those))]
    return chosen


def _found(known: Tensor, labels: Tensor, asked: Tensor, expected: Tensor, classes: int) -> dict[str, float]:
    accuracy = knn_accuracy(known, labels, asked, expected, classes=classes, neighbours=_NEIGHBOURS)
    return {PROBED: accuracy, RANK: effective_rank(known)}


def _some_frames(frames: RecordingFrames, count: int) -> tuple[Tensor, Tensor]:
    """Return features [N, D] and phones int64 [N] of at most ``count`` frames, spread over all recordings."""
    features, phones, _ = frames.aligned()
    chosen = torch.from_numpy(spread(count, len(phones)))
    return features[chosen], phones[chosen]


def _commonest(labels: Tensor) -> float:
    return torch.bincount(labels).max().item() / len(labels)
