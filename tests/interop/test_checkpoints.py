"""The forms of checkpoints, and the errors for files that are none, or another program's."""

from __future__ import annotations

import argparse
import collections
import pickle
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cpc_ext.interop import SOURCES, CheckpointError, export_reference, load_reference, read_reference
from cpc_ext.interop.reference import Encodings
from cpc_ext.models import (
    CPC,
    BinaryGatedPixelCNN,
    CausalTransformerContext,
    GatedPixelCNNContext,
    GreedyInfoMax,
    GreedySupervised,
    MobileNetV2Encoder,
    PixelCNNPP,
    RecurrentContext,
    ResidualContext,
    ResNetV2Encoder,
    TimmEncoder,
    WaveformEncoder,
    WideResNetEncoder,
)
from cpc_ext.nn import SequenceInfoNCE, TargetInfoNCE
from tests.interop.conftest import TimmNetwork


def assert_same_weights(left, right):
    left, right = left.state_dict(), right.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(value, right[name]) for name, value in left.items())


def small_resnet(**arguments):
    return ResNetV2Encoder(blocks=(1, 1, 1), channels=(4, 8, 8), stem_channels=4, **arguments)


def small_greedy(modules=3):
    encoder = small_resnet(in_channels=1)
    context = GatedPixelCNNContext(encoder.out_channels, 2) if modules == 1 else None
    return GreedyInfoMax(encoder, modules, context=context, pred_steps=2)


@pytest.fixture
def cpc():
    """Weights and model of CPCV2-PyTorch's CPC in two directions."""
    encoder = small_resnet(norm="batch", stem="cifar")
    model = CPC(encoder, GatedPixelCNNContext(encoder.out_channels, 2), pred_steps=2, pred_directions=2)
    return export_reference(model, "cpcv2-pytorch"), model


def sound(context, norm="channel", **objective):
    """CPC on sound as CPC_audio has it, of contexts of 8 channels."""
    encoder = WaveformEncoder(8, norm=norm, padding="cpc-audio")
    given = {
        "sampling": "shifted",
        "common_positions": True,
        "pred_steps": 2,
        "window": 9,
        "score": "mean",
        **objective,
    }
    return CPC(encoder, context, SequenceInfoNCE(8, context.out_channels, **given))


def greedy_sound(modules, context, **arguments):
    encoder = WaveformEncoder((4, 5, 6, 7, 8))
    objective = {"objective": SequenceInfoNCE, "pred_steps": 2}
    return GreedyInfoMax(encoder, modules, context=context, **objective, **arguments)


def ours(source):
    """Return a model of every kind that a program has."""
    if source == "cpc-audio":
        return [
            sound(CausalTransformerContext(8, 9, layers=2, hidden=5), predictor="transformer"),
            sound(RecurrentContext(8, 6, kind="lstm", layers=2), predictor="conv8"),
            sound(RecurrentContext(8, 6), "batch", predictor="ffd"),
            sound(RecurrentContext(8, 9, kind="rnn"), "instance", predictor="lstm"),
            sound(CausalTransformerContext(8, 9, absolute=True), "none"),
            sound(Encodings(8), predictor="conv12", window=15),
        ]
    if source == "greedy-infomax-audio":
        return [
            greedy_sound(5, RecurrentContext(8, 3), context_module=True),
            CPC(WaveformEncoder(4), RecurrentContext(4, 3, remove_bptt=True), SequenceInfoNCE(4, 3, pred_steps=3)),
            greedy_sound((1, 4), RecurrentContext(8, 3)),
            greedy_sound(5, [RecurrentContext(width, 3 + width) for width in (4, 5, 6, 7, 8)]),
        ]
    bolts = {"target_channels": 3, "reduction": "lightning-bolts"}
    if source == "cpcv2-pytorch":
        return [
            small_resnet(),
            small_resnet(norm="batch", stem="imagenet"),
            small_resnet(in_channels=1, bottleneck=True, norm="layer", stem="cifar"),
            ResNetV2Encoder(14, stem="cifar"),
            WideResNetEncoder(10, 2, norm="none"),
            MobileNetV2Encoder(1, width=0.25, norm="batch"),
            MobileNetV2Encoder(1, width=0.25, norm="none"),
            GatedPixelCNNContext(4),
        ]
    if source == "greedy-infomax":
        return [
            small_greedy(),
            small_greedy(1),
            GreedyInfoMax(small_resnet(bottleneck=True), (1,), pred_steps=1),
            GreedySupervised(small_resnet(), 3, classes=4),
        ]
    if source == "lightning-bolts":
        return [
            ResidualContext(4, 5, 2, padding="lightning-bolts"),
            CPC(
                TimmEncoder("resnet18"),
                ResidualContext(TimmNetwork.num_features, 5, 1, padding="lightning-bolts"),
                TargetInfoNCE(TimmNetwork.num_features, **bolts),
            ),
        ]
    if source in ("lightly", "solo-learn", "sthalles-simclr"):
        stem = source if source != "sthalles-simclr" else None
        return [TimmEncoder("resnet18"), TimmEncoder("resnet18", 1, stem=stem)]
    if source == "pytorch-generative":
        return [
            BinaryGatedPixelCNN(2, 3, layers=2, channels=4, head_channels=5),
            BinaryGatedPixelCNN(layers=0, channels=4),
        ]
    return [PixelCNNPP(1, channels=4, blocks=1, mixtures=2), PixelCNNPP(3, channels=4, blocks=2, mixtures=1)]


