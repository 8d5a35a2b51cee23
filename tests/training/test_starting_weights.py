"""--resume-from: a new run starts with the weights of another run, and takes its options as defaults."""

from __future__ import annotations

import pytest
import torch

from cpc_ext.programs import training as program
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.config import load_config

# At this learning rate a step changes nothing that float32 shows.
STILL = ("--lr", "1e-12", "--steps", "1")


def weights(run):
    return load_checkpoint(run / "checkpoint.pt")["model"]


def test_weights_and_options_of_the_other_run(train, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train("--out-dir", first, "--context-layers", "2", "--lr", "3e-3") == 0
    arguments = ["--resume-from", first, "--out-dir", second, "--seed", "7", "--steps", "2", "--lr", "1e-12"]
    assert program.main([str(argument) for argument in arguments]) == 0
    assert f"from the weights of {first}" in capsys.readouterr().out

    before, after = load_config(first / "config.yaml"), load_config(second / "config.yaml")
    assert after.cpc == before.cpc
    assert after.view == before.view
    assert (after.optimization.resume_from, after.optimization.steps, after.compute.seed) == (first, 2, 7)
    for name, value in weights(first).items():
        torch.testing.assert_close(weights(second)[name], value, atol=1e-9, rtol=1e-6)
    # Optimizer, step and data order are those of a new run.
    assert load_checkpoint(second / "checkpoint.pt")["step"] == 2


def test_the_new_run_goes_on_and_is_repeated_like_any_other(train, tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert train("--out-dir", first) == 0
    assert train("--resume-from", first, "--out-dir", second, "--steps", "2") == 0
    assert train("--config", second / "config.yaml", "--out-dir", third, "--steps", "2") == 0
    assert all(torch.equal(value, weights(third)[name]) for name, value in weights(second).items())
    assert train("--resume", "--out-dir", second, "--steps", "3") == 0
    assert load_checkpoint(second / "checkpoint.pt")["step"] == 3


def test_weights_of_another_model_are_refused_by_name(train, tmp_path, capsys):
    first = tmp_path / "first"
    assert train("--out-dir", first) == 0
    capsys.readouterr()
    assert train("--resume-from", first, "--out-dir", tmp_path / "second", "--context-layers", "2") == 1
    error = capsys.readouterr().err
    assert "of another model" in error
    assert "context.layers.1.vertical_conv.weight is missing there" in error
    assert train("--resume-from", first, "--out-dir", tmp_path / "second", "--no-gray") == 1
    assert "encoder.conv1.weight is [8, 1, 5, 5] there, [8, 3, 5, 5] here" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--resume-from", "nowhere"], "--resume-from: cannot read nowhere/config.yaml"),
        (["--resume", "--out-dir", "a", "--resume-from", "b"], "give either"),
    ],
)
def test_what_is_not_there_or_does_not_go_together(arguments, expected, capsys):
    assert program.main(arguments) == 1
    assert expected in capsys.readouterr().err


def test_a_module_after_those_of_the_other_run(train, tmp_path, capsys):
    greedy = ("--model", "greedy-infomax", "--modules", "2", *STILL)
    with pytest.raises(SystemExit):
        train(*greedy, "--train-module", "1", "--out-dir", tmp_path / "no")
    assert "--train-module 1 needs --resume-from" in capsys.readouterr().err
    assert train(*greedy, "--train-module", "0", "--out-dir", tmp_path / "0") == 0
    assert train("--resume-from", tmp_path / "0", *STILL, "--train-module", "1", "--out-dir", tmp_path / "1") == 0
    assert load_config(tmp_path / "1" / "config.yaml").greedy.modules == 2
    for name, value in weights(tmp_path / "0").items():
        torch.testing.assert_close(weights(tmp_path / "1")[name], value, atol=1e-9, rtol=1e-6)
    assert train("--resume-from", tmp_path / "0", "--train-module", "1", "--flip", "--no-flip", "--steps", "1") == 1
    assert "--flip is True there, False here" in capsys.readouterr().err
