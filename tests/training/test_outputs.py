"""Outputs of a run: figures with images from the whole set, identical files of equal runs, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open

import cpc_ext.models
from cpc_ext import figures
from cpc_ext.data import ImageSet, SimCLRView
from cpc_ext.data.spread import spread
from cpc_ext.tasks import patches
from cpc_ext.tasks.cpc_v1.task import CPCv1Task
from cpc_ext.tasks.simclr.task import SimCLRTask
from cpc_ext.training import run_data
from cpc_ext.training.presets import preset
from cpc_ext.training.run_dir import RunDir


@pytest.mark.parametrize(("count", "total"), [(4, 40), (6, 500), (500, 500), (7, 3), (5, 0), (200, 8000)])
def test_spread(count, total):
    chosen = spread(count, total)
    assert chosen.dtype == np.int64
    assert len(chosen) == min(count, total)
    # One from each of equal parts.
    assert all(
        part * total // len(chosen) <= index < (part + 1) * total // len(chosen) for part, index in enumerate(chosen)
    )
    assert np.array_equal(chosen, spread(count, total))


def test_classes_in_turn_are_not_met_in_step():
    assert len(set((spread(100, 1000) % 10).tolist())) == 10


@pytest.fixture
def by_class(monkeypatch, tiny_dataset):
    """Replace the tiny data set's test images by images sorted by class; class c has pixels of 20 (c + 1)."""
    labels = np.repeat(np.arange(10), 12)
    noise = np.random.default_rng(0).integers(0, 9, (120, 3, 32, 32))
    images = (20 * (labels + 1))[:, None, None, None] + noise
    sorted_set = ImageSet(images.astype(np.uint8), labels.astype(np.int64))
    return replace(tiny_dataset, test=sorted_set)


def classes_of(images):
    """Return the classes of images [N, ...] in 0..255."""
    return sorted({round(float(np.median(image)) / 20) - 1 for image in np.asarray(images)})


def test_figures_show_all_classes(train_fully, by_class, monkeypatch, tmp_path):
    monkeypatch.setattr(run_data, "load_dataset", lambda *arguments, **options: by_class)
    monkeypatch.setattr(CPCv1Task, "evaluate", lambda task: {})
    monkeypatch.setattr(patches, "_NEIGHBOUR_QUERIES", 6)
    shown = {}
    for name in ("model_inputs", "nearest_patches"):
        original = getattr(figures, name)

        def keep(*arguments, name=name, original=original, **options):
            shown[name] = arguments
            return original(*arguments, **options)

        monkeypatch.setattr(figures, name, keep)
    assert train_fully("--out-dir", tmp_path / "run", "--steps", "1") == 0
    images, _ = shown["model_inputs"]
    assert len(classes_of(images)) == len(images) == 4
    queries, neighbours, _, same_class = shown["nearest_patches"]
    queries, neighbours = (np.asarray(pixels) * 255 for pixels in (queries, neighbours))
    assert len(classes_of(queries)) == 6
    # Frames are of the labels of the patches that are shown.
    mine = [classes_of([query]) for query in queries]
    theirs = [[classes_of([patch]) for patch in row] for row in neighbours]
    expected = [[patch == query for patch in row] for query, row in zip(mine, theirs, strict=True)]
    assert np.array_equal(same_class, expected)
    assert not np.all(same_class)


def test_simclr_shows_all_classes(by_class, monkeypatch, tmp_path):
    shown = {}
    monkeypatch.setattr(figures, "save_images", lambda path, images, **options: shown.update(images=images))
    monkeypatch.setattr(SimCLRView, "random_pair", lambda view, images, generator: (view.center(images),) * 2)
    config = preset("simclr", "textures", device="cpu")
    SimCLRTask(config, by_class, torch.device("cpu"))._save_inputs(RunDir(tmp_path))
    assert len(classes_of(shown["images"][:6])) == 6


def test_files_of_tensors_do_not_depend_on_the_process(tmp_path):
    code = (
        "import sys, torch; from cpc_ext.training.safetensors_file import write_safetensors as write; "
        "write(open(sys.argv[1], 'wb'), {'b': torch.ones(3), 'a': torch.arange(5)}, "
        "{name: name for name in ('zeta', 'class', 'encoder', 'format', 'view', 'config', 'ä')})"
    )
    contents = set()
    for number in range(2):
        path = tmp_path / str(number)
        subprocess.run([sys.executable, "-c", code, str(path)], check=True)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    with safe_open(path, "pt") as file:
        assert file.metadata()["ä"] == "ä"
        assert torch.equal(file.get_tensor("a"), torch.arange(5))
        assert torch.equal(file.get_tensor("b"), torch.ones(3))
    assert (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 8 == 0


def test_equal_runs_leave_equal_files(train_fully, tmp_path, monkeypatch):
    monkeypatch.setattr(CPCv1Task, "evaluate", lambda task: {})
    for name in ("one", "two"):
        assert train_fully("--out-dir", tmp_path / name, "--steps", "2") == 0
    for file in ("encoder.safetensors", "config.yaml", "inputs.png", "neighbours.png", "curves.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    # As README has it.
    with safe_open(tmp_path / "one" / "encoder.safetensors", "pt") as file:
        metadata = file.metadata()
        encoder = getattr(cpc_ext.models, metadata["class"])(**json.loads(metadata["encoder"]))
        encoder.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def test_peak_memory_is_not_that_of_the_process_that_started_it():
    child = (
        "import torch; from cpc_ext.programs.training import _peak_memory_bytes as peak; "
        "before = peak(torch.device('cpu')); held = torch.ones(64 << 18); "
        "print(before, peak(torch.device('cpu')))"
    )
    parent = (
        "import subprocess, sys; held = bytearray(1 << 30); held[::4096] = b'x' * len(held[::4096]); "
        f"subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    )
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before < 900 << 20
    assert after - before > 48 << 20  # And it is a peak: 64 MiB more were held.
