"""Pre-activation ResNet encoders: each patch of an image to one feature vector.

They map patches [B, rows, cols, C, p, p], or images that are cut into patches first, to encodings [B, D, rows, cols],
by a stem and stacks of residual blocks with norm and ReLU in front of their convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cpc_ext.models.encoders.layers import NORMS, begin_block, check_norm, conv, reset_layers
from cpc_ext.models.encoders.stacked_encoder import EncoderBlock, StackedEncoder
from cpc_ext.nn.conv2d import Conv2d
from cpc_ext.nn.delta_orthogonal import delta_orthogonal_
from cpc_ext.nn.typed import Sequential

__all__ = ["ResNetV2Encoder", "published_shape"]


class _Preset(NamedTuple):
    blocks: tuple[int, ...]
    bottleneck: bool
    channels: tuple[int, ...] | None = None
    expansions: tuple[int, ...] | None = None


# The depth counts the stem, every convolution of the blocks and the linear classifier of the papers.
_PRESETS = {
    8: _Preset((1, 1, 1), bottleneck=False),
    14: _Preset((2, 2, 2), bottleneck=False),
    28: _Preset((3, 4, 6), bottleneck=False),
    41: _Preset((3, 4, 6), bottleneck=True),
    92: _Preset((3, 4, 23), bottleneck=True),
    143: _Preset((3, 8, 36), bottleneck=True),
    161: _Preset((3, 4, 46), bottleneck=True, channels=(64, 128, 512), expansions=(4, 4, 8)),
    18: _Preset((2, 2, 2, 2), bottleneck=False),
    34: _Preset((3, 4, 6, 3), bottleneck=False),
    50: _Preset((3, 4, 6, 3), bottleneck=True),
    101: _Preset((3, 4, 23, 3), bottleneck=True),
    152: _Preset((3, 8, 36, 3), bottleneck=True),
}
_CHANNELS = (64, 128, 256, 512)
_EXPANSION = 4

# Kernel and stride of the first convolution.
_STEMS = {"stl10": (5, 1), "cifar": (3, 1), "imagenet": (7, 2), "strided": (5, 2)}


class ResNetV2Encoder(StackedEncoder):
    """ResNet of pre-activation blocks over patches (He et al. 2016, arXiv 1603.05027).

    ============== ================ ================================ ======================
    depth          block            blocks per stack                 channels per stack
    ============== ================ ================================ ======================
    8, 14, 28      two 3x3          1,1,1 / 2,2,2 / 3,4,6            64, 128, 256
    41, 92, 143    bottleneck       3,4,6 / 3,4,23 / 3,8,36          64, 128, 256 (x4 out)
    161            bottleneck       3,4,46                           64, 128 (x4), 512 (x8)
    18, 34         two 3x3          2,2,2,2 / 3,4,6,3                64, 128, 256, 512
    50, 101, 152   bottleneck       3,4,6,3 / 3,4,23,3 / 3,8,36,3    64 … 512 (x4 out)
    ============== ================ ================================ ======================

    Depths with three stacks are ResNets without their last stack, as contrastive predictive coding uses them; 161 is
    that of CPC v2, ResNet-101 whose third stack is widened and lengthened (Hénaff et al. 2019, arXiv 1905.09272). Every
    stack but the first starts with stride 2. Nothing follows the last block but the mean over space.

    Convolutions start from He's normal initialisation by fan-out with zero biases. Without a norm the last convolution
    of every block is scaled by ``n ** -0.5`` on top, n the blocks of its stack: each stack then multiplies the variance
    by at most about e, where plain He initialisation would double it with every block.

    Args:
        depth: a depth from the table; give either this or ``blocks``.
        in_channels: channels C of a patch, 3 for colour and 1 for grey.
        blocks: blocks per stack, for an encoder of one's own.
        bottleneck: the block that ``blocks`` counts: 1x1, 3x3, 1x1 with more channels, or else two 3x3.
        channels: channels per stack, before a bottleneck's expansion. Default: the first of 64, 128, 256, 512.
        expansions: ratio of a bottleneck's output channels to ``channels``, per stack. Default: 4 each.
        norm: "none", "batch", "layer" (over channels and space of a patch) or "instance" (over space). Convolutions
            have biases only without a norm.
        stem: "stl10" (5x5), "cifar" (3x3), "imagenet" (7x7 of stride 2, norm, ReLU, 3x3 max-pool of stride 2) or
            "strided" (5x5 of stride 2, a quarter of the work of everything after it).
        stem_channels: channels of the first convolution.
        patch_size: side of the patches cut from images, in pixels; not needed where patches are given.
        stride: distance of those patches in pixels. Default: ``patch_size // 2``.

    Attributes:
        out_channels: D, the features per patch.

    Raises:
        ValueError: an argument that is none of those above.
    """

    stem_layers = ("conv1", "norm1", "pool")

    layers: Sequential[Sequential[_BasicBlock | _BottleneckBlock]]

    def __init__(
        self,
        depth: int | None = None,
        in_channels: int = 3,
        *,
        blocks: Sequence[int] | None = None,
        bottleneck: bool = False,
        channels: Sequence[int] | None = None,
        expansions: Sequence[int] | None = None,
        norm: str = "none",
        stem: str = "stl10",
        stem_channels: int = 64,
        patch_size: int | None = None,
        stride: int | None = None,
    ) -> None:
        super().__init__(in_channels, patch_size=patch_size, stride=stride)
        check_norm(norm)
        if stem not in _STEMS:
            raise ValueError(f"stem must be one of {', '.join(_STEMS)}, got {stem!r}")
        blocks, bottleneck, channels, expansions = _resolve_stacks(depth, blocks, bottleneck, channels, expansions)
        for name, values in (
            ("stem_channels", (stem_channels,)),
            ("blocks", blocks),
            ("channels", channels),
            ("expansions", expansions),
        ):
            if min(values) < 1:
                raise ValueError(f"{name} must be at least 1, got {min(values)}")

        kernel_size, stem_stride = _STEMS[stem]
        self.conv1 = conv(in_channels, stem_channels, kernel_size, stem_stride, norm)
        self.norm1: nn.Module = nn.Identity()
        self.pool: nn.Module = nn.Identity()
        if stem == "imagenet":
            self.norm1 = NORMS[norm](stem_channels)
            self.pool = Sequential(nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
        stacks: list[Sequential[_BasicBlock | _BottleneckBlock]] = []
        width = stem_channels
        for stack, (count, inside, expansion) in enumerate(zip(blocks, channels, expansions, strict=True)):
            stacks.append(Sequential())
            for position in range(count):
                stack_stride = 2 if stack > 0 and position == 0 else 1
                stacks[-1].append(
                    _BottleneckBlock(width, inside, expansion, stack_stride, norm)
                    if bottleneck
                    else _BasicBlock(width, inside, stack_stride, norm)
                )
                width = inside * expansion
        self.layers = Sequential(*stacks)
        self.out_channels = width
        self.reset_parameters()

    def reset_parameters(self, init: str = "he") -> None:
        """Draw all convolutions anew, as the class describes it.

        init: "he", or "delta-orthogonal" for :func:`cpc_ext.nn.delta_orthogonal_` in place of He's normal weights, with
        the same scaling of blocks without a norm; convolutions that follow a ReLU have the gain sqrt(2).

        Raises:
            ValueError: another init.
        """
        if init not in ("he", "delta-orthogonal"):
            raise ValueError(f"init must be he or delta-orthogonal, got {init!r}")
        reset_layers(self)
        if init == "delta-orthogonal":
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    delta_orthogonal_(module.weight, gain=1.0 if module is self.conv1 else 2**0.5)
        for stack in self.layers:
            for block in stack:
                if isinstance(block.norm1, nn.Identity):
                    with torch.no_grad():
                        block.last_conv.weight.mul_(len(stack) ** -0.5)

    def stem(self, patches: Tensor) -> Tensor:
        features: Tensor = self.pool(self.norm1(self.conv1(patches)))
        return features


def published_shape(depth: int) -> dict[str, Any]:
    """Return the arguments that a depth stands for: ``blocks``, ``bottleneck``, ``channels`` and ``expansions``."""
    blocks, bottleneck, channels, expansions = _resolve_stacks(depth, None, False, None, None)
    shape = {"blocks": list(blocks), "bottleneck": bottleneck, "channels": list(channels)}
    return shape | ({"expansions": list(expansions)} if bottleneck else {})


class _BasicBlock(EncoderBlock):
    """Two 3x3 convolutions, each behind norm, ReLU: [N, in, h, w] → [N, channels, h / stride, w / stride]."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.out_channels = channels
        self.norm1 = NORMS[norm](in_channels)
        self.conv1 = conv(in_channels, channels, 3, stride, norm)
        self.norm2 = NORMS[norm](channels)
        self.conv2 = conv(channels, channels, 3, 1, norm)
        self.shortcut = _shortcut(in_channels, channels, stride, norm)

    @property
    def last_conv(self) -> Conv2d:
        return self.conv2

    def forward(self, input: Tensor) -> Tensor:
        features, residual = begin_block(input, self.norm1(input), self.conv1, self.shortcut)
        return self.conv2(self.norm2(features), relu_input=True, residual=residual)


