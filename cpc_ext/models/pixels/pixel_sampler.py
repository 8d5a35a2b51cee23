"""Sampling images pixel by pixel from a model whose outputs see only earlier pixels and colours.

Every feature map of the network is kept from pixel to pixel; a new value costs what it adds to them, one
:class:`cpc_ext.ops.PixelConvolution` a layer, instead of the whole network. A step's work is the same at every pixel
but for a position in device memory, so that on CUDA the steps of one pixel are captured once and replayed as a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from cpc_ext.nn.fixed_mask import FixedMask
from cpc_ext.nn.masked_conv2d import MaskedConv2d
from cpc_ext.ops.masked_conv2d import PixelConvolution, masked_conv2d

__all__ = [
    "VALUES",
    "Convolve",
    "NotFiniteError",
    "PixelActivation",
    "PixelNetwork",
    "Sampler",
    "captured",
    "check_outputs",
    "convolve_images",
    "scale_values",
]

VALUES = 256


class NotFiniteError(RuntimeError):
    """A network's outputs are not finite, so nothing can be drawn from them."""


def check_outputs(model: nn.Module, trace: Tensor) -> None:
    """NotFiniteError where outputs were not finite; the one look at them, after all pixels.

    trace: zeros, to which the outputs for every pixel have been added times 0, images first.
    """
    broken = trace.isnan().flatten(1).any(1)
    if not bool(broken.any()):
        return
    culprits = (name for name, value in model.named_parameters() if not bool(value.isfinite().all()))
    culprit = next(culprits, None)
    reason = "its weights are finite, so they grew too large on the way" if culprit is None else f"{culprit} is not"
    raise NotFiniteError(
        f"the network's outputs are not finite for {int(broken.sum())} of {len(broken)} images, which cannot be drawn: "
        f"{reason}"
    )


class Convolve(Protocol):
    """How a network runs its layers: on whole images, or noted down for one pixel at a time."""

    def __call__(self, layer: nn.Module, input: Any, condition: Any = None, *, rows_above: bool = False) -> Any:
        """The features of ``layer`` on ``input``, with ``condition`` (features, or a [B, O, 1, 1] tensor) added.

        rows_above: they depend on rows above their own only, though through features anywhere in their own.
        """


class PixelNetwork(Protocol):
    """What the sampler asks of a model: a network of :class:`MaskedConv2d` and :class:`PixelActivation` layers."""

    in_channels: int
    logits_layer: MaskedConv2d

    def network(self, convolve: Convolve, image: Any, labels: Tensor | None) -> Any:
        """The features that ``logits_layer`` takes; all layers are run by ``convolve``."""


