"""The projection head of siamese networks: a small network behind the encoder, whose outputs the loss compares."""

from __future__ import annotations

from torch import nn

from cpc_ext.nn.typed import Sequential

__all__ = ["projection_head"]


def projection_head(
    channels: int, projection_channels: int, *, layers: int = 2, hidden: int | None = None, norm: bool = False
) -> Sequential[nn.Module]:
    """Build linear layers with ReLU between them, [B, channels] → [B, projection_channels].

    Args:
        channels: features of the encoder.
        projection_channels: P, features that the loss compares.
        layers: number of linear layers.
        hidden: width of all layers but the last. Default: 4 P, as in the University of Amsterdam's tutorial 17.
        norm: batch norm behind every layer, the last included, in place of biases, as in SimCLR's own program.

    Raises:
        ValueError: an argument out of its range.
    """
    hidden = 4 * projection_channels if hidden is None else hidden
    for name, value in (("projection_channels", projection_channels), ("layers", layers), ("hidden", hidden)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    widths = [channels, *[hidden] * (layers - 1), projection_channels]
    modules: list[nn.Module] = []
    for index in range(layers):
        modules.append(nn.Linear(widths[index], widths[index + 1], bias=not norm))
        if norm:
            modules.append(nn.BatchNorm1d(widths[index + 1]))
        if index < layers - 1:
            modules.append(nn.ReLU())
    return Sequential(*modules)
