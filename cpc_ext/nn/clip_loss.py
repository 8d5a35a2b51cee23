"""CLIP's loss: each image identifies its text in the batch, and each text its image."""

from __future__ import annotations

import torch
from torch import Tensor

from cpc_ext.nn.across_ranks import EXCHANGES, Exchange, ring_info_nce
from cpc_ext.nn.image_text_loss import ImageTextLoss
from cpc_ext.ops.info_nce import info_nce

__all__ = ["CLIPLoss"]


class CLIPLoss(ImageTextLoss):
    """Contrastive language-image pre-training (Radford et al. 2021, arXiv 2103.00020, figure 3).

    ``(cross-entropy of the rows + cross-entropy of the columns) / 2`` of the logits ``scale · image_m · text_n``, where
    text m is the positive of image m. Arguments, values and gradients are those of open_clip's ``ClipLoss``, but scores
    are never in memory as a whole, and a single process computes them once for both directions.

    Where several processes share a batch, each passes its own pairs, the same number on all, in one of two ways:

    - As in open_clip, with ``world_size`` and ``rank``. Without ``local_loss`` every process has the loss of all pairs,
      with it that of its own; without ``gather_with_grad`` no gradient comes back from other processes' losses.
    - With ``gather_negatives``, which takes the ranks from the process group. The loss is that of the process's own
      pairs, with all gradients, as with ``local_loss`` and ``gather_with_grad``.

    Averaged over the processes, as by DistributedDataParallel, gradients are those of one process with the whole batch;
    without ``gather_with_grad`` they are not.

    Args:
        local_loss, gather_with_grad: see above.
        cache_labels: no effect, as there are no labels.
        rank, world_size: those of the default process group. With a world_size of 1 the process's own pairs are
            contrasted, even where there is a group.
        use_horovod: must be False.
        gather_negatives: "none", "gather" or "ring", as in :class:`cpc_ext.nn.NTXentLoss`; replaces all of the above.

    Raises:
        ValueError: an argument with another value.
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
        super().__init__(rank, world_size, gather_negatives, EXCHANGES)
        if use_horovod:
            raise ValueError("use_horovod must be False: features are gathered by torch.distributed")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels

    def _loss(self, images: Tensor, texts: Tensor, scale: float | Tensor, bias: float | Tensor | None) -> Tensor:
        loss = self._contrast(images, texts, scale)
        if isinstance(bias, Tensor):
            # A no-op, because DistributedDataParallel waits for the gradient of every parameter.
            loss = loss + 0 * bias.to(loss)
        return loss

    def _contrast(self, images: Tensor, texts: Tensor, scale: float | Tensor) -> Tensor:
        exchange = self._exchange()
        local = self.local_loss or self.gather_negatives is not None
        if exchange.ring:
            own = torch.arange(images.shape[0], device=images.device)
            of_images = ring_info_nce(images, texts, own, scale=scale).loss.mean()
            return (of_images + ring_info_nce(texts, images, own, scale=scale).loss.mean()) / 2
        if exchange.world > 1:
            every_image, every_text = (self._gathered(values, exchange, local) for values in (images, texts))
            if local:
                rows = exchange.own_of(images.shape[0])
                own = torch.arange(rows.start, rows.stop, device=images.device)
                of_images = info_nce(images, every_text, own, scale=scale).loss
                return (of_images + info_nce(texts, every_image, own, scale=scale).loss) / 2
            images, texts = every_image, every_text
        return info_nce(images, texts, scale=scale, symmetric=True).loss

    def _gathered(self, values: Tensor, exchange: Exchange, local: bool) -> Tensor:
        """Return the values of all ranks, with gradients as the arguments of the loss require."""
        if self.gather_with_grad or self.gather_negatives is not None:
            return exchange.gathered(values)
        every = exchange.gathered(values.detach())
        if local:
            return every
        own = exchange.own_of(values.shape[0])
        return torch.cat([every[: own.start], values, every[own.stop :]])

    def extra_repr(self) -> str:
        ranks = super().extra_repr()
        if self.world_size == 1:
            return ranks
        return f"local_loss={self.local_loss}, gather_with_grad={self.gather_with_grad}, {ranks}"
