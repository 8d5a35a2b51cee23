"""Frames of recordings with their phones and speakers, as features and labels for training and testing probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from cpc_ext.data import WaveformSet
from cpc_ext.data.audio.dataset import LABEL_STEP, label_count
from cpc_ext.measures.frame_probe import FrameProbeResult, PhoneRecipe, Summary, frame_probe, summary_of_frames
from cpc_ext.measures.frames import Alignment, align_frames, label_centers, one_frame_a_label
from cpc_ext.measures.log_mel import log_mel, stack_frames
from cpc_ext.measures.probe import linear_probe

__all__ = ["FrameMaker", "RecordingFrames", "log_mel_frames", "phone_probe", "speaker_probe"]

# int16 [samples] of a recording → features float32 [L, D], and the samples at which its frames are centred, [L].
FrameMaker = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class RecordingFrames:
    """The frames of some recordings.

    Attributes:
        frames: features of each recording, float32 [L, D]. The first layers of an encoder have up to 32 times as many
            frames as there are labels; of frames denser than labels, only the nearest to each label is kept.
        centers: samples at which each recording's frames are centred, [L].
        whole: summaries [D] of all frames of each recording, by kind of summary.
        phones: phones of each recording, int64 on LibriSpeech's grid; None if they are not known.
        speakers: int64 [recordings]; None if they are not known.
    """

    frames: list[Tensor]
    centers: list[Tensor]
    whole: dict[Summary, list[Tensor]]
    phones: list[Tensor] | None
    speakers: Tensor | None

    @classmethod
    def of(
        cls,
        waveforms: WaveformSet,
        make: FrameMaker,
        chosen: Sequence[int] | np.ndarray | None = None,
        *,
        progress: Callable[[list[int]], Iterable[int]] = iter,
    ) -> RecordingFrames:
        """Compute the frames of all or of chosen recordings. progress: wraps their indices, as tqdm does.

        Recordings that are too short for a frame are left out.
        """
        indices = [int(index) for index in (range(len(waveforms)) if chosen is None else chosen)]
        frames, centers, kept = [], [], []
        whole: dict[Summary, list[Tensor]] = {how: [] for how in get_args(Summary)}
        for index in progress(indices):
            samples = torch.from_numpy(np.array(waveforms.recording(index)))
            made, at = make(samples)
            if not len(made):
                continue
            for how, features in whole.items():
                features.append(summary_of_frames(made, how).clone())
            if len(at) > 1 and at[1] - at[0] < LABEL_STEP:
                grid = label_centers(label_count(len(samples)))
                nearest = one_frame_a_label(align_frames(at, grid), at, grid).frames
                made, at = made[nearest], at[nearest]
            frames.append(made)
            centers.append(at)
            kept.append(index)
        phones = None
        if waveforms.phones is not None:
            phones = [torch.from_numpy(waveforms.phones_of(index).astype(np.int64)) for index in kept]
        speakers = None if waveforms.speakers is None else torch.from_numpy(waveforms.speakers[kept])
        return cls(frames, centers, whole, phones, speakers)

    def aligned(self, how: Alignment = "centers") -> tuple[Tensor, Tensor, list[int]]:
        """Return features [F, D] and phones int64 [F] of the frames with a phone, and each recording's number of them.

        Under "centers" each label belongs only to the frame nearest to its centre, so that every layer is judged by the
        same number of frames.

        Raises:
            ValueError: recordings without known phones.
        """
        if self.phones is None:
            raise ValueError("the recordings have no phone labels")
        features, labels = [], []
        for frames, centers, phones in zip(self.frames, self.centers, self.phones, strict=True):
            at = label_centers(len(phones))
            pairs = align_frames(centers, at, how)
            if how == "centers":
                pairs = one_frame_a_label(pairs, centers, at)
            features.append(frames[pairs.frames])
            labels.append(phones[pairs.labels])
        return torch.cat(features), torch.cat(labels), [len(each) for each in labels]

    def summaries(self, how: Summary = "mean") -> Tensor:
        """Return features of whole recordings, [recordings, D]: the mean over time, or the last frame."""
        return torch.stack(self.whole[how])


def log_mel_frames(context: int = 0) -> FrameMaker:
    """Return a maker of log-mel spectra that stacks each frame with ``context`` frames before and after it."""

    def make(samples: Tensor) -> tuple[Tensor, Tensor]:
        frames = log_mel(samples)
        return stack_frames(frames, context), label_centers(len(frames))

    return make


def phone_probe(
    train: RecordingFrames,
    test: RecordingFrames,
    *,
    classes: int,
    alignment: Alignment = "centers",
    hidden: int = 0,
    recipe: PhoneRecipe = "standard",
) -> FrameProbeResult:
    """Train and test a classifier of frames' phones; see :func:`cpc_ext.measures.frame_probe.frame_probe`.

    Raises:
        ValueError: recordings without known phones, or without any frame that has one.
    """
    features, labels, lengths = train.aligned(alignment)
    test_features, test_labels, _ = test.aligned(alignment)
    return frame_probe(
        features,
        labels,
        test_features,
        test_labels,
        classes=classes,
        hidden=hidden,
        recipe=recipe,
        train_lengths=[length for length in lengths if length],
    )


def speaker_probe(train: RecordingFrames, test: RecordingFrames, *, speakers: int, how: Summary = "mean") -> float:
    """Return the accuracy of a linear classifier of test recordings' speakers from their mean, or last, frame.

    Raises:
        ValueError: recordings without known speakers.
    """
    if train.speakers is None or test.speakers is None:
        raise ValueError("the recordings have no speakers")
    return linear_probe(
        train.summaries(how), train.speakers, test.summaries(how), test.speakers, classes=speakers
    ).accuracy
