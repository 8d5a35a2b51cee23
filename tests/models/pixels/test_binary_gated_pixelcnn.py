"""The gated PixelCNN of binary images: causality, likelihoods that sum to one, and sampling."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cpc_ext.models import BinaryGatedPixelCNN


def make(**options):
    torch.manual_seed(0)
    model = BinaryGatedPixelCNN(**{"layers": 2, "channels": 6, "head_channels": 5, **options}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


@pytest.mark.parametrize("place", [(0, 0), (2, 3), (4, 4)])
def test_a_pixel_sees_all_before_it_within_reach_and_nothing_else(place):
    images = torch.rand(1, 1, 5, 5, dtype=torch.float64, requires_grad=True)
    make()(images)[0, 0, place[0], place[1]].backward()
    seen = images.grad[0, 0] != 0
    before = torch.arange(25).view(5, 5) < 5 * place[0] + place[1]
    assert torch.equal(seen, before)


def test_likelihoods_of_all_images_sum_to_one():
    every = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=torch.float64).view(64, 1, 2, 3)
    assert torch.logsumexp(-make().nats(every), 0).item() == pytest.approx(0, abs=1e-12)


def test_samples_have_the_model_as_their_distribution():
    model = make()
    drawn = model.sample(4000, 2, generator=torch.Generator().manual_seed(0))
    assert (drawn.dtype, drawn.shape) == (torch.uint8, (4000, 1, 2, 2))
    every = torch.tensor(list(itertools.product((0, 1), repeat=4))).view(16, 1, 2, 2)
    expected = torch.exp(-model.nats(every))
    number = (drawn.flatten(1).long() * torch.tensor([8, 4, 2, 1])).sum(1)
    found = torch.bincount(number, minlength=16) / 4000
    # Four standard deviations of a share.
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / 4000).sqrt() + 1e-3).all()


def test_chances_near_one_are_not_rounded_to_it():
    model = make(layers=0).bfloat16()
    for parameter in model.parameters():
        parameter.data.zero_()
    model.head[-1].bias.data.fill_(7)
    images = model.sample(400, 5, generator=torch.Generator().manual_seed(0))
    assert 0 < (images == 0).sum() < 30  # About nine of 10 000.
    nats = model.nats(torch.ones(1, 1, 20, 20))
    torch.testing.assert_close(nats, torch.tensor([400 * math.log1p(math.exp(-7))]))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        make(channels=0)
    with pytest.raises(ValueError, match="layers must be at least 0, got -1"):
        make(layers=-1)
    with pytest.raises(ValueError, match=r"images must be \[B, 1, H, W\], got \(1, 3, 4, 4\)"):
        make()(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"images must hold values in 0\.\.1, got 0\.\.255"):
        make().nats(torch.tensor([0, 255]).view(1, 1, 1, 2))
    other = make(out_channels=256)
    for action in (lambda: other.nats(torch.zeros(1, 1, 4, 4)), lambda: other.sample(1, 4)):
        with pytest.raises(ValueError, match="a model of 256 logits a pixel of 1 colours is not of binary images"):
            action()
    with pytest.raises(ValueError, match="count and size must be at least 0, got -1 and 4"):
        make().sample(-1, 4)
