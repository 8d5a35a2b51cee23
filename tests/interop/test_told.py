"""Settings that weights do not show: they are read from the file, its name or an option, else an error or a note."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.interop import CheckpointError, export_reference, load_reference, read_reference
from cpc_ext.interop.reference import Encodings
from cpc_ext.models import (
    CPC,
    GreedyInfoMax,
    LayerNormResNetEncoder,
    MobileNetV2Encoder,
    PixelCNNPP,
    ResidualContext,
    ResNetV2Encoder,
)
from cpc_ext.nn import TargetInfoNCE
from cpc_ext.programs import convert
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import load_config

ENCODER = "trained_encoder_resnet50_crop36-2_grid5_{}Norm_1dir_augTrue_300.pt"


@pytest.fixture
def named(problem, tmp_path):
    """A function: named(problem, file name) saves a problem's weights alone, as its program does; returns the path."""

    def save(problem_name, file_name, folder="cifar100"):
        (tmp_path / folder).mkdir(exist_ok=True)
        torch.save(problem(problem_name).state, tmp_path / folder / file_name)
        return tmp_path / folder / file_name

    return save


def test_the_name_of_a_file_tells_the_norm(problem, named):
    given = problem("cpcv2_pytorch.resnet_layer")
    patches, expected = given.tensors["x"], given.tensors["y"]
    layer = load_reference(named("cpcv2_pytorch.resnet_layer", ENCODER.format("layer")), "cpcv2-pytorch")
    torch.testing.assert_close(layer(patches).permute(0, 2, 3, 1), expected, atol=1e-10, rtol=0)

    reference = read_reference(named("cpcv2_pytorch.resnet_layer", ENCODER.format("instance")), "cpcv2-pytorch")
    arguments = reference.configuration["encoder"]["arguments"]
    instance = ResNetV2Encoder(**{**arguments, "norm": "instance"}).double()
    instance.load_state_dict(layer.state_dict())
    assert torch.equal(reference.model(patches), instance(patches))
    assert (reference.model(patches) - layer(patches)).norm() > 0.3 * layer(patches).norm()
    view = ("image_size", "grid_size", "patch_size", "stride", "pad", "patch_augmentation", "dataset")
    assert [reference.configuration[name] for name in view] == [36, 5, 12, 6, 2, True, "cifar100"]
    assert reference.assumed == ()


def test_what_is_given_counts_before_the_name(named):
    path = named("cpcv2_pytorch.resnet_layer", ENCODER.format("instance"))
    found = read_reference(path, "cpcv2-pytorch", norm="layer", grid_size=3, image_size=32).configuration
    assert found["encoder"]["arguments"]["norm"] == "layer"
    assert (found["image_size"], found["grid_size"], found["patch_size"]) == (32, 3, 16)


@pytest.mark.parametrize("name", ["cpcv2_pytorch.resnet_layer", "cpcv2_pytorch.wide_resnet", "cpcv2_pytorch.cpc_4dir"])
def test_a_norm_that_nothing_tells_is_refused(problem, named, name, tmp_path, capsys):
    message = r'neither the checkpoint nor its file\'s name .* give norm="layer" or norm="instance" \(--norm\)'
    for source in (problem(name).state, named(name, "encoder.pt"), named(name, ENCODER.format("batch"))):
        with pytest.raises(ValueError, match=message):
            load_reference(source, "cpcv2-pytorch")
    arguments = [str(named(name, "encoder.pt")), "--source", "cpcv2-pytorch", "--out", str(tmp_path / "run")]
    assert convert.main(arguments) == 1
    assert "--norm" in capsys.readouterr().err
    assert convert.main([*arguments, "--norm", "instance"]) == 0
    assert load_config(tmp_path / "run" / "config.yaml").cpc.norm == "instance"


def test_convert_reads_the_name(named, tmp_path, capsys):
    path = named("cpcv2_pytorch.resnet_layer", ENCODER.format("instance"))
    assert convert.main([str(path), "--source", "cpcv2-pytorch", "--out", str(tmp_path / "run")]) == 0
    assert "assumed" not in capsys.readouterr().out
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.data.dataset, config.cpc.norm) == ("cifar100", "instance")
    assert (config.view.crop, config.view.pad, config.view.grid_size, config.view.patch) == (36, 2, 5, 12)
    assert (config.view.gray, config.view.patch_augmentation) == (True, True)


