"""`python -m cpc_ext.evaluate`: label subsets, the methods that learn from them, kept results, refused arguments."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file

from cpc_ext import figures
from cpc_ext.evaluation import evaluator
from cpc_ext.evaluation.encoder_run import EncoderRun
from cpc_ext.evaluation.evaluation_record import EvaluationRecord
from cpc_ext.evaluation.finetuning import FineTuning, fine_tune
from cpc_ext.evaluation.options import MODES
from cpc_ext.measures.knn import knn_scores
from cpc_ext.measures.label_subsets import LabelBudget, parse_label_budgets
from cpc_ext.programs.evaluate import main
from cpc_ext.programs.train_options import parse
from cpc_ext.training import run_data
from cpc_ext.training.checkpoint import load_checkpoint, save_checkpoint
from cpc_ext.training.digests import images_digest, weights_digest
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.presets import preset
from tests.tasks.test_every_option import ENCODER
from tests.training.conftest import PNG, TINY, new_run

SIMCLR = (
    *("--model", "simclr", "--view-size", "24", "--projection-channels", "8", "--batch-size", "8", "--steps", "4"),
    *("--warmup-steps", "2", "--device", "cpu", "--precision", "fp32"),
)
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("quick_probe")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_dataset):
    """Folders of runs: "cpc" and "simclr"."""
    folder = tmp_path_factory.mktemp("runs")
    for name, options in (("cpc", (*TINY, "--context-layers", "1")), ("simclr", SIMCLR)):
        new_run(folder / name, parse([*options, "--encoder", ENCODER]).run, tiny_dataset)
    return folder


@pytest.fixture
def run(runs, tmp_path, monkeypatch, tiny_dataset):
    """run("cpc") is a copy of a run's folder, whose data set is the tiny one."""
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: tiny_dataset)
    return lambda name, copied="": Path(shutil.copytree(runs / name, tmp_path / (copied or name)))


@pytest.fixture
def empty_figures(monkeypatch):
    """Replace figures by empty ones, since drawing takes most of an evaluation's time."""
    for name in ("confusion", "label_efficiency"):
        monkeypatch.setattr(figures, name, lambda *arguments: Figure((1, 1)))


def evaluate(*arguments):
    return main([*map(str, arguments), "--device", "cpu"])


def record(folder):
    return json.loads((folder / "evaluation" / "evaluation.json").read_text())


def rows(folder):
    return {(row["mode"], row["labels"]): row for row in record(folder)["rows"]}


# ---- Subsets of the labels ----


def test_subset_is_balanced_and_nested_and_drawn_from_the_seed():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), (40, 60, 100)))
    names = ("a", "b", "c")

    def draw(text, number=0, seed=0):
        return parse_label_budgets(text)[0].subset(labels, names, seed=seed, draw=number)

    assert np.bincount(labels[draw("7")]).tolist() == [7, 7, 7]
    assert np.bincount(labels[draw("10%")]).tolist() == [4, 6, 10]
    assert np.bincount(labels[draw("1%")]).tolist() == [1, 1, 1]
    assert draw("100%").tolist() == list(range(200))
    assert set(draw("5")) < set(draw("7")) < set(draw("50%"))
    assert np.array_equal(draw("7"), draw("7"))
    assert not np.array_equal(draw("7"), draw("7", number=1))
    assert not np.array_equal(draw("7"), draw("7", seed=1))


def test_more_labels_than_there_are():
    with pytest.raises(TrainingError, match="--labels 3: class b has 2 labelled training images"):
        LabelBudget(per_class=3).subset(np.array([0, 0, 0, 1, 1]), ("a", "b"), seed=0, draw=0)


def test_label_budgets_as_text():
    assert [str(budget) for budget in parse_label_budgets("10, 0.5%,100%,10")] == ["10", "0.5%", "100%"]


# ---- Methods that learn from labels ----


@pytest.mark.parametrize("neighbours", [1, 4, 200])
def test_knn_is_the_plain_formula(neighbours):
    generator = torch.Generator().manual_seed(0)
    labelled, queries = (torch.randn(count, 6, generator=generator) for count in (13, 5))
    labels = torch.randint(3, (13,), generator=generator)
    scores = knn_scores(labelled, labels, queries, classes=3, neighbours=neighbours, temperature=0.2)
    for query, row in zip(queries, scores, strict=True):
        cosines = [float(query @ key / query.norm() / key.norm()) for key in labelled]
        nearest = sorted(range(13), key=lambda i: -cosines[i])[:neighbours]
        expected = [sum(math.exp(cosines[i] / 0.2) for i in nearest if labels[i] == label) for label in range(3)]
        assert torch.allclose(row * math.exp(1 / 0.2), torch.tensor(expected, dtype=torch.float64), rtol=1e-5)


