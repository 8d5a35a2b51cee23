"""Normalisation of vectors of any finite length to length 1."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext.ops._library import in_forward_mode, is_plain

__all__ = ["unit_length"]

# For lengths between these, squares of significant entries neither overflow nor underflow in float32.
_SHORTEST, _LONGEST = 1e-12, 1e15


def unit_length(vectors: Tensor, dim: int = -1) -> Tensor:
    """Divide vectors along ``dim``, of any finite length, by their Euclidean norm; zero vectors stay zeros.

    A zero vector, which has no direction, gets a gradient of 0.

    Unlike in :func:`torch.nn.functional.normalize`, squares neither overflow nor underflow, and short vectors do not
    count as zeros: entries are first divided by the largest of their vector. The CPU skips this step if all lengths are
    moderate; other devices do not check.
    """
    if vectors.shape[dim] == 0:
        return vectors
    if _may_look_at(vectors):
        lengths = torch.linalg.vector_norm(vectors.detach(), dim=dim, keepdim=True)
        shortest, longest = torch.aminmax(lengths)
        if shortest.item() >= _SHORTEST and longest.item() <= _LONGEST:
            return _divided(vectors, lengths, dim)
    return _of_any_length(vectors, dim)


def _of_any_length(vectors: Tensor, dim: int) -> Tensor:
    largest = vectors.detach().abs().amax(dim, keepdim=True)
    # Detached, as the result does not depend on it. Zeros are divided by infinity, which leaves no gradient.
    return F.normalize(vectors / torch.where(largest == 0, torch.inf, largest), dim=dim)


def _may_look_at(vectors: Tensor) -> bool:
    """Return whether lengths may be read, and no tangents have to be propagated."""
    return (
        vectors.is_cpu
        and vectors.dtype in (torch.float32, torch.float64)
        and vectors.numel() > 0
        and is_plain(vectors)
        and not in_forward_mode()
    )


class _Divided(torch.autograd.Function):
    """Vectors divided by their lengths. PyTorch's own graph of that makes a dozen passes over the vectors."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, lengths: Tensor, dim: int) -> Tensor:
        units = vectors / lengths
        ctx.save_for_backward(vectors, units, lengths)
        ctx.dim = dim
        return units

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        vectors, units, lengths = ctx.saved_tensors
        if torch.is_grad_enabled():  # A graph of the gradient is requested.
            lengths = torch.linalg.vector_norm(vectors, dim=ctx.dim, keepdim=True)
            units = vectors / lengths
        along = torch.linalg.vecdot(gradient, units, dim=ctx.dim).unsqueeze(ctx.dim)
        return torch.addcmul(gradient, units, along, value=-1) / lengths, None, None


_divided: Callable[[Tensor, Tensor, int], Tensor] = _Divided.apply
