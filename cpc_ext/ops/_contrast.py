"""The op that info_nce, scores_logsumexp and sigmoid_contrast share: its kernels' calls and its gradients.

csrc/info_nce/info_nce.h says what is computed. The weights of a mean or sum are known beforehand, so the forward pass
forms the gradients with the scores at hand, and the backward pass only scales them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.ops import _contrast_reference as plain
from cpc_ext.ops._contrast_arguments import ContrastOptions, check_arguments, common_dtype, flat_problem
from cpc_ext.ops._contrast_problem import Contrast, Gradients, absent_queries, sums_dtype, weighted
from cpc_ext.ops._library import may_need_gradients, register, tf32_allowed, without_autocast, workspace_of

__all__ = ["Results", "contrast", "contrast_gradients_op", "contrast_op", "reduced"]


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
    problem, weights = flat_problem(*common_dtype(queries, keys), options, measure)
    return Results._make(contrast_op(*problem, weights, None, reduction, _needed(problem, weights, reduction)))


class _Forward(NamedTuple):
    """The op's arguments."""

    problem: Contrast
    weights: Tensor | None
    thresholds: Tensor | None  # [B, M], what a rival's score must reach to count in the rank, for log-sums.
    reduction: str
    # Whether gradients of queries, keys and biases are formed, and whether losses, slopes and best scores are kept. The
    # gradients of weights and of the scale are made of the first two.
    needs: list[bool]


class _Backward(NamedTuple):
    """Arguments of the op that forms gradients of the sum of the losses times the row weights [B, M]."""

    problem: Contrast
    row_weights: Tensor
    weights: Tensor | None  # Those of the forward pass: a symmetric contrast has no query of weight 0.
    needs: list[bool]  # Whether queries, keys and biases need gradients.


# What native.info_nce takes, in its order.
_KERNEL_ARGUMENTS = (
    *Contrast._fields[: Contrast._fields.index("scale")],
    *("row_weights", "thresholds", "present"),
    *("losses", "ranks", "slopes", "bests"),
    *("grad_queries", "grad_keys", "grad_bias"),
    *("scale", "factor", "measure", "contrast", "symmetric", "self_contrast", "tf32"),
)


def _needed(problem: Contrast, weights: Tensor | None, reduction: str) -> list[bool]:
    """What :class:`_Forward` has as ``needs``; only a ring needs best scores."""
    if not torch.is_grad_enabled():
        return [False] * 6
    # Half-precision gradients are formed once their scale is known, lest a mean's vanish before a GradScaler's scale.
    forms = reduction != "none" and problem.queries.dtype != torch.float16
    return [
        forms and problem.queries.requires_grad,
        forms and problem.keys is not None and problem.keys.requires_grad,
        forms and problem.key_bias is not None and problem.key_bias.requires_grad,
        may_need_gradients(weights),
        may_need_gradients(problem.scales),
        False,
    ]


def _empty_gradients(problem: Contrast, needs: Sequence[bool]) -> Gradients:
    queries, keys = problem.queries, problem.contrasted()

    def empty(tensor: Tensor, need: bool) -> Tensor:
        return torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else tensor.new_empty(0)

    bias = keys.new_empty(keys.shape[:2] if needs[2] else 0, dtype=sums_dtype(queries))
    return Gradients(empty(queries, needs[0]), empty(keys, needs[1]), bias)


def _empty_results(op: _Forward) -> Results:
    queries = op.problem.queries
    rows, dtype = queries.shape[:2], sums_dtype(queries)
    losses, slopes, bests = (queries.new_empty(rows if need else 0, dtype=dtype) for need in op.needs[3:])
    grad_queries, grad_keys, grad_bias = _empty_gradients(op.problem, op.needs)
    loss, accuracy = (queries.new_empty(rows if op.reduction == "none" else (), dtype=dtype) for _ in range(2))
    rank = queries.new_empty(rows, dtype=torch.int64)
    return Results(loss, accuracy, rank, losses, slopes, bests, grad_queries, grad_keys, grad_bias)


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
    dtype = sums_dtype(queries)
    _, _, rank, losses, slopes, bests, *gradients = results = _empty_results(op)
    row_weights, factor = _row_weights(queries, op.weights, op.reduction)
    if not op.needs[3]:
        losses = queries.new_empty(queries.shape[:2], dtype=dtype)
    fields = {
        "row_weights": row_weights,
        "factor": factor,
        "thresholds": None if op.thresholds is None else op.thresholds.to(dtype).contiguous(),
        "losses": losses,
        "ranks": rank,
        "slopes": slopes if op.needs[4] else None,
        "bests": bests if op.needs[5] else None,
    }
    _run(op.problem, Gradients(*gradients), op.needs, fields)
    loss, accuracy = reduced(losses, rank, op.weights, op.reduction)
    return results._replace(loss=loss, accuracy=accuracy)


