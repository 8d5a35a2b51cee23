"""CLIP's loss: each image picks its text out of the batch, and each text its image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpc_ext.nn.across_ranks import EXCHANGES, Exchange, exchange_with, ring_info_nce
from cpc_ext.nn.typed import Module
from cpc_ext.ops._library import without_autocast
from cpc_ext.ops.info_nce import info_nce

__all__ = ["CLIPLoss", "check_features", "check_ranks", "exchange_of", "one_value"]


class CLIPLoss(Module):
    """Contrastive language-image pre-training (Radford et al. 2021, arXiv 2103.00020, figure 3).

    ``(cross-entropy of the rows + cross-entropy of the columns) / 2`` of the logits ``scale · image_m · text_n``, where
    m belongs to m. It is called as open_clip's ``ClipLoss`` is, and gives the same values and gradients, from scores
    that are computed once and never in memory.

    Where several processes share a batch, each passes its own pairs, as many as the others. Either as in open_clip, by
    ``world_size`` and what goes with it: without ``local_loss`` every process has the loss of all pairs, with it that
    of its own; without ``gather_with_grad`` no gradient comes back from other processes' losses. Or by
    ``gather_negatives``, which asks the process group for the ranks: the loss is that of the process's own pairs, with
    all gradients (``local_loss`` and ``gather_with_grad``). Averaged over the processes, as by
    DistributedDataParallel, those are the gradients of one process with the whole batch; without ``gather_with_grad``
    they are not.

    Args:
        local_loss, gather_with_grad: see above.
        cache_labels: without effect, as there are no labels.
        rank, world_size: of the default process group; a world of 1 contrasts the process's own pairs, whatever there
            is of a group.
        use_horovod: False.
        gather_negatives: "none", "gather" or "ring" as :class:`cpc_ext.nn.NTXentLoss` has them, in place of all these.

    Raises:
        ValueError: an argument that is none of those above.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        gather_negatives: str | None = None,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod must be False: features are gathered by torch.distributed")
        check_ranks(rank, world_size, gather_negatives, EXCHANGES)
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
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
            logit_scale: inverse temperature, a number or a tensor of one value, the exponential of CLIP's parameter.
            logit_bias: added to all logits, which does not change the loss. It gets a gradient of 0.
            output_dict: whether the loss is the value of "contrastive_loss" in a dict.

        Raises:
            TypeError, ValueError: features of other shapes, a scale or a bias that is not one number.
        """
        check_features(image_features, text_features)
        logit_scale = one_value("logit_scale", logit_scale)
        # Features are taken as they are: autocast would round those of float32.
        with without_autocast(image_features.device):
            loss = self._loss(image_features, text_features, logit_scale)
            if logit_bias is not None:
                # DistributedDataParallel waits for the gradient of every parameter.
                bias = one_value("logit_bias", logit_bias)
                loss = loss + 0 * (bias.to(loss) if isinstance(bias, Tensor) else bias)
        return {"contrastive_loss": loss} if output_dict else loss

    def _loss(self, images: Tensor, texts: Tensor, scale: float | Tensor) -> Tensor:
        exchange = exchange_of(self.rank, self.world_size, self.gather_negatives)
        local = self.local_loss or self.gather_negatives is not None
        if exchange.ring:
            own = torch.arange(len(images), device=images.device)
            of_images = ring_info_nce(images, texts, own, scale=scale).loss.mean()
            return (of_images + ring_info_nce(texts, images, own, scale=scale).loss.mean()) / 2
        if exchange.world > 1:
            every_image, every_text = (self._gathered(values, exchange, local) for values in (images, texts))
            if local:
                rows = exchange.own_of(len(images))
                own = torch.arange(rows.start, rows.stop, device=images.device)
                of_images = info_nce(images, every_text, own, scale=scale).loss
                return (of_images + info_nce(texts, every_image, own, scale=scale).loss) / 2
            images, texts = every_image, every_text
        return info_nce(images, texts, scale=scale, symmetric=True).loss

    def _gathered(self, values: Tensor, exchange: Exchange, local: bool) -> Tensor:
        """Values of all ranks, with the gradients that there are to be."""
        if self.gather_with_grad or self.gather_negatives is not None:
            return exchange.gathered(values)
        every = exchange.gathered(values.detach())
        if local:
            return every
        own = exchange.own_of(len(values))
        return torch.cat([every[: own.start], values, every[own.stop :]])

    def extra_repr(self) -> str:
        if self.gather_negatives is not None:
            return f"gather_negatives={self.gather_negatives}"
        if self.world_size == 1:
            return ""
        return (
            f"local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad}, rank={self.rank}, "
            f"world_size={self.world_size}"
        )


def check_ranks(rank: int, world_size: int, gather_negatives: str | None, exchanges: Sequence[str]) -> None:
    if gather_negatives is not None:
        if gather_negatives not in exchanges:
            raise ValueError(f"gather_negatives must be one of {', '.join(exchanges)}, got {gather_negatives!r}")
        if world_size != 1:
            raise ValueError(
                f"gather_negatives asks the process group for its size: it takes no world_size {world_size}"
            )
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be below world_size {world_size}, got {rank}")


def exchange_of(rank: int, world_size: int, gather_negatives: str | None) -> Exchange:
    """The exchange that a loss was made with, which must be possible now."""
    if gather_negatives is not None or world_size == 1:
        return exchange_with(gather_negatives or "none")
    exchange = exchange_with("gather")
    if (exchange.first, exchange.world) != (rank, world_size):
        raise ValueError(
            f"rank and world_size must be the process group's {exchange.first} and {exchange.world}, "
            f"got {rank} and {world_size}"
        )
    return exchange


def check_features(images: Tensor, texts: Tensor) -> None:
    if images.ndim != 2 or images.shape != texts.shape or len(images) == 0:
        raise ValueError(
            f"image_features and text_features must both be [B, D], got {tuple(images.shape)} and {tuple(texts.shape)}"
        )


def one_value(name: str, value: float | Tensor) -> float | Tensor:
    """A number as it is, a tensor of one value, which open_clip's models may give, without dimensions."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(f"{name} must be a number or a tensor of one value, got shape {tuple(value.shape)}")
    return value.reshape(())
