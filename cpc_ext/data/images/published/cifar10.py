"""CIFAR-10 from its published binary files, or from the Python version (cifar-10-batches-py) that torchvision uses.

The five training batches are read into one array of 150 MB, since no single view covers five mapped files.
Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpc_ext.data.binary import read_names
from cpc_ext.data.download import Archive, require_folder
from cpc_ext.data.images.cifar import (
    IMAGE_BYTES,
    IMAGE_SHAPE,
    TEST,
    TRAIN,
    cifar_dataset,
    cifar_records,
    python_folder,
    python_names,
    python_records,
)
from cpc_ext.data.images.dataset import Dataset, ImageSet

BATCH = 10_000
# SHA-256 and size are those of TensorFlow Datasets (tensorflow_datasets/url_checksums).
ARCHIVE = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    size=170_052_171,
    unpacked=IMAGE_BYTES,
    folder="cifar-10-batches-bin",
)
# The folder of the Python version.
PYTHON_FOLDER = "cifar-10-batches-py"


def load(data_dir: str | Path | None = None, *, download: bool = False) -> Dataset:
    """Open CIFAR-10; pretrain and train are the same 50 000 images.

    Raises FileNotFoundError if files are missing, ValueError if one is damaged, DownloadError.
    """
    python = python_folder(ARCHIVE, data_dir, PYTHON_FOLDER)
    if python is not None:
        batches = [python / f"data_batch_{number}" for number in range(1, 6)]
        return cifar_dataset(
            "cifar10",
            train=python_records(batches, BATCH, "labels", 10),
            test=python_records([python / "test_batch"], TEST, "labels", 10),
            classes=python_names(python / "batches.meta", "label_names", 10),
        )
    folder = require_folder(ARCHIVE, data_dir, download=download, or_folder=PYTHON_FOLDER)
    images = np.empty((TRAIN, *IMAGE_SHAPE), np.uint8)
    labels = np.empty(TRAIN, np.int64)
    for number in range(1, 6):
        part = slice((number - 1) * BATCH, number * BATCH)
        batch = cifar_records(folder / f"data_batch_{number}.bin", BATCH, label_bytes=1, classes=10)
        images[part], labels[part] = batch.images, batch.known_labels
    return cifar_dataset(
        "cifar10",
        train=ImageSet(images=images, labels=labels),
        test=cifar_records(folder / "test_batch.bin", TEST, label_bytes=1, classes=10),
        classes=read_names(folder / "batches.meta.txt", 10),
    )
