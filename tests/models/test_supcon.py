"""Supervised contrast: the loss's parts, the accuracy, and learning of classes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.models import ResNetV2Encoder, SupCon, supcon


def make(**options):
    torch.manual_seed(0)
    encoder = ResNetV2Encoder(blocks=(1, 1), channels=(4, 8), stem_channels=4, norm="layer", stem="cifar")
    return SupCon(encoder, projection_channels=6, **options)


def views(images=6):
    return torch.randn(2, images, 3, 10, 10, generator=torch.Generator().manual_seed(1))


LABELS = torch.tensor([7, 3, 3, 7, 5, 3])


@pytest.mark.parametrize("rows", [1024, 5])
def test_loss_and_accuracy(rows, monkeypatch):
    """Equation 2 of the paper, of which an image of a class by itself has its other view."""
    monkeypatch.setattr(supcon, "_ROWS", rows)
    model, batch = make(temperature=0.4), views()
    output = model(batch, LABELS)
    features = F.normalize(model.head(model.encode(batch.flatten(0, 1))), dim=1)
    labels = LABELS.repeat(2)
    scores = (features @ features.T / 0.4).fill_diagonal_(-torch.inf)
    same = (labels[:, None] == labels).fill_diagonal_(False)
    log_p = scores.log_softmax(1).masked_fill(~same, 0)
    torch.testing.assert_close(output.loss, -(log_p.sum(1) / same.sum(1)).mean())
    nearest = labels[scores.argmax(1)] == labels
    assert output.accuracy.item() == pytest.approx(nearest.float().mean().item())
    assert 0 < output.accuracy < 1


def test_the_accuracy_is_not_rounded_by_autocast():
    """Views that are all alike but for what bfloat16 does not tell apart."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, generator=generator) + torch.randn(64, 1, 8, generator=generator) / 50
    pairs = F.normalize(images + torch.randn(64, 2, 8, generator=generator) / 2000, dim=2)
    labels = torch.arange(64)
    exact = supcon._accuracy(pairs.double(), labels)
    assert exact > 0.9
    with torch.autocast("cpu", torch.bfloat16):
        assert supcon._accuracy(pairs, labels) == pytest.approx(exact.item(), abs=0.05)


def test_every_parameter_learns_and_the_loss_falls():
    model, batch = make(), views()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        output = model(batch, LABELS)
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert model(batch, LABELS).accuracy == 1


def test_wrong_arguments():
    with pytest.raises(ValueError, match="gather_negatives must be one of none, gather, got 'ring'"):
        make(gather_negatives="ring")
    with pytest.raises(ValueError, match=r"views must be \[2, B, C, H, W\]"):
        make()(views()[0], LABELS)
    with pytest.raises(ValueError, match="labels must have shape"):
        make()(views(), LABELS[:4])
