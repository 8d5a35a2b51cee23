"""The evaluator by itself, on a stub of a run: the inputs of each computation, records and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from torch import Tensor, nn

import cpc_ext
from cpc_ext.data import Dataset, ImageSet
from cpc_ext.evaluation import evaluation_record, evaluator
from cpc_ext.evaluation.evaluation_record import EvaluationRecord, as_table, measured
from cpc_ext.evaluation.finetuning import FineTuning
from cpc_ext.evaluation.options import MODES, EvaluationOptions, parse_modes
from cpc_ext.measures.label_subsets import LabelBudget
from cpc_ext.training.digests import images_digest, weights_digest
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.run_dir import RunDir
from tests.tasks.test_every_option import config_of, dataset_of

CPU = torch.device("cpu")
CLASSES = 6
TRAIN = np.array([*range(6)] * 3 + [5])
TEST = np.array([0, 0, 0, 1, 2, 3, 4, 5])
IMAGES = np.random.default_rng(0).integers(0, 256, (len(TRAIN) + len(TEST), 1, 2, 2), dtype=np.uint8)


def data(train: np.ndarray = TRAIN, test: np.ndarray = TEST, classes: int = CLASSES) -> Dataset:
    one, other = ImageSet(IMAGES[: len(train)], train), ImageSet(IMAGES[-len(test) :], test)
    return replace(dataset_of(IMAGES), train=one, test=other, classes=tuple("abcdef"[:classes]))


class Eye:
    """Stands for a task: features are an image's pixels times the model's weight."""

    def __init__(self, weight: float) -> None:
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.model.weight, weight)

    def features(self, model: nn.Linear, images: Tensor) -> Tensor:
        return images.flatten(1).float() * model.weight.item()


class Run:
    """Stands for an EncoderRun. Trained weights are 2, the initial ones of a seed 100 and the seed."""

    def __init__(self, folder: Path, dataset: Dataset | None = None, **options: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.dir = RunDir(folder)
        self.config = config_of("cpc-v1", **{"seed": 4, "precision": "fp32", "device": "cpu", **options})
        self.state = {"step": 7}
        self._dataset = dataset or data()

    def dataset(self) -> Dataset:
        return self._dataset

    def trained(self, dataset: Dataset) -> Eye:
        return Eye(2.0)

    def untrained(self, dataset: Dataset, *, seed: int) -> Eye:
        return Eye(100.0 + seed)


DIGEST = weights_digest(Eye(2.0).model)
SETTINGS = {"cpc_ext": cpc_ext.__version__, "weights": DIGEST, "seed": 3, "precision": "fp32"}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Record the arguments of each figure by its file, in place of drawing it."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(evaluator, "_save_figure", lambda path, figure: found.update({str(path): figure}))
    monkeypatch.setattr(evaluator.figures, "label_efficiency", lambda *arguments: arguments)
    monkeypatch.setattr(evaluator.figures, "confusion", lambda *arguments: arguments)
    return found


@pytest.fixture
def measure(tmp_path: Path, drawn: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A function: measure(*runs, options of the command) returns the content of the first run's evaluation.json."""

    def run(*runs: Run, **options: Any) -> dict[str, Any]:
        given = {each.dir.path: each for each in runs or [Run(tmp_path / "run")]}
        monkeypatch.setattr(evaluator.EncoderRun, "open", lambda path, device, *, data_dir: given[path])
        evaluator.evaluate(
            EvaluationOptions(runs=tuple(given), **{"labels": "100%", "mode": "knn", "seed": 3, **options})
        )
        return json.loads((next(iter(given)) / "evaluation" / "evaluation.json").read_text())

    return run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Record every call of a judge, its name and arguments. All scores are equal."""
    found: list[tuple[Any, ...]] = []

    def judge(*given: Any, **options: Any) -> Tensor:
        found.append((*given, options))
        return torch.zeros(len(TEST), options["classes"])

    def fit(*given: Any, **options: Any) -> Any:
        return SimpleNamespace(logits=lambda features: judge("classifier", *given, features, **options))

    monkeypatch.setattr(evaluator, "fit_linear_classifier", fit)
    monkeypatch.setattr(evaluator, "knn_scores", lambda *given, **options: judge("votes", *given, **options))
    monkeypatch.setattr(evaluator, "fine_tune", lambda *given, **options: judge("tuning", *given, **options))
    return found


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Record every progress bar: its length, description and unit."""
    found: list[tuple[Any, ...]] = []

    def tqdm(steps: range, *, desc: str, unit: str, **style: bool) -> range:
        assert style == {"dynamic_ncols": True, "leave": False}
        found.append((len(steps), desc, unit))
        return steps

    monkeypatch.setattr(evaluator, "tqdm", tqdm)
    return found


