"""Options that the chosen encoder, model or data set would ignore are errors; and input sizes of timm's backbones."""

from __future__ import annotations

import importlib.abc
import sys
import types

import pytest
import torch
from PIL import Image
from torch import nn

from cpc_ext.models import TimmEncoder
from cpc_ext.programs.train_options import describe, parse
from cpc_ext.tasks.encoder_names import check_encoder_name, encoder_name, encoder_spec

TIMM_NORM = "--norm would have no effect: --encoder timm:resnet18 has a normalisation of its own"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--encoder", "timm:resnet18", "--norm", "layer"), TIMM_NORM),
        (("--model", "simclr", "--encoder", "timm:resnet18", "--norm=batch"), TIMM_NORM),
        (("--encoder", "ln-resnet50", "--norm", "none"), "--encoder ln-resnet50 has a normalisation of its own"),
        (
            ("--model", "simclr", "--encoder", "ln-resnet50", "--center-scale", "1.5"),
            "--center-scale would have no effect: --encoder ln-resnet50 takes images of one size",
        ),
        (("--data-dir", "there"), "--data-dir would have no effect: --dataset textures is drawn"),
        (("--download",), "--download would have no effect: --dataset textures is drawn"),
        (("--dataset", "folder", "--data-dir", "x", "--download"), "--dataset folder is of your own files"),
        (("--no-evaluate", "--probe-images", "9"), "--no-evaluate measures nothing at the end"),
        (("--schedule", "constant", "--final-lr", "0.1"), "--schedule constant keeps the learning rate"),
        (("--model", "pixelcnn", "--no-channels-last"), "--model pixelcnn lays its features out by itself"),
        (("--model", "greedy-infomax", "--split-at", "1", "--modules", "2"), "--split-at tells how many"),
        (("--model", "greedy-infomax", "--cache-views", "2"), "it needs --cache-outputs"),
        (
            ("--model", "cpc-audio", "--windows", "same-sequence", "--no-cross-borders"),
            "--windows same-sequence takes windows inside of recordings",
        ),
        (("--time-budget", "1", "--checkpoint-every", "9"), "--time-budget chooses it"),
        (("--model", "greedy-infomax", "--context-layers", "2"), "only a single module has a context network"),
        *(
            (("--model", "greedy-infomax", "--objective", "supervised", *given), "--objective supervised predicts no")
            for given in (
                ("--pred-steps", "30"),
                ("--pred-directions", "4"),
                ("--skip", "2"),
                ("--neg-samples", "7"),
                ("--gather-negatives", "none"),
                ("--context-layers", "2"),
            )
        ),
        (("--model", "greedy-infomax", "--pipeline", "--gather_negatives", "none"), "has the whole batch"),
    ],
)
def test_options_without_effect_are_refused(capsys, options, message):
    with pytest.raises(SystemExit) as caught:
        parse(["--device", "cpu", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ("--encoder", "timm:resnet18"),
        ("--schedule", "constant"),
        ("--final-lr", "0.1"),
        ("--model", "pixelcnn"),
        ("--model", "greedy-infomax", "--modules", "1", "--context-layers", "2"),
        ("--model", "greedy-infomax", "--split-at", "1"),
        # There is no prediction that the grid would be too small for.
        ("--model", "greedy-infomax", "--objective", "supervised", "--crop", "24", "--grid-size", "2"),
        ("--dataset", "stl10", "--data-dir", "there", "--download"),
    ],
)
def test_what_a_run_shows_of_itself_can_be_given(options):
    run = parse(["--device", "cpu", *options]).run
    shown = " ".join(line.split(None, 1)[1] for line in describe(run).splitlines() if len(line.split(None, 1)) > 1)
    assert parse(shown.split()).run == run or "timm" in shown  # Whose norm is nobody's.
    assert parse(shown.split()).run.idle().keys() == run.idle().keys()


# ---- timm ----


class ViT(nn.Module):
    """Takes input of one size, as timm's vision transformers do."""

    num_features = 6

    def __init__(self, in_chans, img_size=224, patch_size=16):
        super().__init__()
        self.img_size, self.patch_size = img_size, patch_size
        self.proj = nn.Conv2d(in_chans, 6, patch_size, patch_size)

    def forward(self, patches):
        assert patches.shape[-1] == self.img_size, f"Input height ({patches.shape[-1]}) doesn't match {self.img_size}."
        return self.proj(patches).mean((2, 3))


