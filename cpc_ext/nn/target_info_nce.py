"""The objective of CPC v2: contexts predict projections of the encodings below, among those of the whole batch.

Encodings [directions, B, D, rows, cols] and contexts [directions, B, E, rows, cols] give the cross-entropy of every
direction and step. All steps of a direction contrast the same keys, its projected encodings, so that their predictions
are rows of one call of the op, with one target each.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpc_ext.nn.across_ranks import EXCHANGES, exchange_with, ring_info_nce
from cpc_ext.nn.grid_info_nce import GridInfoNCEOutput, check_grids, step_means, step_targets
from cpc_ext.nn.log_count import log_count
from cpc_ext.nn.typed import Module
from cpc_ext.ops._checks import check_integer
from cpc_ext.ops.info_nce import info_nce

__all__ = ["TargetInfoNCE"]

_REDUCTIONS = ("mean", "sum", "lightning-bolts")


class TargetInfoNCE(Module):
    """Predict projected encodings, with all targets of the batch as negatives (Hénaff et al. 2019, arXiv 1905.09272).

    Targets are a 1x1 convolution of the encodings. The context at row r predicts the target at row r + k + skip, same
    column and image, by a 1x1 convolution multiplied by ``scale``; the prediction is contrasted with all targets of the
    batch, in all rows. Each direction has convolutions of its own.

    Args:
        encoding_channels: number D of channels of the encodings.
        context_channels: number E of channels of the contexts. Default: D.
        pred_steps: number K of steps k = 1..K, each with a convolution of its own, as in the paper. None: every step
            that the grid has rows for, which all share one, as in Lightning Bolts' CPCTask.
        pred_directions: number of directions that are predicted.
        skip: rows between a context and its first target.
        target_channels: channels of targets and predictions.
        scale: factor of the predictions.
        reduction: reduction of a direction's steps: "mean", which keeps the learning rate independent of their number;
            "sum", as in the paper; or "lightning-bolts", the sum in which step k counts k times, as that program sums
            the steps again for each number of rows that it skips. The loss is the mean over directions.
        gather_negatives: whose targets to contrast where several processes share a batch: "none", "gather" or "ring",
            see :class:`cpc_ext.nn.GridInfoNCE`.

    Raises:
        ValueError: an argument with another value.
    """

    def __init__(
        self,
        encoding_channels: int,
        context_channels: int | None = None,
        *,
        pred_steps: int | None = None,
        pred_directions: int = 1,
        skip: int = 1,
        target_channels: int = 64,
        scale: float = 0.1,
        reduction: str = "mean",
        gather_negatives: str = "none",
    ) -> None:
        super().__init__()
        context_channels = encoding_channels if context_channels is None else context_channels
        for name, value, least in (
            ("encoding_channels", encoding_channels, 1),
            ("context_channels", context_channels, 1),
            ("pred_steps", 1 if pred_steps is None else pred_steps, 1),
            ("pred_directions", pred_directions, 1),
            ("skip", skip, 0),
            ("target_channels", target_channels, 1),
        ):
            check_integer(name, value, least)
        for name, choice, allowed in (
            ("reduction", reduction, _REDUCTIONS),
            ("gather_negatives", gather_negatives, EXCHANGES),
        ):
            if choice not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {choice!r}")
        self.pred_steps = pred_steps
        self.pred_directions = pred_directions
        self.skip = skip
        self.scale = scale
        self.reduction = reduction
        self.gather_negatives = gather_negatives
        # Each direction is a group of channels, which for predictions holds the steps one after another.
        self.target_projection = nn.Conv2d(
            pred_directions * encoding_channels, pred_directions * target_channels, 1, groups=pred_directions
        )
        self.prediction_projection = nn.Conv2d(
            pred_directions * context_channels,
            pred_directions * (pred_steps or 1) * target_channels,
            1,
            groups=pred_directions,
        )

    def forward(self, encodings: Tensor, contexts: Tensor) -> GridInfoNCEOutput:
        """Compute loss and accuracy of predicting downwards in every direction's grid.

        Args:
            encodings: z, [directions, B, D, rows, cols], each direction's grid turned so that it points down.
            contexts: c, [directions, B, E, rows, cols].

        Returns:
            loss is reduced by ``reduction``; accuracy and mutual_information are means over steps with the weights of
            the loss; step_losses and step_accuracies are [directions, steps], without weights.

        Raises:
            TypeError, ValueError: grids of the wrong type or shape, or with too few rows for ``pred_steps + skip``.
        """
        channels = [
            projection.in_channels // self.pred_directions
            for projection in (self.target_projection, self.prediction_projection)
        ]
        check_grids(encodings, contexts, self.pred_directions, channels, self.pred_steps, self.skip)
        exchange = exchange_with(self.gather_negatives)
        own_images, (rows, cols) = encodings.shape[1], encodings.shape[3:]
        keys = exchange.gathered(_project(self.target_projection, encodings), dim=1)
        images = keys.shape[1]
        predictions = torch.unflatten(_project(self.prediction_projection, contexts), 2, (self.pred_steps or 1, -1))
        # In (row, column, image) order a step's contexts come first and its targets last: slices without copies.
        keys = keys.permute(0, 3, 4, 1, 2).flatten(1, 3)
        predictions = predictions.permute(2, 0, 4, 5, 1, 3).flatten(2, 4)
        places = [(rows - first) * cols for first in range(1 + self.skip, 1 + self.skip + self._steps(rows))]
        own = exchange.own_of(own_images)
        targets = step_targets(places, rows * cols, images, own, keys.device).expand(keys.shape[0], -1)
        queries = torch.cat(
            [
                predictions[step if len(predictions) > 1 else 0, :, : count * own_images]
                for step, count in enumerate(places)
            ],
            dim=1,
        )
        if exchange.ring:
            losses, ranks = ring_info_nce(queries, keys, targets, scale=self.scale)
        else:
            losses, _, ranks = info_nce(queries, keys, targets, scale=self.scale, reduction="none")
        rights = (ranks == 0).to(losses.dtype)
        step_losses, step_rights = (
            step_means(values, [count * own_images for count in places]) for values in (losses, rights)
        )
        weights = torch.ones_like(step_losses[0])
        if self.reduction == "lightning-bolts":
            weights = weights.cumsum(0)
        # Not a matrix product with the weights, which autocast would round.
        mean, accuracy = ((values * weights).sum(1).mean() / weights.sum() for values in (step_losses, step_rights))
        return GridInfoNCEOutput(
            mean if self.reduction == "mean" else mean * weights.sum(),
            accuracy,
            log_count(rows * cols * own_images * exchange.world, mean.detach()) - mean.detach(),
            step_losses.detach(),
            step_rights,
        )

    def extra_repr(self) -> str:
        return (
            f"pred_steps={self.pred_steps}, pred_directions={self.pred_directions}, skip={self.skip}, "
            f"scale={self.scale}, reduction={self.reduction}"
        )

    def _steps(self, rows: int) -> int:
        """Return the number of steps that are predicted in a grid of ``rows`` rows."""
        return rows - 1 - self.skip if self.pred_steps is None else self.pred_steps


def _project(projection: nn.Conv2d, grids: Tensor) -> Tensor:
    """Apply every direction's 1x1 convolution: [directions, B, C, rows, cols] → [directions, B, C', rows, cols]."""
    projected = projection(grids.transpose(0, 1).flatten(1, 2))
    return torch.unflatten(projected, 1, (grids.shape[0], -1)).transpose(0, 1)
