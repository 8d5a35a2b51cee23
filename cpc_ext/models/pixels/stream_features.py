"""Features of PixelCNN++ that are kept from pixel to pixel, for sampling.

The network has three resolutions and two streams; a map of a lower resolution grows only where a pixel of its own
begins. The layers are recorded as :class:`cpc_ext.ops.PixelStep`: those that depend on rows above only run for a whole
row at once, the others for one pixel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from cpc_ext.models.pixels.pixel_sampler import PixelFeatures
from cpc_ext.nn.shifted_conv2d import ChannelMix, Shift, ShiftedConv2d, ShiftedConvTranspose2d
from cpc_ext.ops.pixel_steps import PixelMap, PixelMaps, PixelPlace, PixelSource, PixelStep, pixel_steps

__all__ = ["MixtureNetwork", "StreamFeatures"]


class MixtureNetwork(Protocol):
    """The interface that :class:`StreamFeatures` needs of a model."""

    nin_out: ChannelMix

    def network(self, layers: Any) -> Any:
        """Return the features whose ELU ``nin_out`` takes; ``layers`` runs all layers."""


class StreamFeatures(PixelFeatures):
    """Computes the mixture's parameters from feature maps that grow by a pixel at a time, in float32 or float64."""

    def __init__(self, model: MixtureNetwork, shape: tuple[int, int, int, int], labels: Tensor | None) -> None:
        batch, channels, height, width = shape
        bias = model.nin_out.bias
        dtype = torch.promote_types(bias.dtype, torch.float32)
        maps = PixelMaps(batch, height, width, torch.empty(0, dtype=dtype, device=bias.device))
        # The last channel holds ones within the image.
        image = maps.make(channels + 1, 0)
        image.pixels[..., -1] = 1
        notes = _Notes(maps, image, labels)
        self._outputs = notes.output(model.nin_out, model.network(notes)).pixels[:, 0, 0]
        place = PixelPlace(height, width, bias.device, levels=1 + max(step.level for step in notes.row_steps))
        pixels, flat = (values[..., :channels] for values in (image.pixels, image.flat))
        super().__init__(place, pixels, 1, len(bias), flat, place.at[0])
        self._row_steps = pixel_steps(notes.row_steps, maps)
        self._pixel_steps = pixel_steps(notes.pixel_steps, maps)

    def fill(self, rows: int) -> None:
        for row in range(rows):
            self.place.go_to(row)
            self.start_row()
            self._pixel_steps.run_row(self.place)

    def start_row(self) -> None:
        self._row_steps.run_row(self.place)

    def outputs(self, turn: int) -> Tensor:
        self._pixel_steps.run_pixel(self.place)
        return self._outputs


class _Features(NamedTuple):
    level: int
    raw: PixelMap  # F channels.
    elu: PixelMap  # Its concatenated ELU, 2F channels.

    def maps(self) -> dict[str, Any]:
        return {"raw": self.raw, "elu": self.elu}


