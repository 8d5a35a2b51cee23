"""metrics.jsonl: the lines kept when a run is resumed, and reading of damaged files."""

from __future__ import annotations

import json
import os

import pytest

from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.run_log import RunLog, read_metrics


def lines(*steps):
    return b"".join(json.dumps({"step": step, "loss": step / 2}).encode() + b"\n" for step in steps)


def reopened(run, after_step):
    RunLog(run, after_step=after_step).close()
    return run.metrics.read_bytes()


def test_a_kill_while_the_log_is_cut_loses_nothing(tmp_path, monkeypatch):
    """Whatever is done to the log itself happens in one step."""
    run = RunDir(tmp_path)
    run.metrics.write_bytes(lines(1, 2, 3))

    class KilledError(BaseException):
        pass

    def kill(source, target):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KilledError):
            RunLog(run, after_step=2)
    assert run.metrics.read_bytes() == lines(1, 2, 3)
    assert reopened(run, 2) == lines(1, 2)


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 4, "lo',  # Cut short by a kill.
        b"\0" * 700,  # What a power loss makes of a block that was not written.
        b'{"step": 4, "loss": 1.0\0\0\0\0\0\0\n',
        b"\xff\xfe\n",
        b"[1, 2]\n7\nnull\n",
        b"[" * 100_000 + b"\n",
        b'{"step": "4"}\n{"step": -4}\n{"step": true}\n{"loss": 1.0}\n',
        b'{"step": 4, "loss": "high"}\n{"step": 4, "loss": null}\n{"step": 4, "loss": 1' + b"0" * 400 + b"}\n",
    ],
)
def test_what_is_no_record_is_left_out(tmp_path, tail):
    run = RunDir(tmp_path)
    run.metrics.write_bytes(lines(1, 2) + tail)
    assert [record["step"] for record in read_metrics(run.metrics)] == [1, 2]
    assert reopened(run, 5) == lines(1, 2)


def test_a_run_that_goes_on_from_its_start_begins_again(tmp_path):
    """What was found before its first step is found once more."""
    run = RunDir(tmp_path)
    run.metrics.write_bytes(lines(0, 1))
    assert reopened(run, 0) == b""
    run.metrics.write_bytes(lines(0, 1, 2))
    assert reopened(run, 1) == lines(0, 1)


def test_last_record_without_an_end_of_line_is_whole(tmp_path):
    run = RunDir(tmp_path)
    run.metrics.write_bytes(lines(1, 2)[:-1])
    log = RunLog(run, after_step=2)
    log.log({"step": 3, "loss": 1.5})
    log.close()
    assert run.metrics.read_bytes() == lines(1, 2, 3)


def test_an_undamaged_log_stays_the_same_file(tmp_path):
    run = RunDir(tmp_path)
    run.metrics.write_bytes(lines(1, 2))
    before = run.metrics.stat()
    assert reopened(run, 2) == lines(1, 2)
    assert run.metrics.stat().st_ino == before.st_ino


def test_values_that_are_not_finite_are_records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "grad_norm": Infinity, "loss": NaN}\n')
    assert read_metrics(path)[0]["grad_norm"] == float("inf")


def test_records_of_some_names_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "loss": 1.0}\n')
    assert [record["step"] for record in read_metrics(path, having=("loss",))] == [2]


def test_tensorboard_that_cannot_be_written(tmp_path, capsys):
    run = RunDir(tmp_path)
    run.tensorboard.write_bytes(b"not a folder")
    log = RunLog(run)
    log.log({"step": 1, "loss": 0.5})
    log.scalars(1, {"loss": 0.5})
    log.sync()
    log.close()
    assert run.metrics.read_bytes() == lines(1)
    assert capsys.readouterr().err.count("could not write TensorBoard events") == 1
