"""Runs of SimCLR as a user starts them: what they leave, how they resume, what they are measured against."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch
from safetensors import safe_open

from cpc_ext.models import ResNetV2Encoder
from cpc_ext.programs import training as program
from cpc_ext.tasks.simclr.task import SimCLRTask
from cpc_ext.training import run_data
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import load_config
from cpc_ext.training.run_log import read_metrics
from tests.training.conftest import SMALL

TINY = (
    *SMALL,
    *("--model", "simclr", "--view-size", "24", "--projection-channels", "8", "--batch-size", "8", "--steps", "8"),
    *("--log-every", "3", "--checkpoint-every", "4", "--warmup-steps", "2", "--device", "cpu", "--precision", "fp32"),
)
TIMES = ("images_per_second", "seconds")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def train(monkeypatch, tiny_dataset, quick_ends):
    """The program with tiny options, in this process: train(*more options) → exit status."""
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: tiny_dataset)
    return lambda *options: program.main([*TINY, *map(str, options)])


def without_times(records):
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def test_run_leaves_everything(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path) == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 6, 8]
    for record in records:
        assert record["loss"] > 0
        assert 0 <= record["accuracy"] <= record["top5_accuracy"] <= 1
        assert 1 <= record["mean_position"] <= 15
        assert record["mutual_information"] == pytest.approx(torch.tensor(15.0).log().item() - record["loss"], abs=1e-5)

    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["model"] == "simclr"
    assert summary["chance_accuracy"] == pytest.approx(0.1)
    assert 0 <= summary["probe_accuracy"] <= 1
    assert 0 <= summary["untrained_probe_accuracy"] <= 1
    for name in ("curves.png", "inputs.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG), name
    assert load_config(tmp_path / "config.yaml").optimization.weight_decay == 1e-4
    assert "linear probe:" in capsys.readouterr().out

    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    encoder = ResNetV2Encoder(**json.loads(metadata["encoder"]))
    encoder.load_state_dict(weights)
    trained = load_checkpoint(tmp_path / "checkpoint.pt")["model"]
    assert torch.equal(encoder.conv1.weight, trained["encoder.conv1.weight"])
    assert json.loads(metadata["view"])["size"] == 24


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_is_the_uninterrupted_one(train, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(SimCLRTask, "evaluate", lambda task: {})
    monkeypatch.setattr(SimCLRTask, "save", lambda task, run: None)
    original, count = SimCLRTask.losses, 0

    def losses(self, *arguments):
        nonlocal count
        count += 1
        if count == 13:  # The fifth step of the second run.
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(SimCLRTask, "losses", losses)
    assert train("--out-dir", tmp_path / "whole", "--precision", precision) == 0
    assert train("--out-dir", tmp_path / "parts", "--precision", precision) == 130
    assert train("--out-dir", tmp_path / "parts", "--precision", precision, "--resume") == 0
    whole, parts = (without_times(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("whole", "parts"))
    assert whole == parts
    states = [load_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "parts")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_blur_that_does_not_fit(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path / "run", "--blur-kernel", "4") == 1
    assert "blur_kernel: expected an odd number" in capsys.readouterr().err
