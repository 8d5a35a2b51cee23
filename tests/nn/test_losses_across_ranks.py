"""Losses of several ranks equal those of one process with the whole batch, or follow open_clip's options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

from cpc_ext import nn

EXACT = {"atol": 1e-12, "rtol": 0}
PAIRS = 6

LOSSES = {
    "clip-gather": (lambda rank, world: nn.CLIPLoss(gather_negatives="gather"), nn.CLIPLoss),
    "clip-ring": (lambda rank, world: nn.CLIPLoss(gather_negatives="ring"), nn.CLIPLoss),
    "clip-local": (lambda rank, world: nn.CLIPLoss(True, True, rank=rank, world_size=world), nn.CLIPLoss),
    "siglip-gather": (lambda rank, world: nn.SigLIPLoss(gather_negatives="gather"), nn.SigLIPLoss),
    "siglip": (lambda rank, world: nn.SigLIPLoss(rank=rank, world_size=world), nn.SigLIPLoss),
    "nt-xent": (lambda rank, world: nn.NTXentLoss(0.3, gather_distributed=True), lambda: nn.NTXentLoss(0.3)),
    "dcl": (
        lambda rank, world: nn.DecoupledContrastiveLoss(0.3, gather_distributed=True),
        lambda: nn.DecoupledContrastiveLoss(0.3),
    ),
}


def pairs():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(PAIRS, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]


def scale_and_bias(name):
    if "lip" not in name:
        return []
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (1.3, -0.4)]


@pytest.mark.parametrize("name", LOSSES)
def test_their_mean_is_the_loss_of_the_whole_batch(ranks, name):
    of_rank, of_whole = LOSSES[name]
    world, whole, numbers = ranks.world, pairs(), scale_and_bias(name)
    expected = of_whole()(*whole, *numbers)
    gradients = grad(expected, [*whole, *numbers])

    def program(rank):
        own = [features.detach().chunk(world)[rank].requires_grad_() for features in whole]
        its_numbers = scale_and_bias(name)
        loss = of_rank(rank, world)(*own, *its_numbers)
        return loss, grad(loss, [*own, *its_numbers])

    losses, found = zip(*ranks.run(program), strict=True)
    torch.testing.assert_close(sum(losses) / world, expected, **EXACT)
    for index, gradient in enumerate(gradients):
        parts = [one[index] for one in found]
        together = torch.cat(parts) if index < 2 else sum(parts)
        torch.testing.assert_close(together / world, gradient, **EXACT)


@pytest.mark.parametrize("local", [False, True])
def test_clip_without_gradients_of_other_ranks(ranks, local):
    """Features of others are constants; locally the rank's own are, too, where they are gathered."""
    world, whole, scale = ranks.world, pairs(), scale_and_bias("clip")[0]

    def program(rank):
        rows = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
        own = [features.detach()[rows].requires_grad_() for features in whole]
        loss = nn.CLIPLoss(local, rank=rank, world_size=world)(*own, scale)
        every = [features.detach().clone() for features in whole]
        if not local or world == 1:
            every = [
                torch.cat([one[: rows.start], mine, one[rows.stop :]]) for one, mine in zip(every, own, strict=True)
            ]
        asked, targets = (own, torch.arange(PAIRS)[rows]) if local else (every, torch.arange(PAIRS))
        logits = [scale * one @ other.T for one, other in zip(asked, reversed(every), strict=True)]
        expected = sum(F.cross_entropy(one, targets) for one in logits) / 2
        return loss, expected, grad(loss, [*own, scale]), grad(expected, [*own, scale])

    for loss, expected, gradients, wanted in ranks.run(program):
        torch.testing.assert_close(loss, expected, **EXACT)
        torch.testing.assert_close(gradients, wanted, **EXACT)


def test_clip_of_all_pairs_on_every_rank(ranks):
    world, whole = ranks.world, pairs()
    expected = nn.CLIPLoss()(*whole, 1.3)
    gradients = grad(expected, whole)

    def program(rank):
        own = [features.detach().chunk(world)[rank].requires_grad_() for features in whole]
        loss = nn.CLIPLoss(gather_with_grad=True, rank=rank, world_size=world)(*own, 1.3)
        return loss, grad(loss, own)

    for rank, (loss, found) in enumerate(ranks.run(program)):
        torch.testing.assert_close(loss, expected, **EXACT)
        for one, gradient in zip(found, gradients, strict=True):
            # Every rank has the loss of all, and all of their gradients arrive.
            torch.testing.assert_close(one, world * gradient.chunk(world)[rank], **EXACT)


@pytest.mark.parametrize("name", ["moco", "nt-xent-bank"])
@pytest.mark.parametrize("gathers", [False, True])
def test_queues_take_the_keys_of_all_ranks(ranks, name, gathers):
    world, (queries, keys) = ranks.world, pairs()
    queue = F.normalize(torch.randn(9, 4, dtype=torch.float64), dim=1)

    def program(rank):
        if name == "moco":
            loss = nn.MoCoLoss(4, 9, gather_negatives="gather" if gathers else "none").double()
            holder = loss.queue
        else:
            loss = nn.NTXentLoss(0.3, (9, 4), gathers).double()
            holder = loss.memory_bank
        holder.keys[:9] = queue
        loss(*(features.chunk(world)[rank] for features in (queries, keys)))
        return holder.keys[:9], holder.position

    for rank, (after, position) in enumerate(ranks.run(program)):
        entered = F.normalize((keys if gathers else keys.chunk(world)[rank]).detach(), dim=1)
        torch.testing.assert_close(after, torch.cat([entered, queue[len(entered) :]]), **EXACT)
        assert position == len(entered)
