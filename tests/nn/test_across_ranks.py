"""Contrasts with keys of several ranks, gathered or passed round a ring, equal those of one process with all keys.

Ranks run as threads here, and messages arrive when a rank waits for them. tests/training/test_distribution.py has real
processes.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad

from cpc_ext.nn import GridInfoNCE, MultipleNegativesRankingLoss, NTXentLoss, TargetInfoNCE, across_ranks
from cpc_ext.nn.across_ranks import EXCHANGES, exchange_with, gather_from_ranks, ring_info_nce
from cpc_ext.ops import info_nce

EXACT = {"atol": 1e-12, "rtol": 0}


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


@pytest.mark.parametrize("dims", [2, 9])
@pytest.mark.parametrize("ranks", [3], indirect=True)
def test_shapes_that_differ_are_told(ranks, dims):
    def program(rank):
        values = torch.zeros(2 + rank // 2, *[1] * (dims - 1))
        with pytest.raises(
            ValueError, match=r"values must have one shape on all ranks, got \(2, 1.*\), \(2, .*\), \(3, "
        ):
            gather_from_ranks(values)
        if dims == 2:
            with pytest.raises(
                ValueError, match=r"keys must have one shape on all ranks, got \(2, 1\), \(2, 1\), \(3, 1"
            ):
                ring_info_nce(values[:2], values, torch.arange(2))
        return True

    assert all(ranks.run(program))


@pytest.mark.parametrize("ranks", [2], indirect=True)
def test_types_that_differ_are_told(ranks):
    """The bits of one would be taken for numbers of the other."""

    def program(rank):
        values = torch.ones(2, 3, dtype=[torch.bfloat16, torch.float16][rank])
        with pytest.raises(ValueError, match="values must have one type on all ranks, got bfloat16, float16"):
            gather_from_ranks(values)
        with pytest.raises(ValueError, match="keys must have one type on all ranks, got bfloat16, float16"):
            ring_info_nce(values, values, torch.arange(2))
        return True

    assert all(ranks.run(program))


OPTIONS = {
    "plain": {},
    "excluded": {"exclude": (7,)},
    "several excluded": {"exclude": (7, 2)},
    "ranges": {"key_range": (7, 2)},
}


def drawn_options(name, world, generator):
    """Options of every rank: keys 4 to 8 are excluded or none (-1), ranges begin at 0 to 5 and end at 4 to 9."""
    parts = []
    for _ in range(world):
        exclude, begins, ends = (
            torch.randint(low, high, (2, 7, 2), generator=generator) for low, high in ((4, 9), (0, 6), (0, 6))
        )
        exclude[:, 0] = -1
        key_range = torch.stack([begins[..., 0], torch.maximum(begins, ends + 4)[..., 0]], -1)
        drawn = {"exclude": exclude if name == "several excluded" else exclude[..., 0], "key_range": key_range}
        parts.append({option: drawn[option] for option in OPTIONS[name]})
    return parts


@pytest.mark.parametrize("name", OPTIONS)
def test_a_ring_is_the_op_with_all_keys(ranks, name):
    world = ranks.world
    generator = torch.Generator().manual_seed(0)
    queries = [normal(2, 7, 4, seed=rank) for rank in range(world)]
    keys = [normal(2, 4, 9, seed=10 + rank).mT for rank in range(world)]
    targets = torch.randint(4, (world, 2, 7), generator=generator)
    options = drawn_options(name, world, generator)
    weights = torch.rand(world, 2, 7, dtype=torch.float64, generator=generator)
    scales = [torch.tensor(1.4, dtype=torch.float64, requires_grad=True) for _ in range(world)]

    def program(rank):
        # Autocast, which is a thread's own, rounds nothing.
        with torch.autocast("cpu", torch.bfloat16):
            output = ring_info_nce(queries[rank], keys[rank], targets[rank], scale=scales[rank], **options[rank])
        assert not output.rank.requires_grad
        return *output, *grad((output.loss * weights[rank]).sum(), [queries[rank], keys[rank], scales[rank]])

    every = torch.cat(keys, 1)
    visible = [visible_keys(rank, world, options[rank]) for rank in range(world)]
    expected = []
    for rank in range(world):
        scores = scales[rank] * queries[rank] @ every.mT
        own = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, targets[rank][..., None] + 9 * rank, True)
        scores = scores.masked_fill(~(visible[rank] | own), -torch.inf)
        positive = scores.where(own, -torch.inf).amax(-1)
        expected.append((scores.logsumexp(-1) - positive, (scores >= positive[..., None]).sum(-1) - 1))
    total = sum((loss * weight).sum() for (loss, _), weight in zip(expected, weights, strict=True))
    gradients = grad(total, [*queries, *keys, *scales])
    results = ranks.run(program)
    # Keys visit the other ranks once forward and once backward, where their gradient comes home as well.
    assert ranks.messages == world * (3 * world - 2 if world > 1 else 0)
    for rank, (loss, positions, *of_rank) in enumerate(results):
        torch.testing.assert_close(loss, expected[rank][0], **EXACT)
        assert torch.equal(positions, expected[rank][1])
        for found, known in zip(of_rank, gradients[rank::world], strict=True):
            torch.testing.assert_close(found, known, **EXACT)


def visible_keys(rank, world, options):
    """Return which of all ranks' keys a rank's queries contrast, [2, 7, 9 world]."""
    index = torch.arange(9)
    every = torch.ones(2, 7, 9, dtype=torch.bool)
    begin, end = options.get("key_range", torch.tensor([0, 9])).split(1, -1)
    of_each = every & (index >= begin) & (index < end)
    parts = [of_each] * world
    if "exclude" in options:
        parts[rank] = of_each & ~(index == options["exclude"].view(2, 7, -1, 1)).any(-2)
    return torch.cat(parts, -1)


@pytest.mark.parametrize("exchange", ["ring", "gather"])
def test_a_scale_that_learns_across_ranks(ranks, exchange):
    """Every rank's gradient of the scale is that of its own rows; their mean is that of the whole batch."""
    world = ranks.world
    queries, keys = normal(6, 4), normal(6, 4, seed=1)
    scale = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)  # Where nothing can be divided by it.
    own = torch.arange(6)

    def program(rank):
        rows, keys_of_rank = queries.chunk(world)[rank], keys.chunk(world)[rank].detach().requires_grad_()
        places = torch.arange(6 // world)
        if exchange == "ring":
            losses = ring_info_nce(rows, keys_of_rank, places, scale=scale).loss
        else:
            every = gather_from_ranks(keys_of_rank)
            losses = info_nce(rows, every, places + rank * len(places), scale=scale, reduction="none").loss
        return losses.mean(), *grad(losses.mean(), [scale, keys_of_rank])

    loss = torch.nn.functional.cross_entropy(scale * queries @ keys.T, own)
    of_scale, of_keys = grad(loss, [scale, keys])
    losses, of_scales, of_parts = zip(*ranks.run(program), strict=True)
    torch.testing.assert_close(sum(losses) / world, loss, **EXACT)
    torch.testing.assert_close(sum(of_scales) / world, of_scale, **EXACT)
    torch.testing.assert_close(torch.cat(of_parts) / world, of_keys, **EXACT)


@pytest.mark.parametrize("query_type", [torch.bfloat16, torch.float32])
def test_keys_travel_in_their_own_type(ranks, query_type):
    world = ranks.world
    queries = [normal(5, 4, seed=rank).detach().to(query_type).requires_grad_() for rank in range(world)]
    keys = [normal(6, 4, seed=10 + rank).detach().bfloat16().requires_grad_() for rank in range(world)]
    targets = torch.arange(5)

    def program(rank):
        loss = ring_info_nce(queries[rank], keys[rank], targets, scale=2).loss
        assert loss.dtype == torch.float32
        return loss, *grad(loss.sum(), [queries[rank], keys[rank]])

    results = ranks.run(program)
    every = torch.cat(keys).double()
    losses = [
        torch.nn.functional.cross_entropy(2 * queries[rank].double() @ every.T, targets + 6 * rank, reduction="none")
        for rank in range(world)
    ]
    gradients = grad(sum(loss.sum() for loss in losses), [*queries, *keys])
    for rank, (loss, *found) in enumerate(results):
        torch.testing.assert_close(loss.double(), losses[rank], atol=1e-5, rtol=1e-5)
        for one, other in zip(found, gradients[rank::world], strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, atol=0.05, rtol=0.02)


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


def by_reference(op):
    """Return an op's reference, which does not refuse wrong indices: like CUDA's kernel, it gives NaN and rank -1."""
    others = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    return lambda *arguments: op.default.redispatch(others, *arguments)


@pytest.mark.parametrize("wrong", ["index", "absent"])
@pytest.mark.parametrize("ranks", [2, 3], indirect=True)
def test_a_row_that_must_not_count_leaves_the_others_alone(ranks, wrong, monkeypatch):
    """Row 2 of every rank has a target that is no key, or holds NaN and has a gradient of 0."""
    world = ranks.world
    if wrong == "index":
        monkeypatch.setattr(across_ranks, "contrast_op", by_reference(torch.ops.cpc_ext.info_nce))
        monkeypatch.setattr(across_ranks, "contrast_gradients_op", by_reference(torch.ops.cpc_ext.info_nce_gradients))
    queries = [normal(5, 4, seed=rank) for rank in range(world)]
    keys = [normal(6, 4, seed=10 + rank) for rank in range(world)]
    counts = torch.arange(5) != 2
    targets, weights = torch.arange(5), counts.double()
    if wrong == "index":
        targets[2], weights[2] = 6, 1

    def program(rank):
        rows = queries[rank].detach().clone().requires_grad_()
        if wrong == "absent":
            rows.data[2] = torch.nan
        loss, position = ring_info_nce(rows, keys[rank], targets)
        return loss, position, *grad(loss, [rows, keys[rank]], weights)

    losses = [
        torch.nn.functional.cross_entropy(
            queries[rank][counts] @ torch.cat(keys).T, targets[counts] + 6 * rank, reduction="none"
        )
        for rank in range(world)
    ]
    gradients = grad(sum(loss.sum() for loss in losses), [*queries, *keys])
    for rank, (loss, position, of_queries, of_keys) in enumerate(ranks.run(program)):
        torch.testing.assert_close(loss[counts], losses[rank], **EXACT)
        assert loss[2].isnan()
        torch.testing.assert_close(of_queries[counts], gradients[rank][counts], **EXACT)
        torch.testing.assert_close(of_keys, gradients[world + rank], **EXACT)
        if wrong == "index":
            assert position[2] == -1
            assert of_queries[2].isnan().all()
        else:
            assert not of_queries[2].any()


def test_rows_that_are_all_absent_get_no_gradient_from_keys_that_are_no_numbers(ranks):
    def program(_):
        queries, scale = normal(5, 4), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        keys = torch.full((6, 4), torch.nan, dtype=torch.float64, requires_grad=True)
        loss = ring_info_nce(queries, keys, torch.arange(5), scale=scale).loss
        return grad(loss, [queries, keys, scale], torch.zeros(5, dtype=torch.float64))

    assert not any(gradient.any() for gradients in ranks.run(program) for gradient in gradients)


def test_a_ring_says_what_is_wrong():
    queries, keys = normal(2, 5, 4), normal(2, 6, 4)
    targets = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match="keys must have the leading dimensions and the D of queries"):
        ring_info_nce(queries, keys[:1], targets)
    with pytest.raises(ValueError, match=r"targets must be one positive a query, got shape \(2, 5, 1\)"):
        ring_info_nce(queries, keys, targets[..., None])
    for index in (-1, 6):
        with pytest.raises(IndexError, match=f"targets must be in 0..5, got {index}|{index}"):
            ring_info_nce(queries, keys, targets + index)


