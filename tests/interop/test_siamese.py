"""Encoders of lightly, solo-learn and sthalles against plain PyTorch functions, and refused checkpoints."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.interop import CheckpointError, export_reference, load_reference, read_reference
from cpc_ext.interop.torchvision_resnets import resnet_name
from cpc_ext.models import CPC, ResidualContext, ResNetV2Encoder, SimCLR, TimmEncoder
from cpc_ext.nn import TargetInfoNCE
from tests.interop.conftest import TimmNetwork


def residual_network(blocks, bottleneck, stem, channels=3):
    """Return a state dict with torchvision's names, and norms that are not the identity."""
    state = {"conv1.weight": torch.randn(64, channels, stem, stem)}
    norms = {"bn1": 64}
    wide = 64
    for stack, count in enumerate(blocks):
        inside = 64 << stack
        out = inside * (4 if bottleneck else 1)
        sizes = [(inside, 1), (inside, 3), (out, 1)] if bottleneck else [(inside, 3), (out, 3)]
        for block in range(count):
            name, before = f"layer{stack + 1}.{block}.", wide
            for number, (width, kernel) in enumerate(sizes, start=1):
                state[f"{name}conv{number}.weight"] = torch.randn(width, before, kernel, kernel) / before**0.5 / kernel
                norms[f"{name}bn{number}"] = width
                before = width
            if block == 0 and (stack or wide != out):
                state[f"{name}downsample.0.weight"] = torch.randn(out, wide, 1, 1) / wide**0.5
                norms[f"{name}downsample.1"] = out
            wide = out
    for name, width in norms.items():
        state |= {f"{name}.weight": torch.rand(width) + 0.5, f"{name}.bias": torch.randn(width)}
        state |= {f"{name}.running_mean": torch.randn(width), f"{name}.running_var": torch.rand(width) + 0.5}
        state[f"{name}.num_batches_tracked"] = torch.tensor(3)
    return state


