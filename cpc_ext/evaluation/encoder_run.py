"""Trained runs, read from their folders: the task that trained the model, with the last checkpoint's weights.

The task defines how images or recordings become features. Here it gets a device, and other images than those of the run
if needed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from cpc_ext.data import Dataset, ImageSet, SpeechDataset
from cpc_ext.data.images.statistics import PixelStatistics
from cpc_ext.evaluation.empty_task import class_count, labelled_alike
from cpc_ext.tasks.encoder_task import EncoderTask
from cpc_ext.tasks.speech_task import SpeechTask
from cpc_ext.training.checkpoint import load_checkpoint, load_weights
from cpc_ext.training.config import RunConfig
from cpc_ext.training.errors import TrainingError, warn
from cpc_ext.training.precision import default_precision
from cpc_ext.training.registry import MODELS, task_class
from cpc_ext.training.run_data import changed_data, load_data
from cpc_ext.training.run_dir import RunDir
from cpc_ext.training.task import Task

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EncoderRun", "SpeechRun", "TrainedRun"]


@dataclass(frozen=True)
class TrainedRun:
    """A run of one kind of model.

    dir: its folder. config: its config, except for device, precision and place of the data, which are this machine's.
    state: its checkpoint.
    """

    dir: RunDir
    config: RunConfig
    state: dict[str, Any]
    # The class of the runs' tasks, and what they learn, for messages.
    kind: ClassVar[type[Task]]
    learns: ClassVar[str]

    @classmethod
    def open(cls, path: Path, device: torch.device, *, data_dir: Path | None = None) -> Self:
        """Read a run's folder.

        device: device to compute on. If it is of another kind than the run's, its default precision is taken.
        data_dir: where the run's data set is now, if not where it was.

        Raises TrainingError if it is no run's folder, the run is of another kind of model, or the checkpoint is missing
        or damaged.
        """
        run = RunDir(path)
        config = run.known_config
        if not issubclass(task_class(config.model), cls.kind):
            having = ", ".join(name for name in MODELS if issubclass(task_class(name), cls.kind))
            raise TrainingError(f"{path} is a run of {config.model}, which learns no {cls.learns}; {having} do")
        if not run.checkpoint.is_file():
            raise TrainingError(f"there is no {run.checkpoint.name} in {path}")
        state = load_checkpoint(run.checkpoint)
        precision = config.compute.precision
        if torch.device(config.compute.device).type != device.type:
            precision = default_precision(str(device))
        compute = config.compute.model_copy(update={"device": str(device), "precision": precision})
        data = config.data if data_dir is None else config.data.model_copy(update={"data_dir": data_dir})
        return cls(run, config.model_copy(update={"compute": compute, "data": data}), state)

    def dataset(self) -> Any:
        """Load the data set that the run was trained on; warn if it has changed since.

        TrainingError if it is not there.
        """
        record = self.state.get("data") or {}
        dataset = load_data(self.config, record)
        if changed := changed_data(record, dataset):
            warn(
                f"{self.dir.path} was trained on other data than are there now, perhaps on some that are tested on: "
                f"{', '.join(changed)}"
            )
        return dataset

    def trained(self, dataset: Any) -> Any:
        """Return the task with the checkpoint's weights. TrainingError if these are of another model."""
        task = self.untrained(dataset, seed=self.config.compute.seed)
        try:
            load_weights(task.model, self.state.get("model", {}))
        except RuntimeError as error:
            # A wrong shape says the most, such as that of a first layer for another number of channels.
            shapes = [line.strip(" \t.") for line in str(error).splitlines() if "size mismatch" in line]
            told = f" for {self.config.data.dataset} ({shapes[0]})" if shapes else ""
            raise TrainingError(
                f"{self.dir.checkpoint} is of another model than {self.dir.config} describes{told}"
            ) from None
        return task

    def untrained(self, dataset: Any, *, seed: int) -> Any:
        """Return the task with the initial weights of a seed. TrainingError if the data do not fit it."""
        compute = self.config.compute.model_copy(update={"seed": seed})
        config = self.config.model_copy(update={"compute": compute})
        try:
            task = task_class(config.model)(config, dataset, torch.device(compute.device))
        except ValueError as error:
            raise TrainingError(str(error)) from None
        assert isinstance(task, self.kind)  # Runs of other kinds are refused when they are opened.
        return task


class SpeechRun(TrainedRun):
    """A run of a model of speech."""

    kind = SpeechTask
    learns = "speech"

    if TYPE_CHECKING:

        def dataset(self) -> SpeechDataset: ...

        def trained(self, dataset: SpeechDataset) -> SpeechTask: ...

        def untrained(self, dataset: SpeechDataset, *, seed: int) -> SpeechTask: ...


class EncoderRun(TrainedRun):
    """A run of a model that learns an encoder of images."""

    kind = EncoderTask
    learns = "encoder of images"

    def dataset(self) -> Dataset:
        """Load the data set that the run was trained on, with the pixel statistics of that time."""
        dataset: Dataset = super().dataset()
        description = self.state.get("description", {})
        if not _describes_images(description) or len(description["mean"]) != dataset.image_shape[0]:
            return dataset
        then = asdict(PixelStatistics.of(description))
        return dataset if then == {name: getattr(dataset, name) for name in then} else replace(dataset, **then)

    if TYPE_CHECKING:

        def trained(self, dataset: Dataset) -> EncoderTask: ...

        def untrained(self, dataset: Dataset, *, seed: int) -> EncoderTask: ...

    def statistics(self) -> dict[str, Any]:
        """Return shape and pixel statistics of the run's training images, in the form of EncoderTask.description."""
        description: dict[str, Any] = self.state.get("description", {})
        if "mean" in description:
            if not _describes_images(description):
                raise TrainingError(f"the checkpoint {self.dir.checkpoint} describes no images: got {description}")
            return description
        # The checkpoint was written before statistics were kept.
        dataset = self.dataset()
        return {
            "image_shape": dataset.image_shape,
            "mean": dataset.mean,
            "std": dataset.std,
            "gray_mean": dataset.gray_mean,
            "gray_std": dataset.gray_std,
        }

    def stand_in(self, name: str, images: ImageSet) -> Dataset:
        """Return a data set of other images, with the run's pixel statistics and the checkpoint's number of classes."""
        classes = class_count(self.state.get("description", {}), self.state.get("model", {}))
        return labelled_alike(name, images.images, classes, PixelStatistics.of(self.statistics()))


def _describes_images(description: dict[str, Any]) -> bool:
    """Return whether a description has shape and statistics of images, of the right types."""
    try:
        shape, mean, std = (list(description[name]) for name in ("image_shape", "mean", "std"))
        numbers = [*mean, *std, description["gray_mean"], description["gray_std"]]
    except (KeyError, TypeError):
        return False
    sides = len(shape) == 3 and all(type(side) is int and side > 0 for side in shape)
    return sides and len(mean) == len(std) == shape[0] and all(type(value) in (int, float) for value in numbers)
