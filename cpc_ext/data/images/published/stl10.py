"""STL-10 from its published binary files: 100 000 unlabelled, 5000 training and 8000 test images of 96 x 96 pixels.

The files store each image column by column; a transposed view of the mapped file corrects this without a copy.
Source: Coates, Ng and Lee 2011, https://cs.stanford.edu/~acoates/stl10/.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpc_ext.data.binary import open_records, read_names, require_file, require_labels
from cpc_ext.data.download import Archive, require_folder
from cpc_ext.data.images.dataset import Dataset, ImageSet

SIZE = 96
UNLABELED, TRAIN, TEST = 100_000, 5_000, 8_000
# The published checksum is an MD5, which is too weak for a download over http. SHA-256 and size are those of TensorFlow
# Datasets (tensorflow_datasets/url_checksums/stl10.txt).
ARCHIVE = Archive(
    url="http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
    sha256="f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866",
    size=2_640_397_119,
    unpacked=(UNLABELED + TRAIN + TEST) * 3 * SIZE * SIZE,
    folder="stl10_binary",
)
CLASSES = 10
FOLDS, FOLD_SIZE = 10, 1_000

# The statistics with which Greedy InfoMax (arXiv 1905.11786), and every program that compares with it, normalises.
MEAN, STD = (0.4313, 0.4156, 0.3663), (0.2683, 0.2610, 0.2687)
GRAY_MEAN, GRAY_STD = 0.4120, 0.2570


def load(data_dir: str | Path | None = None, *, download: bool = False) -> Dataset:
    """Open STL-10: pretrain is the unlabelled split, `folds` the ten published subsets of 1000 training images.

    Raises FileNotFoundError if files are missing, ValueError if one is damaged, DownloadError.
    """
    folder = require_folder(ARCHIVE, data_dir, download=download)
    return Dataset(
        name="stl10",
        pretrain=ImageSet(images=_images(folder / "unlabeled_X.bin", UNLABELED)),
        train=_labelled(folder, "train", TRAIN),
        test=_labelled(folder, "test", TEST),
        classes=read_names(folder / "class_names.txt", CLASSES),
        mean=MEAN,
        std=STD,
        gray_mean=GRAY_MEAN,
        gray_std=GRAY_STD,
        folds=_folds(folder / "fold_indices.txt"),
    )


def _images(path: Path, count: int) -> np.ndarray:
    images: np.ndarray = open_records(path, count, 3 * SIZE * SIZE).reshape(count, 3, SIZE, SIZE).transpose(0, 1, 3, 2)
    return images


def _labelled(folder: Path, split: str, count: int) -> ImageSet:
    path = folder / f"{split}_y.bin"
    labels = require_labels(path, open_records(path, count, 1)[:, 0], first=1, count=CLASSES)
    return ImageSet(images=_images(folder / f"{split}_X.bin", count), labels=labels)


def _folds(path: Path) -> tuple[np.ndarray, ...]:
    """Read the folds: ten lines of 1000 indices into the training images, counted from 0."""
    try:
        folds = tuple(np.array(line.split(), np.int64) for line in require_file(path).read_text("utf-8").splitlines())
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: expected lines of indices: {error}") from error
    if [len(fold) for fold in folds] != [FOLD_SIZE] * FOLDS:
        raise ValueError(f"{path}: expected {FOLDS} lines of {FOLD_SIZE} indices, found {[len(f) for f in folds]}")
    if min(fold.min() for fold in folds) < 0 or max(fold.max() for fold in folds) >= TRAIN:
        raise ValueError(f"{path}: expected indices 0..{TRAIN - 1}, found others")
    return folds
