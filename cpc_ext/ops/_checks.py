"""Checks of arguments that ops share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_dense", "dtype_name"]


def check_dense(name: str, value: object) -> Tensor:
    """The value, a tensor with strides; TypeError where it is none."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    return value


def dtype_name(dtype: torch.dtype) -> str:
    """A type's name without the module's."""
    return str(dtype).removeprefix("torch.")
