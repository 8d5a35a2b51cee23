"""CPC's loss of several steps with its linear predictors fused into it.

Contexts [B, T, E], predictors [K, D, E] and keys [N, D] give the InfoNCE of every step. A batch's predictions, K times
as many values as its encodings, are never in memory as a whole, and the keys get one gradient instead of one per step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.ops._checks import check_dense
from cpc_ext.ops._contrast import Results as ContrastResults
from cpc_ext.ops._contrast import contrast_op
from cpc_ext.ops._contrast_arguments import INTEGERS, REDUCTIONS, as_int64, check_number
from cpc_ext.ops._contrast_problem import Contrast, sums_dtype
from cpc_ext.ops._library import (
    autocast_dtype,
    is_plain,
    refuse_forward_mode,
    register,
    with_workspace,
    without_autocast,
)
from cpc_ext.ops.info_nce import info_nce_reference

__all__ = ["PredictAndContrastOutput", "predict_and_contrast", "predict_and_contrast_reference"]

# Bytes of predictions in memory at a time where the op of info_nce contrasts them.
_PREDICTION_BYTES = 64 << 20


class PredictAndContrastOutput(NamedTuple):
    """Results of :func:`predict_and_contrast`.

    Attributes:
        loss: scalar in nats, or with ``reduction="none"`` one value per row, [K, B, T], 0 where a step does not use a
            context; float32, or float64 for float64 inputs.
        accuracy: the fraction of rows of rank 0 in a step, averaged over the steps, or with ``reduction="none"`` 0 or 1
            for each row; of the loss's dtype, without gradient.
        rank: [K, B, T] int64, the number of contrasted keys, not counting the positive, that score at least as high as
            the positive; -1 where a step does not use a context.
        step_losses: [K], the mean over the rows of each step, 0 for a step without rows; without gradient.
        step_accuracies: [K], likewise.
    """

    loss: Tensor
    accuracy: Tensor
    rank: Tensor
    step_losses: Tensor
    step_accuracies: Tensor


def predict_and_contrast(
    contexts: Tensor,
    weights: Tensor,
    keys: Tensor,
    targets: Tensor,
    *,
    negatives: Tensor | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
) -> PredictAndContrastOutput:
    """Compute InfoNCE of linear predictions (van den Oord et al. 2018, arXiv 1807.03748, equations 3 and 4).

    In step k the context c of a row predicts ``W_k c``, which scores the keys by ``scale * (W_k c) . key``; the loss is
    that of :func:`cpc_ext.ops.info_nce` with the predictions as queries. The CPU keeps predictions of half-precision
    arguments in float32; elsewhere they are rounded like the results of a matrix product. With arguments in bfloat16,
    the gradients of the predictions are rounded to it, on the CPU only if it has instructions for bfloat16 products.

    Args:
        contexts: [B, T, E], floating. B or T may be 0.
        weights: [K, D, E], the matrix W_k of every step; ``linear.weight.view(K, D, E)`` of a ``nn.Linear(E, K * D)``.
        keys: [N, D]. Contexts, weights and keys of different dtypes are promoted to their common one.
        targets: [K, B, T] integers, each row's positive among the keys, -1 for a context that a step does not use,
            such as one too near the end of its sequence. Such a row is absent from all results, and a context that no
            step uses may hold anything.
        negatives: integers [K, B, T, S], or [B, T, S] for the same in all steps: the keys that each row contrasts, each
            counted as often as it is named. Those of absent rows are ignored. Default: all keys.
        scale: factor of the scores, an inverse temperature.
        reduction: "mean" (over the rows of each step, then over the steps; a step without rows counts 0), "sum" (of
            all rows) or "none" (the loss of every row).

    Returns:
        :class:`PredictAndContrastOutput`. The loss is differentiable once, in reverse mode, in contexts, weights and
        keys. Under autocast these are rounded to its dtype, as for a matrix product; sums are not.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
        IndexError: an index that names no key. Only the CPU checks indices; on other devices the row's loss and the
            gradients of its context and of its step's weights are NaN then, and its rank is -1.
        NotImplementedError: forward-mode derivatives.
        RuntimeError: second derivatives, when the gradient is differentiated.
    """
    _check_arguments(contexts, weights, keys, targets, negatives, scale, reduction)
    problem = _flat_problem(contexts, weights, keys, targets, negatives, scale)
    result = Results._make(_op(*problem, reduction, _needed(problem, reduction)))
    losses = result.loss if reduction == "none" else result.losses
    return _output(result.loss, losses.detach(), result.rank, problem.targets.view(targets.shape), reduction)


class _Problem(NamedTuple):
    """The arguments, with B and T merged to one dimension of M contexts."""

    contexts: Tensor  # [M, E]
    weights: Tensor  # [K, D, E]
    keys: Tensor  # [N, D]
    targets: Tensor  # [K, M]
    negatives: Tensor | None  # [K, M, S], or [1, M, S] for all steps.
    scale: float


class _Forward(NamedTuple):
    """The op's arguments. Gradients are formed with the loss unless they depend on the gradient of each loss."""

    problem: _Problem
    reduction: str
    needs: list[bool]  # Whether to form the gradients of contexts, weights and keys.


