"""InfoNCE: how well each query tells its positive key from others, as a cross-entropy and as an accuracy.

From queries [*, M, D], keys [*, N, D] and the index of each query's positive to a loss a query or their weighted mean.
The contrast is against all keys, or against S sampled ones of each query, which are gathered instead of scoring all N.
"""

from __future__ import annotations

import math
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["InfoNCEOutput", "info_nce", "info_nce_reference"]

_INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
_REDUCTIONS = ("mean", "sum", "none")


class InfoNCEOutput(NamedTuple):
    """What :func:`info_nce` returns.

    Attributes:
        loss: scalar in nats, or one value a query, [*, M], under ``reduction="none"``; float32, float64 for float64.
        accuracy: (weighted) fraction of the queries whose positive scores highest, or one 0 or 1 a query under
            ``reduction="none"``; of the loss's dtype, without gradient.
    """

    loss: Tensor
    accuracy: Tensor


def info_nce(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None = None,
    *,
    negatives: Tensor | None = None,
    scale: float = 1.0,
    weights: Tensor | None = None,
    exclude: Tensor | None = None,
    reduction: str = "mean",
) -> InfoNCEOutput:
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equation 4) with dot products as scores.

    The loss of query m is ``-log softmax(scale * queries[m] @ keys[contrasted].T)`` at its positive. A sampled negative
    that happens to be the positive key is contrasted like any other, as published. Logits and sums are float32 for
    half-precision inputs.

    A query counts as right in the accuracy where its positive scores strictly above every other key contrasted. So a
    tie is wrong, and a collapsed encoder scores 0; copies of the positive key among the negatives do not count.

    Args:
        queries: [*, M, D], floating. M may be 0.
        keys: [*, N, D], the leading dimensions those of the queries: each batch entry contrasts its own keys. Queries
            and keys of different dtypes are promoted to their common one.
        targets: [*, M] integers, the index of each query's positive key. Default: key m for query m.
        negatives: [*, M, S] integers, the keys each query is contrasted with besides its positive. Default: all keys.
        scale: factor of the dot products, an inverse temperature.
        weights: [*, M] non-negative weights of the queries. Default: all 1.
        exclude: [*, M] integers, one key to leave out of each query's contrast (itself, say); not its positive.
        reduction: "mean" (sum of w * loss over sum of w; 0 where the weights sum to 0 or M is 0), "sum" (of w * loss)
            or "none" (w * loss of every query).

    Returns:
        :class:`InfoNCEOutput` (loss, accuracy). The loss is differentiable in queries and keys.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
        IndexError: an index that names no key. Only the CPU looks at indices and weights, since looking would stall
            another device's stream; there indices are clamped to the keys.
    """
    _check_arguments(queries, keys, targets, negatives, scale, weights, exclude, reduction)
    num_keys = keys.shape[-2]
    targets = _checked_indices("targets", targets, num_keys)
    negatives = _checked_indices("negatives", negatives, num_keys)
    exclude = _checked_indices("exclude", exclude, num_keys)
    _check_exclude(exclude, targets)
    _check_weights(weights)
    return info_nce_reference(
        queries,
        keys,
        targets,
        negatives=negatives,
        scale=float(scale),
        weights=weights,
        exclude=exclude,
        reduction=reduction,
    )


def info_nce_reference(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None = None,
    *,
    negatives: Tensor | None = None,
    scale: float = 1.0,
    weights: Tensor | None = None,
    exclude: Tensor | None = None,
    reduction: str = "mean",
) -> InfoNCEOutput:
    """:func:`info_nce` with its logits in memory ([*, M, N], or gathered keys [*, M, S, D]), arguments unchecked."""
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    queries, keys = queries.to(dtype) * scale, keys.to(dtype)
    if targets is None:
        targets = torch.arange(queries.shape[-2], device=queries.device).expand(queries.shape[:-1])
    if negatives is None:
        logits = queries @ keys.mT
        positive = logits.gather(-1, targets.unsqueeze(-1))
        contrasted = torch.arange(keys.shape[-2], device=keys.device)
    else:
        contrasted = torch.cat([targets.unsqueeze(-1), negatives], dim=-1)
        logits = (_gather_keys(keys, contrasted) @ queries.unsqueeze(-1)).squeeze(-1)
        positive = logits[..., :1]
    if exclude is not None:
        logits = logits.masked_fill(contrasted == exclude.unsqueeze(-1), -math.inf)
    losses = torch.logsumexp(logits, dim=-1) - positive.squeeze(-1)
    with torch.no_grad():
        right = ((positive > logits) | (contrasted == targets.unsqueeze(-1))).all(-1).to(dtype)
    return _reduce(losses, right, weights, reduction)


def _gather_keys(keys: Tensor, indices: Tensor) -> Tensor:
    """keys [*, N, D] at indices [*, M, S] → [*, M, S, D]."""
    num_keys, dim = keys.shape[-2:]
    batch = keys.shape[:-2].numel()
    first = torch.arange(batch, device=keys.device).mul_(num_keys).view(*keys.shape[:-2], 1, 1)
    # An embedding look-up, because its backward sums the gradients of repeated keys far faster than indexing's.
    return F.embedding(indices + first, keys.reshape(batch * num_keys, dim))


def _reduce(losses: Tensor, right: Tensor, weights: Tensor | None, reduction: str) -> InfoNCEOutput:
    weights = torch.ones_like(right) if weights is None else weights.to(losses.dtype)
    weighted = weights * losses
    if reduction == "none":
        return InfoNCEOutput(weighted, right)
    total = weights.sum()
    total = torch.where(total > 0, total, torch.ones_like(total))
    accuracy = (weights * right).sum().detach() / total.detach()
    return InfoNCEOutput(weighted.sum() / total if reduction == "mean" else weighted.sum(), accuracy)


def _check_arguments(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None,
    negatives: Tensor | None,
    scale: float,
    weights: Tensor | None,
    exclude: Tensor | None,
    reduction: str,
) -> None:
    for name, value in (("queries", queries), ("keys", keys)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating, got {value.dtype}")
        if value.dtype.itemsize < 2:
            raise TypeError(f"{name} must be floating with 16 bits or more, got {value.dtype}")
        _check_layout(name, value)
        if value.ndim < 2:
            size = "M" if name == "queries" else "N"
            raise ValueError(f"{name} must be [*, {size}, D], got shape {tuple(value.shape)}")
    if queries.shape[:-2] != keys.shape[:-2] or queries.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"keys must have the leading dimensions and the D of queries {tuple(queries.shape)}, "
            f"got {tuple(keys.shape)}"
        )
    if keys.device != queries.device:
        raise ValueError(f"keys must be on the queries' device {queries.device}, got {keys.device}")
    if targets is None and queries.shape[-2] > keys.shape[-2]:
        raise ValueError(
            f"targets is needed where there are more queries ({queries.shape[-2]}) than keys ({keys.shape[-2]})"
        )
    rows = queries.shape[:-1]
    _check_per_query("targets", targets, rows, queries.device)
    _check_per_query("negatives", negatives, (*rows, "S"), queries.device)
    _check_per_query("exclude", exclude, rows, queries.device)
    _check_per_query("weights", weights, rows, queries.device, floating=True)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    # Unlike math.isfinite, which cannot take integers beyond a float's range, also comparable with those.
    if not abs(scale) <= sys.float_info.max:
        raise ValueError(f"scale must be finite, got {scale}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def _check_per_query(
    name: str, value: Tensor | None, shape: tuple[int | str, ...], device: torch.device, *, floating: bool = False
) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name} must be floating, got {value.dtype}")
    if not floating and value.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    _check_layout(name, value)
    if value.ndim != len(shape) or any(
        size not in (actual, "S") for size, actual in zip(shape, value.shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape ({', '.join(map(str, shape))}), got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on the queries' device {device}, got {value.device}")


def _check_layout(name: str, value: Tensor) -> None:
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")


def _checked_indices(name: str, indices: Tensor | None, num_keys: int) -> Tensor | None:
    if indices is None:
        return None
    indices = indices.to(torch.int64)
    if indices.device.type != "cpu":
        return indices.clamp(0, max(num_keys - 1, 0))
    if indices.numel():
        low, high = (int(value) for value in indices.aminmax())
        if low < 0 or high >= num_keys:
            raise IndexError(f"{name} must be in 0..{num_keys - 1} for {num_keys} keys, got {low}..{high}")
    return indices


def _check_exclude(exclude: Tensor | None, targets: Tensor | None) -> None:
    if exclude is None or exclude.device.type != "cpu":
        return
    positives = torch.arange(exclude.shape[-1]) if targets is None else targets
    if bool((exclude == positives).any()):
        raise ValueError("exclude must not name the positive key of a query")


def _check_weights(weights: Tensor | None) -> None:
    # While compiling, looking would break the graph.
    if weights is None or weights.device.type != "cpu" or torch.compiler.is_compiling():
        return
    # In float64, because not every floating type compares.
    if weights.numel() and (lowest := weights.detach().double().min().item()) < 0:
        raise ValueError(f"weights must not be negative, got {lowest}")
