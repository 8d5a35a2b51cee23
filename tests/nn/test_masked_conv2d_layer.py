"""The masked convolution layer: hidden taps of the named masks, and no influence of hidden pixels."""

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.nn import MaskedConv2d


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [
        ("A", 3, [[1, 1, 1], [1, 0, 0], [0, 0, 0]]),
        ("B", 3, [[1, 1, 1], [1, 1, 0], [0, 0, 0]]),
        ("vertical", 3, [[1, 1, 1], [1, 1, 1], [0, 0, 0]]),
        ("horizontal", (1, 5), [[1, 1, 1, 0, 0]]),
        ("horizontal", 3, [[1, 1, 0]] * 3),
        ("vertical", (1, 3), [[1, 1, 1]]),
        ("B", 2, [[1, 0], [0, 0]]),
        ("A", (1, 4), [[1, 0, 0, 0]]),
        ("vertical", 4, [[1] * 4] * 2 + [[0] * 4] * 2),
        ("horizontal", (1, 4), [[1, 1, 0, 0]]),
    ],
)
def test_named_masks(name, size, expected):
    layer = MaskedConv2d(2, 4, size, mask=name)
    assert layer.mask.expand(4, 2, *layer.mask.shape[-2:])[3, 1].int().tolist() == expected


@pytest.mark.parametrize("name", ["A", "B"])
@pytest.mark.parametrize("groups", [2, 3])
def test_color_groups_order_the_centre(name, groups):
    layer = MaskedConv2d(2 * groups, groups, 3, mask=name, color_groups=groups)
    sees = [[int(c // 2 < o if name == "A" else c // 2 <= o) for c in range(2 * groups)] for o in range(groups)]
    assert layer.mask[:, :, 1, 1].int().tolist() == sees
    assert layer.mask[:, :, 0].all()
    assert not layer.mask[:, :, 2].any()


@pytest.mark.parametrize("name", ["A", "B"])
def test_both_halves_of_a_gate_have_its_colour(name):
    layer = MaskedConv2d(6, 6, 3, mask=name, color_groups=3, activation="gated")
    sees = [[int(c // 2 < o if name == "A" else c // 2 <= o) for c in range(6)] for o in range(3)]
    assert layer.mask[:, :, 1, 1].int().tolist() == sees * 2


@pytest.mark.parametrize("name", ["A", "B"])
def test_raster_order_by_gradients(name):
    layer = MaskedConv2d(1, 1, 7, mask=name).double()
    image = torch.randn(1, 1, 5, 6, dtype=torch.float64, requires_grad=True)
    layer(image)[0, 0, 2, 3].backward()
    seen = image.grad[0, 0].flatten() != 0
    last = 2 * 6 + 3 - (name == "A")
    assert seen[last]
    assert not seen[last + 1 :].any()


def test_is_a_convolution_with_the_masked_weight():
    mask = torch.rand(4, 3, 3, 3) < 0.5
    layer = MaskedConv2d(3, 4, 3, mask=mask, dilation=2, activation="relu")
    image = torch.randn(2, 3, 6, 6)
    expected = F.conv2d(image, layer.weight * mask, layer.bias, padding=2, dilation=2).relu()
    torch.testing.assert_close(layer(image), expected)
    assert set(layer.state_dict()) == {"weight", "bias"}
    gated = MaskedConv2d(3, 4, (1, 3), mask=mask[0, 0, :1], activation="gated")
    condition = torch.randn(2, 4, 6, 6)
    first, second = (F.conv2d(image, gated.weight * gated.mask, gated.bias, padding=(0, 1)) + condition).chunk(2, 1)
    torch.testing.assert_close(gated(image, condition), first.tanh() * second.sigmoid())
    assert MaskedConv2d(3, 4, 3, mask="A", bias=False).bias is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mask": "C"}, ValueError, "mask must be a tensor or one of A, B, vertical, horizontal, got 'C'"),
        ({"mask": 1}, TypeError, "mask must be a tensor or one of A, B, vertical, horizontal, got int"),
        ({"mask": torch.ones(2, 3)}, ValueError, r"mask must have shape \(3, 3\) or \(3, 6, 3, 3\), got \(2, 3\)"),
        ({"mask": "A", "color_groups": 2}, ValueError, "color_groups must divide in_channels 6 and out_channels 3"),
        ({"mask": "A", "color_groups": 0}, ValueError, "color_groups must divide in_channels 6 and out_channels 3"),
        ({"mask": "A", "color_groups": 3, "in_channels": 4}, ValueError, "color_groups must divide in_channels 4"),
        ({"mask": "vertical", "color_groups": 3}, ValueError, 'color_groups needs mask "A" or "B", got 3 with \'ver'),
        ({"mask": torch.ones(3, 3), "color_groups": 3}, ValueError, "color_groups needs mask"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        MaskedConv2d(**{"in_channels": 6, "out_channels": 3, "kernel_size": 3, **arguments})
