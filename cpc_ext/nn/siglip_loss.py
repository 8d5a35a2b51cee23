"""SigLIP's loss: of every image and every text, whether they belong together."""

from __future__ import annotations

import torch
from torch import Tensor

from cpc_ext.nn.clip_loss import check_features, check_ranks, exchange_of, one_value
from cpc_ext.nn.typed import Module
from cpc_ext.ops._library import without_autocast
from cpc_ext.ops.sigmoid_contrast import sigmoid_contrast

__all__ = ["SigLIPLoss"]

_WAYS = ("bidir", "shift", "reduce", "gather")


class SigLIPLoss(Module):
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
        super().__init__()
        if dist_impl is not None and dist_impl not in _WAYS:
            raise ValueError(f"dist_impl must be None or one of {', '.join(_WAYS)}, got {dist_impl!r}")
        check_ranks(rank, world_size, gather_negatives, ("none", "gather"))
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl
        self.gather_negatives = gather_negatives

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, a scalar in float32, or float64 for float64.

        Args:
            image_features, text_features: floating [B, D], as a rule of length 1; row n of both is of pair n.
            logit_scale: inverse temperature, a number or a tensor of one value, the exponential of the parameter.
            logit_bias: added to all logits, a number or a tensor of one value; -10 in the beginning. None: 0.
            output_dict: whether the loss is the value of "contrastive_loss" in a dict.

        Raises:
            TypeError, ValueError: features of other shapes, a scale or a bias that is not one number.
        """
        check_features(image_features, text_features)
        exchange = exchange_of(self.rank, self.world_size, self.gather_negatives)
        rows = exchange.own_of(len(image_features))
        # Features are taken as they are: autocast would round those of float32.
        with without_autocast(image_features.device):
            loss = sigmoid_contrast(
                image_features,
                exchange.gathered(text_features),
                torch.arange(rows.start, rows.stop, device=image_features.device) if exchange.world > 1 else None,
                scale=one_value("logit_scale", logit_scale),
                bias=0.0 if logit_bias is None else one_value("logit_bias", logit_bias),
            )
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        if self.gather_negatives is not None:
            return f"gather_negatives={self.gather_negatives}"
        return "" if self.world_size == 1 else f"rank={self.rank}, world_size={self.world_size}"
