"""Greedy InfoMax: an encoder cut into modules, each of which learns by a loss of its own on what it makes itself.

From patches or images to one loss a module. A module takes the feature maps of the one before as they are, without a
gradient back to it, so modules need not know of each other: their activations need not be kept for each other, and they
may learn one after another or in different processes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cpc_ext.models.encoder_model import EncoderModel
from cpc_ext.models.encoders.stacked_encoder import EncoderBlock, StackedEncoder
from cpc_ext.models.out_channels import out_channels
from cpc_ext.nn.grid_info_nce import GridInfoNCE, GridInfoNCEOutput, turned_grids
from cpc_ext.nn.typed import Module, ModuleList, Sequential

__all__ = [
    "EncoderModule",
    "GreedyInfoMax",
    "GreedySupervised",
    "SupervisedOutput",
    "encodings_by_module",
    "module_starts",
    "pooled",
    "split_encoder",
]


class EncoderModule(Module):
    """Consecutive blocks of an encoder, with its stem before the first and its head after the last.

    It shares the encoder's layers: training it trains the encoder.

    Attributes:
        out_channels: of its feature maps.
    """

    def __init__(self, encoder: StackedEncoder, blocks: Sequence[EncoderBlock], *, first: bool, last: bool) -> None:
        super().__init__()
        for name in (*(encoder.stem_layers if first else ()), *(encoder.head_layers if last else ())):
            setattr(self, name, getattr(encoder, name))
        # Methods, not layers: all of the encoder's would be layers of this module.
        self._stem = encoder.stem if first else None
        self._head = encoder.head if last else None
        self.blocks = Sequential(*blocks)
        self.out_channels: int = encoder.out_channels if last else blocks[-1].out_channels

    def forward(self, features: Tensor) -> Tensor:
        """Patches [N, C, p, p] of the first module, else feature maps [N, D', h', w'] → feature maps [N, D, h, w]."""
        features = self.blocks(features if self._stem is None else self._stem(features))
        return features if self._head is None else self._head(features)


def module_starts(stacks: Sequence[int], modules: int | Sequence[int]) -> list[int]:
    """The block that each module begins with, counted over the blocks of all stacks.

    Args:
        stacks: blocks per stack.
        modules: a number of modules, which share the stacks evenly, the first ones taking one more where they cannot;
            or the blocks that all modules but the first begin with.

    Raises:
        TypeError, ValueError: fewer than one module or more than stacks; starts that do not rise, or lie outside.
    """
    if isinstance(modules, bool):
        raise TypeError(f"modules must be an int or a sequence of ints, got {modules}")
    if isinstance(modules, int):
        if not 1 <= modules <= len(stacks):
            raise ValueError(f"modules must be 1 to {len(stacks)}, the stacks of the encoder, got {modules}")
        each, more = divmod(len(stacks), modules)
        firsts = [index * each + min(index, more) for index in range(modules)]
        return [sum(stacks[:first]) for first in firsts]
    starts = [0, *modules]
    for before, start in pairwise(starts):
        if not before < start < sum(stacks):
            raise ValueError(
                f"modules must begin with rising blocks in 1..{sum(stacks) - 1}, of {sum(stacks)}, got {tuple(modules)}"
            )
    return starts


def split_encoder(encoder: StackedEncoder, modules: int | Sequence[int]) -> list[EncoderModule]:
    """The encoder as modules to be run one after another; ``modules`` as :func:`module_starts` takes it.

    Raises:
        TypeError: an encoder that is not one of stacks.
    """
    if not isinstance(encoder, StackedEncoder):
        raise TypeError(f"encoder must have stacks of blocks to be split between, got {type(encoder).__name__}")
    stacks = encoder.stacks
    blocks = [block for stack in stacks for block in stack]
    starts = module_starts([len(stack) for stack in stacks], modules)
    return [
        EncoderModule(encoder, blocks[start:end], first=start == 0, last=end == len(blocks))
        for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True)
    ]


def encodings_by_module(
    encoder: StackedEncoder, modules: Sequence[EncoderModule], patches_or_images: Tensor
) -> list[Tensor]:
    """The encodings [B, D_i, rows, cols] that each of an encoder's first modules makes of what the encoder takes."""
    patches = encoder.to_patches(patches_or_images)
    features, encodings = patches.flatten(0, 2), []
    for module in modules:
        features = module(features)
        encodings.append(pooled(features, patches.shape[:3]))
    return encodings


def pooled(features: Tensor, grid: Sequence[int]) -> Tensor:
    """Feature maps [B·rows·cols, D, h, w] of a grid (B, rows, cols) → their means over space, [B, D, rows, cols]."""
    return torch.unflatten(features.mean((2, 3)), 0, tuple(grid)).permute(0, 3, 1, 2)


