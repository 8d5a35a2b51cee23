"""Keys of several ranks, gathered or passed round a ring, are those of one process with the whole batch.

Ranks are threads here, whose messages arrive when they are waited for. Real processes are in
tests/training/test_distribution.py.
"""

from __future__ import annotations

import queue
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.autograd import grad

from cpc_ext.nn import GridInfoNCE, NTXentLoss, TargetInfoNCE, across_ranks
from cpc_ext.nn.across_ranks import EXCHANGES, exchange_with, gather_from_ranks, ring_info_nce
from cpc_ext.ops import info_nce

EXACT = {"atol": 1e-12, "rtol": 0}
PATIENCE_SECONDS = 5


class Received:
    def __init__(self, mail, values):
        self.mail, self.values = mail, values

    def wait(self):
        self.values.copy_(self.mail.get(timeout=PATIENCE_SECONDS))


class Threads:
    """What the package asks of ``torch.distributed``, for ranks that are threads."""

    isend, irecv = "isend", "irecv"

    def __init__(self, world):
        self.world, self.mine = world, threading.local()
        self.meeting = threading.Barrier(world, timeout=PATIENCE_SECONDS)
        self.brought, self.messages = [None] * world, 0
        self.mail = {(one, other): queue.Queue() for one in range(world) for other in range(world)}

    def run(self, program):
        """What the program gives on every rank."""

        def as_rank(rank):
            self.mine.rank = rank
            return program(rank)

        with ThreadPoolExecutor(self.world) as threads:
            return list(threads.map(as_rank, range(self.world)))

    def is_available(self):
        return True

    def is_initialized(self):
        return True

    def get_rank(self):
        return self.mine.rank

    def get_world_size(self):
        return self.world

    def all_gather(self, parts, values):
        assert values.is_contiguous()
        self.brought[self.mine.rank] = values.clone()
        self.meeting.wait()
        for part, value in zip(parts, self.brought, strict=True):
            assert part.is_contiguous()
            part.copy_(value)
        self.meeting.wait()

    def all_reduce(self, values):
        parts = [torch.empty_like(values) for _ in range(self.world)]
        self.all_gather(parts, values)
        values.copy_(sum(parts))

    def P2POp(self, operation, values, peer):
        return operation, values, peer

    def batch_isend_irecv(self, operations):
        received = []
        for operation, values, peer in operations:
            if operation == self.isend:
                self.messages += 1
                self.mail[self.mine.rank, peer].put(values)
            else:
                received.append(Received(self.mail[peer, self.mine.rank], values.fill_(torch.nan)))
        return received


@pytest.fixture(params=[1, 2, 3])
def ranks(request, monkeypatch):
    threads = Threads(request.param)
    monkeypatch.setattr(across_ranks, "dist", threads)
    return threads


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def test_there_is_one_rank_where_there_is_no_group(monkeypatch):
    values = torch.ones(3)
    assert gather_from_ranks(values) is values
    assert {exchange_with(name) for name in EXCHANGES} == {(0, 1, False)}
    # A build of PyTorch without torch.distributed has only this of it.
    monkeypatch.setattr(across_ranks, "dist", type("Unavailable", (), {"is_available": lambda: False}))
    assert {exchange_with(name) for name in EXCHANGES} == {(0, 1, False)}


def test_whose_keys_are_contrasted(ranks):
    world = ranks.world
    for rank, exchanges in enumerate(ranks.run(lambda rank: [exchange_with(name) for name in EXCHANGES])):
        passing = (0, world, True) if world > 1 else (0, 1, False)
        assert exchanges == [(0, 1, False), (rank, world, False), passing]
        assert exchanges[1].own_of(5) == slice(5 * rank, 5 * rank + 5)


