"""The wide ResNet encoder: published sizes, shapes, its kinds of input, and how it starts."""

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.models import WideResNetEncoder
from cpc_ext.models.encoders.layers import NORMS
from cpc_ext.ops import extract_patches


@pytest.mark.parametrize(
    ("depth", "width", "parameters"),
    # Parameters of the networks in the paper's table 4 and of WRN-28-2, in millions, less the classifier of 10 classes.
    [(28, 2, 1.5), (40, 4, 8.9), (16, 8, 11.0), (22, 8, 17.2), (28, 10, 36.5), (28, 12, 52.5)],
)
def test_published_sizes(depth, width, parameters):
    with torch.device("meta"):
        encoder = WideResNetEncoder(depth, width, norm="batch")
        encodings = encoder(torch.empty(2, 3, 4, 3, 10, 10))
    assert encodings.shape == (2, 64 * width, 3, 4)
    classifier = 640 * width + 10
    count = sum(parameter.numel() for parameter in encoder.parameters()) + classifier
    assert round(count / 1e6, 1) == parameters
    assert len([m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]) == depth


@pytest.mark.parametrize("norm", ["none", "batch", "layer", "instance"])
def test_norms(norm):
    encoder = WideResNetEncoder(10, 1, 1, norm=norm)
    encodings = encoder(torch.randn(2, 2, 3, 1, 10, 10))
    encodings.sum().backward()
    assert encodings.shape == (2, 64, 2, 3)
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert (encoder.conv1.bias is not None) == (norm == "none")


def test_instance_norm_of_one_pixel_is_refused():
    """All that it could give is its biases, whatever the patch; larger maps are PyTorch's instance norm."""
    torch.manual_seed(0)
    layer = NORMS["instance"](3)
    torch.nn.init.normal_(layer.weight)
    maps = torch.randn(2, 3, 1, 2)
    torch.testing.assert_close(layer(maps), F.instance_norm(maps, weight=layer.weight, bias=layer.bias))
    for training in (True, False):
        with pytest.raises(ValueError, match=r"more than one pixel, got \[2, 3, 1, 1\]"):
            layer.train(training)(maps[..., :1])
    with pytest.raises(ValueError, match=r"norm='instance' needs maps of more than one pixel"):
        WideResNetEncoder(10, 1, 1, norm="instance")(torch.randn(2, 1, 1, 1, 4, 4))


def test_images_are_cut_into_patches():
    encoder = WideResNetEncoder(10, 1, patch_size=8, stride=6)
    images = torch.randint(256, (2, 3, 20, 26), dtype=torch.uint8)
    encodings = encoder.features(images)
    assert encodings.shape == (2, 64, 3, 4)
    torch.testing.assert_close(encodings, encoder(extract_patches(images, 8, 6)))
    assert encoder.double()(images).dtype == torch.float64
    assert encoder(images[:0]).shape == (0, 64, 3, 4)


def test_channels_last_stays():
    encoder = WideResNetEncoder(10, 1)
    formats = []
    encoder.layers[2].register_forward_hook(lambda module, inputs, output: formats.append(output))
    patches = torch.randn(1, 2, 2, 8, 8, 3).permute(0, 1, 2, 5, 3, 4)
    torch.testing.assert_close(encoder(patches), encoder(patches.contiguous()), atol=1e-5, rtol=1e-5)
    assert formats[0].is_contiguous(memory_format=torch.channels_last)


def test_deep_encoders_start_bounded_without_a_norm():
    torch.manual_seed(0)
    with torch.no_grad():
        encodings = WideResNetEncoder(100, 1, norm="none")(torch.randn(1, 2, 2, 3, 8, 8))
    assert 0.01 < encodings.std() < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((27, 2), "depth must be 4 plus a positive multiple of 6, such as 28, got 27"),
        ((4, 2), "depth must be 4 plus a positive multiple of 6, such as 28, got 4"),
        ((28, 0), "width must be at least 1, got 0"),
        ((28, 2, 0), "in_channels must be at least 1, got 0"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        WideResNetEncoder(*arguments)
    with pytest.raises(ValueError, match="norm must be one of none, batch, layer, instance, got 'group'"):
        WideResNetEncoder(10, 1, norm="group")
