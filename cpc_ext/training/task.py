"""The seam between the training loop and the models: what a model has to offer to be trained, and nothing more.

The loop knows batches of examples, a loss, and checkpoints. How a batch becomes a loss and what a trained model is
worth is the task's business, one class a model. A model may consist of parts that learn by losses of their own.
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
    """What a part of a model gets from the one before; the first gets the batch.

    features: the batch for the first part (uint8 images [B, C, H, W], int16 waveforms [B, 1, T]), then what the part
        makes of it, without gradient.
    draws: random numbers that the parts of a step share. In another process a part draws the same ones itself.
    """

    features: Tensor
    draws: Any = None


class Sampler(Protocol):
    """Gives batches as int64 arrays [B] of indices that a :class:`Fetcher` takes, epoch after epoch.

    mean_batch: examples of a batch, all processes together, in the mean over an epoch.
    """

    @property
    def mean_batch(self) -> float: ...

    def __len__(self) -> int:
        """Batches an epoch."""

    def __iter__(self) -> Iterator[np.ndarray]: ...

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class Fetcher(Protocol):
    """Gives batches by index: the input of the first part, and labels int64 [B] where there are any."""

    def __call__(self, indices: np.ndarray, /) -> Tensor: ...

    def labels(self, indices: np.ndarray, /) -> Tensor | None: ...


class Task(ABC):
    """A model with its way of learning from examples.

    Attributes:
        model: all that is trained, on the training device.
        examples: what it is trained on.
        unit: what one of a batch is called in logs and messages, in the plural.
        observe_every: updates between calls of :meth:`observe`; None for none.
        observe_start: whether a run also begins with one, at step 0.
        share: the part of a batch that this process has; the trainer sets it.
    """

    model: nn.Module
    examples: ImageSet | WaveformSet
    unit: str = "images"
    observe_every: int | None = None
    observe_start: bool = False
    share: BatchShare = BatchShare()

    if TYPE_CHECKING:

        def __init__(self, config: Any, dataset: Any, device: torch.device) -> None:
            """config: of a run of the task's model. dataset: one that the model takes."""

    @abstractmethod
    def losses(self, batch: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        """One step's forward pass, from a batch on the device to the scalars that are logged.

        batch: what the fetcher gives. labels: int64 [B], or None where the examples have none.

        "loss" among the scalars is minimised. Must not wait for the device.
        """

    def contrasted(self, batch_size: int, gather_negatives: str) -> int:
        """Number of examples that are contrasted with each other: the whole batch, or this process's part of it."""
        return batch_size // (self.share.world_size if gather_negatives == "none" else 1)

    def parts(self) -> list[nn.Module]:
        """What learns by a loss of its own in a step, first to last; by default all of the model by :meth:`losses`.

        A part holds the parameters that it trains and no other's. Called with a :class:`Handover`, labels and random
        streams, it returns the scalars of :meth:`losses` and the handover for the next, which runs when this one's loss
        has been back-propagated. Several parts have an optimizer each.
        """
        return [_Whole(self)]

    def compile(self) -> None:
        """Compile with torch.compile what the steps run. Called once, before :meth:`parts`."""
        self.model.compile()

    def check_start(self, trained: RunConfig) -> None:  # noqa: B027 - names and shapes of the weights are compared.
        """TrainingError where the weights of a run with this config are none to start from."""

    def start(self, weights: dict[str, Tensor]) -> None:
        """Let a new run start from these weights, which have the names and shapes of the model's."""
        self.model.load_state_dict(weights)

    def prepare(self, ranks: Ranks, *, resumed: bool) -> None:  # noqa: B027 - there may be nothing to do.
        """Get ready for the steps, once, when a resumed run has its weights and a new one those of its seed.

        All processes of a run call it. TrainingError or OSError where something it needs is not there.
        """

    def sampler(self, batch_size: int, *, seed: int, rank: int, world_size: int) -> Sampler:
        """What orders the examples into batches.

        batch_size: of all processes together.

        Raises ValueError, which begins with the name of an option ("batch_size: "), where the examples or processes do
        not fit it.
        """
        return EpochSampler(len(self.examples), batch_size, seed=seed, rank=rank, world_size=world_size)

    def fetcher(self, device: torch.device, streams: RandomStreams) -> Fetcher:
        """What gives the batches of the steps, by the sampler's indices."""
        if not isinstance(self.examples, ImageSet):
            raise NotImplementedError("a task of other examples than images has a fetcher of its own")
        return ImageFetcher(self.examples, device)

    def observe(self, step: int, run: RunDir) -> dict[str, float]:
        """Look at the model on the way: scalars to log, and files in the run. OSError where writing fails.

        Must leave the model and the run's random streams as they were.
        """
        return {}

    def trouble(self, means: dict[str, float]) -> str | None:
        """Why a run that has had some steps learns nothing, and what to try; None where it learns.

        Asked once in a run, in evaluation mode. means: of what was logged since the last line.
        Must leave the model and the run's random streams as they were.
        """
        return None

    def updated(self) -> None:  # noqa: B027 - most tasks have nothing to do
        """Called after every update of the parameters. Must not wait for the device."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model, tensors and numbers by name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - nor to load
        """Go on from ``state``. KeyError, ValueError or RuntimeError where it does not fit."""

    def carried(self) -> dict[str, Tensor]:
        """What a step leaves to the next and each process has of its own, by name; equally many rows in each process.

        Rows that are of a batch's examples are in their order, so that another number of processes can go on with them.
        """
        return {}

    def carry_on(self, carried: dict[str, Tensor]) -> None:  # noqa: B027 - nor to carry on
        """Go on from what :meth:`carried` gave, on the CPU. RuntimeError where it does not fit."""

    def description(self) -> dict[str, Any]:
        """What the model is built from, for those who load its weights; JSON values. Kept in checkpoints."""
        return {}

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """What the trained model is worth: entries of summary.json."""

    @abstractmethod
    def save(self, run: RunDir) -> None:
        """Write what others use the trained model by, and its figures. OSError where that fails."""


class _Whole(Module):
    """A task's forward pass as the only part of its model."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.model = task.model
        self._task = task

    def forward(
        self, given: Handover, labels: Tensor | None, streams: RandomStreams
    ) -> tuple[dict[str, Tensor], Handover]:
        return self._task.losses(given.features, labels, streams), given
