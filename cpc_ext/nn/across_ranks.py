"""Negatives of several processes: keys that every rank contrasts its queries with, whichever rank computed them.

Either the keys of all ranks are gathered, or each rank's keys travel round a ring and no rank ever holds those of more
than one other. Both give gradients back to the keys' owners.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cpc_ext.ops._library import differentiable_once, without_autocast

__all__ = ["EXCHANGES", "Exchange", "RingOutput", "exchange_with", "gather_from_ranks", "ring_info_nce", "row_blocks"]

EXCHANGES = ("none", "gather", "ring")
# Logits of the ring that are in memory at a time.
_BLOCK_LOGITS = 1 << 24


def _position_in_world() -> tuple[int, int]:
    """(rank, number of ranks) of the default process group; (0, 1) where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


class Exchange(NamedTuple):
    """Whose keys a loss contrasts its queries with: see :func:`exchange_with`.

    Attributes:
        first: how many ranks' keys come before the rank's own in what :meth:`gathered` gives.
        world: how many ranks' keys are contrasted.
        ring: whether they pass by instead of being gathered.
    """

    first: int
    world: int
    ring: bool

    def gathered(self, keys: Tensor, dim: int = 0) -> Tensor:
        """Keys of all ranks that are contrasted, in the order of the ranks; where they pass by, the own ones."""
        return keys if self.ring or self.world == 1 else gather_from_ranks(keys, dim)

    def own_of(self, size: int) -> slice:
        """Where the rank's own are in what :meth:`gathered` gives, if each has so many."""
        return slice(self.first * size, (self.first + 1) * size)


def exchange_with(name: str) -> Exchange:
    """The exchange of this name in ``EXCHANGES``: with no rank, all by gathering, or all in a ring."""
    rank, world = (0, 1) if name == "none" else _position_in_world()
    ring = name == "ring" and world > 1
    return Exchange(0 if ring else rank, world, ring)


@torch.compiler.disable
def gather_from_ranks(values: Tensor, dim: int = 0) -> Tensor:
    """The values of all ranks along ``dim``, in the order of the ranks; of equal shape on each.

    The gradient of a rank's values is the sum of the gradients that all ranks have for them. So with a loss that is a
    mean over a rank's own queries, gradients averaged over the ranks are those of the mean over all queries. The same
    holds of further derivatives, each of which takes all ranks.
    """
    return values if _position_in_world()[1] == 1 else _Gather.apply(values, dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int) -> Tensor:
        ctx.dim, ctx.size = dim, values.shape[dim]
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _SumForOwner.apply(gradient, ctx.dim, ctx.size), None