@pytest.mark.parametrize("dim", [None, 0, 1])
def test_gathered_values_and_their_derivatives(ranks, dim):
    world = ranks.world
    values = [normal(4, 2, seed=rank).T for rank in range(world)]
    whole = torch.cat([value.detach() for value in values], dim or 0).requires_grad_()
    upstream = [normal(*whole.shape, seed=10 + rank) for rank in range(world)]
    options = {} if dim is None else {"dim": dim}

    def program(rank):
        gathered = gather_from_ranks(values[rank], **options)
        (first,) = grad((gathered**3 * upstream[rank]).sum(), values[rank], create_graph=True)
        return gathered, first, *grad((first**2).sum(), [values[rank], upstream[rank]])

    (first,) = grad((whole**3 * sum(upstream)).sum(), whole, create_graph=True)
    second, of_upstream = grad((first**2).sum(), [whole, upstream[0]])
    for rank, (gathered, *derivatives) in enumerate(ranks.run(program)):
        assert torch.equal(gathered, whole)
        for one, other in zip(derivatives[:2], (first, second), strict=True):
            torch.testing.assert_close(one, other.chunk(world, dim or 0)[rank], **EXACT)
        torch.testing.assert_close(derivatives[2], of_upstream, **EXACT)


@pytest.mark.parametrize("excluded", [False, True])
def test_a_ring_is_the_op_with_all_keys(ranks, excluded, monkeypatch):
    monkeypatch.setattr(across_ranks, "_BLOCK_LOGITS", 40)  # Two rows at a time.
    world = ranks.world
    generator = torch.Generator().manual_seed(0)
    queries = [normal(2, 7, 4, seed=rank) for rank in range(world)]
    keys = [normal(2, 4, 9, seed=10 + rank).mT for rank in range(world)]
    targets = torch.randint(4, (world, 2, 7), generator=generator)
    exclude = torch.randint(4, 9, (world, 2, 7), generator=generator) if excluded else [None] * world
    weights = torch.rand(world, 2, 7, dtype=torch.float64, generator=generator)

    def program(rank):
        # Autocast, which is a thread's own, rounds nothing.
        with torch.autocast("cpu", torch.bfloat16):
            output = ring_info_nce(queries[rank], keys[rank], targets[rank], scale=1.4, exclude=exclude[rank])
        assert not output.rank.requires_grad
        return *output, *grad((output.loss * weights[rank]).sum(), [queries[rank], keys[rank]])

    every = torch.cat(keys, 1)
    expected = [
        info_nce(
            queries[rank],
            every,
            targets[rank] + 9 * rank,
            scale=1.4,
            exclude=exclude[rank] + 9 * rank if excluded else None,
            reduction="none",
        )
        for rank in range(world)
    ]
    total = sum((output.loss * weight).sum() for output, weight in zip(expected, weights, strict=True))
    gradients = grad(total, [*queries, *keys])
    results = ranks.run(program)
    # Keys visit the other ranks once forward and once backward, where their gradient comes home as well.
    assert ranks.messages == world * (3 * world - 2 if world > 1 else 0)
    for rank, (loss, positions, of_queries, of_keys) in enumerate(results):
        torch.testing.assert_close(loss, expected[rank].loss, **EXACT)
        scores = queries[rank] @ every.mT
        if excluded:
            scores = scores.scatter(-1, exclude[rank][..., None] + 9 * rank, -torch.inf)
        own = scores.gather(-1, targets[rank][..., None] + 9 * rank)
        assert torch.equal(positions, (scores >= own).sum(-1) - 1)
        torch.testing.assert_close(of_queries, gradients[rank], **EXACT)
        torch.testing.assert_close(of_keys, gradients[world + rank], **EXACT)


@pytest.mark.parametrize("query_type", [torch.float16, torch.float64])
@pytest.mark.parametrize("key_type", [torch.bfloat16, torch.float64])
def test_a_ring_computes_in_float32_or_more(query_type, key_type):
    queries, keys = normal(5, 4).to(query_type), normal(6, 4, seed=1).to(key_type)
    targets = torch.arange(5)
    wide = torch.float64 if torch.float64 in (query_type, key_type) else torch.float32
    loss = ring_info_nce(queries, keys, targets).loss
    assert loss.dtype == wide
    expected = torch.nn.functional.cross_entropy(queries.double() @ keys.double().T, targets, reduction="none")
    torch.testing.assert_close(loss.double(), expected, atol=1e-6 if wide == torch.float32 else 1e-12, rtol=0)


