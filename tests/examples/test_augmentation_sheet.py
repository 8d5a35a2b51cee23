"""The program that draws a sheet of patch augmentations, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import augmentation_sheet as program
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def pixels_of(sheet: Path) -> np.ndarray:
    return np.array(Image.open(sheet).convert("RGB"))


def share_drawn_on(pixels: np.ndarray) -> float:
    return (pixels < 250).any(-1).mean()


def test_the_whole_sheet_is_drawn_of_the_images_of_a_folder(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(24):
        pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    sheet = tmp_path / "out" / "sheet.png"
    command = [sys.executable, program.__file__, "--out", str(sheet), "--images", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    drawn = pixels_of(sheet)
    assert min(drawn.shape[:2]) > 500
    # Pictures and writing, not an empty page.
    assert 0.3 < share_drawn_on(drawn) < 0.9


def test_without_a_folder_textures_are_drawn(tmp_path, monkeypatch):
    """Three rows stand for all, each of another kind: one with parameters, one of pairs, one of whole draws."""
    rows = [next(row for row in program.ROWS if bool(row[2]) == given) for given in (True, False)]
    monkeypatch.setattr(program, "ROWS", rows)
    monkeypatch.setattr(program, "DRAWS", 1)
    monkeypatch.setattr(sys, "argv", ["augmentation_sheet.py", "--out", str(tmp_path / "sheet.png")])
    program.main(program.parse_arguments())
    assert 0.3 < share_drawn_on(pixels_of(tmp_path / "sheet.png")) < 0.9


def test_a_folder_with_too_few_images_is_named(tmp_path):
    with pytest.raises(SystemExit, match="--images: expected a folder of at least 24 JPEGs or PNGs, found 0"):
        program.make_patches(tmp_path, 24, 48, 0)


def test_patches_have_pixels(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["augmentation_sheet.py", "--out", "sheet.png", "--patch-size", "0"])
    with pytest.raises(SystemExit):
        program.parse_arguments()
    assert "--patch-size: at least 1, got 0" in capsys.readouterr().err
