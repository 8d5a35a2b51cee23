"""CPC_audio's transformer as a context network for sequences: encodings [B, D, L] to contexts [B, D, L]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cpc_ext.nn.causal_attention import CausalTransformerLayer
from cpc_ext.nn.typed import Module, ModuleList

__all__ = ["CausalTransformerContext", "absolute_positions"]


class CausalTransformerContext(Module):
    """Transformer of Rivière et al. 2020, arXiv 2002.02848: see :class:`cpc_ext.nn.CausalTransformerLayer`.

    Args:
        channels: D, a multiple of ``heads``.
        window: frames of the longest sequence. Relative positions have parameters for every distance within it: a
            shorter sequence uses the first of them, and a longer one is an error, as nothing was learnt for its
            distances. With ``absolute`` sequences may have any length, whatever this is.
        layers: number of layers.
        heads, hidden, dropout: arguments of each layer.
        absolute: whether to add sines and cosines of the positions to the encodings, instead of taking positions
            relative to each other.
        reverse: whether to run backwards in time, so that a context summarises what comes after.

    Attributes:
        out_channels: D.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        channels: int,
        window: int = 128,
        *,
        layers: int = 1,
        heads: int = 8,
        hidden: int = 2048,
        dropout: float = 0.1,
        absolute: bool = False,
        reverse: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("window", window), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.out_channels = channels
        self.window = window
        self.absolute = absolute
        self.reverse = reverse
        positions = None if absolute else window
        self.layers = ModuleList(
            CausalTransformerLayer(channels, positions, heads=heads, hidden=hidden, dropout=dropout)
            for _ in range(layers)
        )

    def forward(self, encodings: Tensor, *, layer: int | None = None) -> Tensor:
        """Return the contexts of sequences.

        Args:
            encodings: [B, D, L].
            layer: number of the layer whose output is returned, from 1. Default: the last.

        Returns:
            Contexts [B, D, L], with D last in memory.

        Raises:
            ValueError: encodings of another shape, no such layer, or sequences longer than ``window``.
        """
        if encodings.ndim != 3 or encodings.shape[1] != self.out_channels:
            raise ValueError(f"encodings must be [B, {self.out_channels}, L], got shape {tuple(encodings.shape)}")
        if layer is not None and not 1 <= layer <= len(self.layers):
            raise ValueError(f"layer must be 1 to {len(self.layers)}, got {layer}")
        sequence = (encodings.flip(2) if self.reverse else encodings).transpose(1, 2)
        if self.absolute:
            positions = absolute_positions(sequence.shape[1], self.out_channels, sequence.device)
            sequence = sequence + positions.to(sequence.dtype)
        for network in self.layers[:layer]:
            sequence = network(sequence)
        contexts = sequence.transpose(1, 2)
        return contexts.flip(2) if self.reverse else contexts


def absolute_positions(length: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Return sines (even channels) and cosines of positions, wavelengths 2π to 20000π, float64 [length, channels]."""
    channel = torch.arange(channels, dtype=torch.float64, device=device)
    rate = torch.exp((channel - channel % 2) * (-math.log(10000.0) / channels))
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * rate
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())
