"""Masks survive meta-device initialisation, emptied memory, copies and conversions, and reflect later changes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cpc_ext import models
from cpc_ext.models.pixels.masked_features import PixelActivation
from cpc_ext.nn import ChannelMix, GridInfoNCE, MaskedConv2d, ShiftedConv2d, ShiftedConvTranspose2d, TargetInfoNCE
from cpc_ext.nn.fixed_mask import FixedMask

PATTERN = torch.tensor([[True, False, True], [True, False, False]])


def features(channels, size=4):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def images(channels, size=8):
    return torch.randint(0, 256, (2, channels, size, size), generator=torch.Generator().manual_seed(1))


def encoder(**options):
    return models.ResNetV2Encoder(
        blocks=(1, 1), channels=(4, 6), stem_channels=4, in_channels=1, norm="layer", stem="cifar", **options
    )


def patches():
    return torch.rand(2, 4, 4, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def cpc():
    return models.CPC(encoder(), models.GatedPixelCNNContext(6, 2), pred_steps=2, neg_samples="all")


def greedy():
    return models.GreedyInfoMax(
        encoder(), 2, context=models.GatedPixelCNNContext(6, 3), pred_steps=2, neg_samples="all"
    )


def grids():
    return features(3).view(1, 2, 3, 4, 4), features(3).flip(0).view(1, 2, 3, 4, 4)


# Functions that make a module, and that compute its output.
CASES = {
    **{
        f"conv-{name}": (
            lambda name=name: MaskedConv2d(4, 8, 3, name, activation="gated"),
            lambda m: m(features(4)),
        )
        for name in ("A", "B", "vertical", "horizontal")
    },
    "conv-colours": (lambda: MaskedConv2d(6, 12, 3, "A", color_groups=3, activation="gated"), lambda m: m(features(6))),
    "conv-custom": (lambda: MaskedConv2d(4, 8, (2, 3), PATTERN), lambda m: m(features(4))),
    "conv-numbers": (lambda: MaskedConv2d(4, 8, (2, 3), PATTERN.float()), lambda m: m(features(4))),
    "shifted-down": (lambda: ShiftedConv2d(4, 4, (2, 3), "down"), lambda m: m(features(4))),
    "shifted-right": (lambda: ShiftedConv2d(4, 4, (2, 2), "down-right"), lambda m: m(features(4))),
    "shifted-half": (lambda: ShiftedConv2d(4, 4, (2, 2), "down-right", stride=2), lambda m: m(features(4))),
    "transposed": (lambda: ShiftedConvTranspose2d(4, 4, (2, 3), "down"), lambda m: m(features(4))),
    "channel-mix": (lambda: ChannelMix(8, 4, sources=2), lambda m: m(features(4), features(4).flip(0))),
    "activation": (lambda: PixelActivation(4, "gated"), lambda m: m(features(4))),
    "pixelcnn": (lambda: models.PixelCNN(3, hidden_channels=6, layers=2), lambda m: m.nats(images(3))),
    "gated-pixelcnn": (
        lambda: models.GatedPixelCNN(3, channels=6, layers=2, num_classes=2),
        lambda m: m.nats(images(3), torch.tensor([0, 1])),
    ),
    "pixelcnn++": (
        lambda: models.PixelCNNPP(3, channels=4, blocks=1, mixtures=2, num_classes=2),
        lambda m: m.nats(images(3), torch.tensor([0, 1])),
    ),
    "gated-context": (lambda: models.GatedPixelCNNContext(4, 3), lambda m: m(features(4))),
    "residual-context": (lambda: models.ResidualContext(4, 8, 2), lambda m: m(features(4))),
    "encoder": (encoder, lambda m: m(patches())),
    "wide-resnet": (lambda: models.WideResNetEncoder(10, 1, 1), lambda m: m(patches())),
    "mobilenet": (lambda: models.MobileNetV2Encoder(1, width=0.1, strides="cifar"), lambda m: m(patches())),
    "cpc": (cpc, lambda m: m(patches()).loss),
    "greedy-infomax": (greedy, lambda m: torch.stack([output.loss for output in m(patches())])),
    "simclr": (
        lambda: models.SimCLR(encoder(), projection_channels=4),
        lambda m: m(torch.stack([patches()[:, 0, 0], patches()[:, 1, 1]])).loss,
    ),
    "grid-info-nce": (lambda: GridInfoNCE(3, pred_steps=2, neg_samples="all"), lambda m: m(*grids()).loss),
    "target-info-nce": (lambda: TargetInfoNCE(3, pred_steps=2), lambda m: m(*grids()).loss),
}


def made(name):
    torch.manual_seed(0)
    make, run = CASES[name]
    model = make().double().eval()
    return model, run


def emptied(model, device="cpu"):
    """Give a module new memory, filled with garbage."""
    model.to_empty(device=device)
    for module in model.modules():
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if isinstance(module, FixedMask) and value is module._buffers[module._mask_buffer]:
                continue  # Not what to_empty left there.
            value.data.fill_(True if value.dtype == torch.bool else 77)
    return model


@pytest.fixture(params=["meta", "meta-double", "cpu"])
def build(request):
    """Make a module whose parameters and buffers are set later: on meta, or with values to be replaced."""

    def build(name):
        make, _ = CASES[name]
        if request.param == "cpu":
            return make().double()
        with torch.device("meta"):
            model = make()
        assert all(value.is_meta for value in (*model.parameters(), *model.buffers()))
        return model.double() if request.param == "meta-double" else model

    return build


@pytest.fixture
def garbage(monkeypatch):
    """Make sure that new memory is not zero by chance."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_to_empty_and_load(name, build, garbage):
    model, run = made(name)
    loaded = emptied(build(name)).double()
    assert loaded.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(run(loaded.eval()), run(model))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_assigned_checkpoints(name, build):
    model, run = made(name)
    loaded = build(name)
    loaded.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    assert torch.equal(run(loaded.eval()), run(model))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_copies(name):
    model, run = made(name)
    expected = run(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    for one in copies:
        assert torch.equal(run(one), expected)
    again = copy.deepcopy(model).float().double().to("meta").to_empty(device="cpu")
    again.load_state_dict(model.state_dict())
    assert torch.equal(run(again), expected)
    assert not any("mask" in key or "visible" in key for key in model.state_dict())


@pytest.mark.parametrize("name", ["conv-B", "conv-custom", "conv-numbers", "shifted-down", "gated-pixelcnn"])
def test_other_types(name):
    model, _ = made(name)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        converted = copy.deepcopy(model).to(dtype)
        for module in converted.modules():
            if isinstance(module, FixedMask):
                mask = module._buffers[module._mask_buffer]
                assert torch.equal(mask.bool(), module._mask_values().bool())
                assert mask.dtype in (torch.bool, dtype)


def test_distributed_data_parallel_and_modules_of_their_own(tmp_path):
    """Module by module, as FSDP and torchtitan materialise them."""
    model, run = made("gated-pixelcnn")
    with torch.device("meta"):
        empty = CASES["gated-pixelcnn"][0]()
    for module in empty.modules():
        module.to_empty(device="cpu", recurse=False)
    empty.double().load_state_dict(model.state_dict())
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(empty.eval())
        torch.testing.assert_close(run(parallel.module), run(model))
    finally:
        torch.distributed.destroy_process_group()


def test_a_changed_mask_stays_changed():
    layer = MaskedConv2d(2, 3, 3, "B").double()
    layer.mask.fill_(True)
    kept = layer.mask.clone()
    other = MaskedConv2d(2, 3, 3, "B").double()
    for changed in (layer.float().double(), copy.deepcopy(layer), layer.to_empty(device="cpu")):
        changed.load_state_dict(other.state_dict())
        assert torch.equal(changed.mask, kept)
        input = features(2)
        torch.testing.assert_close(changed(input), F.conv2d(input, other.weight, other.bias, padding=1))


def test_the_given_mask_is_copied():
    mask = PATTERN.clone()
    layer = MaskedConv2d(2, 3, (2, 3), mask)
    mask.fill_(True)
    assert torch.equal(layer.mask, PATTERN)
    layer.mask.fill_(False)
    assert torch.equal(layer._mask_values(), PATTERN)


def test_masks_that_come_back_are_copies_and_only_where_weights_come():
    with torch.device("meta"):
        layer = MaskedConv2d(2, 3, (2, 3), PATTERN)
    weights = MaskedConv2d(2, 3, (2, 3), PATTERN).state_dict()
    with pytest.warns(UserWarning, match="no-op"):
        layer.load_state_dict(weights)
    assert layer.mask.is_meta
    layer.load_state_dict(weights, assign=True)
    layer.mask.fill_(False)
    assert torch.equal(layer._mask_values(), PATTERN)


def test_emptying_a_layer_alone_leaves_its_children():
    layer = MaskedConv2d(2, 3, 3, "B")
    layer.child = nn.Linear(2, 2)
    layer.to_empty(device="meta", recurse=False)
    assert layer.mask.is_meta
    assert not layer.child.weight.is_meta


def test_a_mask_without_values_is_refused():
    with pytest.raises(ValueError, match="mask must hold values, got one on the meta device"):
        MaskedConv2d(2, 3, 3, torch.ones(3, 3, device="meta"))
