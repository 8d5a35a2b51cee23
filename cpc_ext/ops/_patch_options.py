"""Options of cutting and normalising patches, which extract_patches and augment_patches share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpc_ext.ops._checks import DTYPES, check_dense, check_integer, dtype_name
from cpc_ext.ops._library import refuse_forward_mode

__all__ = ["PatchOptions", "check_images", "checked_options", "scale_and_shift"]


class PatchOptions(NamedTuple):
    """Arguments of extract_patches other than the images, as in the ops' schemas.

    height, width: size of the window that is cut into patches. offsets: [B, 2] int64, its position; the centre by
    default. The other fields are the arguments of extract_patches of these names.
    """

    patch_size: int
    stride: int
    height: int
    width: int
    offsets: Tensor | None = None
    flip: Tensor | None = None
    gray: bool = False
    mean: list[float] | None = None
    std: list[float] | None = None
    patch_norm: bool = False
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def grid(self) -> tuple[int, int]:
        """Return the numbers of rows and columns of patches."""
        return (self.height - self.patch_size) // self.stride + 1, (self.width - self.patch_size) // self.stride + 1

    def for_kernels(self, images_dtype: torch.dtype, channels: int) -> tuple[Any, ...]:
        """Return the kernels' arguments from patch_size to shift, in order; ``channels`` is that of the patches."""
        scale, shift = scale_and_shift(images_dtype, channels, self.mean, self.std)
        return (*self[:7], self.patch_norm, self.channels_last, scale, shift)


def scale_and_shift(
    images_dtype: torch.dtype, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Return (scale, shift), one value per channel: ``scale * x + shift`` normalises, and scales bytes by 1/255."""
    unit = 1 / 255 if images_dtype == torch.uint8 else 1.0
    if mean is std is None:
        return [unit] * channels, [0.0] * channels
    std = std or [1.0] * channels
    mean = mean or [0.0] * channels
    return [unit / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def check_images(images: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.uint8, *DTYPES)) -> None:
    """Raise TypeError or ValueError unless images are [B, C, H, W] of one of these dtypes."""
    check_dense("images", images)
    refuse_forward_mode(images)
    if images.dtype not in dtypes:
        raise TypeError(f"images must be {', '.join(map(dtype_name, dtypes))}, got {dtype_name(images.dtype)}")
    if images.ndim != 4:
        raise ValueError(f"images must be [B, C, H, W], got shape {tuple(images.shape)}")


def checked_options(
    images: Tensor,
    patch_size: int,
    stride: int,
    crop: tuple[int, int] | None,
    offsets: Tensor | None,
    flip: Tensor | None,
    gray: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    patch_norm: bool,
    dtype: torch.dtype | None,
    channels_last: bool,
) -> PatchOptions:
    """Check the arguments of extract_patches and return them as the op takes them.

    The images must have passed :func:`check_images`. TypeError or ValueError for an invalid argument.
    """
    if dtype is None:
        dtype = images.dtype if images.is_floating_point() else torch.get_default_dtype()
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(dtype_name, DTYPES))}, got {dtype_name(dtype)}")
    for name, value in (("gray", gray), ("patch_norm", patch_norm), ("channels_last", channels_last)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    height, width = _window(images, patch_size, stride, crop)
    # All strides beyond the window are equivalent; the op's schema holds integers of 64 bits.
    stride = min(stride, max(height, width))
    channels = _output_channels(images, gray)
    means, stds = _per_channel("mean", mean, channels), _per_channel("std", std, channels)
    if stds is not None and not all(value > 0 for value in stds):
        raise ValueError(f"std must be positive, got {tuple(stds)}")
    if offsets is not None:
        if crop is None:
            raise ValueError("offsets place a crop: give crop=(h, w) with them")
        _check_per_image("offsets", offsets, (images.shape[0], 2), images)
        if offsets.dtype == torch.bool or offsets.is_floating_point() or offsets.is_complex():
            raise TypeError(f"offsets must be integers, got {dtype_name(offsets.dtype)}")
        offsets = offsets.to(torch.int64)
    if flip is not None:
        _check_per_image("flip", flip, (images.shape[0],), images)
        if flip.dtype != torch.bool:
            raise TypeError(f"flip must be bool, got {dtype_name(flip.dtype)}")
    # Positional arguments take half the time of keyword arguments.
    window = patch_size, stride, height, width, offsets, flip
    return PatchOptions(*window, gray, means, stds, patch_norm, dtype, channels_last)


def _window(images: Tensor, patch_size: int, stride: int, crop: tuple[int, int] | None) -> tuple[int, int]:
    check_integer("patch_size", patch_size, 1)
    check_integer("stride", stride, 1)
    size = images.shape[2:]
    if crop is None:
        height, width = size
    else:
        try:
            height, width = crop
        except (TypeError, ValueError):
            raise ValueError(f"crop must be (h, w), got {crop}") from None
        for side in (height, width):
            check_integer("crop", side)
        if not (0 < height <= size[0] and 0 < width <= size[1]):
            raise ValueError(
                f"crop must lie within images of {size[0]}x{size[1]}, got {height}x{width}{_other_layout(images)}"
            )
    if patch_size > min(height, width):
        raise ValueError(
            f"patch_size must be at most {min(height, width)} for a {height}x{width} window, got {patch_size}"
            f"{_other_layout(images)}"
        )
    return height, width


def _other_layout(images: Tensor) -> str:
    """Return a hint for an error if images seem to be channels-last, as from Pillow and NumPy's files; else ''."""
    last = images.shape[3] in (1, 3) and images.shape[1] not in (1, 3)
    return f"; images must be [B, C, H, W], shape {tuple(images.shape)} seems to be [B, H, W, C]" if last else ""


def _output_channels(images: Tensor, gray: bool) -> int:
    channels = images.shape[1]
    if not gray:
        if channels == 0:
            raise ValueError("images must have at least one channel, got none")
        return channels
    if channels not in (1, 3):
        raise ValueError(f"gray needs images of 1 or 3 channels, got {channels}{_other_layout(images)}")
    return 1


def _per_channel(name: str, values: Sequence[float] | None, channels: int) -> list[float] | None:
    if values is None:
        return None
    try:
        numbers = [float(value) for value in values]
    except OverflowError:
        raise ValueError(f"{name} must hold what a float can, got {values}") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a sequence of numbers, got {values!r}") from None
    if len(numbers) != channels:
        raise ValueError(f"{name} must have one value for each of {channels} output channels, got {len(numbers)}")
    return numbers


def _check_per_image(name: str, value: Tensor, shape: tuple[int, ...], images: Tensor) -> None:
    check_dense(name, value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)} for {shape[0]} images, got shape {tuple(value.shape)}")
    if value.device != images.device:
        raise ValueError(f"{name} must be on {images.device} like the images, got {value.device}")
