"""ABX error: how often an occurrence of a phone is nearer to another phone than to its own, without any training.

The error is the share of triples (A, B, X) that are classified wrongly: A and X are occurrences of one phone, B is one
of another, and X should be nearer to A (Schatz et al. 2013). The distance is that of ZeroSpeech and Libri-light (Kahn
et al. 2019, arXiv 1912.07875): dynamic time warping over the angles between frames, averaged along the path. Chance is
a half, less is better.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.measures.finite import check_finite
from cpc_ext.nn.unit_length import unit_length

__all__ = ["AbxItems", "AbxResult", "Condition", "Unit", "abx_error", "abx_items", "dtw_distances"]

Unit = Literal["triphone", "phone"]
Condition = Literal["within", "across"]
_Ints = NDArray[np.int64]

# Number of distances that are computed and compared at a time, if there are that many.
_BATCH = 1 << 19


@dataclass(frozen=True)
class AbxItems:
    """Occurrences of phones as intervals of frames: int64 [N] each.

    Attributes:
        onset, offset: first frame, and the one after the last, counted over all utterances one after another.
        phone: class of the phone.
        previous, following: classes of the neighbouring phones, -1 at the ends of an utterance.
        speaker: number of the speaker.
    """

    onset: _Ints
    offset: _Ints
    phone: _Ints
    previous: _Ints
    following: _Ints
    speaker: _Ints


@dataclass(frozen=True)
class AbxResult:
    """error: share of wrong triples, averaged as :func:`abx_error` says. triples: number of triples compared."""

    error: float
    triples: int


def abx_items(
    labels: Sequence[Tensor], speakers: Sequence[int], *, unit: Unit = "triphone", silence: int | None = 0
) -> AbxItems:
    """Return the occurrences of phones in labelled frames.

    Neighbouring frames of one label are one occurrence; a phone that follows itself counts as a single occurrence.

    Args:
        labels: classes of each utterance's frames, int64 [L].
        speakers: speaker of each utterance.
        unit: "triphone", whose interval includes both neighbours of the phone, or "phone", the phone alone.
        silence: class that is no phone; intervals that contain it are left out. None: there is no such class.

    Raises:
        ValueError: an unknown unit.
    """
    if unit not in get_args(Unit):
        raise ValueError(f"unit: expected one of {', '.join(get_args(Unit))}, got {unit!r}")
    rows: list[_Ints] = []
    start = 0
    for each, speaker in zip(labels, speakers, strict=True):
        frames = each.numpy()
        changes = np.flatnonzero(np.diff(frames)) + 1
        begin, end = np.append(0, changes), np.append(changes, len(frames))
        phone = frames[begin[end > begin]]
        begin, end = begin[end > begin], end[end > begin]
        padded = np.concatenate([[-1], phone, [-1]])
        previous, following = padded[:-2], padded[2:]
        kept = phone != silence
        if unit == "triphone":
            for neighbour in (previous, following):
                kept &= (neighbour != silence) & (neighbour != -1)
            begin, end = np.append(begin[:1], begin[:-1]), np.append(end[1:], end[-1:])
        columns = start + begin, start + end, phone, previous, following, np.full_like(phone, speaker)
        rows.append(np.stack(columns)[:, kept])
        start += len(frames)
    return AbxItems(*np.concatenate(rows, axis=1) if rows else np.empty((6, 0), np.int64))


def abx_error(
    features: Tensor,
    items: AbxItems,
    *,
    speaker: Condition = "within",
    any_context: bool = False,
    most_items: int = 10,
    most_speakers: int = 5,
    seed: int = 0,
) -> AbxResult:
    """Return the ABX error of features.

    The error of each choice of context, speaker and phones is averaged first over contexts, together with the speakers
    of X, then over speakers, then over ordered pairs of phones, so that frequent ones weigh no more than others.

    Args:
        features: floating [F, D], frames of all utterances one after another. A frame of zeros has no direction; its
            distance is 0 to other frames of zeros and 1 to the rest, as in Libri-light.
        items: occurrences of phones to compare.
        speaker: "within" takes A, B and X from one speaker; "across" takes X from another speaker than A and B.
        any_context: whether to compare phones with different neighbours, too.
        most_items: most occurrences of a phone by a speaker in a context; if there are more, that many are drawn.
        most_speakers: most speakers of X for each A; if there are more, that many are drawn.
        seed: seed of the draws.

    Raises:
        ValueError: an unknown condition, items outside of the frames, features that are not finite, or nothing to
            compare.
    """
    if speaker not in get_args(Condition):
        raise ValueError(f"speaker: expected one of {', '.join(get_args(Condition))}, got {speaker!r}")
    cells = _Cells(items, any_context, most_items, np.random.default_rng(seed))
    triples = _within(cells) if speaker == "within" else _across(cells, most_speakers, np.random.default_rng(seed))
    frames = _directions(features)
    parts = [_errors(frames, items, cells, batch) for batch in _batches(cells, triples)]
    if not parts:
        raise ValueError("items: no two phones in the same context to compare")
    cell_a, cell_b, errors, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    by_speaker = np.stack([cells.speaker[cell_a], cells.phone[cell_a], cells.phone[cell_b]], axis=1)
    keys, errors = _means(by_speaker, errors)
    _, errors = _means(keys[:, 1:], errors)
    return AbxResult(error=float(errors.mean()), triples=int(counts.sum()))


def dtw_distances(features: Tensor, items: AbxItems, pairs: _Ints) -> NDArray[np.float32]:
    """Return distances of pairs of items by dynamic time warping, float32 [P] in 0 to 1.

    A distance is the sum of the angles between frames, divided by pi, along the path of the least sum, divided by the
    path's length. A step of the path advances by one frame in either item or in both.

    Args:
        features: floating [F, D].
        items: intervals to compare.
        pairs: int64 [P, 2], indices of items; fastest if the second one stays the same from pair to pair.

    Raises:
        ValueError: features that are not finite, pairs of no items, or items of no frames.
    """
    return _distances(_directions(features), items, pairs)


class _Cells:
    """Items grouped into cells of one context, speaker and phone: their indices, and the cells' keys, [cells] each."""

    def __init__(self, items: AbxItems, any_context: bool, most: int, rng: np.random.Generator) -> None:
        count = len(items.phone)
        context = np.zeros(count, np.int64)
        if not any_context:
            neighbours = np.stack([items.previous, items.following], axis=1)
            context = np.unique(neighbours, axis=0, return_inverse=True)[1].reshape(-1)
        keys = np.stack([context, items.speaker, items.phone], axis=1)
        unique, inverse = np.unique(keys, axis=0, return_inverse=True)
        order = np.argsort(inverse.reshape(-1), kind="stable")
        sizes = np.bincount(inverse.reshape(-1), minlength=len(unique))
        members = np.split(order, np.cumsum(sizes)[:-1])
        self.context, self.speaker, self.phone = unique.T
        self.items = [m if len(m) <= most else np.sort(rng.choice(m, most, replace=False)) for m in members]
        self.sizes = np.minimum(sizes, most)

    def runs(self, *keys: _Ints) -> Iterator[_Ints]:
        """Yield the groups of cells that agree in all keys, as indices of cells."""
        if len(keys[0]):
            inverse = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
            order = np.argsort(inverse, kind="stable")
            yield from np.split(order, np.cumsum(np.bincount(inverse))[:-1])


