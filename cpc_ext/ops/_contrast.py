"""The op that info_nce, scores_logsumexp and sigmoid_contrast share: calls of its kernels, and its gradients.

csrc/info_nce/info_nce.h defines the computation. The weights of a mean or sum are known in advance, so the forward pass
forms the gradients while it has the scores, and the backward pass only scales them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.ops import _contrast_reference as plain
from cpc_ext.ops._contrast_arguments import ContrastOptions, check_arguments, common_dtype, flat_problem
from cpc_ext.ops._contrast_problem import Contrast, Gradients, absent_queries, sums_dtype, weighted
from cpc_ext.ops._contrast_weights import total_weight, weigh, weigh_by_kernel, weigh_plainly, weights_of_rows
from cpc_ext.ops._library import may_need_gradients, register, tf32_allowed, with_workspace, without_autocast

__all__ = ["Results", "contrast", "contrast_gradients_op", "contrast_op", "reduced"]


class Results(NamedTuple):
    """Results of the op: loss and accuracy as reduced, values for each query, [B, M], and gradients.

    slopes are the derivatives of the losses in the scale, bests the scores of the best positives. Results that are not
    needed are empty, or None in a call that bypasses the dispatcher.
    """

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
    problem, weights = flat_problem(*common_dtype(queries, keys), options, measure, batched=False, weigh=weigh)
    op = _Forward(problem, weights, None, reduction, _needed(problem, weights, reduction))
    results: tuple[Any, ...] = contrast_op(*problem, *op[1:], whole=op)
    return results if type(results) is Results else Results._make(results)


# Positions in the problem, and so among the op's arguments. Tensors come first, up to the scale.
_QUERIES, _KEYS, _KEY_BIAS, _SCALES, _SCALE = map(
    Contrast._fields.index, ("queries", "keys", "key_bias", "scales", "scale")
)


class _Forward(NamedTuple):
    """The op's arguments."""

    problem: Contrast
    weights: Tensor | None
    thresholds: Tensor | None  # [B, M], for log-sums: scores of rivals that reach it count in the rank.
    reduction: str
    # Whether to form the gradients of queries, keys and biases, and whether to return losses, slopes and best scores.
    # The gradient of the weights is computed from the losses, that of the scale from the slopes.
    needs: list[bool]


class _Backward(NamedTuple):
    """Arguments of the op that forms gradients of the sum of the losses times the row weights [B, M]."""

    problem: Contrast
    row_weights: Tensor
    weights: Tensor | None  # Those of the forward pass; 0 makes a query absent from a symmetric contrast.
    needs: list[bool]  # Whether queries, keys and biases need gradients.


def _needed(problem: Contrast, weights: Tensor | None, reduction: str) -> list[bool]:
    """Return ``needs`` of :class:`_Forward`. Best scores are needed only by a ring of processes, which calls the op."""
    if not torch.is_grad_enabled():
        return [False] * 6
    # float16 gradients are formed in the backward pass: before a GradScaler's scale those of a mean may underflow.
    queries, keys, key_bias = problem.queries, problem.keys, problem.key_bias
    forms = reduction != "none" and queries.dtype != torch.float16
    return [
        forms and queries.requires_grad,
        forms and keys is not None and keys.requires_grad,
        forms and key_bias is not None and key_bias.requires_grad,
        weights is not None and may_need_gradients(weights),
        problem.scales is not None and may_need_gradients(problem.scales),
        False,
    ]


def _empty_gradients(problem: Contrast, needs: Sequence[bool]) -> Gradients:
    return _without_none(_needed_gradients(problem, needs), problem.queries)


def _needed_gradients(problem: Contrast, needs: Sequence[bool]) -> Gradients:
    """Allocate the gradients; those that are not needed are None."""
    queries, keys = problem.queries, problem.contrasted()
    dense = torch.contiguous_format
    gradients: tuple[Any, ...] = (
        torch.empty_like(queries, memory_format=dense) if needs[0] else None,
        torch.empty_like(keys, memory_format=dense) if needs[1] else None,
        keys.new_empty(keys.shape[:-1], dtype=sums_dtype(queries)) if needs[2] else None,
    )
    return Gradients(*gradients)


def _empty_results(op: _Forward) -> Results:
    return _without_none(_needed_results(op), op.problem.queries)