def scale_values(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values 0..255 as networks see them, -1..1."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (values.to(compute) / 127.5 - 1).to(dtype)


def convolve_images(
    layer: nn.Module, input: Tensor, condition: Tensor | None = None, *, rows_above: bool = False
) -> Tensor:
    """Run a layer on whole images, [B, C, H, W]."""
    return layer(input) if condition is None else layer(input, condition)


class PixelActivation(FixedMask):
    """A ReLU or gate of its own, where a feature map is needed before and after it.

    It is a masked convolution that sees nothing but its condition, so that whole images and single pixels go through
    the same arithmetic, and a gate costs one pass over memory.

    Args:
        channels: of the input.
        activation: "relu", or "gated", which leaves half of the channels.
        color_groups: colours that the channels of a "relu" belong to.
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
        """[B, channels, H, W] → the same shape, or half of the channels where gated."""
        if self.activation == "relu":
            return torch.relu(input)
        weight = input.new_zeros((self.channels, 1, 1, 1))
        unseen = input[:, :1].detach()
        mask = self.mask_on(input.device)
        return masked_conv2d(unseen, weight, mask=mask, activation=self.activation, condition=input)

    def mask_on(self, device: torch.device) -> Tensor:
        """The mask. Without parameters, a layer is not told when others get theirs instead of those on meta."""
        if self.mask.is_meta and device.type != "meta":
            self.mask = self._values_on_cpu().to(device, copy=True)
        return self.mask

    def extra_repr(self) -> str:
        return f"{self.channels}, {self.activation}"


# --- A network as steps ---


@dataclass(eq=False)
class _Step:
    """One layer of a network that was noted down.

    input: the step whose features it takes; None for the image.
    condition: the step whose features it adds, or a [B, O, 1, 1] tensor.
    rows_above: whether it is due for a whole row before the row's first pixel.
    paired: into how many colours the channels are sorted, both halves of each one's gate together.
    """

    layer: MaskedConv2d | PixelActivation
    input: _Step | None
    condition: _Step | Tensor | None
    rows_above: bool
    paired: int = 1


def _note_down(model: PixelNetwork, labels: Tensor | None) -> tuple[list[_Step], _Step]:
    """The steps of a model's network in order, and the one that its last layer takes."""
    steps: list[_Step] = []

    def note(
        layer: nn.Module, input: _Step | None, condition: _Step | Tensor | None = None, *, rows_above: bool = False
    ) -> _Step:
        if layer.color_groups > 1 and layer.activation == "gated" and isinstance(condition, _Step):
            # Of such a condition a colour needs two stretches of channels; sorted by colours they are one.
            condition.paired = layer.color_groups
        steps.append(_Step(layer, input, condition, rows_above))
        return steps[-1]

    return steps, model.network(note, None, labels)


def _rows(channels: int, groups: int, group: int, halves: int) -> Tensor:
    """The channels, of ``channels``, of one colour; with two halves those of both halves of its gate."""
    return torch.arange(channels).view(halves, groups, -1)[:, group].flatten()


def _paired_rows(channels: int, groups: int) -> Tensor:
    """All channels, sorted by colour, both halves of each one's gate together."""
    return torch.cat([_rows(channels, groups, group, 2) for group in range(groups)])


class _Call(NamedTuple):
    """What a convolution of one pixel is called with, but for the pixel."""

    convolution: PixelConvolution
    input: Tensor
    output: Tensor
    condition: Tensor | None

    def at(self, position: Tensor) -> None:
        self.convolution(self.input, self.output, position, condition=self.condition)


class _Features:
    """Feature maps of a batch that grow by a pixel at a time.

    image: [B, C, H, W], scaled, channels innermost; its later pixels are read, and must be finite, but do not count.
    """

    def __init__(self, model: PixelNetwork, image: Tensor, labels: Tensor | None) -> None:
        self._image = image
        self._steps, last = _note_down(model, labels)
        self._buffers: dict[_Step | None, Tensor] = {None: image}
        # Input of the layers that see nothing of it.
        self._nothing = _channels_last(image, 1)
        # What is due before a row, and by the colour whose turn it is.
        self._row_calls: list[_Call] = []
        self._calls: list[list[_Call]] = [[] for _ in range(model.in_channels)]
        for step in self._steps:
            self._place(step)
        # A colour's logits are wanted at one pixel only, so its features are taken out as an image of one pixel.
        features = self._buffers[last]
        batch, channels, height, width = features.shape
        self._flat = features.permute(0, 2, 3, 1).view(batch, height * width, channels)
        self._pixel = image.new_empty((batch, 1, channels))
        self._corner = torch.zeros(2, dtype=torch.int64, device=image.device)
        layer = model.logits_layer
        self._logits_layers = [
            _convolution_of(layer, _rows(layer.weight.shape[0], model.in_channels, color, 1))
            for color in range(model.in_channels)
        ]
        self._logits = image.new_empty((batch, VALUES, 1, 1))

    def fill(self, rows: int) -> None:
        """Compute the first rows of all maps at once, from the image's."""
        full: dict[_Step | None, Tensor] = {None: self._image[:, :, :rows]}
        for step in self._steps:
            condition = full[step.condition] if isinstance(step.condition, _Step) else step.condition
            full[step] = convolve_images(step.layer, full[step.input], condition)
            features = full[step] if step.paired == 1 else full[step][:, _paired_rows(full[step].shape[1], step.paired)]
            self._buffers[step][:, :, :rows] = features

    @property
    def starts_rows(self) -> bool:
        """Whether anything depends on rows above only."""
        return bool(self._row_calls)

    def start_row(self, positions: Sequence[Tensor]) -> None:
        """Compute what depends on rows above only. positions: all of the row's, each [2] int64."""
        for call in self._row_calls:
            for position in positions:
                call.at(position)

    def logits(self, color: int, position: Tensor, pixel: Tensor) -> Tensor:
        """Logits [B, 256] of a colour, the image's earlier values given. Overwritten by the next call.

        Rows must be started, and each pixel's colours asked for, in their order.

        position: row and column, [2] int64. pixel: row * W + column, [1] int64.
        """
        for call in self._calls[color]:
            call.at(position)
        torch.index_select(self._flat, 1, pixel, out=self._pixel)
        one_pixel = self._pixel.unsqueeze(1).permute(0, 3, 1, 2)
        self._logits_layers[color](one_pixel, self._logits, self._corner)
        return self._logits[:, :, 0, 0]

    def _place(self, step: _Step) -> None:
        """Allocate a step's features and note which of them are computed at which colour's turn."""
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
    """Zeros, as what is not computed yet is multiplied by masked weights."""
    batch, _, height, width = image.shape
    return image.new_zeros((batch, height, width, channels)).permute(0, 3, 1, 2)


def _convolution_of(layer: MaskedConv2d, rows: Tensor) -> PixelConvolution:
    """The part of a layer that makes some of its output channels."""
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


# --- Sampling ---


class _WholeNetwork:
    """The same logits by running the network on all of the image for each of them."""

    def __init__(self, model: PixelNetwork, image: Tensor, labels: Tensor | None) -> None:
        self._model, self._image, self._labels = model, image, labels

    def fill(self, rows: int) -> None:
        pass

    def start_row(self, positions: Sequence[Tensor]) -> None:
        pass

    def logits(self, color: int, position: Tensor, pixel: Tensor) -> Tensor:
        features = self._model.network(convolve_images, self._image, self._labels)
        logits = self._model.logits_layer(features)
        batch, channels, height, width = logits.shape
        chosen = logits.permute(0, 2, 3, 1).reshape(batch, height * width, channels).index_select(1, pixel)
        return chosen[:, 0, color * VALUES : (color + 1) * VALUES]


class Sampler:
    """Draws a batch of images, one value after another in raster order, a pixel's colours in theirs.

    A value is the argmax of logits / temperature + Gumbel noise (Gumbel 1954; Maddison et al. 2014, arXiv 1411.0030),
    which draws from the softmax of logits / temperature.

    Args:
        model: whose network it is.
        image: uint8 [B, C, H, W] on the model's device, whose first rows may be known.
        labels: int64 [B], or None.
        temperature: above 0; or 0 for the most probable value.
        cached: keep features from pixel to pixel; otherwise the whole network runs for every value.
    """

    def __init__(
        self, model: PixelNetwork, image: Tensor, labels: Tensor | None, *, temperature: float, cached: bool
    ) -> None:
        batch, channels, height, width = image.shape
        device = image.device
        self._model = model
        self._temperature = temperature
        self._shape = height, width
        dtype = model.logits_layer.weight.dtype
        self._image = scale_values(image, dtype).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        self._values = self._image.permute(0, 2, 3, 1).view(batch, height * width * channels)
        self._features = (_Features if cached else _WholeNetwork)(model, self._image, labels)
        # Where the steps are, in memory that they read: they are the same for every pixel.
        self._row = torch.zeros((width, 2), dtype=torch.int64, device=device)
        self._row_positions = self._row.unbind()
        self._position = torch.zeros(2, dtype=torch.int64, device=device)
        self._pixel = torch.zeros(1, dtype=torch.int64, device=device)
        self._subpixels = torch.zeros(channels, dtype=torch.int64, device=device)
        self._noise = torch.zeros((batch, channels, VALUES), dtype=dtype, device=device)
        self._trace = torch.zeros((batch, VALUES), dtype=dtype, device=device)
        pixels = torch.arange(height * width, device=device)
        self._positions = torch.stack([pixels // width, pixels % width], dim=1)
        self._pixels = pixels.unsqueeze(1)
        self._all_subpixels = (pixels * channels).unsqueeze(1) + torch.arange(channels, device=device)
        self._scaled = scale_values(torch.arange(VALUES, device=device), dtype)

    def run(
        self,
        *,
        known_rows: int,
        noise: Tensor | Callable[[Tensor], Any],
        progress: Callable[[range], Iterable[int]],
    ) -> Tensor:
        """Draw all rows after the first ``known_rows``; returns uint8 [B, C, H, W].

        noise: [B, C, H, W, 256], or what fills a [B, C, 256] tensor for the next pixel in raster order.
        progress: goes through the range of rows; draws a bar if it likes.

        Raises:
            NotFiniteError: logits that are not finite.
        """
        height, width = self._shape
        if known_rows:
            self._features.fill(known_rows)
        start_row, step = self._start_row, self._step
        if self._image.device.type == "cuda" and isinstance(self._features, _Features) and known_rows < height:
            with torch.cuda.device(self._image.device):
                if self._features.starts_rows:  # A graph of nothing is a warning.
                    self._go_to_row(known_rows)
                    start_row = captured(start_row)
                self._go_to(known_rows * width)
                step = captured(step)
        for row in progress(range(known_rows, height)):
            self._go_to_row(row)
            start_row()
            for col in range(width):
                self._go_to(row * width + col)
                if isinstance(noise, Tensor):
                    self._noise.copy_(noise[:, :, row, col])
                elif self._temperature > 0:
                    noise(self._noise)
                step()
        check_outputs(self._model, self._trace)
        # Back from the scale; what it rounded off is less than half a value.
        return (self._image.double() + 1).mul(127.5).round().to(torch.uint8).contiguous()

    def _go_to_row(self, row: int) -> None:
        width = self._shape[1]
        self._row.copy_(self._positions[row * width : (row + 1) * width])

    def _go_to(self, pixel: int) -> None:
        self._position.copy_(self._positions[pixel])
        self._pixel.copy_(self._pixels[pixel])
        self._subpixels.copy_(self._all_subpixels[pixel])

    # Both read where they are from the device only.

    def _start_row(self) -> None:
        self._features.start_row(self._row_positions)

    def _step(self) -> None:
        """One pixel."""
        for color in range(self._model.in_channels):
            scores = self._features.logits(color, self._position, self._pixel)
            self._trace.add_(scores, alpha=0)  # Of a number 0, of all else NaN.
            if self._temperature > 0:
                scores = torch.add(self._noise[:, color], scores, alpha=1 / self._temperature)
            values = self._scaled[scores.argmax(1, keepdim=True)]
            self._values.index_copy_(1, self._subpixels[color : color + 1], values)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The same work as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # What is prepared at a first call, such as packed weights, is not to be part of the graph.
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
