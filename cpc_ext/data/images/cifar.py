"""The binary files of CIFAR-10 and CIFAR-100: 50 000 training and 10 000 test images of 32 x 32 pixels.

A record is its label bytes and the image, row by row.
Source: Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cpc_ext.data.binary import open_records, require_labels
from cpc_ext.data.images.dataset import Dataset, ImageSet
from cpc_ext.data.images.statistics import pixel_statistics

IMAGE_SHAPE = (3, 32, 32)
TRAIN, TEST = 50_000, 10_000
IMAGE_BYTES = (TRAIN + TEST) * 3 * 32 * 32


def cifar_records(path: Path, count: int, label_bytes: int, classes: int) -> ImageSet:
    """A file's images and labels; of two label bytes (coarse, fine) the last counts."""
    records = open_records(path, count, label_bytes + int(np.prod(IMAGE_SHAPE)))
    labels = require_labels(path, records[:, label_bytes - 1], first=0, count=classes)
    return ImageSet(images=records[:, label_bytes:].reshape(count, *IMAGE_SHAPE), labels=labels)


def cifar_dataset(name: str, train: ImageSet, test: ImageSet, classes: tuple[str, ...]) -> Dataset:
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
