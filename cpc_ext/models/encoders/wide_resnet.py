"""Wide ResNet encoders: each patch of an image to one feature vector.

They map patches [B, rows, cols, C, p, p], or images that are cut into patches first, to encodings [B, D, rows, cols],
by a few layers with many channels, which use a processor better than many narrow ones.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cpc_ext.models.encoders.layers import NORMS, check_norm, conv, reset_layers
from cpc_ext.models.encoders.stacked_encoder import EncoderBlock, StackedEncoder
from cpc_ext.nn.typed import Sequential

__all__ = ["WideResNetEncoder"]

_CHANNELS = (16, 32, 64)


class WideResNetEncoder(StackedEncoder):
    """Wide residual network over patches (Zagoruyko and Komodakis 2016, arXiv 1605.07146).

    A 3x3 convolution to 16 channels, three stacks of (depth - 4) / 6 pre-activation blocks of two 3x3 convolutions with
    16, 32 and 64 times ``width`` channels, norm and ReLU. The second and third stack start with stride 2, in the second
    convolution of their first block. A shortcut that changes shape is a 1x1 convolution of the raw input. The published
    networks have batch norm; the depth counts their convolutions, shortcuts among them.

    Convolutions start from He's normal initialisation by fan-out with zero biases. Without a norm the last convolution
    of every block is scaled by ``n ** -0.5`` on top, n the blocks of its stack, as in :class:`ResNetV2Encoder`.

    Args:
        depth: 4 plus a positive multiple of 6, as in WRN-28-2.
        width: factor of the channels.
        in_channels: channels C of a patch, 3 for colour and 1 for grey.
        norm: "none", "batch", "layer" (over channels and space of a patch) or "instance" (over space). Convolutions
            have biases only without a norm.
        patch_size: side of the patches cut from images, in pixels; not needed where patches are given.
        stride: distance of those patches in pixels. Default: ``patch_size // 2``.

    Attributes:
        out_channels: D = 64 ``width``.

    Raises:
        ValueError: an argument that is none of those above.
    """

    head_layers = ("norm1",)

    layers: Sequential[Sequential[_Block]]

    def __init__(
        self,
        depth: int,
        width: int,
        in_channels: int = 3,
        *,
        norm: str = "layer",
        patch_size: int | None = None,
        stride: int | None = None,
    ) -> None:
        super().__init__(in_channels, patch_size=patch_size, stride=stride)
        check_norm(norm)
        if depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 4 plus a positive multiple of 6, such as 28, got {depth}")
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.conv1 = conv(in_channels, _CHANNELS[0], 3, 1, norm)
        stacks: list[Sequential[_Block]] = []
        before = _CHANNELS[0]
        for stack, base in enumerate(_CHANNELS):
            stacks.append(Sequential())
            for position in range((depth - 4) // 6):
                stacks[-1].append(_Block(before, base * width, 2 if stack > 0 and position == 0 else 1, norm))
                before = base * width
        self.layers = Sequential(*stacks)
        self.norm1 = NORMS[norm](before)
        self.out_channels = before
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all convolutions anew, as the class describes it."""
        reset_layers(self)
        for stack in self.layers:
            for block in stack:
                if isinstance(block.norm1, nn.Identity):
                    with torch.no_grad():
                        block.conv2.weight.mul_(len(stack) ** -0.5)

    def stem(self, patches: Tensor) -> Tensor:
        features: Tensor = self.conv1(patches)
        return features

    def head(self, features: Tensor) -> Tensor:
        return torch.relu(self.norm1(features))


class _Block(EncoderBlock):
    """Two 3x3 convolutions, each behind norm, ReLU: [N, in, h, w] → [N, channels, h / stride, w / stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.out_channels = channels
        self.norm1 = NORMS[norm](in_channels)
        self.conv1 = conv(in_channels, channels, 3, 1, norm)
        self.norm2 = NORMS[norm](channels)
        self.conv2 = conv(channels, channels, 3, stride, norm)
        self.shortcut = None
        if stride > 1 or in_channels != channels:
            self.shortcut = conv(in_channels, channels, 1, stride, norm)

    def forward(self, input: Tensor) -> Tensor:
        normed = self.norm1(input)
        features, passed = self.conv1.passing(normed, relu_input=True)
        residual = passed if normed is input else input
        if self.shortcut is not None:
            residual = self.shortcut(residual)
        return self.conv2(self.norm2(features), relu_input=True, residual=residual)
