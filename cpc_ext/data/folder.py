"""Any tree of image files as a dataset, decoded once into a memory-mapped cache.

A sub-folder is a class; `train` and `test` (or `val`, `valid`, `validation`) folders are splits. The cache is found by
the tree's names, sizes and times, so a changed tree is decoded anew; it is written aside and renamed under a file
lock, so an interrupted or concurrent run never leaves or sees half of one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from cpc_ext.data.cache import cache_dir
from cpc_ext.data.dataset import Dataset, ImageSet
from cpc_ext.data.decode import SizeNotKept, decode_all
from cpc_ext.data.statistics import pixel_statistics

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("test", "val", "valid", "validation")
DEFAULT_SIZE = 96
HELD_OUT = 0.1
# Part of a cache's key: raise it when what decoding writes changes.
FORMAT = 1


@dataclass(frozen=True)
class _File:
    """One image file: its path relative to the tree, with / between parts, and what tells that it changed."""

    path: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class _Split:
    """The files of training and test, each with the class folder it is in ("" for none)."""

    files: list[_File]
    class_names: list[str]
    train_count: int


def load_folder(data_dir: str | Path, *, image_size: int | None = None) -> Dataset:
    """Open a tree of images.

    Without a test folder every tenth image of each class is held out for testing, drawn the same way on every run, so
    that runs with different seeds compare. Labels exist where every image lies in one of at least two class folders;
    otherwise `train` is None and the test images have no labels.

    image_size: side in pixels; the shorter side is resized to it and the middle square kept. Default: the images' own
    size where it is the same for all and the shorter side has at most 256 pixels, else 96.

    Decoding needs the cache folder (see cache_dir) to have room for N * 3 * H * W bytes. Files that cannot be decoded
    are left out with a warning. Raises FileNotFoundError, NotADirectoryError or PermissionError for the tree,
    ValueError where it holds no readable image, OSError where the cache cannot be written.
    """
    root = Path(data_dir).expanduser()
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size: expected at least 1 pixel, got {image_size}")
    split = _split(root)
    directory = _require_cache(root, split, image_size)
    index = json.loads((directory / "index.json").read_text())
    shape = (index["count"], 3, index["height"], index["width"])
    images = np.memmap(directory / "images.bin", dtype=np.uint8, mode="r", shape=shape)

    broken = set(index["broken"])
    _warn_broken(root, [split.files[i].path for i in index["broken"]])
    kept = [i for i in range(len(split.files)) if i not in broken]
    train_count = sum(i < split.train_count for i in kept)
    if train_count == 0:
        raise ValueError(f"{root}: none of the {split.train_count} training images could be read")
    classes = _classes(root, split)
    paths = [split.files[i].path for i in kept]
    labels = np.array([classes.index(split.class_names[i]) for i in kept], np.int64) if classes else None

    def part(rows: slice) -> ImageSet:
        return ImageSet(images=images[rows], labels=None if labels is None else labels[rows], paths=paths[rows])

    train, test = part(slice(train_count)), part(slice(train_count, None))
    statistics = pixel_statistics(train.images)
    return Dataset(
        name="folder",
        pretrain=train,
        train=train if classes else None,
        test=test if len(test) else None,
        classes=classes,
        mean=statistics.mean,
        std=statistics.std,
        gray_mean=statistics.gray_mean,
        gray_std=statistics.gray_std,
    )


def image_files(data_dir: str | Path) -> list[str]:
    """Paths, relative to data_dir, with / and sorted, of all image files below it but hidden ones.

    Raises FileNotFoundError, NotADirectoryError or PermissionError for the tree, ValueError where it holds no image.
    """
    root = Path(data_dir).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder; name the folder of images with --data-dir")
    paths = sorted(file.path for file in _scan(root, ""))
    if not paths:
        raise ValueError(f"{root}: found no image ({', '.join(SUFFIXES)})")
    return paths


def _split(root: Path) -> _Split:
    """Find the images and divide them; training files come first, so that both parts are slices of the cache."""
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder; name the folder of images with --data-dir")
    test_folder = next((name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    has_train = (root / "train").is_dir()
    if not has_train:
        test_folder = None
    train = list(_scan(root, "train" if has_train else ""))
    test = list(_scan(root, test_folder)) if test_folder else []
    if not train:
        raise ValueError(f"{root}: found no image ({', '.join(SUFFIXES)})")
    depth = 1 if has_train else 0
    if not test:
        train, test = _hold_out(train, depth)
    files = train + test
    return _Split(files, [_class_name(file, depth) for file in files], len(train))


def _scan(root: Path, folder: str) -> Iterator[_File]:
    """The image files below root / folder, in a fixed order, hidden ones left out."""

    def stop(error: OSError) -> None:
        raise error

    for where, folders, names in os.walk(root / folder, onerror=stop, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                path = Path(where, name)
                relative = path.relative_to(root).as_posix()
                try:
                    status = path.stat()
                except OSError:
                    # Such as a link to nowhere: decoding will leave it out with the other unreadable ones.
                    yield _File(relative, -1, 0)
                else:
                    yield _File(relative, status.st_size, status.st_mtime_ns)


def _class_name(file: _File, depth: int) -> str:
    parts = file.path.split("/")
    return parts[depth] if len(parts) > depth + 1 else ""


def _hold_out(files: list[_File], depth: int) -> tuple[list[_File], list[_File]]:
    """Divide files into training and a tenth of every class for testing (none of a class of one)."""
    by_class: dict[str, list[int]] = {}
    for i, file in enumerate(files):
        by_class.setdefault(_class_name(file, depth), []).append(i)
    rng = np.random.default_rng(0)
    held_out: set[int] = set()
    for members in by_class.values():
        count = max(round(len(members) * HELD_OUT), min(1, len(members) - 1))
        held_out.update(rng.permutation(members)[:count].tolist())
    return (
        [file for i, file in enumerate(files) if i not in held_out],
        [file for i, file in enumerate(files) if i in held_out],
    )


def _classes(root: Path, split: _Split) -> tuple[str, ...]:
    """The class names, or none where the images have no labels."""
    classes = sorted(set(split.class_names[: split.train_count]))
    if len(classes) < 2:
        return ()
    if "" in split.class_names:
        stray = split.files[split.class_names.index("")].path
        warnings.warn(f"{root}: {stray} is in no class folder, so the images have no labels", stacklevel=3)
        return ()
    unknown = sorted(set(split.class_names) - set(classes))
    if unknown:
        raise ValueError(f"{root}: the test images have classes that the training images lack: {', '.join(unknown)}")
    return tuple(classes)


def _require_cache(root: Path, split: _Split, image_size: int | None) -> Path:
    """The folder with the decoded images of `split`, made where there is none."""
    contents = json.dumps([FORMAT, image_size, [(file.path, file.size, file.mtime_ns) for file in split.files]])
    key = hashlib.sha256(contents.encode()).hexdigest()[:32]
    source = hashlib.sha256(f"{root.resolve()}\n{image_size}".encode()).hexdigest()[:16]
    parent = cache_dir() / "folders" / f"{root.resolve().name}-{source}"
    directory = parent / key
    if directory.is_dir():
        return directory
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{parent}.lock"):
            if not directory.is_dir():
                # Whatever else is here belongs to an earlier state of the tree or to a run that was cut short.
                for stale in parent.iterdir():
                    shutil.rmtree(stale, ignore_errors=True)
                _build(root, split, image_size, directory)
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot keep the decoded images of {root} in {parent} ({error.strerror or error}); "
            "CPC_EXT_CACHE names another cache folder",
        ) from error
    return directory


def _build(root: Path, split: _Split, image_size: int | None, directory: Path) -> None:
    aside = directory.with_name(f"{directory.name}.building")
    aside.mkdir()
    files = [root / file.path for file in split.files]
    try:
        try:
            with (aside / "images.bin").open("wb") as out:
                (height, width), broken = decode_all(files, out, image_size)
        except SizeNotKept:
            with (aside / "images.bin").open("wb") as out:
                (height, width), broken = decode_all(files, out, DEFAULT_SIZE)
        if len(broken) == len(files):
            raise ValueError(f"{root}: none of the {len(files)} images could be read, first {files[0]}")
        index = {"count": len(files) - len(broken), "height": height, "width": width, "broken": broken}
        (aside / "index.json").write_text(json.dumps(index))
        aside.rename(directory)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _warn_broken(root: Path, paths: list[str]) -> None:
    if paths:
        names = ", ".join(paths[:5]) + (", ..." if len(paths) > 5 else "")
        warnings.warn(f"{root}: left out {len(paths)} images that could not be read: {names}", stacklevel=3)
