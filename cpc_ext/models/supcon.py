"""Supervised contrast: an encoder learns to map views of all images of a class to like features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.models.out_channels import out_channels
from cpc_ext.models.projection_head import projection_head
from cpc_ext.nn.across_ranks import exchange_with
from cpc_ext.nn.sup_con_loss import SupConLoss
from cpc_ext.nn.unit_length import unit_length
from cpc_ext.ops._library import without_autocast

__all__ = ["SupCon", "SupConOutput"]

# Number of views that are compared with all others at a time, for the accuracy.
_ROWS = 1024


class SupConOutput(NamedTuple):
    """The output of :class:`SupCon`: scalars, the accuracy without gradient.

    Attributes:
        loss: mean over views, in nats.
        accuracy: fraction of views whose most similar other view is of the same class.
    """

    loss: Tensor
    accuracy: Tensor


class SupCon(EncoderModel):
    """Supervised contrastive learning (Khosla et al. 2020, arXiv 2004.11362) on an encoder of whole images.

    Args:
        encoder: patches [B, rows, cols, C, p, p] → [B, D, rows, cols], with an attribute ``out_channels`` = D.
        projection_channels: P, features that the loss compares.
        temperature: temperature of the loss.
        gather_negatives: if several processes share a batch, "gather" contrasts the views of all, "none" each process's
            own.
        head: arguments of the projection head, see :class:`cpc_ext.models.SimCLR`.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        projection_channels: int = 128,
        temperature: float = 0.1,
        gather_negatives: str = "none",
        head: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if gather_negatives not in ("none", "gather"):
            raise ValueError(f"gather_negatives must be one of none, gather, got {gather_negatives!r}")
        self.gather_negatives = gather_negatives
        self.encoder = encoder
        self.head = projection_head(out_channels(encoder), projection_channels, **(head or {}))
        self.objective = SupConLoss(temperature, base_temperature=temperature)

    def forward(self, views: Tensor, labels: Tensor) -> SupConOutput:
        """Return the loss of a batch. views: floating [2, B, C, H, W], the two views of every image; labels: [B]."""
        if views.ndim != 5 or len(views) != 2:
            raise ValueError(f"views must be [2, B, C, H, W], got {tuple(views.shape)}")
        # All views in one batch, so that batch norm sees them alike.
        projections = self.head(self.encode(views.flatten(0, 1)))
        features = unit_length(projections.to(torch.promote_types(projections.dtype, torch.float32)))
        exchange = exchange_with(self.gather_negatives)
        # Every process computes the loss of all views; gradients of a process's own views are summed over processes.
        pairs = exchange.gathered(torch.stack(features.chunk(2), 1))
        labels = exchange.gathered(labels)
        return SupConOutput(self.objective(pairs, labels), _accuracy(pairs.detach(), labels))

    def encode(self, images: Tensor) -> Tensor:
        """Return features of whole images, floating [B, C, H, W] → [B, D]: averaged over space, before the head."""
        encodings: Tensor = self.encoder(images[:, None, None])
        return encodings.mean((2, 3))


def _accuracy(pairs: Tensor, labels: Tensor) -> Tensor:
    """Return how often the nearest other view is of the same class, for features [B, 2, P] of length 1."""
    features, classes = pairs.flatten(0, 1), labels.repeat_interleave(2)
    found = []
    with without_autocast(features.device):  # Autocast would round similarities, so that many were equal.
        for rows in torch.arange(features.shape[0], device=features.device).split(_ROWS):
            similarity = features[rows] @ features.t()
            similarity.scatter_(1, rows[:, None], -torch.inf)
            found.append(classes[similarity.argmax(1)] == classes[rows])
    return torch.cat(found).float().mean()
