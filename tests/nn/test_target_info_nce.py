"""CPC v2's objective against its definition, a cross-entropy over all targets for every direction and step."""

import math

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.nn import TargetInfoNCE

EXACT = {"atol": 1e-12, "rtol": 0}


def grids(directions=2, batch=2, channels=3, context_channels=4, rows=5, cols=3):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(directions, batch, channels, rows, cols, generator=generator, dtype=torch.float64)
    c = torch.randn(directions, batch, context_channels, rows, cols, generator=generator, dtype=torch.float64)
    return z.requires_grad_(), c.requires_grad_()


def by_definition(objective, z, c):
    """Loss of every direction and step, from logits in memory."""
    directions, batch, _, rows, cols = z.shape
    places = torch.arange(batch * rows * cols).view(batch, rows, cols)
    losses = []
    for direction in range(directions):
        target_weight, prediction_weight = (
            (projection.weight[..., 0, 0].chunk(directions)[direction], projection.bias.chunk(directions)[direction])
            for projection in (objective.target_projection, objective.prediction_projection)
        )
        targets = F.linear(z[direction].movedim(1, -1), *target_weight)
        predictions = F.linear(c[direction].movedim(1, -1), *prediction_weight) * objective.scale
        predictions = predictions.unflatten(-1, (-1, targets.shape[-1])).movedim(-2, 0)
        for step in range(objective.pred_steps or rows - 1 - objective.skip):
            ahead = step + 1 + objective.skip
            prediction = predictions[step if objective.pred_steps else 0][:, : rows - ahead]
            losses.append(
                F.cross_entropy(prediction.flatten(0, 2) @ targets.flatten(0, 2).T, places[:, ahead:].flatten())
            )
    return torch.stack(losses).view(directions, -1)


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("pred_steps", [1, 3, None])
@pytest.mark.parametrize(("reduction", "weights"), [("mean", None), ("sum", 1), ("lightning-bolts", "numbers")])
def test_equals_definition(pred_steps, skip, reduction, weights):
    objective = TargetInfoNCE(
        3,
        4,
        pred_steps=pred_steps,
        pred_directions=2,
        skip=skip,
        target_channels=6,
        scale=0.3,
        reduction=reduction,
    ).double()
    z, c = grids()
    output = objective(z, c)
    steps = by_definition(objective, z, c)

    numbers = torch.arange(1, steps.shape[1] + 1).double() if weights == "numbers" else torch.ones(steps.shape[1])
    mean = (steps * numbers).sum(1).mean() / numbers.sum()
    expected = mean if weights is None else mean * numbers.sum()
    torch.testing.assert_close(output.step_losses, steps.detach(), **EXACT)
    torch.testing.assert_close(output.loss, expected, **EXACT)
    assert output.mutual_information.item() == pytest.approx(math.log(30) - mean.item())
    assert output.accuracy.item() == pytest.approx(
        ((output.step_accuracies * numbers).sum(1).mean() / numbers.sum()).item()
    )
    variables = (z, c, *objective.parameters())
    actual = torch.autograd.grad(output.loss, variables)
    for one, other in zip(actual, torch.autograd.grad(expected, variables), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_accuracy_counts_predictions_that_score_highest():
    objective = TargetInfoNCE(6, pred_steps=1, pred_directions=1, skip=0, target_channels=6, scale=1.0)
    for projection in (objective.target_projection, objective.prediction_projection):
        torch.nn.init.eye_(projection.weight[..., 0, 0])
        torch.nn.init.zeros_(projection.bias)
    z = torch.eye(6).view(3, 2, 6).permute(2, 0, 1)[None, None]  # Every place has a code of its own.
    c = z.roll(-1, dims=3).clone()
    assert objective(z, c).accuracy == 1
    c[..., 0, 0] = c[..., 2, 0]
    assert objective(z, c).accuracy == 0.75


@pytest.mark.parametrize("reduction", ["mean", "lightning-bolts"])
def test_the_loss_is_not_rounded_under_autocast(reduction):
    objective = TargetInfoNCE(3, 4, pred_steps=3, pred_directions=2, reduction=reduction)
    z, c = (grid.float() for grid in grids())
    with torch.autocast("cpu", torch.bfloat16):
        output = objective(z, c)
    weights = torch.ones(3) / 3 if reduction == "mean" else torch.arange(1.0, 4)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, (output.step_losses * weights).sum(1).mean(), atol=1e-6, rtol=1e-6)


def test_empty_batch():
    z, c = grids(batch=0)
    output = TargetInfoNCE(3, 4, pred_steps=2, pred_directions=2).double()(z, c)
    output.loss.backward()
    assert output.loss == output.accuracy == output.mutual_information == 0


def test_the_least_of_everything():
    objective = TargetInfoNCE(1, 1, pred_steps=1, pred_directions=1, skip=0, target_channels=1, scale=1.0).double()
    tensors = grids(directions=1, batch=1, channels=1, context_channels=1, rows=2, cols=1)
    torch.testing.assert_close(objective(*tensors).loss, by_definition(objective, *tensors).mean(), **EXACT)


def test_defaults():
    default = TargetInfoNCE(3)
    assert default.target_projection.weight.shape == default.prediction_projection.weight.shape == (64, 3, 1, 1)
    assert default.gather_negatives == "none"
    assert all(value.is_meta for value in default.to("meta")(*torch.empty(2, 1, 2, 3, 4, 4, device="meta")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reduction": "max"}, "reduction must be one of mean, sum, lightning-bolts, got 'max'"),
        ({"gather_negatives": "some"}, "gather_negatives must be one of none, gather, ring, got 'some'"),
        ({"encoding_channels": 0}, "encoding_channels must be at least 1, got 0"),
        ({"context_channels": 0}, "context_channels must be at least 1, got 0"),
        ({"pred_steps": 0}, "pred_steps must be at least 1, got 0"),
        ({"pred_directions": 0}, "pred_directions must be at least 1, got 0"),
        ({"skip": -1}, "skip must be at least 0, got -1"),
        ({"target_channels": 0}, "target_channels must be at least 1, got 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        TargetInfoNCE(**{"encoding_channels": 3, **settings})


def test_wrong_grids():
    z, c = grids()
    objective = TargetInfoNCE(3, 4, pred_directions=2).double()
    with pytest.raises(ValueError, match=r"encodings must be \[2 directions, B, 3 channels, rows, cols\]"):
        objective(z[0], c)
    with pytest.raises(ValueError, match=r"contexts must be \[2 directions, B, 4 channels, rows, cols\]"):
        objective(z, z)
    with pytest.raises(ValueError, match="contexts must have the batch and grid of encodings"):
        objective(z, c[:, :1])
    with pytest.raises(ValueError, match="a grid of 2 rows is too small to predict pred_steps=None steps with skip=1"):
        objective(z[..., :2, :], c[..., :2, :])
    with pytest.raises(ValueError, match="a grid of 5 rows is too small to predict pred_steps=4 steps with skip=1"):
        TargetInfoNCE(3, 4, pred_steps=4, pred_directions=2).double()(z, c)
