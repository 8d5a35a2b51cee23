"""PixelCNN and GatedPixelCNN: receptive fields of logits, likelihood, and refused input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cpc_ext.models import GatedPixelCNN, PixelCNN
from cpc_ext.models.pixels.masked_features import convolve_images


def model_of(kind, colors, layers=2, **arguments):
    torch.manual_seed(0)
    if kind == "pixelcnn":
        model = PixelCNN(colors, hidden_channels=2 * colors, layers=layers, head_channels=4 * colors, **arguments)
    else:
        model = GatedPixelCNN(colors, channels=2 * colors, layers=layers, head_channels=4 * colors, **arguments)
    return model.double()


def seen_by(model, size):
    """seen[c, y, x, k, i, j]: whether logits of colour c at (y, x) depend on colour k at (i, j).

    ReLUs are removed, because they set some gradients to zero.
    """
    for module in model.modules():
        if getattr(module, "activation", None) == "relu":
            module.activation = None if hasattr(module, "weight") else "linear"
    height, width = size
    colors = model.in_channels
    image = torch.randn(1, colors, height, width, dtype=torch.float64, requires_grad=True)

    def convolve(layer, input, condition=None, **options):
        # An activation without parameters that was a ReLU is left out as well.
        if getattr(layer, "activation", None) == "linear":
            return input
        return convolve_images(layer, input, condition, **options)

    logits = model.logits_layer(model.network(convolve, image, None)).unflatten(1, (colors, 256))
    # Random sums: no two parts cancel.
    sums = (logits * torch.randn(256, 1, 1, dtype=torch.float64)).sum(2)[0]
    seen = torch.zeros((colors, height, width, colors, height, width), dtype=torch.bool)
    for color, row, col in itertools.product(*map(range, sums.shape)):
        (gradient,) = torch.autograd.grad(sums[color, row, col], image, retain_graph=True)
        seen[color, row, col] = gradient[0] != 0
    return seen


def earlier(colors, height, width):
    """earlier[c, y, x, k, i, j]: whether colour k at (i, j) comes before colour c at (y, x)."""
    order = torch.arange(height * width * colors).view(height, width, colors).permute(2, 0, 1).flatten()
    return (order[:, None] > order).view(colors, height, width, colors, height, width)


def within(reach, height, width):
    """within[y, x, i, j]: whether (i, j) lies in the receptive field's rectangle around (y, x)."""
    rows, cols = torch.arange(height), torch.arange(width)
    near = [(at[:, None] - at).abs() <= reach for at in (rows, cols)]
    return near[0][:, None, :, None] & near[1][None, :, None, :]


@pytest.mark.parametrize("colors", [1, 3])
def test_pixelcnn_sees_earlier_values_but_for_its_blind_spot(colors):
    size = 6, 12
    seen = seen_by(model_of("pixelcnn", colors), size)
    assert not (seen & ~earlier(colors, *size)).any()

    # Pixels that a 7x7 A and two 3x3 B masks reach in turn, as offsets (rows up, columns to the right).
    def offsets(side, center):
        half = side // 2
        return {
            (y, x) for y in range(half + 1) for x in range(-half, half + 1) if y > 0 or x < 0 or (center and x == 0)
        }

    reached = offsets(7, center=False)
    for _ in range(2):
        reached = {(y + dy, x + dx) for y, x in reached for dy, dx in offsets(3, center=True)}
    expected = torch.zeros(*size, *size, dtype=torch.bool)
    for row in range(size[0]):
        for col in range(size[1]):
            for up, right in reached:
                if row - up >= 0 and 0 <= col + right < size[1]:
                    expected[row, col, row - up, col + right] = True
    for color in range(colors):
        for other in range(colors):
            exact = expected.clone()
            if other < color:  # An earlier colour of the pixel itself, which shifts the reach of all before it.
                exact |= torch.eye(size[0] * size[1], dtype=torch.bool).view(*size, *size)
            assert torch.equal(seen[color, :, :, other], exact)
    # The blind spot: the next row's pixel one further right than reached is earlier, near, and unseen.
    assert not seen[0, 5, 0, 0, 4, 7:].any()


@pytest.mark.parametrize("colors", [1, 3])
def test_gated_pixelcnn_sees_all_earlier_values_within_reach(colors):
    size = 6, 7
    layers = 2
    seen = seen_by(model_of("gated-pixelcnn", colors, layers), size)
    reach = 3 + (layers - 1)  # Of a 7x7 and of 3x3 kernels.
    expected = earlier(colors, *size) & within(reach, *size)[None, :, :, None]
    assert torch.equal(seen, expected)


@pytest.mark.parametrize("kind", ["pixelcnn", "gated-pixelcnn"])
@pytest.mark.parametrize("colors", [1, 3])
def test_uniform_logits_are_eight_bits(kind, colors):
    model = model_of(kind, colors)
    torch.nn.init.zeros_(model.logits_layer.weight)
    torch.nn.init.zeros_(model.logits_layer.bias)
    images = torch.randint(0, 256, (3, colors, 5, 4), dtype=torch.uint8)
    assert model.bits_per_dim(images).item() == pytest.approx(8, abs=1e-12)
    assert model.nats(images).tolist() == pytest.approx([20 * colors * math.log(256)] * 3)