def _needed_results(op: _Forward) -> Results:
    """Allocate the results; those that are not needed are None."""
    queries, needs = op.problem.queries, op.needs
    rows, dtype = queries.shape[:-1], sums_dtype(queries)
    loss = queries.new_empty(rows if op.reduction == "none" else (), dtype=dtype)
    results: tuple[Any, ...] = (
        loss,
        torch.empty_like(loss),
        queries.new_empty(rows, dtype=torch.int64),
        queries.new_empty(rows, dtype=dtype) if needs[3] else None,
        queries.new_empty(rows, dtype=dtype) if needs[4] else None,
        queries.new_empty(rows, dtype=dtype) if needs[5] else None,
        *_needed_gradients(op.problem, needs),
    )
    return Results(*results)


_Some = TypeVar("_Some", bound=tuple[Any, ...])


def _without_none(results: _Some, queries: Tensor) -> _Some:
    """Replace None by empty tensors: gradients of queries and keys have their dtype, others that of the sums."""
    own = len(results) - len(Gradients._fields)
    kinds = (queries.dtype if own <= at < own + 2 else sums_dtype(queries) for at in range(len(results)))
    return type(results)(
        *(queries.new_empty(0, dtype=kind) if x is None else x for x, kind in zip(results, kinds, strict=True))
    )


