"""Classes and functions that the programs' modules share: settings, recognised checkpoints, and loading of weights.

A program's module converts named tensors into a model of ours with the same values, and back. Nothing is dropped
silently: each tensor goes into the model, is kept beside it, or causes an error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cpc_ext._messages import some
from cpc_ext.interop.errors import CheckpointError
from cpc_ext.interop.reading import Checkpoint
from cpc_ext.nn.typed import Module

__all__ = ["Encodings", "Form", "Program", "Reference", "Settings", "grid_view", "put_weights"]


@dataclass(frozen=True)
class Settings:
    """The settings of :func:`cpc_ext.interop.load_reference`; None chooses the program's own default."""

    grid_size: int | None = None
    image_size: int | None = None
    patch_size: int | None = None
    stride: int | None = None
    norm: str | None = None
    skip: int = 1
    neg_samples: int | str = 16
    normalization: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any], noted: Mapping[str, Any]) -> Settings:
        """Return the given settings, completed by the options that the checkpoint records.

        Raises TypeError or ValueError for given settings that are not allowed; recorded ones are ignored instead.
        """
        unknown = [name for name in given if name not in cls.__dataclass_fields__]
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise TypeError(f"settings are {known}, got {', '.join(unknown)}")
        chosen = {name: value for name, value in given.items() if value is not None}
        for name, value in chosen.items():
            if not _allowed(name, value):
                raise ValueError(f"{name} must be {_ALLOWED[name]}, got {value!r}")
        for name in cls.__dataclass_fields__:
            for option in (name, *_OPTIONS.get(name, ())):
                if name not in chosen and _allowed(name, noted.get(option)):
                    chosen[name] = noted[option]
        return cls(**chosen)


_ALLOWED = {
    **dict.fromkeys(("grid_size", "image_size", "patch_size", "stride"), "an int of at least 1"),
    "norm": '"layer" or "instance"',
    "skip": "an int of at least 0",
    "neg_samples": 'an int of at least 1 or "all"',
    "normalization": '"none" or "greedy-infomax"',
}
# Names of these settings in the programs.
_OPTIONS = {
    "grid_size": ("grid",),
    "patch_size": ("patch",),
    "skip": ("skip_step",),
    "neg_samples": ("negative_samples", "negativeSamplingExt"),
}


def _allowed(name: str, value: Any) -> bool:
    if name == "norm":
        return value in ("layer", "instance")
    if name == "normalization":
        return value in ("none", "greedy-infomax")
    if name == "neg_samples" and value == "all":
        return True
    return isinstance(value, int) and not isinstance(value, bool) and value >= (0 if name == "skip" else 1)


@dataclass(frozen=True)
class Form:
    """The form of a checkpoint, from which it can be written again as it was.

    layout: the program's layout of names and files, see its module.
    unused: tensors of the checkpoint that our model does not have, by their names there.
    """

    layout: str = ""
    unused: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Reference:
    """A checkpoint of another program, loaded as a model of ours.

    source: the program.
    model: our model with the checkpoint's weights, in their own precision.
    configuration: the model's arguments and expected input, recognised or assumed, as JSON values. "kind" says what the
        checkpoint holds: "cpc", "cpc-v2", "greedy", "encoder", "image-encoder" for whole images, "pixelcnn++",
        "binary-pixels", the source's name for models of sound, or "part" for a checkpoint without an encoder.
    assumed: descriptions of the values in it that were assumed, because the checkpoint does not determine them.
    form: what :func:`cpc_ext.interop.export_reference` needs to write the checkpoint again as it was.
    """

    source: str
    model: nn.Module
    configuration: dict[str, Any]
    assumed: tuple[str, ...] = ()
    form: Form = field(default_factory=Form)


class Program(ABC):
    """Base class of the programs whose checkpoints can be read and written.

    Attributes:
        source: the program's name.
        settings: names of the settings that its checkpoints use.
    """

    source: ClassVar[str]
    settings: ClassVar[frozenset[str]] = frozenset(Settings.__dataclass_fields__)

    @abstractmethod
    def knows(self, name: str) -> bool:
        """Return whether the program has tensors with this name."""

    def noted_in_name(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the program's options that the file's name or other files in its folder record."""
        return {}

    @abstractmethod
    def load(self, checkpoint: Checkpoint, settings: Settings) -> Reference:
        """Load a checkpoint, whose options include those of :meth:`noted_in_name`, as a model.

        Raises CheckpointError if it is not a checkpoint of this program.
        """

    @abstractmethod
    def export(self, model: nn.Module, form: Form | None) -> dict[str, Tensor]:
        """Return a model's weights by this program's names.

        form: the form of the checkpoint that the model was loaded from, to write it again as it was. None for a model
            of ours: weights that the program has but never uses are then zeros.

        Raises CheckpointError if the program has no such model.
        """

    def packed(self, model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, str]]:
        """Return the content of the program's file for this state, and the texts of other files by their names."""
        return dict(state), {}

    def refuse(self, checkpoint: Checkpoint, names: Sequence[str]) -> CheckpointError:
        """Return the error for a checkpoint with names that this program does not have."""
        total = sum(map(len, checkpoint.parts))
        return CheckpointError(
            f"{checkpoint.origin} is not a checkpoint of {self.source}: {len(names)} of its names do not fit "
            f"({some(names)}), of {total} in all"
        )


class Encodings(Module):
    """Identity encoder for checkpoints without an encoder: its input are the encodings [B, D, rows, cols]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.out_channels = channels

    def forward(self, encodings: Tensor) -> Tensor:
        return encodings


def grid_view(settings: Settings, patch: int, stride: int, grid: int) -> dict[str, int]:
    """Return the sizes of crop, grid and patches, for a patch size and stride in pixels.

    grid: number of patches along a side, unless the settings give it or the size of the crop.

    Raises ValueError if the patches do not fill the crop that the settings ask for.
    """
    size = settings.image_size
    if settings.grid_size is not None:
        grid = settings.grid_size
    elif size is not None:
        grid = (size - patch) // stride + 1
    if size is not None and (grid < 1 or size != patch + stride * (grid - 1)):
        raise ValueError(
            f"image_size {size} is not filled by {grid} patches a side of {patch} pixels with a stride of {stride}"
        )
    return {"image_size": patch + stride * (grid - 1), "grid_size": grid, "patch_size": patch, "stride": stride}


def put_weights(
    model: nn.Module, weights: Mapping[str, Tensor], theirs: Callable[[str], str | None], origin: str
) -> None:
    """Load weights by our names into a model, strictly and in their own precision.

    theirs: translates our names to the other program's, for messages.

    Raises CheckpointError if a tensor is missing, left over, of another shape, or holds integers instead of weights.
    """
    wanted = model.state_dict()
    problems = []
    for name, value in wanted.items():
        if name not in weights:
            problems.append(f"{theirs(name) or name} is missing")
        elif weights[name].shape != value.shape:
            problems.append(
                f"{theirs(name) or name} is {list(weights[name].shape)}, expected {list(value.shape)} beside the others"
            )
        elif value.is_floating_point() and not weights[name].is_floating_point():
            kind = str(weights[name].dtype).removeprefix("torch.")
            problems.append(f"{theirs(name) or name} is of {kind}, expected floating point")
    problems += [f"{theirs(name) or name} has no place" for name in weights if name not in wanted]
    if problems:
        raise CheckpointError(f"{origin}: its weights do not make one model: {'; '.join(problems[:6])}")
    floating = [value.dtype for value in weights.values() if value.is_floating_point()]
    if floating:
        model.to(reduce(torch.promote_types, floating))
    model.load_state_dict(dict(weights))