def opened(folder):
    run = EncoderRun.open(folder, CPU)
    dataset = run.dataset()
    return run, dataset, run.trained(dataset)


@pytest.mark.parametrize("name", ["cpc", "simclr"])
def test_fine_tuning_learns_its_labels(run, name):
    """Images of two classes, few enough to be learnt by heart."""
    _, dataset, task = opened(run(name))
    chosen = np.flatnonzero(dataset.train.labels < 2)
    shown = replace(dataset.train, images=dataset.train.images[chosen], labels=dataset.train.labels[chosen])
    recipe = FineTuning(epochs=1, min_steps=60, encoder_lr=2e-3, head_lr=2e-3)

    def tune(seed=0):
        model = copy.deepcopy(task.model)
        options = {"classes": 2, "precision": "fp32", "progress": iter}
        return model, fine_tune(task, model, dataset.train, chosen, shown, recipe, seed=seed, **options)

    before = weights_digest(task.model)
    model, logits = tune()
    assert logits.shape == (8, 2)
    assert (logits.argmax(1).numpy() == shown.labels).mean() >= 0.875
    assert weights_digest(task.model) == before != weights_digest(model)
    assert torch.equal(tune()[1], logits)
    assert not torch.equal(tune(seed=1)[1], logits)


def test_length_of_fine_tuning():
    recipe = FineTuning(epochs=3, min_steps=10, encoder_lr=1e-3, head_lr=1e-3)
    assert recipe.steps(20) == 10
    assert recipe.steps(33 * 32 + 1) == 3 * 34


