"""Checks of arguments that ops share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DTYPES", "check_dense", "check_floating", "check_integer", "dtype_name", "is_integer"]

# The floating-point types that kernels know.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_dense(name: str, value: object) -> Tensor:
    """Return the value if it is a dense tensor, else raise TypeError."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    return value


def check_floating(name: str, value: object) -> Tensor:
    """Return the value if it is a dense floating-point tensor, else raise TypeError."""
    tensor = check_dense(name, value)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating, got {tensor.dtype}")
    return tensor


def is_integer(value: object) -> bool:
    """Return whether a value is an int, or one that torch.compile or torch.export leave symbolic; a bool is none."""
    return type(value) is int or (isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool))


def check_integer(name: str, value: int, least: int | None = None) -> None:
    """Raise TypeError unless the value is an int, ValueError if it is below ``least``."""
    if not is_integer(value):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")
