"""Fixtures of tests of recordings: a cache of their own, and recordings identified by their level."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from cpc_ext.data import WaveformSet


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CPC_EXT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, level: int, samples: int = 1600) -> None:
    """Write a recording of one constant value, at 16 kHz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    importlib.import_module("soundfile").write(path, np.full(samples, level, np.int16), 16_000)


def levels(waveforms: WaveformSet) -> dict[str, int]:
    """Return the constant value of every recording, by its name."""
    found = {}
    for number, name in enumerate(waveforms.names):
        (level,) = set(waveforms.recording(number).tolist())
        found[name] = level
    return found
