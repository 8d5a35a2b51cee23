"""Encoders whose network is a stem, stacks of blocks and a head, so that it can be cut between any two blocks."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn

from cpc_ext.models.encoders.patch_encoder import PatchEncoder

__all__ = ["StackedEncoder"]


class StackedEncoder(PatchEncoder):
    """An encoder of patches whose feature maps are ``head(layers(stem(patches)))``.

    Attributes:
        layers: the stacks, of blocks that have ``out_channels`` each; subclasses set it.
        stem_layers, head_layers: names of the layers that :meth:`stem` and :meth:`head` use.
    """

    layers: nn.Sequential
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
    def stacks(self) -> list[list[nn.Module]]:
        """The blocks of every stack, in their order."""
        return [list(stack) for stack in self.layers]
