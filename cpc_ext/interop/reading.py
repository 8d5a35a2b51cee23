"""Reading other programs' checkpoints, from files or dictionaries, as named tensors without executing their code.

A file may be PyTorch's, zipped or in the format before 1.6, or safetensors; its content decides, not its name.
Dictionaries around a state dict, and the prefixes of DataParallel and torch.compile, are removed.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cpc_ext._messages import some
from cpc_ext.interop.errors import CheckpointError

__all__ = ["Checkpoint", "read_checkpoint"]

# Keys under which trainers keep the state dict; Lightning uses the first.
_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "weights")
# Keys of the state dicts that CPC_audio saves side by side.
_PARTS = ("gEncoder", "cpcCriterion")
# Names of the files in a run's folder, by epoch.
_EPOCH = re.compile(r"(?:model_(\d+)\.ckpt|checkpoint_(\d+)\.pt)")
# Prefix of the weights in stored test problems, which also hold inputs and results.
_PROBLEM_PREFIX = "state."
# Largest accepted ratio of unpacked to packed size: PyTorch does not compress, and compressed weights hardly shrink.
_MOST_EXPANSION = 100
# Accepted dtypes. Quantised values of fewer bits are not weights without their scales.
_DTYPES = frozenset(
    (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
        *(torch.uint16, torch.uint32, torch.uint64),
    )
)
# Name components that DataParallel and torch.compile add, at any depth.
_WRAPPING = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")
# Names of moving averages of the weights, and of the counter in PyTorch's AveragedModel.
_AVERAGES = re.compile(r"(?:model_ema|ema_model|ema)\.|n_averaged$")


class _Namespace:
    """Stands in for argparse.Namespace, which holds the options in many checkpoints; it only keeps attributes."""


class _Ignored:
    """Stands in for NumPy scalars and Lightning's callback classes, with which trainers record the best epoch."""

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


# Stand-ins for the classes of these names; Lightning's dictionaries of hyperparameters become plain ones.
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Namespace, "argparse.Namespace"),
    (dict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (dict, "lightning.pytorch.utilities.parsing.AttributeDict"),
    (dict, "lightning_fabric.utilities.data.AttributeDict"),
    (dict, "lightning.fabric.utilities.data.AttributeDict"),
    (_Ignored, "numpy.dtype"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_Ignored, "numpy._core.multiarray.scalar"),
    (_Ignored, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Ignored, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
]


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    parts: one state dict per file, in the order given.
    origin: the files, or the kind of argument given instead, for messages.
    options: the options that the program was run with, as far as the file records them.
    files: the files given, or the last epoch's file in a folder; empty for dictionaries.
    wrapped: whether names had prefixes of DataParallel or torch.compile.
    """

    parts: list[dict[str, Tensor]]
    origin: str
    options: dict[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    wrapped: bool = False

    def merged(self) -> dict[str, Tensor]:
        """Return all parts as one state dict. Raises CheckpointError if two have a name in common."""
        state: dict[str, Tensor] = {}
        for part in self.parts:
            common = state.keys() & part.keys()
            if common:
                raise CheckpointError(f"{self.origin}: more than one of the files has {some(sorted(common))}")
            state |= part
        return state


def read_checkpoint(source: str | Path | Mapping[str, Any] | Sequence[Any]) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Args:
        source: a file, a folder whose file of the last epoch is read, a state dict or a dictionary around one; or a
            sequence of those, if the program saves modules separately.

    Raises:
        TypeError: the source is something else.
        CheckpointError: a file is missing, damaged, of unknown format, or holds more than tensors and plain values; or
            a dictionary holds no tensors.
    """
    if isinstance(source, str | Path | Mapping):
        source = [source]
    if not isinstance(source, Sequence) or not all(isinstance(one, str | Path | Mapping) for one in source):
        raise TypeError(f"path_or_state_dict must be a path, a mapping or a sequence of these, got {source!r:.80}")
    if not source:
        raise CheckpointError("path_or_state_dict holds no file")
    source = [one if isinstance(one, Mapping) else _file_of(Path(one)) for one in source]
    parts: list[dict[str, Tensor]] = []
    options: dict[str, Any] = {}
    wrapped = False
    for one in source:
        name = "the state dict" if isinstance(one, Mapping) else str(one)
        content = one if isinstance(one, Mapping) else _read_file(one)
        given, found = _unwrapped(content, name)
        state = _plain(given, name)
        parts.append(state)
        options |= found
        wrapped |= state.keys() != given.keys()
    names = ["the state dict" if isinstance(one, Mapping) else str(one) for one in source]
    files = tuple(one for one in source if not isinstance(one, Mapping))
    return Checkpoint(parts, ", ".join(dict.fromkeys(names)), options, files, wrapped)


def _file_of(path: Path) -> Path:
    """Return the file of the last epoch in a folder; return any other path unchanged."""
    if not path.is_dir():
        return path
    epochs = {int(found[1] or found[2]): file for file in path.iterdir() if (found := _EPOCH.fullmatch(file.name))}
    if not epochs:
        raise CheckpointError(f"{path} is a folder without checkpoints, model_EPOCH.ckpt or checkpoint_EPOCH.pt")
    return epochs[max(epochs)]


def _read_file(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            start = file.read(9)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if not start:
        raise CheckpointError(f"{path} is empty")
    if start[8:9] == b"{" and not start.startswith(b"PK"):
        return _read_safetensors(path)
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(
            f"{path} is neither a checkpoint of PyTorch nor a safetensors file: it begins with {start[:8]!r}"
        )
    try:
        if start.startswith(b"PK"):
            # PyTorch does not verify the checksums that it writes; a flipped bit would become a wrong weight.
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
                if size > _MOST_EXPANSION * path.stat().st_size:
                    raise CheckpointError(f"{path} would expand to {size:,} bytes, far more than a checkpoint can")
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"{path} is damaged: {damaged} in it has a wrong checksum")
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|[Ii]nstance of) '?([\w.]+)'?", str(error))
        if found is None:
            raise CheckpointError(f"{path} is damaged: it cannot be unpickled") from None
        raise CheckpointError(
            f"{path} holds more than tensors and plain values: {found[1]}. Reading that could run code from the file, "
            "so it is not done; save the state dict alone, torch.save(model.state_dict(), ...), with the program that "
            "wrote it"
        ) from None
    except Exception as error:
        # Reading damaged bytes may raise anything.
        raise CheckpointError(f"{path} is damaged or cut short ({_first_line(error)})") from None


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Return a dictionary with the tensors and the options in the header's metadata."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return {"state_dict": tensors, "hyper_parameters": _parsed(file.metadata() or {})}
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut short ({_first_line(error)})") from None


