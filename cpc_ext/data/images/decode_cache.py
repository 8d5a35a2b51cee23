"""Decoded images kept in a folder of the user's cache: found by what tells the files apart, checked when opened.

A cache is written aside, forced to disk and renamed under a file lock, so an interrupted run, a full disk or a power
cut never leaves half of one, and of several processes one decodes. Whatever damages it later is found by its size and
by a checksum of places spread over it, few enough to cost milliseconds; then the files are decoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from filelock import FileLock

from cpc_ext.data.cache import cache_dir, sync_folder
from cpc_ext.data.images.decode import Decoded, SizeNotKept, decode_all
from cpc_ext.data.images.image_tree import ImageFile
from cpc_ext.data.images.statistics import PixelStatistics, pixel_statistics
from cpc_ext.data.notice import tell

DEFAULT_SIZE = 96
# Part of a cache's key: raise it when what decoding writes changes.
FORMAT = 2
# The checksum is of this many blocks, evenly spaced: a stretch of a thousandth of the file does not go unseen.
_BLOCKS, _BLOCK_BYTES = 1024, 4096


class _Unusable(Exception):
    """A cache is not as it was written, or another Pillow may make more of the files."""


@dataclass(frozen=True)
class DecodedImages:
    """The images of files: uint8 [N, 3, H, W], mapped, what became of each file, and the statistics for normalising.

    statistics: of the training images, which come first; None where none of them could be decoded.
    """

    images: np.ndarray
    decoded: Decoded
    statistics: PixelStatistics | None


def decoded_images(root: Path, files: Sequence[ImageFile], train_count: int, image_size: int | None) -> DecodedImages:
    """The decoded images of files below root, of which the first train_count are for training.

    image_size: as load_folder takes it. Raises ValueError where no file could be decoded, OSError where the images
    cannot be kept.
    """
    told = [(file.path, file.size, file.mtime_ns, file.ctime_ns, file.inode) for file in files]
    key = hashlib.sha256(json.dumps([FORMAT, image_size, train_count, told]).encode()).hexdigest()[:32]
    home = root.resolve()
    source = hashlib.sha256(os.fsencode(home) + f"\n{image_size}".encode()).hexdigest()[:16]
    # A name may have 255 bytes, of which a character takes up to four.
    parent = cache_dir() / "folders" / f"{home.name[:48]}-{source}"
    directory = parent / key
    try:
        if directory.is_dir():
            try:
                return _open(directory)
            except _Unusable:
                pass
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{parent}.lock"):
            if directory.is_dir():
                try:
                    return _open(directory)  # Another process has just decoded them.
                except _Unusable as reason:
                    again = f"the images kept here do not serve ({reason}), so they are decoded again"
                    tell(directory, [again], found_by_all=False)
            # Whatever else is here belongs to an earlier state of the tree or to a run that was cut short.
            for stale in parent.iterdir():
                shutil.rmtree(stale, ignore_errors=True)
            _build(root, files, train_count, image_size, directory)
        return _open(directory)
    except (OSError, NotImplementedError, _Unusable) as error:
        # NotImplementedError: the file system has no locks.
        problem = (
            f"cannot keep the decoded images of {root} in {parent} ({getattr(error, 'strerror', None) or error}); "
            "CPC_EXT_CACHE names another cache folder"
        )
        number = getattr(error, "errno", None)
        raise (OSError(problem) if number is None else OSError(number, problem)) from error


def _open(directory: Path) -> DecodedImages:
    """Map the images of a cache. Raises _Unusable, OSError where it may not be read."""
    file = directory / "images.bin"
    try:
        index = json.loads((directory / "index.json").read_bytes())
        digest = index.pop("digest")
        shape = (index["count"], 3, index["height"], index["width"])
        size, expected = file.stat().st_size, int(np.prod(shape))
        if size != expected:
            raise _Unusable(f"images.bin has {size} bytes, not {expected}")
        if _digest(index, file) != digest:
            raise _Unusable("their checksum is wrong")
        if index["reasons"] and index["pillow"] != PIL.__version__:
            raise _Unusable(f"Pillow {index['pillow']} could not read all of them, this is {PIL.__version__}")
        statistics = index["statistics"]
        return DecodedImages(
            np.memmap(file, dtype=np.uint8, mode="r", shape=shape),
            Decoded(
                index["height"],
                index["width"],
                {number: reason for reason, numbers in index["reasons"].items() for number in numbers},
                index["several"],
            ),
            None if statistics is None else _statistics(statistics),
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _Unusable(f"{os.path.basename(error.filename or 'a file')} is missing") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise _Unusable("index.json holds something else") from None


def _build(root: Path, files: Sequence[ImageFile], train_count: int, image_size: int | None, directory: Path) -> None:
    aside = directory.with_name(f"{directory.name}.building")
    aside.mkdir()
    try:
        decoded = _decode(aside / "images.bin", [root / file.path for file in files], image_size)
        count = len(files) - len(decoded.reasons)
        if not count:
            reason = next(iter(decoded.reasons.values()))
            raise ValueError(f"{root}: none of the {len(files)} images could be read, first {files[0].path}: {reason}")
        shape = (count, 3, decoded.height, decoded.width)
        images = np.memmap(aside / "images.bin", dtype=np.uint8, mode="r", shape=shape)
        train = train_count - sum(number < train_count for number in decoded.reasons)
        numbers: dict[str, list[int]] = {}
        for number, reason in decoded.reasons.items():
            numbers.setdefault(reason, []).append(number)
        index: dict[str, Any] = {
            "count": count,
            "height": decoded.height,
            "width": decoded.width,
            "reasons": numbers,
            "several": decoded.several,
            "pillow": PIL.__version__,
            "statistics": asdict(pixel_statistics(images[:train])) if train else None,
        }
        index["digest"] = _digest(index, aside / "images.bin")
        with (aside / "index.json").open("w") as out:
            json.dump(index, out)
            out.flush()
            os.fsync(out.fileno())
        sync_folder(aside)
        aside.rename(directory)
        sync_folder(directory.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _decode(target: Path, files: list[Path], image_size: int | None) -> Decoded:
    try:
        with target.open("wb") as out:
            decoded = decode_all(files, out, image_size)
            out.flush()
            os.fsync(out.fileno())
        return decoded
    except SizeNotKept:
        return _decode(target, files, DEFAULT_SIZE)


def _digest(index: dict[str, Any], file: Path) -> str:
    """The digest of what a cache says of its images, and of blocks spread over these, first and last among them."""
    digest = hashlib.blake2b(json.dumps(index, sort_keys=True).encode(), digest_size=16)
    with file.open("rb", buffering=0) as stream:
        end = max(os.fstat(stream.fileno()).st_size - _BLOCK_BYTES, 0)
        for offset in np.unique(np.linspace(0, end, _BLOCKS).astype(np.int64)).tolist():
            stream.seek(offset)
            digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _statistics(index: dict[str, Any]) -> PixelStatistics:
    return PixelStatistics(
        mean=tuple(index["mean"]), std=tuple(index["std"]), gray_mean=index["gray_mean"], gray_std=index["gray_std"]
    )
