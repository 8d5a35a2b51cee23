"""Runs of CPC v2 as a user starts them: files, resumption, and refused options."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from functools import partial

import pytest
import torch
from safetensors import safe_open

from cpc_ext import models
from cpc_ext.programs.train_options import describe, parse
from cpc_ext.tasks.cpc_v2.task import CPCv2Task
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import load_config
from cpc_ext.training.presets import preset
from cpc_ext.training.run_log import read_metrics
from tests.training.conftest import PNG, SHORT, SMALL

TINY = (
    *SMALL,
    *("--model", "cpc-v2", "--crop", "24", "--grid-size", "5", "--pred-steps", "2"),
    *("--context-layers", "1", "--context-channels", "8", "--target-channels", "6"),
    *SHORT,
)


@pytest.fixture
def train(train_with):
    """The program with tiny options, in this process: train(*more options) → exit status."""
    return partial(train_with, *TINY)


def test_run_leaves_everything(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path) == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 6, 8]
    most = math.log(5 * 5 * 8)  # All patches of the batch.
    assert records[0]["loss"] == pytest.approx(most, rel=0.1)
    for record in records:
        assert 0 <= record["accuracy"] <= 1
        assert record["mutual_information"] == pytest.approx(most - record["loss"], abs=1e-5)

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["model"] == "cpc-v2"
    assert summary["chance_accuracy"] == pytest.approx(0.1)
    assert 0 <= summary["probe_accuracy"] <= 1
    assert 0 <= summary["untrained_probe_accuracy"] <= 1
    for name in ("curves.png", "inputs.png", "neighbours.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG), name
    config = load_config(tmp_path / "config.yaml")
    assert (config.cpc.pred_directions, config.cpc.norm, config.view.gray) == (4, "batch", True)
    assert describe(config) in capsys.readouterr().out

    file = safe_open(tmp_path / "encoder.safetensors", "pt")
    encoder = getattr(models, file.metadata()["class"])(**json.loads(file.metadata()["encoder"]))
    encoder.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
    trained = load_checkpoint(tmp_path / "checkpoint.pt")["model"]
    assert torch.equal(encoder.conv1.weight, trained["encoder.conv1.weight"])
    assert len({name.split(".")[1] for name in trained if name.startswith("context.")}) == 4


def test_patch_augmentation_changes_the_training_and_not_the_evaluation(train, tmp_path):
    for name in ("patch-augmentation", "no-patch-augmentation"):
        assert train("--out-dir", tmp_path / name, f"--{name}", "--steps", "1") == 0
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in sorted(os.listdir(tmp_path)))
    assert one["loss"] != other["loss"]
    one, other = (json.loads((tmp_path / n / "summary.json").read_text()) for n in sorted(os.listdir(tmp_path)))
    assert one["untrained_probe_accuracy"] == other["untrained_probe_accuracy"]
    file = safe_open(tmp_path / "patch-augmentation" / "encoder.safetensors", "pt")
    assert "augmentation" not in json.loads(file.metadata()["view"])


def test_shared_context(train, tmp_path, monkeypatch):
    monkeypatch.setattr(CPCv2Task, "evaluate", lambda task: {})
    assert train("--out-dir", tmp_path, "--shared-context", "--steps", "1", "--encoder", "wrn-10-1") == 0
    names = load_checkpoint(tmp_path / "checkpoint.pt")["model"]
    assert {name.split(".")[1] for name in names if name.startswith("context.")} == {"blocks"}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_run_is_the_uninterrupted_one(train, interrupted_as_whole, precision):
    interrupted_as_whole(train, CPCv2Task, "--precision", precision, "--pad", "2", "--patch-augmentation")


def test_a_padded_image_may_be_smaller_than_the_crop(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(CPCv2Task, "evaluate", lambda task: {})
    assert train("--out-dir", tmp_path / "larger", "--crop", "36", "--pad", "2", "--steps", "1") == 0
    assert train("--out-dir", tmp_path / "too-large", "--crop", "36", "--pad", "1", "--steps", "1") == 1
    assert "--crop 36 is larger than the images of textures, 32 pixels and --pad 1 around" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--neg-samples", "16"],
            "--neg-samples is an option of --model cpc-audio, cpc-v1, greedy-infomax, greedy-infomax-audio; cpc-v2",
        ),
        (["--target-channels", "0"], "--target-channels: input should be greater than or equal to 1, got 0"),
        (["--pad", "-1"], "--pad: input should be greater than or equal to 0, got -1"),
        (["--pred-steps", "5"], "--grid-size 6 has only 5 rows below the first"),
        (["--encoder", "wrn-28"], "--encoder: expected one of resnet-small,"),
    ],
)
def test_wrong_options(capsys, options, expected):
    with pytest.raises(SystemExit):
        parse(["--model", "cpc-v2", *options])
    assert expected in re.sub(r"[\s│]+", " ", capsys.readouterr().err)


def test_presets_are_the_published_settings():
    cifar, folder = preset("cpc-v2", "cifar10"), preset("cpc-v2", "folder")
    view = cifar.view
    assert (view.crop, view.pad, view.grid_size, view.patch, view.stride) == (30, 2, 5, 10, 5)
    assert (cifar.cpc.encoder, cifar.cpc.norm, cifar.cpc.pred_directions) == ("wrn-28-2", "layer", 4)
    assert cifar.optimization.epochs == 500
    view = folder.view
    assert (folder.data.image_size, view.crop, view.grid_size, view.patch, view.stride) == (300, 260, 6, 80, 36)
    assert cifar.view.patch_augmentation
    assert view.patch_augmentation
    assert (folder.cpc.encoder, folder.cpc.context_layers, folder.cpc.context_channels) == ("resnet161", 5, 256)
    assert not view.gray


def test_timm_that_is_not_installed(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert train("--out-dir", tmp_path / "run", "--encoder", "timm:resnet18") == 1
    assert "pip install 'cpc_ext[timm]'" in capsys.readouterr().err


def test_timm_backbones(train, tmp_path, capsys, monkeypatch):
    pytest.importorskip("timm", exc_type=ImportError)
    monkeypatch.setattr(CPCv2Task, "evaluate", lambda task: {})
    assert train("--out-dir", tmp_path / "run", "--encoder", "timm:resnet10t", "--steps", "1") == 0
    assert train("--out-dir", tmp_path / "vit", "--encoder", "timm:vit_tiny_patch16_224") == 1
    assert "vit_tiny_patch16_224 of timm does not take patches of 8 pixels" in capsys.readouterr().err
    assert train("--out-dir", tmp_path / "none", "--encoder", "timm:vgg0") == 1
    assert "timm makes no backbone 'vgg0'" in capsys.readouterr().err
