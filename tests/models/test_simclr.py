"""SimCLR: shapes, the loss's parts, and learning."""

from __future__ import annotations

import pytest
import torch

from cpc_ext.models import ResNetV2Encoder, SimCLR
from cpc_ext.nn import NTXentLoss


def make(**options):
    torch.manual_seed(0)
    encoder = ResNetV2Encoder(blocks=(1, 1), channels=(4, 8), stem_channels=4, norm="layer", stem="cifar")
    return SimCLR(encoder, projection_channels=6, **options)


def views(images=5):
    return torch.randn(2, images, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def test_loss_is_that_of_the_projections():
    model, batch = make(temperature=0.4), views()
    output = model(batch)
    first, second = (model.head(model.encode(view)) for view in batch)
    torch.testing.assert_close(output.loss, NTXentLoss(0.4)(first, second))
    assert first.shape == (5, 6)


def test_features_are_the_encoders_mean_over_space():
    model, batch = make(), views()[0]
    features = model.encode(batch)
    assert features.shape == (5, 8)
    torch.testing.assert_close(features, model.encoder.layers(model.encoder.conv1(batch)).mean((2, 3)))


def test_every_parameter_learns_and_the_loss_falls():
    model, batch = make(), views()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        output = model(batch)
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="projection_channels must be at least 1, got 0"):
        SimCLR(make().encoder, projection_channels=0)
    with pytest.raises(ValueError, match=r"views must be \[2, B, C, H, W\]"):
        make()(torch.ones(3, 5, 3, 10, 10))
