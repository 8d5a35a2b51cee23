"""The objective of contrastive predictive coding on a grid: contexts predict the encodings some rows below.

Encodings [directions, B, D, rows, cols] and contexts [directions, B, E, rows, cols] give the InfoNCE loss of every
direction and step, and their mean. The matrices W_k multiply the contexts, not the encodings, so that all steps of a
direction share the encodings as keys, and no encoding is gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cpc_ext.nn.across_ranks import EXCHANGES, exchange_with, ring_info_nce
from cpc_ext.nn.log_count import log_count
from cpc_ext.nn.typed import Module
from cpc_ext.ops._checks import check_dense, check_floating, check_integer
from cpc_ext.ops._contrast_arguments import INTEGERS, as_int64
from cpc_ext.ops._library import drawn_by
from cpc_ext.ops.info_nce import info_nce
from cpc_ext.ops.predict_and_contrast import predict_and_contrast

__all__ = [
    "GridInfoNCE",
    "GridInfoNCEOutput",
    "check_grids",
    "step_means",
    "step_rows",
    "step_targets",
    "turned_grids",
]

# Devices on which predict_and_contrast contrasts sampled keys, which takes the CPU a third to 40 % less time than
# computing the predictions first. On CUDA it would also multiply the contexts that a step does not use.
_CONTRASTS_AS_PREDICTED = ("cpu",)


class GridInfoNCEOutput(NamedTuple):
    """Results of :class:`GridInfoNCE`.

    Attributes:
        loss: scalar in nats, the mean over positions, then steps, then directions.
        accuracy: scalar, the fraction of positives that score highest, averaged likewise; without gradient.
        mutual_information: scalar, log of the number of contrasted keys minus the loss, averaged likewise: a lower
            bound on the mutual information of contexts and encodings, in nats; without gradient.
        step_losses: [directions, steps], the loss of each step; without gradient.
        step_accuracies: [directions, steps]; without gradient.
    """

    loss: Tensor
    accuracy: Tensor
    mutual_information: Tensor
    step_losses: Tensor
    step_accuracies: Tensor


def turned_grids(encodings: Tensor, directions: int) -> Tensor:
    """Return the grid turned clockwise by 90° d times, for every direction d.

    [B, D, rows, cols] → [directions, B, D, rows, cols].

    Raises:
        ValueError: encodings of another shape, or a grid that is not square with more than one direction.
    """
    if encodings.ndim != 4:
        raise _no_grids(encodings)
    rows, cols = encodings.shape[2:]
    if directions == 1:
        return encodings.unsqueeze(0)
    if rows != cols:
        raise ValueError(f"pred_directions={directions} needs a square grid, got {rows} x {cols}")
    return torch.stack([torch.rot90(encodings, -turns, (2, 3)) for turns in range(directions)])


def _no_grids(encodings: Tensor) -> ValueError:
    sequences = "; sequences [B, D, L] are for SequenceInfoNCE" if encodings.ndim == 3 else ""
    return ValueError(f"encodings must be grids [B, D, rows, cols], got shape {tuple(encodings.shape)}{sequences}")


class GridInfoNCE(Module):
    """Predict encodings from contexts and contrast them (van den Oord et al. 2018, arXiv 1807.03748, section 3.3).

    For step k = 1..K the context c at row r scores the encoding z at row r + k + skip, same column and image, by
    ``zᵀ W_k c``. Its negatives come from the step's targets: the encodings of all rows ≥ k + skip in the whole batch.

    Args:
        encoding_channels: number D of channels of the encodings.
        context_channels: number E of channels of the contexts. Default: D.
        pred_steps: number K of steps ahead.
        pred_directions: number of directions that are predicted, each with its own W_k.
        skip: rows between a context and its first target. Overlapping patches share pixels with their neighbours; 1
            keeps the nearest row from being predicted by copying.
        neg_samples: negatives of each position, drawn uniformly with replacement from the step's targets (the
            positive may be among them, as published), or "all": every other target of the step.
        gather_negatives: the targets to contrast where several processes share a batch. "none": the process's own.
            "gather": those of all processes, as in one process with the whole batch; the loss returned is that of the
            process's own contexts. "ring": the same, in memory that does not grow with the number of processes; it
            needs ``neg_samples="all"``.

    Attributes:
        weight: [directions, steps, E, D], the W_k transposed; initially uniform in ±D**-0.5, as in
            :class:`torch.nn.Linear`.
    """

    def __init__(
        self,
        encoding_channels: int,
        context_channels: int | None = None,
        *,
        pred_steps: int,
        pred_directions: int = 1,
        skip: int = 1,
        neg_samples: int | str = 16,
        gather_negatives: str = "none",
    ) -> None:
        super().__init__()
        check_integer("encoding_channels", encoding_channels, 1)
        context_channels = encoding_channels if context_channels is None else context_channels
        check_integer("context_channels", context_channels, 1)
        check_integer("pred_steps", pred_steps, 1)
        check_integer("pred_directions", pred_directions, 1)
        check_integer("skip", skip, 0)
        if neg_samples != "all":
            if isinstance(neg_samples, str):
                raise ValueError(f'neg_samples must be an int or "all", got {neg_samples!r}')
            check_integer("neg_samples", neg_samples, 1)
        if gather_negatives not in EXCHANGES:
            raise ValueError(f"gather_negatives must be one of {', '.join(EXCHANGES)}, got {gather_negatives!r}")
        if gather_negatives == "ring" and neg_samples != "all":
            raise ValueError('gather_negatives="ring" needs neg_samples="all", as samples may be any rank\'s keys')
        self.gather_negatives = gather_negatives
        self.pred_steps = pred_steps
        self.pred_directions = pred_directions
        self.skip = skip
        self.neg_samples = neg_samples
        self.weight = nn.Parameter(torch.empty(pred_directions, pred_steps, context_channels, encoding_channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(
        self,
        encodings: Tensor,
        contexts: Tensor,
        *,
        generator: torch.Generator | None = None,
        negatives: Sequence[Tensor] | None = None,
    ) -> GridInfoNCEOutput:
        """Compute loss and accuracy of predicting downwards in every direction's grid.

        Args:
            encodings: z, [directions, B, D, rows, cols], each direction's grid turned so that it points down.
            contexts: c, [directions, B, E, rows, cols].
            generator: draws the negatives, on its own device. Default: PyTorch's generator of the encodings' device.
            negatives: the draws themselves instead: one integer tensor [M, S] for each direction and step, the steps of
                a direction together. M and the indices count the step's positions and its targets in (row, column,
                image) order, under ``gather_negatives="gather"`` those of all processes.

        Raises:
            TypeError, ValueError: grids of the wrong type or shape, or with too few rows for ``pred_steps + skip``;
                negatives of the wrong number, type or shape, or given although ``neg_samples="all"``.
            IndexError: on the CPU, a negative that names no target.
        """
        directions, steps, context_channels, encoding_channels = self.weight.shape
        check_grids(encodings, contexts, directions, (encoding_channels, context_channels), steps, self.skip)
        exchange = exchange_with(self.gather_negatives)
        own_images, (rows, cols) = encodings.shape[1], encodings.shape[-2:]
        candidates = exchange.gathered(encodings, dim=1)
        images = candidates.shape[1]
        own = exchange.own_of(own_images)
        # Number of grid positions from a step's first target row on.
        places = [(rows - step - self.skip) * cols for step in range(1, self.pred_steps + 1)]
        # In (row, column, image) order a step's contexts come first and its targets last: slices without copies.
        keys = candidates.permute(0, 3, 4, 1, 2).flatten(1, 3)
        contexts = contexts.permute(0, 3, 4, 1, 2).flatten(1, 3)
        sizes = [count * own_images for count in places]
        firsts = [(rows * cols - count) * images for count in places]
        targets = step_targets(places, rows * cols, images, own, keys.device).expand(keys.shape[0], -1)
        sampled = None
        contrasted = [size * exchange.world for size in sizes]
        if not isinstance(self.neg_samples, str):
            contrasted = [self.neg_samples + 1] * self.pred_steps
            whole = [count * images for count in places]
            if negatives is None:
                draws = self._draw(whole, self.neg_samples, keys.device, generator)
            else:
                draws = self._replayed(negatives, whole)
            sampled = _own_negatives(draws, firsts, places, images, own)
        elif negatives is not None:
            raise ValueError('negatives replays sampled negatives, but neg_samples is "all"')
        if sampled is not None and keys.device.type in _CONTRASTS_AS_PREDICTED:
            loss, step_losses, step_rights = self._contrast_as_predicted(contexts, keys, targets, sampled, sizes)
        else:
            queries = [contexts[:, :size] @ self.weight[:, step] for step, size in enumerate(sizes)]
            if sampled is None:
                losses, ranks = _contrast_all(queries, keys, targets, firsts, ring=exchange.ring)
            else:
                joined = torch.cat(queries, dim=1)
                losses, _, ranks = info_nce(joined, keys, targets, negatives=sampled, reduction="none")
            step_losses, step_rights = (step_means(values, sizes) for values in (losses, (ranks == 0).to(losses.dtype)))
            loss = step_losses.mean()
        mean = loss.detach()
        most = sum(log_count(count, mean) for count in contrasted) / len(contrasted)
        return GridInfoNCEOutput(loss, step_rights.mean(), most - mean, step_losses.detach(), step_rights)

    def _contrast_as_predicted(
        self, contexts: Tensor, keys: Tensor, targets: Tensor, negatives: Tensor, sizes: list[int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss, and losses and accuracies [directions, steps]."""
        rows = contexts.shape[1]
        results = [
            predict_and_contrast(
                contexts[direction].unsqueeze(0),
                self.weight[direction].transpose(1, 2),
                keys[direction],
                step_rows([part.unsqueeze(0) for part in targets[direction].split(sizes)], rows, absent=-1),
                negatives=step_rows([part.unsqueeze(0) for part in negatives[direction].split(sizes)], rows, absent=0),
            )
            for direction in range(self.pred_directions)
        ]
        loss, _, _, losses, accuracies = (torch.stack(values) for values in zip(*results, strict=True))
        return loss.mean(), losses, accuracies

    def draw_negatives(self, encodings: Tensor, generator: torch.Generator | None = None) -> list[Tensor] | None:
        """Draw negatives as :meth:`forward` would for these encodings, in the form that it takes.

        Several losses of one grid can share them. Returns None with ``neg_samples="all"``.

        encodings: [B, D, rows, cols] or [directions, B, D, rows, cols]; only the shape and the device matter.
        """
        if isinstance(self.neg_samples, str):
            return None
        if encodings.ndim not in (4, 5):
            raise _no_grids(encodings)
        images, (rows, cols) = encodings.shape[-4], encodings.shape[-2:]
        images *= exchange_with(self.gather_negatives).world
        sizes = [max(rows - step - self.skip, 0) * cols * images for step in range(1, self.pred_steps + 1)]
        drawn = self._draw(sizes, self.neg_samples, encodings.device, generator)
        return [draw[direction] for direction in range(self.pred_directions) for draw in drawn]

    def extra_repr(self) -> str:
        directions, steps, context_channels, encoding_channels = self.weight.shape
        return (
            f"{encoding_channels}, {context_channels}, pred_steps={steps}, pred_directions={directions}, "
            f"skip={self.skip}, neg_samples={self.neg_samples}"
        )

    def _draw(
        self, sizes: list[int], samples: int, device: torch.device, generator: torch.Generator | None
    ) -> list[Tensor]:
        """Draw the negatives of every step, [directions, M, S] indices into the step's M targets."""
        draws_on = device if generator is None else generator.device
        return [
            torch.randint(
                max(size, 1),
                (self.pred_directions, size, samples),
                **drawn_by(generator),
                device=draws_on,
            ).to(device)
            for size in sizes
        ]

    def _replayed(self, negatives: Sequence[Tensor], sizes: list[int]) -> list[Tensor]:
        """Convert given negatives in (direction, step) order to one tensor [directions, M, S] for every step."""
        directions, steps = self.pred_directions, self.pred_steps
        if len(negatives) != directions * steps:
            raise ValueError(
                f"negatives must hold {directions} directions x {steps} steps = {directions * steps} tensors, "
                f"got {len(negatives)}"
            )
        for index, draw in enumerate(negatives):
            expected = (sizes[index % steps], self.neg_samples)
            if check_dense(f"negatives[{index}]", draw).dtype not in INTEGERS:
                raise TypeError(f"negatives[{index}] must be integers, got {draw.dtype}")
            if tuple(draw.shape) != expected:
                raise ValueError(f"negatives[{index}] must have shape {expected}, got {tuple(draw.shape)}")
            # An index beyond its step's last target also lies beyond the last key, but one below 0 would name a key.
            if draw.device.type == "cpu" and draw.numel() and int(draw.min()) < 0:
                raise IndexError(f"negatives[{index}] must be in 0..{expected[0] - 1}, got {int(draw.min())}")
        # In int64, as narrower types may not hold their sum with the index of a step's first key.
        drawn = [as_int64(draw) for draw in negatives]
        return [torch.stack(drawn[step::steps]) for step in range(steps)]


