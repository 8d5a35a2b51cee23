"""Pre-activation ResNet encoders: each patch of an image to one feature vector.

From patches [B, rows, cols, C, p, p], or images that are cut into patches first, to encodings [B, D, rows, cols]. All
patches of a batch run through the network as one batch, and each one's last feature map is averaged over space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cpc_ext.nn.patchify import Patchify

__all__ = ["ResNetV2Encoder"]


class _Preset(NamedTuple):
    blocks: tuple[int, ...]
    bottleneck: bool


# The depth counts the stem, every convolution of the blocks and the linear classifier the papers put on top.
_PRESETS = {
    8: _Preset((1, 1, 1), bottleneck=False),
    14: _Preset((2, 2, 2), bottleneck=False),
    28: _Preset((3, 4, 6), bottleneck=False),
    41: _Preset((3, 4, 6), bottleneck=True),
    92: _Preset((3, 4, 23), bottleneck=True),
    143: _Preset((3, 8, 36), bottleneck=True),
    18: _Preset((2, 2, 2, 2), bottleneck=False),
    34: _Preset((3, 4, 6, 3), bottleneck=False),
    50: _Preset((3, 4, 6, 3), bottleneck=True),
    101: _Preset((3, 4, 23, 3), bottleneck=True),
    152: _Preset((3, 8, 36, 3), bottleneck=True),
}
_CHANNELS = (64, 128, 256, 512)

_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "instance": lambda channels: nn.GroupNorm(channels, channels),
}
# Kernel and stride of the first convolution.
_STEMS = {"stl10": (5, 1), "cifar": (3, 1), "imagenet": (7, 2), "strided": (5, 2)}


class ResNetV2Encoder(nn.Module):
    """ResNet of pre-activation blocks over patches (He et al. 2016, arXiv 1603.05027).

    ============== ================ ================================ ======================
    depth          block            blocks per stack                 channels per stack
    ============== ================ ================================ ======================
    8, 14, 28      two 3x3          1,1,1 / 2,2,2 / 3,4,6            64, 128, 256
    41, 92, 143    bottleneck       3,4,6 / 3,4,23 / 3,8,36          64, 128, 256 (x4 out)
    18, 34         two 3x3          2,2,2,2 / 3,4,6,3                64, 128, 256, 512
    50, 101, 152   bottleneck       3,4,6,3 / 3,4,23,3 / 3,8,36,3    64 … 512 (x4 out)
    ============== ================ ================================ ======================

    Depths with three stacks are ResNets without their last stack, as contrastive predictive coding uses them. Every
    stack but the first starts with stride 2. Nothing follows the last block but the mean over space.

    Convolutions start from He's normal initialisation by fan-out with zero biases. Without a norm the last convolution
    of every block is scaled by ``n ** -0.5`` on top, n the blocks of its stack: each stack then multiplies the variance
    by at most about e, where plain He initialisation would double it with every block.

    Args:
        depth: a depth from the table; give either this or ``blocks``.
        in_channels: channels C of a patch, 3 for colour and 1 for grey.
        blocks: blocks per stack, for an encoder of one's own.
        bottleneck: the block that ``blocks`` counts: 1x1, 3x3, 1x1 with four times the channels, or else two 3x3.
        channels: channels per stack, before a bottleneck's expansion by 4. Default: the first of 64, 128, 256, 512.
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

    def __init__(
        self,
        depth: int | None = None,
        in_channels: int = 3,
        *,
        blocks: Sequence[int] | None = None,
        bottleneck: bool = False,
        channels: Sequence[int] | None = None,
        norm: str = "none",
        stem: str = "stl10",
        stem_channels: int = 64,
        patch_size: int | None = None,
        stride: int | None = None,
    ) -> None:
        super().__init__()
        blocks, bottleneck = _resolve_blocks(depth, blocks, bottleneck)
        if channels is None and len(blocks) > len(_CHANNELS):
            raise ValueError(f"channels must be given for more than {len(_CHANNELS)} stacks, got {len(blocks)} stacks")
        channels = _CHANNELS[: len(blocks)] if channels is None else tuple(channels)
        if len(channels) != len(blocks):
            raise ValueError(f"channels must hold one number for each of {len(blocks)} stacks, got {channels}")
        for name, values in (
            ("in_channels", (in_channels,)),
            ("stem_channels", (stem_channels,)),
            ("blocks", blocks),
            ("channels", channels),
        ):
            if min(values) < 1:
                raise ValueError(f"{name} must be at least 1, got {min(values)}")
        if norm not in _NORMS:
            raise ValueError(f"norm must be one of {', '.join(_NORMS)}, got {norm!r}")
        if stem not in _STEMS:
            raise ValueError(f"stem must be one of {', '.join(_STEMS)}, got {stem!r}")
        if patch_size is None and stride is not None:
            raise ValueError(f"stride needs patch_size, got stride={stride} alone")
        self.in_channels = in_channels
        self.patchify = None if patch_size is None else Patchify(patch_size, stride)

        kernel_size, stem_stride = _STEMS[stem]
        self.conv1 = _conv(in_channels, stem_channels, kernel_size, stem_stride, norm)
        self.norm1: nn.Module = nn.Identity()
        self.pool: nn.Module = nn.Identity()
        if stem == "imagenet":
            self.norm1 = _NORMS[norm](stem_channels)
            self.pool = nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
        block = _BottleneckBlock if bottleneck else _BasicBlock
        stacks = []
        width = stem_channels
        for stack, (count, stack_channels) in enumerate(zip(blocks, channels, strict=True)):
            stacks.append(nn.Sequential())
            for position in range(count):
                stacks[-1].append(block(width, stack_channels, 2 if stack > 0 and position == 0 else 1, norm))
                width = stack_channels * block.expansion
        self.layers = nn.Sequential(*stacks)
        self.out_channels = width
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all convolutions anew, as the class describes it."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                module.reset_parameters()
        for stack in self.layers:
            for block in stack:
                if isinstance(block.norm1, nn.Identity):
                    with torch.no_grad():
                        block.last_conv.weight.mul_(len(stack) ** -0.5)

    def forward(self, patches_or_images: Tensor) -> Tensor:
        """Encode every patch.

        Args:
            patches_or_images: patches [B, rows, cols, C, p, p], or images [B, C, H, W] (floating, or uint8 to be
                scaled by 1/255), which need ``patch_size``. Patches with channels last in memory stay so inside.

        Returns:
            Encodings [B, D, rows, cols], with D last in memory.

        Raises:
            TypeError: patches that are not floating.
            ValueError: an input of another shape, or images for an encoder that knows no ``patch_size``.
        """
        patches = self._to_patches(patches_or_images)
        batch, rows, cols = patches.shape[:3]
        features = self.pool(self.norm1(self.conv1(patches.flatten(0, 2))))
        encodings = self.layers(features).mean((2, 3))
        return encodings.view(batch, rows, cols, self.out_channels).permute(0, 3, 1, 2)

    def features(self, patches_or_images: Tensor) -> Tensor:
        """The same as calling the encoder: [B, D, rows, cols]."""
        return self(patches_or_images)

    def _to_patches(self, patches_or_images: Tensor) -> Tensor:
        patches = patches_or_images
        if patches.ndim == 4:
            if self.patchify is None:
                raise ValueError(
                    "images need an encoder with patch_size; this one takes patches [B, rows, cols, C, p, p]"
                )
            patches = self.patchify(patches)
            if patches_or_images.dtype == torch.uint8:
                patches = patches.to(self.conv1.weight.dtype)
        if patches.ndim != 6 or patches.shape[3] != self.in_channels:
            raise ValueError(
                f"patches_or_images must be [B, rows, cols, C, p, p] or [B, C, H, W] with C = {self.in_channels}, "
                f"got shape {tuple(patches_or_images.shape)}"
            )
        if not patches.is_floating_point():
            raise TypeError(f"patches_or_images must be floating patches, got {patches.dtype}")
        return patches


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions, each behind norm, ReLU: [N, in, h, w] → [N, channels, h / stride, w / stride]."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.norm1 = _NORMS[norm](in_channels)
        self.conv1 = _conv(in_channels, channels, 3, stride, norm)
        self.norm2 = _NORMS[norm](channels)
        self.conv2 = _conv(channels, channels, 3, 1, norm)
        self.shortcut = _shortcut(in_channels, channels, stride, norm)

    @property
    def last_conv(self) -> nn.Conv2d:
        return self.conv2

    def forward(self, input: Tensor) -> Tensor:
        activated = torch.relu(self.norm1(input))
        residual = self.conv2(torch.relu(self.norm2(self.conv1(activated))))
        return residual + (input if self.shortcut is None else self.shortcut(activated))


