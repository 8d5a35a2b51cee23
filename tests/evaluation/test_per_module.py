"""Probes of every module: what they see, and the program's figure and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cpc_ext.data import Dataset, ImageSet
from cpc_ext.evaluation.encoder_run import EncoderRun
from cpc_ext.evaluation.per_module import accuracies_by_module, features_by_module
from cpc_ext.programs import evaluate
from cpc_ext.programs.train import parse
from cpc_ext.tasks.greedy_infomax.task import GreedyTask
from cpc_ext.tasks.registry import TASKS
from cpc_ext.training.errors import TrainingError

SMALL = ("--crop", "28", "--device", "cpu", "--precision", "fp32")


@pytest.fixture
def runs(tmp_path, monkeypatch, train, tiny_dataset) -> Callable[..., Path]:
    """runs(name, *options) → the folder of a finished tiny run."""
    monkeypatch.setattr(GreedyTask, "evaluate", lambda task: {})
    monkeypatch.setattr(GreedyTask, "save", lambda task, run: None)
    monkeypatch.setattr(EncoderRun, "dataset", lambda run: tiny_dataset)

    def make(name: str, *options: str) -> Path:
        assert train("--out-dir", tmp_path / name, "--steps", "2", *options) == 0
        return tmp_path / name

    return make


@pytest.mark.parametrize("options", [(), ("--modules", "2"), ("--split-at", "1"), ("--objective", "supervised")])
def test_features_after_each_module(tiny_dataset, options):
    config = parse(["--model", "greedy-infomax", *SMALL, *options]).run
    task = GreedyTask(config, tiny_dataset, torch.device("cpu"))
    images = torch.from_numpy(tiny_dataset.test.images[:3])
    found = features_by_module(task, images)
    with torch.no_grad():
        expected = task.model.encodings_by_module(task._view.center(images))
    assert len(found) == config.greedy.count
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs.mean((2, 3)))
    torch.testing.assert_close(found[-1], task.features(task.model, images))


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("cpc-v1", ()),
        ("cpc-v2", ()),
        ("cpc-v1", ("--encoder", "wrn-10-1")),
        ("greedy-infomax", ("--modules", "1")),
        ("simclr", ("--encoder", "resnet-small")),
    ],
)
def test_other_models_are_probed_after_their_stacks(tiny_dataset, model, options):
    size = ("--view-size", "32", *SMALL[2:]) if model == "simclr" else SMALL
    config = parse(["--model", model, *size, *options]).run
    task = TASKS[model](config, tiny_dataset, torch.device("cpu"))
    images = torch.from_numpy(tiny_dataset.test.images[:3])
    found = features_by_module(task, images)
    assert [len(part) for part in found] == [3] * 3
    assert [part.shape[1] for part in found] == [stack[-1].out_channels for stack in task.model.encoder.stacks]
    torch.testing.assert_close(found[-1], task.features(task.model, images))


def test_modules_that_were_not_trained_are_left_out(tiny_dataset):
    config = parse(["--model", "greedy-infomax", *SMALL, "--train-module", "0"]).run
    task = GreedyTask(config, tiny_dataset, torch.device("cpu"))
    assert len(features_by_module(task, torch.from_numpy(tiny_dataset.test.images[:2]))) == 1


def test_accuracies_tell_modules_apart(tiny_dataset):
    """A module whose output is constant is at chance; the one before it is not."""
    config = parse(["--model", "greedy-infomax", *SMALL]).run
    task = GreedyTask(config, tiny_dataset, torch.device("cpu"))
    with torch.no_grad():
        for parameter in task.model.encoder_modules[1].parameters():
            parameter.zero_()
    first, second, third = accuracies_by_module(task, tiny_dataset)
    assert second == third == pytest.approx(0.1)
    assert first > 0.1


def test_program(runs, capsys):
    greedy = runs("greedy", "--model", "greedy-infomax")
    again = runs("again", "--model", "greedy-infomax", "--seed", "1")
    supervised = runs("supervised", "--model", "greedy-infomax", "--objective", "supervised", "--modules", "1")
    cpc = runs("cpc")
    capsys.readouterr()
    folders = [str(path) for path in (greedy, again, supervised, cpc)]
    assert evaluate.main([*folders, "--per-module", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for name in ("Greedy InfoMax (greedy)", "Greedy InfoMax (again)", "supervised, end to end", "CPC", "untrained"):
        assert name in shown
    assert (greedy / "evaluation" / "accuracy_by_depth.png").stat().st_size > 1000
    record = json.loads((cpc / "evaluation" / "per_module.json").read_text())
    assert len(record["accuracy_by_module"]) == 3
    assert record["model"] == "CPC"
    assert record["chance_accuracy"] == pytest.approx(0.1)


def test_runs_that_cannot_be_probed(tiny_dataset):
    config = parse(["--model", "greedy-infomax", *SMALL]).run
    task = GreedyTask(config, tiny_dataset, torch.device("cpu"))
    unlabelled = Dataset(**{**vars(tiny_dataset), "train": ImageSet(tiny_dataset.train.images)})
    with pytest.raises(TrainingError, match="the images of --dataset textures have no labels to probe with"):
        accuracies_by_module(task, unlabelled)


def test_runs_of_different_images(runs, capsys):
    one, other = runs("one"), runs("other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("dataset: textures", "dataset: cifar10"))
    capsys.readouterr()
    assert evaluate.main([str(one), str(other), "--per-module", "--device", "cpu"]) == 1
    assert "--per-module compares runs of one --dataset" in capsys.readouterr().err