def ranked(labels: np.ndarray, places: Sequence[int], classes: int) -> Tensor:
    """Return scores that rank each image's true class at its place, counted from 0, and the others in order."""
    scores = torch.empty(len(labels), classes)
    for row, label, place in zip(scores, labels.tolist(), places, strict=True):
        order = [other for other in range(classes) if other != label]
        order.insert(place, label)
        row[order] = -torch.arange(classes).float()
    return scores


def test_header_and_row(tmp_path, measure, monkeypatch):
    monkeypatch.setattr(evaluator, "knn_scores", lambda *a, **more: ranked(TEST, (0, 1, 0, 4, 5, 0, 0, 5), CLASSES))
    monkeypatch.setattr(evaluator, "time", SimpleNamespace(perf_counter=iter([10.0, 12.3456]).__next__))
    found = measure()
    (row,) = found.pop("rows")
    dataset = data()
    assert {type(count) for counts in row["confusion"] for count in counts} == {int}
    assert found == {
        "run": str(tmp_path / "run"),
        "model": "cpc-v1",
        "dataset": "textures",
        "step": 7,
        "weights": DIGEST,
        "images": {"train": images_digest(dataset.train), "test": images_digest(dataset.test)},
        "train_images": 19,
        "test_images": 8,
        "chance_accuracy": 3 / 8,
        "classes": list("abcdef"),
    }
    confusion = np.zeros((6, 6), dtype=int)
    for label, named in zip(TEST, (0, 1, 0, 0, 0, 3, 4, 0), strict=True):
        confusion[label, named] += 1
    assert row == {
        "mode": "knn",
        "labels": "100%",
        "labels_per_class": 3.17,
        "label_count": 19,
        "repeats": 1,
        "top1_mean": 0.5,
        "top1_std": 0.0,
        "top1": [0.5],
        "top5_mean": 0.75,
        "top5_std": 0.0,
        "top5": [0.75],
        "seconds": 2.35,
        "settings": {**SETTINGS, "repeats": 1, "neighbours": 19, "temperature": 0.07},
        "confusion": confusion.tolist(),
    }


def test_draws_are_counted_together(tmp_path, measure, monkeypatch):
    """The top five of five classes are all of them, and not worth telling."""
    labels = np.array([*range(5), 0])
    draws = [ranked(labels, places, 5) for places in ([0] * 6, [1] * 5 + [0])]
    monkeypatch.setattr(evaluator, "knn_scores", lambda *arguments, **more: draws.pop(0))
    run = Run(tmp_path / "run", data(np.array([*range(5)] * 2), labels, classes=5))
    (row,) = measure(run, labels="1", repeats=2)["rows"]
    assert (row["labels_per_class"], row["label_count"], row["repeats"]) == (1, 5, 2)
    assert row["top1"] == [1.0, pytest.approx(1 / 6)]
    assert not any(name.startswith("top5") for name in row)
    assert row["confusion"] == [[3, 1, 0, 0, 0], *([1] + [int(r == c) for c in range(1, 5)] for r in range(1, 5))]


def drawn_subsets() -> list[np.ndarray]:
    return [LabelBudget(per_class=2).subset(TRAIN, "abcdef", seed=3, draw=draw) for draw in (0, 1)]