def _within(cells: _Cells) -> Iterator[_Ints]:
    """Yield triples of cells [T, 3], of A, B and X, for each context and speaker."""
    for run in cells.runs(cells.context, cells.speaker):
        triples = [(a, b, a) for a in run if cells.sizes[a] > 1 for b in run if b != a]
        yield np.array(triples, np.int64).reshape(-1, 3)


def _across(cells: _Cells, most_speakers: int, rng: np.random.Generator) -> Iterator[_Ints]:
    """Yield triples of cells [T, 3], of A, B and X, for each context and speaker of A."""
    sayings = {int(cell): run for run in cells.runs(cells.context, cells.phone) for cell in run}
    for run in cells.runs(cells.context, cells.speaker):
        triples = []
        for a in run if len(run) > 1 else ():
            others = sayings[int(a)][sayings[int(a)] != a]
            if len(others) > most_speakers:
                others = np.sort(rng.choice(others, most_speakers, replace=False))
            triples += [(a, b, x) for x in others for b in run if b != a]
        yield np.array(triples, np.int64).reshape(-1, 3)


def _batches(cells: _Cells, triples: Iterator[_Ints]) -> Iterator[_Ints]:
    """Join the triples to batches of about ``_BATCH`` distances."""
    waiting: list[_Ints] = []
    distances = 0
    for each in triples:
        waiting.append(each)
        distances += int((cells.sizes[each[:, 2]] * cells.sizes[each[:, 1]]).sum())
        if distances >= _BATCH:
            yield np.concatenate(waiting)
            waiting, distances = [], 0
    if distances:
        yield np.concatenate(waiting)


