"""Integer codes in place of pixels, such as a VQ-VAE's codes of images, in NumPy's files."""

from __future__ import annotations

from pathlib import Path

from cpc_ext.data.images.array_sets import codes_dataset
from cpc_ext.data.images.arrays.npy import read_arrays
from cpc_ext.data.images.dataset import Dataset


def load(data_dir: str | Path, *, image_size: int | None = None) -> Dataset:
    """Open the codes of a .npy or .npz file, or of all below a folder.

    Codes are integers from 0 on, [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3. Labels, classes and parts are
    given as for arrays of images (:mod:`cpc_ext.data.images.arrays.npy`). Codes are read into memory and never resized.

    Raises FileNotFoundError or PermissionError for the files, ValueError if one is damaged, they do not fit together,
    hold no codes, or ``image_size`` differs from their size.
    """
    source, arrays = read_arrays(data_dir)
    dataset = codes_dataset("codes", source, arrays)
    if image_size not in (None, *(() if dataset.image_shape[1] != dataset.image_shape[2] else dataset.image_shape[1:])):
        raise ValueError(f"codes are not resized: they are {list(dataset.image_shape)}, and image_size is {image_size}")
    return dataset