@pytest.mark.parametrize(
    ("mode", "judge", "weight", "more"),
    [("linear", "classifier", 2, {}), ("untrained", "classifier", 104, {}), ("knn", "votes", 2, {"neighbours": 11})],
)
def test_frozen_encodings_are_judged(tmp_path, measure, calls, mode, judge, weight, more):
    run = Run(tmp_path / "run")
    rows = measure(run, labels="2", repeats=2, mode=mode, neighbours=11)["rows"]
    train, test = (
        weight * torch.from_numpy(images.images).flatten(1).float()
        for images in (run.dataset().train, run.dataset().test)
    )
    for (name, *given, options), chosen in zip(calls, drawn_subsets(), strict=True):
        assert (name, options) == (judge, {"classes": CLASSES, **more})
        assert all(map(torch.equal, given, (train[chosen], torch.from_numpy(TRAIN[chosen]), test)))
    own = {"neighbours": 11, "temperature": 0.07} if mode == "knn" else {}
    weights = None if mode == "untrained" else DIGEST
    assert [row["settings"] for row in rows] == [{**SETTINGS, "weights": weights, "repeats": 2, **own}]


@pytest.mark.parametrize(("mode", "weights", "share"), [("finetune", (2, 2), 0.5), ("supervised", (3100, 3101), 1)])
def test_a_copy_is_tuned(tmp_path, measure, calls, bars, mode, weights, share):
    run = Run(tmp_path / "run", lr=0.004, precision="bf16")
    options = {"labels": "2", "repeats": 2, "mode": mode, "finetune_epochs": 7, "finetune_steps": 5}
    (row,) = measure(run, **options)["rows"]
    recipe = FineTuning(epochs=7, min_steps=5, encoder_lr=0.004 * share, head_lr=0.004)
    for draw, (name, task, model, train, chosen, test, used, how) in enumerate(calls):
        assert (name, used) == ("tuning", recipe)
        assert (task.model.weight.item(), model.weight.item()) == (weights[draw],) * 2
        assert model is not task.model
        assert (train, test) == (run.dataset().train, run.dataset().test)
        assert np.array_equal(chosen, drawn_subsets()[draw])
        assert list(how.pop("progress")(range(3))) == [0, 1, 2]
        assert how == {"classes": CLASSES, "precision": "bf16", "seed": 3000 + draw}
        assert bars[-1] == (3, f"{mode}, 2 labels a class, {draw + 1} of 2", "step")
    assert row["settings"] == {
        **SETTINGS,
        "weights": DIGEST if mode == "finetune" else None,
        "precision": "bf16",
        "repeats": 2,
        "epochs": 7,
        "min_steps": 5,
        "encoder_lr": 0.004 * share,
        "head_lr": 0.004,
        "steps": 7,
    }
    measure(run, **{**options, "labels": "100%"})
    list(calls[-1][-1]["progress"](range(1)))
    assert bars[-1][1] == f"{mode}, 100% of the labels, 1 of 1"


@pytest.mark.parametrize("mode", ["linear", "knn"])
def test_encodings_that_are_not_finite_are_told(tmp_path, measure, monkeypatch, mode):
    monkeypatch.setattr(Run, "trained", lambda run, dataset: Eye(torch.inf))
    # A black pixel times infinity is no number.
    with pytest.raises(TrainingError, match=rf"^{tmp_path}/run: encodings .*expected finite numbers, got 19 of 19 row"):
        measure(mode=mode)


def test_encoders_that_have_seen_the_labels_are_told(tmp_path, measure, calls, capsys):
    """No others, and not where nothing of what they have learned is used."""
    warned = {}
    for name, model, options, mode in (
        ("supcon", "supcon", {}, "knn,untrained"),
        ("fresh", "supcon", {}, "supervised,untrained"),
        ("modules", "greedy-infomax", {"objective": "supervised"}, "linear,knn"),
        ("greedy", "greedy-infomax", {}, "knn"),
    ):
        run = Run(tmp_path / name)
        run.config = config_of(model, **options)
        measure(run, mode=mode)
        warned[name] = capsys.readouterr().err
    seen = "the encoder has learned from the labels of all training images; "
    assert f"warning: {tmp_path}/supcon: {seen}knn of fewer labels does not tell" in warned["supcon"]
    assert f"{seen}linear, knn of fewer labels" in warned["modules"]
    assert "labels" not in warned["fresh"] + warned["greedy"]


def test_what_was_measured_is_not_measured_again(tmp_path, measure, calls):
    run = Run(tmp_path / "run")
    before = [measure(run, mode="linear,knn", labels="1,2", repeats=1) for _ in range(2)]
    assert before[0] == before[1]
    assert len(calls) == 4
    for options in ({"seed": 4}, {"repeats": 2}, {"neighbours": 5}, {"labels": "3"}):
        count = len(calls)
        measure(run, **{"labels": "1", "repeats": 1, **options})
        assert len(calls) == count + options.get("repeats", 1)


