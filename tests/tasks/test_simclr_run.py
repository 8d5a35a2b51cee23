"""Runs of SimCLR as a user starts them: files, resumption, and baselines."""

from __future__ import annotations

import json
import re
from functools import partial

import pytest
import torch
from safetensors import safe_open

from cpc_ext.models import ResNetV2Encoder
from cpc_ext.programs.train_options import parse
from cpc_ext.tasks.simclr.task import SimCLRTask
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import load_config
from cpc_ext.training.run_log import read_metrics
from tests.training.conftest import PNG, SHORT, SMALL

TINY = (
    *SMALL,
    *("--model", "simclr", "--view-size", "24", "--projection-channels", "8"),
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
def test_resumed_run_is_the_uninterrupted_one(train, interrupted_as_whole, precision):
    interrupted_as_whole(train, SimCLRTask, "--precision", precision)


@pytest.mark.parametrize("model", ["simclr", "moco", "supcon"])
@pytest.mark.parametrize("taps", ["4", "49"])
def test_blur_that_does_not_fit(capsys, model, taps):
    with pytest.raises(SystemExit):
        parse(["--model", model, "--view-size", "24", "--blur-kernel", taps])
    said = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert f"--blur-kernel {taps} is neither 0 nor an odd number below 2 * --view-size 24" in said
    assert parse(["--model", model, "--view-size", "24", "--blur-kernel", "47"]).run.encoder_section.blur_kernel == 47


@pytest.mark.parametrize("model", ["simclr", "supcon"])
def test_a_batch_of_one_image_has_none_to_tell_it_from(capsys, model):
    with pytest.raises(SystemExit):
        parse(["--model", model, "--batch-size", "1"])
    said = re.sub(r"[\s│]+", " ", capsys.readouterr().err)
    assert f"--batch-size 1 leaves the views of an image none to be told from: {model} needs 2 or more" in said
    assert parse(["--model", "moco", "--batch-size", "1"]).run.optimization.batch_size == 1
