"""The seam between the training loop and the models: what a model has to offer to be trained, and nothing more.

The loop knows batches of images, a loss, and checkpoints. How a batch becomes a loss and what a trained model is worth
is the task's business, one class a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from cpc_ext.data import ImageSet
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.run_dir import RunDir

__all__ = ["Task"]


class Task(ABC):
    """A model with its way of learning from images.

    Attributes:
        model: all that is trained, on the training device.
        images: what it is trained on.
    observe_every: updates between calls of :meth:`observe`; None for none.
    """

    model: nn.Module
    images: ImageSet
    observe_every: int | None = None

    @abstractmethod
    def losses(self, images: Tensor, labels: Tensor | None, streams: RandomStreams) -> dict[str, Tensor]:
        """One step's forward pass, from a batch on the device to the scalars that are logged.

        images: uint8 [B, C, H, W]. labels: int64 [B], or None where ``self.images`` has none.

        "loss" among the scalars is minimised. Must not wait for the device.
        """

    def observe(self, step: int, run: RunDir) -> dict[str, float]:
        """Look at the model on the way: scalars to log, and files in the run. OSError where writing fails.

        Must leave the model and the run's random streams as they were.
        """
        return {}

    def description(self) -> dict[str, Any]:
        """What the model is built from, for those who load its weights; JSON values. Kept in checkpoints."""
        return {}

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """What the trained model is worth: entries of summary.json."""

    @abstractmethod
    def save(self, run: RunDir) -> None:
        """Write what others use the trained model by, and its figures. OSError where that fails."""
