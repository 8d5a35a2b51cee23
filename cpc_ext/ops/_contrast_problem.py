"""The problem that the kernels of the contrast and its reference solve, and functions that both share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Contrast", "Gradients", "absent_queries", "default_targets", "sums_dtype", "weighted"]


class Contrast(NamedTuple):
    """A contrast as csrc/info_nce/info_nce.h describes it. The op also takes it without B.

    Attributes:
        queries, keys: [B, M, D] and [B, N, D]. Without keys, the queries are contrasted with each other, and their
            gradient is the sum of those in both places.
        targets: [B, M, P], -1 for none; a query names no key twice. None: key m for query m.
        negatives: [B, M, S]. None: all keys.
        exclude: [B, M, E], -1 for none.
        key_range: [B, M, 2].
        query_groups, key_groups: [B, M] and [B, N].
        key_bias: [B, N].
        scales: [1], a factor of ``scale`` that has a gradient or whose value is on another device than the CPU.
        measure: "softmax", "log_sum" or "sigmoid".
        contrast: "all", "same" or "other".
    """

    queries: Tensor
    keys: Tensor | None
    targets: Tensor | None
    negatives: Tensor | None
    exclude: Tensor | None
    key_range: Tensor | None
    query_groups: Tensor | None
    key_groups: Tensor | None
    key_bias: Tensor | None
    scales: Tensor | None
    scale: float
    measure: str
    contrast: str
    symmetric: bool

    def contrasted(self) -> Tensor:
        """Return the keys that the queries are contrasted with, [B, N, D]."""
        return self.queries if self.keys is None else self.keys


class Gradients(NamedTuple):
    """Gradients, empty where they are not formed; ``bias`` has the dtype of the sums."""

    queries: Tensor
    keys: Tensor
    bias: Tensor


def sums_dtype(queries: Tensor) -> torch.dtype:
    return torch.float64 if queries.dtype == torch.float64 else torch.float32


def default_targets(queries: Tensor) -> Tensor:
    """Return targets [*, M, 1] that name key m for query m."""
    rows = torch.arange(queries.shape[-2], device=queries.device)
    return rows.expand(queries.shape[:-1]).unsqueeze(-1)


def weighted(weights: Tensor, losses: Tensor) -> Tensor:
    return weights * torch.where(absent_queries(weights, losses), 0, losses)


def absent_queries(weights: Tensor, losses: Tensor) -> Tensor:
    """Return which queries of weight 0 are absent: those whose loss, the weight's gradient, is not finite."""
    return (weights == 0) & ~losses.isfinite()
