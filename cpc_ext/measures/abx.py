"""ABX error: how often features of a phone are nearer to another phone than to themselves, with nothing to train.

From frames and the phones they belong to, to the share of triples (A, B, X) that are told wrongly: A and X are
occurrences of one phone, B is one of another, and X should be nearer to A (Schatz et al. 2013). The distance is that of
ZeroSpeech and Libri-light (Kahn et al. 2019, arXiv 1912.07875): dynamic time warping over the angles between frames,
averaged along the path. Chance is a half, less is better.
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

# Distances that are computed and compared at a time, where there are as many.
_BATCH = 1 << 19


@dataclass(frozen=True)
class AbxItems:
    """Occurrences of phones as intervals of frames: int64 [N] each.

    Attributes:
        onset, offset: first frame, and the one after the last, of all utterances one after another.
        phone: the class that is to be told.
        previous, following: classes of its neighbours, -1 where the utterance ends.
        speaker: who says it.
    """

    onset: _Ints
    offset: _Ints
    phone: _Ints
    previous: _Ints
    following: _Ints
    speaker: _Ints


@dataclass(frozen=True)
class AbxResult:
    """error: share of triples told wrongly, averaged as :func:`abx_error` says. triples: how many were compared."""

    error: float
    triples: int


def abx_items(
    labels: Sequence[Tensor], speakers: Sequence[int], *, unit: Unit = "triphone", silence: int | None = 0
) -> AbxItems:
    """The occurrences of phones in labelled frames.

    Neighbouring frames of one label are one occurrence: where a phone follows itself, both are taken for one.

    Args:
        labels: of each utterance, int64 [L], a class a frame.
        speakers: of each utterance.
        unit: "triphone", whose interval also has both neighbours of the phone in it, or "phone" alone.
        silence: the class that is no phone: intervals with it are left out. None where there is none.

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
    """The ABX error of features.

    The error of each choice of context, speaker and phones is averaged first over the contexts, with the speakers of X,
    then over speakers, then over ordered pairs of phones, so that frequent ones weigh no more than others.

    Args:
        features: floating [F, D], frames of all utterances one after another. A frame of zeros has no direction; it is
            at distance 0 from others of that kind and at 1 from the rest, as in Libri-light.
        items: what is compared.
        speaker: "within" has A, B and X of one speaker, "across" X of another one than A and B.
        any_context: whether phones between other neighbours are compared, too.
        most_items: occurrences of a phone by a speaker in a context beyond which that many are drawn.
        most_speakers: speakers of X beyond which that many are drawn, for each A.
        seed: of the draws.

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
    """Distances of pairs of items by dynamic time warping, float32 [P] in 0 to 1.

    The angles between frames, divided by pi, are summed along the path of the least sum, whose steps go one frame on
    in either item or in both, and divided by the path's length.

    Args:
        features: floating [F, D].
        items: whose intervals are compared.
        pairs: int64 [P, 2], numbers of items; quickest where the second does not change from pair to pair.

    Raises:
        ValueError: features that are not finite, pairs of no items, or items of no frames.
    """
    return _distances(_directions(features), items, pairs)


class _Cells:
    """Items of one context, speaker and phone each: their numbers, and what cells have in common, [cells] each."""

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
        """Cells that agree in all keys, as numbers."""
        if len(keys[0]):
            inverse = np.unique(np.stack(keys, axis=1), axis=0, return_inverse=True)[1].reshape(-1)
            order = np.argsort(inverse, kind="stable")
            yield from np.split(order, np.cumsum(np.bincount(inverse))[:-1])


def _within(cells: _Cells) -> Iterator[_Ints]:
    """Triples of cells [T, 3], of A, B and X, for each context and speaker."""
    for run in cells.runs(cells.context, cells.speaker):
        triples = [(a, b, a) for a in run if cells.sizes[a] > 1 for b in run if b != a]
        yield np.array(triples, np.int64).reshape(-1, 3)


def _across(cells: _Cells, most_speakers: int, rng: np.random.Generator) -> Iterator[_Ints]:
    """Triples of cells [T, 3], of A, B and X, for each context and speaker of A."""
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
    """The triples joined to batches of about as many distances as are computed at a time."""
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
    """The cells of A and B of each triple of cells, its error, and how many triples of items there are."""
    a, b, x = triples.T
    # What is needed of each pair of cells is computed once, whichever of the two is X.
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
    """The mean of the values of each key, a row."""
    unique, inverse = np.unique(keys, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    return unique, np.bincount(inverse, values) / np.bincount(inverse)


def _directions(features: Tensor) -> Tensor:
    """Frames of length 1, float32; where some are zeros with a column more that tells them apart."""
    check_finite("features", features)
    frames = unit_length(features.double()).float()
    zeros = ~frames.any(1, keepdim=True)
    if zeros.any():
        # Products with the rest are then below -1, those among them above 1, which angles are clamped to.
        frames = torch.cat([frames, torch.where(zeros, -2e12, 1e-12).to(frames)], dim=1)
    return frames.contiguous()


def _distances(frames: Tensor, items: AbxItems, pairs: _Ints) -> NDArray[np.float32]:
    distances = np.empty(len(pairs), np.float32)
    onset, count = np.ascontiguousarray(items.onset), items.offset - items.onset
    native.dtw_distances(frames, onset, count, np.ascontiguousarray(pairs), distances)
    return distances
