"""The grid objective against its definition, position by position."""

import math

import pytest
import torch

from cpc_ext.nn import GridInfoNCE, grid_info_nce


def grids(directions=2, batch=2, channels=3, context_channels=4, rows=4, cols=3):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(directions, batch, channels, rows, cols, generator=generator, dtype=torch.float64)
    c = torch.randn(directions, batch, context_channels, rows, cols, generator=generator, dtype=torch.float64)
    return z.requires_grad_(), c.requires_grad_()


def by_definition(objective, z, c, negatives):
    """Loss of every direction and step from loops over rows, columns and images."""
    directions, batch, _, rows, cols = z.shape
    losses = []
    for direction in range(directions):
        for step in range(objective.pred_steps):
            ahead = step + 1 + objective.skip
            cells = [(r, q, b) for r in range(rows - ahead) for q in range(cols) for b in range(batch)]
            targets = [z[direction, b, :, r + ahead, q] for r, q, b in cells]
            matrix = objective.weight[direction, step]
            terms = []
            for m, (r, q, b) in enumerate(cells):
                prediction = c[direction, b, :, r, q] @ matrix
                if negatives is None:
                    others = [n for n in range(len(cells)) if n != m]
                else:
                    others = negatives[direction * objective.pred_steps + step][m].tolist()
                scores = torch.stack([prediction @ targets[n] for n in [m, *others]])
                terms.append(-torch.log_softmax(scores, 0)[0])
            losses.append(torch.stack(terms).mean())
    return torch.stack(losses).view(directions, -1)


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("neg_samples", [3, "all"])
def test_equals_definition(neg_samples, skip):
    objective = GridInfoNCE(3, 4, pred_steps=2, pred_directions=2, skip=skip, neg_samples=neg_samples).double()
    z, c = grids()
    negatives = None
    if neg_samples != "all":
        sizes = [2 * 3 * (4 - step - skip) for step in (1, 2)] * 2
        negatives = [torch.randint(size, (size, neg_samples)) for size in sizes]

    output = objective(z, c, negatives=negatives)
    expected = by_definition(objective, z, c, negatives)

    torch.testing.assert_close(output.step_losses, expected.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(output.loss, expected.mean(), atol=1e-12, rtol=0)
    torch.testing.assert_close(output.accuracy, output.step_accuracies.mean())
    variables = (z, c, objective.weight)
    actual = torch.autograd.grad(output.loss, variables)
    for one, other in zip(actual, torch.autograd.grad(expected.mean(), variables), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert not any(t.requires_grad for t in (output.accuracy, output.step_losses, output.step_accuracies))


def test_all_steps_and_directions_are_one_call(monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return info_nce(*arguments, **options)

    info_nce = grid_info_nce.info_nce
    monkeypatch.setattr(grid_info_nce, "info_nce", counted)
    GridInfoNCE(3, 4, pred_steps=2, pred_directions=2, neg_samples="all").double()(*grids())
    assert len(calls) == 1


def test_predictions_contrasted_as_they_are_made_give_what_their_products_give(monkeypatch):
    objective = GridInfoNCE(3, 4, pred_steps=2, pred_directions=2, neg_samples=5).double()
    z, c = grids()
    negatives = objective.draw_negatives(z)
    results = []
    for devices in (("cpu",), ()):
        monkeypatch.setattr(grid_info_nce, "_CONTRASTS_AS_PREDICTED", devices)
        output = objective(z, c, negatives=negatives)
        results.append([*output, *torch.autograd.grad(output.loss, (z, c, objective.weight))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    assert [each.requires_grad for each in results[0]] == [each.requires_grad for each in results[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 100.0])
def test_keys_that_a_step_does_not_contrast_leave_no_trace(dtype, size):
    """Steps of one objective equal objectives of one step each, also where logits are as large as they get."""
    objective = GridInfoNCE(3, 4, pred_steps=2, pred_directions=2, neg_samples="all").to(dtype)
    z, c = ((grid.detach() * size).to(dtype) for grid in grids())
    together = objective(z, c)
    for step in range(2):
        alone = GridInfoNCE(3, 4, pred_steps=1, pred_directions=2, skip=1 + step, neg_samples="all").to(dtype)
        alone.load_state_dict({"weight": objective.weight[:, step : step + 1]})
        expected = alone(z, c)
        torch.testing.assert_close(together.step_losses[:, step], expected.step_losses[:, 0], atol=1e-4, rtol=1e-6)
        assert torch.equal(together.step_accuracies[:, step], expected.step_accuracies[:, 0])


@pytest.mark.parametrize(("neg_samples", "keys"), [(3, [4, 4]), ("all", [12, 6])])
def test_mutual_information_is_the_mean_bound_of_the_steps(neg_samples, keys):
    objective = GridInfoNCE(3, 4, pred_steps=2, pred_directions=2, neg_samples=neg_samples).double()
    output = objective(*grids())
    bounds = torch.tensor([math.log(count) for count in keys]) - output.step_losses
    torch.testing.assert_close(output.mutual_information, bounds.mean())
    assert not output.mutual_information.requires_grad


def test_draws_follow_the_generator_and_stay_within_the_step():
    objective = GridInfoNCE(3, 4, pred_steps=2, pred_directions=2, neg_samples=200).double()
    z, c = grids()
    one, same, other = (objective(z, c, generator=torch.Generator().manual_seed(seed)).loss for seed in (1, 1, 2))
    assert one == same
    assert one != other
    # Rows 0 and 1 are targets of no step with skip=1, so no draw may touch them.
    one.backward()
    assert not z.grad[..., :2, :].any()
    assert z.grad[..., 2:, :].all()


@pytest.mark.parametrize(("neg_samples", "bound"), [(2, math.log(3)), ("all", 0)])
def test_empty_batch(neg_samples, bound):
    objective = GridInfoNCE(3, 4, pred_steps=2, neg_samples=neg_samples).double()
    z, c = grids(directions=1, batch=0)
    output = objective(z, c)
    output.loss.backward()
    assert output.loss == 0
    assert output.mutual_information.item() == pytest.approx(bound)
    assert not objective.weight.grad.any()
    assert objective(z, c, negatives=objective.draw_negatives(z)).loss == 0


def test_the_least_of_everything():
    """One target, which is also the only negative."""
    objective = GridInfoNCE(1, 1, pred_steps=1, pred_directions=1, skip=0, neg_samples=1)
    grid = torch.randn(1, 1, 1, 2, 1)
    assert objective(grid, grid).loss.item() == pytest.approx(math.log(2))
    objective.neg_samples = 64
    (draw,) = objective.draw_negatives(grid)
    assert torch.equal(draw, torch.zeros(1, 64, dtype=torch.int64))
    # A grid without rows to predict has no targets, whatever forward says to it.
    (draw,) = objective.draw_negatives(grid[..., :1, :])
    assert draw.shape == (0, 64)
    alone = GridInfoNCE(1, pred_steps=1, skip=0, neg_samples="all", gather_negatives="ring")
    assert alone(grid, grid).loss == 0
    assert alone.draw_negatives(grid) is None


def test_weights_start_within_the_bound_of_a_linear_layer():
    weight = GridInfoNCE(9, 40, pred_steps=2).weight
    assert weight.shape == (1, 2, 40, 9)
    assert 0.32 < weight.max() <= 1 / 3
    assert -0.32 > weight.min() >= -1 / 3
    assert GridInfoNCE(9, pred_steps=2).gather_negatives == "none"


def test_grids_are_turned_clockwise():
    grid = torch.arange(4.0).view(1, 1, 2, 2)
    turned = grid_info_nce.turned_grids(grid, 4)
    assert turned[:, 0, 0].tolist() == [[[0, 1], [2, 3]], [[2, 0], [3, 1]], [[3, 2], [1, 0]], [[1, 3], [0, 2]]]
    uneven = torch.zeros(2, 3, 4, 5)
    assert grid_info_nce.turned_grids(uneven, 1).shape == (1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match="pred_directions=2 needs a square grid, got 4 x 5"):
        grid_info_nce.turned_grids(uneven, 2)


@pytest.mark.parametrize("neg_samples", [3, "all"])
def test_everything_stays_on_its_device(neg_samples):
    objective = GridInfoNCE(3, 4, pred_steps=2, pred_directions=2, neg_samples=neg_samples).to("meta")
    before = torch.get_rng_state()
    output = objective(*(grid.float().to("meta") for grid in grids()))
    assert all(value.is_meta for value in output)
    assert torch.equal(torch.get_rng_state(), before)
    if neg_samples != "all":
        drawn = objective.draw_negatives(torch.empty(2, 2, 3, 4, 3, device="meta"), torch.Generator().manual_seed(0))
        assert all(draw.is_meta for draw in drawn)


def test_autocast():
    objective = GridInfoNCE(3, 4, pred_steps=2, pred_directions=2, neg_samples=2)
    z, c = grids()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(z.float(), c.float()).loss
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"encoding_channels": 0}, ValueError, "encoding_channels must be at least 1, got 0"),
        ({"context_channels": 0}, ValueError, "context_channels must be at least 1, got 0"),
        ({"pred_steps": True}, TypeError, "pred_steps must be an int, got bool"),
        ({"pred_steps": 0}, ValueError, "pred_steps must be at least 1, got 0"),
        ({"pred_steps": 1.0}, TypeError, "pred_steps must be an int, got float"),
        ({"skip": -1}, ValueError, "skip must be at least 0, got -1"),
        ({"neg_samples": 0}, ValueError, "neg_samples must be at least 1, got 0"),
        ({"neg_samples": "some"}, ValueError, "neg_samples must be an int or \"all\", got 'some'"),
        ({"gather_negatives": "some"}, ValueError, "gather_negatives must be one of none, gather, ring, got 'some'"),
        ({"gather_negatives": "ring"}, ValueError, 'gather_negatives="ring" needs neg_samples="all"'),
        ({"pred_directions": 0}, ValueError, "pred_directions must be at least 1, got 0"),
    ],
)
def test_wrong_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        GridInfoNCE(**{"encoding_channels": 3, "pred_steps": 1, **arguments})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_draws_of_narrow_types_name_the_same_targets(dtype):
    objective = GridInfoNCE(3, pred_steps=2, neg_samples=4)
    z, c = torch.randn(2, 1, 40, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    draws = [draw % 100 for draw in objective.draw_negatives(z, torch.Generator().manual_seed(0))]
    assert objective(z, c, negatives=[draw.to(dtype) for draw in draws]).loss == objective(z, c, negatives=draws).loss


def test_wrong_inputs():
    objective = GridInfoNCE(3, 4, pred_steps=2, pred_directions=2, neg_samples=2).double()
    z, c = grids()
    draws = [torch.zeros(size, 2, dtype=torch.int64) for size in (12, 6)] * 2
    with pytest.raises(ValueError, match=r"encodings must be \[2 directions, B, 3 channels, rows, cols\], got shape"):
        objective(c, c)
    with pytest.raises(ValueError, match=r"encodings must be \[2 directions, B, 3 channels, rows, cols\], got shape"):
        objective(z[0], c)
    with pytest.raises(ValueError, match=r"contexts must be \[2 directions, B, 4 channels, rows, cols\], got shape"):
        objective(z, c[:1])
    with pytest.raises(TypeError, match="encodings must be a tensor, got NoneType"):
        objective(None, c)
    with pytest.raises(TypeError, match=r"contexts must be floating, got torch\.int64"):
        objective(z, c.long())
    with pytest.raises(TypeError, match=r"negatives\[1\] must be integers, got torch\.float32"):
        objective(z, c, negatives=[draws[0], draws[1].float(), *draws[2:]])
    with pytest.raises(TypeError, match=r"negatives\[0\] must be a tensor, got list"):
        objective(z, c, negatives=[[[0]]] * 4)
    with pytest.raises(ValueError, match="contexts must have the batch and grid of encodings"):
        objective(z, c[:, :1])
    with pytest.raises(ValueError, match="contexts must have the batch and grid of encodings"):
        objective(z, c[..., :2])
    with pytest.raises(ValueError, match="grid of 3 rows is too small to predict pred_steps=2 steps with skip=1"):
        objective(z[..., :3, :], c[..., :3, :])
    with pytest.raises(ValueError, match="negatives must hold 2 directions x 2 steps = 4 tensors, got 3"):
        objective(z, c, negatives=draws[:3])
    with pytest.raises(ValueError, match=r"negatives\[1\] must have shape \(6, 2\), got \(12, 2\)"):
        objective(z, c, negatives=[draws[0]] * 4)
    for index in (-1, 6):
        with pytest.raises(IndexError, match="negatives"):
            objective(z, c, negatives=[draws[0], draws[1] + index, *draws[2:]])
    objective.neg_samples = "all"
    with pytest.raises(ValueError, match='neg_samples is "all"'):
        objective(z, c, negatives=draws)


def test_every_direction_and_step_draws_negatives_of_its_own():
    objective = GridInfoNCE(3, pred_steps=2, pred_directions=4, neg_samples=5).double()
    encodings = torch.randn(4, 2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    contexts = encodings.flip(1)
    drawn = objective.draw_negatives(encodings, torch.Generator().manual_seed(1))
    assert len(drawn) == 8
    for step in range(2):
        of_step = drawn[step::2]
        assert not any(torch.equal(of_step[one], of_step[other]) for one in range(4) for other in range(one))
    # Drawn or replayed, direction by direction.
    losses = objective(encodings, contexts, generator=torch.Generator().manual_seed(1)).step_losses
    assert torch.equal(losses, objective(encodings, contexts, negatives=drawn).step_losses)
    same = [drawn[step] for _ in range(4) for step in range(2)]
    others = objective(encodings, contexts, negatives=same).step_losses
    assert torch.equal(others[0], losses[0])
    assert not torch.isclose(others[1:], losses[1:]).any()
