"""Fixtures of tests of image data sets in files."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A temporary folder in place of the user's cache."""
    place = tmp_path / "cache"
    monkeypatch.setenv("CPC_EXT_CACHE", str(place))
    return place


def pictures(count: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Noise, uint8 [count, *shape]."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def encoded(pixels: np.ndarray, format: str = "PNG") -> bytes:
    """The content of an image file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()
