"""CIFAR-100 from its published binary files, which are memory-mapped.

If there is only the Python version (cifar-100-python), which torchvision uses, it is read instead.

Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

from pathlib import Path

from cpc_ext.data.binary import read_names
from cpc_ext.data.download import Archive, require_folder
from cpc_ext.data.images.cifar import (
    IMAGE_BYTES,
    TEST,
    TRAIN,
    cifar_dataset,
    cifar_records,
    python_folder,
    python_names,
    python_records,
)
from cpc_ext.data.images.dataset import Dataset

# SHA-256 and size are those of TensorFlow Datasets (tensorflow_datasets/url_checksums).
ARCHIVE = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    size=168_513_733,
    unpacked=IMAGE_BYTES,
    folder="cifar-100-binary",
)
# The folder of the Python version.
PYTHON_FOLDER = "cifar-100-python"


def load(data_dir: str | Path | None = None, *, download: bool = False) -> Dataset:
    """Open CIFAR-100 with its 100 fine labels; pretrain and train are the same 50 000 images.

    Raises FileNotFoundError if files are missing, ValueError if one is damaged, DownloadError.
    """
    python = python_folder(ARCHIVE, data_dir, PYTHON_FOLDER)
    if python is not None:
        return cifar_dataset(
            "cifar100",
            train=python_records([python / "train"], TRAIN, "fine_labels", 100),
            test=python_records([python / "test"], TEST, "fine_labels", 100),
            classes=python_names(python / "meta", "fine_label_names", 100),
        )
    folder = require_folder(ARCHIVE, data_dir, download=download, or_folder=PYTHON_FOLDER)
    return cifar_dataset(
        "cifar100",
        train=cifar_records(folder / "train.bin", TRAIN, label_bytes=2, classes=100),
        test=cifar_records(folder / "test.bin", TEST, label_bytes=2, classes=100),
        classes=read_names(folder / "fine_label_names.txt", 100),
    )
