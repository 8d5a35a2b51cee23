"""What a dataset is to the rest of the package: uint8 arrays and the statistics to normalise them with.

An image set never decodes or copies: its images may be a strided view of a memory-mapped file, and everything that
happens to a pixel happens later, in the extraction op on the training device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Images with, where they are known, their labels and file names.

    images: uint8 [N, C, H, W], in memory or memory-mapped, with any strides; int32 where they are codes in place of
        pixels, of which there may be more than 256.
    labels: int64 [N] indices into the dataset's classes, or None.
    paths: N file names, or None where the images do not come from files of their own.

    Raises ValueError where these do not fit together.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    paths: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype not in (np.uint8, np.int32):
            raise ValueError(f"images: expected uint8 [N, C, H, W], got {self.images.dtype} {list(self.images.shape)}")
        if self.labels is not None and (self.labels.shape != (len(self.images),) or self.labels.dtype != np.int64):
            raise ValueError(
                f"labels: expected int64 [{len(self.images)}], got {self.labels.dtype} {list(self.labels.shape)}"
            )
        if self.paths is not None and len(self.paths) != len(self.images):
            raise ValueError(f"paths: expected {len(self.images)} names, got {len(self.paths)}")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def known_labels(self) -> np.ndarray:
        """The labels; ValueError where there are none."""
        if self.labels is None:
            raise ValueError("the images have no labels")
        return self.labels

    def __repr__(self) -> str:
        labelled = "labelled" if self.labels is not None else "no labels"
        return f"ImageSet({list(self.images.shape)}, {labelled})"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images for self-supervised training and, where labels exist, the splits that probes train and test on.

    classes: names, indexed by label; empty without labels.
    mean, std: per channel, with pixels in 0..1. gray_mean, gray_std: the same of the ITU-R 601 grey image.
    folds: for STL-10, ten index arrays into `train`, its published training folds; empty elsewhere.
    """

    name: str
    pretrain: ImageSet
    train: ImageSet | None
    test: ImageSet | None
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    gray_mean: float
    gray_std: float
    folds: tuple[np.ndarray, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.pretrain.images.shape[1:]
        return channels, height, width
