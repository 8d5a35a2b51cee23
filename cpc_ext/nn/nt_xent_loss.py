"""NT-Xent, the loss of SimCLR: each view of an image picks out its other view among all views of the batch.

It is InfoNCE whose queries are also its keys: the positive of a row is the same image's other view, and the row's own
key is left out.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cpc_ext.nn.across_ranks import EXCHANGES, exchange_with, ring_info_nce, row_blocks
from cpc_ext.nn.unit_length import unit_length
from cpc_ext.ops._library import without_autocast
from cpc_ext.ops.info_nce import info_nce

__all__ = ["NTXentLoss", "NTXentOutput"]

# Similarities in memory while positives are ranked.
_BLOCK_SIMILARITIES = 1 << 22


class NTXentOutput(NamedTuple):
    """What :class:`NTXentLoss` returns: scalars, all but the loss without gradient.

    Attributes:
        loss: mean over views, in nats.
        accuracy: fraction of views whose other view is more similar than any other image's.
        top5_accuracy: fraction of views whose other view is among the five most similar; None without statistics.
        mean_position: mean place of the other view in the order of similarity; 1 is the most similar; None without
            statistics.
        mutual_information: log of the number of keys contrasted minus the loss, a lower bound on the mutual information
            of two views, in nats.
    """

    loss: Tensor
    accuracy: Tensor
    top5_accuracy: Tensor | None
    mean_position: Tensor | None
    mutual_information: Tensor


class NTXentLoss(nn.Module):
    """Normalised temperature-scaled cross-entropy (Chen et al. 2020, arXiv 2002.05709, equation 1).

    ``-log(exp(sim(i, j) / τ) / Σ_{k≠i} exp(sim(i, k) / τ))`` for both views j of every image, sim the cosine
    similarity. Where several processes share a batch, each passes its own images; the loss is that of its own views.

    Args:
        temperature: τ.
        gather_negatives: where there are several processes: "none" contrasts with the process's own images, "gather"
            with those of all, whose keys are gathered, "ring" with the same, without holding them all at once.
        statistics: whether the positions of the positives are found as well, for ``top5_accuracy`` and
            ``mean_position``. They take all similarities once more, which is 40 % of the time of loss and gradient at
            2048 views; in a ring they come with the loss.

    Raises:
        ValueError: an argument that is none of those above.
    """

    def __init__(self, temperature: float = 0.07, *, gather_negatives: str = "none", statistics: bool = True) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if gather_negatives not in EXCHANGES:
            raise ValueError(f"gather_negatives must be one of {', '.join(EXCHANGES)}, got {gather_negatives!r}")
        self.temperature = temperature
        self.gather_negatives = gather_negatives
        self.statistics = statistics

    def forward(self, first: Tensor, second: Tensor) -> NTXentOutput:
        """The loss of two views of N images.

        Args:
            first, second: floating [N, D], of any finite length, 0 included; row n of both is of image n.

        Raises:
            ValueError: views of different shapes, or fewer than one image.
        """
        if first.ndim != 2 or first.shape != second.shape or len(first) == 0:
            raise ValueError(
                f"first and second must both be [N, D], got {tuple(first.shape)} and {tuple(second.shape)}"
            )
        # In float32 at least, under autocast too: the temperature multiplies a rounding of the similarity by 14.
        with without_autocast(first.device):
            return self._contrast(torch.cat([first, second]).to(torch.promote_types(first.dtype, torch.float32)))

    def _contrast(self, views: Tensor) -> NTXentOutput:
        """views: [2 N, D], the second views after the first."""
        exchange = exchange_with(self.gather_negatives)
        images, dtype = len(views) // 2, views.dtype
        queries = unit_length(views)
        own = torch.arange(2 * images, device=queries.device)
        targets = (own + images) % (2 * images)
        scale = 1 / self.temperature
        if exchange.ring:
            losses, positions = ring_info_nce(queries, queries, targets, scale=scale, exclude=own)
            loss, accuracy = losses.mean(), None
        else:
            keys = exchange.gathered(queries)
            first = exchange.own_of(2 * images).start
            own, targets = own + first, targets + first
            loss, accuracy = info_nce(queries, keys, targets, scale=scale, exclude=own)
            positions = _positions(queries.detach(), keys.detach(), targets, own) if self.statistics else None
        top5_accuracy = mean_position = None
        if positions is not None:
            accuracy, top5_accuracy = ((positions < count).to(dtype).mean() for count in (1, 5))
            mean_position = positions.to(dtype).mean() + 1
        mutual_information = math.log(2 * images * exchange.world - 1) - loss.detach()
        return NTXentOutput(loss, accuracy, top5_accuracy, mean_position, mutual_information)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, gather_negatives={self.gather_negatives}, statistics={self.statistics}"


def _positions(queries: Tensor, keys: Tensor, targets: Tensor, exclude: Tensor) -> Tensor:
    """How many keys, besides the excluded one, are at least as similar to a query as its positive: int64 [M].

    Similarities are formed for a block of queries at a time, so memory stays far below M times N.
    """
    counts = []
    for rows in row_blocks(queries, keys, _BLOCK_SIMILARITIES):
        similarities = queries[rows] @ keys.mT
        positive = similarities.gather(1, targets[rows, None])
        # The positive reaches itself; the excluded key, which is the query, would as well.
        similarities.scatter_(1, exclude[rows, None], -torch.inf)
        counts.append((similarities >= positive).sum(1) - 1)
    return torch.cat(counts)