def test_a_name_that_the_weights_belie(named):
    for name, message in (
        (ENCODER.format("layer").replace("_grid", "_colour_grid"), "a model of images of 1 channels, its name says"),
        (ENCODER.format("layer").replace("_crop36-2", "_crop37-2"), "image_size 37 does not divide"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reference(named("cpcv2_pytorch.resnet_layer", name), "cpcv2-pytorch")
    whole = "trained_cpc_resnet14_crop30-2_colour_grid5_layerNorm_{}dir_augFalse_300.pt"
    with pytest.raises(CheckpointError, match="a model of 4 directions, its name says otherwise"):
        load_reference(named("cpcv2_pytorch.cpc_4dir", whole.format(1)), "cpcv2-pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_reference(named("cpcv2_pytorch.cpc_4dir", whole.format(4)), "cpcv2-pytorch")


def test_a_classifier_of_a_hundred_classes_is_of_cifar100(problem):
    state = problem("cpcv2_pytorch.resnet_none").state
    state = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    for classes, dataset in ((10, None), (100, "cifar100")):
        classifier = {"classifier.weight": torch.ones(classes, 32), "classifier.bias": torch.ones(classes)}
        assert read_reference(state | classifier, "cpcv2-pytorch").configuration.get("dataset") == dataset


def test_what_is_assumed_is_said(problem):
    with pytest.warns(UserWarning, match=r"not told by the checkpoint, and assumed: grid_size 7; image_size 64"):
        load_reference(problem("cpcv2_pytorch.resnet_none").state, "cpcv2-pytorch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_reference(problem("cpcv2_pytorch.resnet_none").state, "cpcv2-pytorch", grid_size=7, image_size=64)


@pytest.mark.parametrize(
    ("given", "view"),
    [
        ({}, (64, 16, 8)),
        # The largest size up to 64 that 7 patches a side fill: 20 + 6 * 7, 12 + 6 * 8, 16 + 6 * 8.
        ({"patch_size": 20}, (62, 20, 7)),
        ({"patch_size": 12}, (60, 12, 8)),
        ({"patch_size": 16}, (64, 16, 8)),
        # A given distance, between patches as large as without it: 16 + 6 * 4, 16 + 6 * 16.
        ({"stride": 4}, (40, 16, 4)),
        ({"stride": 16}, (112, 16, 16)),
        ({"patch_size": 20, "stride": 5}, (50, 20, 5)),
        # 20 + 4 * 11 is all of the 64, which half-overlapping patches, 20 + 4 * 10, do not fill.
        ({"grid_size": 5, "patch_size": 20}, (64, 20, 11)),
        ({"grid_size": 5}, (60, 20, 10)),
        # Patches that do not fit 64 overlap by half: 80 + 6 * 40.
        ({"patch_size": 80}, (320, 80, 40)),
    ],
)
def test_patches_of_cpcv2_pytorch_decide_the_size_of_images(problem, given, view):
    state = problem("cpcv2_pytorch.resnet_none").state
    reference = read_reference(state, "cpcv2-pytorch", **given)
    found = reference.configuration
    assert (found["image_size"], found["patch_size"], found["stride"]) == view
    grid = found["grid_size"]
    assert grid == given.get("grid_size", 7)
    assert f"image_size {view[0]}" in reference.assumed
    encodings = reference.model(torch.zeros(1, found["encoder"]["arguments"]["in_channels"], view[0], view[0]).double())
    assert encodings.shape[2:] == (grid, grid)


def test_a_size_that_is_given_has_to_be_filled(problem):
    state = problem("cpcv2_pytorch.resnet_none").state
    for given in ({"patch_size": 20}, {"stride": 4}):
        with pytest.raises(ValueError, match=r"image_size 64 is not filled by 7 patches a side of (20|16) pixels"):
            load_reference(state, "cpcv2-pytorch", image_size=64, **given)
    found = read_reference(state, "cpcv2-pytorch", image_size=62, patch_size=20)
    assert (found.configuration["stride"], found.assumed) == (7, ("grid_size 7",))


def test_settings_that_decide_nothing_are_refused(problem):
    greedy = export_reference(GreedyInfoMax(small_resnet(), 3, pred_steps=1), "greedy-infomax")
    with pytest.raises(ValueError, match="image_size 60 is not filled by 7 patches a side of 16 pixels"):
        load_reference(greedy, "greedy-infomax", image_size=60, grid_size=7)
    with pytest.raises(ValueError, match="image_size 65 is not filled"):
        load_reference(greedy, "greedy-infomax", image_size=65)
    assert read_reference(greedy, "greedy-infomax", image_size=40).configuration["grid_size"] == 4
    pixels = export_reference(PixelCNNPP(1, channels=4, blocks=1, mixtures=1), "pixel-cnn-pp")
    with pytest.raises(ValueError, match="grid_size, norm: checkpoints of pixel-cnn-pp have no use for it"):
        load_reference(pixels, "pixel-cnn-pp", grid_size=3, norm="layer")
    with pytest.raises(ValueError, match="norm: by its weights the encoder has batch norm, got layer"):
        load_reference(problem("cpcv2_pytorch.resnet_batch").state, "cpcv2-pytorch", norm="layer")


def small_resnet():
    return ResNetV2Encoder(in_channels=1, blocks=(1, 1, 1), channels=(4, 8, 8), stem_channels=4)


def test_mobilenet_with_biases():
    encoder = MobileNetV2Encoder(1, width=0.25, norm="none").eval()
    plain = export_reference(encoder, "cpcv2-pytorch")
    biases = {
        name.removesuffix("weight") + "bias": torch.randn(len(value))
        for name, value in plain.items()
        if name.startswith("features.")
    }
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith(".bias"):
                (there,) = (other for other in biases if matches(other, plain, encoder, name))
                parameter.copy_(biases[there])
    reference = read_reference(plain | biases, "cpcv2-pytorch")
    patches = torch.randn(1, 2, 2, 1, 16, 16)
    assert torch.equal(reference.model(patches), encoder(patches))
    assert reference.model(patches).std() > 0
    again = export_reference(reference.model, "cpcv2-pytorch", form=reference.form)
    assert again.keys() == (plain | biases).keys()
    assert all(torch.equal(again[name], value) for name, value in (plain | biases).items())
    with pytest.raises(CheckpointError, match=r"has no biases in MobileNetV2's convolutions, conv1.bias is not 0"):
        export_reference(reference.model, "cpcv2-pytorch")


def matches(theirs, plain, encoder, name):
    """Return whether their bias and ours belong to the same weight."""
    weight = encoder.get_parameter(name.removesuffix("bias") + "weight")
    return plain[theirs.removesuffix("bias") + "weight"].data_ptr() == weight.data_ptr()


def bolts_encoder(state, patches, blocks):
    """The program's encoder step by step, from its tensors: patches [N, C, p, p] → [N, D]."""

    def norm(features, name):
        weight = state[f"{name}.weight"]
        return F.layer_norm(features, weight.shape, weight, state[f"{name}.bias"])

    features = F.relu(norm(F.conv2d(patches, state["conv1.weight"], stride=2, padding=3), "ln1"))
    features = F.max_pool2d(features, 3, 2, 1)
    for stack, count in enumerate(blocks):
        for block in range(count):
            name, stride = f"layer{stack + 1}.{block}", 2 if stack > 0 and block == 0 else 1
            inside = F.relu(norm(F.conv2d(features, state[f"{name}.conv1.weight"]), f"{name}.ln1"))
            inside = F.relu(
                norm(F.conv2d(inside, state[f"{name}.conv2.weight"], stride=stride, padding=1), f"{name}.ln2")
            )
            inside = norm(F.conv2d(inside, state[f"{name}.conv3.weight"]), f"{name}.ln3")
            if f"{name}.downsample.0.weight" in state:
                features = norm(
                    F.conv2d(features, state[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1"
                )
            features = F.relu(inside + features)
    return features.mean((2, 3))


@pytest.fixture
def bolts(problem):
    """bolts(patch): a checkpoint of the program's own encoder, small, in front of the golden problem's task."""

    def make(patch):
        encoder = LayerNormResNetEncoder(
            patch, blocks=(1, 2, 2, 1), channels=(4, 4, 6, 4), expansions=(4, 4, 8, 2), stem_channels=4
        ).double()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in encoder.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 2)
        task = problem("lightning_bolts.cpc_task").state
        names = {f"layers.{stack}.": f"layer{stack + 1}." for stack in range(4)}
        state = {f"contrastive_task.{name}": value for name, value in task.items()}
        for name, value in encoder.state_dict().items():
            state["encoder." + names.get(name[:9], name[:9]) + name[9:]] = value
        return state

    return make


@pytest.mark.parametrize("patch", [8, 16, 32])
def test_the_own_encoder_of_lightning_bolts(problem, bolts, patch):
    state, tensors = bolts(patch), problem("lightning_bolts.cpc_task").tensors
    options = {"patch_size": patch, "patch_overlap": 4, "encoder_name": "cpc_encoder"}
    reference = read_reference({"state_dict": state, "hyper_parameters": options}, "lightning-bolts")
    model = reference.model
    assert isinstance(model.encoder, LayerNormResNetEncoder)
    assert [reference.configuration[name] for name in ("patch_size", "stride", "grid_size")] == [patch, patch // 2, 7]

    patches = torch.randn(2, 7, 7, 3, patch, patch, dtype=torch.float64)
    own = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    expected = bolts_encoder(own, patches.flatten(0, 2), (1, 2, 2, 1)).view(2, 7, 7, -1)
    torch.testing.assert_close(model.encoder(patches).permute(0, 2, 3, 1), expected, atol=1e-10, rtol=0)
    # The rest is the golden problem's, whose loss belongs to its own encodings.
    encodings = tensors["z"]
    loss = model.objective(encodings[None], model.context(encodings)[None]).loss
    torch.testing.assert_close(loss, tensors["loss"], atol=1e-10, rtol=0)

    again = export_reference(model, "lightning-bolts", form=reference.form)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


@pytest.mark.parametrize("scale", [0.1, 1.0, 0.03])
def test_scores_are_the_same_in_lightning_bolts(scale):
    context = ResidualContext(4, 5, 1, padding="lightning-bolts")
    objective = TargetInfoNCE(4, target_channels=3, reduction="lightning-bolts", scale=scale)
    model = CPC(Encodings(4), context, objective).double().eval()
    state = export_reference(model, "lightning-bolts")
    # The program multiplies predictions by 0.1, whatever it loads.
    for parameter in ("weight", "bias"):
        mine = {name: value.get_parameter(parameter) for name, value in objective.named_children()}
        torch.testing.assert_close(state[f"pred_cnn.{parameter}"] * 0.1, mine["prediction_projection"] * scale)
        assert torch.equal(state[f"target_cnn.{parameter}"], mine["target_projection"])
    back = load_reference(state, "lightning-bolts")
    assert back.objective.scale == 0.1
    encodings = torch.randn(2, 4, 6, 6, dtype=torch.float64) * 3
    expected = model(encodings).step_losses
    assert expected.std() > 1e-8
    torch.testing.assert_close(back(encodings).step_losses, expected, rtol=1e-12, atol=0)


def test_the_weights_tell_the_size_of_patches(bolts):
    assert read_reference(bolts(16), "lightning-bolts").configuration["patch_size"] == 16
    with pytest.raises(ValueError, match="patch_size 8: by its weights the encoder takes patches of 16 pixels"):
        load_reference(bolts(16), "lightning-bolts", patch_size=8)
    encoder = LayerNormResNetEncoder(16, blocks=(1,), channels=(4,), expansions=(1,), stem_channels=4)
    with pytest.raises(ValueError, match="layer norms are of patches of 16 pixels, got patches of 8x8"):
        encoder(torch.randn(1, 1, 1, 3, 8, 8))


def test_the_own_encoder_becomes_a_run_and_comes_back(bolts, tmp_path):
    torch.save({"state_dict": bolts(16), "hyper_parameters": {"patch_size": 16}}, tmp_path / "bolts.ckpt")
    run = tmp_path / "run"
    arguments = [str(tmp_path / "bolts.ckpt"), "--source", "lightning-bolts", "--out", str(run)]
    assert convert.main(arguments) == 0
    config = load_config(run / "config.yaml")
    assert config.cpc.encoder == ("ln-resnet101:blocks=1-2-2-1,channels=4-4-6-4,expansions=4-4-8-2,stem_channels=4")
    assert (config.view.crop, config.view.patch, config.data.dataset) == (64, 16, "stl10")
    saved = load_checkpoint(run / "checkpoint.pt")["model"]
    assert torch.equal(saved["encoder.layers.2.1.ln3.weight"], bolts(16)["encoder.layer3.1.ln3.weight"])
    assert convert.main([str(run), "--to", "lightning-bolts", "--out", str(tmp_path / "back.pt")]) == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == bolts(16).keys()
    assert all(torch.equal(back[name], value) for name, value in bolts(16).items())


def test_an_encoder_that_no_program_has(bolts):
    state = {name: value for name, value in bolts(8).items() if not name.startswith("encoder.conv1")}
    with pytest.raises(CheckpointError, match=r"conv1\.weight of its encoder is missing"):
        load_reference(state, "lightning-bolts")
    model = CPC(
        small_resnet(),
        ResidualContext(8, 5, 1, padding="lightning-bolts"),
        TargetInfoNCE(8, target_channels=3, reduction="lightning-bolts"),
    )
    with pytest.raises(CheckpointError, match="has its own encoder and torchvision's ResNets, not ResNetV2Encoder"):
        export_reference(model, "lightning-bolts")
