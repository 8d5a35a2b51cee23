"""Arrays in NumPy's files: .npy files are memory-mapped, .npz files are read.

The names of files and arrays say what they hold: x, images or data, and y, labels or targets; train, test, val,
unlabeled; classes. Exports of Keras (x_train ...), MedMNIST (train_images ...) and others follow this.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from cpc_ext.data.images.array_sets import arrays_dataset, named_arrays
from cpc_ext.data.images.dataset import Dataset
from cpc_ext.data.images.source_files import SourceFiles, source_files

_WHAT = ("array file", "array files")


def load(data_dir: str | Path, *, image_size: int | None = None) -> Dataset:
    """Open the arrays of a .npy or .npz file, or of all below a folder.

    Images are [N, H, W], [N, H, W, C] or [N, C, H, W] with C 1 or 3: uint8, integers from 0 to 255, uint16, or floating
    point from 0 to 1. Labels are [N], integers or names; -1 means no label. An array of classes, if given, has their
    names. Images of the right type and size are viewed without a copy, others are converted once into the cache.
    Without images to test on, a tenth of each class is held out.

    image_size: side in pixels, see :func:`cpc_ext.data.images.folders.folder.load`.

    Raises FileNotFoundError or PermissionError for the files, ValueError if one is damaged or they do not fit together,
    OSError if the cache cannot be written.
    """
    source, arrays = read_arrays(data_dir)
    return arrays_dataset("npy", source, arrays, image_size, ("NumPy", np.__version__))


def read_arrays(data_dir: str | Path) -> tuple[SourceFiles, dict[str, Any]]:
    """Read the arrays of a .npy or .npz file, or of all below a folder, by name. Raises what :func:`load` raises."""
    source = source_files(data_dir, _WHAT, (".npy", ".npz"), f"NumPy {np.__version__}")
    arrays: dict[str, Any] = {}
    for file in source.files:
        arrays |= named_arrays(source, file.path, _read(source.root / file.path))
    return source, arrays


def _read(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a file by name, with "" for that of a .npy file. Raises ValueError if it is damaged."""
    try:
        # NumPy can map .npy files only.
        found = np.load(path, mmap_mode="r" if path.suffix.lower() == ".npy" else None, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return {"": found}
        with found:
            return {name: found[name] for name in found.files}
    except FileNotFoundError:
        raise
    except (EOFError, OSError, ValueError, SyntaxError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error) or "Python objects" in str(error):
            raise ValueError(f"{path}: holds Python objects, or no arrays at all; save numbers of one shape") from None
        raise ValueError(f"{path}: damaged, or no file of NumPy's: {error}") from None
