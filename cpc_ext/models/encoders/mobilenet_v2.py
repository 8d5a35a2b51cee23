"""MobileNetV2 encoders: each patch of an image to one feature vector, at little computation.

They map patches [B, rows, cols, C, p, p], or images that are cut into patches first, to encodings [B, D, rows, cols]. A
block widens its input, filters every channel on its own, and narrows the result without a ReLU, so that the features
between blocks have few channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.models.encoders.layers import NORMS, check_norm, conv, reset_layers
from cpc_ext.models.encoders.stacked_encoder import EncoderBlock, StackedEncoder
from cpc_ext.nn.typed import Sequential

__all__ = ["MobileNetV2Encoder"]

_STEM_CHANNELS = 32
_LAST_CHANNELS = 1280
# Numbers of channels are multiples of this, for kernels that compute that many at a time.
_DIVISOR = 8


class _Stack(NamedTuple):
    expansion: int
    channels: int
    blocks: int
    stride: int


# Table 2 of the paper.
_STACKS = (
    _Stack(1, 16, 1, 1),
    _Stack(6, 24, 2, 2),
    _Stack(6, 32, 3, 2),
    _Stack(6, 64, 4, 2),
    _Stack(6, 96, 3, 1),
    _Stack(6, 160, 3, 2),
    _Stack(6, 320, 1, 1),
)
# Stacks that keep the map's size instead of halving it; -1 is the stem.
_UNSTRIDED = {"imagenet": (), "cifar": (-1, 1)}


class MobileNetV2Encoder(StackedEncoder):
    """MobileNetV2 without its classifier over patches (Sandler et al. 2018, arXiv 1801.04381).

    A 3x3 convolution to 32 channels; 17 inverted residuals of 1x1 (wider), 3x3 (each channel on its own) and 1x1
    (narrower) convolutions with norm after each and ReLU6 after the first two; a 1x1 convolution to 1280 channels. An
    inverted residual adds its input where that has its shape.

    Convolutions start from He's normal initialisation by fan-out with zero biases. Without a norm the last convolution
    of blocks that add their input is scaled by ``n ** -0.5`` on top, n the blocks of its stack.

    Args:
        in_channels: channels C of a patch, 3 for colour and 1 for grey.
        width: factor of all channels. Products are rounded to a multiple of 8, but never down by more than a tenth;
            the last convolution keeps at least 1280.
        norm: "none", "batch" as published, "layer" (over channels and space of a patch) or "instance" (over space).
            Convolutions have biases only without a norm.
        strides: "imagenet", as published: the last map has a 32nd of the patch's side; "cifar", for small patches:
            the stem and the second stack keep the size, so that it has an 8th.
        patch_size: side of the patches cut from images, in pixels; not needed where patches are given.
        stride: distance of those patches in pixels. Default: ``patch_size // 2``.

    Attributes:
        out_channels: D = 1280, more for ``width`` above 1.
        strides: as given.

    Raises:
        ValueError: an argument that is none of those above.
    """

    stem_layers = ("conv1", "norm1")
    head_layers = ("conv2", "norm2")

    layers: Sequential[Sequential[_InvertedResidual]]

    def __init__(
        self,
        in_channels: int = 3,
        *,
        width: float = 1.0,
        norm: str = "batch",
        strides: str = "imagenet",
        patch_size: int | None = None,
        stride: int | None = None,
    ) -> None:
        super().__init__(in_channels, patch_size=patch_size, stride=stride)
        check_norm(norm)
        if not width > 0:
            raise ValueError(f"width must be positive, got {width}")
        if strides not in _UNSTRIDED:
            raise ValueError(f"strides must be one of {', '.join(_UNSTRIDED)}, got {strides!r}")
        self.strides = strides
        unstrided = _UNSTRIDED[strides]
        before = _rounded(_STEM_CHANNELS * width)
        self.conv1 = conv(in_channels, before, 3, 1 if -1 in unstrided else 2, norm)
        self.norm1 = NORMS[norm](before)
        stacks: list[Sequential[_InvertedResidual]] = []
        for index, stack in enumerate(_STACKS):
            stacks.append(Sequential())
            after = _rounded(stack.channels * width)
            for position in range(stack.blocks):
                block_stride = 1 if index in unstrided or position > 0 else stack.stride
                stacks[-1].append(_InvertedResidual(before, after, stack.expansion, block_stride, norm))
                before = after
        self.layers = Sequential(*stacks)
        self.out_channels = _rounded(_LAST_CHANNELS * max(1.0, width))
        self.conv2 = conv(before, self.out_channels, 1, 1, norm)
        self.norm2 = NORMS[norm](self.out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all convolutions anew, as the class describes it."""
        reset_layers(self)
        for stack in self.layers:
            for block in stack:
                if block.adds_input and isinstance(block.norm3, nn.Identity):
                    with torch.no_grad():
                        block.conv3.weight.mul_(len(stack) ** -0.5)

    def stem(self, patches: Tensor) -> Tensor:
        return F.relu6(self.norm1(self.conv1(patches)))

    def head(self, features: Tensor) -> Tensor:
        return F.relu6(self.norm2(self.conv2(features)))


class _InvertedResidual(EncoderBlock):
    """1x1, 3x3 by channel and 1x1 convolutions: [N, in, h, w] → [N, out, h / stride, w / stride].

    expansion: ratio of the 3x3 convolution's channels to those of the input; with 1 there is no first 1x1 convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, expansion: int, stride: int, norm: str) -> None:
        super().__init__()
        self.out_channels = out_channels
        inside = in_channels * expansion
        self.widens = expansion > 1
        self.adds_input = stride == 1 and in_channels == out_channels
        if self.widens:
            self.conv1 = conv(in_channels, inside, 1, 1, norm)
            self.norm1 = NORMS[norm](inside)
        self.conv2 = conv(inside, inside, 3, stride, norm, groups=inside)
        self.norm2 = NORMS[norm](inside)
        self.conv3 = conv(inside, out_channels, 1, 1, norm)
        self.norm3 = NORMS[norm](out_channels)

    def forward(self, input: Tensor) -> Tensor:
        features: Tensor = F.relu6(self.norm1(self.conv1(input))) if self.widens else input
        features = self.norm3(self.conv3(F.relu6(self.norm2(self.conv2(features)))))
        return input + features if self.adds_input else features


def _rounded(channels: float) -> int:
    """Round to the nearest multiple of the divisor, or up if rounding down would remove more than a tenth."""
    nearest = max(_DIVISOR, int(channels + _DIVISOR / 2) // _DIVISOR * _DIVISOR)
    return nearest + _DIVISOR if nearest < 0.9 * channels else nearest
