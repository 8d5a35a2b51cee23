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
    "Write the encodings of images by the encoder of a run: float32, one row an image, in the order of the sorted file "
    "names. A .npy file holds the encodings, and NAME.names.json beside it the file names; a .safetensors file holds "
    'both, the encodings as "features" and the file names as JSON under "names" in its metadata. Of a run on speech: '
    "the frames of recordings, and their times, in a folder with files for each."
)

_SUFFIXES = (".npy", ".safetensors")


@dataclass(frozen=True)
class Command:
    """The parsed options; their help texts describe them."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Folder of the run.")]
    data_dir: Annotated[
        Path | None,
        tyro.conf.arg(help="Folder of images, at any depth; or of another --dataset's files. None: the user's cache."),
    ] = None
    dataset: Annotated[DatasetName, tyro.conf.arg(help="Where the images come from.")] = "folder"
    split: Annotated[
        Literal["all", "pretrain", "train", "test"] | None,
        tyro.conf.arg(
            help="Which images of a --dataset other than folder. They are named as in their files, x[0] or "
            "train.tar/KEY, and in the order of these names, otherwise SPLIT/NUMBER. None: all of your own files, else "
            "train."
        ),
    ] = None
    image_size: Annotated[
        int | None,
        tyro.conf.arg(
            help="Side in pixels that your own images are resized to, their middle cut out, before the run's crop. "
            "None: height and width of the run's own images."
        ),
    ] = None
    per_patch: Annotated[
        bool,
        tyro.conf.arg(
            help="An encoding of every patch, [N, D, rows, cols], in place of their mean, [N, D]. Models of whole "
            "images have one patch."
        ),
    ] = False
    layer: Annotated[
        str | None,
        tyro.conf.arg(
            help="Of a run on speech: whose output the frames are, such as encoder, context1 or module2. None: the "
            "context network's."
        ),
    ] = None
    format: Annotated[
        Literal["npy", "text"],
        tyro.conf.arg(
            help="Of a run on speech: NAME.npy with frames [L, D] and NAME.times.npy with their centres in seconds, or "
            "NAME.txt with a line a frame, its time and then its values, as ZeroSpeech submissions have it."
        ),
    ] = "npy"
    device: Annotated[str, tyro.conf.arg(help="Where to compute: cpu, cuda, cuda:1, mps.")] = field(
        default_factory=default_device
    )
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            help="File to write, .npy or .safetensors; of a run on speech a folder. None: features.npy, or frames, in "
            "the run's folder."
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