@pytest.mark.parametrize("source", SOURCES)
def test_models_of_ours_go_there_and_come_back(timm, source):
    for model in ours(source):
        state = export_reference(model, source)
        assert all(type(value) is torch.Tensor for value in state.values())
        told = {"norm": "layer"} if any(isinstance(layer, nn.GroupNorm) for layer in model.modules()) else {}
        back = load_reference(state, source, **told)
        assert type(back) is type(model)
        assert_same_weights(back, model)


def test_models_that_come_back_compute_the_same():
    model = small_greedy().eval()
    images = torch.randn(2, 1, 64, 64)
    back = load_reference(export_reference(model, "greedy-infomax"), "greedy-infomax").eval()
    for mine, theirs in zip(back.encodings_by_module(images), model.encodings_by_module(patches(images)), strict=True):
        assert torch.equal(mine, theirs)


def patches(images):
    return images.unfold(2, 16, 8).unfold(3, 16, 8).permute(0, 2, 3, 1, 4, 5)


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: prefixed(state, "module."),
        lambda state: prefixed(state, "_orig_mod.module."),
        lambda state: {"n_averaged": torch.tensor(7), **prefixed(state, "module.")},  # As PyTorch's AveragedModel.
        lambda state: {name.replace("enc.", "enc.module."): value for name, value in state.items()},
        lambda state: {
            "state_dict": prefixed(state, "module."),
            "epoch": 3,
            "optimizer": {"state": {0: torch.ones(1)}},
        },
        lambda state: {"model": state, "ema": prefixed(state, "x."), "optimizer_states": [torch.ones(2)]},
        lambda state: state | prefixed(state, "ema."),
        lambda state: collections.OrderedDict(state, note="trained for long"),
        lambda state: {name: value for name, value in state.items() if not name.startswith("enc.classifier")},
        lambda state: state | {"enc.classifier.weight": torch.ones(10, 8), "enc.classifier.bias": torch.ones(10)},
    ],
)
def test_what_is_put_around_weights_does_not_matter(cpc, wrap, tmp_path):
    state, model = cpc
    assert_same_weights(load_reference(wrap(state), "cpcv2-pytorch"), model)
    torch.save(wrap(state), tmp_path / "checkpoint.tar")
    assert_same_weights(load_reference(str(tmp_path / "checkpoint.tar"), "cpcv2-pytorch"), model)


def test_kinds_of_files(cpc, tmp_path):
    state, model = cpc
    torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False)
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "named.anyhow")
    for name in ("old", "named.anyhow"):
        assert_same_weights(load_reference(tmp_path / name, "cpcv2-pytorch"), model)


