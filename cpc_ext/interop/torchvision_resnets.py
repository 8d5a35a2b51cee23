"""Recognition of torchvision's ResNets from the names and shapes in a state dict; those of timm are the same."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cpc_ext.models import TimmEncoder

__all__ = ["check_resnet", "resnet_name"]

# Names by the number of blocks in each stack, for blocks of two convolutions and of three.
_BASIC: dict[tuple[int, ...], str] = {(2, 2, 2, 2): "resnet18", (3, 4, 6, 3): "resnet34"}
_BOTTLENECK: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}


def resnet_name(state: Mapping[str, Tensor]) -> str:
    """Return timm's name of the network, such as "resnet18", from its weights by timm's names without a prefix.

    Raises ValueError if they are not of such a network; the message says what they are instead.
    """
    stem, first = state.get("conv1.weight"), state.get("layer1.0.conv2.weight")
    found = {(int(m[1]), int(m[2])) for name in state if (m := re.match(r"layer(\d)\.(\d+)\.", name))}
    sizes = tuple(1 + max(block for stack, block in found if stack == at) for at in sorted({s for s, _ in found}))
    if stem is None or first is None or stem.ndim != 4 or first.ndim != 4 or 0 in (*stem.shape, *first.shape):
        raise ValueError("has no conv1.weight and layer1.0.conv2.weight of four dimensions")
    name = _BASIC.get(sizes)
    if "layer1.0.conv3.weight" in state:
        depth = _BOTTLENECK.get(sizes)
        if first.shape[1] < first.shape[0]:
            name = f"resnext{depth}_{first.shape[0] // first.shape[1]}x{first.shape[1]}d"
        elif first.shape[0] == 128:
            name = f"wide_resnet{depth}_2"
        else:
            name = f"resnet{depth}"
        name = name if depth else None
    if name is None:
        raise ValueError(f"has stacks of {sizes} blocks, as no ResNet of torchvision's has")
    return name


def check_resnet(encoder: TimmEncoder) -> None:
    """Raise ValueError unless an encoder is the network as which its exported weights would be read again.

    Pooling, strides and activations have no weights, so a checkpoint of a network that differs in these would be read
    as the standard network and compute something else. The message says how the encoder differs.
    """
    name = resnet_name(encoder.backbone.state_dict())
    with torch.device("meta"):
        read = TimmEncoder(name, encoder.in_channels, stem=encoder.stem)
    ours, theirs = _layers(encoder.backbone), _layers(read.backbone)
    for layer in {**ours, **theirs}:
        if ours.get(layer) != theirs.get(layer):
            mine, its = ours.get(layer, "nothing"), theirs.get(layer, "nothing")
            raise ValueError(f"has {mine} as {layer}, where a {name} has {its}")


def _layers(network: nn.Module) -> dict[str, str]:
    """Return the representations of all leaf layers that have an effect in evaluation mode, by name."""
    return {
        name: repr(layer).replace("SyncBatchNorm", "BatchNorm2d")
        for name, layer in network.named_modules()
        if not any(layer.children()) and "drop" not in name
    }
