"""Negatives of several processes: every rank contrasts its queries with the keys of all ranks.

Either all ranks' keys are gathered, or each rank's keys travel round a ring, so that no rank holds those of more than
two others at a time. Both send the gradients back to the keys' owners.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from cpc_ext.ops._checks import dtype_name
from cpc_ext.ops._contrast import Results, contrast, contrast_gradients_op, contrast_op
from cpc_ext.ops._contrast_arguments import ContrastOptions, check_arguments, flat_problem
from cpc_ext.ops._contrast_problem import Contrast, Gradients
from cpc_ext.ops._library import differentiable_once, values_at_hand, without_autocast

__all__ = ["EXCHANGES", "Exchange", "RingOutput", "exchange_with", "gather_from_ranks", "ring_info_nce"]

EXCHANGES = ("none", "gather", "ring")
# Number of dimensions whose sizes ranks compare, and PyTorch's dtypes, which they compare by their index here.
_DIMS = 7
_TYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)

Function = TypeVar("Function", bound=Callable[..., Any])


def _uncompiled(function: Function) -> Function:
    """Do what :func:`torch.compiler.disable` does, typed, and load the compiler only when the function is called."""
    disabled: Any = _disable_dynamo(function)
    return cast(Function, disabled)


def _position_in_world() -> tuple[int, int]:
    """Return (rank, number of ranks) of the default process group; (0, 1) if there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


class Exchange(NamedTuple):
    """The ranks whose keys a loss contrasts its queries with; see :func:`exchange_with`.

    Attributes:
        first: number of ranks whose keys precede the rank's own in the result of :meth:`gathered`.
        world: number of ranks whose keys are contrasted.
        ring: whether keys travel round a ring instead of being gathered.
    """

    first: int
    world: int
    ring: bool

    def gathered(self, keys: Tensor, dim: int = 0) -> Tensor:
        """Return the keys of all contrasted ranks, in the order of the ranks; in a ring, the rank's own."""
        return keys if self.ring or self.world == 1 else gather_from_ranks(keys, dim)

    def own_of(self, size: int) -> slice:
        """Return the slice of the rank's own keys in the result of :meth:`gathered`, if each rank has ``size``."""
        return slice(self.first * size, (self.first + 1) * size)


def exchange_with(name: str) -> Exchange:
    """Return an exchange by its name in ``EXCHANGES``: with no other rank, with all by gathering, or in a ring."""
    rank, world = (0, 1) if name == "none" else _position_in_world()
    ring = name == "ring" and world > 1
    return Exchange(0 if ring else rank, world, ring)


@_uncompiled
def gather_from_ranks(values: Tensor, dim: int = 0) -> Tensor:
    """Concatenate the values of all ranks along ``dim``, in the order of the ranks.

    The gradient of a rank's values is the sum of the gradients that all ranks have for them. So with a loss that is a
    mean over a rank's own queries, gradients averaged over the ranks are those of the mean over all queries. This also
    holds for higher derivatives, each of which requires a call on all ranks.

    Args:
        values: [..., n, ...], of one shape and dtype on all ranks of the default process group. All ranks must call
            this function, and backward, in the same order.
        dim: the dimension that grows from n to n times the number of ranks.

    Returns:
        [..., n * ranks, ...]; a rank's own values begin at ``rank * n``. Without a group, or with one rank, ``values``.

    Raises:
        IndexError: a dim that values do not have.
        ValueError: on the CPU, shapes or dtypes that differ. On other devices the check would stall the stream; there
            ``TORCH_DISTRIBUTED_DEBUG=DETAIL`` makes PyTorch check.
    """
    if _position_in_world()[1] == 1:
        return values
    _check_alike("values", values)
    return _gather(values, dim)


