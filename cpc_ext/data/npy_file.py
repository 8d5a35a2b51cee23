"""Arrays in NumPy's format, written so that a full disk is an error."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

__all__ = ["write_npy"]


def write_npy(file: BinaryIO, array: np.ndarray) -> None:
    """Write what numpy.save does, which takes no notice of a disk that is full. OSError where writing fails."""
    array = np.ascontiguousarray(array)
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    file.write(array.data)