@pytest.mark.parametrize("name", ["cpc", "simclr"])
def test_encoder_is_differentiable_and_sees_random_crops(run, name):
    _, dataset, task = opened(run(name))
    images = torch.from_numpy(dataset.train.images[:3])
    centre = task.encode(task.model, images)
    assert centre.requires_grad
    assert centre.shape[:2] == (3, task.model.encoder.out_channels)
    random = [task.encode(task.model, images, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(random[0], random[1])
    assert not torch.equal(random[0], random[2])
    features = task.features(task.model, images)
    assert not features.requires_grad
    assert torch.equal(features, task.encodings(task.model, images).mean((2, 3)))


# ---- The program ----


def test_evaluation_leaves_everything(run, capsys):
    folder = run("cpc")
    options = ("--labels", "50%,100%", "--repeats", 2, "--finetune-steps", 2, "--finetune-epochs", 0)
    assert evaluate(folder, *options, "--mode", "all") == 0
    table = capsys.readouterr().out
    written = record(folder)
    assert written["model"] == "cpc-v1"
    assert written["chance_accuracy"] == pytest.approx(0.1)
    assert len(written["rows"]) == 5 * 2
    assert [written["train_images"], written["test_images"]] == [40, 30]
    for row in written["rows"]:
        assert row["repeats"] == len(row["top1"]) == (1 if row["labels"] == "100%" else 2)
        assert row["label_count"] == 10 * row["labels_per_class"] == {"50%": 20, "100%": 40}[row["labels"]]
        assert row["top1_mean"] == pytest.approx(np.mean(row["top1"]))
        assert row["top1_std"] == pytest.approx(np.std(row["top1"], ddof=1) if row["repeats"] > 1 else 0)
        confusion = np.array(row["confusion"])
        assert confusion.sum() == 30 * row["repeats"]
        assert np.trace(confusion) == pytest.approx(30 * sum(row["top1"]))
        assert all(five >= one for one, five in zip(row["top1"], row["top5"], strict=True))
        assert f"{100 * row['top1_mean']:.1f}" in table
    # The probe that a run ends with, which learns from all labels.
    summary = opened(folder)[2].evaluate()
    assert rows(folder)["linear", "100%"]["top1_mean"] == summary["probe_accuracy"]
    assert rows(folder)["untrained", "100%"]["top1_mean"] == summary["untrained_probe_accuracy"]
    for figure in ("label_efficiency", *(f"confusion_{mode}" for mode in MODES)):
        assert (folder / "evaluation" / f"{figure}.png").read_bytes().startswith(PNG), figure


@pytest.mark.usefixtures("empty_figures")
def test_equal_seeds_give_equal_results(run):
    first, second = run("cpc", "first"), run("cpc", "second")
    options = ("--labels", "2", "--mode", "knn,finetune,supervised", "--finetune-steps", 2, "--finetune-epochs", 0)
    assert evaluate(first, *options) == evaluate(second, *options) == 0
    for key, row in rows(first).items():
        assert row | {"seconds": 0} == rows(second)[key] | {"seconds": 0}
    assert evaluate(second, "--labels", "2", "--mode", "knn", "--seed", 1) == 0
    assert rows(first)["knn", "2"]["confusion"] != rows(second)["knn", "2"]["confusion"]


@pytest.mark.usefixtures("empty_figures")
def test_encodings_are_computed_once(run, monkeypatch):
    folder = run("cpc")
    encoded = []
    original = evaluator.encode

    def counted(images, *arguments, **options):
        encoded.append(len(images))
        return original(images, *arguments, **options)

    monkeypatch.setattr(evaluator, "encode", counted)
    assert evaluate(folder, "--labels", "2", "--mode", "linear,knn", "--repeats", 1) == 0
    assert encoded == [40, 30]
    assert evaluate(folder, "--labels", "3", "--mode", "knn") == 0
    assert encoded == [40, 30]
    before = rows(folder)

    kept = folder / "evaluation" / "features-trained-test.safetensors"
    whole, features = kept.read_bytes(), load_file(kept)["features"].clone()
    for damaged in (whole[:-40], whole[:5], b""):
        kept.write_bytes(damaged)
        encoded.clear()
        (folder / "evaluation" / "evaluation.json").unlink()
        assert evaluate(folder, "--labels", "3", "--mode", "knn") == 0
        assert encoded == [30]
        assert torch.equal(load_file(kept)["features"], features)
        assert rows(folder)["knn", "3"]["top1"] == before["knn", "3"]["top1"]

    state = load_checkpoint(folder / "checkpoint.pt")
    del state["format"]
    state["model"]["encoder.conv1.weight"] *= 2
    save_checkpoint(folder / "checkpoint.pt", state)
    encoded.clear()
    assert evaluate(folder, "--labels", "2", "--mode", "linear", "--repeats", 1) == 0
    assert encoded == [40, 30]
    assert set(rows(folder)) == {("linear", "2")}  # What the other weights were worth is gone.


def test_images_digest_depends_on_pixels_and_labels(tiny_dataset):
    images = tiny_dataset.train
    other = images.images.copy()
    other[-1, -1, -1, -1] ^= 1
    turned = np.ascontiguousarray(images.images.transpose(0, 1, 3, 2)).transpose(0, 1, 3, 2)
    assert images_digest(replace(images, images=turned)) == images_digest(images)
    assert images_digest(replace(images, images=other)) != images_digest(images)
    assert images_digest(replace(images, labels=images.labels[::-1].copy())) != images_digest(images)


@pytest.mark.usefixtures("empty_figures")
def test_results_are_added_and_not_computed_twice(run, monkeypatch):
    folder = run("cpc")
    assert evaluate(folder, "--labels", "1,2", "--mode", "knn", "--repeats", 1) == 0
    before = rows(folder)

    def refuse(*arguments, **options):
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(evaluator, "knn_scores", refuse)
        assert evaluate(folder, "--labels", "1,2", "--mode", "untrained,knn", "--repeats", 1) == 0
        assert {key: row for key, row in rows(folder).items() if key[0] == "knn"} == before
        with pytest.raises(AssertionError):
            evaluate(folder, "--labels", "1", "--mode", "knn", "--neighbours", 1)
    assert evaluate(folder, "--labels", "1", "--mode", "knn", "--neighbours", 1) == 0
    assert rows(folder)["knn", "1"]["settings"]["neighbours"] == 1
    assert len(rows(folder)) == 4


@pytest.mark.usefixtures("empty_figures")
def test_ctrl_c_keeps_what_is_finished(run, monkeypatch, capsys):
    folder = run("cpc")

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluator, "fine_tune", interrupted)
    assert evaluate(folder, "--labels", "1,2", "--mode", "knn,finetune") == 130
    assert set(rows(folder)) == {("knn", "1"), ("knn", "2")}
    assert (folder / "evaluation" / "label_efficiency.png").exists()
    captured = capsys.readouterr()
    assert "knn" in captured.out
    assert "results so far are kept" in captured.err


def test_several_runs_are_compared(run, tmp_path):
    first, second = run("cpc"), run("simclr")
    options = ("--labels", "2", "--mode", "knn,supervised", "--finetune-steps", 2, "--finetune-epochs", 0)
    assert evaluate(first, second, *options, "--repeats", 1) == 0
    assert (first / "evaluation" / "comparison.png").read_bytes().startswith(PNG)
    assert set(rows(first)) == set(rows(second))
    assert evaluate(first, second, "--labels", "1", "--mode", "knn", "--out", tmp_path / "both.png") == 0
    assert (tmp_path / "both.png").read_bytes().startswith(PNG)


def test_images_without_labels(run, monkeypatch, tiny_dataset, capsys):
    folder = run("cpc")
    unlabelled = replace(tiny_dataset, train=None, test=replace(tiny_dataset.test, labels=None), classes=())
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: unlabelled)
    assert evaluate(folder) == 1
    assert "the images of --dataset textures have no labels" in capsys.readouterr().err


