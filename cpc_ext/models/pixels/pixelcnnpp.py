"""PixelCNN++: uint8 images [B, C, H, W] to a mixture of logistics at every pixel, and images drawn from it.

Two streams of features, one of the rows above a pixel and one of those and the pixels to its left, go down to a quarter
of the resolution and up again, joined by skip connections. A feature's concatenated ELU is computed once for all layers
that take it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.models.pixels.pixel_model import PixelModel
from cpc_ext.models.pixels.pixel_sampler import PixelFeatures, WholeNetwork, scale_values
from cpc_ext.models.pixels.stream_features import StreamFeatures
from cpc_ext.nn.shifted_conv2d import (
    ChannelMix,
    Shift,
    ShiftedConv2d,
    ShiftedConvTranspose2d,
    initialize_from_data,
)
from cpc_ext.nn.typed import Module, ModuleList
from cpc_ext.ops.logistic_mixture import _sample_logistic_mixture, logistic_mixture_nll

__all__ = ["GatedResNet", "PixelCNNPP", "StreamLayers"]

_LEVELS = 3
# Pixels of the image along a side of one pixel of the lowest resolution.
_MULTIPLE = 2 ** (_LEVELS - 1)


Layer = TypeVar("Layer", bound=nn.Module)


class StreamLayers(Protocol):
    """Runs a network's layers on whole images, or records them for one pixel at a time.

    The type of the features that it takes and returns is its own.
    """

    def start_u(self, layer: ShiftedConv2d) -> Any:
        """Return the first features of the upper stream: ``layer`` on the image, shifted down by one row."""

    def start_ul(self, above: ShiftedConv2d, left: ShiftedConv2d) -> Any:
        """Return the first features of the upper left stream: ``above`` shifted down plus ``left`` shifted right."""

    def block(self, block: GatedResNet, features: Any, skips: Sequence[Any]) -> Any:
        """Apply a gated block to ``features``, with ``skips`` as skip connections."""

    def downsize(self, layer: ShiftedConv2d, features: Any) -> Any:
        """Halve the resolution."""

    def upsize(self, layer: ShiftedConvTranspose2d, features: Any) -> Any:
        """Double the resolution."""


class PixelCNNPP(PixelModel):
    """PixelCNN++ as published (Salimans et al. 2017, arXiv 1701.05517), with the names of its PyTorch port.

    The stream u sees the rows above a pixel (2x3 kernels), ul those and the pixels to its left (2x2 kernels), which
    take u as a skip connection. Three levels of gated blocks, with strided convolutions between them, keep every
    feature map; three more, with transposed convolutions, take the maps as skip connections, last first. All weights
    are normalised.

    Noise of :meth:`sample` is uniform in 0..1, [B, K + C, H, W], as for :func:`cpc_ext.ops.sample_logistic_mixture`,
    which also defines the temperature.

    Args:
        in_channels: C, 3 for colour and 1 for grey.
        channels: F, channels of each stream. Published: 160.
        blocks: gated blocks of a level. Published: 5.
        mixtures: K, components of the mixture at a pixel. Published: 10.
        dropout: probability of dropping a channel between a block's convolutions in training. Published: 0.5.
        num_classes: number of classes to condition the model on, by a learned bias in each gate, zero at the start.
            Default: none.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        channels: int = 96,
        blocks: int = 2,
        mixtures: int = 10,
        dropout: float = 0.5,
        num_classes: int | None = None,
    ) -> None:
        super().__init__(in_channels, num_classes, channels=channels, blocks=blocks, mixtures=mixtures)
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels must be 1 or 3, got {in_channels}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
        self.mixtures = mixtures
        options = {"dropout": dropout, "num_classes": num_classes}
        # The image has an additional channel of ones, which distinguishes it from the padding.
        self.u_init = ShiftedConv2d(in_channels + 1, channels, (2, 3), "down")
        self.ul_init = ModuleList(
            [
                ShiftedConv2d(in_channels + 1, channels, (1, 3), "down"),
                ShiftedConv2d(in_channels + 1, channels, (2, 1), "down-right"),
            ]
        )
        self.up_layers = ModuleList(_Level(channels, blocks, 0, **options) for _ in range(_LEVELS))
        self.down_layers = ModuleList(_Level(channels, blocks + (level > 0), 1, **options) for level in range(_LEVELS))

        def resizing(
            layer: Callable[..., Layer], kernel_size: tuple[int, int], shift: Shift, **stride: int
        ) -> ModuleList[Layer]:
            return ModuleList(layer(channels, channels, kernel_size, shift, **stride) for _ in range(_LEVELS - 1))

        self.downsize_u_stream = resizing(ShiftedConv2d, (2, 3), "down", stride=2)
        self.downsize_ul_stream = resizing(ShiftedConv2d, (2, 2), "down-right", stride=2)
        self.upsize_u_stream = resizing(ShiftedConvTranspose2d, (2, 3), "down")
        self.upsize_ul_stream = resizing(ShiftedConvTranspose2d, (2, 2), "down-right")
        self.nin_out = ChannelMix(channels, mixtures * (10 if in_channels == 3 else 3))

    def network(self, layers: StreamLayers) -> Any:
        """Return the features whose ELU ``nin_out`` takes; ``layers`` runs every layer."""
        u, ul = layers.start_u(self.u_init), layers.start_ul(*self.ul_init)
        kept = [(u, ul)]
        for level, blocks in enumerate(self.up_layers):
            for u_block, ul_block in blocks.pairs():
                u = layers.block(u_block, u, [])
                ul = layers.block(ul_block, ul, [u])
                kept.append((u, ul))
            if level < _LEVELS - 1:
                u = layers.downsize(self.downsize_u_stream[level], u)
                ul = layers.downsize(self.downsize_ul_stream[level], ul)
                kept.append((u, ul))
        u, ul = kept.pop()
        for level, blocks in enumerate(self.down_layers):
            for u_block, ul_block in blocks.pairs():
                kept_u, kept_ul = kept.pop()
                u = layers.block(u_block, u, [kept_u])
                ul = layers.block(ul_block, ul, [u, kept_ul])
            if level < _LEVELS - 1:
                u = layers.upsize(self.upsize_u_stream[level], u)
                ul = layers.upsize(self.upsize_ul_stream[level], ul)
        return ul

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the parameters of the mixture of logistics of every pixel given all earlier ones.

        Args:
            images: [B, C, H, W], uint8, or whole numbers 0..255 of another type; H and W multiples of 4.
            labels: [B], integers in 0..num_classes-1; for a model with classes only.

        Returns:
            [B, P, H, W] as :func:`cpc_ext.ops.logistic_mixture_nll` takes them, of the parameters' type, or of
            autocast's.

        Raises:
            TypeError, ValueError: as for :meth:`PixelModel.nats`; also a size that is no multiple of 4.
        """
        images, labels = self._check_images(images), self._check_labels(labels, images.shape[0])
        self.check_size(*images.shape[2:])
        return self.mixture(scale_values(images, self.nin_out.bias.dtype), labels)

    def mixture(self, image: Tensor, labels: Tensor | None) -> Tensor:
        """Compute :meth:`forward` of an image whose values are scaled to -1..1, without checks."""
        features = self.network(_WholeImages(image, labels))
        # The first half of a concatenated ELU is the ELU.
        return self.nin_out(features.elu[:, : features.raw.shape[1]])

    def nats(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihood of each image in nats, [B], float32 (float64 for a float64 model).

        Arguments and errors are those of :meth:`forward`.
        """
        params = self(images, labels)
        return logistic_mixture_nll(images if images.dtype == torch.uint8 else self._whole(images).byte(), params)

    @torch.no_grad()
    def initialize(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Set scales and biases so that on these images every layer's outputs have mean 0 and deviation 1.

        For a block's last layer the deviation is 0.1. Dropout is off. Arguments and errors are those of
        :meth:`forward`.
        """
        with _evaluating(self), initialize_from_data(self):
            self(images, labels)

    def pixel_features(self, shape: tuple[int, int, int, int], labels: Tensor | None, *, cached: bool) -> PixelFeatures:
        if cached:
            return StreamFeatures(self, shape, labels)
        bias = self.nin_out.bias
        batch, channels, height, width = shape
        pixels = bias.new_zeros((batch, height, width, channels), dtype=torch.promote_types(bias.dtype, torch.float32))

        def run(image: Tensor) -> Tensor:
            with _evaluating(self):  # Dropout is for training.
                return self.mixture(image.to(bias.dtype), labels)

        return WholeNetwork(run, pixels, 1, len(bias))

    def draw(self, outputs: Tensor, noise: Tensor, turn: int, temperature: float) -> Tensor:
        params, noise = (values.view(*values.shape, 1, 1) for values in (outputs, noise))
        return _sample_logistic_mixture(params, noise, self.in_channels, temperature).flatten(1).long()

    def noise_shape(self, shape: tuple[int, int, int, int]) -> tuple[int, ...]:
        batch, channels, height, width = shape
        return batch, self.mixtures + channels, height, width

    def _draw_noise(self, into: Tensor, generator: torch.Generator | None) -> Any:
        into.uniform_(generator=generator)

    def check_size(self, height: int, width: int) -> None:
        if min(height, width) < 1 or height % _MULTIPLE or width % _MULTIPLE:
            raise ValueError(
                f"size must be a multiple of {_MULTIPLE} pixels each way, as the lowest of {_LEVELS} resolutions has a "
                f"{_MULTIPLE}th, got {height} x {width}"
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode, and restore the mode of every submodule afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Level(Module):
    """The gated blocks of one resolution, of both streams.

    kept: number of kept feature maps of each stream that a block takes as skip connections, 0 or 1.
    """

    def __init__(self, channels: int, blocks: int, kept: int, **options: Any) -> None:
        super().__init__()
        self.u_stream = ModuleList(GatedResNet(channels, "down", kept, **options) for _ in range(blocks))
        # These take u, too.
        self.ul_stream = ModuleList(GatedResNet(channels, "down-right", kept + 1, **options) for _ in range(blocks))

    def pairs(self) -> list[tuple[GatedResNet, GatedResNet]]:
        """Return the pairs of blocks of u and ul, in the order in which they run."""
        return list(zip(self.u_stream, self.ul_stream, strict=True))


class GatedResNet(Module):
    """A residual block with a gate: [B, F, H, W] to the same.

    A convolution of the input's concatenated ELU, plus a matrix applied to that of the skip connections; ELU; dropout;
    a convolution to 2F channels, of which one half times the sigmoid of the other is added to the input.

    Args:
        channels: F.
        shift: "down" for 2x3 kernels, "down-right" for 2x2 kernels.
        skips: number of skip connections.
        dropout: probability of leaving a channel out.
        num_classes: number of classes, each of which adds a bias before the gate; None for none.
    """

    def __init__(self, channels: int, shift: Shift, skips: int, *, dropout: float, num_classes: int | None) -> None:
        super().__init__()
        kernel_size = (2, 3) if shift == "down" else (2, 2)
        self.conv_input = ShiftedConv2d(2 * channels, channels, kernel_size, shift)
        self.nin_skip = ChannelMix(2 * channels * skips, channels, sources=skips) if skips else None
        # Published: a small gain, so that at first a block changes little.
        self.conv_out = ShiftedConv2d(2 * channels, 2 * channels, kernel_size, shift, gain=0.1)
        self.dropout = nn.Dropout2d(dropout)
        self.class_bias: nn.Embedding | None = None
        if num_classes is not None:
            self.class_bias = nn.Embedding(num_classes, 2 * channels)
            nn.init.zeros_(self.class_bias.weight)

    def forward(self, features: Features, skips: Sequence[Features], labels: Tensor | None) -> Tensor:
        skipped = None if self.nin_skip is None else self.nin_skip(*(skip.elu for skip in skips))
        hidden = self.dropout(_concat_elu(self.conv_input(features.elu, skipped)))
        bias = None if self.class_bias is None else self.class_bias(labels)[..., None, None].to(hidden.dtype)
        return features.raw + F.glu(self.conv_out(hidden, bias), dim=1)


class Features(NamedTuple):
    """A feature map of whole images, [B, F, H, W], and its concatenated ELU, [B, 2F, H, W]."""

    raw: Tensor
    elu: Tensor


def _concat_elu(raw: Tensor) -> Tensor:
    """Return ELU of a map and of its negative, [B, 2F, H, W] (Shang et al. 2016, arXiv 1603.05201, for the ReLU)."""
    return F.elu(torch.cat([raw, -raw], dim=1), inplace=True)


def _features(raw: Tensor) -> Features:
    return Features(raw, _concat_elu(raw))


class _WholeImages:
    """Runs a network's layers on whole images, [B, C, H, W] scaled to -1..1."""

    def __init__(self, image: Tensor, labels: Tensor | None) -> None:
        self._image = torch.cat([image, torch.ones_like(image[:, :1])], dim=1)
        self._labels = labels

    def start_u(self, layer: ShiftedConv2d) -> Features:
        return _features(_shift_down(layer(self._image)))

    def start_ul(self, above: ShiftedConv2d, left: ShiftedConv2d) -> Features:
        return _features(_shift_down(above(self._image)) + _shift_right(left(self._image)))

    def block(self, block: GatedResNet, features: Features, skips: Sequence[Features]) -> Features:
        return _features(block(features, skips, self._labels))

    def downsize(self, layer: ShiftedConv2d, features: Features) -> Features:
        return _features(layer(features.raw))

    def upsize(self, layer: ShiftedConvTranspose2d, features: Features) -> Features:
        return _features(layer(features.raw))


def _shift_down(features: Tensor) -> Tensor:
    """Shift every row down by one, with zeros in the first."""
    return F.pad(features, (0, 0, 1, -1))


def _shift_right(features: Tensor) -> Tensor:
    return F.pad(features, (1, -1))
