"""The files of CIFAR-10 and CIFAR-100: 50 000 training and 10 000 test images of 32 x 32 pixels.

In the binary version a record is its label bytes and the image, row by row. In the Python version, which torchvision
uses, files are pickles of NumPy arrays; they are read without executing anything else that a pickle may contain.
Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cpc_ext.data.binary import open_records, require_file, require_labels
from cpc_ext.data.cache import datasets_dir
from cpc_ext.data.download import Archive
from cpc_ext.data.images.dataset import Dataset, ImageSet
from cpc_ext.data.images.statistics import pixel_statistics

IMAGE_SHAPE = (3, 32, 32)
TRAIN, TEST = 50_000, 10_000
IMAGE_BYTES = (TRAIN + TEST) * 3 * 32 * 32


def cifar_records(path: Path, count: int, label_bytes: int, classes: int) -> ImageSet:
    """Read a binary file's images and labels; of two label bytes (coarse, fine) the last is used."""
    records = open_records(path, count, label_bytes + int(np.prod(IMAGE_SHAPE)))
    labels = require_labels(path, records[:, label_bytes - 1], first=0, count=classes)
    return ImageSet(images=records[:, label_bytes:].reshape(count, *IMAGE_SHAPE), labels=labels)


def python_folder(archive: Archive, data_dir: str | Path | None, folder: str) -> Path | None:
    """Find the folder of the Python version, which is in data_dir or is data_dir itself.

    Returns None if it is missing, or if the binary version is there, too.
    """
    root = datasets_dir(data_dir)
    if root.name == archive.folder or (root / archive.folder).is_dir():
        return None
    return next((path for path in (root, root / folder) if path.name == folder and path.is_dir()), None)


def python_records(paths: Sequence[Path], count: int, labels: str, classes: int) -> ImageSet:
    """Read images and labels of pickles with `count` records each; `labels` is the key of the labels.

    Raises FileNotFoundError if one is missing, ValueError if one is damaged or holds anything else.
    """
    parts = [_unpickled(path) for path in paths]
    images = np.empty((count * len(paths), *IMAGE_SHAPE), np.uint8)
    targets = np.empty(len(images), np.int64)
    for number, (path, part) in enumerate(zip(paths, parts, strict=True)):
        pixels, known = part.get("data"), part.get(labels)
        wanted = (count, int(np.prod(IMAGE_SHAPE)))
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != wanted:
            raise ValueError(f"{path}: expected data as uint8 {list(wanted)}, found {_shape(pixels)}")
        if not isinstance(known, list) or len(known) != count or any(type(label) is not int for label in known):
            raise ValueError(f"{path}: expected {labels} as {count} integers, found {_shape(known)}")
        rows = slice(number * count, (number + 1) * count)
        images[rows] = pixels.reshape(-1, *IMAGE_SHAPE)
        targets[rows] = require_labels(path, np.array(known, np.int64), first=0, count=classes)
    return ImageSet(images=images, labels=targets)


def python_names(path: Path, key: str, count: int) -> tuple[str, ...]:
    """Read the `count` class names in a pickle. Raises what :func:`python_records` raises."""
    names = _unpickled(path).get(key)
    if not isinstance(names, list) or len(names) != count or any(type(name) is not str for name in names):
        raise ValueError(f"{path}: expected {key} as {count} names, found {_shape(names)}")
    return tuple(names)


def _shape(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"{len(value)} values" if isinstance(value, list) else type(value).__name__


class _ArraysOnly(pickle.Unpickler):
    """Unpickler of NumPy arrays and Python's own values, which refuses anything else that a pickle names."""

    def find_class(self, module: str, name: str) -> Any:
        # The names in a pickled array, of old and new versions of NumPy.
        allowed = {
            "numpy.core.multiarray _reconstruct": np.empty(0).__reduce__()[0],
            "numpy._core.multiarray _reconstruct": np.empty(0).__reduce__()[0],
            "numpy ndarray": np.ndarray,
            "numpy dtype": np.dtype,
            "_codecs encode": lambda text, encoding: text.encode("latin1"),  # Bytes pickled by Python 3 for Python 2.
        }
        if f"{module} {name}" not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no images are made of")
        return allowed[f"{module} {name}"]


def _unpickled(path: Path) -> dict[str, Any]:
    """Read the mapping in a pickle of Python 2 or 3. Raises ValueError if there is none."""
    with require_file(path).open("rb") as file:
        try:
            # With latin1, Python 2's byte strings become text, and arrays keep their bytes.
            found = _ArraysOnly(file, encoding="latin1").load()
        except Exception as error:  # A damaged pickle raises nearly anything.
            raise ValueError(f"{path}: damaged, or no file of CIFAR's: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a mapping, found {type(found).__name__}")
    return found


def cifar_dataset(name: str, train: ImageSet, test: ImageSet, classes: tuple[str, ...]) -> Dataset:
    statistics = pixel_statistics(train.images)
    return Dataset(
        name=name,
        pretrain=train,
        train=train,
        test=test,
        classes=classes,
        **asdict(statistics),
    )