def check_grids(
    encodings: Tensor,
    contexts: Tensor,
    directions: int,
    channels: Sequence[int],
    pred_steps: int | None,
    skip: int,
) -> None:
    """Raise TypeError or ValueError unless these are floating grids with the given channels and enough rows.

    pred_steps: number of steps that must fit; None: one.
    """
    for name, grid, count in zip(("encodings", "contexts"), (encodings, contexts), channels, strict=True):
        check_floating(name, grid)
        if grid.ndim != 5 or grid.shape[0] != directions or grid.shape[2] != count:
            raise ValueError(
                f"{name} must be [{directions} directions, B, {count} channels, rows, cols], "
                f"got shape {tuple(grid.shape)}"
            )
    if encodings.shape[1] != contexts.shape[1] or encodings.shape[3:] != contexts.shape[3:]:
        raise ValueError(
            f"contexts must have the batch and grid of encodings {tuple(encodings.shape)}, got {tuple(contexts.shape)}"
        )
    rows, steps = encodings.shape[3], 1 if pred_steps is None else pred_steps
    if rows <= steps + skip:
        raise ValueError(
            f"a grid of {rows} rows is too small to predict pred_steps={pred_steps} steps with skip={skip}: it needs "
            f"more than {steps + skip} rows"
        )


def step_targets(places: list[int], cells: int, images: int, own: slice, device: torch.device) -> Tensor:
    """Return the indices [M] of the own images' targets, step by step, among all keys in (cell, image) order.

    places: for each step, the number of cells at the end of a grid that are its targets.
    """
    index = torch.arange(cells * images, device=device).view(cells, images)[:, own]
    return torch.cat([index[-count:].flatten() for count in places])


