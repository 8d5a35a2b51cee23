"""Random values of problems, the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["integers", "normal", "uniform"]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    """Return float64 values of a standard normal distribution."""
    return torch.randn(shape, dtype=torch.float64, generator=_generator(seed))


def uniform(*shape: int, seed: int) -> Tensor:
    """Return uniform float64 values in 0..1."""
    return torch.rand(shape, dtype=torch.float64, generator=_generator(seed))


def integers(end: int, *shape: int, seed: int) -> Tensor:
    """Return uniform int64 values in 0..end - 1."""
    return torch.randint(end, shape, generator=_generator(seed))
