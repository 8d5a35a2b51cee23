"""The seam between the training loop and the models: what a model has to offer to be trained, and nothing more.

The loop knows batches of images, a loss, and checkpoints. How a batch becomes a loss and what a trained model is worth
is the task's business, one class a model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

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
    """

    model: nn.Module
    images: ImageSet

    @abstractmethod
    def losses(self, images: Tensor, streams: RandomStreams) -> dict[str, Tensor]:
        """One step's forward pass: uint8 images [B, C, H, W] on the device to the scalars that are logged.

        "loss" among them is minimised. Must not wait for the device.
        """

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """What the trained model is worth: entries of summary.json."""

    @abstractmethod
    def save(self, run: RunDir) -> None:
        """Write what others use the trained model by, and its figures. OSError where that fails."""
