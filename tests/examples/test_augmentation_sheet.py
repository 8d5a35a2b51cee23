"""The program that draws what the patch augmentation does, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "python" / "examples" / "augmentation_sheet.py"


def run(*arguments: object) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("from_folder", [False, True])
def test_the_sheet_is_drawn(tmp_path, from_folder):
    options = []
    if from_folder:
        generator = np.random.default_rng(0)
        for number in range(24):
            pixels = generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        options = ["--images", tmp_path]
    sheet = tmp_path / "out" / "sheet.png"
    done = run("--out", sheet, *options)
    assert done.returncode == 0, done.stderr
    pixels = np.array(Image.open(sheet).convert("RGB"))
    assert min(pixels.shape[:2]) > 500
    # Pictures and writing, not an empty page.
    assert 0.3 < (pixels < 250).any(-1).mean() < 0.9


def test_a_folder_with_too_few_images_is_named(tmp_path):
    done = run("--out", tmp_path / "sheet.png", "--images", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("--images: expected a folder of at least 24 JPEGs or PNGs, found 0")
