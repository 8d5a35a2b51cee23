"""One image, in any of the forms that programs hand about, as uint8 [H, W, C]."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from cpc_ext.data.images.decode import decode_bytes, decode_image, opened_to_pixels, resized

__all__ = ["channel_axis", "check_range", "check_several", "to_levels", "to_pixels"]

# Half a level beyond 0 and 1, which resampling can leave, is cut off.
_HALF_A_LEVEL = 1 / 510


def to_pixels(image: object, image_size: int | None = None) -> np.ndarray:
    """An image as uint8 [H, W, C], of 1 or 3 channels.

    image: an image of Pillow's, which becomes RGB; the path of an image file, as a Path, or its bytes; or an array, of
        NumPy, PyTorch or whatever NumPy takes, [H, W], [H, W, C] or [C, H, W] with C 1 or 3. Integers count from 0 to
        255, those of 16 bits without sign to 65535, floating point from 0 to 1, bool as black and white.
    image_size: side in pixels; the shorter side is brought to it and the middle square kept.

    Raises TypeError for what is no image, ValueError for values or a shape that none has, and whatever Pillow raises
    for damaged bytes.
    """
    size = None if image_size is None else (image_size, image_size)
    if isinstance(image, Path):
        return decode_image(image, image_size)
    if isinstance(image, bytes | bytearray | memoryview):
        return opened_to_pixels(decode_bytes(bytes(image)), size)
    if isinstance(image, Image.Image):
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)  # A copy: the image is somebody's.
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
    """Which axis of an image's array is that of its channels, -1, or else -3; None of [H, W].

    ValueError for the shape of no image.
    """
    if len(shape) == 2 and min(shape) > 0:
        return None
    if len(shape) == 3 and min(shape) > 0:
        for axis in (-1, -3):
            if shape[axis] in (1, 3):
                return axis
    raise ValueError(f"expected an image [H, W], [H, W, C] or [C, H, W] of 1 or 3 channels, got shape {list(shape)}")


def check_several(shape: Sequence[int]) -> None:
    """ValueError for the shape of an array of images [N, ...] that is rather one image's, [H, W, C]."""
    if len(shape) == 3 and shape[-1] in (1, 3, 4):
        raise ValueError(
            f"expected images [N, H, W] or [N, H, W, C], got shape {list(shape)}, which is that of one image: "
            "give all images as one array [N, H, W, C]"
        )


def _as_array(image: Any) -> np.ndarray:
    """An image's array; TypeError where it is of no numbers."""
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
    """Values as uint8. ValueError where nothing tells their range."""
    if array.size and array.dtype.kind in "iuf":
        check_range(array.dtype, array.min(), array.max())
    return to_levels(array)


def check_range(dtype: np.dtype, low: Any, high: Any) -> None:
    """ValueError where the least and the greatest of values are not those of brightness, or do not tell its range."""
    if dtype.kind == "f":
        # Not a number is in no range.
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
    """Brightness in the range that its type has, which is known to be right, as uint8."""
    if array.dtype == np.bool_:
        levels: np.ndarray = array.astype(np.uint8) * np.uint8(255)
        return levels
    if array.dtype.kind == "f":
        return (array.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    if array.dtype == np.uint16:
        return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    return array.astype(np.uint8, copy=False)
