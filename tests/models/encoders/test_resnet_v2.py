"""The ResNet v2 encoder: shapes of all variants, its two kinds of input, and its memory format."""

import pytest
import torch

from cpc_ext.models import ResNetV2Encoder
from cpc_ext.ops import extract_patches

SMALL = {"blocks": (1, 2), "channels": (4, 8), "stem_channels": 4}

# Stacks and convolutions: the depth counts the stem, the blocks' convolutions and a classifier.
DEPTHS = [(8, 256), (14, 256), (28, 256), (18, 512), (34, 512)]
BOTTLENECK_DEPTHS = [(41, 1024), (92, 1024), (143, 1024), (161, 4096), (50, 2048), (101, 2048), (152, 2048)]


@pytest.mark.parametrize(("depth", "channels"), DEPTHS + BOTTLENECK_DEPTHS)
def test_depths(depth, channels):
    with torch.device("meta"):
        encoder = ResNetV2Encoder(depth)
        encodings = encoder(torch.empty(2, 3, 4, 3, 16, 16))
    assert encoder.out_channels == channels
    assert encodings.shape == (2, channels, 3, 4)
    convolutions = [n for n, m in encoder.named_modules() if isinstance(m, torch.nn.Conv2d) and "shortcut" not in n]
    assert len(convolutions) + 1 == depth


def test_resnet_161_is_that_of_cpc_v2():
    with torch.device("meta"):
        encoder = ResNetV2Encoder(161, norm="batch", stem="imagenet")
        features = encoder.feature_maps(torch.empty(1, 3, 80, 80))
    assert features.shape == (1, 4096, 5, 5)
    third = encoder.layers[2]
    assert len(third) == 46
    assert third[0].conv2.weight.shape == (512, 512, 3, 3)
    # The paper counts 305 million.
    assert sum(parameter.numel() for parameter in encoder.parameters()) == pytest.approx(305e6, rel=0.01)


@pytest.mark.parametrize("norm", ["none", "batch", "layer", "instance"])
@pytest.mark.parametrize("stem", ["stl10", "cifar", "imagenet", "strided"])
@pytest.mark.parametrize("bottleneck", [False, True])
def test_norms_and_stems(norm, stem, bottleneck):
    encoder = ResNetV2Encoder(in_channels=1, norm=norm, stem=stem, bottleneck=bottleneck, **SMALL)
    # Instance norm does not take maps of one pixel, which this stem makes of 8.
    side = 32 if (norm, stem) == ("instance", "imagenet") else 8
    encodings = encoder(torch.randn(2, 2, 2, 1, side, side))
    encodings.sum().backward()
    assert encodings.shape == (2, 32 if bottleneck else 8, 2, 2)
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    assert (encoder.conv1.bias is not None) == (norm == "none")


def test_images_are_cut_into_patches():
    encoder = ResNetV2Encoder(patch_size=8, stride=6, **SMALL)
    images = torch.randint(256, (2, 3, 20, 26), dtype=torch.uint8)
    encodings = encoder(images)
    assert encodings.shape == (2, 8, 3, 4)
    torch.testing.assert_close(encodings, encoder(extract_patches(images, 8, 6)))
    torch.testing.assert_close(encoder.features(images), encodings)
    assert encoder.double()(images).dtype == torch.float64
    assert ResNetV2Encoder(patch_size=8, **SMALL)(images).shape == (2, 8, 4, 5)


def test_patches_are_independent():
    encoder = ResNetV2Encoder(norm="layer", **SMALL)
    patches = torch.randn(2, 2, 3, 3, 8, 8)
    one = encoder(patches[1:, 1:, 2:])
    torch.testing.assert_close(encoder(patches)[1, :, 1, 2], one[0, :, 0, 0], atol=1e-5, rtol=1e-5)


def test_channels_last_stays():
    encoder = ResNetV2Encoder(**SMALL)
    formats = []
    encoder.layers[0][0].register_forward_hook(lambda module, inputs, output: formats.append(output))
    patches = torch.randn(1, 2, 2, 8, 8, 3).permute(0, 1, 2, 5, 3, 4)
    expected = encoder(patches.contiguous())
    torch.testing.assert_close(encoder(patches), expected, atol=1e-5, rtol=1e-5)
    assert formats[1].is_contiguous(memory_format=torch.channels_last)


def test_empty_batch():
    assert ResNetV2Encoder(**SMALL)(torch.zeros(0, 2, 3, 3, 8, 8)).shape == (0, 8, 2, 3)


def test_deep_encoders_start_bounded_without_a_norm():
    torch.manual_seed(0)
    encoder = ResNetV2Encoder(blocks=(40,), channels=(8,), stem_channels=8)
    with torch.no_grad():
        encodings = encoder(torch.randn(1, 2, 2, 3, 8, 8))
    assert 0.01 < encodings.std() < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give either depth or blocks, got depth=None and blocks=None"),
        ({"depth": 14, "blocks": (1,)}, "give either depth or blocks"),
        ({"depth": 15}, "depth must be one of 8, 14, .*, got 15"),
        ({"depth": 14, "bottleneck": True}, "bottleneck goes with blocks"),
        ({"depth": 14, "norm": "group"}, "norm must be one of none, batch, layer, instance, got 'group'"),
        ({"depth": 14, "stem": "mnist"}, "stem must be one of stl10, cifar, imagenet, strided, got 'mnist'"),
        ({"depth": 14, "channels": (8, 16)}, "channels must hold one number for each of 3 stacks"),
        ({"depth": 14, "channels": (8, 16, 0)}, "channels must be at least 1, got 0"),
        ({"depth": 41, "expansions": (4, 4)}, "expansions must hold one number for each of 3 stacks"),
        ({"depth": 41, "expansions": (4, 4, 0)}, "expansions must be at least 1, got 0"),
        ({"depth": 14, "expansions": (4, 4, 4)}, "expansions are of bottlenecks"),
        ({"depth": 14, "in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"blocks": ()}, "blocks must hold at least one stack"),
        ({"blocks": (1,) * 5}, "channels must be given for more than 4 stacks, got 5 stacks"),
        ({"depth": 14, "stride": 4}, "stride needs patch_size, got stride=4 alone"),
    ],
)
def test_wrong_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResNetV2Encoder(**arguments)


def test_wrong_inputs():
    encoder = ResNetV2Encoder(**SMALL)
    with pytest.raises(ValueError, match="images need an encoder with patch_size"):
        encoder(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"with C = 3, got shape \(1, 2, 2, 1, 8, 8\)"):
        encoder(torch.zeros(1, 2, 2, 1, 8, 8))
    with pytest.raises(TypeError, match=r"must be floating patches, got torch\.uint8"):
        encoder(torch.zeros(1, 2, 2, 3, 8, 8, dtype=torch.uint8))
