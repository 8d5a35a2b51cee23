"""The base class of models that train an encoder."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from cpc_ext.nn.typed import Module

__all__ = ["EncoderModel"]


class EncoderModel(Module, ABC):
    """A model that is trained for its encoder.

    Attributes:
        encoder: network of patches, images or sound; the part of the model that is used after training.
    """

    encoder: nn.Module

    @abstractmethod
    def encode(self, inputs: Tensor) -> Tensor:
        """Return the encodings of an input, from which the loss is computed."""
