"""The gated PixelCNN: uint8 images [B, C, H, W] to logits of all their values, and images drawn from them.

A vertical stack sees all rows above a pixel, a horizontal stack the pixels to its left; together they see every earlier
pixel within reach. Every convolution is one call of the masked kernel, with its gate and its sums fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cpc_ext.models.pixels.masked_features import Convolve, PixelActivation
from cpc_ext.models.pixels.pixel_model import SoftmaxPixelModel
from cpc_ext.models.pixels.pixel_sampler import IMAGE_LEVELS
from cpc_ext.nn.masked_conv2d import MaskedConv2d
from cpc_ext.nn.typed import Module, ModuleList

__all__ = ["GatedPixelCNN"]


class GatedPixelCNN(SoftmaxPixelModel):
    """Gated PixelCNN (van den Oord et al. 2016, arXiv 1606.05328, sections 2.1 to 2.3 and figure 2).

    A layer has a vertical k x k and a horizontal 1 x k convolution to 2p channels each, and a 1x1 convolution that
    adds the vertical features to the horizontal ones before either's gate: tanh of one half of the channels times
    sigmoid of the other. Only the horizontal stack has residuals. The first vertical convolution sees the rows strictly
    above, so that its features need not be shifted down for the horizontal stack. With classes, each gate adds a
    learned bias of the image's class (equation 4), zero at the start.

    With three colours the horizontal stack's channels are divided into those of R, G and B, and G sees R, B sees both;
    the vertical stack sees earlier rows, where all colours may be seen.

    Args:
        in_channels: C, 3 for colour and 1 for grey.
        channels: p, channels of each stack; a multiple of C.
        layers: number of layers.
        kernel_size: k of all layers but the first, whose k is 7; odd, at least 3.
        num_classes: number of classes to condition the model on. Default: none.
        head_channels: channels of the layer before the logits; a multiple of C. Default: 2p.
        levels, code_channels: see :class:`SoftmaxPixelModel`.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        channels: int = 96,
        layers: int = 12,
        kernel_size: int = 3,
        num_classes: int | None = None,
        head_channels: int | None = None,
        levels: int = IMAGE_LEVELS,
        code_channels: int = 0,
    ) -> None:
        head_channels = 2 * channels if head_channels is None else head_channels
        sizes = {"channels": channels, "layers": layers, "head_channels": head_channels}
        super().__init__(in_channels, num_classes, levels=levels, code_channels=code_channels, **sizes)
        for name, value in (("channels", channels), ("head_channels", head_channels)):
            if value % in_channels:
                raise ValueError(f"{name} must be a multiple of the {in_channels} colours, got {value}")
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd and at least 3, got {kernel_size}")
        self.layers = ModuleList(
            _GatedLayer(
                channels if index else self.seen_channels,
                channels,
                kernel_size if index else 7,
                in_channels,
                num_classes,
                first=index == 0,
                last=index == layers - 1,
            )
            for index in range(layers)
        )
        self.relu = PixelActivation(channels, "relu", in_channels)
        self.head = MaskedConv2d(channels, head_channels, 1, mask="B", color_groups=in_channels, activation="relu")
        self.logits_layer = MaskedConv2d(head_channels, in_channels * levels, 1, mask="B", color_groups=in_channels)

    def network(self, convolve: Convolve, image: Any, labels: Tensor | None) -> Any:
        vertical = horizontal = image
        for layer in self.layers:
            vertical, horizontal = layer.run(convolve, vertical, horizontal, labels)
        return convolve(self.head, convolve(self.relu, horizontal))


class _GatedLayer(Module):
    """One layer of both stacks: [B, in_channels, H, W] each to [B, channels, H, W].

    first: whether the layer must not see the pixel itself. last: whether its vertical features are not used any more.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel_size: int,
        colors: int,
        num_classes: int | None,
        *,
        first: bool,
        last: bool,
    ) -> None:
        super().__init__()
        rows = torch.arange(kernel_size, device="cpu")
        above = (rows < kernel_size // 2).unsqueeze(1).expand(kernel_size, kernel_size)
        self.vertical = MaskedConv2d(in_channels, 2 * channels, kernel_size, mask=above if first else "vertical")
        self.vertical_gate = None if last else PixelActivation(2 * channels, "gated")
        self.vertical_to_horizontal = MaskedConv2d(2 * channels, 2 * channels, 1, mask="vertical")
        self.horizontal = MaskedConv2d(
            in_channels,
            2 * channels,
            (1, kernel_size),
            mask="A" if first else "B",
            color_groups=colors,
            activation="gated",
        )
        self.horizontal_output = MaskedConv2d(channels, channels, 1, mask="B", color_groups=colors)
        self.first = first
        self.class_biases: ModuleList[nn.Embedding] | None = None
        if num_classes is not None:
            self.class_biases = ModuleList(nn.Embedding(num_classes, 2 * channels) for _ in range(2))
            for embedding in self.class_biases:
                nn.init.zeros_(embedding.weight)

    def run(self, convolve: Convolve, vertical: Any, horizontal: Any, labels: Tensor | None) -> tuple[Any, Any]:
        biases = [None, None]
        if self.class_biases is not None:
            biases = [embedding(labels)[..., None, None] for embedding in self.class_biases]
        features = convolve(self.vertical, vertical, biases[0], rows_above=True)
        handed_over = convolve(self.vertical_to_horizontal, features, biases[1], rows_above=True)
        gated = convolve(self.horizontal, horizontal, handed_over)
        output = convolve(self.horizontal_output, gated, None if self.first else horizontal)
        if self.vertical_gate is None:
            return None, output
        return convolve(self.vertical_gate, features, rows_above=True), output
