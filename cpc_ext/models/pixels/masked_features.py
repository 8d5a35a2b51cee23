"""Features of masked convolutions that are kept from pixel to pixel, for sampling.

A network of :class:`cpc_ext.nn.MaskedConv2d` layers is recorded as a list of steps; at a new pixel each layer is one
:class:`cpc_ext.ops.masked_conv2d.PixelConvolution`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cpc_ext.models.pixels.pixel_sampler import PixelFeatures
from cpc_ext.nn.fixed_mask import FixedMask
from cpc_ext.nn.masked_conv2d import MaskedConv2d
from cpc_ext.ops.masked_conv2d import PixelConvolution, masked_conv2d
from cpc_ext.ops.pixel_steps import PixelPlace

__all__ = ["Convolve", "MaskedFeatures", "PixelActivation", "PixelNetwork", "convolve_images"]


class Convolve(Protocol):
    """A function that runs a network's layers on whole images, or records them for one pixel at a time."""

    def __call__(
        self, layer: MaskedConv2d | PixelActivation, input: Any, condition: Any = None, *, rows_above: bool = False
    ) -> Any:
        """Return the features of ``layer`` on ``input``, with ``condition`` (features, or a [B, O, 1, 1] tensor) added.

        rows_above: the features depend on pixels of the rows above only, even if through features of their own row.
        """


class PixelNetwork(Protocol):
    """The interface that :class:`MaskedFeatures` needs of a model: a network of masked convolutions and activations."""

    in_channels: int
    levels: int
    seen_channels: int
    logits_layer: MaskedConv2d

    def network(self, convolve: Convolve, image: Any, labels: Tensor | None) -> Any:
        """Return the features that ``logits_layer`` takes; ``convolve`` runs all layers."""


def convolve_images(
    layer: nn.Module, input: Tensor, condition: Tensor | None = None, *, rows_above: bool = False
) -> Tensor:
    """Run a layer on whole images, [B, C, H, W]."""
    features: Tensor = layer(input) if condition is None else layer(input, condition)
    return features


class PixelActivation(FixedMask):
    """A separate ReLU or gate, for a feature map that is needed before and after it.

    It is a masked convolution that sees only its condition, so that whole images and single pixels go through the same
    arithmetic, and a gate takes one pass over memory.

    Args:
        channels: channels of the input.
        activation: "relu", or "gated", which leaves half of the channels.
        color_groups: number of colours that the channels of a "relu" are divided into.
    """

    mask: Tensor

    def __init__(self, channels: int, activation: str, color_groups: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.activation = activation
        self.color_groups = color_groups
        self._register_mask()

    def _mask_values(self) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.bool)

    def forward(self, input: Tensor) -> Tensor:
        """Activate [B, channels, H, W] → the same shape, or half of the channels if gated."""
        if self.activation == "relu":
            return torch.relu(input)
        weight = input.new_zeros((self.channels, 1, 1, 1))
        unseen = input[:, :1].detach()
        mask = self.mask_on(input.device)
        return masked_conv2d(unseen, weight, mask=mask, activation=self.activation, condition=input)

    def mask_on(self, device: torch.device) -> Tensor:
        """Return the mask. A layer without parameters is not notified when parameters on meta get their values."""
        if self.mask.is_meta and device.type != "meta":
            self.mask = self._values_on_cpu().to(device, copy=True)
        return self.mask

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.activation}"


@dataclass(eq=False)
class _Step:
    """One recorded layer of a network.

    input: step whose features it takes; None for the image.
    condition: step whose features it adds, or a [B, O, 1, 1] tensor.
    rows_above: whether it runs for a whole row before the row's first pixel.
    paired: number of colours that the channels are sorted by, both halves of each colour's gate next to each other.
    """

    layer: MaskedConv2d | PixelActivation
    input: _Step | None
    condition: _Step | Tensor | None
    rows_above: bool
    paired: int = 1


def _note_down(model: PixelNetwork, labels: Tensor | None) -> tuple[list[_Step], _Step]:
    """Return the steps of a model's network in order, and the step whose features its last layer takes."""
    steps: list[_Step] = []

    def note(
        layer: MaskedConv2d | PixelActivation,
        input: _Step | None,
        condition: _Step | Tensor | None = None,
        *,
        rows_above: bool = False,
    ) -> _Step:
        if layer.color_groups > 1 and layer.activation == "gated" and isinstance(condition, _Step):
            # Each colour needs two ranges of such a condition's channels; sorted by colour they are one range.
            condition.paired = layer.color_groups
        steps.append(_Step(layer, input, condition, rows_above))
        return steps[-1]

    return steps, model.network(note, None, labels)


def _rows(channels: int, groups: int, group: int, halves: int) -> Tensor:
    """Return the indices of one colour's channels; with two halves, those of both halves of its gate."""
    return torch.arange(channels).view(halves, groups, -1)[:, group].flatten()


def _paired_rows(channels: int, groups: int) -> Tensor:
    """Return the indices of all channels sorted by colour, both halves of each colour's gate next to each other."""
    return torch.cat([_rows(channels, groups, group, 2) for group in range(groups)])


class _Call(NamedTuple):
    """A convolution of one pixel with its arguments, all but the pixel's position."""

    convolution: PixelConvolution
    input: Tensor
    output: Tensor
    condition: Tensor | None

    def at(self, position: Tensor) -> None:
        self.convolution(self.input, self.output, position, condition=self.condition)


