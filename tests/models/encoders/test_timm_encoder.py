"""Backbones of timm as encoders: real ones if timm is installed, and the error if it is not."""

import sys

import pytest
import torch

from cpc_ext.models import TimmEncoder
from cpc_ext.tasks.encoder_names import encoder_spec


@pytest.fixture
def timm():
    return pytest.importorskip("timm", exc_type=ImportError)


@pytest.mark.parametrize(
    ("name", "channels", "settings"),
    [("resnet18", 512, {}), ("mobilenetv3_small_050", 1024, {}), ("vit_tiny_patch16_224", 192, {"img_size": 32})],
)
def test_backbones(timm, name, channels, settings):
    encoder = TimmEncoder(name, 1, **settings)
    encodings = encoder(torch.randn(2, 1, 2, 1, 32, 32))
    encodings.square().sum().backward()
    assert encoder.out_channels == channels
    assert encodings.shape == (2, channels, 1, 2)
    assert any(parameter.grad is not None for parameter in encoder.parameters())


def test_images_are_cut_into_patches(timm):
    encoder = TimmEncoder("resnet18", 1, patch_size=16).eval()
    images = torch.randint(256, (1, 1, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(encoder(images), encoder(encoder.patchify(images)))


def test_wrong_settings(timm):
    with pytest.raises(ValueError, match="timm makes no backbone 'vgg0' with these settings: Unknown model"):
        TimmEncoder("vgg0")
    with pytest.raises(ValueError, match="the backbone takes no patches of 16x16 pixels"):
        TimmEncoder("vit_tiny_patch16_224")(torch.zeros(1, 1, 1, 3, 16, 16))


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'cpc_ext\[timm\]'"):
        TimmEncoder("resnet18")


def test_stems_for_small_images(timm):
    """Sides behind the first layers, and what no ReLU lets through."""
    images = torch.randn(2, 1, 1, 3, 16, 16)
    for stem, side in (("cifar", 16), ("solo-learn", 18), ("lightly", 16)):
        encoder = TimmEncoder("resnet18", stem=stem).eval()
        seen = []
        encoder.backbone.layer1.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
        assert encoder(images).shape == (2, 512, 1, 1)
        assert seen[0].shape == (2, 64, side, side)
        assert bool((seen[0] < 0).any()) == (stem == "lightly")
        # As wide as timm's own layer, so that features begin alike.
        deviation = encoder.backbone.conv1.weight.std().item()
        assert deviation == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.1)
    with pytest.raises(ValueError, match="stem must be one of cifar, solo-learn, lightly, got 'stl10'"):
        TimmEncoder("resnet18", stem="stl10")
    with pytest.raises(ValueError, match=r"stem is for ResNets .*, 'convnext_atto' does not"):
        TimmEncoder("convnext_atto", stem="cifar")


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"]
)
def test_backbones_of_one_size_get_that_of_the_patches(timm, name):
    """A size that is neither timm's nor a multiple of the tokens' own patches."""
    spec = encoder_spec(f"timm:{name}", norm="none", in_channels=3, stem="stl10", patch_size=48)
    assert spec.arguments["img_size"] == 48
    encoder = spec.build(48)
    assert encoder(torch.randn(1, 1, 2, 3, 48, 48)).shape == (1, encoder.out_channels, 1, 2)


def test_pooling(timm):
    patches = torch.randn(2, 1, 1, 3, 32, 32)
    encoder = encoder_spec("timm:resnet18:global_pool=max", norm="none", in_channels=3, stem="stl10").build(32).eval()
    maps = encoder.backbone.forward_features(patches[:, 0, 0])
    torch.testing.assert_close(encoder(patches)[..., 0, 0], maps.amax((2, 3)))