class _BottleneckBlock(EncoderBlock):
    """1x1, 3x3, 1x1 convolutions, each behind norm, ReLU.

    [N, in, h, w] → [N, expansion * channels, h / stride, w / stride].
    """

    def __init__(self, in_channels: int, channels: int, expansion: int, stride: int, norm: str) -> None:
        super().__init__()
        self.out_channels = channels * expansion
        self.norm1 = NORMS[norm](in_channels)
        self.conv1 = conv(in_channels, channels, 1, 1, norm)
        self.norm2 = NORMS[norm](channels)
        self.conv2 = conv(channels, channels, 3, stride, norm)
        self.norm3 = NORMS[norm](channels)
        self.conv3 = conv(channels, channels * expansion, 1, 1, norm)
        self.shortcut = _shortcut(in_channels, channels * expansion, stride, norm)

    @property
    def last_conv(self) -> Conv2d:
        return self.conv3

    def forward(self, input: Tensor) -> Tensor:
        features, residual = begin_block(input, self.norm1(input), self.conv1, self.shortcut)
        features = self.conv2(self.norm2(features), relu_input=True)
        return self.conv3(self.norm3(features), relu_input=True, residual=residual)


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: str) -> Conv2d | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return conv(in_channels, out_channels, 1, stride, norm)


