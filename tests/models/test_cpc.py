"""CPC as a whole: inputs, directions, the context visible to each direction, and learning."""

import math

import pytest
import torch
from torch import nn

from cpc_ext.models import (
    CPC,
    GatedPixelCNNContext,
    GreedyInfoMax,
    RecurrentContext,
    ResidualContext,
    ResNetV2Encoder,
    WaveformEncoder,
)
from cpc_ext.nn import TargetInfoNCE


def make_cpc(**settings):
    encoder = ResNetV2Encoder(blocks=(1, 1), channels=(8, 16), stem_channels=8, stem="cifar", patch_size=8)
    return CPC(encoder, GatedPixelCNNContext(16), **{"pred_steps": 2, **settings})


@pytest.mark.parametrize("directions", [1, 2, 4])
@pytest.mark.parametrize("neg_samples", [4, "all"])
def test_images_and_patches_give_the_same_loss(directions, neg_samples):
    model = make_cpc(pred_directions=directions, neg_samples=neg_samples)
    images = torch.rand(2, 3, 24, 24)
    output = model(images, generator=torch.Generator().manual_seed(0))
    patches = model.encoder.patchify(images)
    again = model(patches, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(output, again)
    assert output.step_losses.shape == output.step_accuracies.shape == (directions, 2)
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_untrained_model_is_at_chance():
    torch.manual_seed(0)
    output = make_cpc(neg_samples=9)(torch.rand(8, 3, 24, 24))
    assert abs(output.loss.item() - math.log(10)) < 0.2


def test_directions_predict_down_right_up_left():
    """A context of direction d must not see the row or column it predicts."""
    model = CPC(Features(3), GatedPixelCNNContext(3), pred_steps=1, pred_directions=4).double()
    encodings = torch.randn(1, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    contexts = model.contextualize(encodings)
    assert contexts.shape == (4, 1, 3, 5, 5)
    for direction, hidden in enumerate(
        [
            (slice(1, None), slice(None)),
            (slice(None), slice(1, None)),
            (slice(None, -1), slice(None)),
            (slice(None), slice(None, -1)),
        ]
    ):
        (gradient,) = torch.autograd.grad(contexts[direction, ..., 0, :].sum(), encodings, retain_graph=True)
        assert not gradient[0][(slice(None), *hidden)].any()
        assert gradient.any()


def make_cpc_v2(shared_context, **settings):
    encoder = ResNetV2Encoder(blocks=(1, 1), channels=(8, 16), stem_channels=8, stem="cifar", patch_size=8)
    contexts = [ResidualContext(16, 8, 2) for _ in range(1 if shared_context else 4)]
    objective = TargetInfoNCE(16, pred_steps=2, pred_directions=4, target_channels=12, **settings)
    return CPC(encoder, contexts[0] if shared_context else contexts, objective)


@pytest.mark.parametrize("shared_context", [False, True])
def test_version_2_of_all_directions(shared_context):
    torch.manual_seed(0)
    model = make_cpc_v2(shared_context)
    images = torch.rand(2, 3, 24, 24)
    output = model(images)
    output.loss.backward()
    assert output.step_losses.shape == (4, 2)
    assert abs(output.loss.item() - math.log(2 * 25)) < 0.2  # At chance among all targets of the batch.
    assert all(parameter.grad is not None for parameter in model.parameters())

    # Each direction is the objective of one direction on its turned grid.
    encodings = model.encode(images)
    for direction in range(4):
        one = TargetInfoNCE(16, pred_steps=2, target_channels=12)
        for mine, whole in zip(one.parameters(), model.objective.parameters(), strict=True):
            mine.data = whole.chunk(4)[direction]
        turned = torch.rot90(encodings, -direction, (2, 3))
        context = model.context if shared_context else model.context[direction]
        losses = one(turned[None], context(turned)[None]).step_losses[0]
        torch.testing.assert_close(losses, output.step_losses[direction])


@pytest.mark.parametrize(
    ("make", "accuracy"),
    # The second contrasts with all 200 patches of the batch, of which those of an image are alike.
    [(lambda: make_cpc(neg_samples=8), 0.3), (lambda: make_cpc_v2(False, scale=1.0), 3 / 200)],
)
def test_learns_to_tell_images_apart(make, accuracy):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    images = torch.rand(8, 3, 1, 1) * torch.ones(1, 1, 24, 24) + 0.05 * torch.randn(8, 3, 24, 24)
    first = None
    for _ in range(40):
        output = model(images)
        first = first or output.loss.item()
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert output.loss.item() < first - 0.4
    assert output.accuracy > accuracy


class Features(nn.Module):
    """An encoder that returns its input, which is encodings already."""

    def __init__(self, channels):
        super().__init__()
        self.out_channels = channels

    def forward(self, encodings):
        return encodings


def test_errors():
    with pytest.raises(ValueError, match="pred_directions must be 1 to 4, got 5"):
        make_cpc(pred_directions=5)
    with pytest.raises(ValueError, match="grid of 2 rows is too small to predict pred_steps=2 steps with skip=1"):
        make_cpc()(torch.rand(1, 3, 12, 12))
    model = CPC(Features(3), GatedPixelCNNContext(3), pred_steps=1, pred_directions=2)
    with pytest.raises(ValueError, match="pred_directions=2 needs a square grid, got 4 x 5"):
        model(torch.rand(1, 3, 4, 5))
    with pytest.raises(ValueError, match="one network, or one for each of 2 directions, got 3"):
        CPC(Features(3), [ResidualContext(3) for _ in range(3)], pred_steps=1, pred_directions=2)
    with pytest.raises(TypeError, match="either objective or the settings of a GridInfoNCE, got both: pred_steps"):
        CPC(Features(3), ResidualContext(3), TargetInfoNCE(3), pred_steps=1)


@pytest.mark.parametrize(
    "make",
    [
        lambda encoder, context: CPC(encoder, context, pred_steps=2),
        lambda encoder, context: CPC(encoder, context, TargetInfoNCE(4, 4, pred_steps=2)),
        lambda encoder, context: GreedyInfoMax(encoder, 5, context=context, pred_steps=2),
        lambda encoder, context: GreedyInfoMax(encoder, 5, context=context, pred_steps=2, neg_samples="all"),
    ],
)
def test_objectives_of_grids_refuse_sequences(make):
    model = make(WaveformEncoder(4), RecurrentContext(4, 4))
    told = (
        r"encodings must be grids \[B, D, rows, cols\], got shape \(1, 4, \d+\); sequences .* are for SequenceInfoNCE"
    )
    with pytest.raises(ValueError, match=told):
        model(torch.zeros(1, 1, 1600))
