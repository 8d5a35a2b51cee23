"""Normalisation over the channels of a sequence, separately at each position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.nn.typed import Module

__all__ = ["ChannelNorm"]


class ChannelNorm(Module):
    """Normalise a sequence over its channels: the encoders' norm of Rivière et al. 2020, arXiv 2002.02848.

    Unlike in :class:`torch.nn.LayerNorm`, the variance is the unbiased one, divided by C - 1.

    Args:
        channels: C, at least 2.
        eps: added to the variance.

    Attributes:
        weight, bias: [C], initially 1 and 0.

    Raises:
        ValueError: fewer than 2 channels.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"channels must be at least 2, as one alone has no variance, got {channels}")
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C, L] → [B, C, L], with C innermost in memory."""
        # PyTorch's kernel divides the variance by C: var / (C - 1) + eps is (var / C + eps * share) / share.
        share = (self.channels - 1) / self.channels
        sequence = F.layer_norm(
            input.transpose(1, 2), (self.channels,), self.weight * share**0.5, self.bias, self.eps * share
        )
        return sequence.transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"