class MaskedFeatures(PixelFeatures):
    """Computes the logits of one colour after the other, from feature maps that grow by a pixel at a time."""

    def __init__(self, model: PixelNetwork, shape: tuple[int, int, int, int], labels: Tensor | None) -> None:
        batch, colors, height, width = shape
        layer = model.logits_layer
        pixels = layer.weight.new_zeros((batch, height, width, model.seen_channels))
        place = PixelPlace(height, width, pixels.device)
        super().__init__(place, pixels, colors, model.levels, pixels.flatten(1, 2), place.index)
        self._image = image = pixels.permute(0, 3, 1, 2)
        self._steps, last = _note_down(model, labels)
        self._buffers: dict[_Step | None, Tensor] = {None: image}
        # Input of the activations, whose masks hide it.
        self._nothing = _channels_last(image, 1)
        # Calls that run before a row, and calls at a pixel by the colour whose turn it is.
        self._row_calls: list[_Call] = []
        self._calls: list[list[_Call]] = [[] for _ in range(colors)]
        for step in self._steps:
            self._add(step)
        self.starts_rows = bool(self._row_calls)
        # A colour's logits are needed at one pixel only, so its features are copied to an image of one pixel.
        self._last = self._buffers[last].permute(0, 2, 3, 1).flatten(1, 2)
        self._pixel = image.new_empty((batch, 1, self._last.shape[2]))
        self._corner = torch.zeros(2, dtype=torch.int64, device=image.device)
        self._logits_layers = [
            _convolution_of(layer, _rows(layer.weight.shape[0], colors, color, 1)) for color in range(colors)
        ]
        self._logits = image.new_empty((batch, model.levels, 1, 1))

    def fill(self, rows: int) -> None:
        """Compute the first rows of all maps at once, from those of the image."""
        full: dict[_Step | None, Tensor] = {None: self._image[:, :, :rows]}
        for step in self._steps:
            condition = full[step.condition] if isinstance(step.condition, _Step) else step.condition
            full[step] = convolve_images(step.layer, full[step.input], condition)
            features = full[step] if step.paired == 1 else full[step][:, _paired_rows(full[step].shape[1], step.paired)]
            self._buffers[step][:, :, :rows] = features

    def start_row(self) -> None:
        positions = self.place.row_positions()
        for call in self._row_calls:
            for position in positions:
                call.at(position)

    def outputs(self, turn: int) -> Tensor:
        for call in self._calls[turn]:
            call.at(self.place.position)
        torch.index_select(self._last, 1, self.place.index, out=self._pixel)
        one_pixel = self._pixel.unsqueeze(1).permute(0, 3, 1, 2)
        self._logits_layers[turn](one_pixel, self._logits, self._corner)
        return self._logits[:, :, 0, 0]

    def _add(self, step: _Step) -> None:
        """Allocate a step's features and record which of them are computed at which colour's turn."""
        layer, groups = step.layer, step.layer.color_groups
        halves = 2 if layer.activation == "gated" else 1
        outputs = layer.channels if isinstance(layer, PixelActivation) else layer.weight.shape[0]
        buffer = self._buffers[step] = _channels_last(self._image, outputs // halves)
        for group in range(groups):
            rows = _rows(outputs, groups, group, halves)
            if step.paired > 1:
                rows = _paired_rows(outputs, step.paired)
            input, condition = self._buffers[step.input], step.condition
            if isinstance(layer, PixelActivation):
                convolution = _activation_of(layer, len(rows), self._image)
                input, condition = self._nothing, step.input
            else:
                convolution = _convolution_of(layer, rows)
            width = outputs // halves // groups
            output = buffer[:, group * width : (group + 1) * width]
            call = _Call(convolution, input, output, self._condition(condition, rows, group, groups))
            (self._row_calls if step.rows_above else self._calls[group]).append(call)

    def _condition(self, condition: _Step | Tensor | None, rows: Tensor, group: int, groups: int) -> Tensor | None:
        if condition is None:
            return None
        if isinstance(condition, Tensor):
            return condition[:, rows.to(condition.device)]
        width = self._buffers[condition].shape[1] // groups
        return self._buffers[condition][:, group * width : (group + 1) * width]


def _channels_last(image: Tensor, channels: int) -> Tensor:
    """Allocate zeros, since values that are not computed yet are multiplied by masked weights."""
    batch, _, height, width = image.shape
    return image.new_zeros((batch, height, width, channels)).permute(0, 3, 1, 2)


def _convolution_of(layer: MaskedConv2d, rows: Tensor) -> PixelConvolution:
    """Return the part of a layer that computes some of its output channels."""
    rows = rows.to(layer.weight.device)
    return PixelConvolution(
        layer.weight.detach()[rows],
        None if layer.bias is None else layer.bias.detach()[rows],
        mask=layer.mask if layer.mask.ndim == 2 else layer.mask[rows],
        dilation=layer.dilation,
        activation=layer.activation,
    )


def _activation_of(layer: PixelActivation, channels: int, image: Tensor) -> PixelConvolution:
    return PixelConvolution(
        image.new_zeros((channels, 1, 1, 1)), mask=layer.mask_on(image.device), activation=layer.activation
    )
