"""The objective of CPC v2: contexts predict projections of the encodings below, out of all of the batch.

From encodings [B, D, rows, cols] and contexts [B, E, rows, cols] to a weighted sum of cross-entropies. Every step
contrasts the same keys, all projected encodings, so all of them are rows of one call with a weight each.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cpc_ext.nn.grid_info_nce import GridInfoNCEOutput
from cpc_ext.ops.info_nce import info_nce

__all__ = ["TargetInfoNCE"]


class TargetInfoNCE(nn.Module):
    """Predict projected encodings, all targets of the batch being negatives (Hénaff et al. 2019, arXiv 1905.09272).

    Targets are a 1x1 convolution of the encodings, predictions one of the contexts, shared by all steps and multiplied
    by ``scale``. The context at row r predicts the target k rows below for every k = 2..rows-1. As in Lightning Bolts'
    CPCTask, which sums the steps anew for each number of rows it ignores, step k counts k - 1 times.

    Args:
        encoding_channels: D.
        context_channels: E. Default: D.
        target_channels: of targets and predictions.
        scale: factor of the predictions.
    """

    def __init__(
        self,
        encoding_channels: int,
        context_channels: int | None = None,
        *,
        target_channels: int = 64,
        scale: float = 0.1,
    ) -> None:
        super().__init__()
        context_channels = encoding_channels if context_channels is None else context_channels
        for name, value in (
            ("encoding_channels", encoding_channels),
            ("context_channels", context_channels),
            ("target_channels", target_channels),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.scale = scale
        self.target_projection = nn.Conv2d(encoding_channels, target_channels, 1)
        self.prediction_projection = nn.Conv2d(context_channels, target_channels, 1)

    def forward(self, encodings: Tensor, contexts: Tensor) -> GridInfoNCEOutput:
        """Loss and accuracy of predicting downwards.

        Args:
            encodings: z, [B, D, rows, cols].
            contexts: c, [B, E, rows, cols].

        Returns:
            Of the fields, loss is the weighted sum over steps; accuracy and mutual_information are means over steps
            with the same weights; step_losses and step_accuracies are [1, steps] without weights.

        Raises:
            ValueError: grids of fewer than three rows, or that do not fit each other.
        """
        if encodings.ndim != 4 or contexts.ndim != 4 or encodings.shape[2:] != contexts.shape[2:]:
            raise ValueError(
                f"encodings and contexts must be [B, channels, rows, cols] of one grid, got {tuple(encodings.shape)} "
                f"and {tuple(contexts.shape)}"
            )
        batch, _, rows, cols = encodings.shape
        if rows < 3:
            raise ValueError(f"a grid of {rows} rows is too small: predictions reach two rows down, it needs 3")
        # In (row, column, image) order a step's contexts are the first and its targets the last.
        keys = self.target_projection(encodings).permute(2, 3, 0, 1).flatten(0, 2)
        predictions = self.prediction_projection(contexts).permute(2, 3, 0, 1).flatten(0, 2)
        row_size = cols * batch
        steps = range(2, rows)
        sizes = [(rows - step) * row_size for step in steps]
        output = info_nce(
            torch.cat([predictions[:size] for size in sizes]),
            keys,
            torch.cat([torch.arange(step * row_size, rows * row_size, device=keys.device) for step in steps]),
            scale=self.scale,
            reduction="none",
        )
        step_losses, step_accuracies = (
            torch.stack([part.sum() / max(len(part), 1) for part in values.split(sizes)])
            for values in (output.loss, output.accuracy)
        )
        counts = torch.arange(1, rows - 1, dtype=step_losses.dtype, device=keys.device)
        loss = counts @ step_losses
        return GridInfoNCEOutput(
            loss,
            counts @ step_accuracies / counts.sum(),
            math.log(max(len(keys), 1)) - loss.detach() / counts.sum(),
            step_losses.detach().unsqueeze(0),
            step_accuracies.unsqueeze(0),
        )

    def extra_repr(self) -> str:
        return f"scale={self.scale}"
