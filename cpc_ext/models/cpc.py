"""Contrastive predictive coding on images: from patches or images to the loss of predicting patches rows ahead.

An encoder turns patches into a grid of encodings, a context network summarises the rows seen so far, and InfoNCE asks
for the encodings some rows further. To predict in other directions the same networks look at the turned grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cpc_ext.nn.grid_info_nce import GridInfoNCE, GridInfoNCEOutput

__all__ = ["CPC"]


class CPC(nn.Module):
    """Contrastive predictive coding (van den Oord et al. 2018, arXiv 1807.03748, section 3.3).

    Direction d predicts downwards in the grid of encodings turned clockwise by 90° d times: down, right, up and left
    in the image. All directions share the encoder and the context network; each has its own matrices W_k.

    Args:
        encoder: patches or images → encodings [B, D, rows, cols], with an attribute ``out_channels`` = D.
        context: encodings [B, D, rows, cols] → contexts [B, E, rows, cols] that see no row below their own, with an
            attribute ``out_channels`` = E.
        pred_steps: how many steps ahead are predicted.
        pred_directions: 1 to 4.
        skip: rows left out between a context and its first target.
        neg_samples: negatives of each prediction, drawn uniformly from the step's targets in the batch, or "all":
            every other target of the step.
        gather_negatives: whose targets are contrasted where several processes train: "none" the process's own,
            "gather" or "ring" those of all; see :class:`cpc_ext.nn.GridInfoNCE`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        context: nn.Module,
        *,
        pred_steps: int,
        pred_directions: int = 1,
        skip: int = 1,
        neg_samples: int | str = 16,
        gather_negatives: str = "none",
    ) -> None:
        super().__init__()
        if not 1 <= pred_directions <= 4:
            raise ValueError(f"pred_directions must be 1 to 4, got {pred_directions}")
        self.encoder = encoder
        self.context = context
        self.objective = GridInfoNCE(
            encoder.out_channels,
            context.out_channels,
            pred_steps=pred_steps,
            pred_directions=pred_directions,
            skip=skip,
            neg_samples=neg_samples,
            gather_negatives=gather_negatives,
        )

    def forward(
        self,
        patches_or_images: Tensor,
        *,
        generator: torch.Generator | None = None,
        negatives: Sequence[Tensor] | None = None,
    ) -> GridInfoNCEOutput:
        """The loss of a batch.

        Args:
            patches_or_images: patches [B, rows, cols, C, p, p] or images [B, C, H, W], whatever the encoder takes.
            generator: draws the negatives; see :class:`cpc_ext.nn.GridInfoNCE`.
            negatives: the draws themselves instead, one [M, S] of integers per step, steps within directions.

        Raises:
            ValueError: a grid with too few rows for ``pred_steps + skip``, or one that is not square although there is
                more than one direction.
        """
        grids = self._turned(self.encode(patches_or_images))
        return self.objective(grids, self._contexts(grids), generator=generator, negatives=negatives)

    def encode(self, patches_or_images: Tensor) -> Tensor:
        """Encodings z, [B, D, rows, cols]."""
        return self.encoder(patches_or_images)

    def contextualize(self, encodings: Tensor) -> Tensor:
        """encodings [B, D, rows, cols] → contexts c of each direction's turned grid, [directions, B, E, rows, cols]."""
        return self._contexts(self._turned(encodings))

    def _turned(self, encodings: Tensor) -> Tensor:
        """The grid of every direction, [directions, B, D, rows, cols]."""
        directions = self.objective.pred_directions
        rows, cols = encodings.shape[2:]
        if directions == 1:
            return encodings.unsqueeze(0)
        if rows != cols:
            raise ValueError(f"pred_directions={directions} needs a square grid, got {rows} x {cols}")
        return torch.stack([torch.rot90(encodings, -turns, (2, 3)) for turns in range(directions)])

    def _contexts(self, grids: Tensor) -> Tensor:
        return self.context(grids.flatten(0, 1)).unflatten(0, grids.shape[:2])
