"""InfoNCE: the cross-entropy, accuracy and rank of each query's positive keys among other keys.

Queries [*, M, D], keys [*, N, D] and the indices of each query's positives give losses or their weighted mean. A query
is contrasted with all keys, or those that ranges, groups and exclusions leave, or with S sampled ones, which are
gathered instead of scoring all N. The matrix of scores is never in memory, except for a bounded part of that of a
symmetric contrast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpc_ext.ops import _contrast_reference as plain
from cpc_ext.ops._contrast import contrast as run_contrast
from cpc_ext.ops._contrast import reduced
from cpc_ext.ops._contrast_arguments import ContrastOptions, check_arguments, flat_problem
from cpc_ext.ops._library import values_at_hand

__all__ = ["InfoNCEOutput", "info_nce", "info_nce_reference"]


class InfoNCEOutput(NamedTuple):
    """Results of :func:`info_nce`.

    Attributes:
        loss: scalar in nats, or with ``reduction="none"`` one value per query, [*, M]; float32, or float64 for float64
            inputs.
        accuracy: (weighted) fraction of the queries of rank 0, or with ``reduction="none"`` 0 or 1 for each query; of
            the loss's dtype, without gradient.
        rank: [*, M] int64, the number of contrasted keys, not counting positives, that score at least as high as the
            query's best positive.
    """

    loss: Tensor
    accuracy: Tensor
    rank: Tensor


def info_nce(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None = None,
    *,
    negatives: Tensor | None = None,
    scale: float | Tensor = 1.0,
    weights: Tensor | None = None,
    exclude: Tensor | None = None,
    key_range: Tensor | None = None,
    key_bias: Tensor | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
    contrast: str = "all",
    symmetric: bool = False,
    reduction: str = "mean",
) -> InfoNCEOutput:
    """Compute InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equation 4) with dot products as scores.

    Query m has positives P_m, the keys that ``targets`` names, and contrasts them with C_m: all keys that ``exclude``,
    ``key_range`` and ``groups`` leave, or its sampled ``negatives`` that they leave. With ``s_mn = scale * q_m . k_n +
    key_bias_n`` and D_m the union of C_m and P_m (with sampled negatives, each draw counts as a key of its own),

        ``loss_m = log(sum of exp(s_mn) over n in D_m) - mean of s_mp over p in P_m``.

    With several positives that is the L_out of supervised contrast (Khosla et al. 2020, arXiv 2004.11362, equation 2).
    Scores and sums are float32 for half-precision inputs.

    The accuracy counts a query as correct if its best positive scores strictly above every other key of C_m. So a tie
    is wrong, and a collapsed encoder scores 0; copies of the positive key among the negatives do not count.

    Args:
        queries: [*, M, D], floating. M may be 0.
        keys: [*, N, D], the leading dimensions those of the queries: each batch entry contrasts its own keys. Queries
            and keys of different dtypes are promoted to their common one. Where they are the same tensor object, the
            CPU computes each pair only once, under conditions that docs/info_nce.md lists.
        targets: [*, M] or [*, M, P] integers, the indices of each query's positive keys, -1 for none; a key named twice
            counts once. A query without positives counts as one of weight 0. Default: key m for query m.
        negatives: [*, M, S] integers, the keys each query is contrasted with besides its positives. Default: all keys.
        scale: factor of the dot products, an inverse temperature: a number, or a tensor without dimensions, which may
            have a gradient. It is never rounded to half precision.
        weights: [*, M] non-negative weights of the queries. Default: all 1. A query of weight 0 is absent: whatever it
            and its keys hold, even NaN, it adds nothing to the loss, the accuracy and the gradients, and gets none.
        exclude: [*, M] or [*, M, E] integers, keys to leave out of each query's contrast (such as itself), -1 for none;
            they must not include its positives.
        key_range: [*, M, 2] integers, begin and end: query m contrasts the keys begin, ..., end - 1, and its positives
            wherever they are. A query whose range is empty has a loss of 0.
        key_bias: [*, N] floating, added to the scores of each key, such as minus the log of its sampling frequency.
        groups: integers [*, M] and [*, N], the groups of queries and keys. Under ``contrast="same"`` a query contrasts
            only keys of its own group, under ``"other"`` only those of other groups; its positives may be of any group.
            A query that this leaves no other key has a loss of 0.
        contrast: "all", or with ``groups`` "same" or "other".
        symmetric: whether to contrast in both directions: the loss is then the mean of the one above and that of the
            transposed scores, in which key n contrasts its query with the queries that contrast key n. The scores are
            computed once. This requires as many keys as queries, one positive each (targets are a permutation), and no
            negatives. A query of weight 0 is contrasted by no key, and its own loss counts in neither direction.
            Accuracy and rank are those of the queries.
        reduction: "mean" (sum of w * loss over sum of w; 0 where the weights sum to 0 or M is 0), "sum" (of w * loss)
            or "none" (w * loss of every query).

    Returns:
        :class:`InfoNCEOutput` (loss, accuracy, rank). The loss is differentiable once, in reverse mode, in queries,
        keys, weights, scale and key_bias. Under autocast queries and keys are rounded to its dtype, as for a matrix
        product; sums are not. On CUDA products of float32 values are exact to 2^-20 of each, unless
        ``torch.backends.cuda.matmul.fp32_precision`` is "tf32", or an older switch that it reflects says the same. In
        float16 on CUDA, pairs whose weight is 2^-39 of the largest add nothing to the gradients of queries and keys.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
        IndexError: an index or range outside of the keys. Only the CPU checks the values of indices, scales and
            weights, since reading them would stall another device's stream. There such a query has NaN as its loss and
            gradient and -1 as its rank, counts as wrong, and adds nothing to the keys' gradient; so does a query whose
            ``exclude`` names a positive. Where symmetric targets are not a permutation, all losses are NaN.
        NotImplementedError: forward-mode derivatives.
        RuntimeError: second derivatives, when the gradient is differentiated.
    """
    options = ContrastOptions(
        scale, targets, negatives, weights, exclude, key_range, key_bias, groups, contrast, symmetric
    )
    if symmetric and targets is not None:
        check_arguments(queries, keys, options, "softmax", reduction)
        return _permuted(info_nce, queries, keys, options, reduction)
    result = run_contrast(queries, keys, options, reduction=reduction)
    return _output(result.loss, result.accuracy, result.rank, queries, reduction)


def _output(loss: Tensor, accuracy: Tensor, rank: Tensor, queries: Tensor, reduction: str) -> InfoNCEOutput:
    rows = queries.shape[:-1]
    if rank.ndim != len(rows):
        rank = rank.view(rows)
        if reduction == "none":
            loss, accuracy = loss.view(rows), accuracy.view(rows)
    return InfoNCEOutput(loss, accuracy.detach() if accuracy.requires_grad else accuracy, rank)


def _permuted(
    contrast: Callable[..., InfoNCEOutput], queries: Tensor, keys: Tensor, options: ContrastOptions, reduction: str
) -> InfoNCEOutput:
    """Compute a symmetric contrast with targets, by putting the queries into the order of their positives."""
    targets = options.targets
    assert targets is not None
    targets = targets.to(torch.int64)
    order = targets.argsort(-1)
    ordered = targets.gather(-1, order)
    right = (ordered == torch.arange(targets.shape[-1], device=targets.device)).all()
    if values_at_hand(right) and not bool(right):
        raise ValueError("symmetric needs targets that are a permutation of the keys")

    def in_order(values: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
        """Put [*, M, ...] into the order of the keys. dtype: to convert to, as not all integers can be gathered."""
        if values is None:
            return None
        if dtype is not None:
            values = values.to(dtype)
        index = order.reshape(*order.shape, *[1] * (values.ndim - order.ndim)).expand(values.shape)
        return values.gather(order.ndim - 1, index)

    groups = options.groups
    if groups is not None:
        groups = groups[0].to(torch.int64).gather(-1, order), groups[1]
    rows = order.unsqueeze(-1).expand(queries.shape)
    result = contrast(
        torch.where(right, queries.gather(-2, rows), torch.nan),
        keys,
        scale=options.scale,
        weights=in_order(options.weights),
        exclude=in_order(options.exclude, torch.int64),
        key_range=in_order(options.key_range, torch.int64),
        key_bias=options.key_bias,
        groups=groups,
        contrast=options.contrast,
        symmetric=True,
        reduction=reduction,
    )
    back = order.argsort(-1)
    loss, accuracy = result.loss, result.accuracy
    if reduction == "none":
        loss, accuracy = loss.gather(-1, back), accuracy.gather(-1, back)
    return InfoNCEOutput(loss, accuracy, result.rank.gather(-1, back))


def info_nce_reference(
    queries: Tensor, keys: Tensor, targets: Tensor | None = None, *, reduction: str = "mean", **options: Any
) -> InfoNCEOutput:
    """:func:`info_nce` with its scores in memory ([*, M, N], or gathered keys [*, M, S, D]), arguments unchecked."""
    given = ContrastOptions(targets=targets, **options)
    if given.symmetric and targets is not None:
        return _permuted(info_nce_reference, queries, keys, given, reduction)
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    problem, weights = flat_problem(queries.to(dtype), keys.to(dtype), given, "softmax")
    losses, rank = plain.losses_and_ranks(problem, None if weights is None else weights != 0)
    return _output(*reduced(losses, rank, weights, reduction), rank, queries, reduction)
