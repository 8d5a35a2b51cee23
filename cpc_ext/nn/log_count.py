"""The logarithm of how many keys are contrasted, where their number may be an open size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["log_count"]


def log_count(count: int, like: Tensor) -> float | Tensor:
    """The natural logarithm of a number of keys, or of 1 where there are none.

    While torch.compile or torch.export trace, it is a scalar tensor of another's type and device: of an open size
    math.log would make a constant.
    """
    if torch.compiler.is_compiling():
        return like.new_full((), count).clamp(min=1).log()
    return math.log(max(count, 1))
