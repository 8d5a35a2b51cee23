"""The problem that the contrast's kernels and its reference both solve, and what they share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Contrast", "Gradients", "absent_queries", "default_targets", "sums_dtype", "weighted"]


class Contrast(NamedTuple):
    """A contrast as csrc/info_nce/info_nce.h describes it; what it is given to may take it without B, too.

    Attributes:
        queries, keys: [B, M, D] and [B, N, D]. Without keys, the queries are contrasted with each other, and their
            gradient is that of both.
        targets: [B, M, P], -1 for none; no query's name a key twice. None: key m for query m.
        negatives: [B, M, S]. None: all keys.
        exclude: [B, M, E], -1 for none.
        key_range: [B, M, 2].
        query_groups, key_groups: [B, M] and [B, N].
        key_bias: [B, N].
        scales: [1], a factor of ``scale`` that has a gradient or is known on its device only.
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
        """What the queries are contrasted with, [B, N, D]."""
        return self.queries if self.keys is None else self.keys


class Gradients(NamedTuple):
    """Empty where they are not formed; that of biases is of the sums' type."""

    queries: Tensor
    keys: Tensor
    bias: Tensor


def sums_dtype(queries: Tensor) -> torch.dtype:
    return torch.float64 if queries.dtype == torch.float64 else torch.float32


def default_targets(queries: Tensor) -> Tensor:
    """Key m for query m, [*, M, 1]."""
    rows = torch.arange(queries.shape[-2], device=queries.device)
    return rows.expand(queries.shape[:-1]).unsqueeze(-1)


def weighted(weights: Tensor, losses: Tensor) -> Tensor:
    return weights * torch.where(absent_queries(weights, losses), 0, losses)


def absent_queries(weights: Tensor, losses: Tensor) -> Tensor:
    """Which queries of weight 0 are absent because their loss is no number; a finite one has a slope in its weight."""
    return (weights == 0) & ~losses.isfinite()