def _errors(
    frames: Tensor, items: AbxItems, cells: _Cells, triples: _Ints
) -> tuple[_Ints, _Ints, NDArray[np.float64], _Ints]:
    """Return, for each triple of cells, the cells of A and B, the error, and the number of triples of items."""
    a, b, x = triples.T
    # The distances of each pair of cells are computed once, whichever of the two is X.
    blocks = np.unique(np.sort(np.concatenate([np.stack([x, a], 1), np.stack([x, b], 1)]), axis=1), axis=0)
    pairs = [
        np.stack(
            [np.tile(cells.items[one], len(cells.items[other])), cells.items[other].repeat(len(cells.items[one]))], 1
        )
        for one, other in blocks
    ]
    flat = _distances(frames, items, np.concatenate(pairs))
    ends = np.cumsum([len(each) for each in pairs])
    found: dict[tuple[int, int], NDArray[np.float32]] = {
        (one, other): part.reshape(cells.sizes[other], cells.sizes[one]).T
        for (one, other), part in zip(blocks.tolist(), np.split(flat, ends[:-1]), strict=True)
    }

    def between(one: int, other: int) -> NDArray[np.float32]:
        return found[one, other] if one <= other else found[other, one].T

    errors, counts = np.empty(len(triples)), np.empty(len(triples), np.int64)
    for place, (cell_a, cell_b, cell_x) in enumerate(triples.tolist()):
        to_a, to_b = between(cell_x, cell_a)[:, :, None], between(cell_x, cell_b)[:, None, :]
        wrong = (to_a > to_b) + 0.5 * (to_a == to_b)
        total = wrong.sum()
        counts[place] = wrong.size
        if cell_a == cell_x:  # X is not compared with itself.
            total -= np.einsum("iij->", wrong)
            counts[place] -= len(wrong) * wrong.shape[2]
        errors[place] = total / counts[place]
    return a, b, errors, counts


def _means(keys: _Ints, values: NDArray[np.float64]) -> tuple[_Ints, NDArray[np.float64]]:
    """Return the unique keys, which are rows, and the mean of the values of each."""
    unique, inverse = np.unique(keys, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    return unique, np.bincount(inverse, values) / np.bincount(inverse)


def _directions(features: Tensor) -> Tensor:
    """Return frames scaled to length 1, float32; if some are zeros, one more column distinguishes them."""
    check_finite("features", features)
    frames = unit_length(features.double()).float()
    zeros = ~frames.any(1, keepdim=True)
    if zeros.any():
        # Products of zeros with other frames are then below -1, and with each other above 1; they are clamped to ±1.
        frames = torch.cat([frames, torch.where(zeros, -2e12, 1e-12).to(frames)], dim=1)
    return frames.contiguous()


def _distances(frames: Tensor, items: AbxItems, pairs: _Ints) -> NDArray[np.float32]:
    distances = np.empty(len(pairs), np.float32)
    onset, count = np.ascontiguousarray(items.onset), items.offset - items.onset
    native.dtw_distances(frames, onset, count, np.ascontiguousarray(pairs), distances)
    return distances
