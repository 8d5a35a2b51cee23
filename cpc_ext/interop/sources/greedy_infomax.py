"""Conversion of vision checkpoints of Greedy InfoMax (https://github.com/loeweX/Greedy_InfoMax), both ways.

Layouts of a form: "files", one file per module, with the context network last if there is one; "indexed", the same in
one dictionary, with the prefixes "0.", "1." …; "full", the whole model's state dict, which contains every module twice;
"part", a checkpoint without an encoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cpc_ext.interop.context import CONTEXT_NAMES, context_from_ours, context_size, context_to_ours
from cpc_ext.interop.errors import CheckpointError
from cpc_ext.interop.matrices import matrices_from_ours, matrices_to_ours
from cpc_ext.interop.names import NameMap, under, with_prefix
from cpc_ext.interop.reading import Checkpoint
from cpc_ext.interop.reference import Encodings, Form, Program, Reference, Settings, grid_view, put_weights
from cpc_ext.interop.resnets import resnet_arguments, stack_sizes
from cpc_ext.models import CPC, GatedPixelCNNContext, GreedyInfoMax, GreedySupervised, ResNetV2Encoder
from cpc_ext.nn import GridInfoNCE

__all__ = ["PROGRAM", "GreedyInfoMaxProgram"]

_PATCH, _GRID = 16, 7
_CONTEXT = "autoregressor"
_CLASSIFIER = "loss.linear_classifier.0."
_STACK = re.compile(r"model\.layer (\d+)\.\d+\.")
# The two prefixes under which the whole model's state dict contains each module, and the prefix of "indexed".
_FULL = (
    (re.compile(r"(?:encoder|model\.0)\.(\d+)\.(.+)"), r"\1.\2"),
    (re.compile(r"(?:autoregressor|model\.1)\.(.+)"), _CONTEXT + r".\1"),
)


def _module_names(first_stack: int, stacks: int) -> NameMap:
    """Return the map between names in one module, which counts its stacks from 0, and in our whole encoder."""
    pairs = [("model.Conv1.{parameter}", "conv1.{parameter}")] if first_stack == 0 else []
    for stack in range(stacks):
        for theirs, ours in (("shortcut.0", "shortcut"), ("{layer}", "{layer}")):
            pairs.append(
                (
                    f"model.layer {stack}.{{block}}.{theirs}.{{parameter}}",
                    f"layers.{first_stack + stack}.{{block}}.{ours}.{{parameter}}",
                )
            )
    return NameMap(pairs)


class _Joined(NamedTuple):
    """The modules of a checkpoint joined into one encoder.

    arguments: arguments of ResNetV2Encoder.
    weights: the encoder's weights by our names.
    losses: the tensors of each module's loss, by the program's names without "loss.".
    first_stacks, first_blocks: index of each module's first stack and first block.
    """

    arguments: dict[str, Any]
    weights: dict[str, Tensor]
    losses: list[dict[str, Tensor]]
    first_stacks: list[int]
    first_blocks: list[int]


class _Built(NamedTuple):
    """A model without its weights.

    weights: the weights to load, by our names.
    configuration: entries of the configuration that depend on the kind of model.
    unused: tensors that the model does not have, by the program's names.
    """

    model: nn.Module
    weights: dict[str, Tensor]
    configuration: dict[str, Any]
    unused: dict[str, Tensor]


class GreedyInfoMaxProgram(Program):
    """See the module."""

    source = "greedy-infomax"

    def knows(self, name: str) -> bool:
        for pattern, short in _FULL:
            name = pattern.sub(short, name)
        name = re.sub(r"^(\d+|autoregressor)\.", "", name)
        return name.startswith(("model.Conv1.", "model.layer ", "loss.", "W_k.", "stack.layers.", "stack_out."))

    def load(self, checkpoint: Checkpoint, settings: Settings) -> Reference:
        modules, context, layout = self._modules(checkpoint)
        if not modules:
            return self._load_part(checkpoint, context, settings)
        return self._load_modules(checkpoint, modules, context, layout, settings)

    def _modules(self, checkpoint: Checkpoint) -> tuple[list[dict[str, Tensor]], dict[str, Tensor], str]:
        """Return the modules' state dicts, the context network's or, without modules, all tensors, and the layout."""
        if len(checkpoint.parts) > 1:
            contexts = [part for part in checkpoint.parts if "stack_out.weight" in part]
            if len(contexts) > 1:
                raise CheckpointError(f"{checkpoint.origin}: more than one of the files is a context network")
            modules = [part for part in checkpoint.parts if "stack_out.weight" not in part]
            return modules, contexts[0] if contexts else {}, "files"
        (state,) = checkpoint.parts
        if any(name.startswith("model.Conv1.") for name in state):
            return [state], {}, "files"
        layout = "indexed"
        if any(name.startswith(("encoder.", "model.0.")) for name in state):
            layout, state = "full", self._without_copies(checkpoint, state)
        indices = sorted({int(name.split(".")[0]) for name in state if re.match(r"\d+\.", name)})
        if not indices:
            return [], state, "part"
        if indices != list(range(len(indices))):
            raise CheckpointError(f"{checkpoint.origin} holds the modules {indices}, expected all from 0 on")
        others = [name for name in state if not re.match(rf"(\d+|{_CONTEXT})\.", name)]
        if others:
            raise self.refuse(checkpoint, others)
        return [under(state, f"{index}.") for index in indices], under(state, f"{_CONTEXT}."), layout

    def _without_copies(self, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in state.items():
            short = name
            for pattern, replacement in _FULL:
                if pattern.fullmatch(name):
                    short = pattern.sub(replacement, name)
                    break
            if short in found and not torch.equal(found[short], value):
                raise CheckpointError(f"{checkpoint.origin} has two versions of {short}, the other as {name}")
            found[short] = value
        return found

    def _load_modules(
        self,
        checkpoint: Checkpoint,
        modules: list[dict[str, Tensor]],
        context: dict[str, Tensor],
        layout: str,
        settings: Settings,
    ) -> Reference:
        joined = self._joined(checkpoint, modules, settings)
        view = _view(settings)
        encoder = ResNetV2Encoder(**joined.arguments, patch_size=view["patch_size"], stride=view["stride"])
        if not any(joined.losses) and not context:
            built = _Built(encoder, joined.weights, {"kind": "encoder"}, {})
        elif any(name.startswith("linear_classifier.") for name in joined.losses[0]):
            built = self._supervised(checkpoint, encoder, joined)
        else:
            built = self._contrastive(checkpoint, encoder, joined, context, settings)
            needed = built.configuration["pred_steps"] + settings.skip + 1
            if view["grid_size"] < needed:
                raise ValueError(f"grid_size must be at least {needed} for this checkpoint, got {view['grid_size']}")
        configuration: dict[str, Any] = {
            "kind": "greedy",
            "encoder": {"class": "ResNetV2Encoder", "arguments": joined.arguments},
            "module_starts": joined.first_blocks,
            "skip": settings.skip,
            "neg_samples": settings.neg_samples,
            **view,
            **built.configuration,
        }
        put_weights(
            built.model, built.weights, lambda name: self._their_name(name, joined.first_stacks), checkpoint.origin
        )
        assumed: tuple[str, ...] = ()
        assumed += () if settings.grid_size or settings.image_size else (f"grid_size {view['grid_size']}",)
        assumed += () if settings.patch_size else (f"patch_size {view['patch_size']}",)
        return Reference(self.source, built.model, configuration, assumed, Form(layout, built.unused))

    def _joined(self, checkpoint: Checkpoint, modules: list[dict[str, Tensor]], settings: Settings) -> _Joined:
        """Join the modules into one encoder."""
        if "model.Conv1.weight" not in modules[0]:
            raise CheckpointError(
                f"{checkpoint.origin}: the first module has no model.Conv1; give the files of all modules, in order"
            )
        weights: dict[str, Tensor] = {}
        losses: list[dict[str, Tensor]] = []
        starts: list[int] = []
        stack = 0
        for index, module in enumerate(modules):
            stacks = len({match[1] for name in module if (match := _STACK.match(name))})
            names = _module_names(stack, stacks)
            unknown = [name for name in module if names.ours(name) is None and not name.startswith("loss.")]
            if unknown:
                raise self.refuse(checkpoint, [f"module {index}: {name}" for name in unknown])
            weights |= {str(names.ours(name)): value for name, value in module.items() if names.ours(name)}
            losses.append(under(module, "loss."))
            starts.append(stack)
            stack += stacks
        try:
            arguments = resnet_arguments(weights, settings.norm)
            sizes = stack_sizes(weights)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.origin} is not an encoder of {self.source}: {error}") from None
        return _Joined(arguments, weights, losses, starts, [sum(sizes[:start]) for start in starts])

    def _supervised(self, checkpoint: Checkpoint, encoder: ResNetV2Encoder, joined: _Joined) -> _Built:
        """Build the model of modules that learn from labels."""
        found = [under(loss, "linear_classifier.0.") for loss in joined.losses]
        self._check_all(checkpoint, joined.losses, [set(with_prefix("linear_classifier.0.", one)) for one in found])
        classes = len(found[0].get("bias", ()))
        ours = with_prefix("encoder.", joined.weights)
        for index, classifier in enumerate(found):
            ours |= with_prefix(f"objectives.{index}.", classifier)
        model = GreedySupervised(encoder, joined.first_blocks[1:] or 1, classes=classes)
        return _Built(model, ours, {"objective": "supervised", "classes": classes}, {})

    def _contrastive(
        self,
        checkpoint: Checkpoint,
        encoder: ResNetV2Encoder,
        joined: _Joined,
        context: dict[str, Tensor],
        settings: Settings,
    ) -> _Built:
        """Build the model of modules that learn by InfoNCE, or of one module and a context network that does."""
        ours = with_prefix("encoder.", joined.weights)
        configuration: dict[str, Any] = {}
        unused: dict[str, Tensor] = {}
        losses, network = joined.losses, None
        if context:
            if len(losses) > 1:
                raise CheckpointError(f"{checkpoint.origin}: a context network belongs to one module, not several")
            # With a context network the program never uses the module's own matrices.
            unused = with_prefix("0.loss.", losses[0])
            losses = [under(context, "loss.")]
            context = {name: value for name, value in context.items() if not name.startswith("loss.")}
        matrices = [matrices_to_ours(loss, f"loss of module {index}") for index, loss in enumerate(losses)]
        steps = {len(one) for one in matrices}
        if len(steps) > 1:
            raise CheckpointError(f"{checkpoint.origin}: modules of different numbers of steps, {sorted(steps)}")
        if context:
            channels, layers = context_size(context)
            network = GatedPixelCNNContext(channels, layers) if layers else None
            context_weights, unused_context = context_to_ours(context, f"{_CONTEXT}.")
            unused |= with_prefix(f"{_CONTEXT}.", unused_context)
            ours |= with_prefix("context.", context_weights)
            configuration["context_layers"] = layers
        (pred_steps,) = steps
        model = GreedyInfoMax(
            encoder,
            joined.first_blocks[1:] or 1,
            context=network,
            pred_steps=pred_steps,
            skip=settings.skip,
            neg_samples=settings.neg_samples,
        )
        ours |= {f"objectives.{index}.weight": one[None] for index, one in enumerate(matrices)}
        return _Built(model, ours, configuration | {"objective": "infonce", "pred_steps": pred_steps}, unused)

    def _check_all(self, checkpoint: Checkpoint, losses: list[dict[str, Tensor]], taken: list[set[str]]) -> None:
        left = [
            f"module {index}: loss.{name}"
            for index, (loss, names) in enumerate(zip(losses, taken, strict=True))
            for name in loss
            if name not in names
        ]
        if left:
            raise self.refuse(checkpoint, left)

    def _their_name(self, name: str, starts: list[int]) -> str:
        """Return the module and the program's name for one of our names, for messages."""
        part, _, rest = name.partition(".")
        if part == "objectives":
            return f"module {rest.split('.')[0]}: loss"
        if part == "context":
            return f"{_CONTEXT}.{CONTEXT_NAMES.theirs(rest) or rest}"
        found = re.match(r"(?:encoder\.)?layers\.(\d+)\.", name)
        module = max((index for index, start in enumerate(starts) if found and start <= int(found[1])), default=0)
        theirs = _module_names(starts[module], 99).theirs(name.removeprefix("encoder."))
        return f"module {module}: {theirs or name}"

    def _load_part(self, checkpoint: Checkpoint, state: dict[str, Tensor], settings: Settings) -> Reference:
        """Load a context network, with or without matrices, or matrices alone."""
        matrices = under(state, "loss.") or (under(state, "W_k.") and state)
        if "stack_out.weight" not in state:
            others = [name for name in state if not name.startswith("W_k.")]
            if others or not state:
                raise self.refuse(checkpoint, others)
            weight = matrices_to_ours(state, checkpoint.origin)
            objective = self._objective(weight, settings)
            put_weights(objective, {"weight": weight[None]}, lambda name: "W_k", checkpoint.origin)
            return Reference(self.source, objective, {"kind": "part", "pred_steps": len(weight)}, (), Form("part"))
        network = {name: value for name, value in state.items() if not name.startswith("loss.")}
        channels, layers = context_size(network)
        if not layers:
            raise self.refuse(checkpoint, list(state))
        context = GatedPixelCNNContext(channels, layers)
        weights, unused = context_to_ours(network)
        configuration = {"kind": "part", "context_layers": layers, "channels": channels}
        if not matrices:
            put_weights(context, weights, CONTEXT_NAMES.theirs, checkpoint.origin)
            return Reference(self.source, context, configuration, (), Form("part", unused))
        weight = matrices_to_ours(matrices, checkpoint.origin)
        model = CPC(Encodings(weight.shape[2]), context, self._objective(weight, settings))
        ours = with_prefix("context.", weights) | {"objective.weight": weight[None]}
        put_weights(model, ours, lambda name: name, checkpoint.origin)
        return Reference(self.source, model, configuration | {"pred_steps": len(weight)}, (), Form("part", unused))

    def _objective(self, weight: Tensor, settings: Settings) -> GridInfoNCE:
        """Build the objective for matrices [steps, E, D], without loading them."""
        steps, contexts, encodings = weight.shape
        return GridInfoNCE(encodings, contexts, pred_steps=steps, skip=settings.skip, neg_samples=settings.neg_samples)

    def export(self, model: nn.Module, form: Form | None) -> dict[str, Tensor]:
        unused = {} if form is None else form.unused
        if isinstance(model, GridInfoNCE):
            return self._matrices(model) | unused
        if isinstance(model, GatedPixelCNNContext):
            return context_from_ours(model, complete=form is None) | unused
        context = model.context if isinstance(model, CPC) and isinstance(model.encoder, Encodings) else None
        if isinstance(model, CPC) and isinstance(context, GatedPixelCNNContext):
            state = context_from_ours(context, complete=form is None)
            return state | with_prefix("loss.", self._matrices(model.objective)) | unused
        if isinstance(model, ResNetV2Encoder):
            state = with_prefix("0.", self._module(model, 0, 0, len(model.stacks)))
        elif isinstance(model, GreedyInfoMax | GreedySupervised):
            state = self._modules_of(model, complete=form is None)
        else:
            raise CheckpointError(f"{self.source} has no model like a {type(model).__name__}")
        return self._laid_out(state | unused, "full" if form is None else form.layout)

    def _modules_of(self, model: GreedyInfoMax | GreedySupervised, *, complete: bool) -> dict[str, Tensor]:
        encoder = model.encoder
        if not isinstance(encoder, ResNetV2Encoder):
            raise CheckpointError(f"{self.source} has no encoder like a {type(encoder).__name__}")
        sizes, stack = [len(blocks) for blocks in encoder.stacks], 0
        state: dict[str, Tensor] = {}
        for index, module in enumerate(model.encoder_modules):
            blocks, stacks = len(module.blocks), 0
            while blocks > 0 and stack + stacks < len(sizes):
                blocks -= sizes[stack + stacks]
                stacks += 1
            if blocks:
                raise CheckpointError(f"{self.source} cuts an encoder between stacks, this one is cut inside of one")
            state |= with_prefix(f"{index}.", self._module(encoder, index, stack, stacks))
            stack += stacks
            objective = model.objectives[index]
            if isinstance(objective, nn.Linear):
                state |= with_prefix(f"{index}.{_CLASSIFIER}", objective.state_dict())
            elif getattr(model, "context", None) is None:
                state |= with_prefix(f"{index}.loss.", self._matrices(objective))
        context = getattr(model, "context", None)
        if context is not None:
            if not isinstance(context, GatedPixelCNNContext) or len(model.encoder_modules) > 1:
                raise CheckpointError(f"{self.source} has a gated PixelCNN behind one module and no other context")
            matrices = self._matrices(model.objectives[0])
            state |= with_prefix(f"{_CONTEXT}.", context_from_ours(context, complete=complete))
            state |= with_prefix(f"{_CONTEXT}.loss.", matrices)
            if complete:
                state |= {f"0.loss.{name}": torch.zeros_like(value) for name, value in matrices.items()}
        return state

    def _module(self, encoder: ResNetV2Encoder, index: int, first_stack: int, stacks: int) -> dict[str, Tensor]:
        conv = encoder.conv1
        if conv.bias is None or conv.kernel_size != (5, 5) or conv.stride != (1, 1):
            raise CheckpointError(f"{self.source} has ResNets without norm, with a stem of 5x5 and stride 1")
        names = _module_names(first_stack, stacks)
        return {theirs: value for name, value in encoder.state_dict().items() if (theirs := names.theirs(name))}

    def _matrices(self, objective: nn.Module) -> dict[str, Tensor]:
        if not isinstance(objective, GridInfoNCE) or objective.pred_directions != 1:
            raise CheckpointError(f"{self.source} predicts in one direction, by matrices W_k")
        return matrices_from_ours(objective.weight[0])

    def _laid_out(self, state: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
        if layout == "files" and not any(name.startswith(("1.", f"{_CONTEXT}.")) for name in state):
            return under(state, "0.")
        if layout != "full":
            return state
        full = {}
        for name, value in state.items():
            part, _, rest = name.partition(".")
            for place in ("model.1", _CONTEXT) if part == _CONTEXT else (f"model.0.{part}", f"encoder.{part}"):
                full[f"{place}.{rest}"] = value
        return full


PROGRAM = GreedyInfoMaxProgram()


def _view(settings: Settings) -> dict[str, int]:
    """Return crop, grid and patches: as given, else as published, 7 x 7 patches of 16 pixels that overlap by half."""
    patch = settings.patch_size or _PATCH
    return grid_view(settings, patch, settings.stride or patch // 2, _GRID)