@pytest.fixture
def timm(monkeypatch):
    """A stand-in with one vision transformer."""

    def create_model(name, pretrained, in_chans, num_classes, **settings):
        if name != "vit_tiny_patch16_224":
            raise KeyError(name)
        return ViT(in_chans, **settings)

    library = types.ModuleType("timm")
    library.create_model = create_model
    library.get_pretrained_cfg_value = lambda name, key: key == "fixed_input_size"
    monkeypatch.setitem(sys.modules, "timm", library)


@pytest.mark.parametrize(
    ("name", "image", "token"),
    [
        ("timm:vit_tiny_patch16_224", 16, 16),
        ("timm:vit_tiny_patch16_224:patch_size=4", 16, 4),
        ("timm:vit_tiny_patch16_224:img_size=16,patch_size=8", 16, 8),
    ],
)
def test_a_vision_transformer_is_told_its_sizes(timm, name, image, token):
    spec = encoder_spec(check_encoder_name(name), norm="none", in_channels=1, stem="stl10", patch_size=16)
    encoder = spec.build(16)
    assert (encoder.backbone.img_size, encoder.backbone.patch_size) == (image, token)
    assert encoder(torch.zeros(1, 2, 2, 1, 16, 16)).shape == (1, 6, 2, 2)
    assert encoder.training
    # As encoder.safetensors and convert have it.
    assert TimmEncoder(**spec.arguments).backbone.patch_size == token
    again = encoder_spec(encoder_name("TimmEncoder", spec.arguments), norm="none", in_channels=1, stem="stl10")
    assert again.arguments == spec.arguments


def test_encoders_of_one_size_see_whole_images_as_they_see_views(timm, tmp_path):
    for name in ("a", "b"):
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    sees = {}
    for encoder in ("resnet-small", "timm:vit_tiny_patch16_224", "ln-resnet50"):
        small = ("--model", "simclr", "--dataset", "folder", "--data-dir", str(tmp_path), "--encoder", encoder)
        section = parse(["--device", "cpu", *small]).run.encoder_section
        sees[encoder] = section.view["center_scale"]
    assert sees == {"resnet-small": 1.6, "timm:vit_tiny_patch16_224": 1, "ln-resnet50": 1}


def test_sizes_that_do_not_fit(timm):
    spec = encoder_spec(
        "timm:vit_tiny_patch16_224:img_size=32", norm="none", in_channels=1, stem="stl10", patch_size=16
    )
    with pytest.raises(ValueError, match=r"does not take patches of 16 pixels: .*Input height \(16\) doesn't match 32"):
        spec.build(16)
    with pytest.raises(ValueError, match="timm makes no backbone 'vgg0' with these settings: 'vgg0'"):
        TimmEncoder("vgg0")
    none = encoder_spec("timm:vgg0", norm="none", in_channels=1, stem="stl10")
    with pytest.raises(ValueError, match=r"^--encoder: timm makes no backbone 'vgg0'"):
        none.build(16)
    with pytest.raises(ValueError, match="--encoder: patch_size is a positive number, got 'big'"):
        check_encoder_name("timm:vit_tiny_patch16_224:patch_size=big")
    with pytest.raises(ValueError, match="--encoder: global_pool is avg or max or avgmax or token or map, got 'none'"):
        check_encoder_name("timm:vit_tiny_patch16_224:global_pool=none")
    for name, arguments in (
        ("timm:resnet18:stem=cifar", {"stem": "cifar"}),
        ("timm:resnet18:stem=solo-learn,global_pool=max", {"stem": "solo-learn", "global_pool": "max"}),
    ):
        spec = encoder_spec(check_encoder_name(name), norm="none", in_channels=1, stem="stl10")
        assert spec.arguments == {"name": "resnet18", "in_channels": 1, **arguments}
        assert encoder_name("TimmEncoder", spec.arguments) == name
    # Colons are part of names, too.
    assert (
        encoder_spec("timm:hf-hub:timm/x", norm="none", in_channels=3, stem="stl10").arguments["name"]
        == "hf-hub:timm/x"
    )


@pytest.mark.parametrize("error", [RuntimeError("operator torchvision::nms does not exist"), OSError("libc10.so")])
def test_whatever_importing_timm_raises_is_told(monkeypatch, train, tmp_path, capsys, error):
    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == "timm":
                raise error

    monkeypatch.delitem(sys.modules, "timm", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert train("--out-dir", tmp_path / "run", "--encoder", "timm:resnet18") == 1
    message = capsys.readouterr().err
    assert "is installed but cannot be imported" in message
    assert f"{type(error).__name__}: {error}" in message