def test_a_ring_counts_ties_and_takes_rows_without_keys_to_spare(ranks):
    def program(_):
        same = torch.ones(3, 2)
        assert ring_info_nce(same, same, torch.arange(3)).rank.tolist() == [3 * ranks.world - 1] * 3
        assert ring_info_nce(same[:0], same, torch.arange(0)).loss.shape == (0,)
        assert ring_info_nce(same[:0], same[:0], torch.arange(0)).loss.shape == (0,)
        return True

    assert all(ranks.run(program))


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
    """Call an objective, and return its output with statistics."""
    return getattr(objective, "contrast", objective)(*batches, **options)


def batches_of(name):
    """Return the input of an objective, and the dimension of its images."""
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


DIRECTIONS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")


@pytest.mark.parametrize(
    ("exchange", "count", "partition"),
    [
        *(
            (exchange, *of)
            for exchange in ("gather", "ring")
            for of in ((1, "joint"), (2, "joint"), (2, "per_direction"))
        ),
        ("gather", 4, "joint"),
    ],
)
def test_texts_of_all_ranks(ranks, exchange, count, partition):
    world = ranks.world
    embeddings = [normal(6, 4, seed=seed) for seed in range(3)]
    options = {"scale": 3.0, "directions": DIRECTIONS[:count], "partition_mode": partition}
    loss = MultipleNegativesRankingLoss(**options)(*embeddings)
    gradients = grad(loss, embeddings)
    of_ranks = MultipleNegativesRankingLoss(**options, gather_negatives=exchange)

    def program(rank):
        parts = [one.chunk(world)[rank].detach().requires_grad_() for one in embeddings]
        value = of_ranks(*parts)
        return value, *grad(value, parts)

    values, *found = zip(*ranks.run(program), strict=True)
    torch.testing.assert_close(sum(values) / world, loss, **EXACT)
    for parts, expected in zip(found, gradients, strict=True):
        torch.testing.assert_close(torch.cat(parts) / world, expected, **EXACT)
