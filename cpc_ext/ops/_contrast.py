"""The op that info_nce, scores_logsumexp and sigmoid_contrast share: its arguments, its kernels' calls, its gradients.

csrc/info_nce/info_nce.h says what is computed. The weights of a mean or sum are known beforehand, so the forward pass
forms the gradients with the scores at hand, and the backward pass only scales them.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.ops import _contrast_reference as plain
from cpc_ext.ops._contrast_problem import Contrast, Gradients, absent_queries, default_targets, sums_dtype, weighted
from cpc_ext.ops._library import (
    autocast_dtype,
    may_need_gradients,
    refuse_forward_mode,
    register,
    tf32_allowed,
    values_at_hand,
    workspace_of,
)

__all__ = ["ContrastOptions", "Results", "check_arguments", "check_number", "contrast", "flat_problem", "reduced"]

_INTEGERS = (
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
_REDUCTIONS = ("mean", "sum", "none")
_CONTRASTS = ("all", "same", "other")


class ContrastOptions(NamedTuple):
    """What all ops of this kind take besides queries and keys, as :func:`cpc_ext.ops.info_nce` describes it."""

    scale: float | Tensor = 1.0
    targets: Tensor | None = None
    negatives: Tensor | None = None
    weights: Tensor | None = None
    exclude: Tensor | None = None
    key_range: Tensor | None = None
    key_bias: Tensor | None = None
    groups: tuple[Tensor, Tensor] | None = None
    contrast: str = "all"
    symmetric: bool = False
    thresholds: Tensor | None = None  # [*, M], what a rival's score must reach to count in the rank, for log-sums.
    wants_bests: bool = False  # Whether the best positives' scores are wanted.


class Results(NamedTuple):
    """Loss and accuracy are as the reduction says, the others of each query, [B, M], or empty where not needed."""

    loss: Tensor
    accuracy: Tensor
    rank: Tensor
    losses: Tensor
    slopes: Tensor
    bests: Tensor
    grad_queries: Tensor
    grad_keys: Tensor
    grad_bias: Tensor


def contrast(
    queries: Tensor, keys: Tensor, options: ContrastOptions, *, measure: str = "softmax", reduction: str = "mean"
) -> Results:
    """Check the arguments and run the op."""
    check_arguments(queries, keys, options, measure, reduction)
    scale = options.scale
    refuse_forward_mode(queries, keys, options.weights, options.key_bias, scale if isinstance(scale, Tensor) else None)
    _check_weights(options.weights)
    queries, keys = _common_dtype(queries, keys)
    problem, weights = flat_problem(queries, keys, options, measure)
    rows = problem.queries.shape[:2]
    return Results(
        *_info_nce(
            *problem,
            weights,
            None if options.thresholds is None else options.thresholds.reshape(rows),
            reduction,
            _needed(problem, weights, reduction, bests=options.wants_bests),
        )
    )


def flat_problem(
    queries: Tensor, keys: Tensor, options: ContrastOptions, measure: str
) -> tuple[Contrast, Tensor | None]:
    """The problem with one leading dimension in place of any, and its queries' weights [B, M]; None for all 1."""
    problem = _flat(queries, keys, options, measure)
    weights = None if options.weights is None else options.weights.reshape(problem.queries.shape[:2])
    return problem, _weights_of_present(problem.targets, weights, sums_dtype(queries))


