"""A causal transformer layer with relative positions, for sequences [B, L, D]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.nn.typed import Module

__all__ = ["CausalTransformerLayer"]


class CausalTransformerLayer(Module):
    """CPC_audio's layer (Rivière et al. 2020, arXiv 2002.02848): attention to the past, then two linear maps.

    Heads attend to positions j ≤ i with ``softmax((q_i · k_j + q_i · R_{i - j}) / sqrt(D / heads))``. The sums with the
    input are normalised after attention and after the linear maps: ``y = LN(x + attention(x))``,
    ``LN(y + W_2 relu(W_1 y))``. Attention has no biases.

    Args:
        channels: number D of channels.
        positions: length of the longest sequence. None: no R, for sequences of any length.
        heads: number of heads, which share R.
        hidden: channels between the two linear maps.
        dropout: dropout rate of the attention weights and of the channels between the linear maps.

    Attributes:
        relative: R, [positions, D / heads], by distance 0, 1, ...; initially uniform in ±(D / heads)**-0.5.

    Raises:
        ValueError: channels that heads do not divide, or an argument out of range.
    """

    def __init__(
        self, channels: int, positions: int | None, *, heads: int = 8, hidden: int = 2048, dropout: float = 0.1
    ) -> None:
        super().__init__()
        if min(channels, heads, hidden) < 1 or channels % heads:
            raise ValueError(f"channels must be a multiple of heads, {heads}, got {channels}")
        if positions is not None and positions < 1:
            raise ValueError(f"positions must be at least 1, got {positions}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.heads = heads
        self.dropout = dropout
        self.query, self.key, self.value, self.output = (nn.Linear(channels, channels, bias=False) for _ in range(4))
        self.relative = None
        if positions is not None:
            size = channels // heads
            self.relative = nn.Parameter(nn.init.uniform_(torch.empty(positions, size), -(size**-0.5), size**-0.5))
        self.attention_norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, hidden)
        self.contract = nn.Linear(hidden, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer: [B, L, D] → [B, L, D].

        Raises:
            ValueError: a sequence longer than ``positions``.
        """
        attended = self.attention_norm(input + self.output(self._attention(input)))
        hidden = F.dropout(torch.relu(self.expand(attended)), self.dropout, self.training)
        output: Tensor = self.norm(attended + self.contract(hidden))
        return output

    def extra_repr(self) -> str:
        positions = None if self.relative is None else len(self.relative)
        return f"positions={positions}, heads={self.heads}, dropout={self.dropout}"

    def _attention(self, input: Tensor) -> Tensor:
        query, key, value = (
            torch.unflatten(projected(input), 2, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        if self.relative is None:
            attended = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        else:
            length = input.shape[1]
            future = torch.ones(length, length, dtype=torch.bool, device=input.device).triu(1)
            scores = (query @ key.transpose(2, 3) + self._by_distance(query)) * query.shape[3] ** -0.5
            weights = torch.softmax(scores.masked_fill(future, -torch.inf), dim=3)
            attended = F.dropout(weights, dropout, self.training) @ value
        return attended.transpose(1, 2).flatten(2)

    def _by_distance(self, query: Tensor) -> Tensor:
        """Return q_i · R_{i - j} of queries [B, heads, L, size], [B, heads, L, L]; undefined where j > i."""
        assert self.relative is not None
        length = query.shape[2]
        if length > len(self.relative):
            raise ValueError(
                f"a sequence of {length} is longer than the {len(self.relative)} positions whose distances are known"
            )
        # Column c holds distance L - 1 - c. With one column more in front, reading the numbers in rows of L instead of
        # L + 1 shifts each row by one position more than the row before.
        products = F.pad(query @ self.relative[:length].flip(0).t(), (1, 0))
        shifted = products.flatten(2).unflatten(2, (length + 1, length))
        by_distance: Tensor = shifted[:, :, 1:]
        return by_distance
