"""Vectors brought to length 1, whatever length they have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext.ops._library import in_forward_mode, is_plain

__all__ = ["unit_length"]

# Between these, squares of entries that matter neither overflow nor vanish in float32.
_SHORTEST, _LONGEST = 1e-12, 1e15


def unit_length(vectors: Tensor, dim: int = -1) -> Tensor:
    """Vectors along ``dim``, of any finite length, divided by their Euclidean norm; zero vectors stay zeros.

    A zero vector, which has no direction, gets no gradient either.

    Other than with :func:`torch.nn.functional.normalize`, squares neither overflow nor vanish, and short vectors are
    not taken for zeros: entries are first divided by the largest of their vector. Where all lengths are moderate, which
    only the CPU looks up, that is left out.
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
    # A constant: the result does not depend on it. Zeros are divided by infinity, which leaves no gradient.
    return F.normalize(vectors / torch.where(largest == 0, torch.inf, largest), dim=dim)


def _may_look_at(vectors: Tensor) -> bool:
    """Whether lengths may be looked up, and tangents need not be carried on."""
    return (
        vectors.is_cpu
        and vectors.dtype in (torch.float32, torch.float64)
        and vectors.numel() > 0
        and is_plain(vectors)
        and not in_forward_mode()
    )


class _Divided(torch.autograd.Function):
    """Vectors divided by their lengths: PyTorch's own graph of that goes over the vectors a dozen times."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, lengths: Tensor, dim: int) -> Tensor:
        units = vectors / lengths
        ctx.save_for_backward(vectors, units, lengths)
        ctx.dim = dim
        return units

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        vectors, units, lengths = ctx.saved_tensors
        if torch.is_grad_enabled():  # A graph of the gradient is asked for.
            lengths = torch.linalg.vector_norm(vectors, dim=ctx.dim, keepdim=True)
            units = vectors / lengths
        along = torch.linalg.vecdot(gradient, units, dim=ctx.dim).unsqueeze(ctx.dim)
        return torch.addcmul(gradient, units, along, value=-1) / lengths, None, None


_divided: Callable[[Tensor, Tensor, int], Tensor] = _Divided.apply
