"""Encoders as backbones of whole images: feature maps, their descriptions, and their use by other libraries."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict

import pytest
import torch

from cpc_ext.models import (
    ImageBackbone,
    LayerNormResNetEncoder,
    MobileNetV2Encoder,
    ResNetV2Encoder,
    TimmEncoder,
    WideResNetEncoder,
)
from tests.interop.conftest import TIMM

ENCODERS = {
    "resnet": (lambda: ResNetV2Encoder(blocks=(1, 2, 1), channels=(4, 8, 12), norm="batch", stem="imagenet"), 4),
    "small": (lambda: ResNetV2Encoder(blocks=(1, 1), channels=(8, 16), stem="cifar"), 1),
    "wide": (lambda: WideResNetEncoder(10, 1, norm="layer"), 1),
    "mobilenet": (lambda: MobileNetV2Encoder(width=0.25, norm="batch"), 2),
}


@pytest.fixture(params=ENCODERS)
def made(request):
    torch.manual_seed(0)
    build, first = ENCODERS[request.param]
    return build().eval(), first


def test_maps_and_what_is_told_of_them(made):
    encoder, first = made
    backbone = ImageBackbone(encoder)
    images = torch.randn(2, 3, 64, 96)
    maps = backbone(images)
    assert len(maps) == len(encoder.layers)
    assert [each.shape[1] for each in maps] == backbone.feature_info.channels()
    assert [tuple(each.shape[2:]) for each in maps] == [
        (64 // reduction, 96 // reduction) for reduction in backbone.feature_info.reduction()
    ]
    assert backbone.feature_info.reduction()[0] == first
    assert backbone.feature_info.module_name() == [f"layer{number + 1}" for number in range(len(maps))]
    assert torch.equal(backbone.forward_features(images), maps[-1])
    # The encoder averages what is the last map.
    features = backbone.forward_head(maps[-1])
    torch.testing.assert_close(features, maps[-1].mean((2, 3)))
    square = images[..., :64]
    torch.testing.assert_close(backbone(square)[-1].mean((2, 3)), encoder(square[:, None, None])[..., 0, 0])
    assert features.shape == (2, backbone.num_features)


def test_weights_are_the_encoders(made):
    encoder, _ = made
    backbone = ImageBackbone(encoder)
    assert {id(parameter) for parameter in backbone.parameters()} == {
        id(parameter) for parameter in encoder.parameters()
    }
    assert not backbone.training
    assert ImageBackbone(encoder.train()).training
    images = torch.randn(2, 3, 32, 32)
    other = copy.deepcopy(backbone).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other(images)[-1].any()
    assert backbone(images)[-1].any()


def test_chosen_maps():
    encoder = ENCODERS["resnet"][0]().eval()
    images = torch.randn(1, 3, 64, 64)
    every = ImageBackbone(encoder)(images)
    chosen = ImageBackbone(encoder, out_indices=(-1, 0))
    assert chosen.feature_info.reduction() == [4, 16]
    for mine, expected in zip(chosen(images), (every[0], every[2]), strict=True):
        assert torch.equal(mine, expected)


def test_torchvisions_pyramid():
    torchvision = pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    encoder = ENCODERS["resnet"][0]().eval()
    backbone = ImageBackbone(encoder)
    names = {name: str(index) for index, name in enumerate(backbone.feature_info.module_name())}
    images = torch.randn(1, 3, 64, 64)
    taken = torchvision.models._utils.IntermediateLayerGetter(backbone, names)(images)
    assert all(torch.equal(mine, expected) for mine, expected in zip(taken.values(), backbone(images), strict=True))
    pyramid = torchvision.ops.FeaturePyramidNetwork(backbone.feature_info.channels(), 5)
    assert [tuple(each.shape) for each in pyramid(OrderedDict(taken)).values()] == [
        (1, 5, 64 // reduction, 64 // reduction) for reduction in (4, 8, 16)
    ]


def test_wrong_arguments(timm_stand_in):
    with pytest.raises(TypeError, match="encoder must be one of stacks of blocks, got TimmEncoder"):
        ImageBackbone(timm_stand_in)
    with pytest.raises(ValueError, match=r"out_indices must be of the 2 stacks, got \[2\]"):
        ImageBackbone(ENCODERS["small"][0](), (2,))
    fixed = LayerNormResNetEncoder(16, blocks=(1,), channels=(8,), expansions=(1,), stem_channels=8)
    with pytest.raises(ValueError, match=r"LayerNormResNetEncoder takes no whole images: .* patches of 16 pixels"):
        ImageBackbone(fixed)
    assert all(module.training for module in fixed.modules())


@pytest.fixture
def timm_stand_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", TIMM)
    return TimmEncoder("resnet18")
