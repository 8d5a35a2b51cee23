"""Two random views of every image of a batch, as in SimCLR, made on the device that holds the images.

Cropping with resizing, and blurring, multiply each image by two small matrices, one for its rows and one for its
columns. Colours change by arithmetic on the whole batch. So a view takes a few dozen kernels for a batch of any size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cpc_ext.data.batch_share import BatchShare
from cpc_ext.data.images.dataset import Dataset
from cpc_ext.data.on_device import send
from cpc_ext.ops.extract_patches import LUMA

__all__ = ["SimCLRView", "adjust_hue", "blend", "blur", "crop_and_resize", "luma"]

_ASPECT_RATIOS = (3 / 4, 4 / 3)
_BLUR_SIGMAS = (0.1, 2.0)
_WHOLE = BatchShare()


@dataclass(frozen=True)
class SimCLRView:
    """SimCLR's augmentation of images (Chen et al. 2020, arXiv 2002.05709, appendix A).

    Defaults are those of the University of Amsterdam's tutorial 17.

    Applied in this order: a crop of random area, aspect ratio and position, resized; a horizontal flip with probability
    one half; brightness, contrast, saturation and hue changed by random amounts for each image, in an order that is
    drawn for the batch; conversion to grey; blur. Last, a view is normalised by the data set's mean and standard
    deviation.

    size: side of a view in pixels.
    min_area: smallest share of an image's area that a crop covers; the largest is all of it.
    jitter: factors of brightness, contrast and saturation are within 1 ± these; hue turns by up to ± the last, in
        turns of the colour circle.
    jitter_probability, gray_probability: probabilities of colour jitter and of conversion to grey.
    blur_kernel: taps of the Gaussian blur, an odd number; its deviation is drawn from 0.1 to 2 pixels. 0: no blur.
    blur_probability: share of views that are blurred.
    flip: whether half of the views are mirrored.
    center_scale: side of the whole images on which an encoder is evaluated, as a multiple of a view's. Random crops
        magnify objects, so that encoders recognise them best in whole images larger than their views (Touvron et al.
        2019, arXiv 1906.06423).
    mean, std: one value for each channel, with pixels in 0..1; None skips normalisation.
    dtype, channels_last: dtype and memory format of the views.

    Raises ValueError for a blur_kernel that is neither 0 nor an odd number below 2 * size, and for a center_scale that
    leaves no pixel.
    """

    size: int
    min_area: float = 0.08
    jitter: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.1)
    jitter_probability: float = 0.8
    gray_probability: float = 0.2
    blur_kernel: int = 9
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    blur_probability: float = 1.0
    flip: bool = True
    center_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.blur_kernel and (self.blur_kernel % 2 == 0 or self.blur_kernel // 2 >= self.size):
            raise ValueError(f"blur_kernel: expected an odd number below 2 * {self.size}, got {self.blur_kernel}")
        if self.center_size < 1:
            raise ValueError(f"center_scale: {self.center_scale} leaves no pixel of {self.size}")

    @property
    def center_size(self) -> int:
        """Side in pixels of the images that :meth:`center` returns."""
        return round(self.size * self.center_scale)

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        size: int,
        **options: Any,
    ) -> SimCLRView:
        """Return a view that normalises by the dataset's statistics. options: the other fields."""
        return cls(size=size, mean=dataset.mean, std=dataset.std, **options)

    def random_pair(
        self, images: Tensor, generator: torch.Generator | None = None, *, share: BatchShare = _WHOLE
    ) -> Tensor:
        """Return two views [2, B, C, size, size] of uint8 images [B, C, H, W]. Raises TypeError for other types.

        generator: a CPU generator, so that a seed gives the same views on every device; None takes PyTorch's default.
        share: the part of the batch that the images are; random numbers are drawn for the whole batch.
        """
        return torch.stack([self.random(images, generator, share=share) for _ in range(2)])

    def random(self, images: Tensor, generator: torch.Generator | None = None, *, share: BatchShare = _WHOLE) -> Tensor:
        """Return one view [B, C, size, size], with the arguments of :meth:`random_pair`."""
        batch = share.whole(len(images))
        height, width = images.shape[2:]
        box = self._draw_box(batch, height, width, generator)
        # Drawn even if flip is False, so that the other random numbers are the same.
        flip = (torch.rand(batch, generator=generator) < 0.5) & self.flip
        factors = 1 + (2 * torch.rand(batch, 4, generator=generator) - 1) * torch.tensor(self.jitter)
        jittered = torch.rand(batch, 1, generator=generator) < self.jitter_probability
        factors = torch.where(jittered, factors, 1.0)
        gray = torch.rand(batch, generator=generator) < self.gray_probability
        low, high = _BLUR_SIGMAS
        sigma = low + (high - low) * torch.rand(batch, generator=generator)
        order = torch.randperm(4, generator=generator).tolist()
        # If all views are blurred, nothing is drawn.
        blurred = torch.ones(batch)
        if self.blur_probability < 1:
            blurred = torch.rand(batch, generator=generator) < self.blur_probability
        numbers = torch.cat([box, flip[:, None], factors, gray[:, None], sigma[:, None], blurred[:, None]], dim=1)
        # One copy to the device, split there.
        parts = torch.split(send(share.part(numbers), images.device), [4, 1, 4, 1, 1, 1], dim=1)
        box, flip, factors, gray, sigma, blurred = parts

        view = crop_and_resize(_unit(images), box, self.size, flip=flip[:, 0] > 0)
        if images.shape[1] == 3:
            view = _jitter(view, factors, order)
            view = torch.where(gray[..., None, None] > 0, luma(view), view)
        else:
            view = _jitter(view, factors, [change for change in order if change < 2])
        if self.blur_kernel:
            soft = blur(view, sigma[:, 0], self.blur_kernel)
            view = soft if self.blur_probability == 1 else torch.where(blurred[..., None, None] > 0, soft, view)
        return self._finished(view)

    def cropping(self) -> SimCLRView:
        """Return the view that only crops, resizes and mirrors."""
        return replace(self, jitter_probability=0.0, gray_probability=0.0, blur_kernel=0)

    def center(self, images: Tensor) -> Tensor:
        """Resize and normalise uint8 images [B, C, H, W] for evaluation: [B, C, center_size, center_size].

        Square images are used whole, others are cropped to their middle squares.
        """
        height, width = images.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = _unit(images[:, :, top : top + side, left : left + side])
        box = torch.tensor([[0.0, 0.0, side, side]], device=images.device).expand(len(images), 4)
        return self._finished(crop_and_resize(square, box, self.center_size))

    def _draw_box(self, batch: int, height: int, width: int, generator: torch.Generator | None) -> Tensor:
        """Draw windows [batch, 4]: top, left, height, width in pixels."""
        area = height * width * (self.min_area + (1 - self.min_area) * torch.rand(batch, generator=generator))
        low, high = map(math.log, _ASPECT_RATIOS)
        ratio = torch.exp(low + (high - low) * torch.rand(batch, generator=generator))
        # A window that would not fit is cut to the image.
        size = torch.stack([(area / ratio).sqrt().clamp(max=height), (area * ratio).sqrt().clamp(max=width)], dim=1)
        corner = (torch.tensor([height, width]) - size) * torch.rand(batch, 2, generator=generator)
        return torch.cat([corner, size], dim=1)

    def _finished(self, view: Tensor) -> Tensor:
        if self.mean is not None and self.std is not None:
            # With Python numbers, because copying a tensor of them to the device would make the CPU wait.
            channels = zip(view.unbind(1), self.mean, self.std, strict=True)
            view = torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return view.to(self.dtype).contiguous(memory_format=layout)