class _SumForOwner(torch.autograd.Function):
    """The transpose of _Gather: a rank's part of what all ranks together have for the parts of each."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, dim: int, size: int) -> Tensor:
        ctx.dim = dim
        # Not in place: the gradient may be shared with other parts of the graph.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.narrow(dim, dist.get_rank() * size, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Gather.apply(gradient, ctx.dim), None, None


class RingOutput(NamedTuple):
    """What :func:`ring_info_nce` returns.

    Attributes:
        loss: [*, M] in nats.
        rank: int64 [*, M], how many keys score at least as high as the positive one; 0 where it is the best.
    """

    loss: Tensor
    rank: Tensor


@torch.compiler.disable
def ring_info_nce(
    queries: Tensor, keys: Tensor, targets: Tensor, *, scale: float = 1.0, exclude: Tensor | None = None
) -> RingOutput:
    """InfoNCE of this rank's queries against the keys of all ranks, which pass by one rank's at a time.

    Equal to :func:`cpc_ext.ops.info_nce` with gathered keys, in memory that does not grow with the number of ranks.
    Loss terms of chunks are merged by their log-sum-exp; backward sends the keys round once more, and with them their
    gradient, to which each rank adds its part. As that takes every rank, all must call both, in the same order. Where
    there is no other, a rank's own keys are all there are. Logits are float32 (float64 for float64) under autocast too.
    Differentiable once; differentiating the gradient is a RuntimeError.

    Args:
        queries: [*, M, D].
        keys: [*, N, D], of one shape on all ranks.
        targets: int64 [*, M], indices of the positive keys, which are this rank's own.
        scale: factor of the dot products.
        exclude: int64 [*, M], one of this rank's own keys to leave out of each row.
    """
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
    # Autocast would round the logits of the forward pass, and not those of the backward pass.
    with without_autocast(queries.device):
        queries, keys = queries.to(dtype), keys.to(dtype)
        positive = (queries * _take(keys, targets)).sum(-1) * scale
        log_sum, rank = _RingLogSumExp.apply(queries, keys, positive.detach(), targets, scale, exclude)
        return RingOutput(log_sum - positive, rank)


class _RingLogSumExp(torch.autograd.Function):
    """Log-sum-exp of every query's logits over the keys of all ranks, and how many reach the positive's."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, positive: Tensor, targets: Tensor, scale: float, exclude: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        own = keys.contiguous()
        passing = own
        log_sum = torch.full_like(positive, -torch.inf)
        rank = torch.zeros_like(targets)
        world = _position_in_world()[1]
        for turn in range(world):
            # The next keys travel while these are used.
            arriving, transfers = _pass_on(passing) if turn < world - 1 else (passing, [])
            for rows in row_blocks(queries, keys, _BLOCK_LOGITS):
                logits = queries[..., rows, :] @ passing.mT * scale
                reached = logits >= positive[..., rows, None]
                if turn == 0:
                    reached.scatter_(-1, targets[..., rows, None], False)
                    if exclude is not None:
                        logits.scatter_(-1, exclude[..., rows, None], -torch.inf)
                        reached.scatter_(-1, exclude[..., rows, None], False)
                rank[..., rows] += reached.sum(-1)
                log_sum[..., rows] = torch.logaddexp(log_sum[..., rows], logits.logsumexp(-1))
            _wait(transfers)
            passing = arriving
        ctx.save_for_backward(queries, own, log_sum, exclude)
        ctx.scale = scale
        ctx.mark_non_differentiable(rank)
        return log_sum, rank

    @staticmethod
    @differentiable_once("ring_info_nce")
    def backward(ctx: Any, saved: tuple[Tensor, ...], gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        queries, passing, log_sum, exclude = saved
        query_gradient = torch.zeros_like(queries)
        # The gradient travels one turn further than its keys: with the last of them it comes home.
        passing_gradient = torch.zeros_like(passing)
        world = _position_in_world()[1]
        for turn in range(world):
            arriving, transfers = _pass_on(passing) if turn < world - 1 else (passing, [])
            for rows in row_blocks(queries, passing, _BLOCK_LOGITS):
                share = (queries[..., rows, :] @ passing.mT * ctx.scale - log_sum[..., rows, None]).exp()
                if turn == 0 and exclude is not None:
                    share.scatter_(-1, exclude[..., rows, None], 0)
                share *= gradient[..., rows, None] * ctx.scale
                query_gradient[..., rows, :] += share @ passing
                passing_gradient += share.mT @ queries[..., rows, :]
            if world > 1:
                arriving_gradient, more = _pass_on(passing_gradient)
                _wait([*transfers, *more])
                passing_gradient = arriving_gradient
            passing = arriving
        return query_gradient, passing_gradient, None, None, None, None


def _take(keys: Tensor, indices: Tensor) -> Tensor:
    """keys [*, N, D] at indices [*, M] → [*, M, D]."""
    return keys.gather(-2, indices.unsqueeze(-1).expand(*indices.shape, keys.shape[-1]))


def row_blocks(queries: Tensor, keys: Tensor, most: int) -> list[slice]:
    """Rows of queries [*, M, D] that have at most so many logits against the keys [*, N, D], or are one row."""
    count = queries.shape[-2]
    size = max(1, most // max(1, keys.shape[:-1].numel()))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _pass_on(values: Tensor) -> tuple[Tensor, list[dist.Work]]:
    """Send values to the next rank while the previous one's arrive: where they will be, and what to wait for."""
    rank, world = _position_in_world()
    arriving = torch.empty_like(values)
    transfers = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, values, (rank + 1) % world),
            dist.P2POp(dist.irecv, arriving, (rank - 1) % world),
        ]
    )
    return arriving, transfers


def _wait(transfers: list[dist.Work]) -> None:
    for transfer in transfers:
        transfer.wait()