def _resolve_stacks(
    depth: int | None,
    blocks: Sequence[int] | None,
    bottleneck: bool,
    channels: Sequence[int] | None,
    expansions: Sequence[int] | None,
) -> tuple[tuple[int, ...], bool, tuple[int, ...], tuple[int, ...]]:
    """Return the constructor's arguments, completed by those of the depth and by defaults."""
    if (depth is None) == (blocks is None):
        raise ValueError(f"give either depth or blocks, got depth={depth} and blocks={blocks}")
    preset = _Preset(tuple(blocks or ()), bottleneck)
    if depth is not None:
        if depth not in _PRESETS:
            raise ValueError(f"depth must be one of {', '.join(map(str, _PRESETS))}, got {depth!r}")
        if bottleneck:
            raise ValueError(f"bottleneck goes with blocks; depth={depth} implies its own")
        preset = _PRESETS[depth]
    blocks, bottleneck, *_ = preset
    if len(blocks) == 0:
        raise ValueError("blocks must hold at least one stack, got none")
    if expansions is not None and not bottleneck:
        raise ValueError("expansions are of bottlenecks: a block of two 3x3 convolutions has none")
    channels = preset.channels if channels is None else tuple(channels)
    expansions = preset.expansions if expansions is None else tuple(expansions)
    if channels is None:
        if len(blocks) > len(_CHANNELS):
            raise ValueError(f"channels must be given for more than {len(_CHANNELS)} stacks, got {len(blocks)} stacks")
        channels = _CHANNELS[: len(blocks)]
    if expansions is None:
        expansions = (_EXPANSION if bottleneck else 1,) * len(blocks)
    for name, values in (("channels", channels), ("expansions", expansions)):
        if len(values) != len(blocks):
            raise ValueError(f"{name} must hold one number for each of {len(blocks)} stacks, got {values}")
    return blocks, bottleneck, channels, expansions
