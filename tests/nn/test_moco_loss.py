"""MoCo's loss and the queue that it shares with NT-Xent's memory bank, against the paper's algorithm with a list."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad, gradcheck

from cpc_ext.nn import MoCoLoss, NTXentLoss, key_queue

EXACT = {"atol": 1e-12, "rtol": 0}
SIZE, DIM, TEMPERATURE = 7, 4, 0.3


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(2, size, DIM, dtype=torch.float64, generator=generator) for size in sizes]
    return [(queries.clone().requires_grad_(), keys.clone().requires_grad_()) for queries, keys in draws]


def by_algorithm(queries: Tensor, keys: Tensor, queue: list[Tensor], *, normalize: bool = True) -> Tensor:
    """Compute Algorithm 1 of arXiv 1911.05722; updates the queue of keys."""
    keys = keys.detach()
    if normalize:
        queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    positive = (queries * keys).sum(1, keepdim=True)
    logits = torch.cat([positive, queries @ torch.stack(queue).T], 1) / TEMPERATURE
    queue.extend(keys)
    del queue[:-SIZE]
    return F.cross_entropy(logits, torch.zeros(len(queries), dtype=torch.int64))


def make(**options: bool) -> tuple[MoCoLoss, list[Tensor]]:
    """Return a loss, and its queue as a list, the oldest key first."""
    torch.manual_seed(0)
    loss = MoCoLoss(DIM, SIZE, TEMPERATURE, **options).double()
    return loss, list(loss.queue.keys[:SIZE].clone())


@pytest.mark.parametrize("room", [1024, 2])
@pytest.mark.parametrize("normalize", [True, False])
def test_steps_are_those_of_the_algorithm(monkeypatch, normalize, room):
    monkeypatch.setattr(key_queue, "_ROOM", room)  # Batches of five are contrasted in parts, too.
    loss, queue = make(normalize=normalize)
    torch.testing.assert_close(torch.stack(queue).norm(dim=1), torch.ones(SIZE, dtype=torch.float64))
    # The queue wraps in the middle of a batch, one of which is larger than it.
    for queries, keys in batches(5, 5, 1, 9, 3):
        value, expected = loss(queries, keys), by_algorithm(queries, keys, queue, normalize=normalize)
        torch.testing.assert_close(value, expected, **EXACT)
        gradient, none = grad(value, [queries, keys], allow_unused=True)
        torch.testing.assert_close(gradient, grad(expected, queries)[0], **EXACT)
        assert none is None
        oldest_first = loss.queue.keys[:SIZE].roll(-int(loss.queue.position), 0)
        torch.testing.assert_close(oldest_first, torch.stack(queue), **EXACT)


def test_steps_may_be_differentiated_together():
    given = batches(5, 5)
    (loss, queue), (other, _) = make(), make()
    queries = [pair[0] for pair in given]
    expected = [grad(by_algorithm(*pair, queue), pair[0])[0] for pair in given]
    for one, value in zip(grad(sum(loss(*pair) for pair in given), queries), expected, strict=True):
        torch.testing.assert_close(one, value, **EXACT)
    other.eval()  # It learns nothing while it is evaluated.
    before = other.queue.keys[:SIZE].clone()
    assert other(*given[0]) == other(*given[0])
    assert torch.equal(before, other.queue.keys[:SIZE])


def test_the_queue_is_saved():
    first, second = batches(5, 5)
    (loss, _), restored = make(), MoCoLoss(DIM, SIZE, TEMPERATURE).double()
    loss(*first)
    restored.load_state_dict(loss.state_dict())
    assert restored(*second) == loss(*second)
    assert torch.equal(restored.queue.position, loss.queue.position)


@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_positives_are_not_rounded_to_the_queues_type(narrow):
    """In a module that was cast, or left as it was made, among encodings of a wider type."""
    loss = MoCoLoss(DIM, SIZE, TEMPERATURE).to(narrow).eval()
    queue = list(loss.queue.keys[:SIZE].double())
    ((queries, keys),) = batches(5)
    torch.testing.assert_close(loss(queries, keys), by_algorithm(queries, keys, queue), **EXACT)
    # Whose difference shows how the positives, which are the keys here, count.
    bank = NTXentLoss(TEMPERATURE, (SIZE, DIM)).to(narrow)
    assert gradcheck(lambda *views: copy.deepcopy(bank)(*views), (queries, keys))


@pytest.mark.parametrize("room", [1024, 2])
def test_views_against_a_memory_bank(monkeypatch, room):
    monkeypatch.setattr(key_queue, "_ROOM", room)
    loss = NTXentLoss(TEMPERATURE, (SIZE, DIM)).double()
    assert not loss.state_dict()
    bank = loss.memory_bank.keys[:SIZE].clone()
    ((first, second),) = batches(5)
    queries, keys = F.normalize(first, dim=1), F.normalize(second, dim=1)
    logits = torch.cat([(queries * keys).sum(1, keepdim=True), queries @ bank.T], 1) / TEMPERATURE
    expected = F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    places = (logits[:, 1:] >= logits[:, :1]).sum(1).double()

    with torch.no_grad():
        assert loss(first, second) == loss(first, second)  # Without a gradient nothing enters.
    output = loss.contrast(first, second)

    torch.testing.assert_close(output.loss, expected, **EXACT)
    for one, value in zip(grad(output.loss, [first, second]), grad(expected, [first, second]), strict=True):
        torch.testing.assert_close(one, value, **EXACT)
    assert output.accuracy == (places == 0).double().mean()
    assert output.top5_accuracy == (places < 5).double().mean()
    assert output.mean_position == places.mean() + 1
    torch.testing.assert_close(output.mutual_information, math.log(SIZE + 1) - expected.detach())
    torch.testing.assert_close(loss.memory_bank.keys[:SIZE], torch.cat([keys.detach(), bank[5:]]), **EXACT)

    # Nor where only the second views have one.
    before = loss.memory_bank.keys.clone()
    loss(first.detach(), second)
    assert torch.equal(loss.memory_bank.keys[:SIZE], before[:SIZE])
