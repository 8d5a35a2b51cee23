"""Sampling images pixel by pixel from PixelCNN++, whose network has three resolutions and two streams.

Every feature map is kept from pixel to pixel, and a map of a lower resolution grows only where a pixel of its own
begins. What depends on rows above only is computed for a whole row at once, the rest at one pixel. A network is noted
down as a list of matrix products over what they read; the CPU goes through it in one call of a kernel, other devices
tensor by tensor, on CUDA as one graph for each of the resolutions that a pixel may begin in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.models.pixels.pixel_sampler import captured, check_outputs, scale_values
from cpc_ext.nn.shifted_conv2d import ChannelMix, ShiftedConv2d, ShiftedConvTranspose2d
from cpc_ext.ops.logistic_mixture import _sample_logistic_mixture

__all__ = ["MixtureNetwork", "MixtureSampler"]

_LEVELS = 3
# Zeros around a map's pixels, so that no tap has to ask where it is: as csrc/pixel_steps/pixel_steps.h has them.
_ABOVE, _BESIDE = 2, 1
# Elements of a block of maps, and of what a map begins at a multiple of: a cache line of float32.
_BLOCK, _ALIGNED = 1 << 22, 16


class MixtureNetwork(Protocol):
    """What the sampler asks of a model, beside its modes of training and evaluation."""

    mixtures: int
    nin_out: ChannelMix

    def network(self, layers: Any) -> Any:
        """The features that ``nin_out`` takes after an ELU; all layers are run by ``layers``."""

    def mixture(self, image: Tensor, labels: Tensor | None) -> Tensor:
        """The parameters of the mixture at every pixel of a scaled image."""


# --- A network as steps ---


@dataclass(eq=False)
class _Map:
    """A feature map that is kept.

    data: [B, above + H, beside + W + beside, C], channels dense, zeros around the pixels.
    level: how often its resolution is halved; None for a map of one pixel that is written anew each time.
    """

    data: Tensor
    level: int | None

    def flat(self) -> Tensor:
        """[B, pixels with padding, C], the same memory."""
        return self.data.flatten(1, 2)


class _Features(NamedTuple):
    raw: _Map  # F channels.
    elu: _Map  # Its concatenated ELU, 2F channels.


class _Source(NamedTuple):
    """What a step reads: pixels of a map relative to its own, at the map's resolution."""

    map: _Map
    taps: list[tuple[int, int]]


@dataclass(eq=False)
class _Step:
    """output = activation(read values @ weight + bias + image_bias) at one pixel of a resolution.

    Attributes:
        level: its resolution, at whose pixels it is due.
        rows_above: whether it depends on rows above only, so that it is due for a whole row before the row's pixels.
        sources: in the order of the weight's rows; of this level or the next higher resolution.
        weight: [K, N], rows by source, tap and channel.
        bias: [N].
        image_bias: [B, N], or None.
        residual: where the output is gated, one half of it times the sigmoid of the other, what is added to it.
        raw, elu: where the output and its concatenated ELU go; of this level or the next higher resolution.
        offset: row and column in the 2x2 pixels of a higher resolution.
    """

    level: int
    rows_above: bool
    sources: list[_Source]
    weight: Tensor
    bias: Tensor
    image_bias: Tensor | None = None
    residual: _Map | None = None
    raw: _Map | None = None
    elu: _Map | None = None
    offset: tuple[int, int] = (0, 0)


