"""Sampling images pixel by pixel from a model whose outputs see only earlier pixels and colours.

A network's feature maps are kept from pixel to pixel, so that a new value costs what it adds to them instead of the
whole network. A step's work is the same at every pixel but for a place in device memory, so that on CUDA the steps of
one pixel are captured once and replayed as a graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from cpc_ext.ops.pixel_steps import PixelPlace

__all__ = ["IMAGE_LEVELS", "NotFiniteError", "PixelFeatures", "SampledModel", "Sampler", "WholeNetwork", "scale_values"]

# Values of images of a byte a colour.
IMAGE_LEVELS = 256


class NotFiniteError(RuntimeError):
    """A network's outputs are not finite, so nothing can be drawn from them."""


def _check_outputs(model: SampledModel, trace: Tensor) -> None:
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


def scale_values(values: Tensor, dtype: torch.dtype, levels: int = IMAGE_LEVELS) -> Tensor:
    """Values 0..levels - 1 as networks see numbers, -1..1."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (values.to(compute) / ((levels - 1) / 2) - 1).to(dtype)


class PixelFeatures(ABC):
    """What a network gives at one pixel after the other of images that are being drawn.

    Args:
        place: the pixel whose turn it is.
        pixels: [B, H, W, C e], what the network sees of the images, e features of a value, in memory that is read;
            later pixels must be finite, but do not count.
        turns: how many times a pixel's outputs are asked for, each time with more of its values known.
        width: P, how many outputs there are at a turn.
        flat: the memory of the pixels as [B, N, C e].
        index: where in it the place is, [1] int64.

    Attributes:
        kept: whether the work at a pixel is the same at all of them, but for where the place is and which levels begin
            there.
        starts_rows: whether there is anything to compute when a row starts.
    """

    kept = True
    starts_rows = True

    def __init__(self, place: PixelPlace, pixels: Tensor, turns: int, width: int, flat: Tensor, index: Tensor) -> None:
        self.place, self.pixels, self.turns, self.width = place, pixels, turns, width
        self._flat, self._index = flat, index

    @abstractmethod
    def fill(self, rows: int) -> None:
        """Compute all that is kept of the first rows, whose pixels are known."""

    @abstractmethod
    def start_row(self) -> None:
        """Compute what depends on rows above only; the place is at the row's first pixel. Rows come in their order."""

    @abstractmethod
    def outputs(self, turn: int) -> Tensor:
        """[B, P] for the pixel that the place is at, overwritten by the next call. Pixels come in their order."""

    def write(self, values: Tensor, channel: int) -> None:
        """What is seen of values, [B, c], in channels from this one on, of the pixel that the place is at."""
        self._flat[..., channel : channel + values.shape[1]].index_copy_(1, self._index, values.unsqueeze(1))


class WholeNetwork(PixelFeatures):
    """Outputs that the network gives when it is run on all of the image for each of them.

    Args:
        run: what is seen of images, [B, C e, H, W], to outputs [B, turns * P, H, W].
        pixels: see :class:`PixelFeatures`.
        turns, width: likewise.
    """

    kept = False
    starts_rows = False

    def __init__(self, run: Callable[[Tensor], Tensor], pixels: Tensor, turns: int, width: int) -> None:
        _, rows, cols, _ = pixels.shape
        place = PixelPlace(rows, cols, pixels.device)
        super().__init__(place, pixels, turns, width, pixels.flatten(1, 2), place.index)
        self._run = run

    def fill(self, rows: int) -> None:
        pass

    def start_row(self) -> None:
        pass

    def outputs(self, turn: int) -> Tensor:
        outputs = self._run(self.pixels.permute(0, 3, 1, 2))[:, :, self.place.row, self.place.col]
        return outputs[:, turn * self.width : (turn + 1) * self.width]


class SampledModel(Protocol):
    """What the sampler asks of a model, whose parameters it looks at where outputs are not finite.

    levels: how many values there are.
    """

    levels: int

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """As of :class:`torch.nn.Module`."""

    def pixel_features(self, shape: tuple[int, int, int, int], labels: Tensor | None, *, cached: bool) -> PixelFeatures:
        """The features of images [B, C, H, W], all zeros; not cached, from the whole network."""

    def seen_levels(self, dtype: torch.dtype) -> Tensor:
        """What the network sees of each value, [levels, e]."""

    def noise_shape(self, shape: tuple[int, int, int, int]) -> tuple[int, ...]:
        """The shape of the noise of images [B, C, H, W], with H and W at 2 and 3."""

    def draw(self, outputs: Tensor, noise: Tensor, turn: int, temperature: float) -> Tensor:
        """Values, int64 [B, c], from outputs [B, P] and a pixel's noise; a turn's begin at its channel."""


