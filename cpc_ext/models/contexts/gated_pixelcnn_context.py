"""The gated PixelCNN as a context network: encodings [B, D, rows, cols] to contexts [B, D, rows, cols].

A context sees the encodings of its own row and all rows above, none below: the vertical stack collects what lies above
and its own row, the horizontal stack adds its own row again and makes the output.
"""

from __future__ import annotations

from torch import Tensor

from cpc_ext.nn.masked_conv2d import MaskedConv2d
from cpc_ext.nn.typed import Module, ModuleList
from cpc_ext.ops.masked_conv2d import gated_activation

__all__ = ["GatedPixelCNNContext"]


class GatedPixelCNNContext(Module):
    """Context network of Greedy InfoMax and CPCV2-PyTorch.

    Layers of the gated PixelCNN (van den Oord et al. 2016, arXiv 1606.05328, figure 2) as Löwe et al. 2019 (arXiv
    1905.11786) use them: the masks hide the rows below and nothing else, since contrastive predictive coding predicts
    whole rows below. The first layer has no residuals. The vertical stack ends in the last layer's convolution: the
    residual that both programs keep there (``residual_vertical``) feeds nothing, so it is left out.

    Parameters start as those of :class:`torch.nn.Conv2d`.

    Args:
        channels: D.
        layers: number of gated layers.

    Attributes:
        out_channels: D.
    """

    def __init__(self, channels: int, layers: int = 4) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.out_channels = channels
        self.layers = ModuleList(
            _GatedLayer(channels, first=index == 0, last=index == layers - 1) for index in range(layers)
        )
        self.stack_out = MaskedConv2d(channels, channels, 1, mask="vertical")

    def forward(self, encodings: Tensor) -> Tensor:
        """Return contexts [B, D, rows, cols] of encodings [B, D, rows, cols].

        Raises:
            ValueError: encodings of another shape.
        """
        if encodings.ndim != 4 or encodings.shape[1] != self.out_channels:
            raise ValueError(
                f"encodings must be [B, {self.out_channels}, rows, cols], got shape {tuple(encodings.shape)}"
            )
        vertical = horizontal = encodings
        for layer in self.layers:
            vertical, horizontal = layer(vertical, horizontal)
        return self.stack_out(horizontal)


class _GatedLayer(Module):
    """One layer of the vertical and the horizontal stack, both [B, D, rows, cols]."""

    def __init__(self, channels: int, *, first: bool, last: bool) -> None:
        super().__init__()
        self.vertical_conv = MaskedConv2d(channels, 2 * channels, 3, mask="vertical")
        self.horizontal_conv = MaskedConv2d(channels, 2 * channels, (1, 3), mask="vertical", activation="gated")
        self.v_to_h_conv = MaskedConv2d(2 * channels, 2 * channels, 1, mask="vertical")
        self.horizontal_output = MaskedConv2d(channels, channels, 1, mask="vertical")
        self.residual_vertical = None
        if not (first or last):
            self.residual_vertical = MaskedConv2d(channels, 2 * channels, 1, mask="vertical", activation="gated")
        self.first = first
        self.last = last

    def forward(self, vertical: Tensor, horizontal: Tensor) -> tuple[Tensor, Tensor]:
        vertical_features = self.vertical_conv(vertical)
        gated = self.horizontal_conv(horizontal, condition=self.v_to_h_conv(vertical_features))
        output = self.horizontal_output(gated, condition=None if self.first else horizontal)
        if self.last:
            return vertical_features, output
        if self.residual_vertical is None:
            return gated_activation(vertical_features), output
        return self.residual_vertical(vertical, condition=vertical_features), output
