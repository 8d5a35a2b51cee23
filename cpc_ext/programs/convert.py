"""The program `python -m cpc_ext.convert`: its options and their first checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import tyro

from cpc_ext._found import found_in
from cpc_ext.programs.command_line import Program
from cpc_ext.training.config import DatasetName
from cpc_ext.training.errors import TrainingError

__all__ = ["Command", "Source", "main"]

_DESCRIPTION = (
    "Convert a checkpoint of another program into a run's folder, for python -m cpc_ext.evaluate, sample and train "
    "--resume-from (with --source and a new folder as --out); or write a run's model as a checkpoint that such a "
    "program loads (with --to and a file as --out). The kind of model in a checkpoint is recognised from names and "
    "shapes; no code from it is run."
)

if TYPE_CHECKING:
    Source = str
else:
    Source = Literal[tuple(found_in("cpc_ext.interop.sources"))]


@dataclass(frozen=True)
class Command:
    """The parsed options; their help texts describe them."""

    checkpoint: Annotated[
        tuple[Path, ...],
        tyro.conf.Positional,
        tyro.conf.arg(
            metavar="CHECKPOINT [CHECKPOINT ...]",
            help="The checkpoint: a file, the files of all modules from first to last, or the folder of another "
            "program's run on sound. With --to: the folder of a run of cpc_ext.",
        ),
    ]
    out: Annotated[
        Path,
        tyro.conf.arg(
            help="Folder of the new run. With --to: the file to write, in safetensors format if its name ends in "
            ".safetensors, otherwise in PyTorch's."
        ),
    ]
    source: Annotated[Source | None, tyro.conf.arg(help="The program that wrote the checkpoint.")] = None
    to: Annotated[Source | None, tyro.conf.arg(help="The program that should load the run's model.")] = None
    dataset: Annotated[
        DatasetName | None,
        tyro.conf.arg(
            help="Data set of the new run. None: the one that the program uses for patches or images of this size; for "
            "sound, your own recordings."
        ),
    ] = None
    data_dir: Annotated[Path | None, tyro.conf.arg(help="Folder of the data set's files.")] = None
    grid_size: Annotated[
        int | None, tyro.conf.arg(help="Patches along a side of the grid. None: as in the program's examples.")
    ] = None
    image_size: Annotated[
        int | None,
        tyro.conf.arg(
            help="Side in pixels of the crop that is cut into patches, or of the images if the model takes whole "
            "images. None: as in the program's examples."
        ),
    ] = None
    patch_size: Annotated[
        int | None, tyro.conf.arg(help="Side of a patch in pixels. None: as in the program's examples.")
    ] = None
    norm: Annotated[
        Literal["layer", "instance"] | None,
        tyro.conf.arg(help="Norm of the encoder, if its weights fit both choices. None: taken from the file's name."),
    ] = None


def _check(command: Command) -> None:
    """Raise TrainingError for options that contradict each other."""
    if not command.checkpoint:
        raise TrainingError("give the file of a checkpoint, or with --to the folder of a run")
    if (command.source is None) == (command.to is None):
        raise TrainingError(
            f"give either --source, the program that the checkpoint is of ({', '.join(get_args(Source))}), or --to, "
            "the program that is to load a run's model"
        )


main = Program(
    name="convert",
    description=_DESCRIPTION,
    command=Command,
    check=_check,
    work="cpc_ext.programs.converting:convert",
).main
