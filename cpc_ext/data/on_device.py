"""Transfer of data to the training device: a whole array that is kept there, or batches sent while it computes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Share of the free device memory that a resident set may take; the rest is left to the model.
RESIDENT_SHARE = 0.25
UPLOAD_BYTES = 256 << 20


def fits(array: np.ndarray, device: torch.device) -> bool:
    """Return whether to keep an array on the device: on CUDA, if it takes at most a quarter of the free memory."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return bool(array.nbytes <= RESIDENT_SHARE * free)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy a whole array to the device, part by part, so that a mapped file is never in memory as a whole."""
    resident = torch.empty(array.shape, dtype=torch.from_numpy(array[:0].copy()).dtype, device=device)
    step = max(1, UPLOAD_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        # Copied first, because PyTorch warns of read-only arrays such as a mapped file.
        resident[start : start + step] = torch.from_numpy(array[start : start + step].copy())
    return resident


def send(given: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Copy an array or a CPU tensor to the device without making the CPU wait.

    The copy to CUDA goes through pinned memory while the device computes.
    """
    tensor = given if isinstance(given, Tensor) else torch.from_numpy(given)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def require_indices(name: str, indices: object, count: int) -> np.ndarray:
    """Return indices as int64 [B]. Raises IndexError if one is not in 0..count-1, TypeError if they are no integers."""
    found = np.asarray(indices)
    if found.size == 0:
        found = found.astype(np.int64)
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise TypeError(f"{name}: expected integers [B], got {found.dtype} {list(found.shape)}")
    if found.size and not (found.min() >= 0 and found.max() < count):
        raise IndexError(f"{name}: expected 0..{count - 1}, got {found.min()}..{found.max()}")
    return found.astype(np.int64)