def _weights_of_present(targets: Tensor | None, weights: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The weights of queries [B, M], 0 for those that have no positive; None for all 1."""
    if targets is None or (values_at_hand(targets) and (targets.numel() == 0 or int(targets.min()) >= 0)):
        return weights if targets is None or targets.shape[-1] > 0 else _zeros(targets, dtype)
    # Below -1 an index names no key, and says so.
    present = (targets != -1).any(-1)
    return present.to(dtype) if weights is None else torch.where(present, weights, 0)


def _zeros(targets: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(targets.shape[:2], dtype=dtype, device=targets.device)


# --- Arguments ---


def check_arguments(queries: Tensor, keys: Tensor, options: ContrastOptions, measure: str, reduction: str) -> None:
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
    num_queries, num_keys = queries.shape[-2], keys.shape[-2]
    if options.targets is None and num_queries > num_keys and measure != "log_sum":
        raise ValueError(f"targets is needed where there are more queries ({num_queries}) than keys ({num_keys})")
    leading, rows, device = queries.shape[:-2], queries.shape[:-1], queries.device
    _check_given("targets", options.targets, (rows, (*rows, "P")), device)
    _check_given("negatives", options.negatives, ((*rows, "S"),), device)
    _check_given("exclude", options.exclude, (rows, (*rows, "E")), device)
    _check_given("key_range", options.key_range, ((*rows, 2),), device)
    _check_given("weights", options.weights, (rows,), device, floating=True)
    _check_given("key_bias", options.key_bias, ((*leading, num_keys),), device, floating=True)
    _check_groups(options, rows, (*leading, num_keys), device)
    check_number("scale", options.scale)
    if options.symmetric:
        if options.negatives is not None:
            raise ValueError("symmetric contrasts all keys and queries: it takes no negatives")
        if num_queries != num_keys:
            raise ValueError(f"symmetric needs as many keys as queries, got {num_keys} keys, {num_queries} queries")
        if options.targets is not None and options.targets.shape != rows:
            raise ValueError(f"symmetric needs one positive a query, got targets {tuple(options.targets.shape)}")
    if reduction not in _REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def _check_groups(options: ContrastOptions, rows: tuple[int, ...], keys: tuple[int, ...], device: torch.device) -> None:
    if options.contrast not in _CONTRASTS:
        raise ValueError(f'contrast must be "all", "same" or "other", got {options.contrast!r}')
    if options.groups is None:
        if options.contrast != "all":
            raise ValueError(f'contrast="{options.contrast}" needs groups')
        return
    if not isinstance(options.groups, Sequence) or isinstance(options.groups, str) or len(options.groups) != 2:
        raise TypeError(f"groups must be a pair (query_groups, key_groups), got {type(options.groups).__name__}")
    for name, groups, shape in zip(("query_groups", "key_groups"), options.groups, (rows, keys), strict=True):
        if groups is None:
            raise TypeError(f"{name} must be a tensor, got None")
        _check_given(name, groups, (shape,), device)
    if options.contrast == "all":
        raise ValueError('groups needs contrast="same" or "other", as "all" contrasts keys of every group')


def _check_given(
    name: str,
    value: Tensor | None,
    shapes: Sequence[Sequence[int | str]],
    device: torch.device,
    *,
    floating: bool = False,
) -> None:
    """Check a tensor that may be None: shapes that it may have, a letter standing for any size."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name} must be floating, got {value.dtype}")
    if not floating and value.dtype not in _INTEGERS:
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    _check_layout(name, value)
    if not any(
        len(shape) == value.ndim
        and all(isinstance(size, str) or size == actual for size, actual in zip(shape, value.shape, strict=True))
        for shape in shapes
    ):
        wanted = " or ".join(f"({', '.join(map(str, shape))})" for shape in shapes)
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name} must be on the queries' device {device}, got {value.device}")


def _check_layout(name: str, value: Tensor) -> None:
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")


def check_number(name: str, value: float | Tensor) -> None:
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{name} must be a real number, got {value.dtype}")
        if value.ndim != 0:
            raise ValueError(f"{name} must be a number or a tensor without dimensions, got shape {tuple(value.shape)}")
        if values_at_hand(value) and not bool(torch.isfinite(value)):
            raise ValueError(f"{name} must be finite, got {value.item()}")
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number or a tensor, got {type(value).__name__}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # An integer beyond a float's range.
        finite = False
    if not finite:
        raise ValueError(f"{name} must be finite, got {value}")


def _check_weights(weights: Tensor | None) -> None:
    if weights is None or not values_at_hand(weights):
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