def features_of(state, images, *, padding, relu=True, pool=False, stride=1):
    """Compute features [B, D] of images by a ResNet v1 (He et al. 2015) with such a state dict, in plain functions."""

    def normed(x, name):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])

    x = normed(F.conv2d(images, state["conv1.weight"], padding=padding, stride=stride), "bn1")
    x = x.relu() if relu else x
    x = F.max_pool2d(x, 3, 2, 1) if pool else x
    for name in dict.fromkeys(".".join(name.split(".")[:2]) for name in state if name.startswith("layer")):
        count = 3 if f"{name}.conv3.weight" in state else 2
        step = 2 if name.endswith(".0") and not name.startswith("layer1") else 1
        y = x
        for number in range(1, count + 1):
            weight = state[f"{name}.conv{number}.weight"]
            strided = step if number == count - 1 else 1
            y = normed(F.conv2d(y, weight, padding=weight.shape[2] // 2, stride=strided), f"{name}.bn{number}")
            y = y.relu() if number < count else y
        if f"{name}.downsample.0.weight" in state:
            x = normed(F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=step), f"{name}.downsample.1")
        x = (x + y).relu()
    return x.mean((2, 3))


def numbered(state, first, shortcut="downsample"):
    """Rename torchvision's layers to their positions in a sequence, with the first stack at ``first``."""
    places = {"conv1": "0", "bn1": "1", **{f"layer{stack + 1}": str(first + stack) for stack in range(4)}}
    return {
        ".".join([places[name.split(".")[0]], *name.split(".")[1:]]).replace("downsample", shortcut): value
        for name, value in state.items()
    }


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


LAYOUTS = {
    "lightly": ("lightly", lambda state: prefixed(numbered(state, 4), "backbone."), 7, {"padding": 3}),
    "lightly's names": ("lightly", lambda state: prefixed(state, "model.backbone."), 3, {"padding": 1}),
    "lightly's generator": (
        "lightly",
        lambda state: prefixed(numbered(state, 2, "shortcut"), "backbone."),
        3,
        {"padding": 1, "relu": False},
    ),
    "solo-learn": ("solo-learn", lambda state: prefixed(state, "backbone."), 7, {"padding": 3}),
    "solo-learn of small images": ("solo-learn", lambda state: prefixed(state, "encoder."), 3, {"padding": 2}),
    "sthalles": ("sthalles-simclr", lambda state: prefixed(state, "module.backbone."), 7, {"padding": 3}),
    "sthalles's numbers": (
        "sthalles-simclr",
        lambda state: prefixed(numbered(state, 4), "features."),
        7,
        {"padding": 3},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("blocks", "bottleneck"), [((2, 2, 2, 2), False), ((3, 4, 6, 3), True)])
def test_features(layout, blocks, bottleneck):
    pytest.importorskip("timm", exc_type=ImportError)
    source, named, stem, options = LAYOUTS[layout]
    state = residual_network(blocks, bottleneck, stem)
    encoder = load_reference({"state_dict": named(state), "epoch": 3}, source)
    images = torch.randn(2, 3, 24, 24)
    expected = features_of(state, images, pool=stem == 7, stride=2 if stem == 7 else 1, **options)
    with torch.no_grad():
        found = encoder(images[:, None, None]).flatten(1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


# ---- With a stand-in for timm, which is not installed everywhere ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_beside_the_encoder_is_kept(timm, layout):
    source, named, stem, _ = LAYOUTS[layout]
    network = TimmNetwork(3)
    if stem == 3:
        network.conv1 = torch.nn.Conv2d(3, 4, 3, bias=False)
    state = named(network.state_dict()) | {"projection_head.0.weight": torch.ones(2, 4)}
    if source == "sthalles-simclr" and layout == "sthalles":
        state["module.backbone.fc.2.bias"] = torch.ones(5)
    reference = read_reference(state, source)
    assert reference.configuration["encoder"]["arguments"].get("stem") == (
        None
        if stem == 7
        else {1: "cifar", 2: "solo-learn"}[LAYOUTS[layout][3]["padding"]]
        if LAYOUTS[layout][3].get("relu", True)
        else "lightly"
    )
    again = export_reference(reference.model, source, form=reference.form)
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    assert again.keys() == plain.keys()
    assert all(torch.equal(value, plain[name]) for name, value in again.items())


def test_models_of_ours(timm):
    model = SimCLR(TimmEncoder("resnet18"), projection_channels=2)
    assert "backbone.4.0.conv1.weight" in export_reference(model, "lightly")
    assert "backbone.layer1.0.conv1.weight" in export_reference(model, "solo-learn")
    with pytest.raises(CheckpointError, match=r"sthalles-simclr has no model like a ResNetV2Encoder: .*timm:resnet18"):
        export_reference(ResNetV2Encoder(blocks=(1,), channels=(4,)), "sthalles-simclr")
    with pytest.raises(CheckpointError, match="sthalles-simclr has no stem like solo-learn's"):
        export_reference(TimmEncoder("resnet18", stem="solo-learn"), "sthalles-simclr")


def test_networks_that_only_look_like_the_programs(timm):
    """What has no weights, as activations and pooling, is not in a checkpoint, and the program has its own."""
    encoder = TimmEncoder("resnet18")
    encoder.backbone.bn1 = torch.nn.SyncBatchNorm(4)
    encoder.backbone.dropout = torch.nn.Dropout(0.1)
    assert "backbone.bn1.running_mean" in export_reference(encoder, "solo-learn")
    encoder.backbone.act1 = torch.nn.GELU()
    context = ResidualContext(4, 4, 1, padding="lightning-bolts")
    bolts = CPC(encoder, context, TargetInfoNCE(4, target_channels=3))
    for model, source in ((encoder, "solo-learn"), (encoder, "lightly"), (bolts, "lightning-bolts")):
        with pytest.raises(CheckpointError, match=r"has GELU.* as act1, where a resnet18 has ReLU"):
            export_reference(model, source)
    with pytest.raises(CheckpointError, match="sthalles-simclr has no stem like cifar's"):
        export_reference(TimmEncoder("resnet18", stem="cifar"), "sthalles-simclr")
    bolts.encoder = TimmEncoder("resnet18", stem="cifar")
    with pytest.raises(CheckpointError, match="lightning-bolts has no stem like cifar's"):
        export_reference(bolts, "lightning-bolts")
    del encoder.backbone.layer4
    bolts.encoder = encoder
    with pytest.raises(CheckpointError, match=r"this one has stacks of \(2, 2, 2\) blocks"):
        export_reference(bolts, "lightning-bolts")


@pytest.mark.parametrize(
    ("name", "width", "groups"),
    [
        ("resnet50", 64, 1),
        ("resnet101", 64, 1),
        ("wide_resnet50_2", 128, 1),
        ("resnext50_32x4d", 128, 32),
        ("resnext101_32x8d", 256, 32),
        ("resnext101_64x4d", 256, 64),
    ],
)
def test_names_of_torchvisions_bottlenecks(name, width, groups):
    blocks = (3, 4, 23 if "101" in name else 6, 3)
    names = [f"layer{stack}.{block}.conv3.weight" for stack, count in enumerate(blocks, 1) for block in range(count)]
    state = dict.fromkeys(names, torch.empty(1, 1, 1, 1, device="meta"))
    state["conv1.weight"] = torch.empty(64, 3, 7, 7, device="meta")
    state["layer1.0.conv2.weight"] = torch.empty(width, width // groups, 3, 3, device="meta")
    assert resnet_name(state) == name


def test_other_backbones_are_refused(timm):
    transformer = {"backbone.cls_token": torch.ones(1, 1, 4), "backbone.blocks.0.norm1.weight": torch.ones(4)}
    with pytest.raises(CheckpointError, match=r"2 of its names do not fit \(backbone.cls_token, "):
        load_reference(transformer, "solo-learn")
    state = prefixed(TimmNetwork(3).state_dict(), "backbone.")
    short = {name: value for name, value in state.items() if not name.startswith("backbone.layer4")}
    with pytest.raises(
        CheckpointError, match=r"only torchvision's ResNets are known, this one has stacks of \(2, 2, 2"
    ):
        load_reference(short, "lightly")
    with pytest.raises(CheckpointError, match="It looks like lightly"):
        load_reference(prefixed(numbered(TimmNetwork(3).state_dict(), 4), "model.backbone."), "cpcv2-pytorch")
    with pytest.raises(ValueError, match="norm: checkpoints of lightly have no use for it"):
        load_reference(state, "lightly", norm="layer")
