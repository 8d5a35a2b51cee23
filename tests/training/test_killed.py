"""Programs that are killed at every moment up to their first checkpoint, and then started again."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.run_log import read_metrics
from tests.training.conftest import ROOT, SMALL, TINY

GOLDEN = ROOT / "tests" / "golden" / "cpcv2_pytorch.resnet_layer.safetensors"


@pytest.fixture(scope="module")
def start_killed(tmp_path_factory):
    """A function: start_killed(program, n, folder, *arguments) returns the exit status; see killed_program.py.

    n: 0 if the program is not to be killed.
    """
    log = tmp_path_factory.mktemp("killed") / "log"
    with open(log, "w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("killed_program.py"))],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )

    def start(name: str, number: int, folder: Path, *arguments: str | Path) -> int:
        process.stdin.write(json.dumps([name, number, str(folder), list(map(str, arguments))]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, log.read_text()
        return json.loads(answer)

    start.log = log
    yield start
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def killed_states(start, name, tmp_path, *arguments):
    """Yield the folders left by a program killed at its n-th file access, for n from 1 until it has a checkpoint."""
    for number in range(1, 200):
        folder = tmp_path / str(number) / "run"
        assert start(name, number, folder, *arguments, folder) == -9, start.log.read_text()
        if (folder / "checkpoint.pt").exists():
            return
        yield folder
    raise AssertionError("no checkpoint ever appeared")


def test_a_run_killed_before_its_first_checkpoint_can_be_started_and_resumed(start_killed, tmp_path):
    options = (*SMALL, *TINY, "--steps", "1")
    resumed = 0
    for folder in killed_states(start_killed, "train", tmp_path, *options, "--out-dir"):
        if (folder / "config.yaml").exists():
            again = Path(shutil.copytree(folder, folder.with_name("resumed")))
            assert start_killed("train", 0, again, "--resume", "--out-dir", again) == 0, start_killed.log.read_text()
            assert load_checkpoint(again / "checkpoint.pt")["step"] == 1
            resumed += 1
        assert start_killed("train", 0, folder, *options, "--out-dir", folder) == 0, start_killed.log.read_text()
        assert load_checkpoint(folder / "checkpoint.pt")["step"] == 1
        assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [1]
        assert not list(folder.glob(".*.tmp"))
    assert resumed > 3


def test_a_conversion_killed_before_its_checkpoint_can_be_started_again(start_killed, tmp_path):
    options = (GOLDEN, "--source", "cpcv2-pytorch", "--out")
    states = list(killed_states(start_killed, "convert", tmp_path, *options))
    assert any((folder / "config.yaml").exists() for folder in states)
    for folder in states:
        assert start_killed("convert", 0, folder, *options, folder) == 0, start_killed.log.read_text()
        assert load_checkpoint(folder / "checkpoint.pt")["step"] == 0
