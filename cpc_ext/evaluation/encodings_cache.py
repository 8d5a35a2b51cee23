"""Frozen encodings of a run's images, computed once and kept in a file of the run.

A file records what its encodings were computed from, including digests of weights and images. If this does not match,
or the file is damaged, the encodings are computed anew and replace it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.errors import warn
from cpc_ext.training.safetensors_file import write_safetensors

__all__ = ["cached_encodings"]


def cached_encodings(path: Path, origin: dict[str, str], count: int, compute: Callable[[], Tensor]) -> Tensor:
    """Return the encodings kept at ``path``, or compute and keep them: float32 [N, D].

    origin: what the encodings are computed from; kept ones are taken only if it is equal. count: N. compute: computes
    the encodings. A warning is given if they cannot be written.
    """
    key = json.dumps(origin, sort_keys=True)
    kept = _read(path, key, count)
    if kept is not None:
        return kept
    encodings = compute()
    try:
        with atomic_file(path) as file:
            write_safetensors(file, {"features": encodings.contiguous()}, {"format": "pt", "origin": key})
    except OSError as error:
        warn(f"could not keep the encodings in {path} ({error.strerror or error})")
    return encodings


def _read(path: Path, key: str, count: int) -> Tensor | None:
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("origin") != key:
                return None
            features = file.get_tensor("features")
    except (OSError, SafetensorError):
        return None
    sound = features.ndim == 2 and len(features) == count and features.dtype == torch.float32
    return features if sound else None
