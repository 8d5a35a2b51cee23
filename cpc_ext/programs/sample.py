"""The program `python -m cpc_ext.sample`: its options and their first checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from cpc_ext.programs.command_line import Program
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.machine import default_device

__all__ = ["Command", "main"]

_DESCRIPTION = (
    "Draw images from a PixelCNN that python -m cpc_ext.train has trained, or complete the lower part of an image. "
    "Every value is drawn given all before it, at the cost of what it adds."
)


@dataclass(frozen=True)
class Command:
    """The parsed options; their help texts describe them."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Folder of the run.")]
    n: Annotated[int, tyro.conf.arg(help="Images to draw.")] = 64
    class_index: Annotated[
        int | None,
        tyro.conf.arg(
            name="class",
            help="Class to draw, a number from 0; of a model trained with --class-conditional. None: each "
            "class in turn.",
        ),
    ] = None
    temperature: Annotated[
        float,
        tyro.conf.arg(help="Below 1 the probable becomes more so; 0 always takes the most probable value."),
    ] = 1.0
    complete: Annotated[
        Path | None,
        tyro.conf.arg(
            help="Image whose first --rows are kept and the rest drawn, n times. It is resized, and its middle cut "
            "out, to the size of the run's images; it comes first in the result. Or an array of such an image or of "
            "codes, [C, H, W], in a .npy file."
        ),
    ] = None
    rows: Annotated[int | None, tyro.conf.arg(help="Rows of --complete to keep. None: the upper half.")] = None
    seed: Annotated[int, tyro.conf.arg(help="Determines the draws.")] = 0
    device: Annotated[str, tyro.conf.arg(help="Where to compute: cpu, cuda, cuda:1, mps.")] = field(
        default_factory=default_device
    )
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            help="The PNG to write; or with a name that ends in .npy, NumPy's array of what is drawn, [N, C, H, W]. "
            "None: sampled.png or completed.png in the run's folder, of a run on codes (--levels) sampled.npy."
        ),
    ] = None


def _check(command: Command) -> None:
    """Raise TrainingError for values that are wrong for any run."""
    if command.n < 1:
        raise TrainingError(f"--n: at least 1, got {command.n}")
    if not 0 <= command.seed < 2**63:
        raise TrainingError(f"--seed: from 0 to below 2**63, got {command.seed}")
    if not 0 <= command.temperature < float("inf"):
        raise TrainingError(f"--temperature: at least 0 and finite, got {command.temperature:g}")
    if command.out is not None and command.out.suffix.lower() not in (".png", ".npy"):
        raise TrainingError(f"--out: expected a name that ends in .png or .npy, got {command.out.name}")
    if command.rows is not None and command.complete is None:
        raise TrainingError("--rows needs --complete, the image whose rows are kept")


main = Program(
    name="sample",
    description=_DESCRIPTION,
    command=Command,
    check=_check,
    work="cpc_ext.programs.sampling:sample",
).main
