"""MoCo: an encoder learns to find an image's other view among the keys of earlier batches.

Keys come from a second encoder and head, whose weights slowly follow those that learn, so that keys of many batches are
comparable.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.models.out_channels import out_channels
from cpc_ext.models.projection_head import projection_head
from cpc_ext.nn.moco_loss import MoCoLoss, MoCoOutput

__all__ = ["MoCo"]


class MoCo(EncoderModel):
    """Momentum contrast with a head (He et al. 2020, arXiv 1911.05722; version 2, Chen et al. 2020, arXiv 2003.04297).

    After every update of the weights :meth:`follow` has to be called. The networks of keys start as copies, get no
    gradient, and have batch statistics of their own. Batches are not shuffled between processes: use a norm that looks
    at one image where the batch of a process is small.

    Args:
        encoder: patches [B, rows, cols, C, p, p] → [B, D, rows, cols], with an attribute ``out_channels`` = D.
        projection_channels: P, features that the loss compares.
        temperature: temperature of the loss.
        queue_size: number of keys that a query is contrasted with.
        momentum: share of the key networks' weights that stays when they follow.
        gather_negatives: "gather" lets keys of all processes into the queue; see :class:`cpc_ext.nn.MoCoLoss`.
        head: arguments of the projection head, see :class:`cpc_ext.models.SimCLR`.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        projection_channels: int = 128,
        temperature: float = 0.2,
        queue_size: int = 65536,
        momentum: float = 0.999,
        gather_negatives: str = "none",
        head: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {momentum}")
        self.encoder = encoder
        self.head = projection_head(out_channels(encoder), projection_channels, **(head or {}))
        self.key_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.momentum = momentum
        self.objective = MoCoLoss(projection_channels, queue_size, temperature, gather_negatives=gather_negatives)

    def forward(self, views: Tensor) -> MoCoOutput:
        """Return the loss of a batch. views: floating [2, B, C, H, W]; the first are queries, the second keys."""
        if views.ndim != 5 or len(views) != 2:
            raise ValueError(f"views must be [2, B, C, H, W], got {tuple(views.shape)}")
        queries = self.head(self.encode(views[0]))
        with torch.no_grad():
            keys = self.key_head(self.key_encoder(views[1][:, None, None]).mean((2, 3)))
        return self.objective.contrast(queries, keys)

    def encode(self, images: Tensor) -> Tensor:
        """Return features of whole images, floating [B, C, H, W] → [B, D]: averaged over space, before the head."""
        encodings: Tensor = self.encoder(images[:, None, None])
        return encodings.mean((2, 3))

    @torch.no_grad()
    def follow(self) -> None:
        """Move the weights of the key networks towards those that learn. Does not wait for the device."""
        for follower, leader in ((self.key_encoder, self.encoder), (self.key_head, self.head)):
            torch._foreach_lerp_(list(follower.parameters()), list(leader.parameters()), 1 - self.momentum)
