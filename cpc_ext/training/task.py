"""The interface between the training loop and the models.

The loop knows batches of examples, a loss, and checkpoints. A task, one class per model, defines how a batch becomes a
loss and how a trained model is evaluated. A model may consist of parts that learn by their own losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cpc_ext.data import BatchShare, EpochSampler, ImageFetcher, ImageSet, WaveformSet
from cpc_ext.nn.typed import Module
from cpc_ext.training.config import RunConfig
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.run_dir import RunDir

__all__ = ["Fetcher", "Handover", "Sampler", "Task"]


class Handover(NamedTuple):
    """The input of a part: the batch for the first part, the output of the part before for the others.

    features: for the first part the batch (uint8 images [B, C, H, W] or int16 waveforms [B, 1, T]); for the others the
        features that the part before computed, without gradient.
    draws: random numbers that the parts share within a step. A part in another process draws the same ones itself.
    """

    features: Tensor
    draws: Any = None


class Sampler(Protocol):
    """Yields the batches of an epoch as int64 arrays [B] of indices for a :class:`Fetcher`.

    mean_batch: number of examples in a batch over all processes, averaged over an epoch.
    """

    @property
    def mean_batch(self) -> float: ...

    def __len__(self) -> int:
        """Return the number of batches per epoch."""

    def __iter__(self) -> Iterator[np.ndarray]: ...

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class Fetcher(Protocol):
    """Returns batches by index: the input of the first part, and labels int64 [B] or None."""

    def __call__(self, indices: np.ndarray, /) -> Tensor: ...

    def labels(self, indices: np.ndarray, /) -> Tensor | None: ...


class Task(ABC):
    """A model with its training objective.

    Attributes:
        model: the model, with all that is trained, on the training device.
        examples: the training examples.
        unit: plural noun for the examples in logs and messages.
        observe_every: number of updates between calls of :meth:`observe`; None for no calls.
        observe_start: whether :meth:`observe` is also called at step 0.
        share: this process's share of each batch; set by the trainer.
    """

    model: nn.Module
    examples: ImageSet | WaveformSet
    unit: str = "images"
    observe_every: int | None = None
    observe_start: bool = False
    share: BatchShare = BatchShare()

    if TYPE_CHECKING:

        def __init__(self, config: Any, dataset: Any, device: torch.device) -> None:
            """config: the config of a run of the task's model. dataset: a data set that the model takes."""

    @abstractmethod
    def losses(self, batch: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        """Run one step's forward pass. Must not wait for the device.

        Args:
            batch: a batch from the fetcher, on the device.
            labels: int64 [B], or None if the examples have none.
            streams: the run's random numbers.

        Returns:
            The scalars to log, among them "loss", which is minimised.
        """

    def contrasted(self, batch_size: int, gather_negatives: str) -> int:
        """Return how many examples are contrasted with each other: the whole batch or this process's share."""
        return batch_size // (self.share.world_size if gather_negatives == "none" else 1)

    def parts(self) -> list[nn.Module]:
        """Return the parts that learn by their own loss, first to last; by default one, which calls :meth:`losses`.

        A part holds the parameters that it trains and none of another part's. Called with a :class:`Handover`, labels
        and random streams, it returns scalars as :meth:`losses` does, and the handover for the next part, which runs
        after this part's backward pass. Each part has its own optimizer.
        """
        return [_Whole(self)]

    def compile(self) -> None:
        """Compile the modules that the steps run with torch.compile. Called once, before :meth:`parts`."""
        self.model.compile()

    def check_start(self, trained: RunConfig) -> None:  # noqa: B027 - names and shapes of the weights are compared.
        """Raise TrainingError if a new run cannot start from the weights of a run with this config."""

    def start(self, weights: dict[str, Tensor]) -> None:
        """Start a new run from these weights, whose names and shapes are the model's."""
        self.model.load_state_dict(weights)

    def prepare(self, ranks: Ranks, *, resumed: bool) -> None:  # noqa: B027 - there may be nothing to do.
        """Prepare for the steps. Called once by all processes, after the weights were initialised or resumed.

        Raises TrainingError or OSError if something that it needs is missing.
        """

    def sampler(self, batch_size: int, *, seed: int, rank: int, world_size: int) -> Sampler:
        """Return the sampler of the training batches.

        Args:
            batch_size: number of examples in a batch, over all processes.
            seed: determines the order of the examples.
            rank: this process's rank among those that share a batch.
            world_size: number of processes that share a batch.

        Raises:
            ValueError: the examples or processes do not fit an option; the message begins with its name, such as
                "batch_size: ".
        """
        return EpochSampler(len(self.examples), batch_size, seed=seed, rank=rank, world_size=world_size)

    def fetcher(self, device: torch.device, streams: RandomStreams) -> Fetcher:
        """Return the fetcher, which loads a batch by the sampler's indices."""
        if not isinstance(self.examples, ImageSet):
            raise NotImplementedError("a task of other examples than images has a fetcher of its own")
        return ImageFetcher(self.examples, device)

    def observe(self, step: int, run: RunDir) -> dict[str, float]:
        """Observe the model during training: return scalars to log, and write files into the run's folder.

        Must not change the model or the run's random streams. Raises OSError if writing fails.
        """
        return {}

    def trouble(self, means: dict[str, float]) -> str | None:
        """Return why the run learns nothing and what to try, or None if it learns.

        Called once early in a run, in evaluation mode. Must not change the model or the run's random streams.

        Args:
            means: the last logged record, with the means since the record before.
        """
        return None

    def updated(self) -> None:  # noqa: B027 - most tasks have nothing to do
        """Called after every update of the parameters. Must not wait for the device."""

    def state_dict(self) -> dict[str, Any]:
        """Return the task's own state for checkpoints, besides the model: tensors and numbers by name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nor to load
        """Restore ``state``. Raises KeyError, ValueError or RuntimeError if it does not fit."""

    def carried(self) -> dict[str, Tensor]:
        """Return the state that steps carry forward and that differs between processes, by name.

        Each process has the same number of rows. Rows that belong to a batch's examples are in the order of the
        examples, so that a run can be resumed with another number of processes.
        """
        return {}

    def carry_on(self, carried: dict[str, Tensor]) -> None:  # noqa: B027 - nor to carry on
        """Restore the result of :meth:`carried`, given on the CPU. Raises RuntimeError if it does not fit."""

    def description(self) -> dict[str, Any]:
        """Return JSON values from which the model can be rebuilt to load its weights. Kept in checkpoints."""
        return {}

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """Measure the trained model; returns entries of summary.json."""

    @abstractmethod
    def save(self, run: RunDir) -> None:
        """Write the trained model for use outside the run, and its figures. Raises OSError if that fails."""


class _Whole(Module):
    """The only part of a task without parts of its own; it runs the task's forward pass."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(
        self, given: Handover, labels: Tensor | None, streams: RandomStreams
    ) -> tuple[dict[str, Tensor], Handover]:
        return self._task.losses(given.features, labels, streams), given
