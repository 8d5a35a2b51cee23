"""Which frame of a model belongs to which label, where both lie on grids of their own.

A label, as forced alignments have them, and a frame of an encoder each stand for a window of the waveform. Windows of
either begin every hop of samples but in other places, so that what is at one index may lie hundredths of a second
apart. The published programs pair them in ways of their own, which are needed to repeat their numbers.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from cpc_ext.data.audio.dataset import LABEL_CENTRE, LABEL_STEP

__all__ = ["AlignedFrames", "Alignment", "align_frames", "label_centers", "one_frame_a_label"]

Alignment = Literal["centers", "front", "same-index"]


class AlignedFrames(NamedTuple):
    """Pairs of a frame and a label: indices int64 [P], ascending in both."""

    frames: Tensor
    labels: Tensor


def label_centers(count: int) -> Tensor:
    """The samples at which the windows of labels on LibriSpeech's grid are centred, float64 [count]."""
    return LABEL_STEP * torch.arange(count, dtype=torch.float64) + LABEL_CENTRE


def align_frames(frame_centers: Tensor, label_centers: Tensor, how: Alignment = "centers") -> AlignedFrames:
    """Pair the frames and labels of an utterance.

    Args:
        frame_centers, label_centers: samples at which each is centred, ascending, [F] and [N].
        how: "centers" gives every frame the label whose centre is nearest, the earlier one of two, and leaves out
            frames that are further from it than half the labels' hop, which lie outside of the labels. "front" cuts
            from the front frames that are more than there are labels, as Greedy InfoMax does. "same-index" pairs what
            has the same index, as CPC_audio does.

    Raises:
        ValueError: an unknown way, or centres that are not ascending.
    """
    if how not in get_args(Alignment):
        raise ValueError(f"how: expected one of {', '.join(get_args(Alignment))}, got {how!r}")
    count = min(len(frame_centers), len(label_centers))
    if how != "centers":
        index = torch.arange(count)
        return AlignedFrames(index + (max(0, len(frame_centers) - count) if how == "front" else 0), index)
    frames, labels = frame_centers.double(), label_centers.double()
    for name, centers in (("frame_centers", frames), ("label_centers", labels)):
        if not bool((centers.diff() > 0).all()):
            raise ValueError(f"{name}: expected ascending samples")
    if count == 0:
        return AlignedFrames(torch.arange(0), torch.arange(0))
    # Between the middles of neighbouring labels, each label is the nearest; at a middle the earlier one.
    middles = (labels[1:] + labels[:-1]) / 2
    nearest = torch.searchsorted(middles, frames)
    reach = labels.diff().max().item() / 2 if len(labels) > 1 else LABEL_STEP / 2
    inside = (frames - labels[nearest]).abs() <= reach
    return AlignedFrames(torch.arange(len(frames))[inside], nearest[inside])


def one_frame_a_label(pairs: AlignedFrames, frame_centers: Tensor, label_centers: Tensor) -> AlignedFrames:
    """Those of the pairs, as :func:`align_frames` gives them, whose frame is the nearest to its label's centre.

    Of two as near it is the earlier.
    """
    distance = (frame_centers.double()[pairs.frames] - label_centers.double()[pairs.labels]).abs()
    by_distance = torch.sort(distance, stable=True).indices
    nearest = by_distance[torch.sort(pairs.labels[by_distance], stable=True).indices]
    first = torch.ones_like(nearest, dtype=torch.bool)
    first[1:] = pairs.labels[nearest].diff() > 0
    return AlignedFrames(pairs.frames[nearest[first]], pairs.labels[nearest[first]])
