"""Decoding of image files to rows of one uint8 file, once and in threads, since Pillow releases the GIL.

Rows are appended in the order of the files with plain writes, so that no more than a few hundred images are in memory
and a full disk is an error instead of a crash. An image that cannot be decoded is left out, with the reason.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cpc_ext.data.decoded_cache import require_lasting
from cpc_ext.data.threads import cores, in_order

# Images decoded ahead of writing; enough that the threads seldom wait for the slowest image of a batch.
AHEAD = 512

# Images that all have the same size keep it if the shorter side has at most this many pixels. Larger ones, such as the
# photographs of one camera, would fill a disk with pixels that no training crop uses.
KEPT_SIZE = 256

# Formats that Pillow opens or knows by name, but that hold no pictures: drawings that other programs have to render,
# films, containers that Pillow cannot read, and measurements without a range for display.
_NO_PICTURES = {"EPS", "WMF", "FLI", "MPEG", "BUFR", "GRIB", "HDF5", "FITS", "IPTC"}

# Formats whose further frames are separate images; in other formats they are previews, layers or sizes.
_OF_FRAMES = {"AVIF", "DCX", "GIF", "PNG", "TIFF", "WEBP"}

# TIFF's tags, and values of the second and the third.
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339
_WHITE_IS_ZERO, _SIGNED = 0, 2


class SizeNotKept(Exception):
    """Images cannot keep their size, because it is too large or not the same for all."""


@dataclass
class Decoded:
    """Results of decoding files.

    height, width: size of every image; 0 if none could be decoded. reasons: why a file has no image, by its index.
    several: indices of files with several images or frames, of which the first was taken.
    """

    height: int = 0
    width: int = 0
    reasons: dict[int, str] = field(default_factory=dict)
    several: list[int] = field(default_factory=list)


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes, such as ".png", of the still images that this Pillow reads."""
    by_suffix = Image.registered_extensions()
    readable = set(Image.OPEN) - _NO_PICTURES | {"MPO"}  # A kind of JPEG, which opens it.
    return frozenset(suffix for suffix, name in by_suffix.items() if name in readable)


@cache
def _formats(suffix: str) -> tuple[str, ...]:
    """Return the formats to try for a file with this suffix: all that first bytes identify, as names are often wrong.

    Formats without identifying first bytes would accept any file, so they are tried for their own suffix alone.
    """
    named = Image.registered_extensions().get(suffix)
    marked = [name for name, (_, accept) in Image.OPEN.items() if accept is not None or name == named]
    pictures = [name for name in marked if name not in _NO_PICTURES]
    return tuple(sorted(pictures, key=lambda name: (name != named, name not in ("JPEG", "PNG"))))


class RowWriter:
    """Appends images to a file as rows, uint8 [C, H, W] of one shape.

    image_size: size to which the images were resized, None if they keep their own.
    count: number of images so far. shape: [C, H, W] of every image, () before the first.
    """

    def __init__(self, out: BinaryIO, image_size: int | None) -> None:
        self._out = out
        self._image_size = image_size
        self.count = 0
        self.shape: tuple[int, ...] = ()

    def append(self, pixels: np.ndarray) -> None:
        """Append an image, uint8 [H, W, C].

        Raises SizeNotKept if images that keep their size differ in it or are too large, ValueError for another number
        of channels than before, OSError if writing fails.
        """
        height, width, channels = pixels.shape
        self.shape = self.shape or (channels, height, width)
        if (height, width) != self.shape[1:] or (self._image_size is None and min(height, width) > KEPT_SIZE):
            raise SizeNotKept
        if channels != self.shape[0]:
            raise ValueError(f"{channels} channels, the images before it have {self.shape[0]}")
        self._out.write(np.ascontiguousarray(pixels.transpose(2, 0, 1)).data)
        self.count += 1


def decode_stream(
    files: Sequence[Path], image_size: tuple[int, int], batch_size: int
) -> Iterator[tuple[np.ndarray, list[int], dict[int, str]]]:
    """Decode images in batches, the next two while the caller uses one.

    image_size: height and width of the images, which are resized and centre-cropped to it.

    Yields, for every batch_size files in their order, uint8 [B, 3, H, W], the indices of the files of these images, and
    the reasons why the other files of the batch could not be decoded, by their index.
    """
    pool = ThreadPoolExecutor(cores())
    starts = range(0, len(files), batch_size)
    try:
        ahead = deque(_submit(pool, files, start, batch_size, image_size) for start in starts[:2])
        for number, start in enumerate(starts):
            decoded = {start + i: future.result()[0] for i, future in enumerate(ahead.popleft())}
            if number + 2 < len(starts):
                ahead.append(_submit(pool, files, starts[number + 2], batch_size, image_size))
            images = {i: pixels for i, pixels in decoded.items() if not isinstance(pixels, str)}
            reasons = {i: reason for i, reason in decoded.items() if isinstance(reason, str)}
            pixels = np.stack(list(images.values())) if images else np.empty((0, *image_size, 3), np.uint8)
            yield pixels.transpose(0, 3, 1, 2), list(images), reasons
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(
    pool: ThreadPoolExecutor, files: Sequence[Path], start: int, count: int, image_size: tuple[int, int]
) -> list[Future[tuple[np.ndarray | str, bool]]]:
    return [pool.submit(_decode_or_reason, path, image_size) for path in files[start : start + count]]


