"""The decoded images of a folder, cached as rows of one memory-mapped file: see :mod:`cpc_ext.data.decoded_cache`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from cpc_ext.data.decoded_cache import DecodedCache
from cpc_ext.data.file_tree import TreeFile
from cpc_ext.data.images.decode import Decoded, SizeNotKept, decode_all
from cpc_ext.data.images.statistics import PixelStatistics, pixel_statistics

DEFAULT_SIZE = 96
# Part of a cache's key: raise it when what decoding writes changes.
FORMAT = 3


@dataclass(frozen=True)
class DecodedImages:
    """The decoded images of files.

    images: uint8 [N, 3, H, W], memory-mapped. decoded: the result of decoding each file.
    statistics: statistics of the training images, which come first; None if none of them could be decoded.
    """

    images: np.ndarray
    decoded: Decoded
    statistics: PixelStatistics | None


def decoded_images(root: Path, files: Sequence[TreeFile], train_count: int, image_size: int | None) -> DecodedImages:
    """Decode files below root, the first train_count of which are for training, or open them from the cache.

    image_size: see load in folders/folder.py.

    Raises ValueError if no file could be decoded, OSError if the cache cannot be written.
    """
    cache = DecodedCache(
        root=root,
        files=files,
        what="images",
        form=[FORMAT, image_size, train_count],
        reader=("Pillow", PIL.__version__),
        variant=image_size,
    )
    kept = cache.kept(partial(_build, train_count=train_count, image_size=image_size))
    content = kept.index
    statistics = content["statistics"]
    shape = (len(files) - len(kept.reasons), 3, content["height"], content["width"])
    return DecodedImages(
        np.memmap(kept.file, dtype=np.uint8, mode="r", shape=shape),
        Decoded(content["height"], content["width"], kept.reasons, content["several"]),
        None if statistics is None else PixelStatistics.of(statistics),
    )


def _build(
    target: Path, files: list[Path], train_count: int, image_size: int | None
) -> tuple[dict[str, Any], dict[int, str]]:
    decoded = _decode(target, files, image_size)
    train = train_count - sum(number < train_count for number in decoded.reasons)
    content: dict[str, Any] = {"height": decoded.height, "width": decoded.width, "several": decoded.several}
    shape = (len(files) - len(decoded.reasons), 3, decoded.height, decoded.width)
    images = np.memmap(target, dtype=np.uint8, mode="r", shape=shape)[:train] if train else None
    content["statistics"] = None if images is None else asdict(pixel_statistics(images))
    return content, decoded.reasons


def _decode(target: Path, files: list[Path], image_size: int | None) -> Decoded:
    try:
        with target.open("wb") as out:
            decoded = decode_all(files, out, image_size)
            out.flush()
            os.fsync(out.fileno())
        return decoded
    except SizeNotKept:
        return _decode(target, files, DEFAULT_SIZE)