@pytest.mark.parametrize("kind", ["pixelcnn", "gated-pixelcnn"])
def test_likelihood_is_that_of_the_logits(kind):
    model = model_of(kind, 3)
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    logits = model(images)
    assert logits.shape == (2, 3, 256, 4, 5)
    expected = -logits.log_softmax(2).gather(2, images.long().unsqueeze(2)).sum((1, 2, 3, 4))
    torch.testing.assert_close(model.nats(images), expected)
    torch.testing.assert_close(model.bits_per_dim(images), expected.mean() / (60 * math.log(2)))
    for dtype in (torch.int32, torch.float32):
        assert torch.equal(model(images.to(dtype)), logits)
    assert model(images[:0]).shape == (0, 3, 256, 4, 5)
    assert model.nats(images[:0]).shape == (0,)


@pytest.mark.parametrize("kind", ["pixelcnn", "gated-pixelcnn"])
def test_learns_an_image_by_heart(kind):
    torch.manual_seed(0)
    model = PixelCNN(3, hidden_channels=6, layers=1) if kind == "pixelcnn" else GatedPixelCNN(3, channels=6, layers=2)
    images = torch.randint(0, 256, (1, 3, 3, 3), dtype=torch.uint8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.bits_per_dim(images)
        loss.backward()
        optimizer.step()
    assert loss < 3


def test_classes_condition_every_value():
    model = GatedPixelCNN(1, channels=4, layers=2, num_classes=3).double()
    images = torch.randint(0, 256, (2, 1, 4, 4), dtype=torch.uint8)
    by_class = [model(images, torch.tensor([label, label])) for label in range(3)]
    assert torch.equal(by_class[0], by_class[1])  # Classes start as nothing.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    by_class = [model(images, torch.tensor([label, label])) for label in range(3)]
    assert (by_class[0] != by_class[1]).any(2).all()
    mixed = model(images, torch.tensor([2, 0]))
    torch.testing.assert_close(mixed, torch.stack([by_class[2][0], by_class[0][1]]))


@pytest.mark.parametrize("kind", ["pixelcnn", "gated-pixelcnn"])
def test_autocast_keeps_the_likelihood_in_float32(kind):
    model = PixelCNN(3, hidden_channels=6, layers=1) if kind == "pixelcnn" else GatedPixelCNN(3, channels=6, layers=2)
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images).dtype == torch.bfloat16
        nats = model.nats(images)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, model.nats(images), rtol=0.02, atol=0)
    nats.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["pixelcnn", "gated-pixelcnn"])
def test_compiles_without_breaks(kind):
    if kind == "pixelcnn":
        model, labels = PixelCNN(3, hidden_channels=6, layers=1), None
    else:
        model, labels = GatedPixelCNN(3, channels=6, layers=2, num_classes=3), torch.tensor([0, 2])
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, labels), model(images, labels))


GOOD = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (GOOD[0], ValueError, r"images must be \[B, 3, H, W\], got shape \(3, 4, 4\)"),
        (GOOD[:, :1], ValueError, r"images must be \[B, 3, H, W\], got shape \(2, 1, 4, 4\)"),
        (GOOD.int() - 1, ValueError, r"images must hold values 0..255, got -1..-1"),
        (GOOD.float() + 256, ValueError, r"images must hold values 0..255, got 256..256"),
        (GOOD.float() + 0.5, ValueError, "whole numbers"),
        (GOOD.float() + math.nan, ValueError, "images must hold values 0..255"),
        (GOOD.bool(), TypeError, "images must be uint8 or other whole numbers"),
        (GOOD.numpy(), TypeError, "images must be a tensor, got ndarray"),
    ],
)
def test_wrong_images(images, error, message):
    with pytest.raises(error, match=message):
        PixelCNN(3, hidden_channels=3, layers=1).bits_per_dim(images)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (None, ValueError, "labels must be given: the model is conditioned on 5 classes"),
        (torch.tensor([0, 5]), ValueError, r"labels must be in 0..4, got 0..5"),
        (torch.tensor([-1, 0]), ValueError, r"labels must be in 0..4, got -1..0"),
        (torch.tensor([0.0, 1.0]), TypeError, "labels must be integers, got torch.float32"),
        (torch.tensor([0]), ValueError, r"labels must have shape \(2,\), got \(1,\)"),
    ],
)
def test_wrong_labels(labels, error, message):
    with pytest.raises(error, match=message):
        GatedPixelCNN(3, channels=3, layers=1, num_classes=5)(GOOD, labels)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="labels are for a model with num_classes"):
        PixelCNN(3, hidden_channels=3, layers=1)(GOOD, torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="hidden_channels must be a multiple of the 3 colours, got 4"):
        PixelCNN(3, hidden_channels=4)
    with pytest.raises(ValueError, match="channels must be a multiple of the 3 colours, got 4"):
        GatedPixelCNN(3, channels=4)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        PixelCNN(3, layers=0)
    with pytest.raises(ValueError, match="kernel_size must be odd and at least 3, got 4"):
        GatedPixelCNN(3, kernel_size=4)
    with pytest.raises(ValueError, match="num_classes must be at least 1, or None, got 0"):
        GatedPixelCNN(3, num_classes=0)
