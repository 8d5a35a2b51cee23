"""The MobileNetV2 encoder: published sizes and computation, shapes, norms, and how it starts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cpc_ext.models import MobileNetV2Encoder


@pytest.mark.parametrize(
    ("width", "side", "parameters", "multiplications"),
    # In millions, with the classifier of 1000 classes: the paper's table 4, and the table its authors keep at
    # github.com/tensorflow/models (slim/nets/mobilenet).
    [(1.0, 224, 3.5, 300), (1.4, 224, 6.1, 582), (0.5, 224, 1.97, 97), (0.35, 224, 1.68, 59)],
)
def test_published_sizes(width, side, parameters, multiplications):
    with torch.device("meta"):
        encoder = MobileNetV2Encoder(width=width)
        with FlopCounterMode(display=False) as counter:
            encodings = encoder(torch.empty(1, 1, 1, 3, side, side))
    assert encodings.shape == (1, encoder.out_channels, 1, 1)
    classifier = 1000 * encoder.out_channels
    count = sum(parameter.numel() for parameter in encoder.parameters()) + classifier + 1000
    assert count / 1e6 == pytest.approx(parameters, rel=0.01)
    assert (counter.get_total_flops() / 2 + classifier) / 1e6 == pytest.approx(multiplications, rel=0.035)


@pytest.mark.parametrize(("strides", "side", "map_side"), [("imagenet", 64, 2), ("cifar", 64, 8), ("cifar", 10, 2)])
def test_strides(strides, side, map_side):
    with torch.device("meta"):
        encoder = MobileNetV2Encoder(strides=strides)
        assert encoder.feature_maps(torch.empty(2, 3, side, side)).shape == (2, 1280, map_side, map_side)


@pytest.mark.parametrize("norm", ["none", "batch", "layer", "instance"])
def test_norms(norm):
    torch.manual_seed(0)
    encoder = MobileNetV2Encoder(1, width=0.2, norm=norm, strides="cifar")
    encodings = encoder(torch.randn(1, 2, 2, 1, 16, 16))
    encodings.sum().backward()
    assert encodings.shape == (1, 1280, 2, 2)
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert (encoder.conv1.bias is not None) == (norm == "none")
    assert 0.01 < encodings.std() < 10


def test_only_blocks_of_one_shape_add_their_input():
    added = [block.adds_input for stack in MobileNetV2Encoder(strides="cifar").layers for block in stack]
    # First blocks of stacks change the channels, and all others do not.
    assert added == [False] + [False, True] + [False, True, True] + [False, *[True] * 3] + [False, True, True] * 2 + [
        False
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width must be positive, got 0"),
        ({"width": float("nan")}, "width must be positive, got nan"),
        ({"strides": "mnist"}, "strides must be one of imagenet, cifar, got 'mnist'"),
        ({"norm": "group"}, "norm must be one of none, batch, layer, instance, got 'group'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MobileNetV2Encoder(**settings)
