"""NT-Xent of labelled embeddings: each pair of a class is contrasted with the anchor's negatives alone.

Embeddings [N, D] and labels [N] give a scalar. The negatives enter as one log-sum-exp per anchor, over other classes;
besides that, the loss takes one score for each pair of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext.nn.typed import Module
from cpc_ext.nn.unit_length import unit_length
from cpc_ext.ops._checks import check_dense, check_floating
from cpc_ext.ops._contrast_arguments import INTEGERS, check_positive
from cpc_ext.ops._library import differentiable_once, may_need_gradients, without_autocast
from cpc_ext.ops.scores_logsumexp import scores_logsumexp

__all__ = ["LabelledNTXentLoss"]

# Largest number of rows and of scores in a block of pairs, which is in memory at a time; it has at least one row.
_BLOCK_ROWS = 256
_BLOCK_SCORES = 1 << 20


class LabelledNTXentLoss(Module):
    """pytorch-metric-learning's ``NTXentLoss(embeddings, labels)``.

    The mean over all pairs of an anchor a and another sample p of its class of ``-log(exp(s_ap) / (exp(s_ap) + sum of
    exp(s_an) over samples n of other classes))``, s the cosine similarity divided by the temperature τ. Unlike in
    supervised contrast (:class:`cpc_ext.nn.SupConLoss`), positives do not compete with each other. 0 if no class has
    two samples. Memory grows with N, and time with N² and with the number of pairs of a class.

    Args:
        temperature: τ.

    Raises:
        TypeError, ValueError: a temperature that is not a positive number.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, in float32, or float64 for float64 inputs, even under autocast. Differentiable once.

        On CUDA the call waits for the device once, to read the sizes of the classes.

        Args:
            embeddings: floating [N, D], of any finite length.
            labels: integers [N], the classes, on any device.

        Raises:
            TypeError, ValueError: embeddings or labels of the wrong type or shape.
        """
        check_floating("embeddings", embeddings)
        if check_dense("labels", labels).dtype not in INTEGERS:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
            raise ValueError(
                f"embeddings must be [N, D] and labels [N], got {tuple(embeddings.shape)} and {tuple(labels.shape)}"
            )
        # At least in float32, even under autocast: a temperature of 0.07 multiplies rounding of the similarity by 14.
        with without_autocast(embeddings.device):
            labels, order = labels.to(embeddings.device).sort()
            wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            units = unit_length(wide)[order]
            scale = 1 / self.temperature
            others = scores_logsumexp(units, units, scale=scale, groups=(labels, labels), contrast="other")
            forms = may_need_gradients(units, others)
            if torch.compiler.is_compiling():
                traced = scale if isinstance(scale, Tensor) else units.new_full((), scale)
                loss, *_, pairs = _traced_pair_losses(units, others, labels, traced, forms)
                mean: Tensor = loss / pairs.clamp(min=1)
                return mean
            sizes = _sizes(labels)
            return _pair_losses(units, others, labels, sizes, scale, forms)[0] / max(_pairs(sizes), 1)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class _PairLosses(torch.autograd.Function):
    """The sum of log(1 + exp(l_a - scale * u_a . u_p)) over all pairs of a class, from u [N, D] and l [N].

    Rows are sorted by class; ``sizes`` are those of the classes. If ``forms``, the gradients of u and l are formed with
    the loss while the scores are in memory; that of a scale that is a tensor follows from that of u.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        units: Tensor, others: Tensor, labels: Tensor, sizes: list[int], scale: float | Tensor, forms: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = others.new_zeros(())
        of_units, of_others = torch.zeros_like(units), torch.zeros_like(others)
        index = torch.arange(len(units), device=units.device)
        for rows, columns in _blocks(sizes):
            margins = others[rows, None] - scale * units[rows] @ units[columns].mT
            pairs = (labels[rows, None] == labels[columns]) & (index[rows, None] != index[columns])
            margins = margins.masked_fill_(~pairs, -torch.inf)
            total -= F.logsigmoid(-margins).sum()
            if forms:
                slopes = margins.sigmoid_()
                of_others[rows] = slopes.sum(1)
                slopes *= -scale
                of_units[rows] += slopes @ units[columns]
                of_units[columns] += slopes.mT @ units[rows]
        return total, of_units, of_others

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        scale = inputs[4]
        ctx.save_for_backward(*inputs[:2], *output[1:], scale if isinstance(scale, Tensor) else None)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @differentiable_once("LabelledNTXentLoss")
    def backward(ctx: Any, saved: tuple[Tensor, ...], gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        of_units, of_others, of_scale = _of_pair_losses(saved, gradient, of_scale=ctx.needs_input_grad[4])
        return of_units, of_others, None, None, of_scale, None


_pair_losses: Callable[..., tuple[Tensor, Tensor, Tensor]] = _PairLosses.apply


# While torch.compile traces, the sizes of the classes are not known: this op reads them when it runs. It is not in the
# namespace cpc_ext, whose ops have kernels.
@torch.library.custom_op("cpc_ext_nn::labelled_pair_losses", mutates_args=())
def _traced_pair_losses(
    units: Tensor, others: Tensor, labels: Tensor, scale: Tensor, forms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the results of :class:`_PairLosses`, and the number of pairs."""
    sizes = _sizes(labels)
    return *_PairLosses.forward(units, others, labels, sizes, scale, forms), labels.new_tensor(_pairs(sizes))


@_traced_pair_losses.register_fake
def _(
    units: Tensor, others: Tensor, labels: Tensor, scale: Tensor, forms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return others.new_empty(()), torch.empty_like(units), torch.empty_like(others), labels.new_empty(())


def _setup_traced(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:2], *output[1:3], inputs[3])
    ctx.of_scale = ctx.needs_input_grad[3]


@differentiable_once("LabelledNTXentLoss")
def _backward_traced(ctx: Any, saved: tuple[Tensor, ...], gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    of_units, of_others, of_scale = _of_pair_losses(saved, gradient, of_scale=ctx.of_scale)
    return of_units, of_others, None, of_scale, None


_traced_pair_losses.register_autograd(_backward_traced, setup_context=_setup_traced)


def _of_pair_losses(
    saved: tuple[Tensor, ...], gradient: Tensor, *, of_scale: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return gradients of units, others and the scale. saved: units, others, gradients formed of both, and scale."""
    units, (of_units, of_others, scale) = saved[0], saved[2:]
    # A score's gradients in its two embeddings, times these, add up to twice the scale times its slope in the scale.
    slope = gradient * (of_units * units).sum() / (2 * scale) if of_scale else None
    return of_units * gradient, of_others * gradient, slope


def _sizes(labels: Tensor) -> list[int]:
    """Return the sizes of the classes, given sorted labels."""
    sizes: list[int] = labels.unique_consecutive(return_counts=True)[1].tolist()
    return sizes


def _pairs(sizes: list[int]) -> int:
    return sum(size * (size - 1) for size in sizes)


def _blocks(sizes: list[int]) -> Iterator[tuple[slice, slice]]:
    """Yield blocks: consecutive rows, and the range of all rows of their classes."""
    begins: list[int] = []
    ends: list[int] = []
    for size in sizes:
        begins.extend([len(begins)] * size)
        ends.extend([len(ends) + size] * size)
    row = 0
    while row < len(begins):
        end = row + 1
        while (
            end < min(len(begins), row + _BLOCK_ROWS) and (end + 1 - row) * (ends[end] - begins[row]) <= _BLOCK_SCORES
        ):
            end += 1
        yield slice(row, end), slice(begins[row], ends[end - 1])
        row = end