def _gradients_kernel(op: _Backward) -> Gradients:
    gradients = _empty_gradients(op.problem, op.needs)
    row_weights = op.row_weights.contiguous()
    fields: dict[str, Any] = {"row_weights": row_weights, "factor": 1.0}
    if op.problem.symmetric:
        fields["present"] = _present(row_weights, op.weights).to(row_weights.dtype)
    _run(op.problem, gradients, op.needs, fields)
    return gradients


def _run(problem: Contrast, gradients: Gradients, needs: Sequence[bool], fields: dict[str, Any]) -> None:
    """Call the kernel; fields: those of native.info_nce that the problem and its gradients do not give."""
    on_cpu = native.info_nce_on_cpu(problem.queries)
    if problem.keys is None and needs[0] and not on_cpu:
        # CUDA's kernels give queries and keys a gradient each.
        of_keys = torch.empty_like(gradients.queries)
        apart = problem._replace(keys=problem.queries)
        _run(apart, gradients._replace(keys=of_keys), [True, True, needs[2]], fields)
        gradients.queries.add_(of_keys)
        return
    fields |= {
        name: value.contiguous() if isinstance(value, Tensor) else value for name, value in problem._asdict().items()
    }
    if problem.keys is None:
        fields |= {"keys": fields["queries"], "self_contrast": on_cpu}
    if problem.key_bias is not None:
        fields["key_bias"] = problem.key_bias.to(sums_dtype(problem.queries)).contiguous()
    for name, gradient, need in zip(("grad_queries", "grad_keys", "grad_bias"), gradients, needs, strict=False):
        fields[name] = gradient if need else None
    fields["tf32"] = tf32_allowed(problem.queries, "product")
    kernel = [fields.get(name) for name in _KERNEL_ARGUMENTS]
    workspace = workspace_of(problem.queries, native.info_nce_workspace(*kernel))
    native.info_nce(*kernel, workspace)


def _present(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Which of the rows [B, M] there are."""
    return torch.ones_like(rows, dtype=torch.bool) if weights is None else weights != 0


def _reference_op(op: _Forward) -> Results:
    with without_autocast(op.problem.queries.device):  # It would round the scores.
        present = None if op.weights is None else op.weights != 0
        losses, rank, slopes, bests = plain.each_query(op.problem, op.thresholds, present)
        weights, factor = _row_weights(op.problem.queries, op.weights, op.reduction)
        row_weights = torch.full_like(losses, factor) if weights is None else weights * factor
        gradients = plain.gradients(op.problem, row_weights, op.needs[:3])
        loss, accuracy = reduced(losses, rank, op.weights, op.reduction)
        losses, slopes, bests = (
            values if need else values.new_empty(0)
            for values, need in zip((losses, slopes, bests), op.needs[3:], strict=True)
        )
        return Results(loss, accuracy, rank, losses, slopes, bests, *gradients)


def _gradients_reference(op: _Backward) -> Gradients:
    present = _present(op.row_weights, op.weights) if op.problem.symmetric else None
    with without_autocast(op.problem.queries.device):
        return plain.gradients(op.problem, op.row_weights, op.needs, present)


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
        gradients = contrast_gradients_op(*tensors, *ctx.options, row_grads, weights, ctx.requires)
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


contrast_op = register(
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
contrast_gradients_op = register(
    "info_nce_gradients",
    _Backward,
    Gradients,
    reference=_gradients_reference,
    kernel=_gradients_kernel,
    fake=lambda op: _empty_gradients(op.problem, op.needs),
)
