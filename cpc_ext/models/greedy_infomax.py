"""Greedy InfoMax: an encoder cut into modules, each of which learns by a loss of its own on what it makes itself.

From patches, images or sound to one loss a module. A module takes the features of the one before as they are, without a
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
from cpc_ext.models.encoders.stacked_encoder import EncoderBlock, SplitEncoder, pooled
from cpc_ext.models.out_channels import out_channels
from cpc_ext.nn.grid_info_nce import GridInfoNCE, GridInfoNCEOutput, turned_grids
from cpc_ext.nn.sequence_info_nce import SequenceInfoNCE, SequenceNegatives
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


# Draws of a module's objective, in its own form; None where all are contrasted.
Negatives = Sequence[Tensor] | SequenceNegatives | Tensor | None


class EncoderModule(Module):
    """Consecutive blocks of an encoder, with its stem before the first and its head after the last.

    It shares the encoder's layers: training it trains the encoder. One without blocks hands on what the encoder makes.

    Attributes:
        out_channels: of its features.
    """

    def __init__(self, encoder: SplitEncoder, blocks: Sequence[EncoderBlock], *, first: bool, last: bool) -> None:
        super().__init__()
        for name in (*(encoder.stem_layers if first else ()), *(encoder.head_layers if last else ())):
            setattr(self, name, getattr(encoder, name))
        # Methods, not layers: all of the encoder's would be layers of this module.
        self._stem = encoder.stem if first else None
        self._head = encoder.head if last else None
        self.blocks = Sequential(*blocks)
        self.out_channels: int = encoder.out_channels if last or not blocks else blocks[-1].out_channels

    def forward(self, features: Tensor) -> Tensor:
        """What the encoder begins with, or the features [N, D', ...] of the module before → features [N, D, ...]."""
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


def split_encoder(encoder: SplitEncoder, modules: int | Sequence[int]) -> list[EncoderModule]:
    """The encoder as modules to be run one after another; ``modules`` as :func:`module_starts` takes it.

    Raises:
        TypeError: an encoder that is not one of stacks.
    """
    if not isinstance(encoder, SplitEncoder):
        raise TypeError(f"encoder must have stacks of blocks to be split between, got {type(encoder).__name__}")
    stacks = encoder.stacks
    blocks = [block for stack in stacks for block in stack]
    starts = module_starts([len(stack) for stack in stacks], modules)
    return [
        EncoderModule(encoder, blocks[start:end], first=start == 0, last=end == len(blocks))
        for start, end in zip(starts, [*starts[1:], len(blocks)], strict=True)
    ]


def encodings_by_module(encoder: SplitEncoder, modules: Sequence[EncoderModule], inputs: Tensor) -> list[Tensor]:
    """The encodings [B, D_i, ...] that each of an encoder's first modules makes of what the encoder takes."""
    features, as_encodings = encoder.begin(inputs)
    encodings = []
    for module in modules:
        features = module(features)
        encodings.append(as_encodings(features))
    return encodings


class _GreedyModel(EncoderModel):
    """An encoder in modules, with the objective of each.

    Attributes:
        encoder: all modules together.
        encoder_modules: its parts, first to last.
        objectives: what each learns by.
        frozen: modules at the beginning that do not learn, see :meth:`freeze`.
    """

    encoder: SplitEncoder
    objectives: ModuleList[nn.Module]

    def __init__(self, encoder: SplitEncoder, modules: int | Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        # A tuple is not registered: its parameters are the encoder's.
        self.encoder_modules = tuple(split_encoder(encoder, modules))
        self.objectives = ModuleList()
        self.frozen = 0

    @abstractmethod
    def loss(self, index: int, encodings: Tensor, *args: Any, **arguments: Any) -> NamedTuple:
        """What module ``index`` learns by, "loss" among it, of its encodings [B, D, ...]."""

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

    def encode(self, inputs: Tensor) -> Tensor:
        """Encodings of the whole encoder, [B, D, rows, cols], of sound [B, D, L]."""
        encodings: Tensor = self.encoder(inputs)
        return encodings

    def encodings_by_module(self, inputs: Tensor, modules: int | None = None) -> list[Tensor]:
        """The encodings that each module makes, or each of the first ``modules``, in their own numbers of channels."""
        return encodings_by_module(self.encoder, self.encoder_modules[:modules], inputs)

    def _each(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The encodings of every module that learns, made when they are asked for."""
        features, as_encodings = self.encoder.begin(inputs)
        for index, module in enumerate(self.encoder_modules):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= self.frozen):
                made = module(features)
            features = made.detach()
            if index >= self.frozen:
                encodings = as_encodings(made)
                # While the caller has the encodings nothing else is to keep their graph.
                del made
                yield index, encodings


class GreedyInfoMax(_GreedyModel):
    """Greedy InfoMax on images and on sound (Löwe et al. 2019, arXiv 1905.11786).

    Every module predicts its own encodings some rows or frames further by InfoNCE, with matrices W_k of its own; its
    context is its own output. Encodings of images are a grid of feature maps, averaged over space; those of sound are
    the features themselves. The features feed the next module. With one module and a context network it is contrastive
    predictive coding.

    On images all modules contrast at the same places: negatives are drawn once for all. On sound each has its own, as
    their encodings are not equally many.

    Args:
        encoder: any of those with stacks: patches or images → encodings [B, D, rows, cols]; or sound → [B, D, L].
        modules: a number of modules, up to that of the encoder's stacks, or the blocks that all but the first begin
            with, counted over the blocks of all stacks.
        context: network of the last module's contexts, as :class:`cpc_ext.models.CPC` takes it; or one for each module.
            Default: encodings are their own contexts.
        context_module: whether the last module's contexts are those of a module more, which consists of the context
            network alone and whose encodings are the encoder's.
        objective: what a module learns by, of its encodings' and its contexts' channels and the settings:
            :class:`cpc_ext.nn.GridInfoNCE`, or :class:`cpc_ext.nn.SequenceInfoNCE` for sound.
        settings: keyword arguments of the objectives, such as ``pred_steps``.

    Raises:
        TypeError, ValueError: an argument of the wrong type or range.
    """

    objectives: ModuleList[GridInfoNCE | SequenceInfoNCE]

    def __init__(
        self,
        encoder: SplitEncoder,
        modules: int | Sequence[int] = 3,
        *,
        context: nn.Module | Sequence[nn.Module] | None = None,
        context_module: bool = False,
        objective: type[GridInfoNCE] | type[SequenceInfoNCE] = GridInfoNCE,
        **settings: Any,
    ) -> None:
        super().__init__(encoder, modules)
        directions = settings.get("pred_directions", 1)
        if not 1 <= directions <= 4:
            raise ValueError(f"pred_directions must be 1 to 4, got {directions}")
        if isinstance(context, Sequence):
            context = nn.ModuleList(context)
        self.context = context
        if context_module:
            if context is None or isinstance(context, nn.ModuleList):
                raise ValueError("context_module needs one context network")
            self.encoder_modules += (EncoderModule(encoder, (), first=False, last=False),)
        if isinstance(self.context, nn.ModuleList) and len(self.context) != len(self.encoder_modules):
            raise ValueError(
                f"context must be one network, or one for each of {len(self.encoder_modules)} modules, got "
                f"{len(self.context)}"
            )
        for index, module in enumerate(self.encoder_modules):
            network = self.context_of(index)
            contexts = None if network is None else out_channels(network)
            self.objectives.append(objective(module.out_channels, contexts, **settings))

    def context_of(self, index: int) -> nn.Module | None:
        """The context network of module ``index``; None where encodings are their own contexts."""
        if isinstance(self.context, nn.ModuleList):
            return self.context[index]
        return self.context if index == len(self.encoder_modules) - 1 else None

    def freeze(self, modules: int) -> None:
        super().freeze(modules)
        if isinstance(self.context, nn.ModuleList):
            for index, network in enumerate(self.context):
                network.requires_grad_(index >= modules)

    def train(self, mode: bool = True) -> GreedyInfoMax:
        super().train(mode)
        if isinstance(self.context, nn.ModuleList):
            for index, network in enumerate(self.context):
                network.train(mode and index >= self.frozen)
        return self

    def forward(
        self,
        inputs: Tensor,
        *,
        generator: torch.Generator | None = None,
        negatives: Sequence[Negatives] | None = None,
        speakers: Tensor | None = None,
    ) -> list[GridInfoNCEOutput]:
        """The losses of all modules that learn; their activations are all kept until they have been used.

        Arguments are those of :meth:`outputs`.
        """
        return list(self.outputs(inputs, generator=generator, negatives=negatives, speakers=speakers))

    def outputs(
        self,
        inputs: Tensor,
        *,
        generator: torch.Generator | None = None,
        negatives: Sequence[Negatives] | None = None,
        speakers: Tensor | None = None,
    ) -> Iterator[GridInfoNCEOutput]:
        """The loss of one module after another: a module runs when its output is asked for.

        Whoever calls ``output.loss.backward()`` before asking for the next has one module's activations in memory.

        Args:
            inputs: patches [B, rows, cols, C, p, p], images [B, C, H, W] or sound [B, 1, T]: what the encoder takes.
            generator: draws the negatives; see :class:`cpc_ext.nn.GridInfoNCE`.
            negatives: the draws themselves instead, for every module (frozen ones too) as
                :class:`cpc_ext.nn.GridInfoNCE` or :class:`cpc_ext.nn.SequenceInfoNCE` takes them.
            speakers: of sequences, see :class:`cpc_ext.nn.SequenceInfoNCE`.

        Raises:
            ValueError: a grid too small for ``pred_steps + skip``, or not square with more than one direction; a
                sequence too short for ``pred_steps``.
        """
        drawn: Negatives = None
        for index, encodings in self._each(inputs):
            if negatives is not None:
                drawn = negatives[index]
            elif drawn is None or isinstance(self.objectives[index], SequenceInfoNCE):
                drawn = self.draw_negatives(index, encodings, generator)
            yield self.loss(index, encodings, negatives=drawn, speakers=speakers)

    def draw_negatives(self, index: int, encodings: Tensor, generator: torch.Generator | None = None) -> Negatives:
        """Negatives for these encodings of a module, those of a grid for all modules; None where all are contrasted."""
        return self.objectives[index].draw_negatives(encodings, generator)

    def loss(
        self, index: int, encodings: Tensor, *, negatives: Negatives = None, speakers: Tensor | None = None
    ) -> GridInfoNCEOutput:
        """InfoNCE of module ``index`` on its encodings [B, D, rows, cols] or [B, D, L]."""
        objective, network = self.objectives[index], self.context_of(index)
        if isinstance(objective, SequenceInfoNCE):
            contexts = encodings if network is None else network(encodings)
            return objective(encodings, contexts, negatives=negatives, speakers=speakers)
        grids = turned_grids(encodings, objective.pred_directions)
        contexts = grids
        if network is not None:
            contexts = torch.unflatten(network(grids.flatten(0, 1)), 0, grids.shape[:2])
        assert not isinstance(negatives, Tensor | SequenceNegatives)  # A grid has draws for each step.
        return objective(grids, contexts, negatives=negatives)

    def contextualize(self, encodings: Tensor, index: int = -1) -> Tensor:
        """Encodings [B, D, L] of a module, the last by default → its contexts [B, E, L]; grids likewise, unturned."""
        network = self.context_of(range(len(self.encoder_modules))[index])
        contexts: Tensor = encodings if network is None else network(encodings)
        return contexts


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

    def __init__(self, encoder: SplitEncoder, modules: int | Sequence[int] = 3, *, classes: int) -> None:
        super().__init__(encoder, modules)
        if classes < 2:
            raise ValueError(f"classes must be at least 2, got {classes}")
        for module in self.encoder_modules:
            self.objectives.append(nn.Linear(module.out_channels, classes))

    def forward(self, inputs: Tensor, labels: Tensor) -> list[SupervisedOutput]:
        """The losses of all modules that learn; their activations are all kept until they have been used."""
        return list(self.outputs(inputs, labels))

    def outputs(self, inputs: Tensor, labels: Tensor) -> Iterator[SupervisedOutput]:
        """The loss of one module after another, as :meth:`GreedyInfoMax.outputs`. labels: int64 [B]."""
        for index, encodings in self._each(inputs):
            yield self.loss(index, encodings, labels=labels)

    def loss(self, index: int, encodings: Tensor, *, labels: Tensor) -> SupervisedOutput:
        """Cross-entropy of module ``index`` on its encodings [B, D, rows, cols] or [B, D, L]; labels: int64 [B]."""
        logits: Tensor = self.objectives[index](encodings.mean(tuple(range(2, encodings.ndim))))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        right = (logits.detach().argmax(1) == labels).to(logits.dtype)
        images = max(labels.shape[0], 1)
        return SupervisedOutput(F.cross_entropy(logits, labels, reduction="sum") / images, right.sum() / images)
