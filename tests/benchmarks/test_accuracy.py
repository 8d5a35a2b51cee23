"""The race of methods (accuracy.py): small runs, which runs are skipped, and how results are reported."""

from __future__ import annotations

import json
import sys

import accuracy
import numpy as np
import pytest
from accuracy_run import ENTRANTS
from PIL import Image

from tests.training.conftest import PNG


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes that differ in brightness, 16 images of 32 pixels to train and 6 to test on of each."""
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for split, count in (("train", 140), ("test", 6)):
        for name, low in (("dark", 0), ("light", 100)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(random.integers(low, low + 150, (32, 32, 3), np.uint8)).save(folder / f"{number}.png")
    return root


def race(monkeypatch, capsys, photos, out, *options):
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--data-dir", str(photos), "--jobs", "1", "--out", str(out)])
    sys.argv += ["--labels", "40", "--seeds", "0", *options]
    accuracy.main(accuracy.parse_arguments())
    return capsys.readouterr().out


def test_a_race(monkeypatch, capsys, photos, tmp_path):
    monkeypatch.setenv("CPC_EXT_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "race.json"
    said = race(monkeypatch, capsys, photos, out, "--minutes", "0.01", "--methods", "simclr", "raw-pixels")
    simclr, pixels = json.loads(out.read_text())["results"]
    assert pixels["linear"] == 1.0
    assert (pixels["minutes"], simclr["minutes"]) == (0, 0.01)
    assert simclr["config"]["simclr"]["encoder"] == "resnet-small"
    assert simclr["curve"][0][0] == 0
    assert simclr["curve"][-1][0] == pytest.approx(simclr["training_seconds"] / 60)
    assert len(simclr["curve"]) >= 2
    assert 0 <= simclr["untrained_linear"] <= 1
    assert "| raw pixels, 256 components |  |  | 100.0 |" in said
    assert out.with_suffix(".png").read_bytes().startswith(PNG)

    # Options of one's own make a run of its own.
    said = race(
        monkeypatch, capsys, photos, out, "--minutes", "0.01", "--methods", "simclr", "--options", "--norm layer"
    )
    assert json.loads(out.read_text())["results"][2]["config"]["simclr"]["norm"] == "layer"
    assert "| SimCLR, `--norm layer` | 0.01 |" in said

    # On a busy machine, --steps can replace minutes.
    said = race(monkeypatch, capsys, photos, out, "--minutes", "0", "--methods", "simclr", "--options", "--steps 3")
    by_steps = json.loads(out.read_text())["results"][3]
    assert by_steps["steps"] == 3
    assert by_steps["processor_seconds"] > 0
    assert "| SimCLR, `--steps 3` |  |" in said

    # Existing results are not run again; failures are reported, and retried the next time.
    before = json.loads(out.read_text())["results"]
    monkeypatch.setattr(accuracy, "RUN", tmp_path / "no_such_program.py")
    said = race(
        monkeypatch, capsys, photos, out, "--minutes", "0.01", "--methods", "simclr", "raw-pixels", "supervised"
    )
    assert "supervised, 0 minutes, seed 0: " in said
    assert "No such file" in said
    results = json.loads(out.read_text())["results"]
    assert results[:-1] == before
    assert "error" in results[-1]


@pytest.mark.parametrize(("outcome", "status"), [({"linear": 0.5, "knn": 0.5}, 0), ({"error": "killed"}, 1)])
def test_the_exit_status_tells_of_a_run_that_failed(outcome, status, monkeypatch, photos):
    def run_entry(entry, data_dir, core):
        return entry._asdict() | (outcome if entry.seed else {"linear": 0.5, "knn": 0.5})

    monkeypatch.setattr(accuracy, "run_entry", run_entry)
    options = ["--methods", "simclr", "--seeds", "0", "1", "--jobs", "1"]
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--data-dir", str(photos), *options])
    assert accuracy.main(accuracy.parse_arguments()) == status


def test_the_table():
    runs = [
        {"method": "simclr", "minutes": 10, "seed": seed, "linear": linear, "knn": 0.5, "images_per_second": 1000.0}
        for seed, linear in enumerate((0.5, 0.6))
    ]
    runs[0]["training_seconds"], runs[1]["training_seconds"] = 600.0, 660.0
    runs += [{"method": "cpc-v1", "minutes": 10, "seed": 0, "linear": 0.7, "knn": 0.6, "untrained_linear": 0.3}]
    runs += [{"method": "moco", "minutes": 10, "seed": 0, "error": "killed"}]
    runs += [runs[-2] | {"linear": 0.2, "options": "--norm layer"}]
    assert accuracy.table(runs).splitlines()[2:] == [
        "| CPC v1 | 10 |  | 70.0 | 60.0 | 30.0 |  | 0 |",
        "| SimCLR | 10 | 10.5 | 55.0 (50.0 to 60.0) | 50.0 (50.0 to 50.0) |  | 1000 | 0, 1 |",
        "| CPC v1, `--norm layer` | 10 |  | 20.0 | 60.0 | 30.0 |  | 0 |",
    ]


def test_a_race_on_a_device(monkeypatch, photos):
    arguments = ["accuracy.py", "--data-dir", str(photos), "--seeds", "0", "--device", "cuda:0"]
    monkeypatch.setattr(sys, "argv", arguments)
    options = accuracy.parse_arguments()
    assert options.jobs == 1
    assert {entry.device for entry in accuracy.wanted(options)} == {"cuda:0"}
    left_out = [method for method in ENTRANTS if accuracy.lacks(method, "cuda:0") == "it is run on processors alone"]
    assert left_out == ["lightly-simclr", "raw-pixels", "supervised"]


@pytest.mark.cuda
def test_a_run_on_a_gpu(monkeypatch, photos, tmp_path):
    monkeypatch.setenv("CPC_EXT_CACHE", str(tmp_path / "cache"))
    entry = accuracy.Entry("simclr", 0.01, 0, 40, device="cuda")
    result = accuracy.run_entry(entry, photos, 0)
    assert 0 <= result["linear"] <= 1, result


def test_what_is_missing_is_left_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert accuracy.lacks("lightly-simclr") == "lightly is not installed"
    assert not any(accuracy.lacks(name) for name in ENTRANTS if name != "lightly-simclr")
