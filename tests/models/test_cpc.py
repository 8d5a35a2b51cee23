"""CPC as a whole: inputs, directions, what each direction can see, and learning."""

import math

import pytest
import torch
from torch import nn

from cpc_ext.models import CPC, GatedPixelCNNContext, ResNetV2Encoder


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


def test_learns_to_tell_images_apart():
    torch.manual_seed(0)
    model = make_cpc(neg_samples=8)
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
    assert output.accuracy > 0.3


class Features(nn.Module):
    """Hands on encodings that are already there."""

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
