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
    "Sample images from a PixelCNN that python -m cpc_ext.train has trained, or complete the lower part of an image. "
    "Every value is sampled given all values before it; features are cached, so that each step computes only what is "
    "new."
)


@dataclass(frozen=True)
class Command:
    """The parsed options; their help texts describe them."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN", help="Folder of the run.")]
    n: Annotated[int, tyro.conf.arg(help="Number of images to sample.")] = 64
    class_index: Annotated[
        int | None,
        tyro.conf.arg(
            name="class",
            help="Index, from 0, of the class to sample, for a model trained with --class-conditional. None: each "
            "class in turn.",
        ),
    ] = None
    temperature: Annotated[
        float,
        tyro.conf.arg(help="Below 1, likely values become more likely; 0 always takes the most likely value."),
    ] = 1.0
    complete: Annotated[
        Path | None,
        tyro.conf.arg(
            help="Image to complete --n times: its first --rows are kept, and the others are sampled. It is resized "
            "and center-cropped to the size of the run's images, and comes first in the result. Alternatively, a .npy "
            "file with an array [C, H, W] of such an image or of codes."
        ),
    ] = None
    rows: Annotated[int | None, tyro.conf.arg(help="Number of rows of --complete to keep. None: the upper half.")] = (
        None
    )
    seed: Annotated[int, tyro.conf.arg(help="Seed of the sampling.")] = 0
    device: Annotated[str, tyro.conf.arg(help="Device to compute on: cpu, cuda, cuda:1, mps.")] = field(
        default_factory=default_device
    )
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            help="File to write: a PNG, or, if its name ends in .npy, an array [N, C, H, W] of the samples. None: "
            "sampled.png or completed.png in the run's folder; .npy instead of .png for a run on codes (--levels)."
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