def test_lightning_with_its_options(timm, tmp_path):
    *_, model = ours("lightning-bolts")
    state = export_reference(model, "lightning-bolts")
    evaluator = {"non_linear_evaluator.block_forward.1.weight": torch.ones(3)}
    torch.save(
        {
            "state_dict": state | evaluator,
            "hyper_parameters": argparse.Namespace(patch_size=16, patch_overlap=12),
            "pytorch-lightning_version": "1.9.0",
            "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "there"}},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
        },
        tmp_path / "epoch=3.ckpt",
    )
    reference = read_reference(tmp_path / "epoch=3.ckpt", "lightning-bolts")
    assert_same_weights(reference.model, model)
    assert [reference.configuration[name] for name in ("patch_size", "stride", "image_size")] == [16, 4, 40]
    again = export_reference(reference.model, "lightning-bolts", form=reference.form)
    assert again.keys() == (state | evaluator).keys()


def test_what_trainers_note_beside_the_weights(cpc, tmp_path, monkeypatch):
    """Classes that are not there when it is read, and numbers of NumPy."""
    state, model = cpc
    library = types.ModuleType("pytorch_lightning.utilities.parsing")
    library.AttributeDict = type("AttributeDict", (dict,), {"__module__": library.__name__})
    callbacks = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callbacks.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": callbacks.__name__})
    with monkeypatch.context() as patch:
        for package in ("pytorch_lightning", "pytorch_lightning.utilities", "pytorch_lightning.callbacks"):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        for module in (library, callbacks):
            patch.setitem(sys.modules, module.__name__, module)
        noted = {
            "state_dict": state,
            "hyper_parameters": library.AttributeDict(grid=6, neg_samples=3),
            "callbacks": {callbacks.ModelCheckpoint: {"best": np.float64(0.5), "count": np.int64(3)}},
        }
        for zipped, name in ((True, "new"), (False, "old")):
            torch.save(noted, tmp_path / name, _use_new_zipfile_serialization=zipped)
    for name in ("new", "old"):
        reference = read_reference(tmp_path / name, "cpcv2-pytorch")
        assert_same_weights(reference.model, model)
        assert [reference.configuration[option] for option in ("grid_size", "neg_samples")] == [6, 3]


def by_file(state):
    """Split a state dict into those of every module, and of the context network if there is one."""
    parts = {}
    for name, value in state.items():
        for whole, short in (("encoder.", ""), ("autoregressor.", "context.")):
            if name.startswith(whole):
                part, _, rest = (short + name.removeprefix(whole)).partition(".")
                parts.setdefault(part, {})[rest] = value
    return list(parts.values())


@pytest.mark.parametrize("modules", [1, 3])
def test_greedy_infomax_in_one_file_or_many(modules, tmp_path):
    model = small_greedy(modules)
    state = export_reference(model, "greedy-infomax")
    files = []
    for index, part in enumerate(by_file(state)):
        files.append(tmp_path / f"model_{index}.ckpt")
        torch.save(prefixed(part, "module."), files[-1])
    reference = read_reference(files, "greedy-infomax")
    assert_same_weights(reference.model, model)
    assert reference.form.layout == "files"

    again = export_reference(reference.model, "greedy-infomax", form=reference.form)
    expected = {name.removeprefix("encoder."): value for name, value in state.items() if not name.startswith("model.")}
    assert again.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.items())

    whole = read_reference(state, "greedy-infomax")
    assert whole.form.layout == "full"
    again = export_reference(whole.model, "greedy-infomax", form=whole.form)
    assert again.keys() == state.keys()


def test_first_module_alone():
    first, *_ = by_file(export_reference(small_greedy(), "greedy-infomax"))
    model = load_reference(first, "greedy-infomax")
    assert len(model.encoder_modules) == 1
    assert model.encoder.out_channels == 4


