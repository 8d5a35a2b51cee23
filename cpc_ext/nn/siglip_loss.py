"""SigLIP's loss: of every image and every text, whether they belong together."""

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
    otherwise. It is called as open_clip's ``SigLipLoss`` is, and gives the same values and gradients, from scores that
    are never in memory.

    Where several processes share a batch, each passes its own pairs, as many as the others, and gets the loss of its
    images against the texts of all. Averaged over the processes, gradients are those of one process with the whole
    batch.

    Args:
        cache_labels: without effect, as there are no labels.
        rank, world_size: of the default process group; a world of 1 contrasts the process's own pairs, whatever there
            is of a group.
        dist_impl: how texts travel in open_clip, "bidir", "shift", "reduce" or "gather". Here they are gathered, which
            takes as many features, not scores, as there are texts.
        gather_negatives: "none" or "gather", in place of rank and world_size, which the process group is asked for.

    Raises:
        ValueError: an argument that is none of those above.
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
