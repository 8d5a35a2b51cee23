"""Decoupled contrastive learning: NT-Xent without the positive in the denominator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cpc_ext.nn.across_ranks import exchange_with
from cpc_ext.nn.nt_xent_loss import check_views, unit_views
from cpc_ext.nn.typed import Module
from cpc_ext.ops._contrast import contrast
from cpc_ext.ops._contrast_arguments import ContrastOptions, check_positive
from cpc_ext.ops._library import without_autocast

__all__ = ["DecoupledContrastiveLoss"]


class DecoupledContrastiveLoss(Module):
    """Decoupled contrastive loss (Yeh et al. 2022, arXiv 2110.06848, equation 6).

    ``-w(i, j) sim(i, j) / τ + log Σ_k exp(sim(i, k) / τ)``, the mean over the views i, with their other views j, the
    sum over all views k of other images, sim the cosine similarity. Arguments and results are those of lightly's
    ``DCLLoss``. Where several processes share a batch, each passes its own images; the loss is that of its own views.

    Args:
        temperature: τ.
        weight_fn: w, a function of two tensors [N, D] of unit vectors that returns [N]; called in both orders. None: 1.
        gather_distributed: whether to gather and contrast the views of all processes.

    Raises:
        TypeError, ValueError: a temperature that is not a positive number.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_positive("temperature", temperature)
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_negatives = "gather" if gather_distributed else "none"

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Compute the loss of two views of N images, a scalar in float32, or float64 for float64 inputs.

        Args:
            first, second: floating [N, D], of any finite length, 0 included; row n of both is of image n.

        Raises:
            TypeError: views that are not floating tensors.
            ValueError: views of different shapes, a single image, or weights that are not [N].
        """
        check_views(first, second)
        # At least in float32, even under autocast: a temperature of 0.1 multiplies rounding of the similarity by 10.
        with without_autocast(first.device):
            views = unit_views(first, second)
            return self._negatives(views) - self._positives(*views.chunk(2))

    def _negatives(self, views: Tensor) -> Tensor:
        """Return the mean log-sum-exp of views [2 N, D], the second views after the first."""
        exchange = exchange_with(self.gather_negatives)
        count = views.shape[0]
        if count * exchange.world < 4:
            raise ValueError("first and second must be of at least two images, which are contrasted")
        own = torch.arange(count, device=views.device)
        exclude = torch.stack([own, (own + count // 2) % count], 1) + exchange.own_of(count).start
        options = ContrastOptions(1 / self.temperature, exclude=exclude)
        return contrast(views, exchange.gathered(views), options, measure="log_sum", reduction="mean").loss

    def _positives(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the mean weighted score of the other view."""
        scores = (first * second).sum(1) / self.temperature
        if self.weight_fn is None:
            return scores.mean()
        weights = [self.weight_fn(*pair) for pair in ((first, second), (second, first))]
        if any(weight.shape != scores.shape for weight in weights):
            raise ValueError(f"weight_fn must give {tuple(scores.shape)}, got {[tuple(w.shape) for w in weights]}")
        return ((weights[0] + weights[1]) * scores).mean() / 2

    def extra_repr(self) -> str:
        weighted = "" if self.weight_fn is None else f", weight_fn={self.weight_fn}"
        return f"temperature={self.temperature}{weighted}, gather_negatives={self.gather_negatives}"
