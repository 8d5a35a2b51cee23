"""What this machine can do at most: how fast it copies memory, and how fast it multiplies matrices.

Ops are reported as a share of these, measured in the same run. The product is PyTorch's, of square matrices.
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
    """A call that copies that many bytes into existing memory: it reads and writes ``size_bytes`` each."""
    source = torch.zeros(max(size_bytes // 4, 1), device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


@lru_cache
def product_flops_per_second(precision: str, device: str) -> float:
    """Floating-point operations a second of a matrix product, median of ten.

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