def _parsed(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Convert decimal strings to integers, because the header can hold only strings."""
    return {name: int(value) if value.isdecimal() else value for name, value in metadata.items()}


def _unwrapped(content: Any, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict inside a file's content, and the options stored beside it."""
    options: dict[str, Any] = {}
    while isinstance(content, Mapping):
        hyper = content.get("hyper_parameters", content.get("hparams"))
        if hyper is None and "weights" in content:
            hyper = content.get("config")
        hyper = vars(hyper) if isinstance(hyper, _Namespace | argparse.Namespace) else hyper
        if isinstance(hyper, Mapping):
            options |= {str(key): value for key, value in hyper.items()}
        side_by_side = [part for part in _PARTS if isinstance(content.get(part), Mapping)]
        if side_by_side:
            content = {f"{part}.{key}": value for part in side_by_side for key, value in content[part].items()}
            break
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{name} holds a {type(content).__name__}, expected a dictionary of tensors")
    state = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not state:
        keys = some(map(str, content)) if content else "nothing"
        raise CheckpointError(f"{name} holds no tensors by name; it holds {keys}")
    if any(key.startswith(_PROBLEM_PREFIX) for key in state):
        state = {
            key.removeprefix(_PROBLEM_PREFIX): value for key, value in state.items() if key.startswith(_PROBLEM_PREFIX)
        }
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.dtype not in _DTYPES:
            kind = "" if value.layout == torch.strided else "sparse "
            raise CheckpointError(
                f"{name}: {key} is a {kind}tensor of {str(value.dtype).removeprefix('torch.')}; expected dense ones of "
                "16 bits or more in floating point, or of integers"
            )
    # If there are only averages, keep them, so that an error about missing weights can list the names in the file.
    own = {key: value for key, value in state.items() if not _AVERAGES.match(key)} or state
    return {key: value.detach() for key, value in own.items()}, options


def _plain(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the state dict without the name components that module wrappers add."""
    plain: dict[str, Tensor] = {}
    for key, value in state.items():
        short = _WRAPPING.sub("", key)
        if short in plain:
            raise CheckpointError(f"{name} has {short} twice, also as {key}")
        plain[short] = value
    return plain


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
