"""PixelCNNPP: receptive field of a pixel's mixture, likelihood, initialization, and refused input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from cpc_ext.models import PixelCNNPP
from cpc_ext.nn import ChannelMix, ShiftedConv2d, ShiftedConvTranspose2d
from cpc_ext.ops import logistic_mixture_nll


def model_of(colors=3, *, std=0.3, **arguments):
    torch.manual_seed(0)
    model = PixelCNNPP(colors, **{"channels": 4, "blocks": 1, "mixtures": 2, **arguments})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.double().eval()


def uint8(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("colors", [1, 3])
@pytest.mark.parametrize("classes", [None, 2])
def test_a_pixel_sees_earlier_pixels_and_no_other(colors, classes):
    model = model_of(colors, num_classes=classes)
    labels = None if classes is None else torch.tensor([1])
    height, width = 8, 8
    image = torch.rand(1, colors, height, width, dtype=torch.float64).mul(2).sub(1).requires_grad_()
    params = model.mixture(image, labels)
    # Random sums: no two parts cancel.
    sums = (params * torch.randn(params.shape[1], 1, 1, dtype=torch.float64)).sum(1)[0]
    order = torch.arange(height * width).view(height, width)
    for row, col in itertools.product(range(height), range(width)):
        (gradient,) = torch.autograd.grad(sums[row, col], image, retain_graph=True)
        seen = (gradient[0] != 0).any(0)
        # The mixture gives all colours of a pixel at once: none of them is seen.
        earlier = order < order[row, col]
        assert not (seen & ~earlier).any(), (row, col)
        # At the image's resolution: one column through the first layer, two a block but one where a block's input is
        # of a lower resolution, which in the first rows has seen nothing. Lower resolutions see farther.
        near = (torch.arange(width) - col).abs() <= 6
        assert seen[earlier & near].all(), (row, col)


@pytest.mark.parametrize("colors", [1, 3])
def test_likelihood_is_that_of_the_mixture(colors):
    model = model_of(colors, std=0.1)
    images = uint8(2, colors, 8, 12)
    params = model(images)
    assert params.shape == (2, 20 if colors == 3 else 6, 8, 12)
    nats = model.nats(images)
    assert nats.dtype == torch.float64
    assert torch.equal(nats, logistic_mixture_nll(images, params))
    torch.testing.assert_close(model.bits_per_dim(images), nats.mean() / (96 * colors * math.log(2)))
    for dtype in (torch.int32, torch.float32):
        assert torch.equal(model.nats(images.to(dtype)), nats)
    assert model.nats(images[:0]).shape == (0,)


def test_learns_an_image_by_heart():
    torch.manual_seed(0)
    model = PixelCNNPP(3, channels=8, blocks=1, mixtures=2, dropout=0.0)
    images = uint8(1, 3, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    begin = model.bits_per_dim(images)
    for _ in range(120):  # Processors and numbers of threads differ in when it gets there.
        optimizer.zero_grad()
        loss = model.bits_per_dim(images)
        if loss < 5:
            break
        loss.backward()
        optimizer.step()
    assert loss < 5 < 9 < begin


def test_every_parameter_learns():
    model = model_of(num_classes=2)
    model.bits_per_dim(uint8(2, 3, 8, 8), torch.tensor([0, 1])).backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_classes_condition_every_pixel():
    model = PixelCNNPP(1, channels=4, blocks=1, mixtures=2, num_classes=3).double().eval()
    images = uint8(2, 1, 4, 4)
    by_class = [model(images, torch.tensor([label, label])) for label in range(3)]
    assert torch.equal(by_class[0], by_class[1])  # Classes start as nothing.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    by_class = [model(images, torch.tensor([label, label])) for label in range(3)]
    assert (by_class[0] != by_class[1]).any(1).all()
    mixed = model(images, torch.tensor([2, 0]))
    torch.testing.assert_close(mixed, torch.stack([by_class[2][0], by_class[0][1]]))


def test_dropout_is_for_training_and_leaves_out_channels():
    model = model_of()
    images = uint8(2, 3, 8, 8)
    assert torch.equal(model(images), model(images))
    hidden = []
    block = model.up_layers[0].u_stream[0]
    block.dropout.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    model.train()
    assert not torch.equal(model(images), model(images))
    left_out = (hidden[0] == 0).flatten(2).all(2)
    assert left_out.any()
    assert not left_out.all()
    assert (hidden[0] != 0).flatten(2).any(2).eq(~left_out).all()


@pytest.mark.parametrize("channels_last", [False, True])
def test_initialization_from_data(channels_last):
    torch.manual_seed(0)
    model = PixelCNNPP(3, channels=8, blocks=1, mixtures=2).double()
    images = uint8(8, 3, 16, 16)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    model.up_layers[0].eval()
    model.initialize(images)
    assert model.training
    assert not any(module.training for module in model.up_layers[0].modules())
    assert all(module.training for module in model.up_layers[1].modules())
    model.eval()
    seen = {}

    def look(module, inputs, output):
        # Without what is added to it.
        seen[module] = module._convolve(
            inputs if isinstance(module, ChannelMix) else inputs[:1], module.weight, module.bias, None
        )

    for module in model.modules():
        if isinstance(module, ShiftedConv2d | ShiftedConvTranspose2d | ChannelMix):
            module.register_forward_hook(look)
    model(images)
    gains = {block.conv_out: 0.1 for block in model.modules() if hasattr(block, "conv_out")}
    assert len(seen) == sum(name.endswith("weight_v") for name in model.state_dict())
    for module, output in seen.items():
        deviation, mean = torch.std_mean(output, dim=(0, 2, 3), correction=0)
        wanted = torch.full_like(deviation, gains.get(module, 1.0))
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-9, rtol=0)
        if isinstance(module, ShiftedConvTranspose2d):  # One scale for all of them.
            assert 0.3 < deviation.mean() < 3
        else:
            torch.testing.assert_close(deviation, wanted, rtol=1e-4, atol=0)
    # It starts from a likelihood that is not far off, and it is over.
    assert model.bits_per_dim(images) < 14
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(uint8(2, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_autocast_keeps_the_likelihood_in_float32():
    model = PixelCNNPP(3, channels=8, blocks=1, mixtures=2).eval()
    images = uint8(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(images).dtype == torch.bfloat16
        nats = model.nats(images)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, model.nats(images), rtol=0.02, atol=0)
    nats.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_compiles_without_breaks():
    model, labels = PixelCNNPP(3, channels=4, blocks=1, mixtures=2, num_classes=3).eval(), torch.tensor([0, 2])
    images = uint8(2, 3, 4, 4)
    # The tracer finds breaks. Differentiating the trace takes twice as long; tests of the ops do that.
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, labels), model(images, labels))


GOOD = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (GOOD[0], ValueError, r"images must be \[B, 3, H, W\], got shape \(3, 8, 8\)"),
        (GOOD[:, :1], ValueError, r"images must be \[B, 3, H, W\], got shape \(2, 1, 8, 8\)"),
        (GOOD[..., :6], ValueError, "size must be a multiple of 4 pixels each way, .* got 8 x 6"),
        (GOOD.int() - 1, ValueError, r"images must hold values 0..255, got -1..-1"),
        (GOOD.float() + 0.5, ValueError, "whole numbers"),
        (GOOD.bool(), TypeError, "images must be uint8 or other whole numbers"),
        (GOOD.numpy(), TypeError, "images must be a tensor, got ndarray"),
    ],
)
def test_wrong_images(images, error, message):
    with pytest.raises(error, match=message):
        model_of().bits_per_dim(images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colors": 2}, "in_channels must be 1 or 3, got 2"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
        ({"mixtures": 0}, "mixtures must be at least 1, got 0"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"num_classes": 0}, "num_classes must be at least 1, or None, got 0"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of(**arguments)


def test_labels_without_classes():
    with pytest.raises(ValueError, match="labels are for a model with num_classes"):
        model_of()(GOOD, torch.tensor([0, 0]))