def _own_negatives(draws: Sequence[Tensor], firsts: list[int], places: list[int], images: int, own: slice) -> Tensor:
    """Convert draws of all processes among a step's targets to those of the own images among all keys.

    Returns [directions, M, S]. Every process draws for all, so that the draws do not depend on their number.
    """
    return torch.cat(
        [
            torch.unflatten(draw + first, 1, (count, images))[:, :, own].flatten(1, 2)
            for draw, first, count in zip(draws, firsts, places, strict=True)
        ],
        dim=1,
    )


def _contrast_all(
    queries: list[Tensor], keys: Tensor, targets: Tensor, firsts: list[int], *, ring: bool
) -> tuple[Tensor, Tensor]:
    """Return losses and ranks [directions, M] of all steps, each against the keys from its first target on."""
    begins = torch.cat(
        [targets.new_full((query.shape[1],), first) for query, first in zip(queries, firsts, strict=True)]
    )
    key_range = torch.stack([begins, torch.full_like(begins, keys.shape[1])], 1).expand(keys.shape[0], -1, -1)
    joined = torch.cat(queries, dim=1)
    if ring:
        return ring_info_nce(joined, keys, targets, key_range=key_range)
    losses, _, ranks = info_nce(joined, keys, targets, key_range=key_range, reduction="none")
    return losses, ranks


def step_rows(values: Sequence[Tensor], length: int, *, absent: int) -> Tensor:
    """Stack values [B, T_k, ...] of each step's first contexts to [steps, B, length, ...], padded with ``absent``."""
    together = values[0].new_full((len(values), values[0].shape[0], length, *values[0].shape[2:]), absent)
    for step, each in enumerate(values):
        together[step, :, : each.shape[1]] = each
    return together


def step_means(values: Tensor, sizes: list[int]) -> Tensor:
    """Return means [directions, steps] of values [directions, M] over each step's positions; 0 for an empty batch."""
    return torch.stack([part.sum(1) / max(part.shape[1], 1) for part in torch.split(values, sizes, 1)], 1)
