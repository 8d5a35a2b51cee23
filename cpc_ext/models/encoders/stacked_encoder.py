"""Encoders whose network is a stem, stacks of blocks and a head, so that it can be cut between any two blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from cpc_ext.models.encoders.patch_encoder import PatchEncoder
from cpc_ext.nn.typed import Module, Sequential

__all__ = ["EncoderBlock", "StackedEncoder"]


class EncoderBlock(Module, ABC):
    """A block of a stack: feature maps [N, in, h, w] → [N, out_channels, h / stride, w / stride]."""

    out_channels: int

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor: ...


class StackedEncoder(PatchEncoder):
    """An encoder of patches whose feature maps are ``head(layers(stem(patches)))``.

    Attributes:
        layers: the stacks, of blocks; subclasses set it.
        stem_layers, head_layers: names of the layers that :meth:`stem` and :meth:`head` use.
    """

    layers: Sequential[Sequential[EncoderBlock]]
    stem_layers: tuple[str, ...] = ("conv1",)
    head_layers: tuple[str, ...] = ()

    @abstractmethod
    def stem(self, patches: Tensor) -> Tensor:
        """Everything before the first stack: patches [N, C, p, p] → feature maps [N, channels, h, w]."""

    def head(self, features: Tensor) -> Tensor:
        """Everything after the last stack: feature maps → what is averaged over space, [N, D, h, w]."""
        return features

    def feature_maps(self, patches: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(patches)))

    @property
    def stacks(self) -> list[list[EncoderBlock]]:
        """The blocks of every stack, in their order."""
        return [list(stack) for stack in self.layers]
