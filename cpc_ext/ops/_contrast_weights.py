"""Weights of the queries of a contrast in its mean or sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.ops._library import may_need_gradients, register, values_at_hand, with_workspace

__all__ = [
    "Weigh",
    "total_weight",
    "weigh",
    "weigh_by_kernel",
    "weigh_plainly",
    "weights_of_present",
    "weights_of_rows",
]


# A function of targets [B, M, P] and weights [B, M], one of which may be None, the dtype of sums, and whether to divide
# by the sum of the weights. It returns the weights of the queries, [B, M], 0 for those without a positive.
Weigh = Callable[[Tensor | None, Tensor | None, torch.dtype, bool], Tensor]


def weigh_plainly(targets: Tensor | None, weights: Tensor | None, dtype: torch.dtype, mean: bool) -> Tensor:
    """Compute :data:`Weigh` in plain PyTorch, as the op's reference. ValueError without both targets and weights."""
    if targets is not None:
        present = (targets != -1).any(-1)  # The contrast reports indices below -1.
        weights = present.to(dtype) if weights is None else torch.where(present, weights, 0)
    if weights is None:
        raise ValueError("targets or weights must be given")
    if mean:
        return weights / total_weight(weights)
    return weights if targets is not None else weights.clone()


def total_weight(weights: Tensor) -> Tensor:
    """Return the divisor of the weighted mean: the sum of the weights, or 1 where that is 0."""
    total = weights.sum()
    return torch.where(total > 0, total, torch.ones_like(total))


def weights_of_present(
    targets: Tensor | None, weights: Tensor | None, dtype: torch.dtype, weigh: Weigh
) -> Tensor | None:
    """Return the weights of queries, 0 for those without a positive; None if all are 1."""
    if targets is None or (targets.numel() and values_at_hand(targets) and int(targets.min()) >= 0):
        return weights
    if weights is None or not may_need_gradients(weights):
        return weigh(targets, None if weights is None else weights.to(dtype), dtype, False)
    return weigh_plainly(targets, weights, dtype, False)


def weights_of_rows(
    shape: torch.Size, weights: Tensor | None, reduction: str, dtype: torch.dtype, weigh: Weigh
) -> tuple[Tensor | None, float]:
    """Return the weights of the rows' losses in the result: a tensor [B, M], or None for ones, and a common factor."""
    if weights is None:
        return None, 1 / max(shape.numel(), 1) if reduction == "mean" else 1.0
    weights = weights.to(dtype)
    return weigh(None, weights, dtype, True) if reduction == "mean" else weights.contiguous(), 1.0


class _Weights(NamedTuple):
    """Arguments of :data:`Weigh`; csrc/reduction/reduction.h describes them."""

    targets: Tensor | None
    weights: Tensor | None
    dtype: torch.dtype
    mean: bool


def _empty(op: _Weights) -> Tensor:
    if op.weights is not None:
        return torch.empty_like(op.weights, memory_format=torch.contiguous_format)
    if op.targets is None:
        raise ValueError("targets or weights must be given")
    return op.targets.new_empty(op.targets.shape[:-1], dtype=op.dtype)


def weigh_by_kernel(targets: Tensor | None, weights: Tensor | None, dtype: torch.dtype, mean: bool) -> Tensor:
    """Compute :data:`Weigh` by a kernel, as :data:`weigh` does where there is one. ValueError as in the reference."""
    result = _empty(_Weights(targets, weights, dtype, mean))
    given = (None if values is None else values.contiguous() for values in (targets, weights))
    with_workspace(native.info_nce_weights, result, result, *given, mean)
    return result


weigh = register(
    "info_nce_weights",
    _Weights,
    Tensor,
    reference=lambda op: weigh_plainly(*op),
    kernel=lambda op: weigh_by_kernel(*op),
    fake=_empty,
)
