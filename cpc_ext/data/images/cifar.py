"""CIFAR-10 and CIFAR-100 from their published binary files: 50 000 training and 10 000 test images of 32 x 32 pixels.

A record is its label bytes and the image, row by row. A file of its own is mapped and viewed; CIFAR-10's five training
batches are read into one array of 150 MB, since five mappings have no view in common.
Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpc_ext.data.binary import open_records, read_names, require_labels
from cpc_ext.data.download import Archive, require_folder
from cpc_ext.data.images.dataset import Dataset, ImageSet
from cpc_ext.data.images.statistics import pixel_statistics

SHAPE = (3, 32, 32)
BATCH, TRAIN, TEST = 10_000, 50_000, 10_000
IMAGE_BYTES = (TRAIN + TEST) * 3 * 32 * 32
# SHA-256 and sizes are those with which TensorFlow Datasets fetches the files (tensorflow_datasets/url_checksums).
CIFAR10 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    size=170_052_171,
    unpacked=IMAGE_BYTES,
    folder="cifar-10-batches-bin",
)
CIFAR100 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    size=168_513_733,
    unpacked=IMAGE_BYTES,
    folder="cifar-100-binary",
)


def load_cifar10(data_dir: str | Path | None = None, *, download: bool = False) -> Dataset:
    """Open CIFAR-10; pretrain and train are the same 50 000 images.

    Raises FileNotFoundError where files are missing, ValueError where one is damaged, DownloadError.
    """
    folder = require_folder(CIFAR10, data_dir, download=download)
    images = np.empty((TRAIN, *SHAPE), np.uint8)
    labels = np.empty(TRAIN, np.int64)
    for number in range(1, 6):
        part = slice((number - 1) * BATCH, number * BATCH)
        batch = _records(folder / f"data_batch_{number}.bin", BATCH, label_bytes=1, classes=10)
        images[part], labels[part] = batch.images, batch.labels
    return _dataset(
        "cifar10",
        train=ImageSet(images=images, labels=labels),
        test=_records(folder / "test_batch.bin", TEST, label_bytes=1, classes=10),
        classes=read_names(folder / "batches.meta.txt", 10),
    )


def load_cifar100(data_dir: str | Path | None = None, *, download: bool = False) -> Dataset:
    """Open CIFAR-100 with its 100 fine labels; pretrain and train are the same 50 000 images.

    Raises FileNotFoundError where files are missing, ValueError where one is damaged, DownloadError.
    """
    folder = require_folder(CIFAR100, data_dir, download=download)
    return _dataset(
        "cifar100",
        train=_records(folder / "train.bin", TRAIN, label_bytes=2, classes=100),
        test=_records(folder / "test.bin", TEST, label_bytes=2, classes=100),
        classes=read_names(folder / "fine_label_names.txt", 100),
    )


def _records(path: Path, count: int, label_bytes: int, classes: int) -> ImageSet:
    """A file's images and labels; of two label bytes (coarse, fine) the last counts."""
    records = open_records(path, count, label_bytes + int(np.prod(SHAPE)))
    labels = require_labels(path, records[:, label_bytes - 1], first=0, count=classes)
    return ImageSet(images=records[:, label_bytes:].reshape(count, *SHAPE), labels=labels)


def _dataset(name: str, train: ImageSet, test: ImageSet, classes: tuple[str, ...]) -> Dataset:
    statistics = pixel_statistics(train.images)
    return Dataset(
        name=name,
        pretrain=train,
        train=train,
        test=test,
        classes=classes,
        mean=statistics.mean,
        std=statistics.std,
        gray_mean=statistics.gray_mean,
        gray_std=statistics.gray_std,
    )