class _Backward(NamedTuple):
    """Arguments of the op that forms gradients of the sum of the losses times the row weights [K, M]."""

    problem: _Problem
    row_weights: Tensor
    needs: list[bool]


class Gradients(NamedTuple):
    """Gradients, empty where they are not formed."""

    contexts: Tensor
    weights: Tensor
    keys: Tensor


class Results(NamedTuple):
    """Results of the op: the loss as reduced, losses and ranks of each row, [K, M], and gradients.

    ``losses`` is empty where the loss is not reduced.
    """

    loss: Tensor
    losses: Tensor
    rank: Tensor
    grad_contexts: Tensor
    grad_weights: Tensor
    grad_keys: Tensor


def _check_arguments(
    contexts: Tensor,
    weights: Tensor,
    keys: Tensor,
    targets: Tensor,
    negatives: Tensor | None,
    scale: float,
    reduction: str,
) -> None:
    for name, value, ndim, form in (
        ("contexts", contexts, 3, "[B, T, E]"),
        ("weights", weights, 3, "[K, D, E]"),
        ("keys", keys, 2, "[N, D]"),
    ):
        check_dense(name, value)
        if not value.is_floating_point() or value.dtype.itemsize < 2:
            raise TypeError(f"{name} must be floating with 16 bits or more, got {value.dtype}")
        if value.ndim != ndim:
            raise ValueError(f"{name} must be {form}, got shape {tuple(value.shape)}")
    (batch, length, channels), (steps, dim, columns) = contexts.shape, weights.shape
    if columns != channels:
        raise ValueError(f"weights must be [K, D, {channels}] for contexts of {channels}, got {tuple(weights.shape)}")
    if keys.shape[1] != dim:
        raise ValueError(f"keys must be [N, {dim}] for weights {tuple(weights.shape)}, got {tuple(keys.shape)}")
    _check_indices("targets", targets, [(steps, batch, length)])
    if negatives is not None:
        samples = negatives.shape[-1] if isinstance(negatives, Tensor) and negatives.ndim else 0
        shared = (batch, length, samples)
        _check_indices("negatives", negatives, [(steps, *shared), shared], last="S")
    others: dict[str, Tensor | None] = {"weights": weights, "keys": keys, "targets": targets, "negatives": negatives}
    for name, other in others.items():
        if other is not None and other.device != contexts.device:
            raise ValueError(f"{name} must be on the contexts' device {contexts.device}, got {other.device}")
    if isinstance(scale, Tensor):
        raise TypeError("scale must be a number, got Tensor; one that is learnt can be multiplied into the weights")
    check_number("scale", scale)
    if reduction not in REDUCTIONS:
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    refuse_forward_mode(contexts, weights, keys)


def _check_indices(name: str, value: Tensor, shapes: Sequence[tuple[int, ...]], *, last: str | None = None) -> None:
    """Check a tensor of integers. shapes: the shapes that it may have. last: name of the last dimension in errors."""
    check_dense(name, value)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name} must be integers, got {value.dtype}")
    # Sizes that torch.export leaves symbolic are not compared with those of another dimension.
    if tuple(value.shape) not in [shape for shape in shapes if len(shape) == value.ndim]:
        named = [shape if last is None else (*shape[:-1], last) for shape in shapes]
        wanted = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in named)
        raise ValueError(f"{name} must be {wanted}, got shape {tuple(value.shape)}")


