"""One run of ``accuracy.py``: a method, minutes and a seed to the accuracies of its frozen features.

    python accuracy_run.py '{"method": "simclr", "minutes": 10, "seed": 0, "labels": 10000}' PHOTOS RESULT.json CORE

Methods of ours are runs as `python -m cpc_ext.train` makes them. Others train the encoder of our SimCLR in loops of
their own, for as long by the clock, and are looked at through the same view.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accuracy_rivals import lightly_simclr, supervised
from torch import Tensor

from cpc_ext.data import Dataset, ImageFetcher
from cpc_ext.data.spread import spread
from cpc_ext.measures.effective_rank import effective_rank
from cpc_ext.measures.knn import knn_accuracy
from cpc_ext.measures.probe import encode, linear_probe
from cpc_ext.programs.train_options import Command, parse
from cpc_ext.programs.training import of_known_length, run
from cpc_ext.tasks.encoder_task import EncoderTask
from cpc_ext.tasks.online_probe import PROBED, ImageProbe
from cpc_ext.training.checkpoint import load_checkpoint, load_weights
from cpc_ext.training.config import RunConfig
from cpc_ext.training.distribution import joined_ranks
from cpc_ext.training.registry import task_class
from cpc_ext.training.run_data import load_data
from cpc_ext.training.run_dir import RunDir

__all__ = ["ENTRANTS", "Entry", "lacks"]

# Looks at the encoder on the way, for the curve.
PROBES = 12
# Principal components of pixels, and images that they are found in.
COMPONENTS, COMPONENTS_OF = 256, 5000
CPU = torch.device("cpu")


class Entry(NamedTuple):
    """A run. labels: learned from at most.
    minutes: of training; 0 where it takes none that could be given, or the options say how many steps.

    options: more of them, as `python -m cpc_ext.train` takes them; of a rival those of the network alone matter.
    device: what trains and encodes, in PyTorch's name; on the processor a run has one core.
    """

    method: str
    minutes: float
    seed: int
    labels: int
    options: str = ""
    device: str = "cpu"


class Entrant(NamedTuple):
    """title: in table and chart. model: whose defaults it has, or whose encoder. timed: whether minutes are given."""

    title: str
    model: str
    timed: bool = True


ENTRANTS = {
    "cpc-v1": Entrant("CPC v1", "cpc-v1"),
    "cpc-v2": Entrant("CPC v2", "cpc-v2"),
    "greedy-infomax": Entrant("Greedy InfoMax", "greedy-infomax"),
    "simclr": Entrant("SimCLR", "simclr"),
    "moco": Entrant("MoCo", "moco"),
    "supcon": Entrant("SupCon, with all labels", "supcon"),
    "lightly-simclr": Entrant("SimCLR of lightly", "simclr"),
    "raw-pixels": Entrant("raw pixels, 256 components", "simclr", timed=False),
    "supervised": Entrant("supervised, with all labels", "simclr", timed=False),
}

# Loops and pixels that are no runs of ours.
OF_PROCESSORS = ("lightly-simclr", "raw-pixels", "supervised")


def lacks(method: str, device: str = "cpu") -> str | None:
    """Why a method cannot run here; None where it can."""
    if device != "cpu" and method in OF_PROCESSORS:
        return "it is run on processors alone"
    missing = method.startswith("lightly") and importlib.util.find_spec("lightly") is None
    return "lightly is not installed" if missing else None


def main(entry: Entry, data_dir: Path) -> dict[str, Any]:
    model = ENTRANTS[entry.method].model
    options = ["--model", model, "--dataset", "folder", "--data-dir", str(data_dir), "--seed", str(entry.seed)]
    length = ["--time-budget", str(entry.minutes)] if entry.minutes else ["--steps", "1"]
    command = parse([*options, "--device", entry.device, "--no-evaluate", *length, *shlex.split(entry.options)])
    config = command.run
    dataset = load_data(config)
    if entry.method == "raw-pixels":
        return judge(entry, dataset, principal_components(dataset))
    if entry.method in ("supervised", "lightly-simclr"):
        return of_rival(entry, config, dataset, data_dir)
    return of_run(entry, command, dataset)


def of_run(entry: Entry, command: Command, dataset: Dataset) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        config = command.run
        if entry.minutes:
            with joined_ranks(entry.device) as ranks:
                config = of_known_length(config, dataset, RunDir(Path(folder)), ranks, None, command.given)
        every = max(1, math.ceil(config.optimization.steps / PROBES))
        probe = config.probe.model_copy(update={"probe_every": every})
        config = config.model_copy(update={"probe": probe})
        began = time.process_time()
        if run(Command(run=config, out_dir=path))[0]:
            raise SystemExit("the run did not come to its end")
        worked = time.process_time() - began
        summary = json.loads((path / "summary.json").read_text())
        task = task_class(config.model)(config, dataset, torch.device(entry.device))
        load_weights(task.model, load_checkpoint(path / "checkpoint.pt")["model"])
    minutes_a_step = summary["training_seconds"] / summary["steps"] / 60
    untrained = judge(entry, dataset, partial(task.features, task.initial_model()))
    return judge(entry, dataset, partial(task.features, task.model)) | {
        "curve": [[step * minutes_a_step, accuracy] for step, accuracy in summary[PROBED]],
        "untrained_linear": untrained["linear"],
        "untrained_knn": untrained["knn"],
        "images_per_second": summary["images_per_second"],
        "steps": summary["steps"],
        "training_seconds": summary["training_seconds"],
        # What the whole run took with its probes, which others that work on the machine change less than the clock's.
        "processor_seconds": worked,
        "encoder_parameters": sum(each.numel() for each in task.model.encoder.parameters()),
        "config": config.model_dump(mode="json", exclude={"data": {"data_dir"}}),
    }


def of_rival(entry: Entry, config: RunConfig, dataset: Dataset, data_dir: Path) -> dict[str, Any]:
    task = task_class(config.model)(config, dataset, CPU)
    assert isinstance(task, EncoderTask)
    probe = ImageProbe(dataset, CPU)
    features = partial(task.features, task.model)

    def look() -> float:
        found = probe.found(features)[PROBED]
        task.model.train()
        return found

    if entry.method == "supervised":
        told = supervised(task, dataset, entry.seed)
    else:
        told = lightly_simclr(task, dataset, data_dir, entry.minutes, entry.seed, look, probes=PROBES)
    return judge(entry, dataset, features) | told


def principal_components(dataset: Dataset) -> Callable[[Tensor], Tensor]:
    """Pixels as coordinates in the directions that they vary most in: a probe of all pixels takes half an hour."""
    chosen = ImageFetcher(dataset.pretrain, CPU, resident=False)(spread(COMPONENTS_OF, len(dataset.pretrain)))
    pixels = chosen.float().flatten(1)
    center = pixels.mean(0)
    _, _, directions = torch.linalg.svd(pixels - center, full_matrices=False)
    kept = directions[:COMPONENTS].T.contiguous()
    return lambda images: (images.float().flatten(1) - center) @ kept


def judge(entry: Entry, dataset: Dataset, features: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Linear probe and nearest neighbours of the same labelled images, on all test images."""
    train, test = dataset.train, dataset.test
    if train is None or test is None or train.labels is None or test.labels is None:
        raise SystemExit("the images have no labels to judge encoders by")
    chosen = spread(entry.labels, len(train))
    device = torch.device(entry.device)
    known, asked = encode(train, features, device, chosen=chosen), encode(test, features, device)
    labels, expected = torch.from_numpy(train.labels[chosen]), torch.from_numpy(test.labels)
    classes = len(dataset.classes)
    return entry._asdict() | {
        "linear": linear_probe(known, labels, asked, expected, classes=classes).accuracy,
        "knn": knn_accuracy(known, labels, asked, expected, classes=classes),
        "effective_rank": effective_rank(known),
        "features": known.shape[1],
    }


if __name__ == "__main__":
    given, data_dir, out, core = sys.argv[1:]
    entry = Entry(**json.loads(given))
    if entry.device == "cpu":
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[int(core) % len(cores)]})
        torch.set_num_threads(1)
    result = main(entry, Path(data_dir))
    Path(out).write_text(json.dumps(result))