def _check_alike(name: str, values: Tensor) -> None:
    """Raise ValueError if values on the CPU have another shape or dtype on another rank.

    gloo itself ends the process if shapes differ, and reinterprets the bits of another dtype of the same size.
    """
    if values.device.type != "cpu":
        return
    dtype = _TYPES.index(values.dtype)
    mine = torch.tensor([dtype, values.ndim, *values.shape[:_DIMS], *[0] * (_DIMS - values.ndim)], device="cpu")
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    if not all(torch.equal(one, mine) for one in every):
        if len({int(one[0]) for one in every}) > 1:
            types = ", ".join(dtype_name(_TYPES[int(one[0])]) for one in every)
            raise ValueError(f"{name} must have one type on all ranks, got {types}")
        shapes = ", ".join(str(tuple(one[2 : 2 + int(one[1])].tolist())) for one in every)
        raise ValueError(f"{name} must have one shape on all ranks, got {shapes}")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int) -> Tensor:
        ctx.dim, ctx.size = dim, values.shape[dim]
        parts = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, values.contiguous())
        return torch.cat(parts, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _sum_for_owner(gradient, ctx.dim, ctx.size), None


class _SumForOwner(torch.autograd.Function):
    """The transpose of _Gather: the sum of all ranks' gradients for a rank's own values."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, dim: int, size: int) -> Tensor:
        ctx.dim = dim
        # Not in place: the gradient may be shared with other parts of the graph.
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.narrow(dim, dist.get_rank() * size, size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _gather(gradient, ctx.dim), None, None


_gather: Callable[[Tensor, int], Tensor] = _Gather.apply
_sum_for_owner: Callable[[Tensor, int, int], Tensor] = _SumForOwner.apply


class RingOutput(NamedTuple):
    """Results of :func:`ring_info_nce`.

    Attributes:
        loss: [*, M] in nats.
        rank: int64 [*, M], the number of keys that score at least as high as the positive; 0 if it scores highest.
    """

    loss: Tensor
    rank: Tensor


@_uncompiled
def ring_info_nce(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor,
    *,
    scale: float | Tensor = 1.0,
    exclude: Tensor | None = None,
    key_range: Tensor | None = None,
) -> RingOutput:
    """Compute InfoNCE of this rank's queries against the keys of all ranks, which travel round a ring of the ranks.

    Equal to :func:`cpc_ext.ops.info_nce` with gathered keys. Neither logits nor keys of more than two other ranks are
    in memory; only one number per query grows with the number of ranks. The backward pass sends the keys round again,
    together with their gradient, to which each rank adds its part. All ranks must call both passes, in the same order.
    With a single rank, its own keys are contrasted. Autocast does not apply. Differentiable once; differentiating the
    gradient raises a RuntimeError.

    Args:
        queries: [*, M, D].
        keys: [*, N, D], of one shape and dtype on all ranks; they are sent in their own dtype.
        targets: integers [*, M], indices of the positive keys among this rank's own.
        scale: factor of the dot products, a number or a tensor without dimensions, which may have a gradient.
        exclude: integers [*, M] or [*, M, E], keys of this rank to leave out for each query, -1 for none.
        key_range: integers [*, M, 2], begin and end of the keys of every rank that a query contrasts.

    Raises:
        TypeError, ValueError, IndexError: as :func:`cpc_ext.ops.info_nce`; a target of -1 is an IndexError on the CPU.
    """
    options = ContrastOptions(scale, targets, exclude=exclude, key_range=key_range)
    check_arguments(queries, keys, options, "softmax", "none")
    if targets.ndim != queries.ndim - 1:
        raise ValueError(f"targets must be one positive a query, got shape {tuple(targets.shape)}")
    if values_at_hand(targets) and targets.numel() and int(targets.min()) < 0:
        raise IndexError(f"targets must be in 0..{keys.shape[-2] - 1}, got {int(targets.min())}")
    # Autocast would round queries and keys.
    with without_autocast(queries.device):
        if _position_in_world()[1] == 1:
            result = contrast(queries, keys, options, reduction="none")
            loss, rank = result.loss, result.rank
        else:
            _check_alike("keys", keys)
            queries = queries.to(torch.promote_types(queries.dtype, keys.dtype))
            problem, _ = flat_problem(queries, keys, options, "softmax")
            loss, rank = _ring(
                problem.queries,
                problem.contrasted(),
                problem.scales,
                problem.targets,
                problem.exclude,
                problem.key_range,
                problem.scale,
            )
        return RingOutput(loss.view(targets.shape), rank.view(targets.shape))


class _Ring(torch.autograd.Function):
    """Losses and ranks [B, M] of queries [B, M, D] against a rank's own keys [B, N, D] and those of all others.

    The loss against the own keys is log(sum of exp(s - positive)). The keys of each other rank add
    exp(log-sum - positive) to that sum, and the gradients for a rank's keys are weighted by its share of the sum.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, scales: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        wants_slopes = ctx.needs_input_grad[2]
        own = keys.contiguous()

        def part(hop: int, passing: Tensor, positive: Tensor | None) -> Results:
            needs = [False, False, False, False, wants_slopes, positive is None]
            problem = _of_hop(hop, queries, passing, scales, *options)
            return Results(*contrast_op(*problem, None, positive, "none", needs))

        passing = own
        world = _position_in_world()[1]
        parts: list[Results] = []
        for hop in range(world):
            # The next keys are received while these are used.
            arriving, transfers = _pass_on(passing) if hop < world - 1 else (passing, [])
            parts.append(part(hop, passing, parts[0].bests if parts else None))
            _wait(transfers)
            passing = arriving
        first, others = parts[0], parts[1:]
        logs = torch.stack([first.loss, *(other.loss - first.bests for other in others)])
        loss = logs.logsumexp(0)
        shares = (logs - loss).exp()
        # The kernels give rows with invalid indices the rank -1.
        rank = torch.where(first.rank < 0, -1, torch.stack([one.rank for one in parts]).sum(0))
        slope = None
        if wants_slopes:
            of_positive = (queries.to(loss.dtype) * own.gather(1, _places(own, options[0]))).sum(-1)
            slope = (shares * torch.stack([one.slopes for one in parts])).sum(0) - shares[1:].sum(0) * of_positive
        ctx.save_for_backward(queries, own, scales, shares, rank, slope, *options[:-1])
        ctx.scale = options[-1]
        ctx.mark_non_differentiable(rank)
        return loss, rank

    @staticmethod
    @differentiable_once("ring_info_nce")
    def backward(ctx: Any, saved: tuple[Any, ...], gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        queries, own, scales, shares, rank, slope, targets, exclude, key_range = saved
        # A row of gradient 0 is absent, whatever it holds.
        weights = torch.where(gradient == 0, 0, gradient * shares)
        # The op with the own keys reports rows with invalid indices; the other keys contribute nothing to them.
        weights[1:].masked_fill_(rank < 0, 0)
        # The positive's own slope of -1 counts in full, but the first op includes only its share: add the rest.
        pull = (-weights[1:].sum(0) * ctx.scale * (1 if scales is None else scales)).unsqueeze(-1)
        places = _places(own, targets)
        query_gradient = torch.where(pull == 0, 0, pull * own.gather(1, places))
        # The gradient is passed on once more than its keys, which returns it to their owner.
        key_gradient = torch.zeros_like(own, dtype=pull.dtype)
        key_gradient.scatter_add_(1, places, torch.where(pull == 0, 0, pull * queries))
        passing = own
        world = _position_in_world()[1]
        for hop in range(world):
            arriving, transfers = _pass_on(passing) if hop < world - 1 else (passing, [])
            problem = _of_hop(hop, queries, passing, scales, targets, exclude, key_range, ctx.scale)
            part = Gradients(*contrast_gradients_op(*problem, weights[hop], None, [True, True, False]))
            query_gradient += part.queries
            key_gradient += part.keys
            arriving_gradient, more = _pass_on(key_gradient)
            _wait([*transfers, *more])
            passing, key_gradient = arriving, arriving_gradient
        scale_gradient = None if slope is None else torch.where(gradient == 0, 0, gradient * slope).sum().reshape(1)
        return query_gradient.to(queries.dtype), key_gradient.to(own.dtype), scale_gradient, None, None, None, None


_ring: Callable[..., tuple[Tensor, Tensor]] = _Ring.apply


def _of_hop(
    hop: int,
    queries: Tensor,
    keys: Tensor,
    scales: Tensor | None,
    targets: Tensor,
    exclude: Tensor | None,
    key_range: Tensor | None,
    scale: float,
) -> Contrast:
    """Return the contrast with the keys present after ``hop`` hops; only the own have positives and exclusions."""
    own = hop == 0
    return Contrast(
        queries=queries,
        keys=keys.to(queries.dtype),
        targets=targets if own else None,
        negatives=None,
        exclude=exclude if own else None,
        key_range=key_range,
        query_groups=None,
        key_groups=None,
        key_bias=None,
        scales=scales,
        scale=scale,
        measure="softmax" if own else "log_sum",
        contrast="all",
        symmetric=False,
    )


def _places(keys: Tensor, targets: Tensor) -> Tensor:
    """Return indices [B, M, D] that gather targets [B, M, 1] from keys [B, N, D]; invalid targets are clamped."""
    return targets.clamp(0, keys.shape[1] - 1).expand(-1, -1, keys.shape[2])


def _pass_on(values: Tensor) -> tuple[Tensor, list[dist.Work]]:
    """Send values to the next rank and receive the previous one's; return their buffer, and transfers to wait for."""
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