class _Notes:
    """Records the layers of a network as steps; see :class:`cpc_ext.models.pixels.pixelcnnpp.StreamLayers`.

    Attributes:
        row_steps: steps that depend on rows above only, and run for a whole row before the row's pixels.
        pixel_steps: the other steps.
    """

    def __init__(self, maps: PixelMaps, image: PixelMap, labels: Tensor | None) -> None:
        self.row_steps: list[PixelStep] = []
        self.pixel_steps: list[PixelStep] = []
        self._maps, self._image, self._labels = maps, image, labels

    def start_u(self, layer: ShiftedConv2d) -> _Features:
        return self._start("down", (layer, -1, 0))

    def start_ul(self, above: ShiftedConv2d, left: ShiftedConv2d) -> _Features:
        return self._start("down-right", (above, -1, 0), (left, 0, -1))

    def block(self, block: Any, features: _Features, skips: Sequence[_Features]) -> _Features:
        level, channels, shift = features.level, features.raw.data.shape[3], block.conv_input.shift
        sources, weights = [PixelSource(features.elu, block.conv_input.taps)], [_rows(block.conv_input.weight)]
        bias = block.conv_input.bias
        if block.nin_skip is not None:
            sources += [PixelSource(skip.elu, [(0, 0)]) for skip in skips]
            weights += [part.T for part in block.nin_skip.of_sources(block.nin_skip.weight)]
            bias = bias + block.nin_skip.bias
        hidden = self._maps.make(2 * channels, level)
        self._note(shift, level, sources, torch.cat(weights), bias, elu=hidden)
        output = self._features(channels, level)
        self._note(
            shift,
            level,
            [PixelSource(hidden, block.conv_out.taps)],
            _rows(block.conv_out.weight),
            block.conv_out.bias,
            image_bias=None if block.class_bias is None else block.class_bias(self._labels),
            residual=features.raw,
            **output.maps(),
        )
        return output

    def downsize(self, layer: ShiftedConv2d, features: _Features) -> _Features:
        level = features.level + 1
        output = self._features(layer.weight_v.shape[0], level)
        sources = [PixelSource(features.raw, layer.taps)]
        self._note(layer.shift, level, sources, _rows(layer.weight), layer.bias, **output.maps())
        return output

    def upsize(self, layer: ShiftedConvTranspose2d, features: _Features) -> _Features:
        level, weight = features.level, layer.weight
        output = self._features(layer.weight_v.shape[1], level - 1)
        for row, col in itertools.product(range(2), range(2)):
            # Taps, and the kernel's column at each: even columns see one of the kernel's three, odd ones the other two.
            taps = {(0, 0): col}
            if layer.shift == "down":
                taps = {(0, 0): 2, (0, 1): 0} if col else {(0, 0): 1}
            sources = [PixelSource(features.raw, list(taps))]
            matrix = torch.cat([weight[:, :, row, at] for at in taps.values()])
            self._note(layer.shift, level, sources, matrix, layer.bias, offset=(row, col), **output.maps())
        return output

    def output(self, layer: ChannelMix, features: _Features) -> PixelMap:
        """Record the last layer; return the map that will hold its result for the latest pixel."""
        # The first half of a concatenated ELU is the ELU.
        elu = PixelMap(features.elu.data[..., : features.raw.data.shape[3]], features.level)
        output = self._maps.make(layer.weight_v.shape[0], None)
        self._note("down-right", 0, [PixelSource(elu, [(0, 0)])], layer.weight.T, layer.bias, raw=output)
        return output

    def _start(self, shift: Shift, *layers: tuple[ShiftedConv2d, int, int]) -> _Features:
        """Record a sum of layers of the image, with the result of each shifted by its rows and columns."""
        sources, weights = [], []
        for layer, row, col in layers:
            weight = layer.weight.clone()
            # A result that is shifted in from outside of the image has no bias either. So the bias becomes a weight of
            # the channel of ones, which counts only within the image.
            middle = layer.kernel_size[1] // 2 if layer.shift == "down" else -1
            weight[:, -1, -1, middle] += layer.bias
            sources.append(PixelSource(self._image, [(y + row, x + col) for y, x in layer.taps]))
            weights.append(_rows(weight))
        output = self._features(weights[0].shape[1], 0)
        weight = torch.cat(weights)
        self._note(shift, 0, sources, weight, weight.new_zeros(weight.shape[1]), **output.maps())
        return output

    def _note(
        self,
        shift: Shift,
        level: int,
        sources: list[PixelSource],
        weight: Tensor,
        bias: Tensor,
        image_bias: Tensor | None = None,
        **options: Any,
    ) -> None:
        weight, bias = self._constant(weight), self._constant(bias)
        image_bias = None if image_bias is None else self._constant(image_bias)
        steps = self.row_steps if shift == "down" else self.pixel_steps
        steps.append(PixelStep(level, sources, weight, bias, image_bias, **options))

    def _constant(self, value: Tensor) -> Tensor:
        return value.detach().to(self._image.data.dtype).contiguous()

    def _features(self, channels: int, level: int) -> _Features:
        return _Features(level, self._maps.make(channels, level), self._maps.make(2 * channels, level))


def _rows(weight: Tensor) -> Tensor:
    """Return [O, C, kh, kw] as a matrix [kh * kw * C, O]."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2)
