"""The SLURM job script, with stubs of SLURM's commands: its start, its reaction to SLURM's warning, and its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cpc_ext.training.checkpoint import load_checkpoint
from cpc_ext.training.run_log import read_metrics

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "python" / "examples" / "train.slurm"
PATIENCE_SECONDS = 100
# srun's process hands signals on to the program it started; here it is that program.
SRUN = 'exec "$@"\n'
SCONTROL = 'case $1 in show) echo localhost;; *) echo "$@" >> scontrol.log;; esac\n'


@pytest.fixture
def submit(tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function: submit(*arguments, **stubs of programs) starts the job in a temporary folder; returns its process."""
    jobs = []

    def start(*arguments: str, **programs: str) -> subprocess.Popen[str]:
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, **programs}.items():
            program = tmp_path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!/bin/bash\n{text}")
            program.chmod(0o755)
        path = os.pathsep.join([str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
        slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "here", "SLURM_JOB_NUM_NODES": "1"}
        jobs.append(
            subprocess.Popen(
                [SCRIPT, *arguments],
                cwd=tmp_path,
                env={**os.environ, **slurm, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
        return jobs[-1]

    yield start
    for job in jobs:
        if job.poll() is None:
            job.terminate()  # And with it what it has started, which would go on without it.
        job.communicate(timeout=PATIENCE_SECONDS)


def requeued(folder: Path) -> int:
    """Return how often the job was requeued."""
    log = folder / "scontrol.log"
    return log.read_text().splitlines().count(f"requeue {os.getpid()}") if log.exists() else 0


def wait_until(condition: Callable[[], bool], job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_warned_run_saves_and_goes_on_when_it_starts_again(submit, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    options = ["--encoder", "resnet:blocks=1-1-1,channels=8-16-32,stem_channels=8,stem=strided", "--image-size", "32"]
    options += ["--crop", "24", "--grid-size", "5", "--pred-steps", "2", "--pred-directions", "1"]
    options += ["--batch-size", "4", "--device", "cpu", "--precision", "fp32", "--log-every", "1"]
    options += ["--checkpoint-every", "100000", "--steps", "100000"]
    reached = 0
    for start in (1, 2):
        job = submit("run", *options)
        log = tmp_path / "run" / "metrics.jsonl"
        wait_until(lambda: any(record["step"] >= reached + 2 for record in read_metrics(log)), job)  # noqa: B023
        job.send_signal(signal.SIGUSR1)
        output = job.communicate(timeout=PATIENCE_SECONDS)[0]
        assert job.returncode != 0
        assert requeued(tmp_path) == start, output
        before, reached = reached, load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"]
        assert reached >= before + 2
    # No step was taken twice, none left out.
    assert [record["step"] for record in read_metrics(log)] == list(range(1, reached + 1))


@pytest.mark.parametrize("status", [0, 3])
def test_a_run_that_ends_by_itself_is_not_queued_again(submit, tmp_path, status):
    job = submit("run", "--seed", "3", torchrun=f'echo "given: $@"; exit {status}\n')
    output = job.communicate(timeout=PATIENCE_SECONDS)[0]
    assert job.returncode == status
    assert requeued(tmp_path) == 0
    assert "-m cpc_ext.train --seed 3 --out-dir run\n" in output
    assert re.search(r"--nnodes 1 --nproc-per-node 1 .*--rdzv-endpoint localhost:[23]\d{4} ", output)


@pytest.mark.parametrize(("status", "again"), [(138, 1), (0, 0)])
def test_a_warned_run_is_queued_again_unless_it_is_complete(submit, tmp_path, status, again):
    """It may be warned more than once, and as it ends."""
    program = f'trap "echo warned" USR1\ntouch begun\nuntil [ -e end ]; do sleep 0.05; done\nexit {status}\n'
    job = submit("run", torchrun=program)
    wait_until((tmp_path / "begun").exists, job)
    for _ in range(2):
        job.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
    assert job.poll() is None  # It waits for what is being saved.
    (tmp_path / "end").touch()
    output = job.communicate(timeout=PATIENCE_SECONDS)[0]
    assert output.count("warned") == 2
    assert (job.returncode, requeued(tmp_path)) == (status, again)


def test_a_run_that_has_begun_is_resumed(submit, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    job = submit("run", "--seed", "3", torchrun='echo "given: $@"\n')
    assert job.communicate(timeout=PATIENCE_SECONDS)[0].endswith("-m cpc_ext.train --resume --out-dir run\n")


def test_without_a_folder_it_says_how_it_is_called(submit):
    job = submit()
    assert "usage: sbatch train.slurm RUN" in job.communicate(timeout=PATIENCE_SECONDS)[0]
    assert job.returncode == 2


def test_sbatch_reads_its_options():
    """It does not look for them beyond the first command."""
    lines = SCRIPT.read_text().splitlines()
    before = lines[: lines.index("set -u")]
    assert [line for line in lines if line.startswith("#SBATCH")] == [line for line in before if "#SBATCH" in line]
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --signal=B:USR1@180"} <= set(before)
