"""`python -m cpc_ext.convert`: checkpoints of other programs become runs that train, sample and convert back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from cpc_ext.interop import export_reference, load_reference
from cpc_ext.models import (
    CPC,
    CausalTransformerContext,
    GatedPixelCNNContext,
    GreedyInfoMax,
    GreedySupervised,
    RecurrentContext,
    ResidualContext,
    ResNetV2Encoder,
    TimmEncoder,
    WaveformEncoder,
)
from cpc_ext.nn import SequenceInfoNCE, TargetInfoNCE
from cpc_ext.programs import evaluate, sample
from cpc_ext.programs import training as program
from cpc_ext.programs.convert import main
from cpc_ext.programs.converting_sound import sound_options
from cpc_ext.programs.train_options import parse
from cpc_ext.tasks import pixel_task
from cpc_ext.tasks.cpc_v2.task import CPCv2Task
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import load_config
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.run_log import read_metrics
from tests.interop.conftest import TIMM

GOLDEN = Path(__file__).parents[1] / "golden"
CHECKPOINTS = Path(__file__).parents[1] / "interop" / "checkpoints"
RUNS = {
    "cpcv2_pytorch.cpc_1dir": "cpcv2-pytorch",
    "cpcv2_pytorch.cpc_4dir": "cpcv2-pytorch",
    "cpcv2_pytorch.resnet_none": "cpcv2-pytorch",
    "cpcv2_pytorch.resnet_layer": "cpcv2-pytorch",
    "cpcv2_pytorch.resnet_batch": "cpcv2-pytorch",
    "cpcv2_pytorch.wide_resnet": "cpcv2-pytorch",
    "greedy_infomax.modules": "greedy-infomax",
    "pixel_cnn_pp.model_1ch": "pixel-cnn-pp",
    "pixel_cnn_pp.model_3ch": "pixel-cnn-pp",
}


def convert(*arguments):
    return main([str(argument) for argument in arguments])


def weights_of(path):
    with safe_open(path, "pt") as file:
        return {
            name.removeprefix("state."): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 - not a mapping
            if name.startswith("state.")
        }


def assert_equal_states(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("name", RUNS)
def test_golden_checkpoints_become_runs_and_come_back(name, tmp_path, capsys):
    source, checkpoint = RUNS[name], GOLDEN / f"{name}.safetensors"
    assert convert(checkpoint, "--source", source, "--out", tmp_path / "run") == 0
    assert f"of {source}" in capsys.readouterr().out

    for file in ("back.safetensors", "back.pt"):
        assert convert(tmp_path / "run", "--to", source, "--out", tmp_path / file) == 0
    expected = weights_of(checkpoint)
    assert_equal_states(load_file(tmp_path / "back.safetensors"), expected)
    assert_equal_states(torch.load(tmp_path / "back.pt", weights_only=True), expected)

    # The run's config describes the model, down to the last tensor.
    model = load_reference(checkpoint, source).state_dict()
    saved = load_checkpoint(tmp_path / "run" / "checkpoint.pt")["model"]
    prefix = "encoder." if "resnet" in name else ""
    assert all(torch.equal(value, saved[prefix + key]) for key, value in model.items())
    assert bool(prefix) == (len(saved) > len(model))


def test_what_is_recognised_is_in_the_config(tmp_path):
    assert convert(GOLDEN / "cpcv2_pytorch.cpc_4dir.safetensors", "--source", "cpcv2-pytorch", "--out", tmp_path) == 0
    config = load_config(tmp_path / "config.yaml")
    assert (config.model, config.data.dataset) == ("cpc-v1", "cifar10")
    assert (config.view.crop, config.view.grid_size, config.view.patch, config.view.gray) == (30, 5, 10, False)
    assert config.cpc.encoder == "resnet:blocks=1-1-1,channels=8-16-32,stem=cifar"
    assert (config.cpc.norm, config.cpc.context_layers, config.cpc.pred_steps) == ("layer", 4, 3)
    assert (config.cpc.pred_directions, config.cpc.neg_samples) == (4, 4)


def test_options_say_what_a_checkpoint_does_not(tmp_path):
    options = ("--dataset", "stl10", "--data-dir", "images", "--grid-size", "7", "--image-size", "64")
    checkpoint = GOLDEN / "cpcv2_pytorch.resnet_layer.safetensors"
    assert convert(checkpoint, "--source", "cpcv2-pytorch", "--out", tmp_path, *options, "--norm", "instance") == 0
    config = load_config(tmp_path / "config.yaml")
    assert (config.data.dataset, str(config.data.data_dir)) == ("stl10", "images")
    assert (config.view.crop, config.view.grid_size, config.view.gray, config.cpc.norm) == (64, 7, True, "instance")


@pytest.mark.parametrize("name", ["cpcv2_pytorch.cpc_1dir", "cpcv2_pytorch.wide_resnet", "greedy_infomax.modules"])
def test_converted_checkpoints_are_trained_on_and_evaluated(train_fully, tiny_dataset, tmp_path, capsys, name):
    run, new = tmp_path / "run", tmp_path / "new"
    small = {"greedy_infomax.modules": ("--patch-size", "8", "--grid-size", "5")}
    checkpoint = GOLDEN / f"{name}.safetensors"
    assert convert(checkpoint, "--source", RUNS[name], "--out", run, *small.get(name, ())) == 0

    view = ("--crop", "24") if name in small else ("--crop", "30")
    options = (*view, "--pred-steps", "2" if name in small else "3", "--steps", "1", "--lr", "1e-9")
    assert train_fully("--resume-from", run, "--out-dir", new, *options) == 0

    before, after = (load_checkpoint(path / "checkpoint.pt") for path in (run, new))
    assert after["step"] == 1
    for key, value in before["model"].items():
        torch.testing.assert_close(after["model"][key], value.to(after["model"][key].dtype), atol=1e-6, rtol=1e-5)
    assert (new / "encoder.safetensors").is_file()
    assert load_config(new / "config.yaml").cpc.encoder == load_config(run / "config.yaml").cpc.encoder
    labels = ("--labels", "1", "--repeats", "1", "--finetune-steps", "2", "--finetune-epochs", "1")
    assert evaluate.main([str(run), "--mode", "knn,finetune", *labels, "--device", "cpu"]) == 0
    assert (run / "evaluation" / "evaluation.json").is_file()

    capsys.readouterr()
    assert program.main(["--resume", "--out-dir", str(run)]) == 1
    assert "start from it with --resume-from" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["pixel_cnn_pp.model_1ch", "pixel_cnn_pp.model_3ch"])
def test_images_are_drawn_from_a_converted_checkpoint(tmp_path, name, capsys):
    checkpoint = GOLDEN / f"{name}.safetensors"
    assert convert(checkpoint, "--source", "pixel-cnn-pp", "--out", tmp_path / "run", "--image-size", "16") == 0
    assert "normalised" not in capsys.readouterr().out  # Models of pixels see values as they are.
    assert sample.main([str(tmp_path / "run"), "--n", "1", "--device", "cpu"]) == 0
    image = Image.open(tmp_path / "run" / "sampled.png")
    assert image.width == image.height >= 16
    assert len(np.unique(np.asarray(image))) > 16


def test_pixelcnnpp_trains_on(train_fully, monkeypatch, tmp_path, tiny_dataset):
    monkeypatch.setattr(pixel_task, "_SAMPLES", 1)
    monkeypatch.setattr(pixel_task.PixelTask, "evaluate", lambda task: {})
    checkpoint = GOLDEN / "pixel_cnn_pp.model_3ch.safetensors"
    assert convert(checkpoint, "--source", "pixel-cnn-pp", "--out", tmp_path / "run") == 0
    options = ("--batch-size", "4", "--steps", "1", "--lr", "1e-9", "--precision", "fp32", "--sample-every", "9")
    monkeypatch.setattr(pixel_task.PixelTask, "observe", lambda *arguments: {})
    arguments = ["--resume-from", str(tmp_path / "run"), "--out-dir", str(tmp_path / "new"), *options]
    assert program.main(arguments) == 0
    after = load_checkpoint(tmp_path / "new" / "checkpoint.pt")
    for key, value in weights_of(checkpoint).items():
        mine = key.replace(".conv.", ".").replace(".deconv.", ".").replace(".lin_a.", ".")
        for state, prefix in ((after["model"], ""), (after["task"], "average.")):
            torch.testing.assert_close(state[prefix + mine], value.float(), atol=1e-6, rtol=1e-5)


def test_greedy_infomax_in_files(tmp_path):
    encoder = ResNetV2Encoder(None, 1, blocks=(1, 1), channels=(4, 8), stem_channels=4)
    state = export_reference(GreedyInfoMax(encoder, 2, pred_steps=2), "greedy-infomax")
    files = [tmp_path / "model_0.ckpt", tmp_path / "model_1.ckpt"]
    parts = [
        {
            name.removeprefix(f"encoder.{index}."): value
            for name, value in state.items()
            if name.startswith(f"encoder.{index}.")
        }
        for index in range(2)
    ]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, file)
    assert convert(*files, "--source", "greedy-infomax", "--out", tmp_path / "run") == 0
    assert load_config(tmp_path / "run" / "config.yaml").greedy.modules == 2
    assert convert(tmp_path / "run", "--to", "greedy-infomax", "--out", tmp_path / "again.ckpt") == 0
    for index, part in enumerate(parts):
        assert_equal_states(torch.load(tmp_path / f"again_{index}.ckpt", weights_only=True), part)


@pytest.mark.parametrize("kind", ["cpc", "supervised", "uneven"])
def test_other_forms_of_greedy_infomax(tmp_path, kind):
    encoder = ResNetV2Encoder(None, 1, blocks=(1, 1, 1), channels=(4, 8, 8), stem_channels=4)
    if kind == "cpc":
        model = GreedyInfoMax(encoder, 1, context=GatedPixelCNNContext(8, 2), pred_steps=2)
    elif kind == "supervised":
        model = GreedySupervised(encoder, 3, classes=5)
    else:
        model = GreedyInfoMax(encoder, (1,), pred_steps=2)
    torch.save(export_reference(model, "greedy-infomax"), tmp_path / "model.ckpt")
    assert convert(tmp_path / "model.ckpt", "--source", "greedy-infomax", "--out", tmp_path / "run") == 0
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.greedy.count, config.greedy.split_at) == (
        len(model.encoder_modules),
        (1,) if kind == "uneven" else None,
    )
    assert_equal_states(load_checkpoint(tmp_path / "run" / "checkpoint.pt")["model"], model.state_dict())
    assert convert(tmp_path / "run", "--to", "greedy-infomax", "--out", tmp_path / "back.ckpt") == 0
    assert_equal_states(
        torch.load(tmp_path / "back.ckpt", weights_only=True),
        torch.load(tmp_path / "model.ckpt", weights_only=True),
    )


def test_lightning_bolts(train_fully, tiny_dataset, monkeypatch, tmp_path):
    """Its whole model, with a stand-in for timm, which is not installed everywhere."""
    monkeypatch.setitem(sys.modules, "timm", TIMM)
    context = ResidualContext(4, 6, 2, padding="lightning-bolts")
    objective = TargetInfoNCE(4, target_channels=3, reduction="lightning-bolts")
    model = CPC(TimmEncoder("resnet18"), context, objective)
    state = export_reference(model, "lightning-bolts") | {"encoder.fc.weight": torch.ones(2, 4)}
    torch.save({"state_dict": state, "hyper_parameters": {"patch_size": 8}}, tmp_path / "bolts.ckpt")

    assert convert(tmp_path / "bolts.ckpt", "--source", "lightning-bolts", "--out", tmp_path / "run") == 0
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.model, config.cpc.encoder, config.cpc.variant) == ("cpc-v2", "timm:resnet18", "lightning-bolts")
    assert (config.view.crop, config.view.patch, config.view.stride, config.data.dataset) == (32, 8, 4, "cifar10")
    assert_equal_states(load_checkpoint(tmp_path / "run" / "checkpoint.pt")["model"], model.state_dict())
    assert convert(tmp_path / "run", "--to", "lightning-bolts", "--out", tmp_path / "back.ckpt") == 0
    assert_equal_states(torch.load(tmp_path / "back.ckpt", weights_only=True), state)

    task = CPCv2Task(config, tiny_dataset, torch.device("cpu"))
    task.model.load_state_dict(model.state_dict())
    patches = torch.randn(2, 7, 7, 3, 8, 8)
    assert torch.equal(task.model.eval()(patches).loss, model.eval()(patches).loss)

    options = ("--batch-size", "4", "--steps", "1", "--precision", "fp32", "--no-patch-augmentation")
    assert program.main(["--resume-from", str(tmp_path / "run"), "--out-dir", str(tmp_path / "new"), *options]) == 0
    metrics = read_metrics(tmp_path / "new" / "metrics.jsonl")
    assert np.isfinite(metrics[-1]["loss"])


@pytest.mark.parametrize("dataset", ["textures", "stl10"])
def test_a_run_of_lightning_bolts_has_its_scale(dataset, monkeypatch, tmp_path):
    """The program multiplies predictions by 0.1, whatever a run on such images would do."""
    monkeypatch.setitem(sys.modules, "timm", TIMM)
    objective = TargetInfoNCE(4, target_channels=3, reduction="lightning-bolts")
    model = CPC(TimmEncoder("resnet18"), ResidualContext(4, 6, 2, padding="lightning-bolts"), objective)
    state = export_reference(model, "lightning-bolts")
    torch.save(state, tmp_path / "bolts.ckpt")
    source = (tmp_path / "bolts.ckpt", "--source", "lightning-bolts")
    assert convert(*source, "--dataset", dataset, "--out", tmp_path / "run") == 0
    assert load_config(tmp_path / "run" / "config.yaml").cpc.prediction_scale == 0.1
    assert convert(tmp_path / "run", "--to", "lightning-bolts", "--out", tmp_path / "back.ckpt") == 0
    assert_equal_states(torch.load(tmp_path / "back.ckpt", weights_only=True), state)


def test_the_variant_of_lightning_bolts_predicts_all_steps(capsys):
    with pytest.raises(SystemExit):
        parse(["--model", "cpc-v2", "--device", "cpu", "--variant", "lightning-bolts"])
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "it needs --pred-directions 1 --pred-steps 4" in message
    options = ("--model", "cpc-v2", "--device", "cpu", "--pred-directions", "1", "--pred-steps", "4")
    assert parse([*options, "--variant", "lightning-bolts"]).run.cpc.variant == "lightning-bolts"


def test_a_trained_run_goes_to_the_program_and_back(train, tmp_path):
    """Not of a converted checkpoint: nothing is known but the run."""
    options = ("--encoder", "resnet:blocks=1-1,channels=8-16,stem=cifar,stem_channels=8", "--context-layers", "2")
    assert train("--out-dir", tmp_path / "run", *options, "--steps", "1") == 0
    assert convert(tmp_path / "run", "--to", "cpcv2-pytorch", "--out", tmp_path / "cpc.pt") == 0
    options = ("--source", "cpcv2-pytorch", "--norm", "layer", "--out", tmp_path / "back")
    assert convert(tmp_path / "cpc.pt", *options) == 0
    assert_equal_states(*(load_checkpoint(tmp_path / run / "checkpoint.pt")["model"] for run in ("run", "back")))


SOUND = {
    "cpc_audio_lstm_linear": ("cpc-audio", "cpc-audio"),
    "greedy_infomax_audio_cpc": ("greedy-infomax-audio", "cpc-audio"),
    "greedy_infomax_audio_gim6": ("greedy-infomax-audio", "greedy-infomax-audio"),
}


@pytest.mark.parametrize("name", SOUND)
def test_models_of_sound(name, tmp_path, capsys):
    """A run that computes the features of the checkpoint, goes on training, and comes back as it was."""
    source, model = SOUND[name]
    path, run = CHECKPOINTS / name, tmp_path / "run"
    assert convert(path, "--source", source, "--out", run, "--dataset", "voices") == 0
    assert "mean and deviation" not in capsys.readouterr().out
    config = load_config(run / "config.yaml")
    assert (config.model, config.data.dataset) == (model, "voices")
    # The recordings from which the programs take a batch's windows, and so the negatives.
    assert config.view.windows == ("same-speaker" if source == "cpc-audio" else "recordings")
    assert_equal_states(load_checkpoint(run / "checkpoint.pt")["model"], load_reference(path, source).state_dict())

    assert convert(run, "--to", source, "--out", tmp_path / "back.pt") == 0
    original = path / ("checkpoint_0.pt" if source == "cpc-audio" else "model_1.ckpt")
    written, expected = (torch.load(each, weights_only=True) for each in (tmp_path / "back.pt", original))
    for part in ("gEncoder", "cpcCriterion") if source == "cpc-audio" else (None,):
        assert_equal_states(*(each if part is None else each[part] for each in (written, expected)))

    trained = tmp_path / "trained"
    options = ("--steps", "1", "--batch-size", "4", "--window", "3200", "--precision", "fp32", "--lr", "1e-9")
    if model == "cpc-audio":
        options += ("--pred-steps", "5")
    program.main(["--resume-from", str(run), "--out-dir", str(trained), *options])
    for key, value in load_checkpoint(trained / "checkpoint.pt")["model"].items():
        torch.testing.assert_close(value, load_reference(path, source).state_dict()[key], atol=1e-6, rtol=0)


def test_models_of_sound_that_no_run_has():
    def of(context, widths=8, **objective):
        encoder = WaveformEncoder(widths)
        return CPC(encoder, context, SequenceInfoNCE(8, context.out_channels, pred_steps=2, **objective))

    transformer = CausalTransformerContext(8, 9)
    assert sound_options(of(transformer, predictor="transformer", window=9))[1]["view"] == {"window": 1440}
    with pytest.raises(TrainingError, match="windows of 9 frames for contexts and of 12 to predict"):
        sound_options(of(transformer, predictor="transformer", window=12))
    with pytest.raises(TrainingError, match="not a CausalTransformerContext of another kind"):
        sound_options(of(CausalTransformerContext(8, 9, absolute=True)))
    with pytest.raises(TrainingError, match=r"layers have different widths, \[4, 8\]"):
        sound_options(of(RecurrentContext(8, 3), (4, 4, 4, 4, 8)))
    greedy = GreedyInfoMax(
        WaveformEncoder(8), (1, 4), context=RecurrentContext(8, 3), objective=SequenceInfoNCE, pred_steps=2
    )
    with pytest.raises(TrainingError, match="no run has 3 modules of these layers"):
        sound_options(greedy)
    sequential = of(RecurrentContext(8, 3, keep_state=True))
    assert sound_options(sequential)[1]["view"] == {"windows": "sequential"}


@pytest.mark.parametrize(
    ("source", "stem", "dataset"),
    [("solo-learn", "solo-learn", "cifar10"), ("sthalles-simclr", None, "stl10"), ("lightly", None, "folder")],
)
def test_encoders_of_siamese_networks(source, stem, dataset, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "timm", TIMM)
    encoder = TimmEncoder("resnet18", **({} if stem is None else {"stem": stem}))
    state = export_reference(encoder, source) | {"projector.0.weight": torch.ones(2, 4)}
    torch.save({"state_dict": state}, tmp_path / "other.ckpt")
    assert convert(tmp_path / "other.ckpt", "--source", source, "--out", tmp_path / "run") == 0
    assert "the projection head starts from the seed" in capsys.readouterr().out
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.model, config.data.dataset) == ("simclr", dataset)
    assert config.simclr.encoder == "timm:resnet18" + ("" if stem is None else f":stem={stem}")
    assert config.simclr.view_size == {"cifar10": 32, "stl10": 96, "folder": 224}[dataset]
    # Features are of images of the size that the program has them in.
    assert config.simclr.center_scale == 1
    kept = {
        name.removeprefix("encoder."): value
        for name, value in load_checkpoint(tmp_path / "run" / "checkpoint.pt")["model"].items()
        if name.startswith("encoder.")
    }
    assert_equal_states(kept, encoder.state_dict())
    assert convert(tmp_path / "run", "--to", source, "--out", tmp_path / "back.ckpt") == 0
    assert_equal_states(torch.load(tmp_path / "back.ckpt", weights_only=True), state)


def test_what_cannot_be_converted_is_said(tmp_path, capsys, train):
    def error(*arguments):
        assert convert(*arguments) == 1
        return capsys.readouterr().err

    golden = GOLDEN / "cpcv2_pytorch.resnet_none.safetensors"
    assert "give the file of a checkpoint" in error("--source", "cpcv2-pytorch", "--out", tmp_path / "run")
    assert "give either --source" in error(golden, "--out", tmp_path / "run")
    assert "give either --source" in error(golden, "--source", "cpcv2-pytorch", "--to", "pixel-cnn-pp", "--out", "x")
    assert "It looks like cpcv2-pytorch" in error(golden, "--source", "greedy-infomax", "--out", tmp_path / "run")
    assert "cannot read" in error(tmp_path / "none.pt", "--source", "greedy-infomax", "--out", tmp_path / "run")
    context = GOLDEN / "greedy_infomax.pixelcnn.safetensors"
    assert "without an encoder" in error(context, "--source", "greedy-infomax", "--out", tmp_path / "run")
    pixels = GOLDEN / "pytorch_generative.gated_pixelcnn.safetensors"
    assert "no run is made of a BinaryGatedPixelCNN" in error(
        *(pixels, "--source", "pytorch-generative", "--out", tmp_path / "run")
    )
    backwards = GOLDEN / "cpc_audio.reverse.safetensors"
    torch.save(export_reference(load_reference(backwards, "cpc-audio"), "cpc-audio"), tmp_path / "backwards.pt")
    (tmp_path / "checkpoint_args.json").write_text('{"cpc_mode": "reverse"}')
    assert "which run forwards, not a" in error(
        *(tmp_path / "backwards.pt", "--source", "cpc-audio", "--out", tmp_path / "run")
    )
    assert "use a multiple of 8, or give patch_size" in error(
        *(golden, "--source", "cpcv2-pytorch", "--out", tmp_path / "run", "--image-size", "63")
    )
    assert "grid_size must be" in error(
        *(golden, "--source", "cpcv2-pytorch", "--out", tmp_path / "run", "--grid-size", "0")
    )
    assert not (tmp_path / "run").exists()
    assert convert(golden, "--source", "cpcv2-pytorch", "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert "already holds a run" in error(golden, "--source", "cpcv2-pytorch", "--out", tmp_path / "run")
    assert "not a run's folder" in error(tmp_path, "--to", "cpcv2-pytorch", "--out", tmp_path / "x.pt")
    assert "has no model like a CPC" in error(tmp_path / "run", "--to", "greedy-infomax", "--out", tmp_path / "x.pt")
    assert "--dataset: the run of --to has its own" in error(
        *(tmp_path / "run", "--to", "cpcv2-pytorch", "--out", tmp_path / "x.pt", "--dataset", "stl10")
    )
    assert "cannot write" in error(tmp_path / "run", "--to", "cpcv2-pytorch", "--out", tmp_path / "no" / "x.pt")


def test_the_entry_point(tmp_path):
    command = [sys.executable, "-m", "cpc_ext.convert", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--source" in done.stdout
    assert np.array([name in done.stdout for name in set(RUNS.values())]).all()