def _flat_problem(
    contexts: Tensor, weights: Tensor, keys: Tensor, targets: Tensor, negatives: Tensor | None, scale: float
) -> _Problem:
    dtype = torch.promote_types(torch.promote_types(contexts.dtype, weights.dtype), keys.dtype)
    if dtype != torch.float64:
        dtype = autocast_dtype(contexts.device) or dtype
    rows = math.prod(contexts.shape[:2])
    if negatives is not None:
        steps = weights.shape[0] if negatives.ndim == 4 else 1
        negatives = as_int64(negatives).reshape(steps, rows, negatives.shape[-1])
    return _Problem(
        contexts.to(dtype).reshape(rows, contexts.shape[2]),
        weights.to(dtype),
        keys.to(dtype),
        as_int64(targets).reshape(weights.shape[0], rows),
        negatives,
        float(scale),
    )


def _needed(problem: _Problem, reduction: str) -> list[bool]:
    """Return ``needs`` of :class:`_Forward`."""
    # float16 gradients are formed in the backward pass: before a GradScaler's scale those of a mean may underflow.
    forms = torch.is_grad_enabled() and reduction != "none" and problem.contexts.dtype != torch.float16
    return [forms and tensor.requires_grad for tensor in problem[:3]]


def _present(targets: Tensor) -> Tensor:
    """Return which rows are present: those whose target is not -1.

    Targets are int64, as an unsigned type compares -1 with its largest number. A row whose index is below -1 is
    present, so that the kernel reports the index.
    """
    return targets != -1


def _output(loss: Tensor, losses: Tensor, rank: Tensor, targets: Tensor, reduction: str) -> PredictAndContrastOutput:
    """Return the output, from the reduced loss, and the losses and ranks [K, M]."""
    rights = (rank == 0).to(losses.dtype)
    counts = _present(targets).flatten(1).sum(1).clamp(min=1)
    step_losses, step_rights = (values.sum(1) / counts for values in (losses, rights))
    if reduction == "none":
        return PredictAndContrastOutput(
            loss.view(targets.shape), rights.view(targets.shape), rank.view(targets.shape), step_losses, step_rights
        )
    accuracy = step_rights.sum() / max(targets.shape[0], 1)
    return PredictAndContrastOutput(loss, accuracy, rank.view(targets.shape), step_losses, step_rights)