class Sampler:
    """Draws a batch of images, one pixel after another in raster order.

    Args:
        model: whose network it is.
        start: integers [B, C, H, W] on the model's device, whose first rows may be known.
        labels: int64 [B], or None.
        temperature: at least 0; what it does is the model's matter.
        cached: keep features from pixel to pixel; otherwise the whole network runs for every value.
    """

    def __init__(
        self, model: SampledModel, start: Tensor, labels: Tensor | None, *, temperature: float, cached: bool
    ) -> None:
        batch, channels, height, width = start.shape
        self._model, self._start, self._temperature = model, start, float(temperature)
        self._features = model.pixel_features((batch, channels, height, width), labels, cached=cached)
        self._place = self._features.place
        pixels = self._features.pixels
        # Many draws of half precision would be equal, and the first of equals taken.
        precise = torch.promote_types(pixels.dtype, torch.float32)
        self._noise = pixels.new_zeros(model.noise_shape((batch, channels, 1, 1)), dtype=precise)[:, :, 0, 0]
        self._trace = pixels.new_zeros((batch, self._features.width))
        self._seen = model.seen_levels(pixels.dtype)
        # What is seen of images is scaled numbers, which tell the values. Learned features, and numbers too close to
        # each other for a type, do not: beside them the values are kept.
        told = self._seen.shape[1] == 1 and model.levels <= IMAGE_LEVELS
        self._values = None if told else torch.zeros_like(start, dtype=torch.int64).flatten(2)

    def run(
        self,
        *,
        known_rows: int,
        noise: Tensor | Callable[[Tensor], Any],
        progress: Callable[[range], Iterable[int]],
    ) -> Tensor:
        """Draw all rows after the first ``known_rows``; returns [B, C, H, W] of the type of ``start``.

        noise: of all images, as the model wants it; or what fills a tensor with that of the next pixel in raster order.
        progress: goes through the range of rows; draws a bar if it likes.

        Raises:
            NotFiniteError: outputs that are not finite.
        """
        height, width = self._start.shape[2:]
        start_row, step = self._features.start_row, self._step
        if self._uses_graphs and known_rows < height:
            if self._features.starts_rows:  # A graph of nothing is a warning.
                start_row = self._graphs(start_row)
            step = self._graphs(step)
        self._begin(known_rows)
        for row in progress(range(known_rows, height)):
            self._place.go_to(row)
            start_row()
            for col in range(width):
                self._place.go_to(row, col)
                if isinstance(noise, Tensor):
                    self._noise.copy_(noise[:, :, row, col])
                elif self._temperature > 0:
                    noise(self._noise)
                step()
        _check_outputs(self._model, self._trace)
        return self._drawn()

    def _begin(self, known_rows: int) -> None:
        """Put the images where the network reads them, and compute what is known; what was there does not count."""
        self._trace.zero_()
        start = self._start.long()
        self._features.pixels.copy_(self._seen[start].permute(0, 2, 3, 1, 4).flatten(3))
        if self._values is not None:
            self._values.copy_(start.flatten(2))
        if known_rows:
            self._features.fill(known_rows)

    def _step(self) -> None:
        """Draw the pixel that the place is at. It reads where that is from the device only."""
        for turn in range(self._features.turns):
            outputs = self._features.outputs(turn)
            self._trace.add_(outputs, alpha=0)  # A number times 0 is 0, all else NaN.
            values = self._model.draw(outputs, self._noise, turn, self._temperature)
            self._features.write(self._seen[values].flatten(1), turn * self._seen.shape[1])
            if self._values is not None:
                self._values[:, turn : turn + values.shape[1]].index_copy_(2, self._place.index, values.unsqueeze(2))

    def _drawn(self) -> Tensor:
        if self._values is not None:
            return self._values.view(self._start.shape).to(self._start.dtype, copy=True)
        # Back from the scale; what it rounded off is less than half a value.
        scaled = self._features.pixels.permute(0, 3, 1, 2).double() + 1
        return scaled.mul((self._model.levels - 1) / 2).round().to(self._start.dtype).contiguous()

    @property
    def _uses_graphs(self) -> bool:
        return self._start.device.type == "cuda" and self._features.kept

    def _graphs(self, work: Callable[[], None]) -> Callable[[], None]:
        """The work as CUDA graphs, one for each number of levels that may begin at a pixel."""
        graphs = {}
        for row in self._place.rows_of_levels():
            self._place.go_to(row)  # What is computed there is computed again.
            graphs[self._place.levels] = _captured(work, self._start.device)
        return lambda: graphs[self._place.levels]()


def _captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """The work as one CUDA graph."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # What is prepared at a first call, such as packed weights, is not to be part of the graph.
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    return graph.replay