def decode_all(files: Sequence[Path], out: BinaryIO, image_size: int | None) -> Decoded:
    """Append every image that can be decoded to `out` as uint8 [3, H, W], RGB.

    image_size: the shorter side is resized to it and the middle square kept. None keeps the images' own size; this
        raises SizeNotKept if sizes differ or a shorter side exceeds KEPT_SIZE.

    Raises ValueError for a transient error of reading a file.
    """
    done = Decoded()
    rows = RowWriter(out, image_size)
    decode = partial(_decode_or_reason, image_size=image_size, kept=True)
    decoded = in_order(decode, files, ahead=AHEAD, what=("image", "images"))
    with closing(decoded):
        for index, (pixels, several) in enumerate(decoded):
            if isinstance(pixels, str):
                done.reasons[index] = pixels
                continue
            if several:
                done.several.append(index)
            rows.append(pixels)
    if rows.count:
        _, done.height, done.width = rows.shape
    return done


def decode_image(path: Path, image_size: int | tuple[int, int] | None = None) -> np.ndarray:
    """Decode one image to uint8 [H, W, 3], RGB, upright according to its EXIF orientation.

    image_size: height and width, or one number for both, to which the image is resized and centre-cropped; None keeps
        its own.

    Grey of more than 8 bits is scaled by the range of its type, floating point from 0..1. Transparency is dropped: a
    pixel has its stored colour, as with torchvision's loader. CMYK becomes RGB without colour profiles. Of several
    frames or pages the first is taken.

    Raises ValueError if the range of the values is unknown, and whatever Pillow raises.
    """
    return _decode(path, image_size)[0]


def _decode(path: Path, image_size: int | tuple[int, int] | None) -> tuple[np.ndarray, bool]:
    """Decode an image as decode_image does, and return it with whether the file holds further ones."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    with Image.open(path, formats=_formats(path.suffix.lower())) as image:
        several = image.format in _OF_FRAMES and getattr(image, "is_animated", False)
        return opened_to_pixels(image, size), several


def opened_to_pixels(image: Image.Image, size: tuple[int, int] | None, *, shrinks: bool = True) -> np.ndarray:
    """Convert a Pillow image to the array that decode_image returns. Loads the image and turns it upright in place.

    size: height and width of the result.
    shrinks: whether the image itself may be decoded at a smaller size, which is faster; False for an image of the user.
    """
    if size is not None and shrinks:
        # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, but not below max(size), whichever way up the image is.
        image.draft(None, (max(size),) * 2)
    image.load()
    with suppress(Exception):  # The metadata may be damaged while the pixels are not.
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_levels(image))
    elif _tags(image).get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED:
        raise ValueError(f"mode {image.mode} of signed values, whose range is not known")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    return resized(image.convert("RGB"), size)


def resized(image: Image.Image, size: tuple[int, int] | None) -> np.ndarray:
    """Return a Pillow image as an array, resized and centre-cropped to size (height, width) unless that is None."""
    if size is not None and image.size != size[::-1]:
        image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image)


def decode_bytes(content: bytes) -> Image.Image:
    """Open the content of an image file. Raises whatever Pillow raises if it holds no image."""
    return Image.open(io.BytesIO(content), formats=_formats(""))


def _to_levels(image: Image.Image) -> np.ndarray:
    """Convert grey of 16 or 32 bits, or floating point, to uint8 [H, W]. Raises ValueError if its range is unknown.

    Pillow's own conversion would clip it at 255.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    tags = _tags(image)
    if image.mode == "F":
        # Resampling can exceed the range by half a level, which is clipped. The negated condition also catches NaN.
        if not (low >= -1 / 510 and high <= 1 + 1 / 510):
            raise ValueError(f"mode F, floating point, has values of {low:g} to {high:g}, which are to be 0 to 1")
        levels = (values.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    else:
        top = 65535
        if image.mode != "I":
            top = (1 << tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 1
        elif low < 0 or high > top or (0 < high <= 255 and image.format not in ("PNG", "PPM")):
            # PNG and PPM have 16 bits. In other formats, 32-bit integers may hold values of any number of bits.
            raise ValueError(
                f"mode I, 32-bit integers, has values of {low} to {high}, whose range is not known; 16 bits are"
            )
        levels = ((values.astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
    return 255 - levels if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else levels


def _tags(image: Image.Image) -> dict[int, Any]:
    """Return the tags of a TIFF image; {} for other formats."""
    return getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}


def _decode_or_reason(
    path: Path, image_size: int | tuple[int, int] | None, *, kept: bool = False
) -> tuple[np.ndarray | str, bool]:
    """Decode an image as _decode does, or return the reason why it cannot be decoded in its place.

    kept: whether the result is kept for longer than an error may last; a transient error then raises ValueError.
    """
    # A damaged file makes Pillow's readers raise nearly anything (OSError, SyntaxError, struct.error, ...).
    try:
        return _decode(path, image_size)
    except Exception as error:
        if kept:
            require_lasting(path, error)
        return _reason(path, error), False


def _reason(path: Path, error: Exception) -> str:
    """Return the reason why a file could not be decoded, without its name."""
    with suppress(OSError):
        if path.stat().st_size == 0:
            return "the file is empty"
    return reason_of(error)


def reason_of(error: Exception) -> str:
    """Return the reason why an image could not be decoded, without its name."""
    if isinstance(error, UnidentifiedImageError):
        return "holds no image that Pillow recognises"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels, the limit of Pillow (PIL.Image.MAX_IMAGE_PIXELS)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join((str(error) or type(error).__name__).split())[:200]
