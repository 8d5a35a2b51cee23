"""Conversion of checkpoints of CPCV2-PyTorch (https://github.com/rschwarz15/CPCV2-PyTorch), both ways.

A file holds the whole model, under "enc.", "ar." and "pred_loss.", or its encoder or context network alone, without a
prefix. The encoder's "classifier", which depends on the labels that it was trained with, is kept beside the model. The
program writes options that do not follow from the weights into the file's name:
DATASET/trained_encoder_resnet14_crop64-0_colour_grid7_instanceNorm_1dir_augFalse_300.pt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cpc_ext.interop.context import (
    CONTEXT_NAMES,
    context_from_ours,
    context_size,
    context_to_ours,
)
from cpc_ext.interop.errors import CheckpointError
from cpc_ext.interop.matrices import matrices_from_ours, matrices_to_ours
from cpc_ext.interop.names import NameMap, under, with_prefix
from cpc_ext.interop.reading import Checkpoint
from cpc_ext.interop.reference import Form, Program, Reference, Settings, grid_view, put_weights
from cpc_ext.interop.resnets import norm_of, resnet_arguments, wide_resnet_arguments
from cpc_ext.models import CPC, GatedPixelCNNContext, MobileNetV2Encoder, PatchEncoder, ResNetV2Encoder
from cpc_ext.models.encoders.wide_resnet import WideResNetEncoder
from cpc_ext.nn import GridInfoNCE

__all__ = ["PROGRAM", "CPCV2PyTorch"]

_RESNET = NameMap(
    [
        ("layers.{stack}.{block}.shortcut.0.{parameter}", "layers.{stack}.{block}.shortcut.{parameter}"),
        ("layers.{stack}.{block}.{layer}.{parameter}", "layers.{stack}.{block}.{layer}.{parameter}"),
        ("conv1.{parameter}", "conv1.{parameter}"),
        ("norm1.{parameter}", "norm1.{parameter}"),
    ]
)
_WIDE_RESNET = NameMap(
    [
        (f"layer{stack + 1}.{{block}}.{theirs}.{{parameter}}", f"layers.{stack}.{{block}}.{ours}.{{parameter}}")
        for stack in range(3)
        for theirs, ours in (("shortcut.0", "shortcut"), ("{layer}", "{layer}"))
    ]
    + [("conv1.{parameter}", "conv1.{parameter}"), ("norm1.{parameter}", "norm1.{parameter}")]
)


def _mobilenet_pairs() -> list[tuple[str, str]]:
    """Return the pairs of names of MobileNetV2, which is one sequence of stem, blocks and last convolution there."""
    pairs = [
        (f"features.{place}.{index}.{{parameter}}", f"{layer}.{{parameter}}")
        for place, layers in ((0, ("conv1", "norm1")), (18, ("conv2", "norm2")))
        for index, layer in enumerate(layers)
    ]
    wider = (("0.0", "conv1"), ("0.1", "norm1"), ("1.0", "conv2"), ("1.1", "norm2"), ("2", "conv3"), ("3", "norm3"))
    first = (("0.0", "conv2"), ("0.1", "norm2"), ("1", "conv3"), ("2", "norm3"))
    place = 1
    for stack, blocks in enumerate((1, 2, 3, 4, 3, 3, 1)):
        for block in range(blocks):
            pairs += [
                (f"features.{place}.conv.{theirs}.{{parameter}}", f"layers.{stack}.{block}.{ours}.{{parameter}}")
                for theirs, ours in (first if stack == 0 else wider)
            ]
            place += 1
    return pairs


_MOBILENET = NameMap(_mobilenet_pairs())
_NAMES = {ResNetV2Encoder: _RESNET, WideResNetEncoder: _WIDE_RESNET, MobileNetV2Encoder: _MOBILENET}
_CLASSIFIER = re.compile(r"classifier\.(\d\.)?(weight|bias)")
_WIDTHS = (1.0, 0.75, 0.5, 0.35, 0.25, 1.4, 1.3, 1.25, 1.5, 2.0)

# Crop in pixels and number of patches along a side in the program's own examples, by stem.
_EXAMPLES = {"cifar": (30, 5), "stl10": (64, 7), "imagenet": (256, 7)}

# Options that the program writes into file names, after trained_cpc_ or trained_encoder_, and how to parse them.
_IN_NAMES: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "image_size": (re.compile(r"_crop(\d{1,4})(?:-\d{1,4})?(?=_)"), int),
    "pad": (re.compile(r"_crop\d{1,4}-(\d{1,4})(?=_)"), int),
    "grid_size": (re.compile(r"_grid(\d{1,4})(?=_)"), int),
    "norm": (re.compile(r"_(none|batch|layer|instance)Norm(?=_)"), str),
    "pred_directions": (re.compile(r"_(\d)dir(?=_)"), int),
    "patch_augmentation": (re.compile(r"_aug(True|False)(?=_)"), lambda word: word == "True"),
}
_BIASES = "biases"
_DATASETS = ("stl10", "cifar10", "cifar100")


class CPCV2PyTorch(Program):
    """See the module. A form's layout is "biases" if a MobileNetV2 without norm has biases, and otherwise empty."""

    source = "cpcv2-pytorch"

    def knows(self, name: str) -> bool:
        part, _, rest = name.partition(".")
        if part == "enc":
            return self._knows_in_encoder(rest)
        if part == "ar":
            return rest.startswith("stack")
        return part == "pred_loss" or self._knows_in_encoder(name)

    def _knows_in_encoder(self, name: str) -> bool:
        return _CLASSIFIER.fullmatch(name) is not None or any(names.ours(name) for names in _NAMES.values())

    def noted_in_name(self, checkpoint: Checkpoint) -> dict[str, Any]:
        if len(checkpoint.files) != 1:
            return {}
        (path,) = checkpoint.files
        found = {
            option: read(match[1])
            for option, (pattern, read) in _IN_NAMES.items()
            if (match := pattern.search(path.stem + "_"))
        }
        if "image_size" in found:
            found["gray"] = "_colour_" not in path.stem
        if found and path.absolute().parent.name in _DATASETS:
            found["dataset"] = path.absolute().parent.name
        return found

    def load(self, checkpoint: Checkpoint, settings: Settings) -> Reference:
        state = checkpoint.merged()
        if any(name.startswith("enc.") for name in state):
            return self._load_whole(checkpoint, state, settings)
        if "stack_out.weight" in state:
            return self._load_context(checkpoint, state)
        return self._load_encoder(checkpoint, state, settings)

    def _load_whole(self, checkpoint: Checkpoint, state: dict[str, Tensor], settings: Settings) -> Reference:
        others = [name for name in state if not name.startswith(("enc.", "ar.", "pred_loss."))]
        if others:
            raise self.refuse(checkpoint, others)
        kind, arguments, weights, unused = self._recognised_encoder(checkpoint, under(state, "enc."), settings)
        channels, layers = context_size(under(state, "ar."))
        losses = under(state, "pred_loss.")
        if not layers or not losses:
            raise CheckpointError(
                f"{checkpoint.origin} holds an encoder under enc. but no "
                + ("context network under ar." if not layers else "W_k under pred_loss.")
            )
        matrices = self._matrices(checkpoint, losses)
        directions, steps = matrices.shape[:2]
        context_weights, unused_context = context_to_ours(under(state, "ar."), "ar.")
        told = self._told(checkpoint, arguments, unused)
        if told.pop("pred_directions", directions) != directions:
            raise _misnamed(checkpoint, f"{directions} directions")
        view, assumed = _view(_stem(kind, arguments), settings, steps + settings.skip + 1)
        encoder = _built(kind, arguments, view)
        model = CPC(
            encoder,
            GatedPixelCNNContext(channels, layers),
            GridInfoNCE(
                matrices.shape[3],
                matrices.shape[2],
                pred_steps=steps,
                pred_directions=directions,
                skip=settings.skip,
                neg_samples=settings.neg_samples,
            ),
        )
        ours = {
            **with_prefix("encoder.", weights),
            **with_prefix("context.", context_weights),
            "objective.weight": matrices,
        }
        put_weights(model, ours, lambda name: self._their_name(kind, name), checkpoint.origin)
        configuration = {
            "kind": "cpc",
            "encoder": {"class": kind.__name__, "arguments": arguments},
            "context_layers": layers,
            "pred_steps": steps,
            "pred_directions": directions,
            "skip": settings.skip,
            "neg_samples": settings.neg_samples,
            **view,
            **told,
        }
        form = Form(
            _layout(kind, arguments, state),
            unused={**with_prefix("enc.", unused), **with_prefix("ar.", unused_context)},
        )
        return Reference(self.source, model, configuration, assumed, form)

    def _matrices(self, checkpoint: Checkpoint, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the W_k of all directions, [directions, steps, E, D]."""
        directions = sorted({name.split(".")[0] for name in losses}, key=lambda name: (len(name), name))
        if directions != [str(index) for index in range(min(len(directions), 4))]:
            raise self.refuse(checkpoint, [f"pred_loss.{name}" for name in directions])
        try:
            return torch.stack(
                [matrices_to_ours(under(losses, f"{name}."), f"pred_loss.{name}") for name in directions]
            )
        except RuntimeError as error:
            raise CheckpointError(f"{checkpoint.origin}: pred_loss: {error}") from None

    def _load_encoder(self, checkpoint: Checkpoint, state: dict[str, Tensor], settings: Settings) -> Reference:
        kind, arguments, weights, unused = self._recognised_encoder(checkpoint, state, settings)
        told = self._told(checkpoint, arguments, unused)
        view, assumed = _view(_stem(kind, arguments), settings, None)
        encoder = _built(kind, arguments, view)
        put_weights(encoder, weights, _NAMES[kind].theirs, checkpoint.origin)
        configuration = {"kind": "encoder", "encoder": {"class": kind.__name__, "arguments": arguments}, **view, **told}
        return Reference(self.source, encoder, configuration, assumed, Form(_layout(kind, arguments, state), unused))

    def _told(
        self, checkpoint: Checkpoint, arguments: Mapping[str, Any], unused: Mapping[str, Tensor]
    ) -> dict[str, Any]:
        """Return what a file's name and classifier say of the images and directions.

        Raises CheckpointError if the weights are for images of other channels.
        """
        named = self.noted_in_name(checkpoint)
        told: dict[str, Any] = {
            name: named[name] for name in ("pad", "patch_augmentation", "pred_directions", "dataset") if name in named
        }
        if named.get("gray", arguments["in_channels"] == 1) != (arguments["in_channels"] == 1):
            raise _misnamed(checkpoint, f"images of {arguments['in_channels']} channels")
        if any(name.endswith("bias") and value.shape == (100,) for name, value in unused.items()):
            told.setdefault("dataset", "cifar100")
        return told

    def _load_context(self, checkpoint: Checkpoint, state: dict[str, Tensor]) -> Reference:
        channels, layers = context_size(state)
        if not layers:
            raise self.refuse(checkpoint, list(state))
        context = GatedPixelCNNContext(channels, layers)
        weights, unused = context_to_ours(state)
        put_weights(context, weights, CONTEXT_NAMES.theirs, checkpoint.origin)
        configuration = {"kind": "part", "context_layers": layers, "channels": channels}
        return Reference(self.source, context, configuration, form=Form(unused=unused))

    def _recognised_encoder(
        self, checkpoint: Checkpoint, state: Mapping[str, Tensor], settings: Settings
    ) -> tuple[type[PatchEncoder], dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
        """Return the encoder's class, its arguments, its weights by our names, and other tensors by theirs."""
        unused = {name: value for name, value in state.items() if _CLASSIFIER.fullmatch(name)}
        theirs = {name: value for name, value in state.items() if name not in unused}
        kind: type[PatchEncoder] = ResNetV2Encoder
        if "features.0.0.weight" in theirs:
            kind = MobileNetV2Encoder
        elif any(name.startswith("layer1.") for name in theirs):
            kind = WideResNetEncoder
        unknown = [name for name in theirs if _NAMES[kind].ours(name) is None]
        if unknown:
            raise self.refuse(checkpoint, unknown)
        weights = {str(_NAMES[kind].ours(name)): value for name, value in theirs.items()}
        try:
            if kind is MobileNetV2Encoder:
                arguments = _mobilenet_arguments(weights, settings.norm)
            else:
                recognise = resnet_arguments if kind is ResNetV2Encoder else wide_resnet_arguments
                arguments = recognise(weights, settings.norm)
        except CheckpointError as error:
            raise CheckpointError(f"{checkpoint.origin} is not an encoder of {self.source}: {error}") from None
        if kind is MobileNetV2Encoder and arguments["norm"] == "none":
            # The program's convolutions never have biases; those of programs derived from it may.
            for name, value in theirs.items():
                if name.endswith(".weight"):
                    bias = str(_MOBILENET.ours(name)).removesuffix("weight") + "bias"
                    weights.setdefault(bias, value.new_zeros(len(value)))
        return kind, arguments, weights, unused

    def _their_name(self, kind: type[PatchEncoder], name: str) -> str | None:
        part, _, rest = name.partition(".")
        if part == "encoder":
            return f"enc.{_NAMES[kind].theirs(rest) or rest}"
        if part == "context":
            return f"ar.{CONTEXT_NAMES.theirs(rest) or rest}"
        return "pred_loss.*.W_k"

    def export(self, model: nn.Module, form: Form | None) -> dict[str, Tensor]:
        unused = {} if form is None else form.unused
        biases = form is not None and form.layout == _BIASES
        if isinstance(model, PatchEncoder):
            return self._export_encoder(model, biases) | unused
        if isinstance(model, GatedPixelCNNContext):
            return context_from_ours(model, complete=form is None) | unused
        if not isinstance(model, CPC) or not isinstance(model.context, GatedPixelCNNContext):
            raise CheckpointError(
                f"{self.source} has CPC with a gated PixelCNN as context network for all directions, its encoder or "
                f"its context network; {_described(model)} is none of these"
            )
        if not isinstance(model.objective, GridInfoNCE):
            raise CheckpointError(
                f"{self.source} predicts by matrices W_k, this model by {_described(model.objective)}"
            )
        if not isinstance(model.encoder, PatchEncoder):
            raise CheckpointError(f"{self.source} has no model without an encoder")
        state = with_prefix("enc.", self._export_encoder(model.encoder, biases))
        state |= with_prefix("ar.", context_from_ours(model.context, complete=form is None))
        for direction, matrices in enumerate(model.objective.weight):
            state |= with_prefix(f"pred_loss.{direction}.", matrices_from_ours(matrices))
        return state | unused

    def _export_encoder(self, encoder: PatchEncoder, biases: bool) -> dict[str, Tensor]:
        """Return an encoder's weights by the program's names.

        biases: also those of a MobileNetV2's convolutions, if the checkpoint that the model came from had them.
        """
        names = _NAMES.get(type(encoder))
        if names is None:
            raise CheckpointError(f"{self.source} has no encoder like {_described(encoder)}")
        if isinstance(encoder, ResNetV2Encoder):
            kernel, stride = encoder.conv1.kernel_size[0], encoder.conv1.stride[0]
            if stride != (2 if kernel == 7 else 1):
                raise CheckpointError(f"{self.source} has no stem of {kernel}x{kernel} with stride {stride}")
        if isinstance(encoder, MobileNetV2Encoder) and encoder.strides != "imagenet":
            raise CheckpointError(f"{self.source} has MobileNetV2 with ImageNet's strides, not {encoder.strides}'s")
        state = {}
        for name, value in encoder.state_dict().items():
            theirs = str(names.theirs(name))
            if _is_bias(encoder, name) and not biases:
                if value.any():
                    raise CheckpointError(f"{self.source} has no biases in MobileNetV2's convolutions, {name} is not 0")
                continue
            state[theirs] = value
        return state


PROGRAM = CPCV2PyTorch()


def _mobilenet_arguments(weights: Mapping[str, Tensor], norm: str | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "in_channels": weights["conv1.weight"].shape[1],
        "norm": norm_of(weights, "norm1", norm),
    }
    for width in _WIDTHS:
        with torch.device("meta"):
            shapes = MobileNetV2Encoder(**arguments, width=width).state_dict()
        if all(value.shape == shapes[name].shape for name, value in weights.items() if name in shapes):
            return {**arguments, "width": width, "strides": "imagenet"}
    raise CheckpointError(
        f"it is like MobileNetV2, but with {weights['conv1.weight'].shape[0]} channels after the stem where one of "
        f"width 1 has 32; known are widths of {', '.join(map(str, _WIDTHS))}"
    )


def _stem(kind: type[PatchEncoder], arguments: Mapping[str, Any]) -> str:
    """Return the kind of images that an encoder's stem is made for."""
    if kind is ResNetV2Encoder:
        stem: str = arguments["stem"]
        return stem
    return "cifar" if kind is WideResNetEncoder else "stl10"


def _view(stem: str, settings: Settings, least: int | None) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return crop, grid and patches, as given or else as in the program's examples, and which of them are assumed.

    least: number of rows that the predictions need, or None without predictions.
    """
    crop, grid = _EXAMPLES[stem]
    assumed = []
    if settings.grid_size is not None:
        grid = settings.grid_size
        if grid < (least or 2):
            raise ValueError(f"grid_size must be at least {least or 2} for this checkpoint, got {grid}")
    else:
        grid = least or grid
        assumed.append(f"grid_size {grid}" + (", the smallest that its steps fit" if least else ""))
    if settings.image_size is not None:
        crop = settings.image_size
    elif settings.patch_size is None:
        # The largest size up to the example's that half-overlapping patches fill.
        crop = crop - crop % (grid + 1) or grid + 1
    if settings.patch_size is None and crop % (grid + 1):
        raise ValueError(
            f"image_size {crop} does not divide into half-overlapping patches on a {grid} x {grid} grid: use a "
            f"multiple of {grid + 1}, or give patch_size"
        )
    patch = settings.patch_size or 2 * crop // (grid + 1)
    # Patches that are too large for the program's crop overlap by half, in a larger crop.
    stride = settings.stride or max(0, (crop - patch) // (grid - 1)) or max(1, patch // 2)
    view = grid_view(replace(settings, grid_size=grid), patch, stride, grid)
    if settings.image_size is None:
        assumed.append(f"image_size {view['image_size']}")
    return view, tuple(assumed)


def _misnamed(checkpoint: Checkpoint, holds: str) -> CheckpointError:
    return CheckpointError(f"{checkpoint.origin} holds a model of {holds}, its name says otherwise: rename the file")


def _layout(kind: type[PatchEncoder], arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Return the layout: "biases" if a MobileNetV2 without norm has biases in the checkpoint, else ""."""
    without_norm = kind is MobileNetV2Encoder and arguments["norm"] == "none"
    return _BIASES if without_norm and any(re.search(r"features\..+\.bias$", name) for name in state) else ""


def _is_bias(encoder: PatchEncoder, name: str) -> bool:
    """Return whether one of our names is a convolution's bias in MobileNetV2, which the program does not have."""
    return isinstance(encoder, MobileNetV2Encoder) and name.endswith("bias") and "conv" in name.split(".")[-2]


def _built(kind: type[PatchEncoder], arguments: Mapping[str, Any], view: Mapping[str, int]) -> PatchEncoder:
    return kind(**arguments, patch_size=view["patch_size"], stride=view["stride"])


def _described(model: nn.Module) -> str:
    return f"a {type(model).__name__}"
