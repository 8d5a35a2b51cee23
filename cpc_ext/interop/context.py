"""Conversion of the gated PixelCNN that Greedy InfoMax and CPCV2-PyTorch use as context network."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from cpc_ext.interop.errors import CheckpointError
from cpc_ext.interop.names import NameMap
from cpc_ext.models import GatedPixelCNNContext

__all__ = ["CONTEXT_NAMES", "context_from_ours", "context_size", "context_to_ours"]

CONTEXT_NAMES = NameMap(
    [
        ("stack_out.{parameter}", "stack_out.{parameter}"),
        ("stack.layers.{layer}.{conv}.{parameter}", "layers.{layer}.{conv}.{parameter}"),
    ]
)
_MASK = re.compile(r"stack\.layers\.\d+\.(vertical|horizontal)_conv\.mask")


def context_size(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the channels and layers of a context network with the program's names; (0, 0) if there is none."""
    layers = {int(name.split(".")[2]) for name in state if re.match(r"stack\.layers\.\d+\.", name)}
    first = state.get("stack.layers.0.vertical_conv.weight")
    if first is None or first.ndim != 4:
        return 0, 0
    return first.shape[1], max(layers) + 1


def context_to_ours(state: Mapping[str, Tensor], prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights by our names, and the tensors that have no effect by the program's names.

    Unknown names are kept, so that loading the weights reports them. Raises CheckpointError if a mask hides other
    positions than the rows below.
    """
    _, layers = context_size(state)
    ours, unused = {}, {}
    for name, value in state.items():
        if _is_unused(name, layers):
            if name.endswith(".mask") and not (
                value.ndim == 4 and torch.equal(value.bool(), _mask(value.shape).bool())
            ):
                raise CheckpointError(f"{prefix}{name} hides other places than the rows below")
            unused[name] = value
        else:
            ours[CONTEXT_NAMES.ours(name) or name] = value
    return ours, unused


def context_from_ours(context: GatedPixelCNNContext, *, complete: bool) -> dict[str, Tensor]:
    """Return the weights by the program's names.

    complete: also return the tensors that have no effect there: masks, and zeros for the last vertical residual.
    """
    state = {str(CONTEXT_NAMES.theirs(name)): value for name, value in context.state_dict().items()}
    if complete:
        last = len(context.layers) - 1
        weight = context.layers[0].vertical_conv.weight.detach()
        for layer in range(last + 1):
            for conv in ("vertical_conv", "horizontal_conv"):
                shape = getattr(context.layers[layer], conv).weight.shape
                state[f"stack.layers.{layer}.{conv}.mask"] = _mask(shape)
        if last > 0:
            residual = f"stack.layers.{last}.residual_vertical."
            state[residual + "weight"] = weight.new_zeros(len(weight), weight.shape[1], 1, 1)
            state[residual + "bias"] = weight.new_zeros(len(weight))
    return state


def _is_unused(name: str, layers: int) -> bool:
    """Return whether a tensor has no effect: a mask, which our layers imply, or the last layer's vertical residual."""
    residual = f"stack.layers.{layers - 1}.residual_vertical."
    return _MASK.fullmatch(name) is not None or (layers > 1 and name in (residual + "weight", residual + "bias"))


def _mask(shape: torch.Size) -> Tensor:
    """Return a mask, 1 at and above the middle row and 0 below; float32 for any dtype of weights, as in the program."""
    mask = torch.ones(shape)
    mask[:, :, (shape[2] + 1) // 2 :] = 0
    return mask