def _flat(queries: Tensor, keys: Tensor, options: ContrastOptions, measure: str) -> Contrast:
    """The arguments with one leading dimension in place of any."""
    leading, (num_queries, dim), num_keys = queries.shape[:-2], queries.shape[-2:], keys.shape[-2]
    entries = leading.numel()
    rows = (entries, num_queries)

    def indices(value: Tensor | None) -> Tensor | None:
        """[B, M, C] of [*, M] or [*, M, C]."""
        if value is None:
            return None
        columns = value.shape[-1] if value.ndim == queries.ndim else 1
        return value.to(torch.int64).reshape(*rows, columns)

    query_groups, key_groups = (None, None) if options.groups is None else options.groups
    scale = options.scale
    scales = None
    if isinstance(scale, Tensor):
        if values_at_hand(scale) and not scale.requires_grad:
            scale = scale.item()
        else:
            scale, scales = 1.0, scale.to(queries.device, sums_dtype(queries)).reshape(1)
    return Contrast(
        queries.reshape(*rows, dim),
        keys.reshape(entries, num_keys, dim),
        _each_once(indices(options.targets)),
        indices(options.negatives),
        indices(options.exclude),
        indices(options.key_range),
        None if query_groups is None else query_groups.to(torch.int64).reshape(rows),
        None if key_groups is None else key_groups.to(torch.int64).reshape(entries, num_keys),
        None if options.key_bias is None else options.key_bias.reshape(entries, num_keys),
        scales,
        float(scale),
        measure,
        options.contrast,
        options.symmetric,
    )


def _each_once(targets: Tensor | None) -> Tensor | None:
    """Targets [B, M, P] of which no query's name a key twice, as the kernels ask for."""
    if targets is None or targets.shape[-1] < 2:
        return targets
    targets = targets.sort(-1).values
    again = targets[..., 1:] == targets[..., :-1]
    return torch.cat([targets[..., :1], targets[..., 1:].masked_fill(again, -1)], -1)


# --- The op ---


class _Forward(NamedTuple):
    """The op's arguments."""

    problem: Contrast
    weights: Tensor | None
    thresholds: Tensor | None
    reduction: str
    # Whether gradients of queries, keys and biases are formed, and whether losses, slopes and best scores are kept. The
    # gradients of weights and of the scale are made of the first two.
    needs: list[bool]


class _Backward(NamedTuple):
    """Arguments of the op that forms gradients of the sum of the losses times the row weights [B, M]."""

    problem: Contrast
    row_weights: Tensor
    needs: list[bool]  # Whether queries, keys and biases need gradients.


class _Kernel(NamedTuple):
    """What native.info_nce takes, in its order."""

    queries: Tensor
    keys: Tensor
    targets: Tensor | None
    negatives: Tensor | None
    exclude: Tensor | None
    key_range: Tensor | None
    query_groups: Tensor | None
    key_groups: Tensor | None
    key_bias: Tensor | None
    scales: Tensor | None
    row_weights: Tensor | None
    thresholds: Tensor | None
    losses: Tensor | None
    ranks: Tensor | None
    slopes: Tensor | None
    bests: Tensor | None
    grad_queries: Tensor | None
    grad_keys: Tensor | None
    grad_bias: Tensor | None
    scale: float
    factor: float
    measure: str
    contrast: str
    symmetric: bool
    tf32: bool


def _needed(problem: Contrast, weights: Tensor | None, reduction: str, *, bests: bool) -> list[bool]:
    """What :class:`_Forward` has as ``needs``."""
    if not torch.is_grad_enabled():
        return [False, False, False, False, False, bests]
    # Half-precision gradients are formed once their scale is known, lest a mean's vanish before a GradScaler's scale.
    forms = reduction != "none" and problem.queries.dtype != torch.float16

    return [
        forms and problem.queries.requires_grad,
        forms and problem.keys.requires_grad,
        forms and problem.key_bias is not None and problem.key_bias.requires_grad,
        may_need_gradients(weights),
        may_need_gradients(problem.scales),
        bests,
    ]


def _empty_gradients(problem: Contrast, needs: Sequence[bool]) -> Gradients:
    queries, keys = problem.queries, problem.keys
    bias_shape = keys.shape[:2] if needs[2] else (0,)
    return Gradients(
        *(
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else tensor.new_empty(0)
            for tensor, need in zip((queries, keys), needs, strict=False)
        ),
        keys.new_empty(bias_shape, dtype=sums_dtype(queries)),
    )


def _empty_results(op: _Forward) -> Results:
    queries = op.problem.queries
    rows, dtype = queries.shape[:2], sums_dtype(queries)
    shape = rows if op.reduction == "none" else ()
    return Results(
        queries.new_empty(shape, dtype=dtype),
        queries.new_empty(shape, dtype=dtype),
        queries.new_empty(rows, dtype=torch.int64),
        *(queries.new_empty(rows if need else 0, dtype=dtype) for need in op.needs[3:]),
        *_empty_gradients(op.problem, op.needs),
    )


