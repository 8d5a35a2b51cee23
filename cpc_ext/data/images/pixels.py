"""Conversion of an image, in any of its usual forms, to uint8 [H, W, C]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from cpc_ext.data.images.decode import decode_bytes, decode_image, opened_to_pixels, resized

__all__ = ["channel_axis", "check_range", "check_several", "to_levels", "to_pixels"]

# Resampling can exceed 0..1 by half a level, which is clipped.
_HALF_A_LEVEL = 1 / 510


def to_pixels(image: object, image_size: int | None = None) -> np.ndarray:
    """Convert an image to uint8 [H, W, C] with 1 or 3 channels.

    image: a Pillow image, which becomes RGB; the Path of an image file, or its bytes; or an array of NumPy, PyTorch or
        anything that NumPy converts, [H, W], [H, W, C] or [C, H, W] with C 1 or 3. Integers range from 0 to 255, uint16
        from 0 to 65535, floating point from 0 to 1; bool is black and white.
    image_size: side in pixels; the shorter side is resized to it and the middle square kept.

    Raises TypeError if it is not an image, ValueError for values or a shape that no image has, and whatever Pillow
    raises for damaged bytes.
    """
    size = None if image_size is None else (image_size, image_size)
    if isinstance(image, Path):
        return decode_image(image, image_size)
    if isinstance(image, bytes | bytearray | memoryview):
        return opened_to_pixels(decode_bytes(bytes(image)), size)
    if isinstance(image, Image.Image):
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)  # A copy, as the image is the caller's.
        return opened_to_pixels(image, size, shrinks=False)
    if isinstance(image, str):
        raise TypeError(f"expected an image or an array, got the text {image!r:.80}; a file is given as pathlib.Path")
    array = _as_array(image)
    if array.dtype == np.uint8 and array.ndim == 1:
        return opened_to_pixels(decode_bytes(array.tobytes()), size)
    pixels = _levels(array)
    axis = channel_axis(array.shape)
    pixels = pixels[..., None] if axis is None else np.moveaxis(pixels, axis, -1)
    if size is None or pixels.shape[:2] == size:
        return pixels
    gray = pixels.shape[2] == 1
    fitted = resized(Image.fromarray(np.ascontiguousarray(pixels[..., 0] if gray else pixels)), size)
    return fitted[..., None] if gray else fitted


def channel_axis(shape: Sequence[int]) -> int | None:
    """Return the axis of an image's channels, -1 if possible, else -3; None for [H, W].

    Raises ValueError for a shape that no image has.
    """
    if len(shape) == 2 and min(shape) > 0:
        return None
    if len(shape) == 3 and min(shape) > 0:
        for axis in (-1, -3):
            if shape[axis] in (1, 3):
                return axis
    raise ValueError(f"expected an image [H, W], [H, W, C] or [C, H, W] of 1 or 3 channels, got shape {list(shape)}")


def check_several(shape: Sequence[int]) -> None:
    """Raise ValueError if the shape of an array of images [N, ...] is more likely that of one image, [H, W, C]."""
    if len(shape) == 3 and shape[-1] in (1, 3, 4):
        raise ValueError(
            f"expected images [N, H, W] or [N, H, W, C], got shape {list(shape)}, which is that of one image: "
            "give all images as one array [N, H, W, C]"
        )


def _as_array(image: Any) -> np.ndarray:
    """Convert an image to an array. Raises TypeError if it does not consist of numbers."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        # NumPy has no bfloat16.
        image = image.float().numpy() if image.is_floating_point() else image.numpy()
    try:
        array = np.asarray(image)
    except (TypeError, ValueError) as error:
        raise TypeError(f"expected an image or an array, got {type(image).__name__} ({error})") from None
    if array.dtype.kind not in "buif" or array.ndim == 0:
        raise TypeError(f"expected an image or an array of numbers, got {type(image).__name__}")
    return array


def _levels(array: np.ndarray) -> np.ndarray:
    """Convert values to uint8. Raises ValueError if they are out of range or their range is unknown."""
    if array.size and array.dtype.kind in "iuf":
        check_range(array.dtype, array.min(), array.max())
    return to_levels(array)


def check_range(dtype: np.dtype, low: Any, high: Any) -> None:
    """Raise ValueError if the extremes of values are out of range, or leave the range of the values open."""
    if dtype.kind == "f":
        # The negated condition also catches NaN.
        if not (low >= -_HALF_A_LEVEL and high <= 1 + _HALF_A_LEVEL):
            raise ValueError(
                f"floating point has values of {low:g} to {high:g}, which are to be 0 to 1 (a run normalises itself)"
            )
    elif dtype == np.uint16:
        if 0 < high <= 255:
            raise ValueError(f"uint16 has values up to {high}, which may be of 8 bits or of 16; uint8 says the former")
    elif low < 0 or high > 255:
        raise ValueError(f"{dtype} has values of {low} to {high}, which are to be 0 to 255")


def to_levels(array: np.ndarray) -> np.ndarray:
    """Convert brightness in the range of its type to uint8; check_range has checked the range."""
    if array.dtype == np.bool_:
        levels: np.ndarray = array.astype(np.uint8) * np.uint8(255)
        return levels
    if array.dtype.kind == "f":
        return (array.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    return array.astype(np.uint8, copy=False)
