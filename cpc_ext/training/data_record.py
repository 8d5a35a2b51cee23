"""What a checkpoint keeps of the examples that it was trained on, to tell when they are others."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cpc_ext.data import SAMPLE_RATE, ImageSet, WaveformSet

__all__ = ["data_record", "described", "differences"]

# Images whose pixels count in a record, evenly spread: all would take as long as a pass over them.
_SAMPLED_IMAGES = 256
# Pieces of the recordings that count in theirs, and samples of each.
_SAMPLED_PIECES, _PIECE = 256, 4096
# What a record counts.
_COUNTS = ("images", "recordings")


def data_record(examples: ImageSet | WaveformSet) -> dict[str, Any]:
    """Number and size of the examples, and digests of their names, their labels, and the content of some of them."""
    if isinstance(examples, WaveformSet):
        return {
            "recordings": len(examples),
            "seconds": round(len(examples.samples) / SAMPLE_RATE, 2),
            "names": _digest_of_names(examples.names),
            "speakers": None if examples.speakers is None else hashlib.sha256(examples.speakers.tobytes()).hexdigest(),
            "sound": _sound(examples),
        }
    return {
        "images": len(examples),
        "shape": list(examples.images.shape[1:]),
        "names": None if examples.paths is None else _digest_of_names(examples.paths),
        "labels": None if examples.labels is None else hashlib.sha256(examples.labels.tobytes()).hexdigest(),
        "pixels": _pixels(examples),
    }


def described(examples: ImageSet | WaveformSet) -> str:
    """How many examples there are, for a line of a program."""
    if isinstance(examples, WaveformSet):
        return f"{len(examples)} recordings ({len(examples.samples) / SAMPLE_RATE / 60:.1f} minutes)"
    return f"{len(examples)} images"


def _digest_of_names(names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        # A file name may hold bytes that are no text in any encoding.
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def _sound(waveforms: WaveformSet) -> str:
    """A digest of the recordings' lengths and of pieces of them, evenly spread."""
    digest = hashlib.sha256(waveforms.starts.tobytes())
    for start in np.linspace(0, max(len(waveforms.samples) - _PIECE, 0), _SAMPLED_PIECES, dtype=np.int64):
        digest.update(np.ascontiguousarray(waveforms.samples[start : start + _PIECE]).data)
    return digest.hexdigest()


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two records, as a reader would say it; nothing where one of them does not have it."""
    said = []
    for name, value in then.items():
        if name in now and value != now[name]:
            if name in _COUNTS:
                said.append(f"{value} {name} then, {now[name]} now")
            elif name == "shape":
                said.append(f"images of shape {value} then, {now[name]} now")
            else:
                said.append(f"other {name}")
    # All else follows from it.
    return said[:1] if any(name in then and name in now and then[name] != now[name] for name in _COUNTS) else said


def _pixels(images: ImageSet) -> str:
    """A digest of the images' number and shape and of some of them, evenly spread."""
    digest = hashlib.sha256(repr((images.images.shape, [])).encode())
    for index in np.linspace(0, max(len(images) - 1, 0), min(_SAMPLED_IMAGES, len(images)), dtype=np.int64):
        digest.update(np.ascontiguousarray(images.images[index]).data)
    return digest.hexdigest()
