"""Writing of arrays in NumPy's format that raises an error if the disk is full."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

__all__ = ["write_npy"]


def write_npy(file: BinaryIO, array: np.ndarray) -> None:
    """Write an array as numpy.save does, but raise OSError if the disk is full, which numpy.save ignores."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)