def crop_and_resize(images: Tensor, box: Tensor, size: int, *, flip: Tensor | None = None) -> Tensor:
    """Resize windows of images [B, C, H, W] to [B, C, size, size] by a triangle filter, as Pillow's BILINEAR does.

    box: [B, 4], top, left, height and width of each window in pixels, not necessarily whole numbers.
    flip: bool [B], images to mirror left to right.
    """
    top, left, height, width = box.unbind(1)
    rows = _resize_matrix(top, height, images.shape[2], size)
    columns = _resize_matrix(left, width, images.shape[3], size)
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    return rows[:, None] @ images @ columns.mT[:, None]


def _resize_matrix(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Return the weights [B, size, pixels] of the source pixels in every pixel of a window resized to ``size``."""
    step = (length / size)[:, None]
    centers = start[:, None] + step * (torch.arange(size, device=start.device) + 0.5)
    places = torch.arange(pixels, device=start.device) + 0.5
    # When shrinking, the filter widens to cover all source pixels that fall into one.
    distance = (places - centers[..., None]).abs() / step.clamp(min=1)[..., None]
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def luma(images: Tensor) -> Tensor:
    """Convert RGB [B, 3, H, W] to grey by ITU-R BT.601, [B, 1, H, W]."""
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Interpolate from other (factor [B] 0) to images (factor 1), or extrapolate, clamped to 0..1."""
    factor = factor[:, None, None, None]
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def adjust_hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of RGB images [B, 3, H, W] in 0..1 by ``turn`` [B] of the colour circle, in HSV."""
    red, green, blue = images.unbind(1)
    value, most = images.max(1)
    chroma = value - images.amin(1)
    span = torch.where(chroma > 0, chroma, 1)
    # Hue in sixths of the circle, from red.
    hue = torch.where(
        most == 0, (green - blue) / span, torch.where(most == 1, 2 + (blue - red) / span, 4 + (red - green) / span)
    )
    hue = hue + 6 * turn[:, None, None]
    channels = []
    for offset in (5, 3, 1):
        place = (offset + hue) % 6
        channels.append(value - chroma * torch.minimum(place, 4 - place).clamp(0, 1))
    return torch.stack(channels, dim=1)


def blur(images: Tensor, sigma: Tensor, taps: int) -> Tensor:
    """Blur images [B, C, H, W] by a Gaussian of deviation ``sigma`` [B], cut to ``taps`` x ``taps``; mirrors edges."""
    offsets = torch.arange(taps, device=images.device) - taps // 2
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]).square())
    kernel = kernel / kernel.sum(1, keepdim=True)
    rows, columns = (_blur_matrix(kernel, offsets, size) for size in images.shape[2:])
    return rows[:, None] @ images @ columns.mT[:, None]


def _blur_matrix(kernel: Tensor, offsets: Tensor, size: int) -> Tensor:
    """Convert kernels [B, taps] to matrices [B, size, size]."""
    places = (torch.arange(size, device=kernel.device)[:, None] + offsets).abs()
    places = size - 1 - (size - 1 - places).abs()
    weights = kernel[:, None].expand(-1, size, -1)
    return kernel.new_zeros(len(kernel), size, size).scatter_add_(2, places.expand(len(kernel), -1, -1), weights)


def _jitter(images: Tensor, factors: Tensor, order: list[int]) -> Tensor:
    """Change brightness, contrast, saturation and hue (0 to 3) of images in ``order``.

    factors: [B, 4], 1 for no change.
    """
    for change in order:
        factor = factors[:, change]
        if change == 0:
            images = (images * factor[:, None, None, None]).clamp(0, 1)
        elif change == 1:
            gray = luma(images) if images.shape[1] == 3 else images
            images = blend(images, gray.mean((1, 2, 3), keepdim=True), factor)
        elif change == 2:
            images = blend(images, luma(images), factor)
        else:
            images = adjust_hue(images, factor - 1)
    return images


def _unit(images: Tensor) -> Tensor:
    """Convert uint8 to float32 in 0..1. Raises TypeError for other types, as images in 0..1 would become black."""
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    return images.float() / 255
