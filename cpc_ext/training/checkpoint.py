"""Checkpoints: all state needed to resume a run, in one file that is written atomically.

A checkpoint is a tree of dicts, lists, numbers, strings and tensors, so that loading it never executes code from it.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from cpc_ext.training.atomic_file import atomic_file
from cpc_ext.training.errors import TrainingError

__all__ = ["load_checkpoint", "load_weights", "save_checkpoint", "write_tensors"]

_FORMAT = 1
# Maximum nesting of dicts and lists: ours are five deep, and code that walks a much deeper tree recursively would fail.
_DEPTH = 32
# Error messages quote a wrong entry only up to this many characters.
_SHOWN = 60


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _is_by_name(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


_TENSORS: tuple[Callable[[Any], bool], str] = (
    lambda value: _is_by_name(value) and all(isinstance(tensor, Tensor) for tensor in value.values()),
    "tensors by name",
)
# For each known entry, if present: a test of its value, and a description of valid values for messages.
_ENTRIES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_count, "a number of updates, at least 0"),
    "seconds": (lambda value: _is_number(value) and 0 <= value < math.inf, "a time, at least 0"),
    "best_loss": (_is_number, "a number"),
    "model": _TENSORS,
    "carried": _TENSORS,
    "last_metrics": (
        lambda value: _is_by_name(value) and all(map(_is_number, value.values())),
        "numbers by name",
    ),
    **dict.fromkeys(
        ("config", "description", "task", "streams", "sampler", "since_log", "since_best", "data", "reference"),
        (_is_by_name, "a dict with names"),
    ),
}


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to ``path``. Raises OSError if that fails; a checkpoint already there is then intact."""
    with atomic_file(path) as file:
        write_tensors(file, {"format": _FORMAT, **state})


def write_tensors(file: BinaryIO, tree: dict[str, Any]) -> None:
    """Write a tree with torch.save, but raise OSError if the file cannot be written to."""
    try:
        torch.save(tree, file)
    except RuntimeError as error:
        # PyTorch's zip writer reports a failed write as a RuntimeError of its own while the OSError propagates.
        cause = error.__context__ or error.__cause__
        raise (cause if isinstance(cause, OSError) else OSError(str(error))) from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: a dict in which every known entry that is present has a valid value.

    Raises TrainingError if the file is missing, damaged or of another format, or if an entry is not valid.
    """
    if not path.is_file():
        raise TrainingError(f"there is no checkpoint to resume from at {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            # PyTorch does not compress, so members larger than the file itself mean damage.
            stored = sum(member.file_size for member in archive.infolist())
            # PyTorch does not verify the checksums that it writes; a flipped bit would become a wrong weight.
            damaged = stored > path.stat().st_size or archive.testzip()
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainingError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    except Exception:
        # Unpickling damaged bytes may raise anything.
        state = None
    if not isinstance(state, dict) or not _is_plain(state):
        other = path.with_name("best.pt")
        # If the last checkpoint was also the best one, both names are links to the same file.
        sound = path.name != other.name and other.is_file() and not other.samefile(path)
        hint = f"; {other} may still be good: copy it over {path.name}" if sound else ""
        raise TrainingError(f"the checkpoint {path} is damaged or not one of cpc_ext{hint}")
    if type(state.get("format")) is not int or state["format"] != _FORMAT:
        raise TrainingError(f"the checkpoint {path} has format {state.get('format')!r}, this cpc_ext reads {_FORMAT}")
    for name, (is_right, what) in _ENTRIES.items():
        if name in state and not is_right(state[name]):
            got = repr(state[name])
            got = got if len(got) <= _SHOWN else f"a {type(state[name]).__name__}"
            raise TrainingError(f"the checkpoint {path} is not one of cpc_ext: its {name} should be {what}, not {got}")
    return state


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights into a model.

    Raises RuntimeError if names or shapes differ, or if one has integers where the other has floating-point numbers.
    """
    for name, mine in model.state_dict().items():
        # load_state_dict would silently convert between integers and floating-point numbers.
        if name in weights and weights[name].is_floating_point() != mine.is_floating_point():
            raise RuntimeError(f"{name} is {weights[name].dtype} there, expected {mine.dtype}")
    model.load_state_dict(weights)


def _is_plain(state: dict[Any, Any]) -> bool:
    """Return whether a tree is not nested too deeply and all its tensors are dense and on the CPU."""
    level: list[Any] = [state]
    seen: set[int] = set()
    for _ in range(_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, Tensor):
                if value.layout != torch.strided or value.device.type != "cpu":
                    return False
            elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
                seen.add(id(value))
                below += value.values() if isinstance(value, dict) else value
        if not below:
            return True
        level = below
    return False
