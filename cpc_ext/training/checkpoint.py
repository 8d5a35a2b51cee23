"""Checkpoints: everything a run needs to go on, in one file that is whole or not there.

A checkpoint is a tree of dicts, lists, numbers, strings and tensors, so that loading one never runs code from it.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.errors import TrainingError

__all__ = ["load_checkpoint", "save_checkpoint"]

_FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path``. OSError where it cannot be written; a checkpoint already there is then intact."""
    with atomic_file(path) as file:
        try:
            torch.save({"format": _FORMAT, **state}, file)
        except RuntimeError as error:
            # PyTorch's zip writer reports a failed write as a RuntimeError of its own while the OSError propagates.
            cause = error.__context__ or error.__cause__
            raise (cause if isinstance(cause, OSError) else OSError(str(error))) from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. TrainingError where it is missing, damaged, or of another format."""
    if not path.is_file():
        raise TrainingError(f"there is no checkpoint to resume from at {path}")
    try:
        # PyTorch does not compare the checksums it writes; a flipped bit would become a wrong weight.
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainingError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except Exception:
        # What unpickling damaged bytes raises is anybody's guess.
        state = None
    if not isinstance(state, dict):
        other = path.with_name("best.pt")
        # Where the last checkpoint was also the best, the two names share their content.
        sound = other.is_file() and not other.samefile(path)
        hint = f"; {other} may still be good: copy it over {path.name}" if sound else ""
        raise TrainingError(f"the checkpoint {path} is damaged or not one of cpc_ext{hint}")
    if state.get("format") != _FORMAT:
        raise TrainingError(f"the checkpoint {path} has format {state.get('format')}, this cpc_ext reads {_FORMAT}")
    return state