def test_settings(cpc):
    encoder = small_resnet(norm="instance", stem="cifar")
    model = CPC(encoder, GatedPixelCNNContext(encoder.out_channels, 2), pred_steps=2, pred_directions=2)
    state = export_reference(model, "cpcv2-pytorch")
    configuration = read_reference(
        state, "cpcv2-pytorch", grid_size=7, image_size=64, norm="instance", skip=2, neg_samples="all"
    ).configuration
    assert configuration["encoder"]["arguments"]["norm"] == "instance"
    names = ("grid_size", "patch_size", "stride", "skip", "neg_samples")
    assert [configuration[name] for name in names] == [7, 16, 8, 2, "all"]
    with pytest.raises(ValueError, match="grid_size must be at least 4 for this checkpoint, got 3"):
        load_reference(state, "cpcv2-pytorch", norm="layer", grid_size=3)
    with pytest.raises(ValueError, match="neg_samples must be an int of at least 1"):
        load_reference(state, "cpcv2-pytorch", neg_samples=0)
    with pytest.raises(TypeError, match=r"settings are grid_size, .*, got colour"):
        load_reference(state, "cpcv2-pytorch", colour=True)
    with pytest.raises(ValueError, match=r"source must be one of cpc-audio, cpcv2-pytorch, .*, got 'torchvision'"):
        load_reference(state, "torchvision")
    with pytest.raises(TypeError, match="must be a path, a mapping or a sequence"):
        load_reference(3, "cpcv2-pytorch")


