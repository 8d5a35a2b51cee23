"""The base classes of PixelCNNs: the probability of every value given those before it, and sampling.

:class:`PixelModel` is their common interface. :class:`SoftmaxPixelModel` is a network of masked convolutions and a
softmax over all values for every colour of every pixel: its probabilities come from one pass over whole images, its
samples from :mod:`cpc_ext.models.pixels.pixel_sampler`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.models.pixels.masked_features import Convolve, MaskedFeatures, convolve_images
from cpc_ext.models.pixels.pixel_sampler import IMAGE_LEVELS, PixelFeatures, Sampler, WholeNetwork, scale_values
from cpc_ext.nn.masked_conv2d import MaskedConv2d
from cpc_ext.nn.typed import Module

__all__ = ["PixelModel", "SoftmaxPixelModel"]

# The lowest temperature above 0; its inverse is still finite in float32.
_COLDEST = 1e-30
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


class PixelModel(Module, ABC):
    """An autoregressive model of images of C colours with values 0..levels - 1.

    Pixels are in raster order, and colours in order within a pixel. Networks see values scaled to -1..1.

    Attributes:
        in_channels: C.
        levels: number of values; 256 for images.
        num_classes: number of classes that condition the model; None if it takes no labels.
    """

    levels = IMAGE_LEVELS

    def __init__(self, in_channels: int, num_classes: int | None, **sizes: int) -> None:
        super().__init__()
        for name, value in {"in_channels": in_channels, **sizes}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, or None, got {num_classes}")
        self.in_channels = in_channels
        self.num_classes = num_classes

    @abstractmethod
    def nats(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihood of each image in nats, [B], float32 (float64 for a float64 model).

        Args:
            images: [B, C, H, W], uint8, or whole numbers 0..levels - 1 of another type.
            labels: [B], integers in 0..num_classes-1; for a model with classes only.

        Raises:
            TypeError, ValueError: images or labels of another type, shape or range. Values are checked on the CPU only,
                and not while compiling; elsewhere, where a check would stall the stream, they are clamped.
        """

    @abstractmethod
    def pixel_features(self, shape: tuple[int, int, int, int], labels: Tensor | None, *, cached: bool) -> PixelFeatures:
        """Return the network's features for one pixel after the other: see the sampler's SampledModel."""

    def seen_levels(self, dtype: torch.dtype) -> Tensor:
        """Return the network's input for each value: numbers in -1..1, [levels, 1]."""
        values = torch.arange(self.levels, device=next(self.parameters()).device)
        return scale_values(values, dtype, self.levels).unsqueeze(1)

    @abstractmethod
    def noise_shape(self, shape: tuple[int, int, int, int]) -> tuple[int, ...]:
        """Return the shape of the noise for images [B, C, H, W], with H and W as dimensions 2 and 3."""

    @abstractmethod
    def draw(self, outputs: Tensor, noise: Tensor, turn: int, temperature: float) -> Tensor:
        """Return values from a pixel's outputs and noise: see the sampler's SampledModel."""

    @abstractmethod
    def _draw_noise(self, into: Tensor, generator: torch.Generator | None) -> Any:
        """Fill a tensor with noise of the kind that :meth:`draw` takes."""

    @abstractmethod
    def check_size(self, height: int, width: int) -> None:
        """Raise ValueError if the model takes no images of this size in pixels."""

    def bits_per_dim(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss, the mean negative log-likelihood in bits per value: a scalar.

        It is NaN for an empty batch. Arguments and errors are those of :meth:`nats`.
        """
        return self.nats(images, labels).mean() / (math.prod(images.shape[1:]) * math.log(2))

    @torch.no_grad()
    def sample(
        self,
        count: int,
        size: int | tuple[int, int],
        *,
        labels: Tensor | int | None = None,
        temperature: float = 1.0,
        images: Tensor | None = None,
        known_rows: int = 0,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        cached: bool = True,
        progress: Callable[[range], Iterable[int]] = iter,
    ) -> Tensor:
        """Draw images, or complete some.

        Args:
            count: B, number of images.
            size: (H, W) in pixels, or one side for both.
            labels: [B] integers or one for all; for a model with classes only.
            temperature: below 1, likely values become likelier; at 0, and below 1e-30, the likeliest is always taken.
            images: [B, C, H, W] of the result's type, whose first ``known_rows`` rows are kept; the rest is drawn.
            known_rows: see ``images``; 0 to H.
            noise: decides the draws; its shape and distribution depend on the model. Default: drawn pixel by pixel.
            generator: generator of the noise, on the model's device. Default: PyTorch's own.
            cached: keep features from pixel to pixel. Otherwise the whole network runs for every value, slower by
                orders of magnitude. The images are the same in float32 and float64; 16-bit types round differently.
            progress: wraps the range of rows, as ``tqdm.tqdm`` does.

        Returns:
            [B, C, H, W], uint8, or int64 with more than 256 levels.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or range.
            RuntimeError: the network's outputs were not finite; checked once, after the last pixel.
        """
        height, width = (size, size) if isinstance(size, int) else size
        if count < 0:
            raise ValueError(f"count must be at least 0, got {count}")
        self.check_size(height, width)
        if not (temperature >= 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
        if temperature < _COLDEST:
            temperature = 0.0
        device = next(self.parameters()).device
        if isinstance(labels, int):
            labels = torch.full((count,), labels, device=device)
        labels = self._check_labels(labels, count)
        shape = (count, self.in_channels, height, width)
        start = self._with_known_rows(images, known_rows, shape, device)
        if noise is not None and noise.shape != self.noise_shape(shape):
            raise ValueError(f"noise must have shape {self.noise_shape(shape)}, got {tuple(noise.shape)}")
        if count == 0:
            return start
        sampler = Sampler(self, start, labels, temperature=temperature, cached=cached)
        return sampler.run(
            known_rows=known_rows,
            noise=(lambda into: self._draw_noise(into, generator)) if noise is None else noise.to(device),
            progress=progress,
        )

    def _check_images(self, images: Tensor) -> Tensor:
        """Return the images, with values checked, or clamped where they cannot be checked."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images must be a tensor, got {type(images).__name__}")
        if images.ndim != 4 or images.shape[1] != self.in_channels or 0 in images.shape[2:]:
            raise ValueError(f"images must be [B, {self.in_channels}, H, W], got shape {tuple(images.shape)}")
        last = self.levels - 1
        if self._are_bytes(images):
            return images
        if images.dtype == torch.bool or images.is_complex():
            raise TypeError(f"images must be uint8 or other whole numbers 0..{last}, got {images.dtype}")
        if not _may_look(images):
            return self._whole(images)
        images = _comparable(images)
        if images.numel() and not bool(((images >= 0) & (images <= last)).all()):
            raise ValueError(f"images must hold values 0..{last}, got {images.min().item():g}..{images.max().item():g}")
        if images.is_floating_point() and not torch.equal(images, images.round()):
            raise ValueError(f"images must hold whole numbers 0..{last}, got fractions: are they scaled already?")
        return images

    def _whole(self, images: Tensor) -> Tensor:
        """Return the values as class indices."""
        return images.long() if self._are_bytes(images) else images.long().clamp(0, self.levels - 1)

    def _are_bytes(self, images: Tensor) -> bool:
        """Return whether the dtype of images alone keeps their values within the levels."""
        return images.dtype == torch.uint8 and self.levels >= IMAGE_LEVELS

    def _with_known_rows(
        self, images: Tensor | None, known_rows: int, shape: tuple[int, int, int, int], device: torch.device
    ) -> Tensor:
        """Return the images to draw on: the known rows, and zeros below."""
        dtype = torch.uint8 if self.levels <= IMAGE_LEVELS else torch.int64
        start = torch.zeros(shape, dtype=dtype, device=device)
        if images is not None:
            if images.dtype != dtype or images.shape != shape:
                wanted = f"{str(dtype).removeprefix('torch.')} {shape}"
                raise ValueError(f"images must be {wanted}, got {images.dtype} {tuple(images.shape)}")
            start[:, :, :known_rows] = self._check_images(images)[:, :, :known_rows].to(device)
        if not 0 <= known_rows <= shape[2]:
            raise ValueError(f"known_rows must be 0 to {shape[2]}, got {known_rows}")
        if known_rows and images is None:
            raise ValueError(f"known_rows={known_rows} needs images")
        return start

    def _check_labels(self, labels: Tensor | None, count: int) -> Tensor | None:
        if self.num_classes is None:
            if labels is not None:
                raise ValueError("labels are for a model with num_classes; this one takes none")
            return None
        if labels is None:
            raise ValueError(f"labels must be given: the model is conditioned on {self.num_classes} classes")
        if not isinstance(labels, Tensor):
            raise TypeError(f"labels must be a tensor of integers, got {type(labels).__name__}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if labels.shape != (count,):
            raise ValueError(f"labels must have shape ({count},), got {tuple(labels.shape)}")
        last = self.num_classes - 1
        labels = _comparable(labels)
        if _may_look(labels) and count and not bool(((labels >= 0) & (labels <= last)).all()):
            raise ValueError(f"labels must be in 0..{last}, got {labels.min().item()}..{labels.max().item()}")
        return labels.to(next(self.parameters()).device, torch.int64).clamp(0, last)


class SoftmaxPixelModel(PixelModel):
    """A model with a softmax over all levels for every value.

    Noise of :meth:`sample` is standard Gumbel noise [B, C, H, W, levels]; the temperature divides the logits.

    Args:
        levels: number of values, at least 2: 256 for images, or the number of codes, such as those of a VQ-VAE (van den
            Oord et al. 2017, arXiv 1711.00937), of which the model is then a prior.
        code_channels: learned features per value, which are the network's input; for codes, which have no order. 0: the
            input is numbers, scaled to -1..1.

    Attributes:
        logits_layer: the last layer, whose channels are (colour, value).
        seen_channels: channels of the network's input: the colours, times ``code_channels`` if there are any.
    """

    logits_layer: MaskedConv2d

    def __init__(
        self, in_channels: int, num_classes: int | None, *, levels: int, code_channels: int, **sizes: int
    ) -> None:
        super().__init__(in_channels, num_classes, **sizes)
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        if code_channels < 0:
            raise ValueError(f"code_channels must be at least 0, got {code_channels}")
        self.levels = levels
        self.codes = nn.Embedding(levels, code_channels) if code_channels else None
        self.seen_channels = in_channels * max(code_channels, 1)

    def seen_levels(self, dtype: torch.dtype) -> Tensor:
        """Return the network's input for each value, [levels, e]."""
        return super().seen_levels(dtype) if self.codes is None else self.codes.weight.to(dtype)

    @abstractmethod
    def network(self, convolve: Convolve, image: Any, labels: Tensor | None) -> Any:
        """Return the features that ``logits_layer`` takes, for an input ``image``; ``convolve`` runs every layer."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logits of every value given all earlier ones.

        Args:
            images: [B, C, H, W], uint8, or whole numbers 0..levels - 1 of another type.
            labels: [B], integers in 0..num_classes-1; for a model with classes only.

        Returns:
            [B, C, levels, H, W] of the parameters' type, or of autocast's.

        Raises:
            TypeError, ValueError: images or labels of another type, shape or range. Values are checked on the CPU only,
                and not while compiling; elsewhere, where a check would stall the stream, they are clamped.
        """
        images, labels = self._check_images(images), self._check_labels(labels, images.shape[0])
        logits = self.logits_layer(self.network(convolve_images, self._seen(images), labels))
        return torch.unflatten(logits, 1, (self.in_channels, self.levels))

    def _seen(self, images: Tensor) -> Tensor:
        """Return the network's input for images [B, C, H, W]: [B, C e, H, W]."""
        if self.codes is None:
            return scale_values(images, self.logits_layer.weight.dtype, self.levels)
        # Features innermost in memory, as the convolutions have them.
        features: Tensor = self.codes(self._whole(images).permute(0, 2, 3, 1))
        return features.flatten(3).permute(0, 3, 1, 2)

    def nats(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the negative log-likelihood of each image in nats, [B], float32 (float64 for a float64 model).

        Arguments and errors are those of :meth:`PixelModel.nats`.
        """
        logits = self(images, labels)
        # The values innermost, as they are in memory.
        logits = logits.permute(0, 3, 4, 1, 2).flatten(0, 3)
        targets = self._whole(images).permute(0, 2, 3, 1).flatten()
        if logits.dtype != torch.float64:
            logits = logits.float()
        losses = F.cross_entropy(logits, targets, reduction="none")
        return losses.view(images.shape[0], math.prod(images.shape[1:])).sum(1)

    def pixel_features(self, shape: tuple[int, int, int, int], labels: Tensor | None, *, cached: bool) -> PixelFeatures:
        if cached:
            return MaskedFeatures(self, shape, labels)
        batch, channels, height, width = shape
        pixels = self.logits_layer.weight.new_zeros((batch, height, width, self.seen_channels))
        return WholeNetwork(
            lambda image: self.logits_layer(self.network(convolve_images, image, labels)), pixels, channels, self.levels
        )

    def draw(self, outputs: Tensor, noise: Tensor, turn: int, temperature: float) -> Tensor:
        """Return argmax of logits / temperature + Gumbel noise (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030).

        This is a draw from the softmax of logits / temperature; at a temperature of 0 it is the likeliest value.
        """
        if temperature > 0:
            outputs = torch.add(noise[:, turn], outputs, alpha=1 / temperature)
        return outputs.argmax(1, keepdim=True)

    def noise_shape(self, shape: tuple[int, int, int, int]) -> tuple[int, ...]:
        return (*shape, self.levels)

    def _draw_noise(self, into: Tensor, generator: torch.Generator | None) -> Any:
        into.exponential_(generator=generator).log_().neg_()

    def check_size(self, height: int, width: int) -> None:
        if min(height, width) < 1:
            raise ValueError(f"size must be at least 1 pixel, got {height} x {width}")


def _comparable(values: Tensor) -> Tensor:
    """Return integers of NumPy's wider unsigned types, which PyTorch can hardly compare, as int64; others unchanged."""
    return values.long() if values.dtype in _UNSIGNED else values


def _may_look(values: Tensor) -> bool:
    """Return whether values can be checked without stalling a stream or breaking a graph that is being compiled."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()
