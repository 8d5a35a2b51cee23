"""Fixtures for runs: a data set and options so small that a run of the whole program takes a second or two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from cpc_ext.data import Dataset, make_textures
from cpc_ext.measures import probe
from cpc_ext.programs import training as program
from cpc_ext.tasks import patches
from cpc_ext.tasks.cpc_v1.task import CPCv1Task
from cpc_ext.training import run_data
from cpc_ext.training.checkpoint import load_checkpoint, save_checkpoint
from cpc_ext.training.config import RunConfig
from cpc_ext.training.registry import task_class
from cpc_ext.training.run_log import read_metrics
from cpc_ext.training.task import Task

# resnet-small with a quarter of the channels, which are multiples of 8: see test_every_option.py.
SMALL = ("--encoder", "resnet:blocks=1-1-1,channels=8-16-32,stem_channels=8,stem=strided")
SHORT = (
    *("--batch-size", "8", "--steps", "8", "--log-every", "3", "--checkpoint-every", "4", "--warmup-steps", "2"),
    *("--device", "cpu", "--precision", "fp32"),
)
PATCHES = ("--crop", "24", "--grid-size", "5")
TINY = (*PATCHES, "--pred-steps", "2", "--pred-directions", "1", "--neg-samples", "16", *SHORT)
# Logged values that differ between equal runs.
TIMES = ("images_per_second", "seconds")
PNG = b"\x89PNG\r\n\x1a\n"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: more are slower on tensors this small, and much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function: start(*arguments of Python, **environment) starts a process, which is ended with the test."""
    started = []

    def run(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()  # Nothing, where it has ended.
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="session")
def tiny_dataset() -> Dataset:
    sets = {
        split: make_textures(count, split=split, size=32)
        for split, count in (("pretrain", 44), ("train", 40), ("test", 30))
    }
    return Dataset(
        name="textures",
        **sets,
        classes=tuple(map(str, range(10))),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        gray_mean=0.5,
        gray_std=0.2,
    )


def logged(run: Path) -> list[dict[str, float]]:
    """Return the records of a run's log, without the values that differ between equal runs."""
    records = read_metrics(run / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMES} for record in records]


def new_run(folder: Path, config: RunConfig, dataset: Dataset) -> Path:
    """Create a run that has taken no step in a folder, with the initial weights of another seed; returns the folder."""
    other = config.model_copy(update={"compute": config.compute.model_copy(update={"seed": config.compute.seed + 1})})
    task = task_class(config.model)(other, dataset, torch.device("cpu"))
    folder.mkdir()
    (folder / "config.yaml").write_text(config.to_yaml())
    state = {"step": 0, "description": task.description(), "model": task.model.state_dict()}
    save_checkpoint(folder / "checkpoint.pt", state)
    return folder


@pytest.fixture
def quick_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make linear probes quick, with one regularisation and a few iterations, for tests of other things."""
    monkeypatch.setattr(probe, "_STRENGTHS", (0.1,))
    monkeypatch.setattr(probe, "_MAX_ITERATIONS", 8)


@pytest.fixture
def quick_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the end of a run quick: its probe has fewer regularisations, and its figure shows fewer neighbours."""
    monkeypatch.setattr(probe, "_STRENGTHS", (1.0, 0.1))
    monkeypatch.setattr(patches, "_NEIGHBOUR_QUERIES", 2)
    monkeypatch.setattr(patches, "_NEIGHBOURS", 3)


@pytest.fixture
def train_with(monkeypatch: pytest.MonkeyPatch, tiny_dataset: Dataset, quick_ends: None) -> Callable[..., int]:
    """A function: train_with(*options) runs the program on the tiny data set, in this process; returns its status."""
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: tiny_dataset)
    return lambda *options: program.main([*map(str, options)])


@pytest.fixture
def train_fully(train_with: Callable[..., int]) -> Callable[..., int]:
    """A function: train_fully(*options) is train_with and tiny options of CPC v1."""

    def run(*options: str | Path) -> int:
        # Another run's options are those of its model, too.
        of_another = {"--config", "--resume", "--resume-from"} & set(options)
        return train_with(*(() if of_another else SMALL), *TINY, *options)

    return run


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch, train_fully: Callable[..., int]) -> Callable[..., int]:
    """The same as train_fully without probes and figures, which take most of the time of a short run."""
    monkeypatch.setattr(CPCv1Task, "evaluate", lambda task: {})
    monkeypatch.setattr(CPCv1Task, "save", lambda task, run: None)
    return train_fully


@pytest.fixture
def interrupted_as_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A function: interrupted_as_whole(train, task class, *options) checks that a resumed run equals a whole one."""

    def check(train: Callable[..., int], kind: type[Task], *options: str) -> None:
        monkeypatch.setattr(kind, "evaluate", lambda task: {})
        monkeypatch.setattr(kind, "save", lambda task, run: None)
        assert train("--out-dir", tmp_path / "whole", *options) == 0
        original, count = kind.updated, 0

        def updated(self: Task) -> None:
            nonlocal count
            count += 1
            if count == 5:  # Within an epoch, between two log lines and between two checkpoints.
                os.kill(os.getpid(), signal.SIGINT)
            original(self)

        monkeypatch.setattr(kind, "updated", updated)
        assert train("--out-dir", tmp_path / "parts", *options) == 130
        assert train("--out-dir", tmp_path / "parts", *options, "--resume") == 0
        assert logged(tmp_path / "whole") == logged(tmp_path / "parts")
        whole, parts = (load_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "parts"))
        assert all(torch.equal(whole[name], parts[name]) for name in whole)

    return check


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[dict[str, torch.Tensor]], None]], None]:
    """A function: after at_step(n, action), the n-th forward pass calls action with the values it returns."""

    def install(number: int, action: Callable[[dict[str, torch.Tensor]], None]) -> None:
        original, count = CPCv1Task.losses, 0

        def losses(self: CPCv1Task, *arguments: object) -> dict[str, torch.Tensor]:
            nonlocal count
            count += 1
            values = original(self, *arguments)
            if count == number:
                action(values)
            return values

        monkeypatch.setattr(CPCv1Task, "losses", losses)

    return install
