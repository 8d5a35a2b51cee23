"""What encodings are worth on the way: held-out images or frames told by their nearest neighbours, and their rank.

From a model in the middle of its training to an accuracy and an effective rank, always of the same few images or
recordings. Nothing is fitted, nothing drawn, and the model stays as it is: a run goes on as if nobody had looked.
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

# What the accuracy is called among what is logged.
PROBED = "knn_accuracy"
# What the rank is called.
RANK = "effective_rank"
# Images, or frames, that vote and that are asked for: a second or two of encoding on two CPU cores, and a standard
# error of at most 2.3 %. Among so few there are no 200 near ones, which evaluations of whole data sets take.
_LABELLED, _ASKED = 1000, 500
_NEIGHBOURS = 20
# How long the recordings last that the frames come from.
_SECONDS = {"train": 60.0, "test": 30.0}


class ImageProbe:
    """Tells the classes of some of a data set's test images from some of its labelled training images.

    Attributes:
        chance: the accuracy of always naming the commonest class.

    Raises:
        TrainingError: images without labels.
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
        """The fraction of images that are told rightly, and the effective rank of the labelled ones' encodings.

        features: from uint8 [B, C, H, W] on the device to [B, D].
        """
        known, asked = (encode(images, features, self._device, chosen=chosen) for images, chosen in self._sets)
        return _found(known, self._labels[0], asked, self._labels[1], self._classes)


class FrameProbe:
    """Tells the phones of frames of some test recordings from frames of some training recordings.

    Attributes:
        chance: the accuracy of always naming the commonest phone.

    Raises:
        TrainingError: recordings of unknown phones.
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
        """The fraction of frames whose phone is told rightly, and the effective rank of the labelled frames.

        make: what makes frames of a recording.
        """
        (known, labels), (asked, expected) = (
            _some_frames(RecordingFrames.of(waveforms, make, recordings), count)
            for (waveforms, recordings), count in zip(self._sets, (_LABELLED, _ASKED), strict=True)
        )
        return _found(known, labels, asked, expected, self._classes)


def probed_recordings(waveforms: WaveformSet, seconds: float) -> np.ndarray:
    """Recordings that last about so long together, from all of the set; at least one, at most all.

    Where phones are known of some alone, which the others might be without, as many of these are among them as well.
    """
    chosen = _lasting(waveforms, np.arange(len(waveforms)), seconds)
    if waveforms.phone_starts is not None:
        chosen = np.union1d(chosen, _lasting(waveforms, np.flatnonzero(np.diff(waveforms.phone_starts)), seconds))
    return chosen


def probe_curve(metrics: Path, probe: ImageProbe | FrameProbe | None) -> ProbeCurve | None:
    """What a run's probes found so far, for its figure; None where there were none. probe: the run's, if it has one."""
    records = read_metrics(metrics, having=(PROBED,))
    if not records:
        return None
    chance = None if probe is None else probe.chance
    return ProbeCurve([record["step"] for record in records], [record[PROBED] for record in records], chance)


def _lasting(waveforms: WaveformSet, those: np.ndarray, seconds: float) -> np.ndarray:
    """Some of those recordings, which last about so long together."""
    total = np.diff(waveforms.starts)[those].sum() / SAMPLE_RATE
    count = len(those) if total <= seconds else max(1, int(len(those) * seconds / total))
    chosen: np.ndarray = those[spread(count, len(those))]
    return chosen


def _found(known: Tensor, labels: Tensor, asked: Tensor, expected: Tensor, classes: int) -> dict[str, float]:
    accuracy = knn_accuracy(known, labels, asked, expected, classes=classes, neighbours=_NEIGHBOURS)
    return {PROBED: accuracy, RANK: effective_rank(known)}


def _some_frames(frames: RecordingFrames, count: int) -> tuple[Tensor, Tensor]:
    """Features [N, D] and phones int64 [N] of at most ``count`` frames, from all of the recordings."""
    features, phones, _ = frames.aligned()
    chosen = torch.from_numpy(spread(count, len(phones)))
    return features[chosen], phones[chosen]


def _commonest(labels: Tensor) -> float:
    return torch.bincount(labels).max().item() / len(labels)
