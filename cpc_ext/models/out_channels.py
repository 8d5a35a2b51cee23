"""Checked access to a network's number of output channels."""

from __future__ import annotations

from torch import nn

__all__ = ["out_channels"]


def out_channels(network: nn.Module) -> int:
    """Return the attribute ``out_channels`` of an encoder or a context network.

    Raises:
        AttributeError: it has none.
        TypeError: the attribute is no int.
    """
    channels = network.out_channels
    if not isinstance(channels, int):
        raise TypeError(f"out_channels of {type(network).__name__} must be an int, got {type(channels).__name__}")
    return channels
