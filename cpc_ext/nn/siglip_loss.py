"""SigLIP's loss: a binary classification of every pair of an image and a text as matching or not."""

from __future__ import annotations

import torch
from torch import Tensor

from cpc_ext.nn.image_text_loss import ImageTextLoss
from cpc_ext.ops.sigmoid_contrast import sigmoid_contrast

__all__ = ["SigLIPLoss"]

_WAYS = ("bidir", "shift", "reduce", "gather")


class SigLIPLoss(ImageTextLoss):
    """The pairwise sigmoid loss (Zhai et al. 2023, arXiv 2303.15343, equation 1).

    ``-Σ_n log sigmoid(z_mn (scale · image_m · text_n + bias))``, the mean over images m, where z is 1 for m = n and -1
    otherwise. Arguments, values and gradients are those of open_clip's ``SigLipLoss``, but scores are never in memory.

    Where several processes share a batch, each passes its own pairs, the same number on all, and gets the loss of its
    images against the texts of all processes. Averaged over the processes, gradients are those of one process with the
    whole batch.

    Args:
        cache_labels: no effect, as there are no labels.
        rank, world_size: those of the default process group. With a world_size of 1 the process's own pairs are
            contrasted, even where there is a group.
        dist_impl: how open_clip exchanges texts, "bidir", "shift", "reduce" or "gather". Here they are always gathered,
            so that the features of all texts are in memory, but not their scores.
        gather_negatives: "none" or "gather"; replaces rank and world_size, which then come from the process group.

    Raises:
        ValueError: an argument with another value.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        gather_negatives: str | None = None,
    ) -> None:
        super().__init__(rank, world_size, gather_negatives, ("none", "gather"))
        if dist_impl is not None and dist_impl not in _WAYS:
            raise ValueError(f"dist_impl must be None or one of {', '.join(_WAYS)}, got {dist_impl!r}")
        self.cache_labels = cache_labels
        self.dist_impl = dist_impl

    def _loss(self, images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor | None) -> Tensor:
        exchange = self._exchange()
        rows = exchange.own_of(images.shape[0])
        return sigmoid_contrast(
            images,
            exchange.gathered(texts),
            torch.arange(rows.start, rows.stop, device=images.device) if exchange.world > 1 else None,
            scale=scale,
            bias=0.0 if bias is None else bias,
        )
