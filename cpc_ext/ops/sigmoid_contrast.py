"""SigLIP's loss: a binary classification of every pair of a query and a key as matching or not.

Queries [*, M, D] and keys [*, N, D] give a scalar, without the scores in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpc_ext.ops import _contrast_reference as plain
from cpc_ext.ops._contrast import contrast as run_contrast
from cpc_ext.ops._contrast import reduced
from cpc_ext.ops._contrast_arguments import ContrastOptions, check_number, flat_problem

__all__ = ["sigmoid_contrast", "sigmoid_contrast_reference"]


def sigmoid_contrast(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Compute the pairwise sigmoid loss (Zhai et al. 2023, arXiv 2303.15343, equation 1).

    ``loss_m = -sum of log sigmoid(z_mn * (scale * q_m . k_n + bias)) over all n``, where z_mn is 1 for the keys n that
    are positives of query m, and -1 for all others. The mean over queries is the published loss.

    Args:
        queries: [*, M, D], floating.
        keys: [*, N, D].
        targets: [*, M] or [*, M, P] integers, the indices of each query's positive keys, -1 for none; a query without
            positives counts as one of weight 0. Default: key m for query m.
        scale: number or tensor without dimensions, with or without gradient.
        bias: likewise; added to all scores. The published initial value is -10.
        weights: [*, M] non-negative weights of the queries; see :func:`cpc_ext.ops.info_nce`.
        reduction: "mean" over queries, "sum", or "none" for one value per query, [*, M].

    Returns:
        The loss, in float32, or float64 for float64 inputs; differentiable once, in reverse mode.

    Raises:
        TypeError, ValueError, IndexError: as :func:`cpc_ext.ops.info_nce`.
    """
    check_number("bias", bias)
    options = _options(queries, keys, targets, scale, bias, weights)
    loss = run_contrast(queries, keys, options, measure="sigmoid", reduction=reduction).loss
    return loss.view(queries.shape[:-1]) if reduction == "none" else loss


def _options(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None = None,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    weights: Tensor | None = None,
) -> ContrastOptions:
    """Return the options of a contrast whose keys all have the same bias."""
    key_bias = None
    sound = isinstance(queries, Tensor) and isinstance(keys, Tensor) and keys.ndim >= 2  # Otherwise refused later.
    if sound and (isinstance(bias, Tensor) or bias != 0):
        dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
        key_bias = torch.as_tensor(bias, dtype=dtype, device=keys.device).expand(keys.shape[:-1])
    return ContrastOptions(scale, targets, weights=weights, key_bias=key_bias)


def sigmoid_contrast_reference(
    queries: Tensor, keys: Tensor, targets: Tensor | None = None, *, reduction: str = "mean", **options: Any
) -> Tensor:
    """:func:`sigmoid_contrast` with its scores [*, M, N] in memory, arguments unchecked."""
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    given = _options(queries, keys, targets, **options)
    problem, weights = flat_problem(queries.to(dtype), keys.to(dtype), given, "sigmoid")
    loss, _ = reduced(*plain.losses_and_ranks(problem), weights, reduction)
    return loss.view(queries.shape[:-1]) if reduction == "none" else loss
