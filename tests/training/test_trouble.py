"""Losses that are not finite, and full disks: kept files and messages."""

from __future__ import annotations

import json
import re
import resource

import pytest
import torch

from cpc_ext.tasks.cpc_v1.task import CPCv1Task
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.run_log import read_metrics


def spoil_loss(values):
    values["loss"] = values["loss"] * float("nan")


def test_loss_that_is_not_finite_stops_the_run(train, at_step, tmp_path, capsys):
    at_step(5, spoil_loss)
    assert train("--out-dir", tmp_path, "--lr", "0.004", "--schedule", "constant") == 1
    error = capsys.readouterr().err
    assert "not finite at step 5 (learning rate 0.004)" in error
    assert "the checkpoint of step 4 is kept" in error
    assert "Try a lower --lr than 0.004" in error
    assert "Traceback" not in error
    good = load_checkpoint(tmp_path / "checkpoint.pt")
    assert good["step"] == 4
    assert all(value.isfinite().all() for value in good["model"].values())
    assert load_checkpoint(tmp_path / "diverged.pt")["step"] == 6  # Noticed at the next log line.
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [3]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_checkpoint_is_never_made_of_parameters_that_are_not_finite(train, monkeypatch, tmp_path, capsys, precision):
    """The loss of the step is fine, its update is not, and a checkpoint is due right after it."""
    original, steps = torch.optim.Adam.step, 0

    def step(self, *arguments, **options):
        nonlocal steps
        steps += 1
        original(self, *arguments, **options)
        if steps == 4:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0] = float("inf")

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    assert train("--out-dir", tmp_path, "--precision", precision, "--log-every", "100") == 1
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 0
    assert "step 4" in capsys.readouterr().err


def test_full_disk_while_training_costs_checkpoints_only(train, monkeypatch, tmp_path, capsys):
    """The limit on file sizes makes every write fail with a real error of the system, as a full disk does."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    original, steps, during = CPCv1Task.losses, 0, {}

    def losses(self, *arguments):
        nonlocal steps
        steps += 1
        if steps == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
        if steps == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            during["step"] = load_checkpoint(tmp_path / "checkpoint.pt")["step"]
            during["temporary"] = list(tmp_path.glob(".*.tmp"))
        return original(self, *arguments)

    monkeypatch.setattr(CPCv1Task, "losses", losses)
    try:
        assert train("--out-dir", tmp_path) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert during == {"step": 0, "temporary": []}
    assert capsys.readouterr().err.count("could not save step 4") == 1
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 8


def test_encodings_that_cannot_be_measured_do_not_cost_the_encoder(train_fully, monkeypatch, tmp_path, capsys):
    original = CPCv1Task.features
    monkeypatch.setattr(CPCv1Task, "features", lambda *arguments: original(*arguments) * float("inf"))
    assert train_fully("--out-dir", tmp_path) == 0
    assert re.search(r"could not be evaluated: .*expected finite numbers, got \d+ of", capsys.readouterr().err)
    assert (tmp_path / "encoder.safetensors").is_file()
    assert "probe_accuracy" not in json.loads((tmp_path / "summary.json").read_text())


def test_disk_that_fills_up_at_the_end(train_fully, monkeypatch, tmp_path, capsys):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    original = CPCv1Task.save

    def save(self, run):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
        original(self, run)

    monkeypatch.setattr(CPCv1Task, "save", save)
    try:
        assert train_fully("--out-dir", tmp_path, "--steps", "2") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    error = capsys.readouterr().err
    assert "could not write to" in error
    assert "Traceback" not in error
    monkeypatch.setattr(CPCv1Task, "save", original)
    assert train_fully("--out-dir", tmp_path, "--resume") == 0
    assert (tmp_path / "summary.json").exists()
