"""The logarithm of a number of keys, which may be a symbolic size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["log_count"]


def log_count(count: int, like: Tensor) -> float | Tensor:
    """Return the natural logarithm of a number of keys, or of 1 if there are none.

    While torch.compile or torch.export trace, the result is a scalar tensor with the dtype and device of ``like``:
    math.log would make a constant of a symbolic size.
    """
    if torch.compiler.is_compiling():
        return like.new_full((), count).clamp(min=1).log()
    return math.log(max(count, 1))
