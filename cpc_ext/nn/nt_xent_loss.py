"""NT-Xent, the loss of SimCLR: each view of an image identifies its other view among all views of the batch.

It is InfoNCE whose queries are also its keys: the positive of a row is the other view of the same image, and the row's
own key is excluded. With a memory bank, negatives are second views of earlier batches instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cpc_ext.nn.across_ranks import EXCHANGES, exchange_with, ring_info_nce
from cpc_ext.nn.key_queue import KeyQueue
from cpc_ext.nn.log_count import log_count
from cpc_ext.nn.typed import Module
from cpc_ext.nn.unit_length import unit_length
from cpc_ext.ops._checks import check_floating, is_integer
from cpc_ext.ops._contrast_arguments import check_positive
from cpc_ext.ops._library import without_autocast
from cpc_ext.ops.info_nce import info_nce

__all__ = ["NTXentLoss", "NTXentOutput", "check_views", "unit_views"]


class NTXentOutput(NamedTuple):
    """Results of :meth:`NTXentLoss.contrast`: scalars, all but the loss without gradient.

    Attributes:
        loss: mean over views, in nats.
        accuracy: fraction of views whose other view is more similar than any other image's.
        top5_accuracy: fraction of views whose other view is among the five most similar.
        mean_position: mean position of the other view in the order of similarity; 1 is the most similar.
        mutual_information: log of the number of contrasted keys minus the loss, a lower bound on the mutual information
            of two views, in nats.
    """

    loss: Tensor
    accuracy: Tensor
    top5_accuracy: Tensor
    mean_position: Tensor
    mutual_information: Tensor


class NTXentLoss(Module):
    """Normalised temperature-scaled cross-entropy (Chen et al. 2020, arXiv 2002.05709, equation 1).

    ``-log(exp(sim(i, j) / τ) / Σ_{k≠i} exp(sim(i, k) / τ))`` for both views j of every image, sim the cosine
    similarity. Where several processes share a batch, each passes its own images; the loss is that of its own views.
    Arguments and results are those of lightly's ``NTXentLoss``.

    Args:
        temperature: τ.
        memory_bank_size: 0, or (size, D) for a memory bank: only first views are queries, contrasted with their second
            view and with the last ``size`` second views of earlier batches. The bank is random at first; a batch enters
            after its loss is computed, if the loss has a gradient in the first views. New entries replace the oldest;
            a batch that exceeds the end of the bank is cut off there, and the next one enters at the start.
        gather_distributed: True is the same as ``gather_negatives="gather"``.
        gather_negatives: where there are several processes, "none" contrasts with the process's own images, "gather"
            with those of all, whose keys are gathered, and "ring" with the same, without holding them all at once. With
            a memory bank, "gather" enters the second views of all processes.

    Raises:
        TypeError, ValueError: an argument of another type or value.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
        *,
        gather_negatives: str | None = None,
    ) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        if gather_negatives is None:
            gather_negatives = "gather" if gather_distributed else "none"
        elif gather_negatives not in EXCHANGES:
            raise ValueError(f"gather_negatives must be one of {', '.join(EXCHANGES)}, got {gather_negatives!r}")
        elif gather_distributed and gather_negatives != "gather":
            raise ValueError(f'gather_distributed means gather_negatives="gather", got {gather_negatives!r}')
        self.temperature = temperature
        self.gather_negatives = gather_negatives
        self.memory_bank = _memory_bank(memory_bank_size)
        if self.memory_bank is not None and gather_negatives == "ring":
            raise ValueError('gather_negatives must be "none" or "gather" with a memory bank, got "ring"')

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Compute the loss of two views of N images, a scalar in float32, or float64 for float64 inputs.

        Args:
            first, second: floating [N, D], of any finite length, 0 included; row n of both is of image n.

        Raises:
            TypeError: views that are not floating tensors.
            ValueError: views of different shapes, or fewer than one image.
        """
        return self._loss_and_ranks(first, second)[0]

    def contrast(self, first: Tensor, second: Tensor) -> NTXentOutput:
        """Compute the loss and the measures that come with it. Arguments are those of :meth:`forward`."""
        return _output(*self._loss_and_ranks(first, second))

    def _loss_and_ranks(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, int]:
        """Return the loss, each view's number of keys at least as similar as its other view, and the number of keys."""
        check_views(first, second)
        # At least in float32, even under autocast: a temperature of 0.07 multiplies rounding of the similarity by 14.
        with without_autocast(first.device):
            views = unit_views(first, second)
            if self.memory_bank is None:
                return self._of_views(views)
            return self._of_bank(*views.chunk(2), enters=first.requires_grad and torch.is_grad_enabled())

    def _of_views(self, queries: Tensor) -> tuple[Tensor, Tensor, int]:
        """Contrast unit vectors [2 N, D], the second views after the first, with each other."""
        exchange = exchange_with(self.gather_negatives)
        views = queries.shape[0]
        own = torch.arange(views, device=queries.device)
        targets = own.roll(views // 2)
        scale = 1 / self.temperature
        if exchange.ring:
            losses, rank = ring_info_nce(queries, queries, targets, scale=scale, exclude=own)
            loss = losses.mean()
        else:
            keys = exchange.gathered(queries)
            first = exchange.own_of(views).start
            if first > 0:
                own, targets = own + first, targets + first
            loss, _, rank = info_nce(queries, keys, targets, scale=scale, exclude=own)
        return loss, rank, views * exchange.world - 1

    def _of_bank(self, queries: Tensor, keys: Tensor, *, enters: bool) -> tuple[Tensor, Tensor, int]:
        bank = self.memory_bank
        assert bank is not None
        loss, rank = bank.contrast(queries, keys, 1 / self.temperature)
        if enters:
            bank.push(exchange_with(self.gather_negatives).gathered(keys.detach()), wrap=False)
        return loss, rank, bank.size + 1

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather_negatives={self.gather_negatives}"


def check_views(first: Tensor, second: Tensor) -> None:
    for name, view in (("first", first), ("second", second)):
        check_floating(name, view)
    if first.ndim != 2 or first.shape != second.shape or first.shape[0] == 0:
        raise ValueError(f"first and second must both be [N, D], got {tuple(first.shape)} and {tuple(second.shape)}")


def unit_views(first: Tensor, second: Tensor) -> Tensor:
    """Return both views [N, D] as unit vectors [2 N, D], in float32, or in float64 if either is."""
    views = torch.cat([first, second])
    return unit_length(views.to(torch.promote_types(views.dtype, torch.float32)))


def _memory_bank(size: int | Sequence[int]) -> KeyQueue | None:
    if isinstance(size, int) and size == 0:
        return None
    if not isinstance(size, Sequence) or len(size) != 2 or not all(is_integer(one) and one >= 1 for one in size):
        raise ValueError(f"memory_bank_size must be 0, or (number of features, D), each at least 1, got {size}")
    # Like lightly's, it is not saved.
    return KeyQueue(size[0], size[1], persistent=False)


def _output(loss: Tensor, rank: Tensor, keys: int) -> NTXentOutput:
    """Return the output for views with ``keys`` keys each, of which ``rank`` are as similar as the positive."""
    top1, top5 = ((rank < count).to(loss.dtype).mean() for count in (1, 5))
    value = loss.detach()
    return NTXentOutput(loss, top1, top5, rank.to(loss.dtype).mean() + 1, log_count(keys, value) - value)
