"""A queue of the latest keys of earlier batches, as negatives of later queries."""

from __future__ import annotations

import torch
from torch import Tensor

from cpc_ext.nn.typed import Module
from cpc_ext.nn.unit_length import unit_length
from cpc_ext.ops.info_nce import info_nce

__all__ = ["KeyQueue"]

# Number of rows contrasted in one call, and so of slots for their positives behind the queue.
_ROOM = 1024


class KeyQueue(Module):
    """A queue of keys that are the negatives of InfoNCE.

    The queue is not copied when keys enter or are used, unless positives have a wider dtype. As the op takes all keys
    as one tensor, the slots behind the queue hold the positives of the rows that a call contrasts; each row contrasts
    the range of the queue, and its positive outside of it.

    Args:
        size: number of keys.
        dim: D, the number of features of a key.
        persistent: whether the queue is in the state dict.

    Attributes:
        keys: [size + slots for positives, D]. Initially the queue holds random directions, as MoCo's does.
        position: int64, index at which the next key enters, which is that of the oldest.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int, *, persistent: bool = True) -> None:
        super().__init__()
        self.size = size
        keys = torch.cat([unit_length(torch.randn(size, dim)), torch.zeros(_ROOM, dim)])
        self.register_buffer("keys", keys, persistent=persistent)
        self.register_buffer("position", torch.zeros((), dtype=torch.int64), persistent=persistent)

    def contrast(self, queries: Tensor, positives: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Compute InfoNCE of queries [M, D] with one positive each, [M, D]: the mean loss, and each row's rank [M].

        Gradients in both are formed with the loss, as the queue may change before the backward pass.

        Raises:
            ValueError: positives with another number of features than the queue's keys.
        """
        if positives.shape[1] != self.keys.shape[1]:
            raise ValueError(f"keys must have the queue's {self.keys.shape[1]} features, got {tuple(positives.shape)}")
        losses, ranks = zip(
            *(
                self._contrast_some(*rows, scale)
                for rows in zip(queries.split(_ROOM), positives.split(_ROOM), strict=True)
            ),
            strict=True,
        )
        return torch.stack(losses).sum() / queries.shape[0], torch.cat(ranks)

    def _contrast_some(self, queries: Tensor, positives: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses, and the ranks, of at most ``_ROOM`` rows."""
        rows = queries.shape[0]
        # A copy if the queue has a narrower dtype, so that positives are not rounded.
        keys = self.keys.to(torch.promote_types(self.keys.dtype, positives.dtype))
        keys[self.size : self.size + rows] = positives.detach()
        targets = torch.arange(self.size, self.size + rows, device=queries.device)
        key_range = (self.size * torch.arange(2, device=queries.device)).expand(rows, 2)
        loss, _, rank = info_nce(queries, keys, targets, scale=scale, key_range=key_range, reduction="sum")
        if positives.requires_grad:
            # A row's loss is -log p of its positive, and its slope in the positive's score is p - 1. The op forms no
            # gradient of the keys, which would be as large as the queue.
            with torch.no_grad():
                losses = info_nce(queries, keys, targets, scale=scale, key_range=key_range, reduction="none").loss
                slopes = scale * torch.expm1(-losses)
            pull = (slopes.unsqueeze(1) * queries.detach() * positives).sum()
            loss = loss + (pull - pull.detach())
        return loss, rank

    @torch.no_grad()
    def push(self, keys: Tensor, *, wrap: bool) -> None:
        """Replace the oldest keys by keys [B, D].

        wrap: whether keys beyond the queue's end enter at its start. Otherwise they are dropped, and the next batch
            enters there.
        """
        keys = keys[-self.size :] if wrap else keys
        places = self.position + torch.arange(keys.shape[0], device=keys.device)
        # Dropped keys are written to the slot of a positive.
        places = places % self.size if wrap else places.clamp(max=self.size)
        self.keys.index_copy_(0, places, keys.to(self.keys.dtype))
        after = self.position + keys.shape[0]
        self.position.copy_(after % self.size if wrap else torch.where(after < self.size, after, 0))

    def extra_repr(self) -> str:
        return f"{self.size}, {self.keys.shape[1]}"
