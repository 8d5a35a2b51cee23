"""The PixelCNN: images [B, C, H, W] to logits of all their values, [B, C, 256, H, W], and images drawn from them.

A stack of masked convolutions of which none sees a later pixel or colour. Every convolution is one call of the masked
kernel, with its ReLU and its residual sum fused.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cpc_ext.models.pixels.masked_features import Convolve, PixelActivation
from cpc_ext.models.pixels.pixel_model import SoftmaxPixelModel
from cpc_ext.models.pixels.pixel_sampler import IMAGE_LEVELS
from cpc_ext.nn.masked_conv2d import MaskedConv2d
from cpc_ext.nn.typed import Module, ModuleList

__all__ = ["PixelCNN"]


class PixelCNN(SoftmaxPixelModel):
    """PixelCNN as published (van den Oord et al. 2016, arXiv 1601.06759, section 3 and table 1).

    A 7x7 convolution with mask A to 2h channels; residual blocks of ReLU, 1x1 to h, ReLU, 3x3, ReLU, 1x1 to 2h, all
    with mask B; ReLU, 1x1, ReLU, 1x1 to the logits of a softmax over 256 values. With three colours all channels are
    divided into those of R, G and B, and G sees R, B sees both. The masks leave a blind spot, earlier pixels to the
    upper right that no depth reaches; :class:`GatedPixelCNN` has none.

    Args:
        in_channels: C, 3 for colour and 1 for grey.
        hidden_channels: h; a multiple of C. Published: 128.
        layers: number of residual blocks. Published: 15.
        head_channels: channels of the layer before the logits; a multiple of C. Default: 2h. Published for CIFAR-10:
            1024.
        levels, code_channels: see :class:`SoftmaxPixelModel`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        hidden_channels: int = 96,
        layers: int = 12,
        head_channels: int | None = None,
        levels: int = IMAGE_LEVELS,
        code_channels: int = 0,
    ) -> None:
        head_channels = 2 * hidden_channels if head_channels is None else head_channels
        sizes = {"hidden_channels": hidden_channels, "layers": layers, "head_channels": head_channels}
        super().__init__(in_channels, None, levels=levels, code_channels=code_channels, **sizes)
        for name, value in (("hidden_channels", hidden_channels), ("head_channels", head_channels)):
            if value % in_channels:
                raise ValueError(f"{name} must be a multiple of the {in_channels} colours, got {value}")
        colors, features = in_channels, 2 * hidden_channels
        self.first = MaskedConv2d(self.seen_channels, features, 7, mask="A", color_groups=colors)
        self.blocks = ModuleList(_ResidualBlock(features, colors) for _ in range(layers))
        self.relu = PixelActivation(features, "relu", colors)
        self.head = MaskedConv2d(features, head_channels, 1, mask="B", color_groups=colors, activation="relu")
        self.logits_layer = MaskedConv2d(head_channels, colors * levels, 1, mask="B", color_groups=colors)

    def network(self, convolve: Convolve, image: Any, labels: Tensor | None) -> Any:
        features = convolve(self.first, image)
        for block in self.blocks:
            features = block.run(convolve, features)
        return convolve(self.head, convolve(self.relu, features))


class _ResidualBlock(Module):
    """features [B, 2h, H, W] to the same (figure 5 of the paper)."""

    def __init__(self, features: int, colors: int) -> None:
        super().__init__()
        hidden = features // 2
        self.relu = PixelActivation(features, "relu", colors)
        self.reduce = MaskedConv2d(features, hidden, 1, "B", color_groups=colors, activation="relu")
        self.conv = MaskedConv2d(hidden, hidden, 3, "B", color_groups=colors, activation="relu")
        self.expand = MaskedConv2d(hidden, features, 1, "B", color_groups=colors)

    def run(self, convolve: Convolve, features: Any) -> Any:
        hidden = convolve(self.conv, convolve(self.reduce, convolve(self.relu, features)))
        return convolve(self.expand, hidden, features)
