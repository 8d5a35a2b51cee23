"""Objectives whose keys pass round a ring are those whose keys are gathered: here a ring of one's own keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import grad

from cpc_ext.nn import GridInfoNCE, NTXentLoss, TargetInfoNCE, grid_info_nce, nt_xent_loss, target_info_nce


def grids():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 2, 3, 5, 5, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]


def views():
    return [grid.detach().flatten(0, 1).flatten(1).requires_grad_() for grid in grids()]


CASES = {
    "target": (target_info_nce, lambda: TargetInfoNCE(3, pred_steps=2, pred_directions=2, scale=0.3), grids),
    "grid": (grid_info_nce, lambda: GridInfoNCE(3, pred_steps=2, pred_directions=2, neg_samples="all"), grids),
    "nt-xent": (nt_xent_loss, lambda: NTXentLoss(0.3), views),
    "nt-xent-without": (nt_xent_loss, lambda: NTXentLoss(0.3, statistics=False), views),
}


@pytest.mark.parametrize("name", CASES)
def test_ring_of_the_own_keys(monkeypatch, name):
    module, make, inputs = CASES[name]
    torch.manual_seed(0)
    objective = make().double()
    results = []
    for ring in (False, True):
        if ring:  # The ring itself asks elsewhere, and finds itself alone.
            monkeypatch.setattr(module, "position_in_world", lambda: (0, 2))
            objective.gather_negatives = "ring"
        tensors = inputs()
        output = objective(*tensors)
        results.append((output, grad(output.loss, [*tensors, *objective.parameters()])))
    (plain, gradients), (passed, passed_gradients) = results
    torch.testing.assert_close(passed.loss, plain.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(passed.accuracy, plain.accuracy)
    if name in ("target", "grid"):
        # Twice the keys, for all that the objective knows.
        assert passed.mutual_information.item() == pytest.approx(plain.mutual_information.item() + math.log(2))
        torch.testing.assert_close(passed.step_losses, plain.step_losses, rtol=1e-10, atol=0)
    for one, other in zip(passed_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    if name.startswith("nt-xent"):
        assert passed.mean_position >= 1  # In a ring they come with the loss.
