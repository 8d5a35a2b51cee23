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
    "linear": "logistic regression on frozen encodings, with a regularisation chosen on held-out parts of the subset",
    "knn": "weighted nearest neighbours of frozen encodings, by cosine similarity, with temperature 0.07",
    "finetune": "encoder and linear classifier, trained together from the run's weights with AdamW; the learning rate "
    f"is the run's --lr if its --optimizer is adam, else {FINETUNE_LR:g}, and half of that for the encoder",
    "supervised": "the same from new initial weights, with the full learning rate for all",
    "untrained": "linear, on encodings by the run's initial weights",
}


# Measures of runs on speech.
SPEECH_MEASURES = {
    "phones": "accuracy of a linear classifier of each frame's phone",
    "phones-hidden": "the same for a classifier with a hidden layer",
    "speakers": "accuracy of a linear classifier of a recording's speaker, from the mean of its frames",
    "speakers-last": "the same from the last frame",
    "abx": "ABX error: how often an instance of a phone is nearer to another phone than to one of the same phone, "
    "within and across speakers",
}


@dataclass(frozen=True)
class EvaluationOptions:
    """The parsed options; their help texts describe them."""

    runs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help="Folders of runs.")
    ]
    labels: Annotated[
        str,
        tyro.conf.arg(
            help="Numbers of labels to learn from, separated by commas: labels per class, such as 10, or a percentage "
            "of each class's labels, such as 1%, but at least one label per class."
        ),
    ] = "1%,10%,100%"
    mode: Annotated[
        str,
        tyro.conf.arg(
            help="Methods of learning from the labels, separated by commas, or all. "
            + "; ".join(f"{name}: {what}" for name, what in MODES.items())
            + "."
        ),
    ] = "linear,knn"
    repeats: Annotated[
        int, tyro.conf.arg(help="Number of random subsets of each size; with all labels there is only one.")
    ] = 3
    seed: Annotated[int, tyro.conf.arg(help="Seed of the subsets and of training.")] = 0
    neighbours: Annotated[
        int, tyro.conf.arg(help="Number of nearest neighbours that vote; all images if there are fewer.")
    ] = NEIGHBOURS
    finetune_epochs: Annotated[
        int,
        tyro.conf.arg(
            help="Number of passes of finetune and supervised over the labelled images, in batches of at most 32."
        ),
    ] = 10
    finetune_steps: Annotated[
        int, tyro.conf.arg(help="Minimum number of updates of finetune and supervised, however few the labels.")
    ] = 300
    per_module: Annotated[
        bool,
        tyro.conf.arg(
            help="Instead, train a linear probe with all labels after every module of Greedy InfoMax, or after every "
            "stack of another encoder, and plot the accuracies of all runs by depth. For runs on speech, the probes "
            "are those of phones and speakers."
        ),
    ] = False
    measures: Annotated[
        str,
        tyro.conf.arg(
            help="For runs on speech, in place of --mode and --labels: measures of the frames, separated by commas, or "
            "all. " + "; ".join(f"{name}: {what}" for name, what in SPEECH_MEASURES.items()) + "."
        ),
    ] = "phones,speakers"
    layer: Annotated[
        str | None,
        tyro.conf.arg(
            help="For runs on speech: the layer whose output is evaluated, such as encoder, context1 or module2. None: "
            "the context network."
        ),
    ] = None
    alignment: Annotated[
        Literal["centers", "front", "same-index"],
        tyro.conf.arg(
            help="For runs on speech: alignment of frames and labels. centers: each frame has the label with the "
            "nearest centre; front: surplus frames at the front are dropped, as in Greedy InfoMax's program; "
            "same-index: frames and labels of equal index are paired, as in CPC_audio."
        ),
    ] = "centers"
    minutes: Annotated[
        float,
        tyro.conf.arg(help="For runs on speech: minutes of recordings to learn from; half as many are tested on."),
    ] = 60.0
    data_dir: Annotated[
        Path | None, tyro.conf.arg(help="Folder of the run's data set. None: the folder that the run was trained with.")
    ] = None
    device: Annotated[str, tyro.conf.arg(help="Device to compute on: cpu, cuda, cuda:1, mps.")] = field(
        default_factory=default_device
    )
    out: Annotated[
        Path | None,
        tyro.conf.arg(
            help="PNG file of the figure that compares several runs. None: evaluation/comparison.png in the first "
            "run's folder (with --per-module: accuracy_by_depth.png)."
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
