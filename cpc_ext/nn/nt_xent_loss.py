"""NT-Xent, the loss of SimCLR: each view of an image picks out its other view among all views of the batch.

It is InfoNCE whose queries are also its keys: the positive of a row is the same image's other view, and the row's own
key is left out. With a memory bank, negatives are second views of earlier batches instead.
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
    """What :meth:`NTXentLoss.contrast` returns: scalars, all but the loss without gradient.

    Attributes:
        loss: mean over views, in nats.
        accuracy: fraction of views whose other view is more similar than any other image's.
        top5_accuracy: fraction of views whose other view is among the five most similar.
        mean_position: mean place of the other view in the order of similarity; 1 is the most similar.
        mutual_information: log of the number of keys contrasted minus the loss, a lower bound on the mutual information
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
    It is called as lightly's ``NTXentLoss`` is, and gives the same.

    Args:
        temperature: τ.
        memory_bank_size: 0, or (size, D): first views alone are contrasted, each with its second view and with the last
            ``size`` second views of earlier batches. At first these are random; a batch enters after its loss where
            that has a gradient in the first views. When the bank is full its oldest are replaced from the start, and
            what of a batch goes beyond its end is dropped.
        gather_distributed: another word for ``gather_negatives="gather"``.
        gather_negatives: where there are several processes: "none" contrasts with the process's own images, "gather"
            with those of all, whose keys are gathered, "ring" with the same, without holding them all at once. With
            a memory bank, "gather" enters the second views of all processes.

    Raises:
        TypeError, ValueError: an argument that is none of those above.
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
        """The loss of two views of N images, a scalar in float32, or float64 for float64.

        Args:
            first, second: floating [N, D], of any finite length, 0 included; row n of both is of image n.

        Raises:
            TypeError: views that are no floating tensors.
            ValueError: views of different shapes, or fewer than one image.
        """
        return self._loss_and_ranks(first, second)[0]

    def contrast(self, first: Tensor, second: Tensor) -> NTXentOutput:
        """The loss, and how well views are told from others, which is known with it. Takes what a call takes."""
        return _output(*self._loss_and_ranks(first, second))

    def _loss_and_ranks(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, int]:
        """The loss, how many keys are as similar to each view as its other view, and how many it is contrasted with."""
        check_views(first, second)
        # In float32 at least, under autocast too: the temperature multiplies a rounding of the similarity by 14.
        with without_autocast(first.device):
            views = unit_views(first, second)
            if self.memory_bank is None:
                return self._of_views(views)
            return self._of_bank(*views.chunk(2), enters=first.requires_grad and torch.is_grad_enabled())

    def _of_views(self, queries: Tensor) -> tuple[Tensor, Tensor, int]:
        """queries: [2 N, D] of length 1, the second views after the first."""
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
    """Both views [N, D], of length 1, one after the other, in float32 or in float64 where either is."""
    views = torch.cat([first, second])
    return unit_length(views.to(torch.promote_types(views.dtype, torch.float32)))


def _memory_bank(size: int | Sequence[int]) -> KeyQueue | None:
    if isinstance(size, int) and size == 0:
        return None
    if not isinstance(size, Sequence) or len(size) != 2 or not all(is_integer(one) and one >= 1 for one in size):
        raise ValueError(f"memory_bank_size must be 0, or (number of features, D), each at least 1, got {size}")
    # It is not saved, as lightly's is not.
    return KeyQueue(size[0], size[1], persistent=False)


def _output(loss: Tensor, rank: Tensor, keys: int) -> NTXentOutput:
    """The output of views with so many keys each, of which ``rank`` are as similar as the positive one."""
    top1, top5 = ((rank < count).to(loss.dtype).mean() for count in (1, 5))
    value = loss.detach()
    return NTXentOutput(loss, top1, top5, rank.to(loss.dtype).mean() + 1, log_count(keys, value) - value)
