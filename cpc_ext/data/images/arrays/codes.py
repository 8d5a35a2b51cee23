"""Codes in place of images, such as a VQ-VAE's of each picture, in NumPy's files: integers of any number of values."""

from __future__ import annotations

from pathlib import Path

from cpc_ext.data.images.array_sets import codes_dataset
from cpc_ext.data.images.arrays.npy import read_arrays
from cpc_ext.data.images.dataset import Dataset


def load(data_dir: str | Path, *, image_size: int | None = None) -> Dataset:
    """Open the codes of a .npy or .npz file, or of all below a folder.

    Codes are [N, H, W], [N, H, W, C] or [N, C, H, W], C 1 or 3, integers from 0 on; with labels, classes and parts as
    the arrays of images have them (:mod:`cpc_ext.data.images.arrays.npy`). They are read into memory and never resized.

    Raises FileNotFoundError or PermissionError for the files, ValueError where one is damaged, they do not fit
    together, hold no codes, or ``image_size`` is another than theirs.
    """
    source, arrays = read_arrays(data_dir)
    dataset = codes_dataset("codes", source, arrays)
    if image_size not in (None, *(() if dataset.image_shape[1] != dataset.image_shape[2] else dataset.image_shape[1:])):
        raise ValueError(f"codes are not resized: they are {list(dataset.image_shape)}, and image_size is {image_size}")
    return dataset
