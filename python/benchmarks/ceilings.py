"""Ceilings of this machine: the rate at which it copies memory, and that at which it multiplies matrices.

Rates of ops are reported as shares of these, measured in the same run. The product is PyTorch's, of square matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from timing import interleaved
from torch import Tensor

__all__ = ["copy_of", "product_flops_per_second"]

# Large enough to keep all cores or multiprocessors busy.
MATRIX_SIDE = {"cpu": 2048, "cuda": 8192}


def copy_of(size_bytes: int, device: torch.device | str) -> Callable[[], Tensor]:
    """Return a call that copies ``size_bytes`` into existing memory; it reads and writes that many bytes each."""
    source = torch.zeros(max(size_bytes // 4, 1), device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


@lru_cache
def product_flops_per_second(precision: str, device: str) -> float:
    """Measure the floating-point operations per second of a matrix product, median of ten.

    precision: a dtype's name, or "tfloat32" for float32 matrices multiplied as TF32, which CUDA convolutions use for
    float32 unless told otherwise.
    """
    dtype = torch.float32 if precision == "tfloat32" else getattr(torch, precision)
    side = MATRIX_SIDE[torch.device(device).type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tfloat32"
    try:
        times = interleaved({"product": lambda: left @ right}, repeats=10, device=device, warmup=1, untimed=1)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return 2 * side**3 / times["product"].median