def _row_weights(targets: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """Return the weights of the rows' losses in the result, [K, M]."""
    present = _present(targets)
    if reduction != "mean":
        return present.to(dtype)
    return present / (present.sum(1, keepdim=True).clamp(min=1).to(dtype) * max(targets.shape[0], 1))


def _reduced(losses: Tensor, row_weights: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """Return ``loss`` and ``losses`` of :class:`Results`."""
    if reduction == "none":
        return losses, losses.new_empty(0)
    return (losses.sum() if reduction == "sum" else (losses * row_weights).sum()), losses


def _empty_gradients(problem: _Problem, needs: Sequence[bool]) -> Gradients:
    return Gradients._make(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) if need else tensor.new_empty(0)
        for tensor, need in zip(problem[:3], needs, strict=True)
    )


def _empty_results(op: _Forward) -> Results:
    targets, dtype = op.problem.targets, sums_dtype(op.problem.contexts)
    losses = op.problem.contexts.new_empty(targets.shape, dtype=dtype)
    scalar, none = losses.new_empty(()), losses.new_empty(0)
    loss, losses = (losses, none) if op.reduction == "none" else (scalar, losses)
    return Results(loss, losses, torch.empty_like(targets), *_empty_gradients(op.problem, op.needs))


# --- By matrix products and the op of info_nce ---


class _Contrasted(NamedTuple):
    losses: Tensor
    ranks: Tensor
    gradients: Gradients


def _contrast_chunks(problem: _Problem, row_weights: Tensor, needs: Sequence[bool]) -> _Contrasted:
    """Compute losses, ranks and gradients by matrix products and the op of info_nce, in chunks of contexts.

    All steps of a context are predicted together, so that a chunk completes the gradients of its contexts, and forms
    one gradient of the keys.
    """
    (rows, channels), (steps, dim, _) = problem.contexts.shape, problem.weights.shape
    dtype = sums_dtype(problem.contexts)
    losses, ranks = row_weights.new_empty(steps, rows), problem.targets.new_empty(steps, rows)
    gradients = _empty_gradients(problem, needs)
    of_weights, of_keys = (gradient.new_zeros(gradient.shape, dtype=dtype) for gradient in gradients[1:])
    matrix = problem.weights.reshape(steps * dim, channels)
    chunk = max(1, _PREDICTION_BYTES // max(1, steps * dim * matrix.itemsize))
    for first in range(0, rows, chunk):
        some = slice(first, min(first + chunk, rows))
        targets = problem.targets[:, some]
        contexts = torch.where(_present(targets).any(0).unsqueeze(1), problem.contexts[some], 0)
        result = _contrast_chunk(problem, some, contexts @ matrix.T, row_weights, needs)
        losses[:, some], ranks[:, some] = (
            values.view(contexts.shape[0], steps).T for values in (result.losses, result.rank)
        )
        if needs[0] or needs[1]:
            of_predictions = result.grad_queries.view(contexts.shape[0], steps * dim)
        if needs[0]:
            gradients.contexts[some] = of_predictions @ matrix
        if needs[1]:
            of_weights.view(matrix.shape).add_(of_predictions.T @ contexts)
        if needs[2]:
            of_keys.add_(result.grad_keys[0])
    present = _present(problem.targets)
    kept = (gradients.contexts, of_weights.to(matrix.dtype), of_keys.to(matrix.dtype))
    losses, ranks = torch.where(present, losses, 0), torch.where(present, ranks, -1)
    return _Contrasted(losses, ranks, Gradients(*kept))


def _contrast_chunk(
    problem: _Problem, some: slice, predictions: Tensor, row_weights: Tensor, needs: Sequence[bool]
) -> ContrastResults:
    """Return the results of info_nce's op for the predictions [M', K * D] of the contexts in the slice ``some``."""
    steps, dim, _ = problem.weights.shape
    targets = problem.targets[:, some].T
    negatives = problem.negatives
    if negatives is not None:
        negatives = negatives[:, some].transpose(0, 1).expand(-1, steps, -1)
        negatives = torch.where(_present(targets).unsqueeze(-1), negatives, 0).reshape(
            1, targets.numel(), negatives.shape[-1]
        )
    contrast = Contrast(
        predictions.reshape(1, targets.numel(), dim),
        problem.keys.unsqueeze(0),
        targets.reshape(1, targets.numel(), 1),
        negatives,
        *(None,) * 6,
        problem.scale,
        "softmax",
        "all",
        False,
    )
    forms = [needs[0] or needs[1], needs[2], False]
    weights = row_weights[:, some].T.reshape(1, targets.numel())
    return ContrastResults._make(contrast_op(*contrast, weights, None, "sum", [*forms, True, False, False]))


# --- The op ---


def _contrast(problem: _Problem, row_weights: Tensor, needs: Sequence[bool]) -> _Contrasted:
    """Compute losses, ranks and gradients by the CPU's kernel, or on CUDA by that of info_nce."""
    if not native.info_nce_on_cpu(problem.contexts):
        return _contrast_chunks(problem, row_weights, needs)
    losses, ranks = torch.empty_like(row_weights), torch.empty_like(problem.targets)
    gradients = _empty_gradients(problem, needs)
    arguments = [
        *(value.contiguous() if isinstance(value, Tensor) else None for value in problem[:-1]),
        *(row_weights.contiguous(), losses, ranks),
        *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)),
        problem.scale,
    ]
    with_workspace(native.predict_and_contrast, problem.contexts, *arguments)
    return _Contrasted(losses, ranks, gradients)


_Way = Callable[[_Problem, Tensor, Sequence[bool]], _Contrasted]


def _forward(contrast: _Way, op: _Forward) -> Results:
    with without_autocast(op.problem.contexts.device):  # Autocast would round what is summed.
        row_weights = _row_weights(op.problem.targets, op.reduction, sums_dtype(op.problem.contexts))
        losses, ranks, gradients = contrast(op.problem, row_weights, op.needs)
        return Results(*_reduced(losses, row_weights, op.reduction), ranks, *gradients)


