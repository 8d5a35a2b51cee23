"""What all models that learn an encoder have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from cpc_ext.nn.typed import Module

__all__ = ["EncoderModel"]


class EncoderModel(Module, ABC):
    """A model that is trained for the sake of its encoder.

    Attributes:
        encoder: a network of patches, images or sound, which is what is left of the model when it is used.
    """

    encoder: nn.Module

    @abstractmethod
    def encode(self, inputs: Tensor) -> Tensor:
        """What the encoder makes of its input, on its way to the loss."""
