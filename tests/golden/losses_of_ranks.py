"""Losses of several processes against open_clip's and lightly's: ``torchrun --nproc-per-node 2 losses_of_ranks.py``.

Every process compares the losses and the gradients of its own features, and ends with an error if they differ.
"""

from __future__ import annotations

import itertools
from typing import Any

import lightly.loss
import open_clip.loss
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import grad

from cpc_ext import nn

EXACT = {"atol": 1e-10, "rtol": 0}


def compare(ours: Any, theirs: Any, inputs: list[Tensor]) -> None:
    for one, other in zip(*((loss, *grad(loss, inputs)) for loss in (ours(*inputs), theirs(*inputs))), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def compare_clip(rank: int, world: int, inputs: list[Tensor]) -> None:
    place = {"rank": rank, "world_size": world}
    for local, gradients in itertools.product((False, True), repeat=2):
        words = {"local_loss": local, "gather_with_grad": gradients, **place}
        compare(nn.CLIPLoss(**words), open_clip.loss.ClipLoss(**words), inputs)
    for exchange in ("gather", "ring"):
        compare(nn.CLIPLoss(gather_negatives=exchange), open_clip.loss.ClipLoss(True, True, **place), inputs)
    for way in ("bidir", "shift", "reduce", "gather"):
        words = {"dist_impl": way, **place}
        compare(nn.SigLIPLoss(**words), open_clip.loss.SigLipLoss(**words), inputs)


def compare_views(inputs: list[Tensor]) -> None:
    together = {"gather_distributed": True}
    compare(nn.NTXentLoss(0.3, **together), lightly.loss.NTXentLoss(0.3, **together), inputs)
    compare(nn.NTXentLoss(0.3, gather_negatives="ring"), lightly.loss.NTXentLoss(0.3, **together), inputs)
    compare(nn.DecoupledContrastiveLoss(0.3, **together), lightly.loss.DCLLoss(0.3, **together), inputs)
    size = (13, inputs[0].shape[1])
    ours, theirs = (loss(0.3, size, **together).double() for loss in (nn.NTXentLoss, lightly.loss.NTXentLoss))
    ours.memory_bank.keys[:13] = theirs.memory_bank.bank
    for _ in range(3):
        compare(ours, theirs, inputs)
        torch.testing.assert_close(ours.memory_bank.keys[:13], theirs.memory_bank.bank, **EXACT)


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    views = [torch.randn(5, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]
    numbers = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (1.7, -2.0)]
    compare_clip(rank, world, [*views, *numbers])
    compare_views(views)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
