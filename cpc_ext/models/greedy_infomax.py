"""Greedy InfoMax: an encoder cut into modules, each trained by a loss of its own on its own outputs.

Patches, images or sound give one loss per module. A module takes the features of the one before without a gradient back
to it, so modules are independent: they need not keep activations for each other, and may learn one after another or in
different processes.
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


# Drawn negatives, in the form of a module's objective; None if it contrasts all.
Negatives = Sequence[Tensor] | SequenceNegatives | Tensor | None


class EncoderModule(Module):
    """Consecutive blocks of an encoder, with its stem before the first and its head after the last.

    It shares the encoder's layers, so training it trains the encoder. A module without blocks passes the encoder's
    output on.

    Attributes:
        out_channels: channels of its features.
    """

    def __init__(self, encoder: SplitEncoder, blocks: Sequence[EncoderBlock], *, first: bool, last: bool) -> None:
        super().__init__()
        for name in (*(encoder.stem_layers if first else ()), *(encoder.head_layers if last else ())):
            setattr(self, name, getattr(encoder, name))
        # Only the methods are stored: as an attribute, the encoder would make all of its layers layers of this module.
        self._stem = encoder.stem if first else None
        self._head = encoder.head if last else None
        self.blocks = Sequential(*blocks)
        self.out_channels: int = encoder.out_channels if last or not blocks else blocks[-1].out_channels

    def forward(self, features: Tensor) -> Tensor:
        """Return features [N, D, ...] of the stem's input, or of the features [N, D', ...] of the module before."""
        features = self.blocks(features if self._stem is None else self._stem(features))
        return features if self._head is None else self._head(features)


def module_starts(stacks: Sequence[int], modules: int | Sequence[int]) -> list[int]:
    """Return the block that each module begins with, counted over the blocks of all stacks.

    Args:
        stacks: blocks per stack.
        modules: number of modules, among which the stacks are divided evenly, with the surplus to the first ones; or
            the blocks that all modules but the first begin with.

    Raises:
        TypeError, ValueError: fewer than one module or more than stacks; starts that do not increase or are no blocks.
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
    """Split the encoder into modules to run one after another; for ``modules`` see :func:`module_starts`.

    Raises:
        TypeError: an encoder without stacks.
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
    """Return the encodings [B, D_i, ...] of each of an encoder's first modules, for inputs of the encoder."""
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
        encoder_modules: modules, first to last.
        objectives: objective of each module.
        frozen: number of modules at the beginning that do not learn, see :meth:`freeze`.
    """

    encoder: SplitEncoder
    objectives: ModuleList[nn.Module]

    def __init__(self, encoder: SplitEncoder, modules: int | Sequence[int]) -> None:
        super().__init__()
        self.encoder = encoder
        # A tuple is not registered, as the modules' parameters are those of the encoder already.
        self.encoder_modules = tuple(split_encoder(encoder, modules))
        self.objectives = ModuleList()
        self.frozen = 0

    @abstractmethod
    def loss(self, index: int, encodings: Tensor, *args: Any, **arguments: Any) -> NamedTuple:
        """Return the outputs of module ``index``'s objective, "loss" among them, for its encodings [B, D, ...]."""

    def freeze(self, modules: int) -> None:
        """Freeze the first modules: without gradients, and in evaluation mode whatever the mode of the model.

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
            # Code that replaces layers, such as by synchronised batch norm, replaces those of the encoder.
            getattr(self.encoder, name).train(mode and self.frozen == 0)
        return self

    def encode(self, inputs: Tensor) -> Tensor:
        """Return the encodings of the whole encoder, [B, D, rows, cols], or [B, D, L] for sound."""
        encodings: Tensor = self.encoder(inputs)
        return encodings

    def encodings_by_module(self, inputs: Tensor, modules: int | None = None) -> list[Tensor]:
        """Return the encodings of all or the first ``modules`` modules, each with its own number of channels."""
        return encodings_by_module(self.encoder, self.encoder_modules[:modules], inputs)

    def _each(self, inputs: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield index and encodings of every module that learns; a module runs when its encodings are requested."""
        features, as_encodings = self.encoder.begin(inputs)
        for index, module in enumerate(self.encoder_modules):
            with torch.set_grad_enabled(torch.is_grad_enabled() and index >= self.frozen):
                made = module(features)
            features = made.detach()
            if index >= self.frozen:
                encodings = as_encodings(made)
                # Nothing but the caller's encodings may keep their graph alive.
                del made
                yield index, encodings


