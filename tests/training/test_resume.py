"""Resumption: a resumed run must end as if it had never stopped."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock

from cpc_ext.training import learner
from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import read_metrics
from tests.training.conftest import TIMES, logged


def stop_with(number):
    return lambda values: os.kill(os.getpid(), number)


def assert_equal_trees(left, right, path=""):
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            if key not in TIMES:
                assert_equal_trees(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, pair in enumerate(zip(left, right, strict=True)):
            assert_equal_trees(*pair, f"{path}[{index}]")
    elif isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, path
        assert torch.equal(left, right), path
    else:
        assert left == right, path


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(train, at_step, tmp_path, precision):
    options = ("--precision", precision)
    assert train("--out-dir", tmp_path / "whole", *options) == 0
    # Step 5 lies within an epoch, between two log lines (3, 6) and between two checkpoints (4, 8).
    at_step(5, stop_with(signal.SIGINT))
    assert train("--out-dir", tmp_path / "parts", *options) == 130
    assert load_checkpoint(tmp_path / "parts" / "checkpoint.pt")["step"] == 5
    torch.manual_seed(12345)
    assert train("--out-dir", tmp_path / "parts", *options, "--resume") == 0

    for name in ("checkpoint.pt", "best.pt"):
        assert_equal_trees(*(load_checkpoint(tmp_path / run / name) for run in ("whole", "parts")))
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")


def test_the_log_is_json_where_gradients_overflow(train, tmp_path, monkeypatch):
    """fp16's loss scaling overflows until it has found its factor; the mean of such norms is no number of JSON's."""
    monkeypatch.setattr(learner, "grad_scaler", lambda *given: torch.amp.GradScaler("cpu", init_scale=2.0**30))
    assert train("--out-dir", tmp_path, "--precision", "fp16", "--log-every", "1", "--logger") == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in lines]
    assert len(records) == 8
    assert all("loss" in record for record in records)
    assert ["grad_norm" in record for record in records] != [True] * 8


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_finishes_the_step_and_says_how_to_go_on(train, at_step, tmp_path, capsys, number, status):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    at_step(2, stop_with(number))
    assert train("--out-dir", tmp_path) == status
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 2
    assert f"--resume --out-dir {tmp_path}" in capsys.readouterr().out
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_the_command_to_go_on_with_can_be_copied(train, at_step, tmp_path, capsys):
    folder = tmp_path / "it's mine"
    at_step(2, stop_with(signal.SIGINT))
    assert train("--out-dir", folder) == 130
    _, _, *arguments = shlex.split(capsys.readouterr().out.rpartition("go on with:")[2])
    assert arguments == ["cpc_ext.train", "--resume", "--out-dir", str(folder)]


def test_steps_logged_after_the_checkpoint_are_not_logged_twice(train, at_step, tmp_path):
    class PowerCutError(Exception):
        pass

    def cut(values):
        raise PowerCutError

    at_step(7, cut)  # Steps 3 and 6 are logged; the last checkpoint is that of step 4.
    with pytest.raises(PowerCutError):
        train("--out-dir", tmp_path)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [3, 6]
    assert train("--out-dir", tmp_path, "--resume") == 0
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [3, 6, 8]


def test_run_can_be_made_longer(train, tmp_path):
    assert train("--out-dir", tmp_path, "--steps", "4") == 0
    assert train("--out-dir", tmp_path, "--resume", "--steps", "6") == 0
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 6


def test_run_cannot_be_made_shorter_than_it_is(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path, "--steps", "4") == 0
    assert train("--out-dir", tmp_path, "--resume", "--steps", "3") == 1
    assert "already at step 4" in capsys.readouterr().err


def test_other_options_are_refused(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path, "--steps", "2") == 0
    assert train("--out-dir", tmp_path, "--resume", "--lr", "0.5", "--seed", "7") == 1
    error = capsys.readouterr().err
    assert "--lr is 0.001 in the checkpoint, 0.5 now" in error
    assert "--seed is 0 in the checkpoint, 7 now" in error
    assert "--epochs" in error  # It says what may change.


def test_without_a_checkpoint(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path / "none", "--resume") == 1
    assert f"there is no checkpoint at {tmp_path / 'none'}" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_without_a_folder(train, capsys):
    assert train("--resume") == 1
    assert "--resume needs --out-dir" in capsys.readouterr().err


def test_damaged_checkpoint(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path, "--steps", "4") == 0
    path = tmp_path / "checkpoint.pt"
    cut = path.read_bytes()[:-1000]
    path.unlink()
    path.write_bytes(cut)
    assert train("--out-dir", tmp_path, "--resume") == 1
    error = capsys.readouterr().err
    assert f"the checkpoint {path} is damaged" in error
    assert "best.pt may still be good" in error
    (tmp_path / "best.pt").replace(path)
    assert train("--out-dir", tmp_path, "--resume") == 0


def test_a_folder_without_room_is_held_by_nobody(tmp_path, monkeypatch):
    """Who calls `fit` may make room, and try again."""
    run = RunDir.create(tmp_path / "run", model="cpc-v1", dataset="textures")
    for name in ("config.yaml", "checkpoint.pt"):
        (run.path / name).touch()
    run.release()
    with monkeypatch.context() as patch:
        patch.setattr("cpc_ext.training.run_dir.atomic_file", Mock(side_effect=OSError(errno.ENOSPC, "no room")))
        with pytest.raises((OSError, TrainingError), match="no room"):
            RunDir.reopen(run.path)
    RunDir.reopen(run.path).release()


def test_two_processes_cannot_train_in_one_folder(train, tmp_path, capsys):
    assert train("--out-dir", tmp_path, "--steps", "2") == 0
    with FileLock(tmp_path / ".lock"):
        assert train("--out-dir", tmp_path, "--resume") == 1
    assert "another process is training" in capsys.readouterr().err