@pytest.mark.parametrize(("rows", "most", "ends"), [(7, 36, [2, 4, 6, 7]), (7, 35, [*range(1, 8)]), (4, 99, [4])])
def test_blocks_have_as_many_logits_as_may_be(rows, most, ends):
    blocks = across_ranks.row_blocks(torch.empty(2, rows, 4), torch.empty(2, 9, 4), most)
    assert blocks == [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def test_a_ring_counts_ties_and_takes_rows_without_keys_to_spare(monkeypatch):
    monkeypatch.setattr(across_ranks, "_BLOCK_LOGITS", 0)  # A row at a time is the least.
    same = torch.ones(3, 2)
    assert ring_info_nce(same, same, torch.arange(3)).rank.tolist() == [2, 2, 2]
    assert ring_info_nce(same[:0], same, torch.arange(0)).loss.shape == (0,)
    assert ring_info_nce(same[:0], same[:0], torch.arange(0)).loss.shape == (0,)


OBJECTIVES = {
    "grid-sampled-gather": lambda: GridInfoNCE(3, pred_steps=2, pred_directions=2, neg_samples=5),
    "grid-all-gather": lambda: GridInfoNCE(3, pred_steps=2, pred_directions=2, neg_samples="all"),
    "grid-all-ring": lambda: GridInfoNCE(3, pred_steps=3, pred_directions=2, neg_samples="all"),
    "target-gather": lambda: TargetInfoNCE(3, pred_steps=2, pred_directions=2, scale=0.3),
    "target-ring": lambda: TargetInfoNCE(3, pred_steps=2, pred_directions=2, scale=0.3),
    "nt-xent-gather": lambda: NTXentLoss(0.3),
    "nt-xent-ring": lambda: NTXentLoss(0.3),
}


def output_of(objective, *batches, **options):
    """What an objective's call gives, with its statistics."""
    return getattr(objective, "contrast", objective)(*batches, **options)


def batches_of(name):
    """What an objective takes, and the dimension of images in it."""
    shape, dim = ((6, 4), 0) if "nt-xent" in name else ((2, 6, 3, 5, 5), 1)
    return [normal(*shape, seed=seed) for seed in range(2)], dim


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_an_exchange_nobody_is_asked(name, monkeypatch):
    monkeypatch.setattr(across_ranks, "dist", None)
    objective, (batches, _) = OBJECTIVES[name]().double(), batches_of(name)
    assert output_of(objective, *batches).loss.isfinite()
    if "sampled" in name:
        assert len(objective.draw_negatives(batches[0])) == 4


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_of_ranks_are_those_of_the_whole_batch(ranks, name):
    torch.manual_seed(0)
    world, sampled = ranks.world, "sampled" in name
    objective = OBJECTIVES[name]().double()
    batches, dim = batches_of(name)
    options = [{"generator": torch.Generator().manual_seed(1)} if sampled else {} for _ in range(world)]
    whole = output_of(objective, *batches, **options[0])
    gradients = grad(whole.loss, [*batches, *objective.parameters()])
    if sampled:
        options[0]["generator"].manual_seed(1)
        drawn = objective.draw_negatives(batches[0], torch.Generator().manual_seed(1))
    objective.gather_negatives = name.rpartition("-")[2]

    def program(rank):
        parts = [batch.chunk(world, dim)[rank].detach().requires_grad_() for batch in batches]
        output = output_of(objective, *parts, **options[rank])
        if sampled:
            replayed = objective(*parts, negatives=drawn)
            assert torch.equal(replayed.loss, output.loss)
            again = objective.draw_negatives(parts[0], torch.Generator().manual_seed(1))
            assert all(torch.equal(one, other) for one, other in zip(again, drawn, strict=True))
        return output, grad(output.loss, [*parts, *objective.parameters()])

    outputs, found = zip(*ranks.run(program), strict=True)
    for field, expected in whole._asdict().items():
        values = [getattr(output, field) for output in outputs]
        torch.testing.assert_close(sum(values) / world, expected, **EXACT)
    for index, expected in enumerate(gradients):
        parts = [one[index] for one in found]
        # An own image's gradient is of the sum of the losses, a parameter's of its rank's.
        together = torch.cat(parts, dim) if index < 2 else sum(parts)
        torch.testing.assert_close(together / world, expected, **EXACT)
