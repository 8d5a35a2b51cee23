"""InfoNCE: how well each query tells its positive key from others, as a cross-entropy and as an accuracy.

From queries [*, M, D], keys [*, N, D] and the index of each query's positive to a loss a query or their weighted mean.
The contrast is against all keys, or against S sampled ones of each query, which are gathered instead of scoring all N.
Scores are never in memory. The weights of a mean or sum are known beforehand, so the forward pass forms the gradients
with the scores at hand, and the backward pass only scales them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.ops._library import autocast_dtype, refuse_forward_mode, register, tf32_allowed, workspace_of

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
        weights: [*, M] non-negative weights of the queries. Default: all 1. A query of weight 0 is absent: whatever it
            and its keys hold, NaN too, it adds nothing to the loss, the accuracy and the gradients, and gets none.
        exclude: [*, M] integers, one key to leave out of each query's contrast (itself, say); not its positive.
        reduction: "mean" (sum of w * loss over sum of w; 0 where the weights sum to 0 or M is 0), "sum" (of w * loss)
            or "none" (w * loss of every query).

    Returns:
        :class:`InfoNCEOutput` (loss, accuracy). The loss is differentiable once, backwards, in queries, keys and
        weights. Under autocast queries and keys are rounded to its type, as for a matrix product; sums are not. On CUDA
        float32 products are exact unless ``torch.backends.cuda.matmul.fp32_precision`` is "tf32", or an older switch
        that it reflects says the same.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
        IndexError: an index that names no key. Only the CPU looks at indices and weights, since looking would stall
            another device's stream; there such a query's loss is NaN and so is its gradient, it counts as wrong, and
            it gives nothing to the keys' gradient. The same holds of a query whose ``exclude`` names its positive.
        NotImplementedError: forward-mode derivatives.
        RuntimeError: second derivatives, when the gradient is differentiated.
    """
    _check_arguments(queries, keys, targets, negatives, scale, weights, exclude, reduction)
    refuse_forward_mode(queries, keys, weights)
    _check_weights(weights)
    queries, keys = _common_dtype(queries, keys)
    contrast = _flat(queries, keys, targets, negatives, exclude)
    loss, accuracy, *_ = _info_nce(
        *contrast,
        None if weights is None else weights.reshape(contrast.queries.shape[:2]),
        float(scale),
        reduction,
        _needed(queries, keys, weights, reduction),
    )
    if reduction == "none":
        loss, accuracy = loss.view(queries.shape[:-1]), accuracy.view(queries.shape[:-1])
    return InfoNCEOutput(loss, accuracy.detach())


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
    return _reduce(*_each_query(queries, keys, targets, negatives, exclude, scale), weights, reduction)