def _row_weights(queries: Tensor, weights: Tensor | None, reduction: str) -> tuple[Tensor | None, float]:
    """What a row's loss counts in the result: a tensor [B, M], or None for ones, times a number."""
    if weights is None:
        return None, 1 / max(queries.shape[:2].numel(), 1) if reduction == "mean" else 1.0
    weights = weights.to(sums_dtype(queries)).contiguous()
    return weights / _total(weights) if reduction == "mean" else weights, 1.0


def _total(weights: Tensor) -> Tensor:
    total = weights.sum()
    return torch.where(total > 0, total, torch.ones_like(total))


def reduced(losses: Tensor, rank: Tensor, weights: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """Loss and accuracy, which share no memory with the losses."""
    right = (rank == 0).to(losses.dtype)
    if reduction == "none":
        return losses.clone() if weights is None else weighted(weights.to(losses.dtype), losses), right
    if weights is None:
        if losses.numel() == 0:  # Whose mean is no number.
            return losses.sum(), right.sum()
        return losses.mean() if reduction == "mean" else losses.sum(), right.mean()
    weights = weights.to(losses.dtype)
    total = _total(weights)
    loss = weighted(weights, losses).sum()
    return loss / total if reduction == "mean" else loss, (weights * right).sum() / total


def _kernel(op: _Forward) -> Results:
    queries = op.problem.queries
    row_weights, factor = _row_weights(queries, op.weights, op.reduction)
    results = _empty_results(op)
    gradients = Gradients(*results[-3:])
    losses = results.losses if op.needs[3] else queries.new_empty(queries.shape[:2], dtype=sums_dtype(queries))
    _run(op, gradients, row_weights, factor, results._replace(losses=losses))
    loss, accuracy = reduced(losses, results.rank, op.weights, op.reduction)
    return results._replace(loss=loss, accuracy=accuracy)


def _gradients_kernel(op: _Backward) -> Gradients:
    gradients = _empty_gradients(op.problem, op.needs)
    _run(op, gradients, op.row_weights.contiguous())
    return gradients


def _run(
    op: _Forward | _Backward,
    gradients: Gradients,
    row_weights: Tensor | None,
    factor: float = 1.0,
    results: Results | None = None,
) -> None:
    problem = Contrast(*(x.contiguous() if isinstance(x, Tensor) else x for x in op.problem))
    dtype = sums_dtype(problem.queries)

    def as_sums(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    kernel = _Kernel(
        **dict(zip(Contrast._fields, problem, strict=True))
        | {
            "key_bias": as_sums(problem.key_bias),
            "row_weights": row_weights,
            "thresholds": as_sums(op.thresholds) if isinstance(op, _Forward) else None,
            "losses": None if results is None else results.losses,
            "ranks": None if results is None else results.rank,
            "slopes": results.slopes if results is not None and op.needs[4] else None,
            "bests": results.bests if results is not None and op.needs[5] else None,
            "grad_queries": gradients.queries if op.needs[0] else None,
            "grad_keys": gradients.keys if op.needs[1] else None,
            "grad_bias": gradients.bias if op.needs[2] else None,
            "factor": factor,
            "tf32": tf32_allowed(problem.queries, "product"),
        }
    )
    workspace = workspace_of(problem.queries, native.info_nce_workspace(*kernel))
    order = segments = None
    if problem.negatives is not None and (op.needs[1] or op.needs[2]) and not native.info_nce_sorts(problem.queries):
        order, segments = _by_key(problem)
    native.info_nce(*kernel, workspace, order, segments)


def _by_key(problem: Contrast) -> tuple[Tensor, Tensor]:
    """What sorts positives and negatives, [B, M, P + S] flat, by their key, and where each key's begin in it."""
    keys, negatives = problem.keys, problem.negatives
    assert negatives is not None
    batch, num_keys = keys.shape[:2]
    parts = [negatives]
    if problem.measure != "log_sum":
        parts.insert(0, default_targets(problem.queries) if problem.targets is None else problem.targets)
    named = torch.cat(parts, dim=-1)
    first = torch.arange(batch, device=keys.device).mul_(num_keys).view(batch, 1, 1)
    named = torch.where((named >= 0) & (named < num_keys), named + first, batch * num_keys).flatten()
    in_order, order = named.sort(stable=True)
    return order, torch.searchsorted(in_order, torch.arange(batch * num_keys + 1, device=keys.device))


def _present(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights != 0


def _reference_op(op: _Forward) -> Results:
    losses, rank, slopes, bests = plain.each_query(op.problem, op.thresholds, _present(op.weights))
    weights, factor = _row_weights(op.problem.queries, op.weights, op.reduction)
    row_weights = torch.full_like(losses, factor) if weights is None else weights * factor
    gradients = plain.gradients(op.problem, row_weights, op.needs[:3])
    loss, accuracy = reduced(losses, rank, op.weights, op.reduction)
    kept = [
        values if need else values.new_empty(0)
        for values, need in zip((losses, slopes, bests), op.needs[3:], strict=True)
    ]
    return Results(loss, accuracy, rank, *kept, *gradients)


def _setup_context(ctx: Any, op: _Forward, output: Results) -> None:
    # What was not formed with the loss is computed when the gradient of each row is known.
    problem = op.problem
    ctx.requires = [ctx.needs_input_grad[Contrast._fields.index(name)] for name in ("queries", "keys", "key_bias")]
    ctx.later = any(required and not formed for required, formed in zip(ctx.requires, op.needs, strict=False))
    kept = [x if ctx.later else None for x in problem if not isinstance(x, (float, str, bool))]
    ctx.save_for_backward(
        *kept,
        op.weights,
        output.loss,
        output.losses if op.needs[3] else None,
        output.slopes if op.needs[4] else None,
        *output[-3:],
    )
    ctx.options, ctx.reduction, ctx.num_rows = problem[-4:], op.reduction, problem.queries.shape[:2]
    ctx.bias_dtype = None if problem.key_bias is None else problem.key_bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, saved: Sequence[Any], grad: Tensor | None, *_: Tensor | None) -> dict[str, Tensor | None]:
    if grad is None:
        return {}
    *tensors, weights, loss, losses, slopes, grad_queries, grad_keys, grad_bias = saved
    gradients: tuple[Any, ...] = (grad_queries, grad_keys, grad_bias)
    row_grads = None
    if ctx.later or slopes is not None:
        rows = loss.new_empty(ctx.num_rows)
        row_weights, factor = _row_weights(rows.unsqueeze(-1), weights, ctx.reduction)
        row_grads = grad.expand(ctx.num_rows) * factor if row_weights is None else grad * row_weights
    if ctx.later:
        gradients = _gradients(*tensors, *ctx.options, row_grads, ctx.requires)
    elif any(ctx.requires):
        gradients = tuple(
            gradient * grad if required else None for gradient, required in zip(gradients, ctx.requires, strict=True)
        )
    grad_weights = None
    if losses is not None:
        slope = losses
        if ctx.reduction == "mean":
            total = weights.to(losses.dtype).sum()
            slope = torch.where(total > 0, (losses - loss) / total, losses)
        slope = torch.where(absent_queries(weights, losses), 0, slope)
        grad_weights = (grad * slope).to(weights.dtype)
    grad_scales = None
    if slopes is not None and row_grads is not None:
        grad_scales = torch.where(row_grads == 0, 0, row_grads * slopes).sum().reshape(1)
    of_queries, of_keys, of_bias = (
        gradient if required else None for gradient, required in zip(gradients, ctx.requires, strict=True)
    )
    return {
        "queries": of_queries,
        "keys": of_keys,
        "key_bias": None if of_bias is None else of_bias.to(ctx.bias_dtype),
        "weights": grad_weights,
        "scales": grad_scales,
    }


_info_nce = register(
    "info_nce",
    _Forward,
    Results,
    reference=_reference_op,
    kernel=_kernel,
    fake=_empty_results,
    setup_context=_setup_context,
    backward=_backward,
    once=True,
)
_gradients = register(
    "info_nce_gradients",
    _Backward,
    Gradients,
    reference=lambda op: plain.gradients(op.problem, op.row_weights, op.needs),
    kernel=_gradients_kernel,
    fake=lambda op: _empty_gradients(op.problem, op.needs),
)
