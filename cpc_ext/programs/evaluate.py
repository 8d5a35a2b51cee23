"""The program `python -m cpc_ext.evaluate`: its options, and which of them are refused at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cpc_ext.training.command_line import VersionOption, parse_command
from cpc_ext.training.errors import TrainingError, exit_status
from cpc_ext.training.knn import NEIGHBOURS
from cpc_ext.training.label_subsets import parse_label_budgets
from cpc_ext.training.machine import default_device

__all__ = ["MODES", "Command", "main", "parse_modes"]

_PROGRAM = "python -m cpc_ext.evaluate"
_DESCRIPTION = (
    "Measure the encoder of a run with few labels: top-1 and top-5 accuracy on all test images after learning from "
    "random subsets of the labelled training images. The results are printed as a table and kept, with figures, in "
    "evaluation/ in the run's folder; what is already there for the same weights, images and settings is taken as it "
    "is. Several runs are also drawn into one figure."
)
MODES = {
    "linear": "logistic regression on frozen encodings, its regularisation chosen on held-out parts of the subset",
    "knn": "weighted nearest neighbours of frozen encodings, with the cosine and temperature 0.07",
    "finetune": "encoder and linear classifier trained together from the run's weights",
    "supervised": "the same from fresh initial weights",
    "untrained": "linear on the encodings of the run's initial weights",
}


@dataclass(frozen=True)
class Command:
    """What the options say; each is described where the command line describes it."""

    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help="Folders of runs.")
    ]
    labels: Annotated[
        str,
        tyro.conf.arg(
            help="Labels to learn from, with commas between them: a number of every class, such as 10, or a share of "
            "every class's, such as 1%, of which each class gets at least one."
        ),
    ] = "1%,10%,100%"
    mode: Annotated[
        str,
        tyro.conf.arg(
            help="Ways to learn, with commas between them, or all. "
            + "; ".join(f"{name}: {what}" for name, what in MODES.items())
            + "."
        ),
    ] = "linear,knn"
    repeats: Annotated[int, tyro.conf.arg(help="Random subsets of each size; of all labels there is only one.")] = 3
    seed: Annotated[int, tyro.conf.arg(help="Determines the subsets, and what training draws.")] = 0
    neighbours: Annotated[int, tyro.conf.arg(help="Nearest neighbours that vote; all where there are fewer.")] = (
        NEIGHBOURS
    )
    finetune_epochs: Annotated[
        int,
        tyro.conf.arg(
            help="Passes over the labelled images, in batches of at most 32, of finetune and supervised alike."
        ),
    ] = 10
    finetune_steps: Annotated[
        int, tyro.conf.arg(help="Updates of finetune and supervised that there are at least, however few the labels.")
    ] = 300
    per_module: Annotated[
        bool,
        tyro.conf.arg(
            help="Instead: a linear probe, of all labels, after every module of Greedy InfoMax, or stack of another "
            "encoder, drawn by depth for all runs side by side."
        ),
    ] = False
    data_dir: Annotated[
        Path | None, tyro.conf.arg(help="Folder of the run's data set. None: where it was when the run was trained.")
    ] = None
    device: Annotated[str, tyro.conf.arg(help="Where to compute: cpu, cuda, cuda:1, mps.")] = "cpu"
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            help="The PNG that several runs are compared in. None: evaluation/comparison.png in the first run's folder "
            "(with --per-module accuracy_by_depth.png)."
        ),
    ] = None
    version: VersionOption = False


def main(arguments: Sequence[str] | None = None, *, prog: str = _PROGRAM) -> int:
    """Run the program with these arguments (default: those of the process); returns the exit status.

    0: done. 1: it could not be done, for a reason that was printed. 2 (raised as SystemExit): wrong options.
    130: Ctrl-C; what was finished is kept.
    """
    command = parse_command(
        Command,
        arguments,
        prog=prog,
        description=_DESCRIPTION,
        default=Command(runs=tyro.MISSING, device=default_device()),
    )
    return exit_status(lambda: _run(command), interrupted="interrupted; results so far are kept")


def _run(command: Command) -> None:
    _check(command)
    from cpc_ext.training.evaluation import evaluate

    evaluate(command)


def _check(command: Command) -> None:
    """TrainingError for values that cannot be right, whatever the runs are."""
    if not command.runs:
        raise TrainingError("give at least one RUN")
    if command.per_module:
        return
    parse_modes(command.mode)
    parse_label_budgets(command.labels)
    for name, least in (("repeats", 1), ("neighbours", 1), ("finetune_epochs", 0), ("finetune_steps", 1), ("seed", 0)):
        if getattr(command, name) < least:
            raise TrainingError(f"--{name.replace('_', '-')}: at least {least}, got {getattr(command, name)}")
    if command.seed >= 2**32:
        raise TrainingError(f"--seed: below 2**32, got {command.seed}")
    if command.out is not None and len(command.runs) == 1:
        raise TrainingError("--out is the figure that several runs are compared in; give more than one RUN")


def parse_modes(text: str) -> list[str]:
    """ "linear,knn" → its parts, each once; "all" → all. TrainingError for a name that does not exist."""
    names = list(MODES) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in MODES:
            raise TrainingError(f"--mode: expected all, or some of {', '.join(MODES)}, got {name!r}")
    return list(dict.fromkeys(names))
