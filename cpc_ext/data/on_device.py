"""Arrays and batches on the training device: kept there whole where they fit, or sent while it computes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Share of the free device memory that a resident set may take; the rest is the model's.
RESIDENT_SHARE = 0.25
UPLOAD_BYTES = 256 << 20


def fits(array: np.ndarray, device: torch.device) -> bool:
    """Whether an array is to be kept on the device: on CUDA where it takes at most a quarter of the free memory."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return bool(array.nbytes <= RESIDENT_SHARE * free)


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """The whole array on the device, copied part by part, so that a mapped file is never in memory as a whole."""
    resident = torch.empty(array.shape, dtype=torch.from_numpy(array[:0].copy()).dtype, device=device)
    step = max(1, UPLOAD_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        # A copy, as PyTorch warns of read-only arrays such as a mapped file.
        resident[start : start + step] = torch.from_numpy(array[start : start + step].copy())
    return resident


def send(given: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """What a batch needs, an array or a tensor on the CPU, on the device, without making the CPU wait for that.

    To CUDA it travels through pinned memory while the device computes.
    """
    tensor = given if isinstance(given, Tensor) else torch.from_numpy(given)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def require_indices(name: str, indices: object, count: int) -> np.ndarray:
    """Indices below count, as int64 [B]. IndexError where one is not, TypeError where they are no integers."""
    found = np.asarray(indices)
    if found.size == 0:
        found = found.astype(np.int64)
    if found.dtype.kind not in "iu" or found.ndim != 1:
        raise TypeError(f"{name}: expected integers [B], got {found.dtype} {list(found.shape)}")
    if found.size and not (found.min() >= 0 and found.max() < count):
        raise IndexError(f"{name}: expected 0..{count - 1}, got {found.min()}..{found.max()}")
    return found.astype(np.int64)