def test_encodings_are_computed_once_and_kept_with_what_they_are_of(tmp_path, measure, calls, bars, monkeypatch):
    kept: list[tuple[Any, ...]] = []

    def cached(path: Path, origin: dict[str, str], count: int, compute: Callable[[], Tensor]) -> Tensor:
        kept.append((path.name, path.parent, count, origin))
        return compute()

    original, devices = evaluator.encode, []

    def encode(images: ImageSet, features: Any, device: torch.device, **options: Any) -> Tensor:
        devices.append(device)
        return original(images, features, device, **options)

    monkeypatch.setattr(evaluator, "cached_encodings", cached)
    monkeypatch.setattr(evaluator, "encode", encode)
    run = Run(tmp_path / "run")
    measure(run, mode="linear,knn,untrained", labels="1,2", repeats=1)
    assert [each[:3] for each in kept] == [
        (f"features-{state}-{split}.safetensors", tmp_path / "run" / "evaluation", count)
        for state in ("trained", "untrained")
        for split, count in (("train", 19), ("test", 8))
    ]
    assert bars == [
        (1, f"encoding the {split} images ({state})", "batch")
        for state in ("trained", "untrained")
        for split in ("train", "test")
    ]
    assert devices == [CPU] * 4
    dataset = run.dataset()
    for (_, _, _, origin), weight, images in zip(
        kept, (2, 2, 104, 104), [dataset.train, dataset.test] * 2, strict=True
    ):
        assert isinstance(origin.pop("model"), str)
        assert origin == {
            "cpc_ext": cpc_ext.__version__,
            "weights": weights_digest(Eye(weight).model),
            "images": images_digest(images),
            "statistics": "((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))",
            "precision": "fp32",
        }


def test_encodings_depend_on_the_model_and_its_view_alone(tmp_path, measure, calls, monkeypatch):
    origins: list[str] = []

    def cached(path: Path, origin: dict[str, str], count: int, compute: Callable[[], Tensor]) -> Tensor:
        origins.append(json.dumps(origin))
        return compute()

    monkeypatch.setattr(evaluator, "cached_encodings", cached)
    base = {"grid_size": 5, "crop": 24}
    for number, options in enumerate(
        (
            {},
            *({"lr": 0.5}, {"data_dir": tmp_path}, {"seed": 9}, {"log_every": 3}, {"probe_every": 3}),
            *({"crop": 30}, {"norm": "layer"}, {"precision": "bf16"}),
        )
    ):
        measure(Run(tmp_path / f"run{number}", **{**base, **options}), labels="1", repeats=1)
    first = origins[::2]
    assert len(set(first[:6])) == 1
    assert len(set(first)) == 4
    assert all(isinstance(json.loads(each)["model"], str) for each in first)


def test_figures_of_a_run(tmp_path, measure, drawn, monkeypatch):
    places = {"knn": (0,) * 8, "linear": (1,) * 8}
    monkeypatch.setattr(evaluator, "knn_scores", lambda *a, **options: ranked(TEST, places["knn"], CLASSES))
    classifier = SimpleNamespace(logits=lambda features: ranked(TEST, places["linear"], CLASSES))
    monkeypatch.setattr(evaluator, "fit_linear_classifier", lambda *arguments, **options: classifier)
    measure(mode="linear,knn", labels="100%,2", repeats=2)
    folder = tmp_path / "run" / "evaluation"
    assert set(drawn) == {
        str(folder / f"{name}.png") for name in ("label_efficiency", "confusion_knn", "confusion_linear")
    }
    lines, chance = drawn[str(folder / "label_efficiency.png")]
    assert chance == 3 / 8
    assert [(line.name, line.mode, line.group, line.labels.tolist()) for line in lines] == [
        (mode, mode, 0, [2, 3.17]) for mode in ("knn", "linear")
    ]
    for mode, accuracy in (("knn", "100.0%"), ("linear", "0.0%")):
        counts, classes, title = drawn[str(folder / f"confusion_{mode}.png")]
        assert counts.sum() == len(TEST)  # Of all labels there is one subset.
        assert (classes, title) == (tuple("abcdef"), f"{mode}, 3.17 labels a class: {accuracy}")


