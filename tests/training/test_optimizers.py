"""LARS against its formula, and the optimizers that options select."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cpc_ext.training.config import validate_config
from cpc_ext.training.optimizers import LARS, optimizer_of

CPU = torch.device("cpu")


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (2, 3, 3, 3), (5,))
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def test_lars_is_the_published_formula():
    weights = parameters()
    optimizer = LARS(weights, 0.5, momentum=0.9, weight_decay=0.01)
    expected = [weight.detach().clone() for weight in weights]
    velocity = [torch.zeros_like(weight) for weight in weights]
    generator = torch.Generator().manual_seed(1)
    for rate in (0.5, 0.5, 0.25):
        optimizer.param_groups[0]["lr"] = rate
        for index, weight in enumerate(weights):
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            w, g = expected[index], weight.grad
            if w.ndim > 1:
                local = 0.001 * w.square().sum().sqrt() / (g.square().sum().sqrt() + 0.01 * w.square().sum().sqrt())
                g = local * (g + 0.01 * w)
            velocity[index] = 0.9 * velocity[index] + g
            expected[index] = w - rate * velocity[index]
        optimizer.step()
        torch.testing.assert_close([weight.detach() for weight in weights], expected)


def test_lars_of_zeros_and_without_gradient():
    """A layer that begins as zeros has to move; one without a gradient stays."""
    zero, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    flat = nn.Parameter(torch.ones(2, 2))
    zero.grad, flat.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer = LARS([zero, still, flat], 0.5, weight_decay=0.1)
    assert optimizer.step(lambda: zero.sum() + 3) == 3
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.5))
    assert torch.equal(still, torch.ones(2, 2))
    torch.testing.assert_close(flat.detach(), torch.full((2, 2), 1 - 0.5 * 0.1))
    assert optimizer.state.keys() == {zero, flat}


@pytest.mark.parametrize(
    ("options", "kind", "defaults"),
    [
        ({}, torch.optim.Adam, {"fused": True}),
        ({"weight_decay": 0.1}, torch.optim.AdamW, {"weight_decay": 0.1, "fused": True}),
        (
            {"optimizer": "sgd", "momentum": 0.3, "weight_decay": 0.1},
            torch.optim.SGD,
            {"momentum": 0.3, "weight_decay": 0.1, "fused": True},
        ),
        (
            {"optimizer": "lars", "weight_decay": 0.1},
            LARS,
            {"momentum": 0.9, "weight_decay": 0.1, "trust": 0.001},
        ),
    ],
)
def test_options(options, kind, defaults):
    config = validate_config({"cpc": {"pred_steps": 2}, "optimization": {"steps": 9, "lr": 0.7, **options}})
    optimizer = optimizer_of(parameters(), config.optimization, CPU)
    assert type(optimizer) is kind
    assert {"lr": 0.7, **defaults}.items() <= optimizer.defaults.items()


@pytest.mark.parametrize("kind", ["adam", "sgd", "lars"])
def test_a_first_step_that_overflows_leaves_nothing(kind, monkeypatch):
    """Loss scaling of fp16 begins with a factor that is too large: that step is as if it had not been."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *given, **more: empty_like(*given, **more).fill_(torch.nan))
    config = validate_config({"cpc": {"pred_steps": 2}, "optimization": {"steps": 9, "optimizer": kind}})
    found = []
    for factors in ((torch.inf, 1.0, 2.0), (1.0, 2.0)):
        weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
        optimizer, scaler = optimizer_of([weight], config.optimization, CPU), torch.amp.GradScaler("cpu")
        for factor in factors:
            optimizer.zero_grad()
            scaler.scale((factor * weight).sum()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        found.append(weight.detach())
    assert torch.equal(*found)
