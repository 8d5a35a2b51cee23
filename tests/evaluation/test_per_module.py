"""Probes of every module: their inputs, and the program's figure and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from cpc_ext.data import Dataset, ImageSet
from cpc_ext.evaluation import per_module
from cpc_ext.evaluation.encoder_run import EncoderRun
from cpc_ext.evaluation.per_module import accuracies_by_module, evaluate_per_module, features_by_module
from cpc_ext.programs import evaluate
from cpc_ext.programs.train_options import parse
from cpc_ext.tasks.greedy_infomax.task import GreedyTask
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.registry import task_class
from cpc_ext.training.run_dir import RunDir
from tests.tasks.test_every_option import ENCODER, config_of
from tests.training.conftest import PATCHES, SHORT, TINY, new_run

SMALL = ("--crop", "28", "--device", "cpu", "--precision", "fp32")
pytestmark = pytest.mark.usefixtures("quick_probe")


@pytest.fixture
def runs(tmp_path, monkeypatch, tiny_dataset) -> Callable[..., Path]:
    """runs(name, *options) → the folder of a tiny run."""
    monkeypatch.setattr(EncoderRun, "dataset", lambda run: tiny_dataset)

    def make(name, *options):
        tiny = (*PATCHES, *SHORT) if "supervised" in options else TINY
        return new_run(tmp_path / name, parse([*tiny, "--encoder", ENCODER, *options]).run, tiny_dataset)

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
    task = task_class(model)(config, tiny_dataset, torch.device("cpu"))
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
    for changed in ({"train": ImageSet(tiny_dataset.train.images)}, {"test": None}):
        with pytest.raises(TrainingError, match="the images of --dataset textures have no labels to probe with"):
            accuracies_by_module(task, replace(tiny_dataset, **changed))


def test_runs_of_different_images(runs, capsys):
    one, other = runs("one"), runs("other")
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("dataset: textures", "dataset: cifar10"))
    capsys.readouterr()
    assert evaluate.main([str(one), str(other), "--per-module", "--device", "cpu"]) == 1
    assert "--per-module compares runs of the same images" in capsys.readouterr().err


class Run:
    """Stands for an EncoderRun, whose tasks are the accuracies of their modules."""

    def __init__(self, folder: Path, dataset: Dataset, model: str, accuracies: list[float], **options: object) -> None:
        folder.mkdir()
        self.dir = RunDir(folder)
        self.config = config_of(model, seed=4, **options)
        self.state = {"step": 7}
        self._dataset = dataset
        self._accuracies = accuracies

    def dataset(self) -> Dataset:
        return self._dataset

    def trained(self, dataset: Dataset) -> list[float]:
        return self._accuracies

    def untrained(self, dataset: Dataset, *, seed: int) -> list[float]:
        return [seed / 100] * len(self._accuracies)


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Record the arguments of the figure, and its path."""
    seen: dict[str, object] = {}

    def accuracies(task: list[float], dataset: Dataset, progress: Callable[[range], object]) -> list[float]:
        progress(range(len(task)))
        return task

    monkeypatch.setattr(per_module, "accuracies_by_module", accuracies)
    monkeypatch.setattr(per_module.figures, "accuracy_by_depth", lambda *arguments: arguments)
    monkeypatch.setattr(per_module.figures, "save", lambda path, figure: seen.update(path=path, figure=figure))
    return seen