def reduced(losses: Tensor, rank: Tensor, weights: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """Return loss and accuracy; they share no memory with the losses."""
    right = (rank == 0).to(losses.dtype)
    if reduction == "none":
        return losses.clone() if weights is None else weighted(weights.to(losses.dtype), losses), right
    if weights is None:
        if losses.numel() == 0:  # Their mean would be NaN.
            return losses.sum(), right.sum()
        return losses.mean() if reduction == "mean" else losses.sum(), right.mean()
    weights = weights.to(losses.dtype)
    total = total_weight(weights)
    loss = weighted(weights, losses).sum()
    return loss / total if reduction == "mean" else loss, (weights * right).sum() / total


def _kernel(op: _Forward) -> Results:
    return _without_none(_straight(op), op.problem.queries)


def _straight(op: _Forward) -> Results:
    """Run the kernel; results that are not needed are None."""
    queries, weights, reduction = op.problem.queries, op.weights, op.reduction
    results = _needed_results(op)
    loss, accuracy, rank, losses, slopes, bests, *gradients = results
    rows = queries.new_empty(rank.shape, dtype=loss.dtype) if losses is None else losses
    row_weights, factor = weights_of_rows(rank.shape, weights, reduction, loss.dtype, weigh_by_kernel)
    thresholds = None if op.thresholds is None else op.thresholds.to(loss.dtype).contiguous()
    _run(op.problem, gradients, (row_weights, thresholds, None, rows, rank, slopes, bests), factor)
    if reduction == "none":
        loss, accuracy = reduced(rows, rank, weights, reduction)
        return results._replace(loss=loss, accuracy=accuracy)
    weights = None if weights is None else weights.to(loss.dtype).contiguous()
    with_workspace(native.info_nce_reduced, rows, rows, rank, weights, loss, accuracy, reduction == "mean")
    return results


def _gradients_kernel(op: _Backward) -> Gradients:
    return _without_none(_straight_gradients(op), op.problem.queries)


def _straight_gradients(op: _Backward) -> Gradients:
    gradients = _needed_gradients(op.problem, op.needs)
    row_weights = op.row_weights.contiguous()
    present = _present(row_weights, op.weights).to(row_weights.dtype) if op.problem.symmetric else None
    _run(op.problem, gradients, (row_weights, None, present, None, None, None, None), 1.0)
    return gradients


def _run(
    problem: Contrast, gradients: Sequence[Tensor | None], of_rows: Sequence[Tensor | None], factor: float
) -> None:
    """Call the kernel. of_rows: the arguments of native.info_nce between the problem and the gradients."""
    queries, keys, *others, scale, measure, contrast, symmetric = problem
    of_queries, of_keys, of_bias = gradients
    on_cpu = native.info_nce_on_cpu(queries)
    if keys is None and of_queries is not None and not on_cpu:
        # CUDA's kernels only write separate gradients of queries and keys.
        of_keys = torch.empty_like(of_queries)
        _run(problem._replace(keys=queries), (of_queries, of_keys, of_bias), of_rows, factor)
        of_queries.add_(of_keys)
        return
    queries = queries.contiguous()
    keys_alike = queries if keys is None else keys.contiguous()
    others = [None if value is None else value.contiguous() for value in others]
    if problem.key_bias is not None:
        others[_KEY_BIAS - 2] = problem.key_bias.to(sums_dtype(queries)).contiguous()
    with_workspace(
        native.info_nce,
        queries,
        queries,
        keys_alike,
        *others,
        *of_rows,
        *gradients,
        scale,
        factor,
        measure,
        contrast,
        symmetric,
        keys is None and on_cpu,
        tf32_allowed(queries, "product"),
    )


def _present(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Return which of the rows [B, M] are present."""
    return torch.ones_like(rows, dtype=torch.bool) if weights is None else weights != 0


def _reference_op(op: _Forward) -> Results:
    if op.problem.queries.ndim == 2:
        return _of_one(_reference_op(_as_batch(op)))
    with without_autocast(op.problem.queries.device):  # Autocast would round the scores.
        present = None if op.weights is None else op.weights != 0
        losses, rank, slopes, bests = plain.each_query(op.problem, op.thresholds, present)
        weights, factor = weights_of_rows(losses.shape, op.weights, op.reduction, losses.dtype, weigh_plainly)
        row_weights = torch.full_like(losses, factor) if weights is None else weights * factor
        gradients = plain.gradients(op.problem, row_weights, op.needs[:3])
        loss, accuracy = reduced(losses, rank, op.weights, op.reduction)
        losses, slopes, bests = (
            values if need else values.new_empty(0)
            for values, need in zip((losses, slopes, bests), op.needs[3:], strict=True)
        )
        return Results(loss, accuracy, rank, losses, slopes, bests, *gradients)


def _gradients_reference(op: _Backward) -> Gradients:
    if op.problem.queries.ndim == 2:
        return _of_one(_gradients_reference(_as_batch(op)))
    present = _present(op.row_weights, op.weights) if op.problem.symmetric else None
    with without_autocast(op.problem.queries.device):
        return plain.gradients(op.problem, op.row_weights, op.needs, present)


_Op = TypeVar("_Op", _Forward, _Backward)


def _as_batch(op: _Op) -> _Op:
    """Add a leading dimension of one batch entry to an op without batch dimension."""

    def led(values: Sequence[Any]) -> list[Any]:
        return [value.unsqueeze(0) if isinstance(value, Tensor) else value for value in values]

    problem = led(op.problem)
    problem[_SCALES] = op.problem.scales
    return type(op)(Contrast(*problem), *led(op[1:]))


def _of_one(results: _Some) -> _Some:
    """Remove the leading dimension of one batch entry from results."""
    return type(results)(*(value[0] if value.ndim and value.numel() else value for value in results))


def _setup_context(ctx: Any, op: _Forward, output: Results) -> None:
    # Gradients that were not formed with the loss are computed once the gradient of each row is known.
    problem = op.problem
    wanted = ctx.needs_input_grad
    of_queries, of_keys, of_bias = ctx.requires = [wanted[_QUERIES], wanted[_KEYS], wanted[_KEY_BIAS]]
    needs = op.needs
    ctx.later = (of_queries and not needs[0]) or (of_keys and not needs[1]) or (of_bias and not needs[2])
    ctx.save_for_backward(
        *(problem[:_SCALE] if ctx.later else ()),
        op.weights,
        output.loss,
        output.losses if needs[3] else None,
        output.slopes if needs[4] else None,
        *output[-3:],
    )
    ctx.options, ctx.reduction, ctx.num_rows = problem[_SCALE:], op.reduction, problem.queries.shape[:-1]
    ctx.bias_dtype = None if problem.key_bias is None else problem.key_bias.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, saved: Sequence[Any], grad: Tensor | None, *_: Tensor | None) -> dict[str, Tensor | None]:
    if grad is None:
        return {}
    *tensors, weights, loss, losses, slopes, grad_queries, grad_keys, grad_bias = saved
    gradients: tuple[Any, ...] = (grad_queries, grad_keys, grad_bias)
    row_grads = None
    if ctx.later or slopes is not None:
        row_weights, factor = weights_of_rows(ctx.num_rows, weights, ctx.reduction, loss.dtype, weigh)
        row_grads = grad.expand(ctx.num_rows) * factor if row_weights is None else grad * row_weights
    if ctx.later:
        gradients = contrast_gradients_op(*tensors, *ctx.options, row_grads, weights, ctx.requires)
    else:
        gradients = tuple([
            gradient * grad if required else None for gradient, required in zip(gradients, ctx.requires, strict=True)
        ])  # fmt: skip
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


contrast_op = register(
    "info_nce",
    _Forward,
    Results,
    reference=_reference_op,
    kernel=_kernel,
    fake=_empty_results,
    direct=_straight,
    setup_context=_setup_context,
    backward=_backward,
    once=True,
)
contrast_gradients_op = register(
    "info_nce_gradients",
    _Backward,
    Gradients,
    reference=_gradients_reference,
    kernel=_gradients_kernel,
    fake=lambda op: _empty_gradients(op.problem, op.needs),
    direct=_straight_gradients,
)