class _Notes:
    """Notes down the layers of a network as steps; see :class:`cpc_ext.models.pixels.pixelcnnpp.StreamLayers`."""

    def __init__(self, image: _Map, labels: Tensor | None) -> None:
        self.steps: list[_Step] = []
        self.memory = _Memory(image.data)
        self._image = image
        self._labels = labels
        batch, height, width, _ = image.data.shape
        self._batch, self._size = batch, (height - _ABOVE, width - 2 * _BESIDE)

    def start_u(self, layer: ShiftedConv2d) -> _Features:
        return self._start(True, (layer, -1, 0))

    def start_ul(self, above: ShiftedConv2d, left: ShiftedConv2d) -> _Features:
        return self._start(False, (above, -1, 0), (left, 0, -1))

    def block(self, block: Any, features: _Features, skips: Sequence[_Features]) -> _Features:
        level, channels = features.raw.level, features.raw.data.shape[3]
        rows_above = block.conv_input.shift == "down"
        sources, weights = [_Source(features.elu, block.conv_input.taps)], [_matrix(block.conv_input)]
        bias = block.conv_input.bias
        if block.nin_skip is not None:
            sources += [_Source(skip.elu, [(0, 0)]) for skip in skips]
            weights += [part.T for part in block.nin_skip.of_sources(block.nin_skip.weight)]
            bias = bias + block.nin_skip.bias
        hidden = self._map(2 * channels, level)
        self._note(_Step(level, rows_above, sources, torch.cat(weights), bias, elu=hidden))
        output = self._features(channels, level)
        self._note(
            _Step(
                level,
                rows_above,
                [_Source(hidden, block.conv_out.taps)],
                _matrix(block.conv_out),
                block.conv_out.bias,
                image_bias=None if block.class_bias is None else block.class_bias(self._labels),
                residual=features.raw,
                **output._asdict(),
            )
        )
        return output

    def downsize(self, layer: ShiftedConv2d, features: _Features) -> _Features:
        output = self._features(layer.weight_v.shape[0], features.raw.level + 1)
        sources = [_Source(features.raw, layer.taps)]
        self._note(
            _Step(output.raw.level, layer.shift == "down", sources, _matrix(layer), layer.bias, **output._asdict())
        )
        return output

    def upsize(self, layer: ShiftedConvTranspose2d, features: _Features) -> _Features:
        output = self._features(layer.weight_v.shape[1], features.raw.level - 1)
        weight = layer.weight
        for row in range(2):
            for col in range(2):
                # Where it reads, and the kernel's column there: even columns see one of three, odd ones the others.
                taps = {(0, 0): col}
                if layer.shift == "down":
                    taps = {(0, 0): 2, (0, 1): 0} if col else {(0, 0): 1}
                self._note(
                    _Step(
                        features.raw.level,
                        layer.shift == "down",
                        [_Source(features.raw, list(taps))],
                        torch.cat([weight[:, :, row, at] for at in taps.values()]),
                        layer.bias,
                        offset=(row, col),
                        **output._asdict(),
                    )
                )
        return output

    def output(self, layer: ChannelMix, features: _Features) -> Tensor:
        """Where the last layer's result for the latest pixel will be: [B, P, 1, 1]."""
        channels = features.raw.data.shape[3]
        # The first half of a concatenated ELU is the ELU.
        elu = _Map(features.elu.data[..., :channels], features.elu.level)
        output = self._map(layer.weight_v.shape[0], None)
        self._note(_Step(0, False, [_Source(elu, [(0, 0)])], layer.weight.T, layer.bias, raw=output))
        return output.data[:, _ABOVE:, _BESIDE:-_BESIDE].permute(0, 3, 1, 2)

    def _start(self, rows_above: bool, *layers: tuple[ShiftedConv2d, int, int]) -> _Features:
        """A sum of layers of the image whose results are shifted by so many rows and columns."""
        sources, weights = [], []
        for layer, row, col in layers:
            weight = layer.weight.clone()
            # Where it is shifted from outside of the image there is not even the bias: as the weight of the channel
            # of ones it counts within.
            middle = layer.kernel_size[1] // 2 if layer.shift == "down" else -1
            weight[:, -1, -1, middle] += layer.bias
            sources.append(_Source(self._image, [(y + row, x + col) for y, x in layer.taps]))
            weights.append(_rows(weight))
        output = self._features(weights[0].shape[1], 0)
        weight = torch.cat(weights)
        self._note(_Step(0, rows_above, sources, weight, weight.new_zeros(weight.shape[1]), **output._asdict()))
        return output

    def _note(self, step: _Step) -> None:
        dtype = self._image.data.dtype
        step.weight, step.bias = (value.detach().to(dtype).contiguous() for value in (step.weight, step.bias))
        if step.image_bias is not None:
            step.image_bias = step.image_bias.detach().to(dtype).contiguous()
        self.steps.append(step)

    def _features(self, channels: int, level: int) -> _Features:
        return _Features(self._map(channels, level), self._map(2 * channels, level))

    def _map(self, channels: int, level: int | None) -> _Map:
        height, width = (1, 1) if level is None else (size >> level for size in self._size)
        return _Map(self.memory.zeros(_map_shape(self._batch, channels, height, width)), level)


