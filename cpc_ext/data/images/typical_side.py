"""Typical size of the user's own images, from the headers of a few of them, by which a run's defaults are chosen."""

from __future__ import annotations

import os
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from itertools import islice
from pathlib import Path
from statistics import median
from typing import IO, Any

from cpc_ext.data.file_tree import passed_over
from cpc_ext.data.images.source_files import HDF5_SUFFIXES, SHARD_SUFFIXES
from cpc_ext.data.libraries import optional

__all__ = ["typical_side"]

# The largest number of images, or arrays of images, to look at, and of files, so that a folder of other files is not
# read completely.
_IMAGES, _FILES = 24, 400
# The largest number of files to look at in a folder, of images in a file, and of members in a file.
_OF_FOLDER, _OF_FILE, _MEMBERS = 8, 8, 64


def typical_side(path: Path) -> int | None:
    """Return the median of the shorter sides, in pixels, of some images in a file, or below a folder.

    Returns None if no image can be read; loading the data set then reports the reason.
    """
    sides: list[int] = []
    for looked, file in enumerate(_files(path.expanduser())):
        if len(sides) >= _IMAGES or looked == _FILES:
            break
        sides += _sides(file)
    return round(median(sides)) if sides else None


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    met: set[tuple[int, int]] = set()
    # Links to folders are followed, as they may hold data, but they may lead in circles.
    for place, folders, names in os.walk(path, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in met:
            folders.clear()
            continue
        met.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not passed_over(name))
        yield from (Path(place, name) for name in sorted(names)[:_OF_FOLDER])


def _sides(path: Path) -> list[int]:
    """Return the shorter sides of the image in a file, or of some images or arrays in it; [] if it has none."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".npy", ".npz"):
            return [side for shape in _numpy_shapes(path) for side in _of_array(shape)]
        if suffix in HDF5_SUFFIXES:
            return [side for shape in _hdf5_shapes(path) for side in _of_array(shape)]
        if path.name.lower().endswith(SHARD_SUFFIXES):
            return list(islice(_tar_sides(path), _OF_FILE))
        if suffix in (".arrow", ".parquet"):
            from cpc_ext.data.images.folders.huggingface import samples_of

            images = (sample.image for sample in samples_of(path, path.name))
            return [_of_image(BytesIO(image)) for image in islice(images, _OF_FILE) if isinstance(image, bytes)]
        return [_of_image(path)]
    except Exception:  # Damaged headers make readers raise nearly anything; loading the file reports what is wrong.
        return []


def _of_image(file: Path | IO[bytes]) -> int:
    from PIL import Image

    with Image.open(file) as image:
        side: int = min(image.size)
        return side


def _tar_sides(path: Path) -> Iterator[int]:
    """Yield the shorter sides of the images among an archive's first members."""
    with tarfile.open(path) as archive:
        for member in islice(archive, _MEMBERS):
            content = archive.extractfile(member) if member.isreg() else None
            if content is not None:
                with suppress(Exception):  # Damaged members may raise nearly anything, and some are not images.
                    yield _of_image(content)


def _of_array(shape: tuple[int, ...]) -> list[int]:
    from cpc_ext.data.images.pixels import channel_axis

    if len(shape) not in (3, 4):
        return []
    axis = channel_axis(shape[1:])
    return [min(length for place, length in enumerate(shape[1:]) if axis is None or place != axis % 3)]


def _numpy_shapes(path: Path) -> list[tuple[int, ...]]:
    if path.suffix.lower() == ".npy":
        with path.open("rb") as file:
            return [_numpy_shape(file)]
    with zipfile.ZipFile(path) as archive:
        shapes = []
        for name in archive.namelist():
            with archive.open(name) as member:
                shapes.append(_numpy_shape(member))
        return shapes


def _numpy_shape(file: IO[bytes]) -> tuple[int, ...]:
    from numpy.lib import format as npy

    read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape: tuple[int, ...] = read(file)[0]
    return shape


def _hdf5_shapes(path: Path) -> list[tuple[int, ...]]:
    h5py = optional("h5py", "hdf5", "HDF5 files")
    shapes: list[tuple[int, ...]] = []

    def visit(name: str, member: Any) -> None:
        if isinstance(member, h5py.Dataset):
            shapes.append(member.shape)

    with h5py.File(path) as content:
        content.visititems(visit)
    return shapes