def test_what_is_told_of_the_runs(tmp_path, tiny_dataset, stubs, capsys):
    tests = replace(tiny_dataset.test, labels=tiny_dataset.test.labels // 9)
    dataset = replace(tiny_dataset, test=tests)
    runs = [
        Run(tmp_path / "one", dataset, "greedy-infomax", [0.25, 0.5], modules=2),
        Run(tmp_path / "two", replace(dataset, test=None), "simclr", [0.125, 1.0]),
    ]
    bars = []
    figure = tmp_path / "new" / "folder" / "x.png"
    evaluate_per_module(runs, figure, lambda steps, name: bars.append((steps, name)))
    assert bars == [(range(2), "untrained"), (range(2), "Greedy InfoMax"), (range(2), "SimCLR")]
    lines = {"Greedy InfoMax": [0.25, 0.5], "SimCLR": [0.125, 1.0]}
    assert stubs == {"path": figure, "figure": (lines, [0.04, 0.04], 0.9, "textures")}
    assert figure.parent.is_dir()
    for run, (name, accuracies) in zip(runs, lines.items(), strict=True):
        text = (run.dir.path / "evaluation" / "per_module.json").read_text()
        expected = {
            "run": str(run.dir.path),
            "model": name,
            "dataset": "textures",
            "step": 7,
            "accuracy_by_module": accuracies,
            "chance_accuracy": 0.9,
        }
        assert text == json.dumps(expected, indent=2) + "\n"
    assert capsys.readouterr().out.splitlines()[:3] == [
        "Greedy InfoMax   25.0%   50.0%",
        "SimCLR           12.5%  100.0%",
        "untrained         4.0%    4.0%",
    ]
    evaluate_per_module(runs[:1], figure, lambda steps, name: None)  # Again, in the folders that are there.
    capsys.readouterr()
    evaluate_per_module([Run(tmp_path / "three", dataset, "cpc-v1", [0.5])], figure, lambda steps, name: None)
    assert capsys.readouterr().out.splitlines()[:2] == ["CPC         50.0%", "untrained    4.0%"]


def test_runs_of_other_images_are_not_compared(tmp_path, tiny_dataset, stubs):
    """Two folders are both called folder, whatever is in them, and one may be linked to from two places."""
    other = replace(tiny_dataset, test=replace(tiny_dataset.test, images=255 - tiny_dataset.test.images))
    sets = {"one": tiny_dataset, "again": tiny_dataset, "another": other}
    runs = [
        Run(tmp_path / name, dataset, "simclr", [0.5], data_dir=tmp_path / "data" / name)
        for name, dataset in sets.items()
    ]
    evaluate_per_module(runs[:2], tmp_path / "x.png", lambda steps, name: None)
    with pytest.raises(TrainingError, match=r"^--per-module compares runs of the same images"):
        evaluate_per_module(runs, tmp_path / "x.png", lambda steps, name: None)


def test_what_cannot_be_written_is_said(tmp_path, tiny_dataset, stubs, monkeypatch):
    run = Run(tmp_path / "run", tiny_dataset, "simclr", [0.5])
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"^cannot write .*/file/x\.png: "):
        evaluate_per_module([run], tmp_path / "file" / "x.png", lambda steps, name: None)
    monkeypatch.setattr(per_module.figures, "save", Mock(side_effect=OSError("disk is full")))
    with pytest.raises(TrainingError, match=r"^cannot write .*/x\.png: disk is full$"):
        evaluate_per_module([run], tmp_path / "x.png", lambda steps, name: None)
    monkeypatch.setattr(per_module, "write_text", Mock(side_effect=OSError("disk is full")))
    with pytest.raises(TrainingError, match=r"^cannot write .*/run/evaluation/per_module\.json: disk is full$"):
        evaluate_per_module([run], tmp_path / "x.png", lambda steps, name: None)


def test_names_of_runs(tmp_path, tiny_dataset):
    kinds = [
        ("cpc-v1", {}, "CPC (0)"),
        ("greedy-infomax", {"modules": 1}, "CPC (1)"),
        ("cpc-v2", {}, "CPC v2"),
        ("simclr", {}, "SimCLR"),
        ("greedy-infomax", {"modules": 2}, "Greedy InfoMax"),
        ("greedy-infomax", {"modules": 1, "objective": "supervised"}, "supervised, end to end"),
        ("greedy-infomax", {"modules": 2, "objective": "supervised"}, "supervised, greedy"),
    ]
    runs = [Run(tmp_path / str(n), tiny_dataset, model, [], **more) for n, (model, more, _) in enumerate(kinds)]
    assert per_module._names(runs) == [name for _, _, name in kinds]


def test_probes_are_given_every_module_of_both_splits(tiny_dataset, monkeypatch):
    """Each split is encoded once, on the model's device, in float32, and no hook is left behind."""
    config = parse(["--model", "simclr", "--view-size", "32", "--encoder", ENCODER, *SMALL[2:4], "--precision", "bf16"])
    task = task_class("simclr")(config.run, tiny_dataset, torch.device("cpu"))
    probes, devices, bars = [], [], []
    original = per_module.encode

    def encode(images: ImageSet, features: object, device: torch.device, **options: object) -> torch.Tensor:
        devices.append(device)
        return original(images, features, device, **options)

    def probe(*arguments: torch.Tensor, **options: object) -> object:
        probes.append((*arguments, options))
        return SimpleNamespace(accuracy=len(probes))

    monkeypatch.setattr(per_module, "encode", encode)
    monkeypatch.setattr(per_module, "linear_probe", probe)
    assert accuracies_by_module(task, tiny_dataset, lambda steps: bars.append(steps) or steps) == [1, 2, 3]
    assert (devices, bars) == ([torch.device("cpu")] * 2, [range(0, 40, 50), range(0, 30, 50)])
    assert accuracies_by_module(task, tiny_dataset) == [4, 5, 6]
    expected = [
        features_by_module(task, torch.from_numpy(images.images)) for images in (tiny_dataset.train, tiny_dataset.test)
    ]
    for (train, labels, test, test_labels, options), mine, theirs in zip(probes[:3], *expected, strict=True):
        assert train.dtype == mine.dtype == torch.float32
        assert torch.equal(train, mine)
        assert torch.equal(test, theirs)
        assert labels.tolist() == tiny_dataset.train.labels.tolist()
        assert test_labels.tolist() == tiny_dataset.test.labels.tolist()
        assert options == {"classes": 10}
    assert not any(module._forward_hooks for module in task.model.modules())


def test_an_encoder_without_stacks():
    task = SimpleNamespace(model=SimpleNamespace(encoder=torch.nn.Linear(1, 1)))
    with pytest.raises(TrainingError, match="Linear has no stacks to look between"):
        features_by_module(task, torch.zeros(1, 1, 1, 1))
