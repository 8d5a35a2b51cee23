"""Options of the evaluation's command line. Importing this module does not import PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cpc_ext.measures.knn import NEIGHBOURS
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.machine import default_device

__all__ = ["FINETUNE_LR", "MODES", "SPEECH_MEASURES", "EvaluationOptions", "parse_measures", "parse_modes"]

# AdamW's learning rate for runs with another optimizer, whose learning rate does not carry over.
FINETUNE_LR = 1e-3

MODES = {
    "linear": "logistic regression on frozen encodings, its regularisation chosen on held-out parts of the subset",
    "knn": "weighted nearest neighbours of frozen encodings, with the cosine and temperature 0.07",
    "finetune": "encoder and linear classifier trained together from the run's weights, by AdamW: at the run's --lr "
    f"where its --optimizer is adam, else at {FINETUNE_LR:g}, and the encoder at half of that",
    "supervised": "the same from fresh initial weights, all at the whole rate",
    "untrained": "linear on the encodings of the run's initial weights",
}


# Measures of runs on speech.
SPEECH_MEASURES = {
    "phones": "the phone of a frame, by a linear classifier",
    "phones-hidden": "the same by a classifier with a hidden layer",
    "speakers": "the speaker of a recording, by a linear classifier of the frames' mean",
    "speakers-last": "the same of the last frame",
    "abx": "how often a phone is nearer to another phone than to itself, within and across speakers",
}


@dataclass(frozen=True)
class EvaluationOptions:
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
            "encoder, drawn by depth for all runs side by side. Of runs on speech: of phones and speakers."
        ),
    ] = False
    measures: Annotated[
        str,
        tyro.conf.arg(
            help="Of runs on speech, in place of --mode and --labels: what is told from the frames, with commas "
            "between them, or all. " + "; ".join(f"{name}: {what}" for name, what in SPEECH_MEASURES.items()) + "."
        ),
    ] = "phones,speakers"
    layer: Annotated[
        str | None,
        tyro.conf.arg(
            help="Of runs on speech: whose output the frames are, such as encoder, context1 or module2. None: the "
            "context network's."
        ),
    ] = None
    alignment: Annotated[
        Literal["centers", "front", "same-index"],
        tyro.conf.arg(
            help="Of runs on speech: which frame has which label. centers: the one centred nearest; front: frames that "
            "are too many are cut from the front, as Greedy InfoMax's program does; same-index: as CPC_audio does."
        ),
    ] = "centers"
    minutes: Annotated[
        float,
        tyro.conf.arg(help="Of runs on speech: minutes of recordings to learn from, and half as many to test on."),
    ] = 60.0
    data_dir: Annotated[
        Path | None, tyro.conf.arg(help="Folder of the run's data set. None: where it was when the run was trained.")
    ] = None
    device: Annotated[str, tyro.conf.arg(help="Where to compute: cpu, cuda, cuda:1, mps.")] = field(
        default_factory=default_device
    )
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            help="The PNG that several runs are compared in. None: evaluation/comparison.png in the first run's folder "
            "(with --per-module accuracy_by_depth.png)."
        ),
    ] = None


def parse_modes(text: str) -> list[str]:
    """Parse "linear,knn" into its parts, each once; "all" gives all. TrainingError for a name that does not exist."""
    return _parse("--mode", text, MODES)


def parse_measures(text: str) -> list[str]:
    """Parse measures such as "phones,speakers" in the same way."""
    return _parse("--measures", text, SPEECH_MEASURES)


def _parse(option: str, text: str, known: dict[str, str]) -> list[str]:
    names = list(known) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise TrainingError(f"{option}: expected all, or some of {', '.join(known)}, got {name!r}")
    return list(dict.fromkeys(names))
