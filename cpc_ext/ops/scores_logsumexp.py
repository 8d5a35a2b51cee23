"""The log-sum-exp of each query's scores against many keys, a building block of contrastive losses.

Queries [*, M, D] and keys [*, N, D] give [*, M], without the scores in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cpc_ext.ops import _contrast_reference as plain
from cpc_ext.ops._contrast import contrast as run_contrast
from cpc_ext.ops._contrast_arguments import ContrastOptions, flat_problem

__all__ = ["scores_logsumexp", "scores_logsumexp_reference"]


def scores_logsumexp(
    queries: Tensor,
    keys: Tensor,
    *,
    scale: float | Tensor = 1.0,
    exclude: Tensor | None = None,
    key_range: Tensor | None = None,
    key_bias: Tensor | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
    contrast: str = "all",
) -> Tensor:
    """Return ``log(sum of exp(scale * q_m . k_n + key_bias_n))`` over the keys that each query m contrasts.

    Arguments and errors are those of :func:`cpc_ext.ops.info_nce`; there may be more queries than keys.

    Returns:
        [*, M]; float32, or float64 for float64 inputs. -inf, without a gradient, for a query that contrasts no key.
        Differentiable once, in reverse mode, with any upstream gradient, in queries, keys, scale and key_bias. The
        backward pass computes the scores again.
    """
    options = ContrastOptions(
        scale, exclude=exclude, key_range=key_range, key_bias=key_bias, groups=groups, contrast=contrast
    )
    result = run_contrast(queries, keys, options, measure="log_sum", reduction="none")
    return result.loss.view(queries.shape[:-1])


def scores_logsumexp_reference(queries: Tensor, keys: Tensor, **options: Any) -> Tensor:
    """:func:`scores_logsumexp` with its scores [*, M, N] in memory, arguments unchecked."""
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    problem, _ = flat_problem(queries.to(dtype), keys.to(dtype), ContrastOptions(**options), "log_sum")
    return plain.losses_and_ranks(problem)[0].view(queries.shape[:-1])
