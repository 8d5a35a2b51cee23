"""Convolutions and normalisations of the encoders, by name, and their initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from cpc_ext.nn.conv2d import Conv2d
from cpc_ext.nn.group_norm import GroupNorm

__all__ = ["NORMS", "InstanceNorm", "begin_block", "check_norm", "conv", "reset_layers"]


class InstanceNorm(GroupNorm):
    """Normalisation of each channel of an image by itself, with scales and biases.

    Raises ValueError for maps of one pixel, as PyTorch's layer does: all of their outputs would be the biases.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[2:].numel() == 1:
            raise ValueError(
                f"norm='instance' needs maps of more than one pixel, got {list(input.shape)}: take larger patches, "
                "fewer strides or another norm"
            )
        return super().forward(input)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "layer": lambda channels: GroupNorm(1, channels),
    "instance": InstanceNorm,
}


def check_norm(norm: str) -> None:
    """Raise ValueError for a normalisation that does not exist."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int, norm: str, *, groups: int = 1) -> Conv2d:
    """Build a convolution that divides the size by its stride; it has biases only without a norm."""
    return Conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        groups=groups,
        bias=norm == "none",
    )


def begin_block(input: Tensor, normed: Tensor, first: Conv2d, shortcut: Conv2d | None) -> tuple[Tensor, Tensor]:
    """Return the output of a pre-activation block's first convolution, and the residual that its last one adds.

    Args:
        input: input of the block.
        normed: ``input`` after the block's first norm; ``input`` itself without a norm.
        first: the first convolution, of the ReLU of ``normed``.
        shortcut: convolution of the same to the residual; None if the residual is ``input``.
    """
    if first.takes_kernel(normed):
        features, passed = first.passing(normed, relu_input=True)
        if shortcut is not None:
            return features, shortcut(passed, relu_input=True)
        return features, passed if normed is input else input
    activated = torch.relu(normed)  # Once for both.
    return first(activated), input if shortcut is None else shortcut(activated)


def reset_layers(network: nn.Module) -> None:
    """Draw all convolutions by He's normal initialisation by fan-out, with zero biases; norms start as identities."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            # PyTorch's initialisation would take the fan-out of all groups together.
            fan_out = module.out_channels // module.groups * module.weight[0, 0].numel()
            nn.init.normal_(module.weight, std=math.sqrt(2) / math.sqrt(fan_out))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            module.reset_parameters()