@pytest.mark.usefixtures("empty_figures")
def test_place_of_the_data(run, monkeypatch, tiny_dataset, tmp_path):
    asked = []

    def load(name, data_dir, **options):
        asked.append(data_dir)
        return tiny_dataset

    monkeypatch.setattr(run_data, "load_dataset", load)
    assert evaluate(run("cpc"), "--labels", "1", "--mode", "knn", "--data-dir", tmp_path) == 0
    assert asked == [tmp_path]


def test_runs_that_cannot_be_evaluated(run, tmp_path, capsys):
    def error(folder):
        assert evaluate(folder) == 1
        return capsys.readouterr().err

    assert f"{tmp_path / 'nowhere'} is not a run's folder" in error(tmp_path / "nowhere")
    pixels = tmp_path / "pixels"
    pixels.mkdir()
    (pixels / "config.yaml").write_text(preset("pixelcnn", "textures").to_yaml())
    assert "is a run of pixelcnn, which learns no encoder of images; cpc-v1, " in error(pixels)
    folder = run("cpc")
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text('{"rows": [')
    assert "evaluation.json is damaged: remove it" in error(folder)
    state = load_checkpoint(folder / "checkpoint.pt")
    del state["format"], state["model"]["encoder.conv1.weight"]
    save_checkpoint(folder / "checkpoint.pt", state)
    assert "is of another model than" in error(folder)
    (folder / "checkpoint.pt").unlink()
    assert f"there is no checkpoint.pt in {folder}" in error(folder)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--labels", "5"), "--labels 5: class 0 has 4 labelled training images"),
        (("--labels", "1,many"), "--labels: expected labels per class such as 10"),
        (("--labels", "0"), "got '0'"),
        (("--labels", "101%"), "got '101%'"),
        (("--labels", ""), "got ''"),
        (("--mode", "linear,best"), "--mode: expected all, or some of linear, knn, "),
        (("--repeats", "0"), "--repeats: at least 1, got 0"),
        (("--neighbours", "0"), "--neighbours: at least 1, got 0"),
        (("--finetune-steps", "0"), "--finetune-steps: at least 1, got 0"),
        (("--seed", "-1"), "--seed: at least 0, got -1"),
        (("--out", "a.png"), "give more than one RUN"),
        (("--minutes", "3"), "--minutes would have no effect: it is of runs on speech"),
        (("--per-module", "--repeats", "9"), "--repeats would have no effect: --per-module learns from all labels"),
        (("--device", "cuda:63"), "--device cuda:63 is not available"),
    ],
)
def test_what_there_is_not(run, capsys, options, expected):
    device = () if "--device" in options else ("--device", "cpu")
    assert main([str(run("cpc")), *options, *device]) == 1
    assert expected in capsys.readouterr().err


def test_folder_that_cannot_be_written(run, capsys):
    folder = run("cpc")
    (folder / "evaluation").write_text("a file where the folder would be")
    assert evaluate(folder) == 1
    assert f"cannot write {folder}" in capsys.readouterr().err


def test_program():
    done = subprocess.run(
        [sys.executable, "-m", "cpc_ext.evaluate", "--help"], capture_output=True, text=True, check=True
    )
    for name in ("RUN", "--labels", "--mode", "--repeats", "--seed", "--neighbours", "--finetune-steps", "--out"):
        assert name in done.stdout


# ---- Several processes at once ----


def test_rows_of_several_writers_are_all_kept(tmp_path):
    """Each reads the file, adds its row and writes it, with what the others put there in the meantime."""
    header = {"weights": "w", "images": {"test": "t"}}

    def row(writer, number):
        return {
            "mode": f"mode{writer}",
            "labels": str(number),
            "labels_per_class": number,
            "label_count": number,
            "repeats": 1,
            "top1_mean": 0.5,
            "top1_std": 0.0,
            "seconds": 0.1,
            "confusion": [[1]],
            "settings": {"weights": None},
        }

    def write(writer):
        record = EvaluationRecord(tmp_path / "evaluation.json", header)
        for number in range(8):
            record.add(row(writer, number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    kept = EvaluationRecord(tmp_path / "evaluation.json", header).rows
    assert {(each["mode"], each["labels"]) for each in kept} == {
        (f"mode{w}", str(n)) for w in range(4) for n in range(8)
    }


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "7", '{"rows": []}', '{"images": {"test": "t"}, "rows": {"a": 1}}', "[" * 100_000),
        '{"images": {"test": "t"}, "rows": [[]]}',
        '{"images": {"test": "t"}, "rows": [{"settings": {"weights": "w"}}]}',
    ],
)
def test_a_record_that_is_none(tmp_path, text):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(TrainingError, match=r"evaluation.json is damaged: remove it"):
        EvaluationRecord(tmp_path / "evaluation.json", {"weights": "w", "images": {"test": "t"}})