class Executes:
    """Creates a file when it is unpickled, which a safe loader must not do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_is_run(tmp_path, cpc, zipped):
    path, trace = tmp_path / "evil.pt", tmp_path / "ran"
    torch.save({**cpc[0], "more": Executes(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"more than tensors and plain values: .*open"):
        load_reference(path, "cpcv2-pytorch")
    path.write_bytes(pickle.dumps(Executes(trace), protocol=2))
    with pytest.raises(CheckpointError):
        load_reference(path, "cpcv2-pytorch")
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match="Linear"):
        load_reference(path, "cpcv2-pytorch")
    assert not trace.exists()


def test_damaged_files(tmp_path, cpc):
    state, _ = cpc
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointError, match=r"cannot read .*checkpoint.pt: No such file"):
        load_reference(path, "cpcv2-pytorch")
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        load_reference(path, "cpcv2-pytorch")
    path.write_bytes(b"epoch,loss\n1,2.0\n")
    with pytest.raises(CheckpointError, match="neither a checkpoint of PyTorch nor a safetensors file"):
        load_reference(path, "cpcv2-pytorch")
    for zipped in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        content = path.read_bytes()
        for size in (20, len(content) // 2, len(content) - 30):
            path.write_bytes(content[:size])
            with pytest.raises(CheckpointError, match="damaged"):
                load_reference(path, "cpcv2-pytorch")
    save_file(dict(state), path)
    content = path.read_bytes()
    for size in (9, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="damaged"):
            load_reference(path, "cpcv2-pytorch")


def test_a_flipped_bit_is_noticed(tmp_path, cpc):
    path = tmp_path / "checkpoint.pt"
    torch.save(cpc[0], path)
    with zipfile.ZipFile(path) as archive:
        member = max(archive.infolist(), key=lambda info: info.file_size)
    content = bytearray(path.read_bytes())
    content[member.header_offset + len(member.FileHeader()) + 200] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match="damaged"):
        load_reference(path, "cpcv2-pytorch")


def test_other_programs_and_other_names(cpc, timm):
    state, _ = cpc
    greedy = export_reference(small_greedy(), "greedy-infomax")
    with pytest.raises(CheckpointError, match="It looks like greedy-infomax, which has"):
        load_reference(greedy, "cpcv2-pytorch")
    with pytest.raises(CheckpointError, match="It looks like cpcv2-pytorch"):
        load_reference(state, "pixel-cnn-pp")
    with pytest.raises(
        CheckpointError, match=r"2 of its names do not fit \(a.weight, a.bias\).*\n.*None of cpc-audio, cpcv2-py"
    ):
        load_reference({f"a.{part}": torch.ones(2) for part in ("weight", "bias")}, "cpcv2-pytorch")
    with pytest.raises(
        CheckpointError, match=r"\(a0, a1, a2, a3, a4 and 1 more\), of 6 in all\nIt holds 6 .* and 1 more\."
    ):
        load_reference({f"a{index}": torch.ones(2) for index in range(6)}, "cpcv2-pytorch")
    with pytest.raises(CheckpointError, match=r"1 of its names do not fit \(momentum_queue\)"):
        load_reference(state | {"momentum_queue": torch.ones(3)}, "cpcv2-pytorch")
    with pytest.raises(CheckpointError, match="holds no tensors by name; it holds epoch"):
        load_reference({"epoch": 3}, "cpcv2-pytorch")
    with pytest.raises(CheckpointError, match=r"no\s.*context network"):
        load_reference({name: value for name, value in state.items() if not name.startswith("ar.")}, "cpcv2-pytorch")


def test_missing_and_misshapen_tensors_are_named(cpc):
    state, _ = cpc
    without = {name: value for name, value in state.items() if name != "enc.layers.1.0.conv2.weight"}
    with pytest.raises(CheckpointError, match=r"enc\.layers\.1\.0\.conv2\.weight is missing"):
        load_reference(without, "cpcv2-pytorch")
    narrow = state | {"enc.layers.1.0.conv2.weight": torch.ones(8, 7, 3, 3)}
    with pytest.raises(CheckpointError, match=r"conv2\.weight is \[8, 7, 3, 3\], expected \[8, 8, 3, 3\]"):
        load_reference(narrow, "cpcv2-pytorch")
    hidden = state | {"ar.stack.layers.0.vertical_conv.mask": torch.ones(16, 8, 3, 3)}
    with pytest.raises(CheckpointError, match=r"ar\.stack\.layers\.0\.vertical_conv\.mask hides other places"):
        load_reference(hidden, "cpcv2-pytorch")
    no_matrices = {name: value for name, value in state.items() if name != "pred_loss.1.W_k.0.weight"}
    with pytest.raises(CheckpointError, match=r"pred_loss\.1: expected W_k\.0\.weight"):
        load_reference(no_matrices, "cpcv2-pytorch")


@pytest.mark.parametrize("source", SOURCES)
def test_any_tensor_missing_scrambled_or_renamed_is_an_error_and_no_crash(timm, source):
    generator = torch.Generator().manual_seed(0)
    for model in ours(source)[:2]:
        state = export_reference(model, source)
        names = [name for name in state if not name.endswith((".mask", "num_batches_tracked"))]
        for index in torch.randint(len(names), (8,), generator=generator):
            name = names[int(index)]
            rest = {other: value for other, value in state.items() if other != name}
            for changed in (rest | {f"{name}x": state[name]}, rest | {name: state[name].reshape(-1)[None]}):
                with pytest.raises(CheckpointError):
                    load_reference(changed, source)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        (lambda weight: weight.to_sparse(), "enc.conv1.weight is a sparse tensor of float32"),
        (lambda weight: weight.to(torch.complex64), "enc.conv1.weight is a tensor of complex64"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "enc.conv1.weight is a tensor of float8_e4m3fn"),
        (lambda weight: (100 * weight).to(torch.int8), "enc.conv1.weight is of int8, expected floating point"),
    ],
)
def test_tensors_that_hold_no_weights_as_they_are(cpc, changed, problem):
    state, _ = cpc
    with pytest.raises(CheckpointError, match=problem):
        load_reference(state | {"enc.conv1.weight": changed(state["enc.conv1.weight"])}, "cpcv2-pytorch")


def test_averages_alone_are_named(cpc):
    state, _ = cpc
    with pytest.raises(CheckpointError, match=r"of its names do not fit \(ema\.enc\.conv1\.weight, "):
        load_reference(prefixed(state, "ema."), "cpcv2-pytorch")


@pytest.mark.parametrize(
    ("source", "model", "name", "changed"),
    [
        ("pixel-cnn-pp", 0, "nin_out.lin_a.weight_v", lambda weight: weight.sum()),
        ("cpcv2-pytorch", 2, "layers.0.0.conv3.weight", lambda weight: weight[:2]),
        ("cpc-audio", 0, "gEncoder.gEncoder.conv0.weight", lambda weight: torch.cat([weight, weight[:2]])),
    ],
)
def test_shapes_that_no_model_is_built_with_are_errors_of_the_checkpoint(source, model, name, changed):
    state = export_reference(ours(source)[model], source)
    told = {"norm": "layer"} if source == "cpcv2-pytorch" else {}
    with pytest.raises(CheckpointError):
        load_reference(state | {name: changed(state[name])}, source, **told)


def test_a_classifier_of_any_shape_is_kept():
    state = export_reference(small_resnet(), "cpcv2-pytorch") | {"classifier.bias": torch.tensor(1.0)}
    assert read_reference(state, "cpcv2-pytorch").form.unused.keys() == {"classifier.bias"}


@pytest.mark.parametrize("source", SOURCES)
def test_any_tensor_without_values_is_an_error_and_no_crash(timm, source):
    for model in ours(source)[:2]:
        state = export_reference(model, source)
        for name, value in state.items():
            if value.ndim and not name.endswith((".mask", ".z")):  # Constants, of which nothing is made.
                with pytest.raises(CheckpointError):
                    load_reference(state | {name: value[:0]}, source)


def test_models_that_a_program_does_not_have(cpc):
    _, model = cpc
    with pytest.raises(CheckpointError, match="has no model like a CPC"):
        export_reference(model, "greedy-infomax")
    with pytest.raises(CheckpointError, match="has no model like a CPC"):
        export_reference(CPC(Encodings(4), ResidualContext(4, 4, 1), pred_steps=1), "greedy-infomax")
    with pytest.raises(CheckpointError, match="no stem of 5x5 with stride 2"):
        export_reference(small_resnet(stem="strided"), "cpcv2-pytorch")
    with pytest.raises(CheckpointError, match="MobileNetV2 with ImageNet's strides, not cifar's"):
        export_reference(MobileNetV2Encoder(1, width=0.25, strides="cifar"), "cpcv2-pytorch")
    with pytest.raises(CheckpointError, match="cut inside"):
        export_reference(
            GreedyInfoMax(ResNetV2Encoder(blocks=(2,), channels=(4,)), (1,), pred_steps=1), "greedy-infomax"
        )
    with pytest.raises(CheckpointError, match="ResNets without norm"):
        export_reference(GreedyInfoMax(small_resnet(norm="layer"), pred_steps=1), "greedy-infomax")
    with pytest.raises(CheckpointError, match="pads its context network in a way of its own"):
        export_reference(ResidualContext(4), "lightning-bolts")
    with pytest.raises(CheckpointError, match="no models of classes"):
        export_reference(PixelCNNPP(1, channels=4, blocks=1, num_classes=3), "pixel-cnn-pp")


def test_newer_names_of_normalised_weights():
    model = PixelCNNPP(1, channels=4, blocks=1, mixtures=2)
    state = export_reference(model, "pixel-cnn-pp")
    newer = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): value
        for name, value in state.items()
    }
    reference = read_reference(newer, "pixel-cnn-pp")
    assert_same_weights(reference.model, model)
    assert export_reference(reference.model, "pixel-cnn-pp", form=reference.form).keys() == newer.keys()


def test_weights_whose_normalisation_was_removed():
    """As torch.nn.utils.remove_weight_norm leaves them, in both families of names."""
    model = PixelCNNPP(3, channels=4, blocks=1, mixtures=2)
    with torch.no_grad():
        model.nin_out.weight_g[3] = 0
    given = export_reference(model, "pixel-cnn-pp")
    state = {}
    for name, value in given.items():
        if name.endswith("_v"):
            layer, _, _ = name.rpartition(".")
            length = value.flatten(1).norm(dim=1).view(-1, *[1] * (value.ndim - 1))
            state[f"{layer}.weight"] = given[f"{layer}.weight_g"] * value / length
        elif name.endswith("bias"):
            state[name] = value
    reference = read_reference(state, "pixel-cnn-pp")
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(reference.model.nats(images), model.eval().nats(images))
    again = export_reference(reference.model, "pixel-cnn-pp", form=reference.form)
    assert again.keys() == state.keys()
    torch.testing.assert_close(again, state)
    assert not again["nin_out.lin_a.weight"][3].any()

    mixed = {name: value for name, value in given.items() if not name.startswith("u_init")}
    mixed |= {name: value for name, value in state.items() if name.startswith("u_init")}
    with pytest.raises(CheckpointError, match="the norm of some weights was removed, of others it was not"):
        read_reference(mixed, "pixel-cnn-pp")