def _map_shape(batch: int, channels: int, height: int, width: int) -> tuple[int, int, int, int]:
    """[B, H, W, C] with room around."""
    return batch, _ABOVE + height, width + 2 * _BESIDE, channels


class _Memory:
    """Zeros cut from a few blocks, of the type and on the device of ``like``.

    The kernel makes sure at every pixel that its memory is still there; it does so of the blocks, not of every map.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._rest = like.new_empty(0)
        self.blocks: list[Tensor] = []

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape)
        if size > len(self._rest):
            self._rest = self._like.new_zeros(max(size, _BLOCK))
            self.blocks.append(self._rest)
        values, self._rest = self._rest[:size], self._rest[-(-size // _ALIGNED) * _ALIGNED :]
        return values.view(shape)


def _matrix(layer: ShiftedConv2d) -> Tensor:
    return _rows(layer.weight)


def _rows(weight: Tensor) -> Tensor:
    """[O, C, kh, kw] as a matrix [kh * kw * C, O]."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2)


# --- Steps, run ---


class _Positions:
    """Where a pixel or row is in the maps, in memory that steps read.

    Attributes:
        pixel: by level, [1]: the pixel's index in a flat map, for pixels with which one of the level begins.
        row: by level, [W of the level], likewise.
    """

    def __init__(self, height: int, width: int, device: torch.device) -> None:
        def index(level: int, row: Tensor, col: Tensor) -> Tensor:
            return ((row >> level) + _ABOVE) * ((width >> level) + 2 * _BESIDE) + (col >> level) + _BESIDE

        pixels = torch.arange(height * width, device=device)
        # Of all levels side by side, so that going to a pixel is one copy.
        self._all = torch.stack([index(level, pixels // width, pixels % width) for level in range(_LEVELS)], dim=1)
        self._pixel = torch.zeros(_LEVELS, dtype=torch.int64, device=device)
        self.pixel = self._pixel.split(1)
        self._starts = self._all[::width]
        self._row = torch.zeros(_LEVELS, dtype=torch.int64, device=device)
        self._columns = [torch.arange(width >> level, device=device) for level in range(_LEVELS)]
        self._width = width

    def go_to(self, row: int, col: int) -> None:
        self._pixel.copy_(self._all[row * self._width + col])

    def go_to_row(self, row: int) -> None:
        self._row.copy_(self._starts[row])

    @property
    def row(self) -> list[Tensor]:
        return [self._row[level] + columns for level, columns in enumerate(self._columns)]


def _levels(row: int, col: int = 0) -> int:
    """In how many resolutions a pixel begins with this one."""
    return next(level for level in range(_LEVELS, 0, -1) if (row | col) % (1 << (level - 1)) == 0)


class _TensorSteps:
    """Runs steps tensor by tensor. The work depends on where it is only by values on the device."""

    def __init__(self, steps: list[_Step]) -> None:
        self._steps = steps
        self._offsets = [[self._tap_offsets(source) for source in step.sources] for step in steps]

    def run(self, positions: Sequence[Tensor], levels: int) -> None:
        """At these pixels of each level; only steps of the first so many levels."""
        for step, offsets in zip(self._steps, self._offsets, strict=True):
            if step.level < levels:
                self._run(step, offsets, positions)

    @staticmethod
    def _tap_offsets(source: _Source) -> Tensor:
        pitch = source.map.data.shape[2]
        return torch.tensor([row * pitch + col for row, col in source.taps], device=source.map.data.device)

    @staticmethod
    def _run(step: _Step, offsets: list[Tensor], positions: Sequence[Tensor]) -> None:
        def at(map: _Map) -> Tensor:
            if map.level is None:
                return torch.full_like(positions[0], _ABOVE * map.data.shape[2] + _BESIDE)
            return positions[map.level][:: 1 << (step.level - map.level)]

        read = []
        for source, taps in zip(step.sources, offsets, strict=True):
            indices = (at(source.map)[:, None] + taps).flatten()
            values = source.map.flat().index_select(1, indices)
            read.append(values.unflatten(1, (-1, len(taps))).flatten(2))
        output = torch.cat(read, dim=2) @ step.weight + step.bias
        if step.image_bias is not None:
            output = output + step.image_bias[:, None]
        if step.residual is not None:
            output = step.residual.flat().index_select(1, at(step.residual)) + F.glu(output, dim=2)
        for map, values in ((step.raw, output), (step.elu, F.elu(torch.cat([output, -output], dim=2)))):
            if map is not None:
                indices = at(map) + (step.offset[0] * map.data.shape[2] + step.offset[1])
                map.flat().index_copy_(1, indices, values)


class _KernelSteps:
    """Runs steps by the kernel, all of them in one call."""

    def __init__(self, steps: list[_Step], shape: tuple[int, int, int], memory: list[Tensor]) -> None:
        kernel = native.PixelSteps(
            [
                (
                    step.level,
                    [(source.map.data, 1 << (step.level - source.map.level), source.taps) for source in step.sources],
                    step.weight,
                    step.bias,
                    step.image_bias,
                    None if step.residual is None else step.residual.data,
                    None if step.raw is None else step.raw.data,
                    None if step.elu is None else step.elu.data,
                    self._output_scale(step),
                    step.offset,
                )
                for step in steps
            ],
            *shape,
            memory,
        )
        self.run_pixel, self.run_row = kernel.run_pixel, kernel.run_row

    @staticmethod
    def _output_scale(step: _Step) -> int:
        """By how much a pixel's row and column are multiplied in the output."""
        level = (step.raw or step.elu).level
        return 0 if level is None else 1 << (step.level - level)


class _KeptFeatures:
    """Parameters of the mixture at one pixel after the other, from features that are kept."""

    def __init__(self, model: MixtureNetwork, image: Tensor, labels: Tensor | None, positions: _Positions) -> None:
        notes = _Notes(_Map(image, 0), labels)
        self._params = notes.output(model.nin_out, model.network(notes))
        self._positions = positions
        parts = [[step for step in notes.steps if step.rows_above == rows] for rows in (True, False)]
        self._kernels = _uses_kernel(image)
        batch, height, width, _ = image.shape
        shape = batch, height - _ABOVE, width - 2 * _BESIDE
        self._row_steps, self._pixel_steps = (
            _KernelSteps(steps, shape, notes.memory.blocks) if self._kernels else _TensorSteps(steps) for steps in parts
        )

    def fill(self, rows: int) -> None:
        """Compute the first rows of all maps, from the image's."""
        for row in range(rows):
            self._positions.go_to_row(row)
            self.start_row(row, _levels(row))
            if self._kernels:
                self._pixel_steps.run_row(row)
            else:
                self._pixel_steps.run(self._positions.row, _levels(row))

    def start_row(self, row: int, levels: int) -> None:
        """Compute what depends on rows above only. The positions are at the row."""
        if self._kernels:
            self._row_steps.run_row(row)
        else:
            self._row_steps.run(self._positions.row, levels)

    def params(self, row: int, col: int, levels: int) -> Tensor:
        """[B, P, 1, 1] of a pixel that the positions are at, overwritten by the next call. Pixels in their order."""
        if self._kernels:
            self._pixel_steps.run_pixel(row, col)
        else:
            self._pixel_steps.run(self._positions.pixel, levels)
        return self._params


def _uses_kernel(image: Tensor) -> bool:
    return image.device.type == "cpu" and hasattr(native, "PixelSteps")


# --- Sampling ---


class _WholeNetwork:
    """The same parameters by running the network on all of the image for each pixel."""

    def __init__(self, model: MixtureNetwork, image: Tensor, labels: Tensor | None, positions: _Positions) -> None:
        self._model, self._labels = model, labels
        self._image = image[:, _ABOVE:, _BESIDE:-_BESIDE, :-1].permute(0, 3, 1, 2)

    def fill(self, rows: int) -> None:
        pass

    def start_row(self, row: int, levels: int) -> None:
        pass

    def params(self, row: int, col: int, levels: int) -> Tensor:
        training = self._model.training
        self._model.eval()  # Dropout is for training.
        params = self._model.mixture(self._image.to(self._model.nin_out.bias.dtype), self._labels)
        self._model.train(training)
        return params[:, :, row : row + 1, col : col + 1]


class MixtureSampler:
    """Draws a batch of images pixel after pixel in raster order.

    Args:
        model: whose network it is.
        image: uint8 [B, C, H, W] on the model's device, whose first rows may be known.
        labels: int64 [B], or None.
        temperature: factor of the noise.
        cached: keep features from pixel to pixel; otherwise the whole network runs for every pixel.
    """

    def __init__(
        self, model: MixtureNetwork, image: Tensor, labels: Tensor | None, *, temperature: float, cached: bool
    ) -> None:
        batch, channels, height, width = image.shape
        self._model, self._start, self._temperature = model, image, temperature
        dtype = torch.float64 if model.nin_out.bias.dtype == torch.float64 else torch.float32
        like = torch.empty(0, dtype=dtype, device=image.device)
        # The last channel is of ones, within the image.
        self._image = like.new_zeros(_map_shape(batch, channels + 1, height, width))
        self._pixels = self._image[:, _ABOVE:, _BESIDE:-_BESIDE]
        self._pixels[..., -1] = 1
        self._flat = self._image.flatten(1, 2)[..., :channels]
        self._positions = _Positions(height, width, image.device)
        self._features = (_KeptFeatures if cached else _WholeNetwork)(model, self._image, labels, self._positions)
        self._noise = like.new_zeros((batch, model.mixtures + channels, 1, 1))
        self._trace = like.new_zeros((batch, model.nin_out.bias.shape[0], 1, 1))

    def run(
        self,
        *,
        known_rows: int,
        noise: Tensor | Callable[[Tensor], Any],
        progress: Callable[[range], Iterable[int]],
    ) -> Tensor:
        """Draw all rows after the first ``known_rows``; returns uint8 [B, C, H, W].

        noise: [B, K + C, H, W], or what fills a [B, K + C, 1, 1] tensor for the next pixel in raster order.
        progress: goes through the range of rows; draws a bar if it likes.

        Raises:
            NotFiniteError: parameters of the mixture that are not finite.
        """
        channels, height, width = self._start.shape[1:]
        start_row, step = self._features.start_row, self._step
        if self._image.device.type == "cuda" and isinstance(self._features, _KeptFeatures) and known_rows < height:
            with torch.cuda.device(self._image.device):
                start_row, step = self._captured(start_row), self._captured(step)
        # Only now, as capturing has drawn a pixel.
        self._pixels[..., :channels] = scale_values(self._start, self._image.dtype).permute(0, 2, 3, 1)
        self._features.fill(known_rows)
        for row in progress(range(known_rows, height)):
            self._positions.go_to_row(row)
            start_row(row, _levels(row))
            for col in range(width):
                self._positions.go_to(row, col)
                if isinstance(noise, Tensor):
                    self._noise.copy_(noise[:, :, row : row + 1, col : col + 1])
                elif self._temperature > 0:
                    noise(self._noise)
                step(row, col, _levels(row, col))
        check_outputs(self._model, self._trace)
        drawn = self._pixels[..., :channels].permute(0, 3, 1, 2)
        # Back from the scale; what it rounded off is less than half a value.
        return (drawn.double() + 1).mul(127.5).round().to(torch.uint8).contiguous()

    def _step(self, row: int, col: int, levels: int) -> None:
        """One pixel, where the positions are."""
        params = self._features.params(row, col, levels)
        self._trace.add_(params, alpha=0)  # Of a number 0, of all else NaN.
        values = _sample_logistic_mixture(params, self._noise, self._start.shape[1], float(self._temperature))
        values = scale_values(values, self._image.dtype)
        self._flat.index_copy_(1, self._positions.pixel[0], values.flatten(2).transpose(1, 2))

    def _captured(self, work: Callable[..., None]) -> Callable[..., None]:
        """The same work as CUDA graphs, one for each number of levels; rows and columns are where positions are."""
        # At the first pixel all levels begin; what is computed there is computed again.
        self._positions.go_to_row(0)
        self._positions.go_to(0, 0)
        at_first = (0,) if work == self._features.start_row else (0, 0)
        graphs = [captured(lambda levels=levels: work(*at_first, levels)) for levels in range(1, _LEVELS + 1)]
        return lambda *at: graphs[at[-1] - 1]()
