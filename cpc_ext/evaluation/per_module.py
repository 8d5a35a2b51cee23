"""`python -m cpc_ext.evaluate RUN --per-module`: accuracy of a linear probe after every module of an encoder.

The accuracies are written as JSON in every run's folder and drawn as lines of one figure. Modules are those that a run
of Greedy InfoMax trained, or the stacks of any other encoder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cpc_ext import figures
from cpc_ext.data import Dataset, ImageSet
from cpc_ext.evaluation.encoder_run import EncoderRun
from cpc_ext.measures.probe import encode, linear_probe
from cpc_ext.models.encoders.stacked_encoder import StackedEncoder
from cpc_ext.models.greedy_infomax import module_starts
from cpc_ext.tasks.encoder_task import EncoderTask
from cpc_ext.training.atomic_file import write_text
from cpc_ext.training.digests import images_digest
from cpc_ext.training.errors import TrainingError, writing

__all__ = ["accuracies_by_module", "evaluate_per_module", "features_by_module"]

Progress = Callable[[range, str], Iterator[int]]


def evaluate_per_module(runs: Sequence[EncoderRun], figure: Path, progress: Progress) -> None:
    """Probe every module of the runs, print the accuracies, and write evaluation/per_module.json in each's folder.

    figure: path of the PNG in which all runs are drawn, with the first one's encoder untrained.

    Raises:
        TrainingError: runs of different images, without labels, or of an encoder without modules.
    """
    lines: dict[str, list[float]] = {}
    names = _names(runs)
    dataset = runs[0].dataset()
    test_labels = _labelled(dataset)[1][1]
    _check_same_images(runs, dataset)
    chance = torch.bincount(test_labels).max().item() / len(test_labels)
    untrained = accuracies_by_module(
        runs[0].untrained(dataset, seed=runs[0].config.compute.seed), dataset, partial(_named, progress, "untrained")
    )
    for name, run in zip(names, runs, strict=True):
        lines[name] = accuracies_by_module(run.trained(dataset), dataset, partial(_named, progress, name))
        record = {
            "run": str(run.dir.path),
            "model": name,
            "dataset": dataset.name,
            "step": run.state.get("step"),
            "accuracy_by_module": lines[name],
            "chance_accuracy": chance,
        }
        _write(run.dir.path / "evaluation" / "per_module.json", json.dumps(record, indent=2) + "\n")
    width = max(map(len, (*lines, "untrained")))
    for name, values in (*lines.items(), ("untrained", untrained)):
        print(f"{name:<{width}}  " + "  ".join(f"{value:6.1%}" for value in values))
    with writing(figure):
        figure.parent.mkdir(parents=True, exist_ok=True)
        figures.save(figure, figures.accuracy_by_depth(lines, untrained, chance, dataset.name))
    print(f"accuracy after each module; drawn in {figure}")


def _check_same_images(runs: Sequence[EncoderRun], dataset: Dataset) -> None:
    """Raise TrainingError if another run's images are not those of the first run, whose data set is ``dataset``."""
    first = runs[0].config.data
    for run in runs[1:]:
        theirs = run.config.data
        same = theirs.dataset == first.dataset
        # The same images may lie in two places, and different ones have the same name, such as those of two folders.
        if same and (theirs.data_dir, theirs.image_size) != (first.data_dir, first.image_size):
            same = _digests(run.dataset()) == _digests(dataset)
        if not same:
            raise TrainingError("--per-module compares runs of the same images: else these decide, not the models")


def _digests(dataset: Dataset) -> list[str]:
    return [images_digest(images) for images, _ in _labelled(dataset)]


def _named(progress: Progress, name: str, steps: range) -> Iterator[int]:
    return progress(steps, name)


def accuracies_by_module(
    task: EncoderTask, dataset: Dataset, progress: Callable[[range], Iterator[int]] | None = None
) -> list[float]:
    """Return the test accuracy of a linear probe on the features after each module, first to last.

    Raises:
        TrainingError: no labels to train and test it with, or an encoder without modules.
    """
    (train, train_labels), (test, test_labels) = _labelled(dataset)
    device = next(task.model.parameters()).device
    train_features, test_features = (_features(task, images, device, progress) for images in (train, test))
    return [
        linear_probe(mine, train_labels, theirs, test_labels, classes=len(dataset.classes)).accuracy
        for mine, theirs in zip(train_features, test_features, strict=True)
    ]


@torch.no_grad()
def features_by_module(task: EncoderTask, images: Tensor) -> list[Tensor]:
    """Return means over space and patches after each module, float32 [B, D_i], of uint8 [B, C, H, W] on the device."""
    model: Any = task.model
    if not isinstance(model.encoder, StackedEncoder):
        raise TrainingError(f"{type(model.encoder).__name__} has no stacks to look between")
    stacks = model.encoder.stacks
    blocks = [block for stack in stacks for block in stack]
    found: list[Tensor] = []

    def keep(block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(torch.unflatten(output.float().mean((2, 3)), 0, (len(images), -1)).mean(1))

    starts = module_starts([len(stack) for stack in stacks], task.modules(len(stacks)))
    ends = [*starts[1:], len(blocks)]
    hooks = [blocks[end - 1].register_forward_hook(keep) for end in ends]
    try:
        last = task.features(model, images)
    finally:
        for hook in hooks:
            hook.remove()
    # What follows the last block belongs to the last module.
    found[-1] = last
    return found


def _features(
    task: EncoderTask, images: ImageSet, device: torch.device, progress: Callable[[range], Iterator[int]] | None
) -> list[Tensor]:
    """Return features of all images after each module, [N, D_i]."""
    sizes: list[int] = []

    def together(batch: Tensor) -> Tensor:
        parts = features_by_module(task, batch)
        sizes[:] = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    encodings = encode(images, together, device, progress=progress or iter)
    return list(torch.split(encodings, sizes, dim=1))


def _labelled(dataset: Dataset) -> list[tuple[ImageSet, Tensor]]:
    """Return training and test images, each with its labels. TrainingError if there are none."""
    sets = [
        (images, torch.from_numpy(images.labels))
        for images in (dataset.train, dataset.test)
        if images is not None and images.labels is not None
    ]
    if len(sets) < 2:
        raise TrainingError(f"the images of --dataset {dataset.name} have no labels to probe with")
    return sets


def _names(runs: Sequence[EncoderRun]) -> list[str]:
    """Return the title of each run, with its folder's name where several are the same."""
    names = [run.config.title for run in runs]
    counts = Counter(names)
    return [
        f"{name} ({run.dir.path.name})" if counts[name] > 1 else name for name, run in zip(names, runs, strict=True)
    ]


def _write(path: Path, text: str) -> None:
    with writing(path):
        path.parent.mkdir(exist_ok=True)
        write_text(path, text)
