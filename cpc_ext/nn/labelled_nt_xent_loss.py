"""NT-Xent of labelled embeddings, pair by pair: each positive is told from an anchor's negatives alone.

From embeddings [N, D] and labels [N] to a scalar. The negatives' part of a loss is the anchor's, a log-sum-exp over
other classes; what is left is one score for each pair of a class.
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

# Rows and scores of a block of pairs that are in memory at a time; a row at least.
_BLOCK_ROWS = 256
_BLOCK_SCORES = 1 << 20


class LabelledNTXentLoss(Module):
    """pytorch-metric-learning's ``NTXentLoss(embeddings, labels)``.

    The mean over all pairs of an anchor a and another sample p of its class of ``-log(exp(s_ap) / (exp(s_ap) + sum of
    exp(s_an) over samples n of other classes))``, s the cosine similarity over the temperature τ. Other than in
    supervised contrast (:class:`cpc_ext.nn.SupConLoss`), positives do not compete with each other. 0 where no class has
    two samples. Memory grows with N, and time with N² and with the number of pairs of a class.

    Args:
        temperature: τ.

    Raises:
        TypeError, ValueError: a temperature that is no number, or not positive.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        self.temperature = temperature

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, float32 or, for float64, float64; under autocast too. Differentiable once.

        On CUDA it waits for the device once, as it must know how large the classes are.

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
        # In float32 at least, under autocast too: the temperature multiplies a rounding of the similarity by 14.
        with without_autocast(embeddings.device):
            labels, order = labels.to(embeddings.device).sort()
            wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            units = unit_length(wide)[order]
            scale = 1 / self.temperature
            others = scores_logsumexp(units, units, scale=scale, groups=(labels, labels), contrast="other")
            sizes: list[int] = labels.unique_consecutive(return_counts=True)[1].tolist()
            pairs = sum(size * (size - 1) for size in sizes)
            loss = _pair_losses(units, others, labels, sizes, scale, may_need_gradients(units, others))[0]
            return loss / max(pairs, 1)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"


class _PairLosses(torch.autograd.Function):
    """The sum of log(1 + exp(l_a - scale * u_a . u_p)) over all pairs of a class, from u [N, D] and l [N].

    Classes lie one after the other, as long as ``sizes`` says. Gradients of u and l, which come with the loss, are
    formed, where ``forms``, while the scores are at hand; from that of u follows that of a scale that is a tensor.
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
        units, (of_units, of_others, scale) = saved[0], saved[2:]
        of_scale = None
        if ctx.needs_input_grad[4]:
            # A score's slopes in its two embeddings, times these, are twice the scale times its slope in the scale.
            of_scale = gradient * (of_units * units).sum() / (2 * scale)
        return of_units * gradient, of_others * gradient, None, None, of_scale, None


_pair_losses: Callable[..., tuple[Tensor, Tensor, Tensor]] = _PairLosses.apply


def _blocks(sizes: list[int]) -> Iterator[tuple[slice, slice]]:
    """Rows that follow one another, and those of all their classes."""
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