def _each_query(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None,
    negatives: Tensor | None,
    exclude: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Loss and correctness of every query, [*, M]."""
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    queries, keys = queries.to(dtype) * scale, keys.to(dtype)
    if targets is None:
        targets = _default_targets(queries)
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
    return losses, right


def _default_targets(queries: Tensor) -> Tensor:
    return torch.arange(queries.shape[-2], device=queries.device).expand(queries.shape[:-1])


def _gather_keys(keys: Tensor, indices: Tensor) -> Tensor:
    """keys [*, N, D] at indices [*, M, S] → [*, M, S, D]."""
    num_keys, dim = keys.shape[-2:]
    batch = keys.shape[:-2].numel()
    first = torch.arange(batch, device=keys.device).mul_(num_keys).view(*keys.shape[:-2], 1, 1)
    # An embedding look-up, because its backward sums the gradients of repeated keys far faster than indexing's.
    return F.embedding(indices + first, keys.reshape(batch * num_keys, dim))


def _reduce(losses: Tensor, right: Tensor, weights: Tensor | None, reduction: str) -> InfoNCEOutput:
    weights = torch.ones_like(right) if weights is None else weights.to(losses.dtype)
    weighted = _weighted(weights, losses)
    if reduction == "none":
        return InfoNCEOutput(weighted, right)
    total = weights.sum()
    total = torch.where(total > 0, total, torch.ones_like(total))
    accuracy = (weights * right).sum().detach() / total.detach()
    return InfoNCEOutput(weighted.sum() / total if reduction == "mean" else weighted.sum(), accuracy)


def _weighted(weights: Tensor, losses: Tensor) -> Tensor:
    return weights * torch.where(_absent(weights, losses), 0, losses)


def _absent(weights: Tensor, losses: Tensor) -> Tensor:
    """Which queries of weight 0 are absent because their loss is no number; a finite one has a slope in its weight."""
    return (weights == 0) & ~losses.isfinite()


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


def _check_weights(weights: Tensor | None) -> None:
    # While compiling, looking would break the graph.
    if weights is None or weights.device.type != "cpu" or torch.compiler.is_compiling():
        return
    # In float64, because not every floating type compares.
    if weights.numel() and (lowest := weights.detach().double().min().item()) < 0:
        raise ValueError(f"weights must not be negative, got {lowest}")


def _common_dtype(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of one dtype: that which both are promoted to, or autocast's as of a matrix product."""
    dtype = torch.promote_types(queries.dtype, keys.dtype)
    if dtype != torch.float64:
        dtype = autocast_dtype(queries.device) or dtype
    return queries.to(dtype), keys.to(dtype)


# --- The op, the gradients of given row weights, and the kernels' calls ---


def _sums_dtype(queries: Tensor) -> torch.dtype:
    return torch.promote_types(queries.dtype, torch.float32)


def _row_weights(queries: Tensor, weights: Tensor | None, reduction: str) -> tuple[Tensor | None, float]:
    """What a row's loss counts in the result: a tensor [B, M], or None for ones, times a number."""
    if weights is None:
        return None, 1 / max(queries.shape[:2].numel(), 1) if reduction == "mean" else 1.0
    weights = weights.to(_sums_dtype(queries)).contiguous()
    return weights / _total(weights) if reduction == "mean" else weights, 1.0


def _total(weights: Tensor) -> Tensor:
    total = weights.sum()
    return torch.where(total > 0, total, torch.ones_like(total))


def _results(
    queries: Tensor, losses: Tensor, right: Tensor, weights: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor]:
    """Loss and accuracy, which share no memory with the losses."""
    if reduction == "none":
        return losses.clone() if weights is None else _weighted(weights.to(losses.dtype), losses), right
    if weights is None:
        if losses.numel() == 0:  # Whose mean is no number.
            return losses.sum(), right.sum()
        return losses.mean() if reduction == "mean" else losses.sum(), right.mean()
    weights = weights.to(losses.dtype)
    total = _total(weights)
    loss = _weighted(weights, losses).sum()
    return loss / total if reduction == "mean" else loss, (weights * right).sum() / total


class _Contrast(NamedTuple):
    """Queries [B, M, D], keys [B, N, D], and indices of keys [B, M], [B, M, S] and [B, M], as :func:`info_nce`'s."""

    queries: Tensor
    keys: Tensor
    targets: Tensor | None
    negatives: Tensor | None
    exclude: Tensor | None


class _Forward(NamedTuple):
    """The op's arguments."""

    contrast: _Contrast
    weights: Tensor | None
    scale: float
    reduction: str
    needs: list[bool]  # Whether queries and keys need gradients, and whether weights do, for which the losses are kept.


class _Backward(NamedTuple):
    """Arguments of the op that forms gradients of the sum of the losses times the row weights [B, M]."""

    contrast: _Contrast
    row_weights: Tensor
    scale: float
    needs: list[bool]  # Whether queries and keys need gradients.


class _Gradients(NamedTuple):
    """Empty where they are not formed."""

    queries: Tensor
    keys: Tensor


class _Results(NamedTuple):
    """The first two are :class:`InfoNCEOutput`, the others empty where they are not needed."""

    loss: Tensor
    accuracy: Tensor
    losses: Tensor
    grad_queries: Tensor
    grad_keys: Tensor


class _Kernel(NamedTuple):
    """What native.info_nce takes, in its order."""

    queries: Tensor
    keys: Tensor
    targets: Tensor | None
    negatives: Tensor | None
    exclude: Tensor | None
    row_weights: Tensor | None
    losses: Tensor | None
    right: Tensor | None
    grad_queries: Tensor | None
    grad_keys: Tensor | None
    scale: float
    factor: float
    tf32: bool


def _flat(
    queries: Tensor, keys: Tensor, targets: Tensor | None, negatives: Tensor | None, exclude: Tensor | None
) -> _Contrast:
    """:func:`info_nce`'s arguments with one leading dimension in place of any."""
    leading, (num_queries, dim) = queries.shape[:-2], queries.shape[-2:]
    rows = (leading.numel(), num_queries)

    def indices(value: Tensor | None, *shape: int) -> Tensor | None:
        return None if value is None else value.to(torch.int64).reshape(shape)

    return _Contrast(
        queries.reshape(*rows, dim),
        keys.reshape(rows[0], keys.shape[-2], dim),
        indices(targets, *rows),
        None if negatives is None else indices(negatives, *rows, negatives.shape[-1]),
        indices(exclude, *rows),
    )


def _needed(queries: Tensor, keys: Tensor, weights: Tensor | None, reduction: str) -> list[bool]:
    """What :class:`_Forward` has as ``needs``."""
    if not torch.is_grad_enabled():
        return [False, False, False]
    # Half-precision gradients are formed once their scale is known, lest a mean's vanish before a GradScaler's scale.
    forms = reduction != "none" and queries.dtype != torch.float16
    return [
        forms and queries.requires_grad,
        forms and keys.requires_grad,
        weights is not None and weights.requires_grad,
    ]


def _empty_gradients(contrast: _Contrast, needs: Sequence[bool]) -> _Gradients:
    return _Gradients(_empty_gradient(contrast.queries, needs[0]), _empty_gradient(contrast.keys, needs[1]))


def _empty_gradient(tensor: Tensor, need: bool) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else tensor.new_empty(0)


def _empty_results(op: _Forward) -> _Results:
    queries = op.contrast.queries
    rows, dtype = queries.shape[:2], _sums_dtype(queries)
    shape = rows if op.reduction == "none" else ()
    return _Results(
        queries.new_empty(shape, dtype=dtype),
        queries.new_empty(shape, dtype=dtype),
        queries.new_empty(rows if op.needs[2] else 0, dtype=dtype),
        *_empty_gradients(op.contrast, op.needs),
    )


def _kernel(op: _Forward) -> _Results:
    queries = op.contrast.queries
    row_weights, factor = _row_weights(queries, op.weights, op.reduction)
    losses, right = (queries.new_empty(queries.shape[:2], dtype=_sums_dtype(queries)) for _ in range(2))
    gradients = _empty_gradients(op.contrast, op.needs)
    _run(op, gradients, row_weights, factor, losses, right)
    loss, accuracy = _results(queries, losses, right, op.weights, op.reduction)
    return _Results(loss, accuracy, losses if op.needs[2] else losses.new_empty(0), *gradients)


def _gradients_kernel(op: _Backward) -> _Gradients:
    gradients = _empty_gradients(op.contrast, op.needs)
    _run(op, gradients, op.row_weights.contiguous())
    return gradients


def _run(
    op: _Forward | _Backward,
    gradients: _Gradients,
    row_weights: Tensor | None,
    factor: float = 1.0,
    losses: Tensor | None = None,
    right: Tensor | None = None,
) -> None:
    queries, keys = op.contrast.queries.contiguous(), op.contrast.keys.contiguous()
    targets, negatives, exclude = (None if tensor is None else tensor.contiguous() for tensor in op.contrast[2:])
    kernel = _Kernel(
        queries=queries,
        keys=keys,
        targets=targets,
        negatives=negatives,
        exclude=exclude,
        row_weights=row_weights,
        losses=losses,
        right=right,
        grad_queries=gradients.queries if op.needs[0] else None,
        grad_keys=gradients.keys if op.needs[1] else None,
        scale=op.scale,
        factor=factor,
        tf32=tf32_allowed(queries, "product"),
    )
    workspace = workspace_of(queries, native.info_nce_workspace(*kernel))
    order = segments = None
    if negatives is not None and op.needs[1] and not native.info_nce_sorts(queries):
        order, segments = _by_key(keys, targets, negatives)
    native.info_nce(*kernel, workspace, order, segments)


def _by_key(keys: Tensor, targets: Tensor | None, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """What sorts positives and negatives, [B, M, 1 + S] flat, by their key, and where each key's begin in it."""
    batch, num_keys = keys.shape[:2]
    if targets is None:
        targets = torch.arange(negatives.shape[1], device=keys.device).expand(negatives.shape[:2])
    named = torch.cat([targets.unsqueeze(-1), negatives], dim=-1)
    first = torch.arange(batch, device=keys.device).mul_(num_keys).view(batch, 1, 1)
    named = torch.where((named >= 0) & (named < num_keys), named + first, batch * num_keys).flatten()
    in_order, order = named.sort(stable=True)
    return order, torch.searchsorted(in_order, torch.arange(batch * num_keys + 1, device=keys.device))


def _checked_indices(contrast: _Contrast) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Targets, negatives and exclude with indices of keys only, and which queries [B, M] named no others."""
    queries, keys, targets, negatives, exclude = contrast
    num_keys = keys.shape[1]
    positives = _default_targets(queries) if targets is None else targets
    valid = torch.ones_like(positives, dtype=torch.bool) if exclude is None else exclude != positives
    last = max(num_keys - 1, 0)
    for indices in (positives, negatives, exclude):
        if indices is not None:
            within = (indices >= 0) & (indices < num_keys)
            valid = valid & (within if within.ndim == 2 else within.all(-1))
    negatives, exclude = (None if indices is None else indices.clamp(0, last) for indices in (negatives, exclude))
    return positives.clamp(0, last), negatives, exclude, valid


def _reference_op(op: _Forward) -> _Results:
    queries = op.contrast.queries
    targets, negatives, exclude, valid = _checked_indices(op.contrast)
    losses, right = _each_query(queries, op.contrast.keys, targets, negatives, exclude, op.scale)
    losses, right = torch.where(valid, losses, math.nan), right * valid
    weights, factor = _row_weights(queries, op.weights, op.reduction)
    row_weights = torch.full_like(losses, factor) if weights is None else weights * factor
    gradients = _gradients_reference(_Backward(op.contrast, row_weights, op.scale, op.needs))
    loss, accuracy = _results(queries, losses, right, op.weights, op.reduction)
    return _Results(loss, accuracy, losses if op.needs[2] else losses.new_empty(0), *gradients)


def _gradients_reference(op: _Backward) -> _Gradients:
    # Written out, as an op's forward pass, which forms gradients too, is out of autograd's reach.
    queries, keys, *_ = op.contrast
    needs_queries, needs_keys = op.needs[:2]
    grad_queries, grad_keys = queries.new_empty(0), keys.new_empty(0)
    if not (needs_queries or needs_keys):
        return _Gradients(grad_queries, grad_keys)
    targets, negatives, exclude, valid = _checked_indices(op.contrast)
    row_weights, scale = op.row_weights, op.scale
    present = row_weights != 0
    counts = (valid & present).unsqueeze(-1)
    q, k = (tensor.to(row_weights.dtype) for tensor in (queries, keys))
    q = torch.where(counts, q, 0)
    contrasted = torch.arange(keys.shape[1], device=keys.device)
    if negatives is not None:
        contrasted = torch.cat([targets.unsqueeze(-1), negatives], dim=-1)
        k = _gather_keys(k, contrasted)
        logits = (k @ (scale * q).unsqueeze(-1)).squeeze(-1)
    else:
        logits = (scale * q) @ k.mT
    if exclude is not None:
        logits = logits.masked_fill(contrasted == exclude.unsqueeze(-1), -math.inf)
    # The slope of the loss in the logits is their probabilities, less 1 at the positive.
    positive = targets.unsqueeze(-1) if negatives is None else torch.zeros_like(targets).unsqueeze(-1)
    slopes = logits.softmax(-1)
    slopes = slopes.scatter_add(-1, positive, -torch.ones_like(slopes[..., :1]))
    slopes = torch.where(counts, slopes * row_weights.unsqueeze(-1) * scale, 0)
    if needs_queries:
        grad_queries = slopes @ k if negatives is None else (slopes.unsqueeze(-2) @ k).squeeze(-2)
        grad_queries = torch.where(counts, grad_queries, 0)
        grad_queries = torch.where(counts | ~present.unsqueeze(-1), grad_queries, math.nan).to(queries.dtype)
    if needs_keys and negatives is None:
        grad_keys = (slopes.mT @ q).to(keys.dtype)
    elif needs_keys:
        of_pairs = slopes.unsqueeze(-1) * q.unsqueeze(-2)
        first = torch.arange(len(keys), device=keys.device).mul_(keys.shape[1]).view(-1, 1, 1)
        sums = of_pairs.new_zeros((keys.shape[:2].numel(), keys.shape[2]))
        sums.index_add_(0, (contrasted + first).flatten(), of_pairs.flatten(0, 2))
        grad_keys = sums.view(keys.shape).to(keys.dtype)
    return _Gradients(grad_queries, grad_keys)


def _setup_context(ctx: Any, op: _Forward, output: _Results) -> None:
    loss, _, losses, *gradients = output
    # What was not formed with the loss is computed when the gradient of each row is known.
    needs_queries, needs_keys, *_ = ctx.needs_input_grad
    ctx.later = (needs_queries and not op.needs[0]) or (needs_keys and not op.needs[1])
    kept = op.contrast if ctx.later else (None,) * len(op.contrast)
    ctx.save_for_backward(*kept, op.weights, loss, losses if op.needs[2] else None, *gradients)
    ctx.num_rows, ctx.scale, ctx.reduction = op.contrast.queries.shape[:2], op.scale, op.reduction
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, saved: Sequence[Any], grad: Tensor | None, *_: Tensor | None) -> dict[str, Tensor | None]:
    if grad is None:
        return {}
    *kept, weights, loss, losses, grad_queries, grad_keys = saved
    needs_queries, needs_keys, *_ = ctx.needs_input_grad
    if ctx.later:
        row_weights, factor = _row_weights(kept[0], weights, ctx.reduction)
        row_grads = grad.expand(ctx.num_rows) * factor if row_weights is None else grad * row_weights
        grad_queries, grad_keys = _info_nce_gradients(*kept, row_grads, ctx.scale, [needs_queries, needs_keys])
    elif needs_queries or needs_keys:
        grad_queries, grad_keys = grad_queries * grad, grad_keys * grad
    grad_weights = None
    if losses is not None:
        slope = losses
        if ctx.reduction == "mean":
            total = weights.to(losses.dtype).sum()
            slope = torch.where(total > 0, (losses - loss) / total, losses)
        slope = torch.where(_absent(weights, losses), 0, slope)
        grad_weights = (grad * slope).to(weights.dtype)
    return {
        "queries": grad_queries if needs_queries else None,
        "keys": grad_keys if needs_keys else None,
        "weights": grad_weights,
    }


_info_nce = register(
    "info_nce",
    _Forward,
    _Results,
    reference=_reference_op,
    kernel=_kernel,
    fake=_empty_results,
    setup_context=_setup_context,
    backward=_backward,
    once=True,
)
_info_nce_gradients = register(
    "info_nce_gradients",
    _Backward,
    _Gradients,
    reference=_gradients_reference,
    kernel=_gradients_kernel,
    fake=lambda op: _empty_gradients(op.contrast, op.needs),
)
