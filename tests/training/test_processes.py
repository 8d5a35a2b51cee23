"""Runs in separate processes that are killed or interrupted."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.run_log import read_metrics

PATIENCE_SECONDS = 60


@pytest.fixture
def start(start, tmp_path):
    """A function: start(*options) starts `python -m cpc_ext.train` on a folder of noise, and returns the process."""
    rng = np.random.default_rng(0)
    for index in range(20):
        path = tmp_path / "images" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(path)
    cache = str(tmp_path / "cache")
    return lambda *options: start(
        *("-m", "cpc_ext.train", "--out-dir", tmp_path / "run", *options), CPC_EXT_CACHE=cache
    )


def options(tmp_path: Path) -> tuple[str | Path, ...]:
    return (
        *("--dataset", "folder", "--data-dir", tmp_path / "images", "--crop", "24", "--grid-size", "5"),
        *("--encoder", "resnet-small", "--pred-steps", "2", "--batch-size", "4", "--device", "cpu"),
        *("--precision", "fp32", "--log-every", "1", "--checkpoint-every", "1", "--steps", "100000"),
    )


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the run has logged a step."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        if any(record["step"] >= step for record in read_metrics(run / "metrics.jsonl")):
            return
        time.sleep(0.01)
    raise AssertionError(f"the run did not reach step {step}: {process.communicate(timeout=5)[0]}")


def test_killed_at_any_moment_a_run_can_go_on(start, tmp_path):
    """With a checkpoint after every step most of the time goes into writing them, so kills fall into writes."""
    run = tmp_path / "run"
    process = start(*options(tmp_path))
    reached = 0
    for _ in range(3):
        wait_for_step(run, reached + 3, process)
        process.kill()
        process.communicate()
        state = load_checkpoint(run / "checkpoint.pt")
        assert state["step"] >= reached + 2
        reached = state["step"]
        process = start("--resume")
    # The killed process may have logged one step that its checkpoint does not have.
    wait_for_step(run, reached + 2, process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=PATIENCE_SECONDS)[0]
    assert process.returncode == 130
    assert f"--resume --out-dir {run}" in output
    assert "Traceback" not in output
    steps = [record["step"] for record in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))


def test_second_interrupt_ends_at_once(start, tmp_path):
    process = start(*options(tmp_path), "--checkpoint-every", "100000", "--batch-size", "16", "--encoder", "resnet28")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)  # Into a step, which takes long with so large an encoder.
    process.send_signal(signal.SIGINT)
    line = ""
    while "once more ends at once" not in line:
        line = process.stdout.readline()
        assert line, "the process ended without a word"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGINT
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 0
