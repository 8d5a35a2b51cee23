"""Tasks on the CPU, built from a config or a run's folder without the data that the run was trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cpc_ext.data import Dataset, ImageSet, SpeechDataset, WaveformSet
from cpc_ext.data.images.statistics import PixelStatistics
from cpc_ext.tasks.speech_options import SpeechConfig
from cpc_ext.training.checkpoint import load_checkpoint, load_weights
from cpc_ext.training.config import RunConfig, load_config
from cpc_ext.training.errors import TrainingError, warn
from cpc_ext.training.registry import task_class
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.task import Task
from cpc_ext.training.weight_average import averaged_weights

__all__ = ["SavedRun", "class_count", "empty_task", "labelled_alike", "put_into", "saved_run"]


class SavedRun(NamedTuple):
    """The model in a run's folder.

    config: config of the run. state: its checkpoint. task: task with the model's weights, averaged if the run keeps an
    average. image_shape, classes: what the model is built from besides the config, see :func:`empty_task`.
    """

    config: RunConfig
    state: dict[str, Any]
    task: Task
    image_shape: Sequence[int] | None
    classes: int


def saved_run(path: Path) -> SavedRun:
    """Load the model of a run; warn if some of its modules are not trained yet.

    TrainingError if the folder is not a run's, or its files do not fit each other.
    """
    run = RunDir(path)
    if not run.config.is_file() or not run.checkpoint.is_file():
        raise TrainingError(f"{run.path} is not a run's folder: there is no {run.config.name} or {run.checkpoint.name}")
    config, state = load_config(run.config), load_checkpoint(run.checkpoint)
    weights = averaged_weights(state.get("task", {})) or state.get("model", {})
    description = state.get("description", {})
    try:
        classes = class_count(description, weights)
        task = empty_task(config, description.get("image_shape"), classes)
        put_into(task.model, weights)
    except (AttributeError, LookupError, TypeError, RuntimeError):
        raise TrainingError(f"{run.checkpoint} is of another model than {run.config} describes") from None
    if config.trained_modules is not None:
        warn(
            f"{run.path} trained module {config.trained_modules - 1} and not those after it, which are in the model "
            "with the weights of its start"
        )
    return SavedRun(config, state, task, description.get("image_shape"), classes)


def class_count(description: Mapping[str, Any], weights: Mapping[str, Tensor]) -> int:
    """Return the number of classes that a checkpoint's model was built for; 0 if it takes none."""
    # The classifier of a supervised module.
    classifier = weights.get("objectives.0.bias")
    return len(description.get("classes", ())) or (0 if classifier is None else len(classifier))


def empty_task(config: RunConfig, image_shape: Sequence[int] | None, classes: int) -> Task:
    """Build the task of a config on the CPU, with black images or silence in place of a data set.

    image_shape: (C, H, W). None: colour, of the size that the config needs.

    TrainingError if the config does not allow such a model.
    """
    try:
        return task_class(config.model)(config, _stand_in(config, image_shape, classes), torch.device("cpu"))
    except ValueError as error:
        raise TrainingError(str(error)) from None


def _stand_in(config: RunConfig, image_shape: Sequence[int] | None, classes: int) -> Dataset | SpeechDataset:
    name = config.data.dataset
    if isinstance(config, SpeechConfig):
        samples = np.zeros(config.view.window, dtype=np.int16)
        starts = np.array([0, len(samples)], dtype=np.int64)
        return SpeechDataset(name, WaveformSet(samples, starts, ["silence"]), None)
    view = getattr(config, "view", None)
    shape = tuple(image_shape or (3, *[32 if view is None else view.crop] * 2))
    if view is not None:
        shape = (shape[0], *(max(side, view.crop) for side in shape[1:]))
    images = np.zeros((2, *shape), dtype=np.uint8)
    half = PixelStatistics((0.5,) * shape[0], (0.5,) * shape[0], 0.5, 0.5)
    return labelled_alike(name, images, classes, half)


def labelled_alike(name: str, images: np.ndarray, classes: int, statistics: PixelStatistics) -> Dataset:
    """Return a data set for building a model: images, uint8 [N, C, H, W], with labels that are all 0.

    classes: number of classes. Models that learn from labels cannot be built without labels.
    """
    labelled = ImageSet(images, np.zeros(len(images), dtype=np.int64))
    names = tuple(map(str, range(classes)))
    return Dataset(name, pretrain=labelled, train=labelled, test=labelled, classes=names, **asdict(statistics))


def put_into(model: nn.Module, weights: Mapping[str, Tensor], part: str = "") -> None:
    """Load weights into a part of a model, which takes on their precision. RuntimeError if they do not fit."""
    dtype = next((value.dtype for value in weights.values() if value.is_floating_point()), torch.float32)
    load_weights(model.to(dtype).get_submodule(part), dict(weights))