class _GreedyModel(EncoderModel):
    """An encoder in modules, with the objective of each.

    Attributes:
        encoder: all modules together.
        encoder_modules: its parts, first to last.
        objectives: what each learns by.
        frozen: modules at the beginning that do not learn, see :meth:`freeze`.
    """

    encoder: StackedEncoder
    objectives: ModuleList[nn.Module]

    def __init__(self, encoder: StackedEncoder, modules: int | Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        # A tuple is not registered: its parameters are the encoder's.
        self.encoder_modules = tuple(split_encoder(encoder, modules))
        self.objectives = ModuleList()
        self.frozen = 0

    @abstractmethod
    def loss(self, index: int, encodings: Tensor, *args: Any, **arguments: Any) -> NamedTuple:
        """What module ``index`` learns by, "loss" among it, of its encodings [B, D, rows, cols]."""

    def freeze(self, modules: int) -> None:
        """Keep the first modules as they are: without gradients, and in evaluation mode whatever the model's is.

        Raises:
            ValueError: fewer than none, or all of them.
        """
        if not 0 <= modules < len(self.encoder_modules):
            raise ValueError(f"modules must be 0 to {len(self.encoder_modules) - 1}, got {modules}")
        for index, module in enumerate(self.encoder_modules):
            module.requires_grad_(index >= modules)
            self.objectives[index].requires_grad_(index >= modules)
        self.frozen = modules
        self.train(self.training)

    def train(self, mode: bool = True) -> _GreedyModel:
        super().train(mode)
        for index, module in enumerate(self.encoder_modules):
            module.train(mode and index >= self.frozen)
        for name in self.encoder.stem_layers:
            # Whoever replaces layers, as for synchronised batch norm, replaces the encoder's.
            getattr(self.encoder, name).train(mode and self.frozen == 0)
        return self

    def encode(self, patches_or_images: Tensor) -> Tensor:
        """Encodings of the whole encoder, [B, D, rows, cols]."""
        return self.encoder(patches_or_images)

    def encodings_by_module(self, patches_or_images: Tensor, modules: int | None = None) -> list[Tensor]:
        """The encodings that each module makes, or each of the first ``modules``: [B, D_i, rows, cols]."""
        return encodings_by_module(self.encoder, self.encoder_modules[:modules], patches_or_images)

    def _each(self, patches_or_images: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The encodings of every module that learns, made when they are asked for."""
        patches = self.encoder.to_patches(patches_or_images)
        features = patches.flatten(0, 2)
        for index, module in enumerate(self.encoder_modules):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= self.frozen):
                made = module(features)
            features = made.detach()
            if index >= self.frozen:
                encodings = pooled(made, patches.shape[:3])
                # While the caller has the encodings nothing else is to keep their graph.
                del made
                yield index, encodings


class GreedyInfoMax(_GreedyModel):
    """Greedy InfoMax on images (Löwe et al. 2019, arXiv 1905.11786).

    Every module averages its feature maps over space to a grid of encodings, from which it predicts its own encodings
    some rows further by InfoNCE with matrices W_k of its own; its context is its own output. The feature maps feed the
    next module. With one module and a context network it is contrastive predictive coding.

    All modules contrast at the same places: negatives are drawn once for all.

    Args:
        encoder: any of those with stacks: patches or images → encodings [B, D, rows, cols].
        modules: a number of modules, up to that of the encoder's stacks, or the blocks that all but the first begin
            with, counted over the blocks of all stacks.
        context: network of the last module's contexts, as :class:`cpc_ext.models.CPC` takes it. Default: encodings
            are their own contexts.
        pred_steps, pred_directions, skip, neg_samples, gather_negatives: of each module's
            :class:`cpc_ext.nn.GridInfoNCE`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.
    """

    objectives: ModuleList[GridInfoNCE]

    def __init__(
        self,
        encoder: StackedEncoder,
        modules: int | Sequence[int] = 3,
        *,
        context: nn.Module | None = None,
        pred_steps: int,
        pred_directions: int = 1,
        skip: int = 1,
        neg_samples: int | str = 16,
        gather_negatives: str = "none",
    ) -> None:
        super().__init__(encoder, modules)
        if not 1 <= pred_directions <= 4:
            raise ValueError(f"pred_directions must be 1 to 4, got {pred_directions}")
        self.context = context
        last = len(self.encoder_modules) - 1
        for index, module in enumerate(self.encoder_modules):
            self.objectives.append(
                GridInfoNCE(
                    module.out_channels,
                    out_channels(context) if context is not None and index == last else None,
                    pred_steps=pred_steps,
                    pred_directions=pred_directions,
                    skip=skip,
                    neg_samples=neg_samples,
                    gather_negatives=gather_negatives,
                )
            )

    def forward(
        self,
        patches_or_images: Tensor,
        *,
        generator: torch.Generator | None = None,
        negatives: Sequence[Sequence[Tensor] | None] | None = None,
    ) -> list[GridInfoNCEOutput]:
        """The losses of all modules that learn; their activations are all kept until they have been used.

        Arguments are those of :meth:`outputs`.
        """
        return list(self.outputs(patches_or_images, generator=generator, negatives=negatives))

    def outputs(
        self,
        patches_or_images: Tensor,
        *,
        generator: torch.Generator | None = None,
        negatives: Sequence[Sequence[Tensor] | None] | None = None,
    ) -> Iterator[GridInfoNCEOutput]:
        """The loss of one module after another: a module runs when its output is asked for.

        Whoever calls ``output.loss.backward()`` before asking for the next has one module's activations in memory.

        Args:
            patches_or_images: patches [B, rows, cols, C, p, p] or images [B, C, H, W], whatever the encoder takes.
            generator: draws the negatives; see :class:`cpc_ext.nn.GridInfoNCE`.
            negatives: the draws themselves instead, for every module (frozen ones too) as
                :class:`cpc_ext.nn.GridInfoNCE` takes them.

        Raises:
            ValueError: a grid too small for ``pred_steps + skip``, or not square with more than one direction.
        """
        drawn = None
        for index, encodings in self._each(patches_or_images):
            if negatives is not None:
                drawn = negatives[index]
            elif drawn is None:
                drawn = self.draw_negatives(index, encodings, generator)
            yield self.loss(index, encodings, negatives=drawn)

    def draw_negatives(
        self, index: int, encodings: Tensor, generator: torch.Generator | None = None
    ) -> list[Tensor] | None:
        """Negatives for these encodings of a module, which may serve all modules; None where all are contrasted."""
        return self.objectives[index].draw_negatives(encodings, generator)

    def loss(self, index: int, encodings: Tensor, *, negatives: Sequence[Tensor] | None = None) -> GridInfoNCEOutput:
        """InfoNCE of module ``index`` on its encodings [B, D, rows, cols]."""
        objective = self.objectives[index]
        grids = turned_grids(encodings, objective.pred_directions)
        contexts = grids
        if self.context is not None and index == len(self.encoder_modules) - 1:
            contexts = torch.unflatten(self.context(grids.flatten(0, 1)), 0, grids.shape[:2])
        return objective(grids, contexts, negatives=negatives)


class SupervisedOutput(NamedTuple):
    """What :class:`GreedySupervised` returns for a module: the loss in nats, and the fraction classified rightly."""

    loss: Tensor
    accuracy: Tensor


class GreedySupervised(_GreedyModel):
    """The supervised baselines of Greedy InfoMax: each module learns to classify its own encodings, averaged.

    With one module it is an encoder trained end to end.

    Args:
        encoder, modules: as :class:`GreedyInfoMax`.
        classes: number of classes; each module has a linear classifier of its own.
    """

    objectives: ModuleList[nn.Linear]

    def __init__(self, encoder: StackedEncoder, modules: int | Sequence[int] = 3, *, classes: int) -> None:
        super().__init__(encoder, modules)
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}")
        for module in self.encoder_modules:
            self.objectives.append(nn.Linear(module.out_channels, classes))

    def forward(self, patches_or_images: Tensor, labels: Tensor) -> list[SupervisedOutput]:
        """The losses of all modules that learn; their activations are all kept until they have been used."""
        return list(self.outputs(patches_or_images, labels))

    def outputs(self, patches_or_images: Tensor, labels: Tensor) -> Iterator[SupervisedOutput]:
        """The loss of one module after another, as :meth:`GreedyInfoMax.outputs`. labels: int64 [B]."""
        for index, encodings in self._each(patches_or_images):
            yield self.loss(index, encodings, labels=labels)

    def loss(self, index: int, encodings: Tensor, *, labels: Tensor) -> SupervisedOutput:
        """Cross-entropy of module ``index`` on its encodings [B, D, rows, cols]; labels: int64 [B]."""
        logits: Tensor = self.objectives[index](encodings.mean((2, 3)))
        right = (logits.detach().argmax(1) == labels).to(torch.promote_types(logits.dtype, torch.float32))
        images = max(len(labels), 1)
        return SupervisedOutput(F.cross_entropy(logits, labels, reduction="sum") / images, right.sum() / images)
