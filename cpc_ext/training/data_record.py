"""Records of the training examples, kept in checkpoints to detect that the examples have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from cpc_ext.data import SAMPLE_RATE, ImageSet, WaveformSet

__all__ = ["data_record", "described", "differences"]

# Number of images, evenly spread, whose pixels are hashed: all would take as long as a pass over the data.
_SAMPLED_IMAGES = 256
# Number of pieces of the recordings, evenly spread, that are hashed, and the audio samples in each.
_SAMPLED_PIECES, _PIECE = 256, 4096
# Entries of a record that are numbers of examples.
_COUNTS = ("images", "recordings")


def data_record(examples: ImageSet | WaveformSet) -> dict[str, Any]:
    """Return the number and size of the examples, and digests of their names, labels and part of their content."""
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
    """Return the number of examples, and of minutes for recordings, as text for messages."""
    if isinstance(examples, WaveformSet):
        return f"{len(examples)} recordings ({len(examples.samples) / SAMPLE_RATE / 60:.1f} minutes)"
    return f"{len(examples)} images"


def _digest_of_names(names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for name in names:
        # File names may contain bytes that are not valid text in any encoding.
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()


def _sound(waveforms: WaveformSet) -> str:
    """Return a digest of where the recordings start and of evenly spread pieces of them."""
    digest = hashlib.sha256(waveforms.starts.tobytes())
    for start in np.linspace(0, max(len(waveforms.samples) - _PIECE, 0), _SAMPLED_PIECES, dtype=np.int64):
        digest.update(np.ascontiguousarray(waveforms.samples[start : start + _PIECE]).data)
    return digest.hexdigest()


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the differences between two records as text; entries that either record lacks are ignored."""
    said = []
    for name, value in then.items():
        if name in now and value != now[name]:
            if name in _COUNTS:
                said.append(f"{value} {name} then, {now[name]} now")
            elif name == "shape":
                said.append(f"images of shape {value} then, {now[name]} now")
            else:
                said.append(f"other {name}")
    # A different number of examples explains all other differences.
    return said[:1] if any(name in then and name in now and then[name] != now[name] for name in _COUNTS) else said


def _pixels(images: ImageSet) -> str:
    """Return a digest of the number and shape of the images and of the pixels of evenly spread ones."""
    digest = hashlib.sha256(repr((images.images.shape, [])).encode())
    for index in np.linspace(0, max(len(images) - 1, 0), min(_SAMPLED_IMAGES, len(images)), dtype=np.int64):
        digest.update(np.ascontiguousarray(images.images[index]).data)
    return digest.hexdigest()
