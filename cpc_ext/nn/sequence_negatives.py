"""Negatives of predictions in a batch of sequences: frames, drawn in one of several ways.

Frame t of sequence b has the index b * L + t, for sequences of L frames. Step k predicts frame t + k from the context
at t, for the first ``counts[k - 1]`` positions t of a window that begins at frame ``begin``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cpc_ext.ops._checks import check_dense
from cpc_ext.ops._contrast_arguments import INTEGERS, as_int64
from cpc_ext.ops._library import drawn_by

__all__ = ["SAMPLINGS", "SequenceNegatives", "Windowed", "checked_draws", "draw", "frames_of"]

SAMPLINGS = ("permuted", "offsets", "same-sequence", "shifted", "all")


class SequenceNegatives(NamedTuple):
    """Drawn negatives, which can be used again.

    Attributes:
        places: int64, by the sampling (S negatives, B sequences of L frames, K steps, T positions):

            - "permuted": [S, B·L], each row a permutation of all frames;
            - "offsets": K tensors [S, B·T_k], offsets from the positive among the step's targets;
            - "same-sequence": [S, L], each row a permutation of the frames of a sequence, for all sequences;
            - "shifted": [B, S, T], frames;
            - "all": None.
        begin: int64 [1], the first frame of the window that is scored; None if all frames are.
        places_begin: int64 [1], for "same-sequence" the beginning of the window of permuted frames; None likewise.
    """

    places: Tensor | Sequence[Tensor] | None
    begin: Tensor | None = None
    places_begin: Tensor | None = None


class Windowed(NamedTuple):
    """The part of a batch that is scored.

    sequences: number of sequences whose frames may be negatives. frames: length of a sequence. window: length of the
    part that is scored. counts: number of positions of each step.
    """

    sequences: int
    frames: int
    window: int
    counts: list[int]

    @property
    def partial(self) -> bool:
        return self.window < self.frames


def draw(
    sampling: str,
    samples: int,
    of: Windowed,
    device: torch.device,
    generator: torch.Generator | None,
    *,
    without_positive: bool,
) -> SequenceNegatives:
    """Draw negatives for a batch on ``device``; the generator may be on another one."""
    draws_on = device if generator is None else generator.device

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, **drawn_by(generator), device=draws_on)

    def permutations(size: int) -> Tensor:
        return torch.stack([torch.randperm(size, **drawn_by(generator), device=draws_on) for _ in range(samples)])

    # As in Greedy InfoMax's program, whose bound excludes the last window.
    begin = integers(0, of.frames - of.window, 1) if of.partial else None
    places_begin = None
    places: Tensor | list[Tensor] | None = None
    if sampling == "permuted":
        places = permutations(of.sequences * of.frames)
    elif sampling == "offsets":
        rows = [of.sequences * count for count in of.counts]
        # A single target has no other, but randint needs a valid range.
        places = [integers(1, max(size, 2), samples, size) for size in rows]
    elif sampling == "same-sequence":
        places = permutations(of.frames)
        places_begin = integers(0, of.frames - of.window, 1) if of.partial else None
    elif sampling == "shifted":
        steps = len(of.counts) if without_positive else 0
        # Without sequences nothing is drawn, but randint needs a valid range.
        others = max(of.sequences, 1) * (of.frames - 1) - steps
        if others < 1:
            raise ValueError(f"exclude_positive leaves none of {of.frames} frames of {of.sequences} sequences")
        drawn = integers(0, others, of.sequences, samples, max(of.counts))
        places = _shifted(drawn, of, begin)
    moved = [None if value is None else value.to(device) for value in (begin, places_begin)]
    if isinstance(places, list):
        return SequenceNegatives([one.to(device) for one in places], *moved)
    return SequenceNegatives(None if places is None else places.to(device), *moved)


def _shifted(drawn: Tensor, of: Windowed, begin: Tensor | None) -> Tensor:
    """Return frames [B, S, T] of any sequence at any time but t.

    drawn: their indices [B, S, T] in an order that ends with the frames that follow t in the own sequence, the nearest
    last, so that a smaller range of draws excludes these.
    """
    ahead = of.frames - 1
    sequence, offset = drawn // ahead, drawn % ahead + 1
    own = torch.arange(of.sequences, device=drawn.device)[:, None, None]
    time = torch.arange(drawn.shape[2], device=drawn.device)
    if begin is not None:
        time = time + begin
    offset = torch.where(sequence == of.sequences - 1, of.frames - offset, offset)
    return (own + 1 + sequence) % max(of.sequences, 1) * of.frames + (time + offset) % of.frames


def checked_draws(given: SequenceNegatives, sampling: str, samples: int, of: Windowed) -> SequenceNegatives:
    """Return the draws in int64; raise TypeError or ValueError unless they have the right form for the batch."""
    forms: dict[str, list[tuple[int, ...]]] = {
        "permuted": [(samples, of.sequences * of.frames)],
        "offsets": [(samples, of.sequences * count) for count in of.counts],
        "same-sequence": [(samples, of.frames)],
        "shifted": [(of.sequences, samples, max(of.counts))],
        "all": [],
    }
    expected = forms[sampling]
    places = given.places
    found = [] if places is None else [places] if isinstance(places, Tensor) else list(places)
    for one in found:
        if check_dense("negatives", one).dtype not in INTEGERS:
            raise TypeError(f"negatives must be integers, got {one.dtype}")
    shapes = [tuple(one.shape) for one in found]
    if shapes != expected:
        raise ValueError(f"negatives must have the shapes {expected} where sampling is {sampling!r}, got {shapes}")
    needed = [given.begin, given.places_begin] if sampling == "same-sequence" else [given.begin]
    if of.partial and any(one is None for one in needed):
        raise ValueError(f"negatives must tell where the window of {of.window} of {of.frames} frames begins")
    # Narrower types may not hold indices that are computed from them.
    wide = [as_int64(one) for one in found]
    return given._replace(places=wide[0] if isinstance(places, Tensor) else wide if wide else None)


def frames_of(draws: SequenceNegatives, sampling: str, of: Windowed, own: slice) -> list[Tensor]:
    """Return the negatives of the own sequences in every step as indices of frames, [B, counts[k - 1], S] each."""
    places = draws.places
    result = []
    for step, count in enumerate(of.counts, start=1):
        if sampling == "shifted":
            assert isinstance(places, Tensor)
            result.append(places[own, :, :count].transpose(1, 2))
            continue
        if sampling == "same-sequence":
            assert isinstance(places, Tensor)
            first = torch.arange(of.sequences, device=places.device)[own, None, None] * of.frames
            index = torch.arange(step, step + count, device=places.device)
            if draws.places_begin is not None:
                index = index + draws.places_begin
            result.append(first + places.index_select(1, index).t())
            continue
        rows = of.sequences * count
        if sampling == "permuted":
            assert isinstance(places, Tensor)
            frames = places[:, places.shape[1] - rows :]
        else:
            assert places is not None
            offsets = places[step - 1]
            row = (torch.arange(rows, device=offsets.device) + offsets) % max(rows, 1)
            begin = 0 if draws.begin is None else draws.begin
            frames = row // count * of.frames + row % count + step + begin
        result.append(torch.unflatten(frames, 1, (of.sequences, count))[:, own].permute(1, 2, 0))
    return result