def _form_gradients(contrast: _Way, op: _Backward) -> Gradients:
    with without_autocast(op.problem.contexts.device):
        return contrast(op.problem, op.row_weights, op.needs).gradients


def _setup_context(ctx: Any, op: _Forward, output: Results) -> None:
    ctx.requires = list(ctx.needs_input_grad[:3])
    # Gradients that were not formed with the loss are computed once the gradient of each row is known.
    ctx.later = any(required and not formed for required, formed in zip(ctx.requires, op.needs, strict=True))
    ctx.save_for_backward(*(x for x in op.problem if not isinstance(x, float)), output.loss, *output[-3:])
    ctx.scale, ctx.reduction = op.problem.scale, op.reduction
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, saved: Sequence[Any], grad: Tensor | None, *_: Tensor | None) -> dict[str, Tensor | None]:
    if grad is None:
        return {}
    tensors, loss, gradients = saved[:5], saved[5], saved[6:]
    if ctx.later:
        row_weights = _row_weights(tensors[3], ctx.reduction, loss.dtype)
        row_weights = torch.where(row_weights == 0, 0, grad * row_weights)
        gradients = _gradients_op(*tensors, ctx.scale, row_weights, ctx.requires)
    elif all(map(is_plain, (grad, *gradients))):
        # Scaled in place and returned: copies of the largest would take a tenth of the time and twice the memory.
        # A second backward pass forms them again.
        ctx.later = True
        gradients = [gradient.data.mul_(grad) for gradient in gradients]
    else:
        gradients = [gradient * grad for gradient in gradients]
    return {
        name: gradient if required else None
        for name, gradient, required in zip(_Problem._fields, gradients, ctx.requires, strict=False)
    }


_op = register(
    "predict_and_contrast",
    _Forward,
    Results,
    reference=partial(_forward, _contrast_chunks),
    kernel=partial(_forward, _contrast),
    fake=_empty_results,
    setup_context=_setup_context,
    backward=_backward,
    once=True,
)
_gradients_op = register(
    "predict_and_contrast_gradients",
    _Backward,
    Gradients,
    reference=partial(_form_gradients, _contrast_chunks),
    kernel=partial(_form_gradients, _contrast),
    fake=lambda op: _empty_gradients(op.problem, op.needs),
)


def predict_and_contrast_reference(
    contexts: Tensor,
    weights: Tensor,
    keys: Tensor,
    targets: Tensor,
    *,
    negatives: Tensor | None = None,
    scale: float = 1.0,
    reduction: str = "mean",
) -> PredictAndContrastOutput:
    """:func:`predict_and_contrast` step by step, with predictions and scores in memory, arguments unchecked."""
    problem = _flat_problem(contexts, weights, keys, targets, negatives, scale)
    losses, ranks = [], []
    for step, matrix in enumerate(problem.weights):
        (rows,) = _present(problem.targets[step]).nonzero(as_tuple=True)
        drawn: Tensor | None = None
        if problem.negatives is not None:
            drawn = problem.negatives[step if len(problem.negatives) > 1 else 0, rows]
        queries = problem.contexts[rows] @ matrix.T
        positives = problem.targets[step, rows]
        result = info_nce_reference(queries, problem.keys, positives, negatives=drawn, scale=scale, reduction="none")
        losses.append(result.loss.new_zeros(problem.targets.shape[1]).index_put((rows,), result.loss))
        ranks.append(problem.targets.new_full((problem.targets.shape[1],), -1).index_put((rows,), result.rank))
    if losses:
        all_losses, rank = torch.stack(losses), torch.stack(ranks)
    else:
        scores = problem.contexts @ problem.weights.mT @ problem.keys.T
        all_losses, rank = scores.sum(2, dtype=sums_dtype(scores)), torch.empty_like(problem.targets)
    weights_of_rows = _row_weights(problem.targets, reduction, all_losses.dtype)
    loss = _reduced(all_losses, weights_of_rows, reduction)[0]
    return _output(loss, all_losses.detach(), rank, problem.targets.view(targets.shape), reduction)
