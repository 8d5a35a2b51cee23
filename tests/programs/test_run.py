"""The training program as a user runs it: a run's files, its repetition, and refused runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open

from cpc_ext import models
from cpc_ext.tasks.cpc_v1.task import CPCv1Task
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import load_config
from cpc_ext.training.run_log import read_metrics
from tests.training.conftest import PNG, logged


def test_run_leaves_everything(train_fully, tmp_path, capsys):
    assert train_fully("--out-dir", tmp_path / "run") == 0
    run = tmp_path / "run"

    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [3, 6, 8]
    for record in records:
        assert record["loss"] > 0
        assert 0 <= record["accuracy"] <= 1
        assert record["grad_norm"] > 0
        assert record["images_per_second"] > 0
    assert [record["epoch"] for record in records] == [0.6, 1.2, 1.6]  # 5 batches of 8 in 44 images
    assert records[0]["loss"] == pytest.approx(torch.tensor(17.0).log().item(), rel=0.1)  # 1 in 17, untrained

    summary = json.loads((run / "summary.json").read_text())
    assert summary["chance_accuracy"] == pytest.approx(0.1)
    assert 0 <= summary["probe_accuracy"] <= 1
    assert 0 <= summary["untrained_probe_accuracy"] <= 1
    assert summary["final_loss"] == records[-1]["loss"]
    assert summary["steps"] == 8
    assert summary["images_per_second"] > 0
    assert summary["peak_memory_bytes"] > 50e6
    assert summary["versions"]["torch"] == torch.__version__

    assert load_checkpoint(run / "checkpoint.pt")["step"] == 8
    assert load_checkpoint(run / "best.pt")["step"] in (4, 8)
    for name in ("curves.png", "inputs.png", "neighbours.png"):
        assert (run / name).read_bytes().startswith(PNG), name
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert load_config(run / "config.yaml").optimization.steps == 8
    assert f"linear probe: {summary['probe_accuracy']:.1%}" in capsys.readouterr().out


def test_encoder_file_rebuilds_the_encoder(train_fully, tmp_path, monkeypatch):
    monkeypatch.setattr(CPCv1Task, "evaluate", lambda task: {})
    assert train_fully("--out-dir", tmp_path, "--encoder", "wrn-10-1", "--steps", "2") == 0

    file = safe_open(tmp_path / "encoder.safetensors", "pt")
    encoder = getattr(models, file.metadata()["class"])(**json.loads(file.metadata()["encoder"]))
    encoder.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict

    assert type(encoder) is models.WideResNetEncoder
    trained = load_checkpoint(tmp_path / "checkpoint.pt")["model"]
    for parameter, value in encoder.state_dict().items():
        assert torch.equal(value, trained[f"encoder.{parameter}"]), parameter
    assert encoder(torch.zeros(1, 2, 2, 1, 8, 8)).shape == (1, encoder.out_channels, 2, 2)
    assert json.loads(file.metadata()["view"])["patch_size"] == 8
    assert json.loads(file.metadata()["config"])["view"]["crop"] == 24


def test_config_file_repeats_the_run(train, tmp_path):
    assert train("--out-dir", tmp_path / "a", "--seed", "3", "--lr", "0.003") == 0
    assert train("--out-dir", tmp_path / "b", "--config", tmp_path / "a" / "config.yaml") == 0
    first, second = (logged(tmp_path / name) for name in "ab")
    assert first == second
    assert (tmp_path / "a" / "config.yaml").read_text() == (tmp_path / "b" / "config.yaml").read_text()

    assert train("--out-dir", tmp_path / "c", "--config", tmp_path / "a" / "config.yaml", "--seed", "4") == 0
    assert load_config(tmp_path / "c" / "config.yaml").optimization.lr == 0.003
    assert logged(tmp_path / "c") != first


def test_training_does_not_depend_on_what_ran_before(train, tmp_path):
    torch.manual_seed(1)
    assert train("--out-dir", tmp_path / "a", "--steps", "2", "--log-every", "1") == 0
    torch.manual_seed(2)
    assert train("--out-dir", tmp_path / "b", "--steps", "2", "--log-every", "1") == 0
    assert logged(tmp_path / "a") == logged(tmp_path / "b")


def test_folders_are_numbered_by_default(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train("--steps", "1") == 0
    assert train("--steps", "1") == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["cpc-v1-textures-001", "cpc-v1-textures-002"]


def test_folder_with_a_run_is_refused(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path, "--steps", "1") == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    assert train("--out-dir", tmp_path, "--steps", "1") == 1
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_folder_that_cannot_be_written_is_told_first(train, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train("--out-dir", tmp_path / "file" / "run") == 1
    error = capsys.readouterr().err
    assert "--out-dir: cannot write" in error
    assert "Traceback" not in error


def test_full_disk_is_told_first(train, tmp_path, capsys, monkeypatch):
    usage = type("Usage", (), {"free": 32 * 2**20})
    monkeypatch.setattr("cpc_ext.training.run_dir.shutil.disk_usage", lambda path: usage)
    assert train("--out-dir", tmp_path / "run") == 1
    assert "has 32 MiB left" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()  # Nothing was written, so nothing remains.


def test_a_run_that_goes_on_needs_no_room_for_the_checkpoints_that_it_has(train, tmp_path, capsys, monkeypatch):
    assert train("--out-dir", tmp_path, "--steps", "4") == 0
    each = (tmp_path / "checkpoint.pt").stat().st_size
    assert (tmp_path / "best.pt").samefile(tmp_path / "checkpoint.pt")
    for room, status in ((1.5, 1), (2.2, 0)):  # Of three, one is there, by two names.
        usage = type("Usage", (), {"free": 32 * 2**20 + room * each})
        monkeypatch.setattr("cpc_ext.training.run_dir.shutil.disk_usage", lambda path, usage=usage: usage)
        assert train("--out-dir", tmp_path, "--resume", "--steps", "6") == status
        assert ("the run needs about" in capsys.readouterr().err) == (status == 1)


def test_batch_larger_than_the_data_set(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path / "run", "--batch-size", "45") == 1
    assert "--batch-size" in capsys.readouterr().err


def test_crop_larger_than_the_images(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path / "run", "--crop", "36") == 1
    assert "--crop 36 is larger than the images of textures, 32 pixels" in capsys.readouterr().err


def test_device_that_is_not_there(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path / "run", "--device", "cuda:63") == 1
    assert "--device cuda:63 is not available" in capsys.readouterr().err


def test_unlabelled_images_train_without_a_probe(train_fully, tmp_path, tiny_dataset, monkeypatch):
    unlabelled = replace(tiny_dataset, train=None, test=replace(tiny_dataset.test, labels=None), classes=())
    monkeypatch.setattr("cpc_ext.training.run_data.load_dataset", lambda *arguments, **options: unlabelled)
    assert train_fully("--out-dir", tmp_path, "--steps", "1") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "probe_accuracy" not in summary
    assert (tmp_path / "neighbours.png").exists()


def test_config_file_is_plain_yaml(train, tmp_path):
    assert train("--out-dir", tmp_path, "--steps", "1") == 0
    tree = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert tree["view"]["crop"] == 24
    assert tree["compute"]["precision"] == "fp32"
