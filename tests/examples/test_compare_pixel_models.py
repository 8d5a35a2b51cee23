"""The comparison of the three pixel models: equal sizes, table and figure, and continuation after a stop."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import compare_pixel_models as comparison
import numpy as np
import pytest
from PIL import Image

from cpc_ext.data import Dataset, make_textures
from cpc_ext.programs import training as program
from cpc_ext.tasks import pixel_task
from cpc_ext.tasks.pixel_task import PixelTask
from cpc_ext.training import run_data

MODELS = ["pixelcnn", "gated-pixelcnn", "pixelcnn++"]


@pytest.fixture
def started(monkeypatch):
    """Record the training program's arguments at each start; it runs in this process, on a few images of 4x4 pixels."""

    def part(split, count):
        whole = make_textures(count, split=split, size=16)
        return replace(whole, images=np.ascontiguousarray(whole.images[:, :, ::4, ::4]))

    images = Dataset(
        name="textures",
        pretrain=part("pretrain", 24),
        train=part("train", 10),
        test=part("test", 10),
        classes=tuple(map(str, range(10))),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
        gray_mean=0.5,
        gray_std=0.2,
    )
    starts = []

    def run_program(arguments, *, until=None):
        starts.append(arguments)
        if until is not None:
            monkeypatch.setattr(program.Trainer, "_observe", lambda trainer, log: os.kill(os.getpid(), signal.SIGINT))
        return program.main(arguments)

    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: images)
    monkeypatch.setattr(pixel_task, "_SAMPLES", 1)
    monkeypatch.setattr(comparison, "run_program", run_program)
    return starts


def compare(path, *options, length=("--steps", "3")):
    common = ["--batch-size", "4", "--parameters", "9000", "--device", "cpu", "--out", str(path)]
    return comparison.main(comparison.parse_arguments([*common, *length, *options]))


@pytest.mark.parametrize(("model", "layers"), [("pixelcnn", 3), ("gated-pixelcnn", 5), ("pixelcnn++", 1)])
def test_width_for_parameters(model, layers):
    width, count = comparison.width_for(model, layers, 200_000)
    assert count == pytest.approx(200_000, rel=0.06)
    assert comparison.width_for(model, layers, count) == (width, count)
    assert comparison.width_for(model, layers, count + 100) == (width, count)
    assert comparison.width_for(model, layers, count - 100) == (width, count)


def test_comparison(started, tmp_path, capsys):
    assert compare(tmp_path) == 0
    assert [start[1] for start in started] == MODELS
    document = json.loads((tmp_path / "comparison.json").read_text())
    assert document["complete"]
    results = document["results"]
    assert [result["model"] for result in results] == MODELS
    for result in results:
        assert result["curves"]["training"]["steps"] == [3]
        heldout = result["curves"]["heldout"]
        assert heldout["steps"] == [1, 2, 3]
        assert 0 < heldout["seconds"][0] < heldout["seconds"][-1] == result["curves"]["training"]["seconds"][-1]
        assert heldout["bits_per_dim"][-1] == pytest.approx(result["bits_per_dim"])  # All 10 are looked at.
        summary = json.loads((tmp_path / result["model"] / "summary.json").read_text())
        assert result["steps"] == summary["steps"] == 3
        assert f"| {result['bits_per_dim']:.3f} |" in (tmp_path / "comparison.md").read_text()
    assert (tmp_path / "comparison.md").read_text() in capsys.readouterr().out
    Image.open(tmp_path / "comparison.png").load()

    # Complete runs are kept; a longer comparison continues them.
    assert compare(tmp_path) == 0
    assert len(started) == 3
    assert compare(tmp_path, length=("--steps", "4")) == 0
    assert all("--resume" in start for start in started[3:])
    assert [result["steps"] for result in json.loads((tmp_path / "comparison.json").read_text())["results"]] == [4] * 3

    assert compare(tmp_path, "--seed", "1") == 1
    assert "holds a run with --seed 0, not 1: choose another --out" in capsys.readouterr().err


def test_stopped_comparison_goes_on(started, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparison, "draw", lambda *arguments: None)
    original, steps = PixelTask.losses, []

    def losses(self, *arguments):
        steps.append(1)
        if len(steps) == 5:  # In the second model.
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(PixelTask, "losses", losses)
    assert compare(tmp_path) == 130
    assert "the same command goes on with it" in capsys.readouterr().err
    document = json.loads((tmp_path / "comparison.json").read_text())
    assert not document["complete"]
    assert len(document["results"]) == 1
    assert compare(tmp_path) == 0
    assert len(steps) == 9
    assert ["--resume" in start for start in started] == [False, False, True, False]
    assert json.loads((tmp_path / "comparison.json").read_text())["complete"]


def test_a_time_instead_of_steps(started, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "draw", lambda *arguments: None)
    monkeypatch.setattr(comparison, "trained_seconds", lambda run: 0.0 if not run.metrics.is_file() else 61.0)
    monkeypatch.setattr(PixelTask, "observe", lambda task, step, run: {})
    monkeypatch.setattr(comparison, "ENDLESS", 1000)
    monkeypatch.setattr(comparison, "LOOK_EVERY", 2)
    assert compare(tmp_path, length=("--minutes", "1")) == 0
    # Each is started without an end, stopped at its first look, and finished.
    assert len(started) == 6
    results = json.loads((tmp_path / "comparison.json").read_text())["results"]
    assert [result["steps"] for result in results] == [2] * 3


@pytest.mark.parametrize("option", ["--steps", "--minutes", "--parameters", "--batch-size"])
def test_wrong_arguments(option, tmp_path, capsys):
    with pytest.raises(SystemExit):
        comparison.parse_arguments([option, "0", "--out", str(tmp_path)])
    assert f"{option}: more than 0, got 0" in capsys.readouterr().err