class GreedyInfoMax(_GreedyModel):
    """Greedy InfoMax on images and on sound (Löwe et al. 2019, arXiv 1905.11786).

    Every module predicts its own encodings some rows or frames further by InfoNCE, with matrices W_k of its own; its
    context is its own output. Encodings of images are a grid of feature maps, averaged over space; those of sound are
    the features themselves. The features feed the next module. With one module and a context network it is contrastive
    predictive coding.

    On images negatives are drawn once, at positions that serve all modules. On sound each module draws its own, as the
    modules differ in their numbers of encodings.

    Args:
        encoder: an encoder with stacks: patches or images → encodings [B, D, rows, cols]; or sound → [B, D, L].
        modules: number of modules, up to that of the encoder's stacks, or the blocks that all modules but the first
            begin with, counted over the blocks of all stacks.
        context: network of the last module's contexts, as :class:`cpc_ext.models.CPC` takes it; or one for each module.
            Default: encodings are their own contexts.
        context_module: whether the context network is an additional last module by itself, whose encodings are those of
            the encoder.
        objective: class of the modules' objectives, which takes the channels of encodings and of contexts, and the
            settings: :class:`cpc_ext.nn.GridInfoNCE`, or :class:`cpc_ext.nn.SequenceInfoNCE` for sound.
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
        """Return the context network of module ``index``; None if encodings are their own contexts."""
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
        """Return the losses of all modules that learn, with the activations of all in memory until backward passes.

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
        """Yield the losses one module after another; a module runs when its output is requested.

        With ``output.loss.backward()`` before the next request, only one module's activations are in memory at a time.

        Args:
            inputs: patches [B, rows, cols, C, p, p], images [B, C, H, W] or sound [B, 1, T]: what the encoder takes.
            generator: draws the negatives; see :class:`cpc_ext.nn.GridInfoNCE`.
            negatives: the draws themselves instead, for every module (frozen ones too) as
                :class:`cpc_ext.nn.GridInfoNCE` or :class:`cpc_ext.nn.SequenceInfoNCE` takes them.
            speakers: speakers of sequences, see :class:`cpc_ext.nn.SequenceInfoNCE`.

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
        """Draw negatives for a module's encodings; those of a grid serve all modules. None if all are contrasted."""
        return self.objectives[index].draw_negatives(encodings, generator)

    def loss(
        self, index: int, encodings: Tensor, *, negatives: Negatives = None, speakers: Tensor | None = None
    ) -> GridInfoNCEOutput:
        """Return InfoNCE of module ``index`` on its encodings [B, D, rows, cols] or [B, D, L]."""
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
        """Return contexts [B, E, L] of encodings [B, D, L] of module ``index``; grids likewise, unturned."""
        network = self.context_of(range(len(self.encoder_modules))[index])
        contexts: Tensor = encodings if network is None else network(encodings)
        return contexts


class SupervisedOutput(NamedTuple):
    """The output of :class:`GreedySupervised` for a module: loss in nats, and fraction classified correctly."""

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
        """Return the losses of all modules that learn, with the activations of all in memory until backward passes."""
        return list(self.outputs(inputs, labels))

    def outputs(self, inputs: Tensor, labels: Tensor) -> Iterator[SupervisedOutput]:
        """Yield the losses one module after another, like :meth:`GreedyInfoMax.outputs`. labels: int64 [B]."""
        for index, encodings in self._each(inputs):
            yield self.loss(index, encodings, labels=labels)

    def loss(self, index: int, encodings: Tensor, *, labels: Tensor) -> SupervisedOutput:
        """Return cross-entropy of module ``index`` on encodings [B, D, rows, cols] or [B, D, L]. labels: int64 [B]."""
        logits: Tensor = self.objectives[index](encodings.mean(tuple(range(2, encodings.ndim))))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        right = (logits.detach().argmax(1) == labels).to(logits.dtype)
        images = max(labels.shape[0], 1)
        return SupervisedOutput(F.cross_entropy(logits, labels, reduction="sum") / images, right.sum() / images)