class _BottleneckBlock(nn.Module):
    """1x1, 3x3, 1x1 convolutions, each behind norm, ReLU: [N, in, h, w] → [N, 4 channels, h / stride, w / stride]."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str) -> None:
        super().__init__()
        self.norm1 = _NORMS[norm](in_channels)
        self.conv1 = _conv(in_channels, channels, 1, 1, norm)
        self.norm2 = _NORMS[norm](channels)
        self.conv2 = _conv(channels, channels, 3, stride, norm)
        self.norm3 = _NORMS[norm](channels)
        self.conv3 = _conv(channels, channels * self.expansion, 1, 1, norm)
        self.shortcut = _shortcut(in_channels, channels * self.expansion, stride, norm)

    @property
    def last_conv(self) -> nn.Conv2d:
        return self.conv3

    def forward(self, input: Tensor) -> Tensor:
        activated = torch.relu(self.norm1(input))
        residual = self.conv2(torch.relu(self.norm2(self.conv1(activated))))
        residual = self.conv3(torch.relu(self.norm3(residual)))
        return residual + (input if self.shortcut is None else self.shortcut(activated))


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int, norm: str) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=norm == "none"
    )


def _shortcut(in_channels: int, out_channels: int, stride: int, norm: str) -> nn.Conv2d | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return _conv(in_channels, out_channels, 1, stride, norm)


def _resolve_blocks(depth: int | None, blocks: Sequence[int] | None, bottleneck: bool) -> tuple[tuple[int, ...], bool]:
    if (depth is None) == (blocks is None):
        raise ValueError(f"give either depth or blocks, got depth={depth} and blocks={blocks}")
    if depth is None:
        if len(blocks) == 0:
            raise ValueError("blocks must hold at least one stack, got none")
        return tuple(blocks), bottleneck
    if depth not in _PRESETS:
        raise ValueError(f"depth must be one of {', '.join(map(str, _PRESETS))}, got {depth!r}")
    if bottleneck:
        raise ValueError(f"bottleneck goes with blocks; depth={depth} implies its own")
    return _PRESETS[depth]
