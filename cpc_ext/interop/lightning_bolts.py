"""Lightning Bolts (https://github.com/Lightning-Universe/lightning-bolts), CPC_v2: its checkpoints to models, and back.

A file holds the whole model, "encoder." and "contrastive_task."; the task without an encoder, "context_cnn.",
"target_cnn." and "pred_cnn."; or its context network, "blocks.". Encoders are torchvision's ResNets, whose networks and
names the timm library shares. The online evaluator and the encoder's "fc" are kept beside the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cpc_ext.interop.errors import CheckpointError
from cpc_ext.interop.names import NameMap, under, with_prefix
from cpc_ext.interop.reading import Checkpoint
from cpc_ext.interop.reference import Encodings, Form, Program, Reference, Settings, put_weights
from cpc_ext.models import CPC, ResidualContext, TimmEncoder
from cpc_ext.nn import TargetInfoNCE

__all__ = ["LightningBolts"]

# A block's convolutions by their places there, between ReLUs and padding.
_CONTEXT = NameMap(
    (f"blocks.{{block}}.{place}.{{parameter}}", f"blocks.{{block}}.{conv}.{{parameter}}")
    for place, conv in enumerate(("reduce", None, "sideways", None, "upwards", None, "expand"))
    if conv is not None
)
_TASK = NameMap(
    [
        ("target_cnn.{parameter}", "objective.target_projection.{parameter}"),
        ("pred_cnn.{parameter}", "objective.prediction_projection.{parameter}"),
    ]
)
_UNUSED = re.compile(r"(encoder\.fc|non_linear_evaluator)\..+")
# torchvision's ResNets by blocks per stack, for two or three convolutions in a block.
_BASIC = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}
_BOTTLENECK = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
_PATCH, _GRID = 8, 7
_SCALE = 0.1


class LightningBolts(Program):
    """See the module. A form's layout is not used: what the model is decides it."""

    source = "lightning-bolts"

    def knows(self, name: str) -> bool:
        task = name.removeprefix("contrastive_task.")
        return (
            _UNUSED.fullmatch(name) is not None
            or _TASK.ours(task) is not None
            or _CONTEXT.ours(task.removeprefix("context_cnn.")) is not None
            or re.match(r"encoder\.(conv1|bn1|layer[1-4]\.\d+)\.", name) is not None
        )

    def load(self, checkpoint: Checkpoint, settings: Settings) -> Reference:
        state = checkpoint.merged()
        unused = {name: value for name, value in state.items() if _UNUSED.fullmatch(name)}
        state = {name: value for name, value in state.items() if name not in unused}
        if any(name.startswith("blocks.") for name in state):
            context, configuration = self._context(checkpoint, state, "")
            put_weights(context, self._renamed(checkpoint, state, _CONTEXT), _CONTEXT.theirs, checkpoint.origin)
            return Reference(self.source, context, {"kind": "part", **configuration}, form=Form(unused=unused))
        whole = any(name.startswith("contrastive_task.") for name in state)
        task = under(state, "contrastive_task.") if whole else state
        network = under(task, "context_cnn.")
        heads = {name: value for name, value in task.items() if not name.startswith("context_cnn.")}
        ours = self._renamed(checkpoint, heads, _TASK)
        context, configuration = self._context(checkpoint, network, "context_cnn.")
        ours |= with_prefix("context.", self._renamed(checkpoint, network, _CONTEXT))
        channels = configuration["channels"]
        encoder: nn.Module = Encodings(channels)
        if whole:
            backbone = under(state, "encoder.")
            others = [name for name in state if not name.startswith(("encoder.", "contrastive_task."))]
            if others:
                raise self.refuse(checkpoint, others)
            arguments = self._backbone(checkpoint, backbone)
            view = _view(settings, checkpoint.options)
            encoder = TimmEncoder(**arguments, patch_size=view["patch_size"], stride=view["stride"])
            ours |= with_prefix("encoder.backbone.", backbone)
            needed = settings.skip + 2
            if view["grid_size"] < needed:
                raise ValueError(f"grid_size must be at least {needed} to predict a step, got {view['grid_size']}")
            configuration |= {"encoder": {"class": "TimmEncoder", "arguments": arguments}, **view}
        target = heads.get("target_cnn.weight")
        if target is None or target.ndim != 4:
            raise CheckpointError(f"{checkpoint.origin} has no target_cnn.weight of four dimensions")
        objective = TargetInfoNCE(
            channels,
            target_channels=len(target),
            skip=settings.skip,
            scale=_SCALE,
            reduction="lightning-bolts",
        )
        model = CPC(encoder, context, objective)
        put_weights(model, ours, self._their_name, checkpoint.origin)
        kind = "cpc-v2" if whole else "part"
        configuration = {"kind": kind, **configuration, "target_channels": len(target), "skip": settings.skip}
        return Reference(self.source, model, configuration, (f"scale {_SCALE}",), Form(unused=unused))

    def _renamed(self, checkpoint: Checkpoint, state: Mapping[str, Tensor], names: NameMap) -> dict[str, Tensor]:
        unknown = [name for name in state if names.ours(name) is None]
        if unknown:
            raise self.refuse(checkpoint, unknown)
        return {str(names.ours(name)): value for name, value in state.items()}

    def _context(
        self, checkpoint: Checkpoint, state: Mapping[str, Tensor], prefix: str
    ) -> tuple[ResidualContext, dict[str, Any]]:
        first = state.get("blocks.0.0.weight")
        if first is None or first.ndim != 4:
            raise CheckpointError(f"{checkpoint.origin} has no {prefix}blocks.0.0.weight of four dimensions")
        blocks = [int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))]
        hidden, channels = first.shape[:2]
        context = ResidualContext(channels, hidden, max(blocks) + 1, padding="lightning-bolts")
        return context, {"channels": channels, "context_channels": hidden, "context_layers": max(blocks) + 1}

    def _backbone(self, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Arguments of the TimmEncoder that has these names and shapes."""
        stem, first = state.get("conv1.weight"), state.get("layer1.0.conv2.weight")
        found = {(int(m[1]), int(m[2])) for name in state if (m := re.match(r"layer(\d)\.(\d+)\.", name))}
        sizes = tuple(1 + max(block for stack, block in found if stack == at) for at in sorted({s for s, _ in found}))
        if stem is None or first is None:
            raise CheckpointError(
                f"{checkpoint.origin}: its encoder is none of torchvision's ResNets. That of encoder_name "
                "cpc_encoder is not known here; what is under contrastive_task. loads without it"
            )
        name = _BASIC.get(sizes)
        if "layer1.0.conv3.weight" in state:
            depth = _BOTTLENECK.get(sizes)
            if first.shape[1] < first.shape[0]:
                name = f"resnext{depth}_32x{first.shape[1]}d"
            elif first.shape[0] == 128:
                name = f"wide_resnet{depth}_2"
            else:
                name = depth and f"resnet{depth}"
        if name is None:
            raise CheckpointError(f"{checkpoint.origin}: torchvision has no ResNet of {sizes} blocks")
        return {"name": name, "in_channels": stem.shape[1]}

    def _their_name(self, name: str) -> str:
        part, _, rest = name.partition(".")
        if part == "context":
            return f"context_cnn.{_CONTEXT.theirs(rest) or rest}"
        return _TASK.theirs(name) or name.replace("encoder.backbone.", "encoder.")

    def export(self, model: nn.Module, form: Form | None) -> dict[str, Tensor]:
        unused = {} if form is None else form.unused
        if isinstance(model, ResidualContext):
            return self._export_context(model) | unused
        if not (
            isinstance(model, CPC)
            and isinstance(model.context, ResidualContext)
            and isinstance(model.objective, TargetInfoNCE)
            and model.objective.pred_steps is None
            and model.objective.pred_directions == 1
        ):
            raise CheckpointError(
                f"{self.source} has CPC v2 with one direction, and one prediction for all steps; this is another model"
            )
        task = with_prefix("context_cnn.", self._export_context(model.context))
        for name, value in model.objective.state_dict().items():
            task[str(_TASK.theirs(f"objective.{name}"))] = value
        if isinstance(model.encoder, Encodings):
            return task | unused
        if not isinstance(model.encoder, TimmEncoder):
            raise CheckpointError(
                f"{self.source} has torchvision's ResNets as encoders, not {type(model.encoder).__name__}"
            )
        state = with_prefix("encoder.", model.encoder.backbone.state_dict())
        return state | with_prefix("contrastive_task.", task) | unused

    def _export_context(self, context: ResidualContext) -> dict[str, Tensor]:
        if context.padding != "lightning-bolts":
            raise CheckpointError(
                f"{self.source} pads its context network in a way of its own, this one {context.padding}"
            )
        return {str(_CONTEXT.theirs(name)): value for name, value in context.state_dict().items()}


def _view(settings: Settings, options: Mapping[str, Any]) -> dict[str, int]:
    """Crop, grid and patches: as given, else as the checkpoint's options have them, else the program's for CIFAR-10."""

    def chosen(given: int | None, name: str, default: int) -> int:
        noted = options.get(name)
        return given or (noted if isinstance(noted, int) and noted > 0 else default)

    patch = chosen(settings.patch_size, "patch_size", _PATCH)
    stride = settings.stride or patch - chosen(None, "patch_overlap", patch // 2)
    grid = settings.grid_size or _GRID
    return {"image_size": patch + stride * (grid - 1), "grid_size": grid, "patch_size": patch, "stride": stride}
