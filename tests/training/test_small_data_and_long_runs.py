"""Warnings before a run that would take hours, or whose defaults do not fit the data."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest
import yaml

from cpc_ext.data_sets import DATASETS, medium
from cpc_ext.programs import training
from cpc_ext.programs.train_options import parse
from cpc_ext.training import loop, time_budget
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.presets import preset
from cpc_ext.training.registry import MODELS, model_medium
from cpc_ext.training.time_budget import FirstSteps
from tests.training.conftest import SMALL

SIMCLR = (*("--model", "simclr", "--view-size", "16", "--steps", "2", "--warmup-steps", "1", "--no-evaluate"), *SMALL)


def batch_size(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())["optimization"]["batch_size"]


def test_a_default_batch_shrinks_to_the_data_and_a_given_one_does_not(train_with, tmp_path, capsys):
    """There are 44 images, and SimCLR's batches of textures have 64."""
    first = tmp_path / "first"
    assert train_with(*SIMCLR, "--out-dir", first) == 0
    assert "fills no batch of the default --batch-size 64: this run takes 44\n" in capsys.readouterr().err
    assert batch_size(first) == 44
    assert train_with("--resume", "--out-dir", first, "--steps", "3") == 0
    for given in ("--batch-size=64", "--batch_size=64"):
        assert train_with(*SIMCLR, "--out-dir", tmp_path / "given", given) == 1
        assert "error: --batch-size: expected at most 44 images, got 64" in capsys.readouterr().err
    # An earlier run's is what somebody chose.
    text = (first / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("batch_size: 44", "batch_size: 64"))
    assert train_with("--config", tmp_path / "config.yaml", "--out-dir", tmp_path / "again") == 1
    assert "error: --batch-size: expected at most 44 images, got 64" in capsys.readouterr().err


def test_a_batch_that_shrinks_has_equal_shares_of_processes(train_with, tiny_dataset, tmp_path, capsys):
    config = parse(["--model", "simclr", *SIMCLR[2:]]).run
    error = training.TooFewExamplesError("too few", most=45)
    ranks = training.Ranks(training.torch.device("cpu"), 0, 2)
    assert training._with_smaller_batch(config, error, ranks).optimization.batch_size == 44
    # A single image leaves SimCLR's views none to be told from.
    for most in (1, 3):
        error = training.TooFewExamplesError("too few", most=most)
        ranks = training.Ranks(training.torch.device("cpu"), 0, 2 if most == 1 else 4)
        with pytest.raises(TrainingError, match="too few"):
            training._with_smaller_batch(config, error, ranks)


def test_a_budget_is_measured_with_the_batch_that_shrank(train_with, tmp_path, monkeypatch):
    monkeypatch.setattr(time_budget, "_SHORTEST", 0.05)
    options = [each for each in SIMCLR if each not in ("--steps", "2")]
    assert train_with(*options, "--time-budget", "0.001", "--out-dir", tmp_path / "run") == 0
    assert batch_size(tmp_path / "run") == 44


def test_windows_of_speech_shrink_likewise(tmp_path):
    """A batch has one window of each recording, of which the drawn voices have eleven utterances each."""
    options = ("--model", "cpc-audio", "--windows", "recordings", "--window", "3200", "--steps", "1", "--no-evaluate")
    command = parse([*options, "--device", "cpu", "--precision", "fp32"])
    tree = command.run.model_dump()
    tree["optimization"]["batch_size"] = 10_000
    command = replace(command, run=training.validate_config(tree), out_dir=tmp_path / "run")
    with pytest.raises(TrainingError, match=r"--batch-size: expected at most \d+ recordings windows, got 10000"):
        training.run(replace(command, given=command.given | {"batch_size"}))
    assert training.run(command)[0] == 0
    assert batch_size(tmp_path / "run") == 16 * 11


def test_windows_that_no_recording_fills_are_not_the_batchs_fault(tmp_path):
    options = ("--model", "cpc-audio", "--windows", "recordings", "--window", "1000000", "--batch-size", "2")
    command = replace(parse([*options, "--device", "cpu", "--precision", "fp32"]), out_dir=tmp_path / "run")
    with pytest.raises(TrainingError, match=r"^--window: expected at most \d+ samples, got 1000000$"):
        training.run(command)


def test_a_warm_up_without_an_end_is_told(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path / "long", "--warmup-steps", "16") == 0
    said = "the 8 steps of this run end within its --warmup-steps 16: the learning rate only rises, to 50% of --lr"
    assert said in capsys.readouterr().err
    assert train("--out-dir", tmp_path / "right", "--warmup-steps", "7") == 0
    assert "warmup" not in capsys.readouterr().err


def test_the_first_steps_tell_the_pace():
    first = FirstSteps()
    assert [first.pace(seconds) for seconds in (4.0, 2.0, 1.0)] == [None, None, None]
    assert first.pace(2.5) == 2.0
    # A step that takes long tells it alone.
    assert FirstSteps().pace(9.0) == 9.0


def test_a_run_of_hours_without_a_gpu_says_so_once(train, tmp_path, monkeypatch, capsys):
    said = "without a GPU the 8 steps of this run, of about "
    assert train("--out-dir", tmp_path / "short") == 0
    assert said not in capsys.readouterr().err
    monkeypatch.setattr(loop, "_HOURS", 0.0)
    monkeypatch.setattr(time_budget, "_TELLING", 0.0)
    assert train("--out-dir", tmp_path / "long", "--steps", "8") == 0
    err = capsys.readouterr().err
    assert err.count(said) == 1
    assert "shorter are runs with --time-budget 30, which is as many steps as half an hour has room for, or" in err
    # Who goes on, or gave the time, knows.
    assert train("--out-dir", tmp_path / "long", "--resume", "--steps", "9") == 0
    assert "without a GPU" not in capsys.readouterr().err


def test_a_pace_becomes_hours(train, tmp_path, monkeypatch, capsys):
    paces = iter([7.0])
    monkeypatch.setattr(FirstSteps, "pace", lambda self, seconds: next(paces, None))
    assert train("--out-dir", tmp_path, "--steps", "8", "--warmup-steps", "1") == 0
    assert "hours" not in capsys.readouterr().err
    monkeypatch.setattr(FirstSteps, "pace", lambda self, seconds: 700.0)
    assert train("--out-dir", tmp_path / "long", "--steps", "8", "--warmup-steps", "1") == 0
    assert "the 8 steps of this run, of about 700 s each, take about 1.6 hours" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "dataset"),
    [(model, dataset) for model in MODELS for dataset in DATASETS if medium(dataset) == model_medium(model)],
)
def test_what_makes_a_run_shorter_are_options_that_it_takes(model, dataset):
    shortcuts = preset(model, dataset).shortcuts()
    assert shortcuts[0].startswith("--time-budget 30")
    for shortcut in shortcuts:
        options = shlex.split(re.match(r"[^,]*", shortcut).group())
        run = parse(["--model", model, "--dataset", dataset, *options]).run
        if options[0] == "--image-size":
            assert run.optimization == preset(model, dataset, side=32).optimization
        if options[0] == "--encoder":
            assert run.encoder_section.encoder == "resnet-small"
