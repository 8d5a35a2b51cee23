"""Alignment of a model's frames with labels on another grid.

A label of a forced alignment and a frame of an encoder each stand for a window of the waveform. Both have a fixed hop
but different offsets, so that a frame and a label of the same index may lie hundredths of a second apart. Published
programs pair them in various ways, which are needed to reproduce their numbers.
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
    """Return the samples at which labels on LibriSpeech's grid are centred, float64 [count]."""
    return LABEL_STEP * torch.arange(count, dtype=torch.float64) + LABEL_CENTRE


def align_frames(frame_centers: Tensor, label_centers: Tensor, how: Alignment = "centers") -> AlignedFrames:
    """Pair the frames and labels of an utterance.

    Args:
        frame_centers, label_centers: samples at which frames and labels are centred, ascending, [F] and [N].
        how: "centers" gives every frame the label with the nearest centre, the earlier one of two that are equally
            near, and leaves out frames farther from it than half the labels' hop, which lie outside of the labels.
            "front" drops surplus frames at the front, as Greedy InfoMax does. "same-index" pairs equal indices, as
            CPC_audio does.

    Raises:
        ValueError: an unknown ``how``, or centres that are not ascending.
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
    # Each label is the nearest one between the midpoints to its neighbours; at a midpoint the earlier label is taken.
    middles = (labels[1:] + labels[:-1]) / 2
    nearest = torch.searchsorted(middles, frames)
    reach = labels.diff().max().item() / 2 if len(labels) > 1 else LABEL_STEP / 2
    inside = (frames - labels[nearest]).abs() <= reach
    return AlignedFrames(torch.arange(len(frames))[inside], nearest[inside])


def one_frame_a_label(pairs: AlignedFrames, frame_centers: Tensor, label_centers: Tensor) -> AlignedFrames:
    """Keep, of the pairs of :func:`align_frames`, the one with the frame nearest to the label's centre for each label.

    Of two frames that are equally near, the earlier one is kept.
    """
    distance = (frame_centers.double()[pairs.frames] - label_centers.double()[pairs.labels]).abs()
    by_distance = torch.sort(distance, stable=True).indices
    nearest = by_distance[torch.sort(pairs.labels[by_distance], stable=True).indices]
    first = torch.ones_like(nearest, dtype=torch.bool)
    first[1:] = pairs.labels[nearest].diff() > 0
    return AlignedFrames(pairs.frames[nearest[first]], pairs.labels[nearest[first]])
