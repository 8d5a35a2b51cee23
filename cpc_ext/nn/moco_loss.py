"""The loss of MoCo: each query identifies its key among a queue of keys of earlier batches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cpc_ext.nn.across_ranks import exchange_with
from cpc_ext.nn.key_queue import KeyQueue
from cpc_ext.nn.typed import Module
from cpc_ext.nn.unit_length import unit_length
from cpc_ext.ops._checks import check_floating, check_integer
from cpc_ext.ops._contrast_arguments import check_positive
from cpc_ext.ops._library import without_autocast

__all__ = ["MoCoLoss", "MoCoOutput"]


class MoCoOutput(NamedTuple):
    """Results of :meth:`MoCoLoss.contrast`: scalars, the accuracy without gradient.

    Attributes:
        loss: mean over queries, in nats.
        accuracy: fraction of queries whose key is more similar than all keys of the queue.
    """

    loss: Tensor
    accuracy: Tensor


class MoCoLoss(Module):
    """Momentum contrast (He et al. 2020, arXiv 1911.05722, algorithm 1), with its queue and without its encoders.

    ``-log(exp(q·k₊ / τ) / (exp(q·k₊ / τ) + Σ exp(q·k / τ)))``, the mean over queries q with their keys k₊, the sum over
    the keys k of the queue. Afterwards, in training mode, the batch's keys replace the oldest of the queue. Batches may
    have any size, and the last may be smaller. A step does not copy the queue.

    The queue is in the state dict, and random at first. Where several processes share a batch, each passes its own rows
    and gets their loss, and the keys of all enter the queue. It stays the same on all processes if it is so initially,
    as under DistributedDataParallel.

    Args:
        dim: D, the number of features of queries and keys.
        size: number of keys in the queue.
        temperature: τ.
        normalize: whether to normalise queries and keys to length 1 first. MoCo's own model does that with the results
            of its encoders.
        gather_negatives: where there are several processes, "gather" shares keys as above; "none" gives each process a
            queue of its own, and a DistributedDataParallel around the loss must then not broadcast buffers.

    Raises:
        TypeError, ValueError: an argument of another type or value.
    """

    def __init__(
        self,
        dim: int,
        size: int = 65536,
        temperature: float = 0.07,
        *,
        normalize: bool = True,
        gather_negatives: str = "gather",
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("size", size)):
            check_integer(name, value, 1)
        check_positive("temperature", temperature)
        if gather_negatives not in ("none", "gather"):
            raise ValueError(f"gather_negatives must be one of none, gather, got {gather_negatives!r}")
        self.temperature = temperature
        self.normalize = normalize
        self.gather_negatives = gather_negatives
        self.queue = KeyQueue(size, dim)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Compute the mean loss, a scalar in float32, or float64 for float64 inputs.

        Args:
            queries: floating [B, D], from the encoder that is trained.
            keys: floating [B, D], from the momentum encoder; row n of both is of image n. They get no gradient.

        Raises:
            TypeError: queries or keys that are not floating tensors.
            ValueError: queries and keys of different shapes, none at all, or not of ``dim`` features.
        """
        return self.contrast(queries, keys).loss

    def contrast(self, queries: Tensor, keys: Tensor) -> MoCoOutput:
        """Compute the loss and the accuracy. Arguments, effects and errors are those of :meth:`forward`."""
        for name, value in (("queries", queries), ("keys", keys)):
            check_floating(name, value)
        if queries.ndim != 2 or queries.shape != keys.shape or queries.shape[0] == 0:
            raise ValueError(
                f"queries and keys must both be [B, D], got {tuple(queries.shape)} and {tuple(keys.shape)}"
            )
        with without_autocast(queries.device):
            queries, keys = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (queries, keys.detach()))
            if self.normalize:
                queries, keys = unit_length(queries), unit_length(keys)
            loss, rank = self.queue.contrast(queries, keys, 1 / self.temperature)
            if self.training:
                self.queue.push(exchange_with(self.gather_negatives).gathered(keys), wrap=True)
            return MoCoOutput(loss, (rank == 0).float().mean())

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, normalize={self.normalize}, gather_negatives={self.gather_negatives}"
