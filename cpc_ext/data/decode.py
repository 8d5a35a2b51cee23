"""Image files to rows of one uint8 file: decoded once, by threads, since Pillow lets go of the interpreter meanwhile.

Rows are appended in the order of the files with plain writes, so that no more than a few hundred images are in memory
and a full disk is an error instead of a crash. What cannot be decoded is left out and reported.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

# Decoded ahead of writing; enough that the threads seldom wait for the slowest image of a batch.
AHEAD = 512

# Images of one size keep it up to this many pixels on the shorter side; beyond, as with the photographs of one camera,
# they would fill a disk with what no crop for training is large enough to use.
KEPT_SIZE = 256


class SizeNotKept(Exception):
    """The images were to keep their size, and it is not the same for all or too large."""


def decode_stream(
    files: Sequence[Path], image_size: tuple[int, int], batch_size: int
) -> Iterator[tuple[np.ndarray, list[int]]]:
    """Decode images a batch at a time, while those before are being used.

    image_size: height and width that every image is resized to and its middle cut out.

    Yields, for every batch_size files in their order, uint8 [B, 3, H, W] and the indices of the files that these are;
    those that could not be decoded are missing in both.
    """
    pool = ThreadPoolExecutor(_cores())
    starts = range(0, len(files), batch_size)
    try:
        ahead = deque(_submit(pool, files, start, batch_size, image_size) for start in starts[:2])
        for number, start in enumerate(starts):
            decoded = [future.result() for future in ahead.popleft()]
            if number + 2 < len(starts):
                ahead.append(_submit(pool, files, starts[number + 2], batch_size, image_size))
            indices = [start + i for i, pixels in enumerate(decoded) if pixels is not None]
            pixels = (
                np.stack([decoded[i - start] for i in indices]) if indices else np.empty((0, *image_size, 3), np.uint8)
            )
            yield pixels.transpose(0, 3, 1, 2), indices
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(
    pool: ThreadPoolExecutor, files: Sequence[Path], start: int, count: int, image_size: tuple[int, int]
) -> list[Future[np.ndarray | None]]:
    return [pool.submit(_decode_or_none, path, image_size) for path in files[start : start + count]]


def decode_all(files: Sequence[Path], out: BinaryIO, image_size: int | None) -> tuple[tuple[int, int], list[int]]:
    """Append every image to `out` as uint8 [3, H, W], RGB.

    image_size: the shorter side is brought to it and the middle square kept. None keeps the images as they are and
    raises SizeNotKept where they differ or have a shorter side above KEPT_SIZE.

    Returns (H, W) and the indices of the files that could not be decoded, which have no row; (0, 0) where none could.
    """
    shape: tuple[int, int] | None = None
    broken: list[int] = []
    pool = ThreadPoolExecutor(_cores())
    try:
        with tqdm(desc="decoding images", total=len(files), unit="image", disable=None) as bar:
            for start in range(0, len(files), AHEAD):
                decoded = pool.map(partial(_decode_or_none, image_size=image_size), files[start : start + AHEAD])
                for index, pixels in enumerate(decoded, start):
                    bar.update()
                    if pixels is None:
                        broken.append(index)
                        continue
                    if shape is None:
                        shape = pixels.shape[:2]
                    if pixels.shape[:2] != shape or (image_size is None and min(shape) > KEPT_SIZE):
                        raise SizeNotKept
                    out.write(np.ascontiguousarray(pixels.transpose(2, 0, 1)).data)
    finally:
        # Not `with`: on Ctrl-C that would first finish what is queued.
        pool.shutdown(cancel_futures=True)
    return shape or (0, 0), broken


def decode_image(path: Path, image_size: int | tuple[int, int] | None = None) -> np.ndarray:
    """One image as uint8 [H, W, 3], RGB, the right way up by its EXIF orientation. Raises what Pillow raises.

    image_size: height and width, or both in one, that it is resized to and its middle cut out; None keeps its own.
    """
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    with Image.open(path) as image:
        if width is not None:
            # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, never below what is asked for.
            image.draft(None, (width, height))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I;16"):
            # Pillow would clip 16-bit grey at 255 instead of scaling it.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        image = image.convert("RGB")
        if width is not None and image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
        return np.asarray(image)


def _decode_or_none(path: Path, image_size: int | tuple[int, int] | None) -> np.ndarray | None:
    # A damaged file makes Pillow's readers raise nearly anything (OSError, SyntaxError, struct.error, ...).
    try:
        return decode_image(path, image_size)
    except Exception:
        return None


def _cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
