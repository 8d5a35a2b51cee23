"""Runs of MoCo and of supervised contrast as a user starts them: files, resumption, and refused options."""

from __future__ import annotations

import dataclasses
import json
from functools import partial

import pytest
import torch

from cpc_ext.tasks.moco.task import MoCoTask
from cpc_ext.tasks.supcon.task import SupConTask
from cpc_ext.training import run_data
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.run_log import read_metrics
from tests.training.conftest import PNG, SHORT, SMALL

TASKS = {"moco": MoCoTask, "supcon": SupConTask}
OPTIONS = {"moco": ("--queue-size", "24"), "supcon": ()}


@pytest.fixture(params=TASKS)
def model(request):
    return request.param


@pytest.fixture
def train(train_with, model):
    """The program with tiny options, in this process: train(*more options) → exit status."""
    views = ("--view-size", "24", "--center-scale", "1.5")
    tiny = ("--model", model, *views, "--projection-channels", "8", *OPTIONS[model])
    return partial(train_with, *SMALL, *tiny, *SHORT)


def test_run_leaves_everything(train, model, tmp_path):
    assert train("--out-dir", tmp_path) == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 6, 8]
    assert all(record["loss"] > 0 and 0 <= record["accuracy"] <= 1 for record in records)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["model"] == model
    assert 0 <= summary["probe_accuracy"] <= 1
    for name in ("curves.png", "inputs.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG), name
    assert (tmp_path / "encoder.safetensors").is_file()


@pytest.mark.parametrize("optimizer", ["adam", "lars", "sgd"])
def test_resumed_run_is_the_uninterrupted_one(train, model, interrupted_as_whole, optimizer):
    interrupted_as_whole(train, TASKS[model], "--precision", "fp32", "--optimizer", optimizer)


def test_key_networks_follow_in_a_run(train, model, tmp_path):
    if model != "moco":
        pytest.skip("has none")
    assert train("--out-dir", tmp_path, "--key-momentum", "0.0") == 0
    weights = load_checkpoint(tmp_path / "checkpoint.pt")["model"]
    learnt = [name for name in weights if name.startswith("encoder.") and "running" not in name]
    assert learnt
    assert all(torch.equal(weights[name], weights[f"key_{name}"]) for name in learnt if "num_batches" not in name)


def test_images_without_labels(train, model, tmp_path, capsys, monkeypatch):
    if model != "supcon":
        pytest.skip("needs none")
    load = run_data.load_dataset

    def without(*arguments, **options):
        dataset = load(*arguments, **options)
        plain = {
            name: dataclasses.replace(getattr(dataset, name), labels=None) for name in ("pretrain", "train", "test")
        }
        return dataclasses.replace(dataset, **plain)

    monkeypatch.setattr(run_data, "load_dataset", without)
    assert train("--out-dir", tmp_path / "run") == 1
    assert "--model supcon: the images of textures have no labels" in capsys.readouterr().err
