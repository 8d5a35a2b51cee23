"""PixelCNNs of values other than pixels: fewer levels, and codes without an order, such as a VQ-VAE's."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cpc_ext.models import GatedPixelCNN, PixelCNN, PixelCNNPP

KINDS = ("pixelcnn", "gated")


def model_of(kind, colors, levels, code_channels, dtype=torch.float64):
    torch.manual_seed(0)
    options = {"levels": levels, "code_channels": code_channels}
    if kind == "pixelcnn":
        model = PixelCNN(colors, hidden_channels=2 * colors, layers=2, **options)
    else:
        model = GatedPixelCNN(colors, channels=2 * colors, layers=3, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("colors", "code_channels"), [(1, 0), (1, 3), (2, 3)])
def test_probabilities_of_all_images_sum_to_one(kind, colors, code_channels):
    model = model_of(kind, colors, 3, code_channels)
    values = list(itertools.product(range(3), repeat=4 * colors))
    images = torch.tensor(values, dtype=torch.uint8).view(-1, colors, 2, 2)
    assert (-model.nats(images)).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("levels", "code_channels"), [(2, 0), (32, 0), (256, 5), (700, 4), (700, 0)])
@pytest.mark.parametrize(("colors", "dtype"), [(1, torch.float64), (3, torch.float64), (1, torch.float32)])
def test_samples_are_those_of_the_whole_network(kind, levels, code_channels, colors, dtype):
    model = model_of(kind, colors, levels, code_channels, dtype)
    noise = torch.empty(model.noise_shape((2, colors, 5, 6)), dtype=dtype)
    assert noise.shape[-1] == levels
    model._draw_noise(noise, torch.Generator().manual_seed(1))
    kept, naive = (model.sample(2, (5, 6), noise=noise, cached=cached) for cached in (True, False))
    assert torch.equal(kept, naive)
    assert kept.dtype == (torch.uint8 if levels <= 256 else torch.int64)
    assert int(kept.max()) < levels
    assert len(kept.unique()) > min(levels, 20) / 2
    completed = model.sample(2, (5, 6), noise=noise, images=kept, known_rows=3)
    assert torch.equal(completed, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_codes_that_lie_too_close_for_a_type_are_drawn_as_they_are(dtype):
    # bfloat16 can represent only half of the numbers 0 to 699 scaled to -1..1.
    model = model_of("gated", 1, 700, 0, dtype)
    known = torch.arange(700).view(1, 1, 20, 35)
    assert torch.equal(model.sample(1, (20, 35), images=known, known_rows=20), known)


@pytest.mark.parametrize("kind", KINDS)
def test_a_code_is_seen_as_what_is_learned_of_it(kind):
    model = model_of(kind, 1, 12, 4)
    images = torch.randint(0, 12, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    before = model(images)
    # Codes have no order: with rows of the table swapped and the images' codes with them all is as it was.
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model.codes.weight.copy_(model.codes.weight[order].clone())
    torch.testing.assert_close(model(order.argsort()[images]), before, rtol=1e-12, atol=1e-12)
    model.nats(images).sum().backward()
    seen = set((model.codes.weight.grad.abs().sum(1) > 0).nonzero().flatten().tolist())
    # The last pixel's code is seen by no other.
    assert seen
    assert seen <= set(images[:, 0].flatten(1)[:, :-1].unique().tolist())


def test_codes_are_learned():
    # A code that follows from the one above, in no order that numbers have.
    torch.manual_seed(0)
    after = torch.randperm(50)
    model = GatedPixelCNN(1, channels=16, layers=2, levels=50, code_channels=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        rows = [torch.randint(0, 50, (16, 1, 1, 4))]
        for _ in range(3):
            rows.append(after[rows[-1]])
        loss = model.bits_per_dim(torch.cat(rows, 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # A quarter of the values is drawn anew, the rest is known.
    assert loss.item() == pytest.approx(math.log2(50) / 4, abs=0.15)
    drawn = model.sample(8, 4, temperature=0.0, images=torch.cat(rows, 2)[:8].byte(), known_rows=1)
    assert torch.equal(drawn[:, :, 1:].long(), after[drawn[:, :, :-1].long()])


@pytest.mark.parametrize(
    ("levels", "images", "error", "words"),
    [
        (32, torch.full((1, 1, 3, 3), 32, dtype=torch.uint8), ValueError, r"0\.\.31, got 32\.\.32"),
        (700, torch.full((1, 1, 3, 3), 700), ValueError, r"0\.\.699, got 700"),
        (700, torch.full((1, 1, 3, 3), 0.5), ValueError, r"whole numbers 0\.\.699"),
        (700, torch.full((1, 1, 3, 3), -1), ValueError, r"got -1"),
    ],
)
def test_values_beyond_the_levels_are_refused(levels, images, error, words):
    with pytest.raises(error, match=words):
        model_of("pixelcnn", 1, levels, 0).nats(images)


def test_arguments():
    for options, words in (({"levels": 1}, "levels must be at least 2"), ({"code_channels": -1}, "code_channels")):
        with pytest.raises(ValueError, match=words):
            PixelCNN(1, **options)
    model = model_of("pixelcnn", 1, 700, 0)
    with pytest.raises(ValueError, match="images must be int64"):
        model.sample(1, 4, images=torch.zeros(1, 1, 4, 4, dtype=torch.uint8), known_rows=1)
    assert PixelCNNPP.levels == 256


@pytest.mark.parametrize("code_channels", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_beyond_the_levels_are_clamped_where_nobody_looks_at_values(kind, code_channels):
    # Compiled it does as on a GPU, where an index that is too large ends the process's work there.
    model = model_of(kind, 1, 16, code_channels)
    images = torch.randint(0, 16, (2, 1, 4, 5), dtype=torch.uint8)
    images[0, 0, 1, 2:4] = 15
    beyond = images.clone()
    beyond[0, 0, 1, 2:4] = torch.tensor([16, 200], dtype=torch.uint8)
    found = torch.compile(model.nats, backend="eager", fullgraph=True)(beyond)
    torch.testing.assert_close(found, model.nats(images))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_codes_and_labels_may_be_of_any_integer_type(dtype):
    torch.manual_seed(0)
    codes, labels = torch.randint(0, 700, (2, 1, 3, 4)), torch.tensor([2, 0])
    model = GatedPixelCNN(1, channels=2, layers=2, num_classes=3, levels=700, code_channels=2)
    torch.testing.assert_close(model.nats(codes.to(dtype), labels.to(dtype)), model.nats(codes, labels))
    with pytest.raises(ValueError, match=r"values 0\.\.699, got 700\.\.700"):
        model.nats(torch.full_like(codes, 700).to(dtype), labels)
    images = torch.randint(0, 256, (2, 1, 4, 4))
    model = PixelCNNPP(1, channels=2, blocks=1, mixtures=1).eval()
    torch.testing.assert_close(model.nats(images.to(dtype)), model.nats(images.byte()))