def test_figure_of_several_runs(tmp_path, measure, calls, drawn, capsys):
    other = data(test=np.array([0, 1, 2, 3, 4, 5, 1, 2]))
    runs = (Run(tmp_path / "one"), Run(tmp_path / "two", other))
    for out, path in ((None, tmp_path / "one" / "evaluation" / "comparison.png"), (tmp_path / "x.png",) * 2):
        measure(*runs, mode="knn,untrained", out=out)
        lines, chance = drawn.pop(str(path))
        assert chance == 3 / 8  # The larger of the two.
        assert [(line.name, line.mode, line.group) for line in lines] == [
            (f"{name}: {mode}", mode, number)
            for number, name in enumerate(("one", "two"))
            for mode in ("knn", "untrained")
        ]
    measure(runs[0])
    assert str(tmp_path / "one" / "evaluation" / "comparison.png") not in drawn


def test_nothing_is_reported_of_a_run_without_results(measure, drawn, monkeypatch, capsys):
    def fail(*arguments: object, **options: object) -> None:
        raise TrainingError("no")

    monkeypatch.setattr(evaluator, "knn_scores", fail)
    with pytest.raises(TrainingError, match="no"):
        measure()
    assert (drawn, capsys.readouterr().out) == ({}, "")


def test_one_label_is_too_few(tmp_path, measure, calls):
    images = np.zeros(3, dtype=np.int64)
    run = Run(tmp_path / "run", data(images, TEST * 0, classes=1))
    with pytest.raises(TrainingError, match="--labels 1: 1 label is too few to learn from"):
        measure(run, labels="2,1")
    assert calls == []  # All subsets are there, or nothing is begun.
    assert measure(run, labels="2", repeats=1)["rows"][0]["label_count"] == 2


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("labels", [True, False])
def test_images_and_labels_are_needed_of_both(tmp_path, measure, split, labels):
    images = replace(getattr(data(), split), labels=None) if labels else None
    run = Run(tmp_path / "run", replace(data(), **{split: images}))
    with pytest.raises(TrainingError, match=r"run: the images of --dataset textures have no labels to evaluate with"):
        measure(run)


def test_program_of_modules(tmp_path, bars, monkeypatch):
    """It is given all runs, the place of the figure and a bar."""
    seen = []
    monkeypatch.setattr(evaluator.EncoderRun, "open", lambda path, device, *, data_dir: (path, device, data_dir))
    monkeypatch.setattr(evaluator, "evaluate_per_module", lambda *arguments: seen.append(arguments))
    paths = (tmp_path / "one", tmp_path / "two")
    for out in (None, tmp_path / "x.png"):
        evaluator.evaluate(EvaluationOptions(runs=paths, per_module=True, data_dir=tmp_path, device="meta", out=out))
        runs, path, progress = seen.pop()
        assert runs == [(path, torch.device("meta"), tmp_path) for path in paths]
        assert path == (out or paths[0] / "evaluation" / "accuracy_by_depth.png")
        assert list(progress(range(2), "CPC")) == [0, 1]
        assert bars.pop() == (2, "encoding (CPC)", "batch")


def test_a_figure_that_cannot_be_written(tmp_path):
    with pytest.raises(TrainingError, match=r"cannot write .*/no/x\.png: No such file or directory"):
        evaluator._save_figure(tmp_path / "no" / "x.png", Figure())


@pytest.mark.parametrize(
    ("text", "modes"), [("all", list(MODES)), ("knn", ["knn"]), ("untrained, knn,untrained", ["untrained", "knn"])]
)
def test_modes_by_name(text, modes):
    assert parse_modes(text) == modes


@pytest.mark.parametrize("text", ["", "All", "knn,", "knn linear"])
def test_modes_that_there_are_not(text):
    with pytest.raises(TrainingError, match=r"^--mode: expected all, or some of linear, knn, finetune, "):
        parse_modes(text)


# The record.

HEADER = {"weights": "w", "images": {"test": "t"}}


def row(mode: str = "knn", labels: str = "1", count: float = 1, *, weights: str | None = "w", **more: Any) -> Any:
    return {
        "mode": mode,
        "labels": labels,
        "labels_per_class": count,
        "label_count": 3,
        "repeats": 1,
        "top1_mean": 0.5,
        "top1_std": 0.0,
        "seconds": 1,
        "settings": {"weights": weights},
        "confusion": [[1]],
        **more,
    }


