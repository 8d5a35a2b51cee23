"""One run of ``accuracy.py``: trains a method for some minutes, and measures the accuracies of its frozen features.

    python accuracy_run.py '{"method": "simclr", "minutes": 10, "seed": 0, "labels": 10000}' PHOTOS RESULT.json CORE

Our methods are runs of `python -m cpc_ext.train`. The others train the encoder of our SimCLR in loops of their own, for
the same time by the clock, and are evaluated with the same view.
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

# Evaluations of the encoder during training, for the curve.
PROBES = 12
# Number of principal components of pixels, and of images from which they are computed.
COMPONENTS, COMPONENTS_OF = 256, 5000
CPU = torch.device("cpu")


class Entry(NamedTuple):
    """One run of a method.

    minutes: training time; 0 if the method has none to set, or the options give the number of steps.
    labels: largest number of labelled images to learn from.
    options: further options of `python -m cpc_ext.train`; for rivals, only those of the network have an effect.
    device: PyTorch device that trains and encodes; on the CPU a run has one core.
    """

    method: str
    minutes: float
    seed: int
    labels: int
    options: str = ""
    device: str = "cpu"


class Entrant(NamedTuple):
    """A method of the race.

    title: name in table and chart. model: model whose defaults, or whose encoder, it has. timed: whether its training
    time is given.
    """

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

# Methods that are not runs of our training program, and run on the CPU only.
OF_PROCESSORS = ("lightly-simclr", "raw-pixels", "supervised")


def lacks(method: str, device: str = "cpu") -> str | None:
    """Return the reason why a method cannot run here, or None if it can."""
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
        # CPU time of the whole run with its probes, which depends less on other programs than the clock's time does.
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
    """Return a projection of pixels on their principal components, as a probe of all pixels takes half an hour."""
    chosen = ImageFetcher(dataset.pretrain, CPU, resident=False)(spread(COMPONENTS_OF, len(dataset.pretrain)))
    pixels = chosen.float().flatten(1)
    center = pixels.mean(0)
    _, _, directions = torch.linalg.svd(pixels - center, full_matrices=False)
    kept = directions[:COMPONENTS].T.contiguous()
    return lambda images: (images.float().flatten(1) - center) @ kept


def judge(entry: Entry, dataset: Dataset, features: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Fit a linear probe and nearest neighbours on the same labelled images, and evaluate them on all test images."""
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
