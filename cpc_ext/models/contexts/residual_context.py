"""CPC v2's context network: encodings [B, D, rows, cols] to contexts [B, D, rows, cols].

Residual blocks collect, row by row, what lies at or above a position: a 1x3 convolution looks to both sides, a 2x1
convolution one row up. A context sees no row below its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext.nn.masked_conv2d import MaskedConv2d
from cpc_ext.nn.typed import Module, ModuleList

__all__ = ["ResidualContext"]

_PADDINGS = ("zeros", "lightning-bolts")


class ResidualContext(Module):
    """Context network of CPC v2 (Hénaff et al. 2019, arXiv 1905.09272, appendix A.2).

    A block is 1x1, ReLU, 1x3, one row on top, 2x1, ReLU, 1x1, added to its input; a ReLU follows the last. Each block
    sees one row further up and one column further to either side.

    Parameters start as those of :class:`torch.nn.Conv2d`.

    Args:
        channels: D.
        hidden_channels: channels inside a block.
        blocks: number of blocks.
        padding: padding of a block's convolutions: "zeros"; or "lightning-bolts", as in that program's PixelCNN: the
            1x3 convolution is not padded, so that it leaves out the first and last column; the row on top is ones; and
            the 2x1 convolution gets both columns back as zeros.

    Attributes:
        out_channels: D.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, channels: int, hidden_channels: int = 256, blocks: int = 5, *, padding: str = "zeros") -> None:
        super().__init__()
        for name, value in (("channels", channels), ("hidden_channels", hidden_channels), ("blocks", blocks)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if padding not in _PADDINGS:
            raise ValueError(f"padding must be one of {', '.join(_PADDINGS)}, got {padding!r}")
        self.out_channels = channels
        self.padding = padding
        self.blocks = ModuleList(_Block(channels, hidden_channels, padding) for _ in range(blocks))

    def forward(self, encodings: Tensor) -> Tensor:
        """Return contexts [B, D, rows, cols] of encodings [B, D, rows, cols].

        Raises:
            ValueError: encodings of another shape.
        """
        if encodings.ndim != 4 or encodings.shape[1] != self.out_channels:
            raise ValueError(
                f"encodings must be [B, {self.out_channels}, rows, cols], got shape {tuple(encodings.shape)}"
            )
        if self.padding == "lightning-bolts" and encodings.shape[3] < 3:
            raise ValueError(f'padding "lightning-bolts" needs at least 3 columns, got {encodings.shape[3]}')
        contexts = encodings
        for block in self.blocks:
            contexts = block(contexts)
        return torch.relu(contexts)


class _Block(Module):
    """One residual block, [B, D, rows, cols] to the same; arguments as of :class:`ResidualContext`."""

    def __init__(self, channels: int, hidden_channels: int, padding: str) -> None:
        super().__init__()
        self.reduce = MaskedConv2d(channels, hidden_channels, 1, mask="vertical", activation="relu")
        self.sideways = MaskedConv2d(hidden_channels, hidden_channels, (1, 3), mask="vertical")
        self.upwards = MaskedConv2d(
            hidden_channels,
            hidden_channels,
            (2, 1),
            mask=torch.ones(2, 1, dtype=torch.bool, device="cpu"),
            activation="relu",
        )
        self.expand = MaskedConv2d(hidden_channels, channels, 1, mask="vertical")
        self.padding = padding

    def forward(self, input: Tensor) -> Tensor:
        features = self.sideways(self.reduce(input))
        if self.padding == "zeros":
            features = F.pad(features, (0, 0, 1, 0))
        else:
            features = F.pad(F.pad(features[..., 1:-1], (0, 0, 1, 0), value=1.0), (1, 1))
        # With the extra row on top, row r of the result sees rows r - 1 and r. The last row saw padding and is dropped.
        features = self.upwards(features)[:, :, :-1]
        return self.expand(features, condition=input)
