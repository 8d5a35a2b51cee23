"""Names of encoders with their suffixes: the encoder that a name builds, and the name of a given encoder."""

from __future__ import annotations

import inspect

import pytest

from cpc_ext.models import LayerNormResNetEncoder, MobileNetV2Encoder, ResNetV2Encoder
from cpc_ext.models.encoders.resnet_v2 import published_shape
from cpc_ext.tasks.encoder_names import check_encoder_name, encoder_name, encoder_spec


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("resnet14", {"depth": 14, "stem": "stl10"}),
        ("resnet14:stem=cifar", {"depth": 14, "stem": "cifar"}),
        ("resnet:blocks=1-1,channels=4-8", {"blocks": [1, 1], "channels": [4, 8], "stem": "stl10"}),
        (
            "resnet:blocks=1-2,bottleneck=yes,channels=4-8,expansions=2-2,stem=imagenet,stem_channels=16",
            {"blocks": [1, 2], "bottleneck": True, "channels": [4, 8], "expansions": [2, 2], "stem": "imagenet"}
            | {"stem_channels": 16},
        ),
        ("resnet14:bottleneck=no", {"depth": 14, "stem": "stl10", "bottleneck": False}),
        ("mobilenetv2:width=0.25,strides=imagenet", {"width": 0.25, "strides": "imagenet"}),
        ("wrn-10-1", {"depth": 10, "width": 1}),
    ],
)
def test_names_build_what_they_say(name, arguments):
    spec = encoder_spec(check_encoder_name(name), norm="layer", in_channels=1, stem="stl10")
    assert spec.arguments == {**arguments, "norm": "layer", "in_channels": 1}
    assert spec.build(16).in_channels == 1


@pytest.mark.parametrize(
    ("kind", "arguments", "name"),
    [
        ("ResNetV2Encoder", {"blocks": [2, 2, 2], "channels": [64, 128, 256], "stem": "stl10"}, "resnet14:stem=stl10"),
        (
            "ResNetV2Encoder",
            {"blocks": [1, 1], "bottleneck": False, "channels": [4, 8], "stem": "cifar", "stem_channels": 64},
            "resnet:blocks=1-1,channels=4-8,stem=cifar",
        ),
        ("WideResNetEncoder", {"depth": 28, "width": 2}, "wrn-28-2"),
        ("MobileNetV2Encoder", {"width": 1.0, "strides": "cifar"}, "mobilenetv2:strides=cifar"),
        ("TimmEncoder", {"name": "resnet18"}, "timm:resnet18"),
    ],
)
def test_names_of_what_is_built(kind, arguments, name):
    assert encoder_name(kind, arguments) == check_encoder_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "ln-resnet101",
        "ln-resnet101:blocks=3-4-6-3",
        "ln-resnet101:blocks=1-1,channels=8-16,expansions=2-2,stem_channels=16",
        "mobilenetv2:width=0.5,strides=cifar",
        "resnet:blocks=1-1,bottleneck=yes,channels=8-16,expansions=2-2,stem=strided,stem_channels=16",
        "wrn-16-4",
    ],
)
def test_names_are_those_of_what_they_build(name):
    kind, arguments = encoder_spec(name, norm="batch", in_channels=3, stem="stl10", patch_size=16)
    assert encoder_name(kind.__name__, arguments) == name


def test_names_that_stand_for_others():
    short = encoder_spec("ln-resnet50", norm="batch", in_channels=3, stem="stl10", patch_size=16)
    assert short.arguments == {"patch_size": 16, "in_channels": 3, "blocks": [3, 4, 6, 3]}
    assert encoder_name(short.kind.__name__, short.arguments) == "ln-resnet101:blocks=3-4-6-3"
    # Defaults can be left out of a name.
    known = ("blocks", "channels", "expansions", "stem_channels")
    parameters = inspect.signature(LayerNormResNetEncoder).parameters
    assert encoder_name(short.kind.__name__, {name: parameters[name].default for name in known}) == "ln-resnet101"
    with pytest.raises(KeyError):
        encoder_name("PatchEncoder", {})
    for stem, strides in (("imagenet", "imagenet"), ("stl10", "cifar"), ("cifar", "cifar")):
        spec = encoder_spec("mobilenetv2", norm="none", in_channels=3, stem=stem)
        assert spec.arguments["strides"] == strides


@pytest.mark.parametrize("depth", [14, 28, 41, 92, 143, 161, 18, 34, 50, 101, 152])
def test_published_shapes_have_their_own_names(depth):
    shape = published_shape(depth)
    assert encoder_name("ResNetV2Encoder", {**shape, "stem": "cifar"}) == f"resnet{depth}:stem=cifar"
    other = {**shape, "blocks": [*shape["blocks"][:-1], 7]}
    assert encoder_name("ResNetV2Encoder", {**other, "stem": "cifar"}).startswith("resnet:blocks=")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet", "expected one of"),
        ("resnet:stem=cifar", "expected one of"),
        ("resnet14:depth=8", "expected blocks, .*, got 'depth=8'"),
        ("resnet14:stem", "stem is stl10 or cifar or imagenet or strided, got ''"),
        ("resnet:blocks=1-0", "blocks is a positive number, got '0'"),
        ("resnet:blocks=1,bottleneck=maybe", "bottleneck is yes or no, got 'maybe'"),
        ("resnet14:bottleneck=NO", "bottleneck is yes or no, got 'NO'"),
        ("resnet14:blocks=1234567", "blocks is a positive number, got '1234567'"),
        ("resnet14:blocks=01", "blocks is a positive number, got '01'"),
        (
            "timm:vit:patch_size=4,foo=3",
            "^--encoder: expected img_size, patch_size, stem, global_pool after vit:, got 'foo=3'$",
        ),
        ("timm:vit:patch_sze=4", "^--encoder: expected img_size, .* after vit:, got 'patch_sze=4'$"),
        ("wrn-28-2:width=3", "expected nothing after wrn-28-2, got 'width=3'"),
        ("mobilenetv2:width=0", "width is a positive number, got '0'"),
    ],
)
def test_wrong_names_say_what_is_allowed(name, message):
    with pytest.raises(ValueError, match=message):
        check_encoder_name(name)


def test_arguments_reach_the_encoder():
    spec = encoder_spec("resnet:blocks=1,channels=8,stem=cifar", norm="none", in_channels=3, stem="imagenet")
    encoder = spec.build(16)
    assert isinstance(encoder, ResNetV2Encoder)
    assert (encoder.conv1.kernel_size, encoder.out_channels) == ((3, 3), 8)
    narrow = encoder_spec("mobilenetv2:width=0.25", norm="none", in_channels=3, stem="stl10").build(16)
    assert isinstance(narrow, MobileNetV2Encoder)
    assert narrow.conv1.out_channels == 8