def test_record_as_a_file(tmp_path):
    """By mode, labels a class and labels, a line each; one that is measured again takes the place of the first."""
    path = tmp_path / "evaluation.json"
    record = EvaluationRecord(path, HEADER)
    rows = [row("b"), row("a", "1%", 2), row("a", "2", 2), row("a", "10", 10), row("a", "1")]
    for each in [*rows, row("b", weights=None)]:
        record.add(each)
    expected = [rows[4], rows[1], rows[2], rows[3], row("b", weights=None)]
    assert record.rows == expected
    lines = ["{", '  "weights": "w",', '  "images": {"test": "t"},', '  "rows": [']
    lines += [f"    {json.dumps(each)}" + ("," if each is not expected[-1] else "") for each in expected]
    assert path.read_text() == "\n".join([*lines, "  ]", "}", ""])
    assert record.lines() == {"a": expected[:4], "b": expected[4:]}
    again = EvaluationRecord(path, HEADER)
    assert again.rows == expected
    assert again.header is HEADER
    assert again.told() == ""
    assert again.find("a", "2", {"weights": "w"}) == rows[2]
    assert again.told() == " (1 of these results were there already)"
    for other in (("b", "2", {"weights": "w"}), ("a", "3", {"weights": "w"}), ("a", "2", {"weights": None})):
        assert again.find(*other) is None


def test_rows_that_do_not_hold_are_left_out(tmp_path):
    path = tmp_path / "evaluation.json"
    record = EvaluationRecord(path, HEADER)
    for each in (row("a"), row("b", weights=None), row("c", weights="v", labels="ä")):
        record._add(each)
    assert [each["mode"] for each in record.rows] == ["a", "b", "c"]
    assert [each["mode"] for each in EvaluationRecord(path, HEADER).rows] == ["a", "b"]
    assert [each["mode"] for each in EvaluationRecord(path, {**HEADER, "weights": "v"}).rows] == ["b", "c"]
    assert EvaluationRecord(path, {**HEADER, "images": {"test": "u"}}).rows == []


@pytest.mark.parametrize("name", [*evaluation_record._ENTRIES])
def test_rows_with_entries_of_wrong_types(tmp_path, name):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps({**HEADER, "rows": [{**row(), name: None}]}))
    with pytest.raises(TrainingError, match="is damaged: remove it, and its results are computed again"):
        EvaluationRecord(path, HEADER)


def test_a_record_that_another_process_holds_or_that_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_record, "_PATIENCE_SECONDS", 0.01)
    record = EvaluationRecord(tmp_path / "evaluation.json", HEADER)
    with FileLock(tmp_path / ".evaluation.json.lock"), pytest.raises(TrainingError, match="another process keeps it"):
        record.add(row())
    for error in (OSError(28, "disk is full"), OSError("disk is full")):
        monkeypatch.setattr(evaluation_record, "write_text", Mock(side_effect=error))
        with pytest.raises(TrainingError, match=r"cannot write .*evaluation\.json: disk is full$"):
            record.add(row())


def test_mean_and_deviation():
    assert measured("top1", [0.5]) == {"top1_mean": 0.5, "top1_std": 0.0, "top1": [0.5]}
    assert measured("x", [0.0, 0.5]) == {"x_mean": 0.25, "x_std": pytest.approx(0.125**0.5), "x": [0.0, 0.5]}


def test_table():
    five = {"top5_mean": 0.75, "top5_std": 0.1}
    one, many = row("linear", "1%", 1.25, **five), row("knn", "100%", 5000, repeats=3, top1_std=0.0125, **five)
    assert as_table([one, many]) == (
        "mode    labels  a class  subsets         top-1          top-5  seconds\n"
        "linear      1%     1.25        1        50.0 %         75.0 %      1.0\n"
        "knn       100%     5000        3  50.0 ± 1.2 %  75.0 ± 10.0 %      1.0"
    )
    assert as_table([row(seconds=12.34)]) == (
        "mode  labels  a class  subsets   top-1  seconds\nknn        1        1        1  50.0 %     12.3"
    )
