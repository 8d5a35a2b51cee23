"""The encoder of Lightning Bolts' CPC v2: a bottleneck ResNet with layer norms for maps of a fixed size.

It maps patches [B, rows, cols, C, p, p], or images that are cut into patches first, to encodings [B, D, rows, cols].
Each norm has a weight and a bias for every value of a map, so that an encoder takes patches of one size only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.models.encoders.stacked_encoder import EncoderBlock, StackedEncoder
from cpc_ext.nn.conv2d import Conv2d
from cpc_ext.nn.typed import Sequential

__all__ = ["LayerNormResNetEncoder"]


class LayerNormResNetEncoder(StackedEncoder):
    """ResNet (He et al. 2015, arXiv 1512.03385) with layer norm over channels and space in place of batch norm.

    A 7x7 convolution of stride 2, norm, ReLU, 3x3 max-pool of stride 2, then stacks of bottlenecks: 1x1, 3x3 and 1x1
    convolutions, a norm behind each, ReLUs between, and one behind the sum with the shortcut. Every stack but the first
    starts with stride 2. Convolutions have no biases and start from He's normal initialisation by fan-out.

    Args:
        patch_size: side p of the patches in pixels, whether they are given or cut from images.
        in_channels: channels C of a patch, 3 for colour and 1 for grey.
        blocks: bottlenecks per stack. Default: those of CPC v2 as Lightning Bolts has them.
        channels: channels of the 3x3 convolutions, per stack.
        expansions: ratio of a bottleneck's output channels to ``channels``, per stack.
        stem_channels: channels of the first convolution.
        stride: distance of patches cut from images, in pixels. Default: ``patch_size // 2``.

    Attributes:
        out_channels: D, the features per patch.

    Raises:
        ValueError: an argument below 1, or lists of different lengths.
    """

    stem_layers = ("conv1", "ln1", "pool")

    layers: Sequential[Sequential[_Bottleneck]]

    def __init__(
        self,
        patch_size: int,
        in_channels: int = 3,
        *,
        blocks: Sequence[int] = (3, 4, 46, 3),
        channels: Sequence[int] = (64, 128, 512, 512),
        expansions: Sequence[int] = (4, 4, 8, 4),
        stem_channels: int = 64,
        stride: int | None = None,
    ) -> None:
        super().__init__(in_channels, patch_size=patch_size, stride=stride)
        if not len(blocks) == len(channels) == len(expansions) > 0:
            raise ValueError(
                f"blocks, channels and expansions must hold a number for each stack, got {list(blocks)}, "
                f"{list(channels)} and {list(expansions)}"
            )
        if min(*blocks, *channels, *expansions, stem_channels) < 1:
            raise ValueError("blocks, channels, expansions and stem_channels must be at least 1")
        self.patch_size = patch_size
        side = _halved(patch_size)
        self.conv1 = Conv2d(in_channels, stem_channels, 7, stride=2, padding=3, bias=False)
        self.ln1 = nn.LayerNorm([stem_channels, side, side])
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        side = _halved(side)
        stacks: list[Sequential[_Bottleneck]] = []
        width = stem_channels
        for stack, (count, inside, expansion) in enumerate(zip(blocks, channels, expansions, strict=True)):
            stacks.append(Sequential())
            for position in range(count):
                step = 2 if stack > 0 and position == 0 else 1
                stacks[-1].append(_Bottleneck(side, width, inside, inside * expansion, step))
                width, side = inside * expansion, _halved(side) if step == 2 else side
        self.layers = Sequential(*stacks)
        self.out_channels = width
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all convolutions anew; norms start as identities."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def stem(self, patches: Tensor) -> Tensor:
        if patches.shape[-2:] != (self.patch_size, self.patch_size):
            raise ValueError(
                f"the encoder's layer norms are of patches of {self.patch_size} pixels, got patches of "
                f"{patches.shape[-2]}x{patches.shape[-1]}"
            )
        features: Tensor = self.pool(F.relu(self.ln1(self.conv1(patches))))
        return features


class _Bottleneck(EncoderBlock):
    """[N, in, h, h] → [N, out, h / stride, h / stride]. side: h."""

    def __init__(self, side: int, in_channels: int, inside: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        after = _halved(side) if stride == 2 else side
        self.conv1 = Conv2d(in_channels, inside, 1, bias=False)
        self.ln1 = nn.LayerNorm([inside, side, side])
        self.conv2 = Conv2d(inside, inside, 3, stride=stride, padding=1, bias=False)
        self.ln2 = nn.LayerNorm([inside, after, after])
        self.conv3 = Conv2d(inside, out_channels, 1, bias=False)
        self.ln3 = nn.LayerNorm([out_channels, after, after])
        self.downsample: Sequential[nn.Module] | None = None
        if stride > 1 or in_channels != out_channels:
            shortcut = Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = Sequential(shortcut, nn.LayerNorm([out_channels, after, after]))

    def forward(self, input: Tensor) -> Tensor:
        features = F.relu(self.ln1(self.conv1(input)))
        features = F.relu(self.ln2(self.conv2(features)))
        features = self.ln3(self.conv3(features))
        return torch.relu(features + (input if self.downsample is None else self.downsample(input)))


def _halved(side: int) -> int:
    """Return the side of a map after a padded convolution or pool of stride 2."""
    return (side + 1) // 2
