"""SimCLR: an encoder learns to map two random views of an image to like features.

The loss is NT-Xent of the projections of two views of each image. The projection head absorbs what the loss discards,
so that the encoder's own features, which are used after training, keep more of the image.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.models.out_channels import out_channels
from cpc_ext.models.projection_head import projection_head
from cpc_ext.nn.nt_xent_loss import NTXentLoss, NTXentOutput

__all__ = ["SimCLR"]


class SimCLR(EncoderModel):
    """SimCLR (Chen et al. 2020, arXiv 2002.05709) on an encoder of patches, whose one patch is the image.

    The default head is ``linear(4 P) → ReLU → linear(P)``, as in the University of Amsterdam's tutorial 17.

    Args:
        encoder: patches [B, rows, cols, C, p, p] → [B, D, rows, cols], with an attribute ``out_channels`` = D.
        projection_channels: P, features that the loss compares.
        temperature: temperature of the loss.
        head: arguments of the projection head, ``layers``, ``hidden`` and ``norm``; see :func:`projection_head`.
        gather_negatives: which processes' images are negatives if several processes train; see
            :class:`cpc_ext.nn.NTXentLoss`.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        projection_channels: int = 128,
        temperature: float = 0.07,
        gather_negatives: str = "none",
        head: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = projection_head(out_channels(encoder), projection_channels, **(head or {}))
        self.objective = NTXentLoss(temperature, gather_negatives=gather_negatives)

    def forward(self, views: Tensor) -> NTXentOutput:
        """Return the loss of a batch. views: floating [2, B, C, H, W], the two views of every image."""
        if views.ndim != 5 or len(views) != 2:
            raise ValueError(f"views must be [2, B, C, H, W], got {tuple(views.shape)}")
        # All views in one batch, so that batch norm sees them alike.
        projections = self.head(self.encode(views.flatten(0, 1)))
        return self.objective.contrast(*projections.chunk(2))

    def encode(self, images: Tensor) -> Tensor:
        """Return features of whole images, floating [B, C, H, W] → [B, D]: averaged over space, before the head."""
        encodings: Tensor = self.encoder(images[:, None, None])
        return encodings.mean((2, 3))
