"""The program `python -m cpc_ext.embed`: its options and their first checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cpc_ext.data_sets import medium, origin
from cpc_ext.programs.command_line import Program, refuse_idle
from cpc_ext.training.config import DatasetName
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.machine import default_device
from cpc_ext.training.run_dir import RunDir

__all__ = ["Command", "main"]

_DESCRIPTION = (
    "Write the encodings of images by the encoder of a run: float32, one row per image, in the order of the sorted "
    "file names. A .npy file contains the encodings, and NAME.names.json next to it the file names; a .safetensors "
    'file contains both, the encodings as "features" and the file names as JSON under "names" in its metadata. For a '
    "run on speech: write the frames of recordings, and their times, to a folder with files for each recording."
)

_SUFFIXES = (".npy", ".safetensors")


@dataclass(frozen=True)
class Command:
    """The parsed options; their help texts describe them."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Folder of the run.")]
    data_dir: Annotated[
        Path | None,
        tyro.conf.arg(
            help="Folder of the images, or of recordings for a run on speech, at any depth; or folder of another "
            "--dataset's files. None: the user's cache, for published data sets."
        ),
    ] = None
    dataset: Annotated[DatasetName, tyro.conf.arg(help="Source of the images.")] = "folder"
    split: Annotated[
        Literal["all", "pretrain", "train", "test"] | None,
        tyro.conf.arg(
            help="Split of a --dataset other than folder. Its images have the names of their files, such as x[0] or "
            "train.tar/KEY, and are sorted by them; images without file names are named SPLIT/NUMBER. None: all for "
            "your own files, otherwise train."
        ),
    ] = None
    image_size: Annotated[
        int | None,
        tyro.conf.arg(
            help="Side in pixels of the square that your own images are resized and center-cropped to before the run's "
            "crop. None: height and width of the run's own images."
        ),
    ] = None
    per_patch: Annotated[
        bool,
        tyro.conf.arg(
            help="Write the encoding of every patch, [N, D, rows, cols], instead of their mean, [N, D]. Models of "
            "whole images have one patch."
        ),
    ] = False
    layer: Annotated[
        str | None,
        tyro.conf.arg(
            help="For a run on speech: the layer whose output is written, such as encoder, context1 or module2. None: "
            "the context network."
        ),
    ] = None
    format: Annotated[
        Literal["npy", "text"],
        tyro.conf.arg(
            help="For a run on speech. npy: NAME.npy with the frames [L, D] and NAME.times.npy with their centres in "
            "seconds; text: NAME.txt with one line per frame, its time and then its values, as in ZeroSpeech "
            "submissions."
        ),
    ] = "npy"
    device: Annotated[str, tyro.conf.arg(help="Device to compute on: cpu, cuda, cuda:1, mps.")] = field(
        default_factory=default_device
    )
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            help="File to write, .npy or .safetensors; for a run on speech, the folder to write to. None: features.npy "
            "in the run's folder, or its folder frames."
        ),
    ] = None


def _check(command: Command) -> None:
    """Raise TrainingError for values that are wrong, or would have no effect, for this kind of run."""
    # If the folder is not a run's, skip the checks by kind of run: opening it fails with a better message.
    is_run = RunDir(command.run).config.is_file()
    if RunDir(command.run).medium == "audio":
        refuse_idle(command, ("split", "image_size", "per_patch"), "it is of runs on images")
        if command.out is not None and command.out.suffix in _SUFFIXES:
            raise TrainingError(f"--out: of a run on speech the name of a folder, got {command.out.name}")
        return
    if is_run:
        refuse_idle(command, ("layer", "format"), "it is of runs on speech")
    if medium(command.dataset) != "images":
        raise TrainingError(f"--dataset: {command.dataset} is of sound, the run of images")
    if command.out is not None and command.out.suffix not in _SUFFIXES and (is_run or command.out.suffix):
        raise TrainingError(f"--out: expected a name that ends in {' or '.join(_SUFFIXES)}, got {command.out.name}")
    if command.dataset == "folder":
        refuse_idle(command, ("split",), "--dataset folder takes all images below --data-dir")
        if command.data_dir is None:
            raise TrainingError("--data-dir: name the folder of images")
        if command.image_size is not None and command.image_size < 1:
            raise TrainingError(f"--image-size: at least 1, got {command.image_size}")
    elif command.image_size is not None and not origin(command.dataset).sized:
        raise TrainingError(f"--image-size: the images of {command.dataset} have a size of their own")


main = Program(
    name="embed",
    description=_DESCRIPTION,
    command=Command,
    check=_check,
    work="cpc_ext.programs.embedding:embed",
).main
