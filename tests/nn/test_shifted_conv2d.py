"""PixelCNN++'s convolutions against plain ones of the visible pixels, weight normalisation, and initialization."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.nn import ChannelMix, ShiftedConv2d, ShiftedConvTranspose2d
from cpc_ext.nn.shifted_conv2d import initialize_from_data

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def features(channels, size=5, batch=2):
    return torch.randn(batch, channels, size, size + 1, dtype=torch.float64)


def scaled(layer):
    """Scale a layer's weight so that it differs from its normalised form."""
    layer = layer.double()
    with torch.no_grad():
        layer.weight_g.uniform_(0.5, 2)
    return layer


@pytest.mark.parametrize(
    ("kernel_size", "shift", "sides"),
    [
        ((2, 3), "down", (1, 1)),
        ((1, 5), "down", (2, 2)),
        ((2, 2), "down-right", (1, 0)),
        ((3, 1), "down-right", (0, 0)),
    ],
)
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_is_a_convolution_of_what_is_above_and_to_the_left(kernel_size, shift, sides, stride):
    torch.manual_seed(0)
    layer = scaled(ShiftedConv2d(3, 4, kernel_size, shift, stride=stride))
    norms = layer.weight_v.square().sum((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(layer.weight, layer.weight_v / norms * layer.weight_g, **EXACT)
    input = features(3)
    seen = F.pad(input, (*sides, kernel_size[0] - 1, 0))
    expected = F.conv2d(seen, layer.weight, layer.bias, stride=stride)
    torch.testing.assert_close(layer(input), expected, **EXACT)
    if stride == 1:
        added = features(4)
        torch.testing.assert_close(layer(input, added), expected + added, **EXACT)


@pytest.mark.parametrize("sources", [1, 3])
@torch.no_grad()
def test_channel_mix_is_a_matrix_of_the_joined_halves(sources):
    torch.manual_seed(0)
    layer = scaled(ChannelMix(4 * sources, 5, sources=sources))
    inputs = [features(4) for _ in range(sources)]
    joined = torch.cat([half for part in range(2) for half in (input.chunk(2, 1)[part] for input in inputs)], 1)
    expected = F.conv2d(joined, layer.weight[..., None, None], layer.bias)
    torch.testing.assert_close(layer(*inputs), expected, **EXACT)
    with pytest.raises(ValueError, match="zip"):
        layer(*inputs, inputs[0])


@torch.no_grad()
def test_weights_start_as_pytorchs():
    for make, plain in (
        (lambda: ShiftedConv2d(3, 4, (2, 3), "down"), lambda: torch.nn.Conv2d(3, 4, (2, 3))),
        (
            lambda: ShiftedConvTranspose2d(3, 4, (2, 3), "down"),
            lambda: torch.nn.ConvTranspose2d(3, 4, (2, 3), stride=2),
        ),
        (lambda: ChannelMix(3, 4), lambda: torch.nn.Linear(3, 4)),
    ):
        torch.manual_seed(0)
        layer = make()
        torch.manual_seed(0)
        expected = plain()
        torch.testing.assert_close(layer.weight, expected.weight)
        assert torch.equal(layer.bias, expected.bias)


@pytest.mark.parametrize(("deviation", "taken"), [(1e-3, 1e-3), (5e-5, 1.0)])
@torch.no_grad()
def test_start_from_data(deviation, taken):
    """An output that is the same everywhere, or as good as that, keeps the deviation that it has."""
    layer = ShiftedConv2d(2, 3, (1, 1), "down", gain=0.1).double()
    layer.weight_v.copy_(torch.tensor([[2, 0], [0, 2], [3, 4]]).view_as(layer.weight_v))
    constant, noise = torch.full((2, 1, 4, 4), 7.0).double(), torch.randn(2, 1, 4, 4).double()
    noise = (noise - noise.mean()) / noise.std(correction=0) * deviation + 2
    input = torch.cat([constant, noise], 1)
    with initialize_from_data(torch.nn.Sequential(torch.nn.Dropout(0), layer)):
        outputs = layer(input)
    scale = 0.1 / torch.tensor([1, taken, 0.8 * taken if taken < 1 else 1], dtype=torch.float64)
    torch.testing.assert_close(layer.weight_g.flatten(), scale, rtol=1e-9, atol=0)
    torch.testing.assert_close(layer.bias, -torch.tensor([7, 2, 5.8], dtype=torch.float64) * scale, rtol=1e-9, atol=0)
    torch.testing.assert_close(outputs, layer(input))


def test_the_start_from_data_ends_where_it_fails():
    layer = ChannelMix(2, 3)

    def fail():
        assert not torch.is_grad_enabled()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), initialize_from_data(layer):
        fail()
    assert torch.is_grad_enabled()
    before = layer.bias.clone()
    layer(torch.randn(2, 2, 3, 3))
    assert torch.equal(layer.bias, before)


@torch.no_grad()
def test_autocast_does_not_round_the_start():
    layer, input = ChannelMix(4, 3), torch.randn(3, 4, 5, 5)
    layer.weight_v /= layer.weight_v.norm(dim=1, keepdim=True)
    with torch.autocast("cpu", torch.bfloat16):
        unit = layer._convolve([input], layer.weight_v, None, None)
        with initialize_from_data(layer):
            layer(input)
    assert unit.dtype == torch.bfloat16
    deviation, mean = torch.std_mean(unit.float(), (0, 2, 3), correction=0)
    torch.testing.assert_close(layer.weight_g[:, 0], 1 / deviation)
    torch.testing.assert_close(layer.bias, -mean / deviation)


def test_weight_norm_is_pytorchs():
    layer = ShiftedConvTranspose2d(3, 5, (2, 3), "down")
    plain = torch.nn.ConvTranspose2d(3, 5, (2, 3), stride=2)
    plain.load_state_dict({"weight": layer.weight_v.detach() * 3, "bias": layer.bias.detach()})
    plain = torch.nn.utils.parametrizations.weight_norm(plain)
    with torch.no_grad():
        layer.weight_g.copy_(torch.rand_like(layer.weight_g))
        plain.parametrizations.weight.original0.copy_(layer.weight_g)
    torch.testing.assert_close(layer.weight, plain.weight)


@pytest.mark.parametrize(("kernel_size", "shift"), [((2, 3), "down"), ((2, 2), "down-right")])
@torch.no_grad()
def test_transposed_convolutions_are_normalised_and_initialised_by_input_channel(kernel_size, shift):
    torch.manual_seed(0)
    layer = ShiftedConvTranspose2d(3, 4, kernel_size, shift).double()
    layer.weight_g.uniform_(0.5, 2)
    norms = layer.weight_v.square().sum((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(layer.weight, layer.weight_v / norms * layer.weight_g, rtol=1e-12, atol=0)

    features = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    sides = 1 if shift == "down" else 0
    options = {"stride": 2, "padding": (0, sides), "output_padding": (0, sides)}
    unit = F.conv_transpose2d(features, layer.weight_v / norms, **options)
    with initialize_from_data(layer):
        outputs = layer(features)
    # One scale for all: the mean of what the output channels want.
    scale = (1 / unit.std((0, 2, 3), correction=0)).mean()
    torch.testing.assert_close(layer.weight_g, scale.expand(3, 1, 1, 1), rtol=1e-12, atol=0)
    torch.testing.assert_close(outputs, (unit - unit.mean((0, 2, 3), keepdim=True)) * scale, rtol=1e-9, atol=1e-12)


def test_wrong_layers():
    with pytest.raises(ValueError, match='shift must be "down" or "down-right", got \'up\''):
        ShiftedConv2d(1, 1, (2, 3), "up")
    with pytest.raises(ValueError, match=r"a kernel shifted down must have an odd width, got \(2, 2\)"):
        ShiftedConv2d(1, 1, (2, 2), "down")
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        ShiftedConv2d(1, 1, (2, 3), "down", stride=3)
    with pytest.raises(ValueError, match=r"kernel_size must be \(2, 3\) shifted down"):
        ShiftedConvTranspose2d(1, 1, (2, 5), "down")
