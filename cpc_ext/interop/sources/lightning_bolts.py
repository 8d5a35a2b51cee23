"""Conversion of CPC_v2 of Lightning Bolts (https://github.com/Lightning-Universe/lightning-bolts), both ways.

A file holds the whole model, under "encoder." and "contrastive_task."; the task without an encoder, under
"context_cnn.", "target_cnn." and "pred_cnn."; or its context network alone, under "blocks.". Encoders are the program's
own "cpc_encoder", or torchvision's ResNets, which have the same layers and names in timm. The online evaluator and the
encoder's "fc" are kept beside the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cpc_ext.interop.errors import CheckpointError
from cpc_ext.interop.names import NameMap, under, with_prefix
from cpc_ext.interop.reading import Checkpoint
from cpc_ext.interop.reference import Encodings, Form, Program, Reference, Settings, grid_view, put_weights
from cpc_ext.interop.resnets import stack_sizes
from cpc_ext.interop.torchvision_resnets import check_resnet, resnet_name
from cpc_ext.models import CPC, LayerNormResNetEncoder, PatchEncoder, ResidualContext, TimmEncoder
from cpc_ext.nn import TargetInfoNCE

__all__ = ["PROGRAM", "LightningBolts"]

# Indices of a block's convolutions in the program's sequence; the others are ReLUs and padding.
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
# Names in the program's own encoder; our encoder has its layers under "layers".
_OWN = NameMap(
    [
        (f"layer{stack + 1}.{{block}}.{theirs}.{{parameter}}", f"layers.{stack}.{{block}}.{ours}.{{parameter}}")
        for stack in range(4)
        for theirs, ours in (("downsample.{index}", "downsample.{index}"), ("{layer}", "{layer}"))
    ]
    + [(f"{layer}.{{parameter}}", f"{layer}.{{parameter}}") for layer in ("conv1", "ln1")]
)
_UNUSED = re.compile(r"(encoder\.fc|non_linear_evaluator)\..+")
_PATCH, _GRID = 8, 7
# The program multiplies predictions by this factor.
_SCALE = 0.1


class LightningBolts(Program):
    """See the module. The kind of model determines the layout, so a form's layout is not used."""

    source = "lightning-bolts"
    settings = frozenset(("grid_size", "image_size", "patch_size", "stride", "skip"))

    def knows(self, name: str) -> bool:
        task = name.removeprefix("contrastive_task.")
        return (
            _UNUSED.fullmatch(name) is not None
            or _TASK.ours(task) is not None
            or _CONTEXT.ours(task.removeprefix("context_cnn.")) is not None
            or re.match(r"encoder\.(conv1|bn1|ln1|layer[1-4]\.\d+)\.", name) is not None
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
        assumed: tuple[str, ...] = (f"scale {_SCALE}",)
        if whole:
            backbone = under(state, "encoder.")
            others = [name for name in state if not name.startswith(("encoder.", "contrastive_task."))]
            if others:
                raise self.refuse(checkpoint, others)
            encoder, arguments, weights, view, guessed = self._encoder(checkpoint, backbone, settings)
            ours |= with_prefix("encoder.", weights)
            assumed += guessed
            needed = settings.skip + 2
            if view["grid_size"] < needed:
                raise ValueError(f"grid_size must be at least {needed} to predict a step, got {view['grid_size']}")
            configuration |= {"encoder": {"class": type(encoder).__name__, "arguments": arguments}, **view}
        target = heads.get("target_cnn.weight")
        if target is None or target.ndim != 4 or 0 in target.shape:
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
        configuration = {
            "kind": "cpc-v2" if whole else "part",
            **configuration,
            "target_channels": len(target),
            "scale": _SCALE,
            "skip": settings.skip,
        }
        return Reference(self.source, model, configuration, assumed, Form(unused=unused))

    def _renamed(self, checkpoint: Checkpoint, state: Mapping[str, Tensor], names: NameMap) -> dict[str, Tensor]:
        unknown = [name for name in state if names.ours(name) is None]
        if unknown:
            raise self.refuse(checkpoint, unknown)
        return {str(names.ours(name)): value for name, value in state.items()}

    def _context(
        self, checkpoint: Checkpoint, state: Mapping[str, Tensor], prefix: str
    ) -> tuple[ResidualContext, dict[str, Any]]:
        first = state.get("blocks.0.0.weight")
        if first is None or first.ndim != 4 or 0 in first.shape:
            raise CheckpointError(f"{checkpoint.origin} has no {prefix}blocks.0.0.weight of four dimensions")
        blocks = [int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))]
        hidden, channels = first.shape[:2]
        context = ResidualContext(channels, hidden, max(blocks) + 1, padding="lightning-bolts")
        return context, {"channels": channels, "context_channels": hidden, "context_layers": max(blocks) + 1}

    def _encoder(
        self, checkpoint: Checkpoint, state: dict[str, Tensor], settings: Settings
    ) -> tuple[PatchEncoder, dict[str, Any], dict[str, Tensor], dict[str, int], tuple[str, ...]]:
        """Return the encoder, its arguments, its weights by our names, its crop and patches, and assumptions."""
        if "ln1.weight" not in state:
            arguments = self._backbone(checkpoint, state)
            view, assumed = _view(settings, checkpoint.options, None)
            encoder = TimmEncoder(**arguments, patch_size=view["patch_size"], stride=view["stride"])
            return encoder, arguments, with_prefix("backbone.", state), view, assumed
        weights = self._renamed(checkpoint, state, _OWN)
        arguments = self._own(checkpoint, weights)
        view, assumed = _view(settings, checkpoint.options, weights["ln1.weight"].shape[-1])
        arguments = {"patch_size": view["patch_size"], **arguments}
        return LayerNormResNetEncoder(**arguments, stride=view["stride"]), arguments, weights, view, assumed

    def _own(self, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of the :class:`LayerNormResNetEncoder` with these weights, except the patch size."""
        sizes = stack_sizes(weights)
        convs = {
            name: weights.get(name)
            for name in (
                "conv1.weight",
                *(f"layers.{stack}.0.conv{conv}.weight" for stack in range(len(sizes)) for conv in (1, 3)),
            )
        }
        wrong = [name for name, value in convs.items() if value is None or value.ndim != 4 or 0 in value.shape]
        if wrong or weights["ln1.weight"].ndim != 3:
            name = (wrong or ["ln1.weight"])[0]
            raise CheckpointError(
                f"{checkpoint.origin}: {_OWN.theirs(name)} of its encoder is missing or of no such shape"
            )
        inside, outside = ([len(weights[f"layers.{s}.0.conv{c}.weight"]) for s in range(len(sizes))] for c in (1, 3))
        return {
            "in_channels": weights["conv1.weight"].shape[1],
            "blocks": sizes,
            "channels": inside,
            "expansions": [max(1, out // channels) for out, channels in zip(outside, inside, strict=True)],
            "stem_channels": len(weights["conv1.weight"]),
        }

    def _backbone(self, checkpoint: Checkpoint, state: Mapping[str, Tensor]) -> dict[str, Any]:
        """Return the arguments of the TimmEncoder with these weights."""
        try:
            return {"name": resnet_name(state), "in_channels": state["conv1.weight"].shape[1]}
        except ValueError as error:
            raise CheckpointError(
                f"{checkpoint.origin}: its encoder is neither the program's own nor one of torchvision's ResNets, it "
                f"{error}; what is under contrastive_task. loads without it"
            ) from None

    def _their_name(self, name: str) -> str:
        part, _, rest = name.partition(".")
        if part == "context":
            return f"context_cnn.{_CONTEXT.theirs(rest) or rest}"
        if part == "encoder" and not rest.startswith("backbone."):
            return f"encoder.{_OWN.theirs(rest) or rest}"
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
            # Rescale the prediction layer by the ratio of our factor to the program's, so that scores stay the same.
            factor = model.objective.scale / _SCALE if name.startswith("prediction_projection.") else 1
            task[str(_TASK.theirs(f"objective.{name}"))] = value * factor
        if isinstance(model.encoder, Encodings):
            return task | unused
        if isinstance(model.encoder, LayerNormResNetEncoder):
            backbone = {str(_OWN.theirs(name)): value for name, value in model.encoder.state_dict().items()}
        elif isinstance(model.encoder, TimmEncoder):
            backbone = self._export_backbone(model.encoder)
        else:
            raise CheckpointError(
                f"{self.source} has its own encoder and torchvision's ResNets, not {type(model.encoder).__name__}"
            )
        state = with_prefix("encoder.", backbone)
        return state | with_prefix("contrastive_task.", task) | unused

    def _export_backbone(self, encoder: TimmEncoder) -> dict[str, Tensor]:
        try:
            check_resnet(encoder)
        except ValueError as error:
            raise CheckpointError(
                f"{self.source} has its own encoder and torchvision's ResNets, this one {error}"
            ) from None
        if encoder.stem is not None:
            raise CheckpointError(f"{self.source} has no stem like {encoder.stem}'s")
        backbone: dict[str, Tensor] = encoder.backbone.state_dict()
        return backbone

    def _export_context(self, context: ResidualContext) -> dict[str, Tensor]:
        if context.padding != "lightning-bolts":
            raise CheckpointError(
                f"{self.source} pads its context network in a way of its own, this one {context.padding}"
            )
        return {str(_CONTEXT.theirs(name)): value for name, value in context.state_dict().items()}


PROGRAM = LightningBolts()


def _view(settings: Settings, options: Mapping[str, Any], half: int | None) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return crop, grid and patches, and which of them are assumed.

    They are as given, else as recorded in the checkpoint, else the program's values for CIFAR-10. A recorded overlap is
    ignored if it is the program's default for patches of 8 pixels but the patches have another size, because the part
    of the program that cuts the images then uses half a patch instead.

    half: side of the feature map after the first convolution, of stride 2, if the weights determine it.
    """
    noted = {name: options[name] for name in ("patch_size", "patch_overlap") if _is_size(options.get(name))}
    patch = settings.patch_size or noted.get("patch_size")
    assumed = []
    if half is not None:
        if patch is None:
            patch = 2 * half
        elif (patch + 1) // 2 != half:
            raise ValueError(f"patch_size {patch}: by its weights the encoder takes patches of {2 * half} pixels")
    elif patch is None:
        patch = _PATCH
        assumed.append(f"patch_size {patch}")
    overlap = noted.get("patch_overlap", 0)
    stride = settings.stride or patch - overlap
    if settings.stride is None and (not 0 < overlap < patch or (overlap == _PATCH // 2 and patch != _PATCH)):
        stride = patch // 2
        assumed.append(f"stride {stride}")
    view = grid_view(settings, patch, stride, _GRID)
    if settings.grid_size is None and settings.image_size is None:
        assumed.append(f"grid_size {_GRID}")
    return view, tuple(assumed)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
