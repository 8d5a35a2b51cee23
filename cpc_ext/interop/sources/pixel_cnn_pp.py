"""Conversion of checkpoints of pixel-cnn-pp (https://github.com/pclucas14/pixel-cnn-pp), both ways.

Names are ours with one more component where the program wraps a PyTorch layer. Both use weight normalisation, with
weight_g and weight_v; checkpoints have "weight" if it was removed (torch.nn.utils.remove_weight_norm). All but the size
of the images follows from names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cpc_ext.interop.errors import CheckpointError
from cpc_ext.interop.reading import Checkpoint
from cpc_ext.interop.reference import Form, Program, Reference, Settings, put_weights
from cpc_ext.models import PixelCNNPP

__all__ = ["PROGRAM", "PixelCNNPPProgram"]

# Names of weight normalisation in PyTorch from 2.0 on, with the older ones.
_NEW_NAMES = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
_THEIRS = re.compile(
    r"(?P<layer>(?:u_init|ul_init\.\d+|(?:up|down)_layers\.\d+\.ul?_stream\.\d+\.(?:conv_input|conv_out|nin_skip)"
    r"|(?:down|up)size_ul?_stream\.\d+|nin_out))\.(?P<wrapped>conv|deconv|lin_a)\.(?P<parameter>weight_g|weight_v|weight|bias)"
)
_SIZES = {1: 28, 3: 32}


class PixelCNNPPProgram(Program):
    """See the module. Layouts: "weight_norm", its newer names "parametrizations", or "plain" without normalisation."""

    source = "pixel-cnn-pp"
    settings = frozenset(("image_size",))

    def knows(self, name: str) -> bool:
        return _THEIRS.fullmatch(_old_name(name)) is not None

    def load(self, checkpoint: Checkpoint, settings: Settings) -> Reference:
        given = checkpoint.merged()
        state = {_old_name(name): value for name, value in given.items()}
        layout = "weight_norm" if state.keys() == given.keys() else "parametrizations"
        unknown = [name for name in state if not _THEIRS.fullmatch(name)]
        if unknown or not state:
            raise self.refuse(checkpoint, unknown)
        weights = {_ours(name): value for name, value in state.items()}
        if not any(name.endswith("weight_v") for name in weights):
            layout, weights = "plain", _parted(weights)
        elif any(name.endswith(".weight") for name in weights):
            raise CheckpointError(f"{checkpoint.origin}: the norm of some weights was removed, of others it was not")
        arguments = self._arguments(checkpoint, weights)
        model = PixelCNNPP(**arguments)
        put_weights(model, weights, _theirs, checkpoint.origin)
        colors = arguments["in_channels"]
        size = settings.image_size or _SIZES[colors]
        configuration = {"kind": "pixelcnn++", "arguments": arguments, "image_shape": [colors, size, size]}
        assumed = () if settings.image_size else (f"image_size {size}",)
        return Reference(self.source, model, configuration, assumed, Form(layout))

    def _arguments(self, checkpoint: Checkpoint, weights: Mapping[str, Tensor]) -> dict[str, int]:
        first, last = weights.get("u_init.weight_v"), weights.get("nin_out.weight_v")
        blocks = {int(m[1]) for name in weights if (m := re.match(r"up_layers\.0\.u_stream\.(\d+)\.", name))}
        if (
            not blocks
            or (last is None or last.ndim != 2 or 0 in last.shape)
            or (first is None or first.ndim != 4 or 0 in first.shape)
        ):
            raise CheckpointError(
                f"{checkpoint.origin} is not a checkpoint of {self.source}, which begins with u_init.conv.weight_v, "
                "or weight, of four dimensions, has up_layers.0.u_stream and ends with nin_out.lin_a"
            )
        filters, channels = first.shape[:2]
        outputs, colors = len(last), channels - 1
        each = {1: 3, 3: 10}.get(colors, 0)
        if not each or outputs % each:
            raise CheckpointError(
                f"{checkpoint.origin}: u_init takes {channels} channels and nin_out makes {outputs}; expected 4 and a "
                "multiple of 10 for colour, or 2 and a multiple of 3 for grey"
            )
        return {"in_channels": colors, "channels": filters, "blocks": max(blocks) + 1, "mixtures": outputs // each}

    def export(self, model: nn.Module, form: Form | None) -> dict[str, Tensor]:
        if not isinstance(model, PixelCNNPP):
            raise CheckpointError(f"{self.source} has no model like a {type(model).__name__}")
        if model.num_classes is not None:
            raise CheckpointError(f"{self.source} has no models of classes; this one knows {model.num_classes}")
        state = {_theirs(name): value for name, value in model.state_dict().items()}
        if form is not None and form.layout == "parametrizations":
            new = {old: name for name, old in _NEW_NAMES.items()}
            return {re.sub(r"weight_[gv]$", lambda found: new[found[0]], name): value for name, value in state.items()}
        return _joined(state) if form is not None and form.layout == "plain" else state


PROGRAM = PixelCNNPPProgram()


def _old_name(name: str) -> str:
    for new, old in _NEW_NAMES.items():
        if name.endswith(f".{new}"):
            return name.removesuffix(new) + old
    return name


def _parted(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split plain weights into norms weight_g and directions weight_v; rows of zeros get norm 0 and any direction."""
    parted: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith(".weight") and value.ndim > 1:
            length = _lengths(value)
            parted[f"{name}_g"] = length
            parted[f"{name}_v"] = torch.where(length > 0, value, torch.ones_like(value))
        else:
            parted[name] = value
    return parted


def _joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Combine norms weight_g and directions weight_v into plain weights; other tensors are kept."""
    joined: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith(".weight_v"):
            joined[name.removesuffix("_v")] = value * (state[name.removesuffix("v") + "g"] / _lengths(value))
        elif not name.endswith(".weight_g"):
            joined[name] = value
    return joined


def _lengths(weight: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    return lengths


def _ours(theirs: str) -> str:
    found = _THEIRS.fullmatch(theirs)
    return theirs if found is None else f"{found['layer']}.{found['parameter']}"


def _theirs(ours: str) -> str:
    layer, _, parameter = ours.rpartition(".")
    wrapped = "conv"
    if layer.split(".")[-1] in ("nin_skip", "nin_out"):
        wrapped = "lin_a"
    elif layer.startswith("upsize_"):
        wrapped = "deconv"
    return f"{layer}.{wrapped}.{parameter}"
