"""Encoders whose network is a stem, stacks of blocks and a head, so that it can be cut between any two blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from cpc_ext.models.encoders.patch_encoder import PatchEncoder
from cpc_ext.nn.typed import Module, Sequential

__all__ = ["EncoderBlock", "SplitEncoder", "StackedEncoder", "pooled"]


class EncoderBlock(Module, ABC):
    """A block of a stack: features [N, in, ...] → [N, out_channels, ...], smaller if it has a stride."""

    out_channels: int

    @abstractmethod
    def forward(self, input: Tensor) -> Tensor: ...


class SplitEncoder(Module, ABC):
    """An encoder of any input that can be cut between blocks: ``head(stacks(stem(features)))``.

    Attributes:
        out_channels: D, the features of an encoding; subclasses set it.
        stem_layers, head_layers: names of the layers that :meth:`stem` and :meth:`head` use.
    """

    out_channels: int
    stem_layers: tuple[str, ...] = ()
    head_layers: tuple[str, ...] = ()

    @property
    @abstractmethod
    def stacks(self) -> list[list[EncoderBlock]]:
        """The blocks of every stack, in order."""

    @abstractmethod
    def begin(self, inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the stem's input, and a function that turns features of any depth into encodings [B, D, ...]."""

    def stem(self, input: Tensor) -> Tensor:
        """Run everything before the first stack."""
        return input

    def head(self, features: Tensor) -> Tensor:
        """Run everything after the last stack."""
        return features


def pooled(features: Tensor, grid: Sequence[int]) -> Tensor:
    """Average feature maps [B·rows·cols, D, h, w] over space and arrange them by ``grid`` as [B, D, rows, cols]."""
    return torch.unflatten(features.mean((2, 3)), 0, tuple(grid)).permute(0, 3, 1, 2)


class StackedEncoder(PatchEncoder, SplitEncoder):
    """An encoder of patches whose feature maps are ``head(layers(stem(patches)))``.

    Attributes:
        layers: stacks of blocks; subclasses set it.
    """

    layers: Sequential[Sequential[EncoderBlock]]
    stem_layers: tuple[str, ...] = ("conv1",)

    @abstractmethod
    def stem(self, patches: Tensor) -> Tensor:
        """Run everything before the first stack: patches [N, C, p, p] → feature maps [N, channels, h, w]."""

    def feature_maps(self, patches: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(patches)))

    def begin(self, inputs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        patches = self.to_patches(inputs)
        return patches.flatten(0, 2), partial(pooled, grid=patches.shape[:3])

    @property
    def stacks(self) -> list[list[EncoderBlock]]:
        return [list(stack) for stack in self.layers]
