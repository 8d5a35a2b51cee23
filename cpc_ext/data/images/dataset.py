"""Image datasets: uint8 arrays, and the statistics to normalise them with.

An image set never decodes or copies. Its images may be a strided view of a memory-mapped file, and all processing of
pixels happens later, in the extraction op on the training device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Images, with their labels and file names where these are known.

    images: uint8 [N, C, H, W], in memory or memory-mapped, with any strides; or int32 for codes in place of pixels,
        which may have more than 256 values.
    labels: int64 [N] indices into the dataset's classes, or None.
    paths: N file names, or None if the images do not come from files of their own.

    Raises ValueError if these do not fit together.
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
        """The labels. Raises ValueError if there are none."""
        if self.labels is None:
            raise ValueError("the images have no labels")
        return self.labels

    def __repr__(self) -> str:
        labelled = "labelled" if self.labels is not None else "no labels"
        return f"ImageSet({list(self.images.shape)}, {labelled})"


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images for self-supervised training, and the labelled splits that probes train and test on, if there are any.

    classes: class names, indexed by label; empty without labels.
    mean, std: per channel, with pixels in 0..1. gray_mean, gray_std: the same of the ITU-R 601 grey image.
    folds: STL-10's ten published training folds, as index arrays into `train`; empty for other datasets.
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
