"""Recognition of pre-activation and wide ResNets from the names and shapes in a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cpc_ext.interop.errors import CheckpointError

__all__ = ["norm_of", "resnet_arguments", "stack_sizes", "wide_resnet_arguments"]

_STEMS = {5: "stl10", 3: "cifar", 7: "imagenet"}


def resnet_arguments(state: Mapping[str, Tensor], norm: str | None) -> dict[str, Any]:
    """Return the arguments of the :class:`cpc_ext.models.ResNetV2Encoder` that has these weights, by its own names.

    norm: "layer" or "instance", whose weights look alike; None if unknown.

    Raises CheckpointError if no such encoder has them, and ValueError if they have one of these norms and norm is None.
    """
    sizes = stack_sizes(state)
    stem = _tensor(state, "conv1.weight", 4)
    kernel = stem.shape[2]
    if kernel not in _STEMS:
        raise CheckpointError(f"conv1.weight is {list(stem.shape)}: stems have kernels of 3, 5 or 7 pixels")
    bottleneck = "layers.0.0.conv3.weight" in state
    inside = [_tensor(state, f"layers.{stack}.0.conv1.weight", 4).shape[0] for stack in range(len(sizes))]
    arguments: dict[str, Any] = {
        "in_channels": stem.shape[1],
        "blocks": sizes,
        "bottleneck": bottleneck,
        "channels": inside,
        "norm": norm_of(state, "layers.0.0.norm1", norm),
        "stem": _STEMS[kernel],
        "stem_channels": stem.shape[0],
    }
    if bottleneck:
        outside = [_tensor(state, f"layers.{stack}.0.conv3.weight", 4).shape[0] for stack in range(len(sizes))]
        arguments["expansions"] = [max(1, out // channels) for out, channels in zip(outside, inside, strict=True)]
    return arguments


def wide_resnet_arguments(state: Mapping[str, Tensor], norm: str | None) -> dict[str, Any]:
    """Return the arguments of a :class:`cpc_ext.models.WideResNetEncoder`, as :func:`resnet_arguments` does."""
    sizes = stack_sizes(state)
    if len(sizes) != 3 or len(set(sizes)) != 1:
        raise CheckpointError(f"a wide ResNet has three stacks of equally many blocks, got {sizes}")
    return {
        "depth": 6 * sizes[0] + 4,
        "width": max(1, _tensor(state, "layers.0.0.conv1.weight", 4).shape[0] // 16),
        "in_channels": _tensor(state, "conv1.weight", 4).shape[1],
        "norm": norm_of(state, "layers.0.0.norm1", norm),
    }


def stack_sizes(state: Mapping[str, Tensor]) -> list[int]:
    """Return the number of blocks in every stack. Raises CheckpointError if there is no stack or one is missing."""
    numbers = {tuple(name.split(".")[1:3]) for name in state if name.startswith("layers.") and name.count(".") >= 3}
    places = {(int(stack), int(block)) for stack, block in numbers if stack.isdecimal() and block.isdecimal()}
    sizes: dict[int, int] = {}
    for stack, block in places:
        sizes[stack] = max(sizes.get(stack, 0), block + 1)
    if not sizes or sorted(sizes) != list(range(len(sizes))):
        raise CheckpointError(f"expected stacks of blocks numbered from 0, got {sorted(sizes)}")
    return [sizes[stack] for stack in sorted(sizes)]


def norm_of(state: Mapping[str, Tensor], place: str, told: str | None) -> str:
    """Return the norm of the layer at ``place``; ``told`` decides between layer and instance norm.

    Raises ValueError if ``told`` is needed and None, or if it contradicts the weights.
    """
    if f"{place}.weight" not in state or f"{place}.running_mean" in state:
        found = "batch" if f"{place}.running_mean" in state else "none"
        if told is not None:
            raise ValueError(f"norm: by its weights the encoder has {found} norm, got {told}")
        return found
    if told is None:
        raise ValueError(
            "norm: the encoder has layer or instance norm, whose weights look alike, and neither the checkpoint nor "
            'its file\'s name (such as ..._layerNorm_...) tells which: give norm="layer" or norm="instance" (--norm)'
        )
    return told


def _tensor(state: Mapping[str, Tensor], name: str, ndim: int) -> Tensor:
    """Return a tensor. Raises CheckpointError if it is missing, empty or has another number of dimensions."""
    value = state.get(name)
    if value is None or value.ndim != ndim or 0 in value.shape:
        raise CheckpointError(
            f"{name} is missing" if value is None else f"{name} is {list(value.shape)}, expected {ndim} dimensions"
        )
    return value
