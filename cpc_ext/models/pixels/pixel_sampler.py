"""Sampling images pixel by pixel from a model whose outputs see only earlier pixels and colours.

A network's feature maps are kept from pixel to pixel, so that a new value costs only what it adds to them, not a run of
the whole network. A step does the same work at every pixel except for the position, which is read from device memory,
so that on CUDA the steps of one pixel are captured once and replayed as a graph.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from cpc_ext.ops.pixel_steps import PixelPlace

__all__ = ["IMAGE_LEVELS", "NotFiniteError", "PixelFeatures", "SampledModel", "Sampler", "WholeNetwork", "scale_values"]

# Number of values of images with one byte per colour.
IMAGE_LEVELS = 256


class NotFiniteError(RuntimeError):
    """A network's outputs are not finite, so nothing can be drawn from them."""


def _check_outputs(model: SampledModel, trace: Tensor) -> None:
    """Raise NotFiniteError if outputs were not finite; they are checked only here, after all pixels.

    trace: [B, P], zeros to which the outputs of every pixel were added times 0, which gives NaN for infinity and NaN.
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
    """Scale values 0..levels - 1 to -1..1, as networks take them."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return (values.to(compute) / ((levels - 1) / 2) - 1).to(dtype)


class PixelFeatures(ABC):
    """Computes a network's outputs at one pixel after the other, for images that are being drawn.

    Args:
        place: the current pixel.
        pixels: [B, H, W, C e], the network's input for the images, with e features per value; the memory that the
            network reads. Later pixels must be finite, but have no influence.
        turns: number of times that a pixel's outputs are computed, each time with more of its values known.
        width: P, number of outputs at a turn.
        flat: the memory of ``pixels`` as [B, N, C e].
        index: index of the current pixel in ``flat``, [1] int64.

    Attributes:
        kept: whether the work is the same at every pixel, except for the position and the levels that begin there.
        starts_rows: whether there is anything to compute when a row starts.
    """

    kept = True
    starts_rows = True

    def __init__(self, place: PixelPlace, pixels: Tensor, turns: int, width: int, flat: Tensor, index: Tensor) -> None:
        self.place, self.pixels, self.turns, self.width = place, pixels, turns, width
        self._flat, self._index = flat, index

    @abstractmethod
    def fill(self, rows: int) -> None:
        """Compute the kept features of the first rows, whose pixels are known."""

    @abstractmethod
    def start_row(self) -> None:
        """Compute what depends on rows above only; the place is at the row's first pixel. Rows come in order."""

    @abstractmethod
    def outputs(self, turn: int) -> Tensor:
        """Return outputs [B, P] of the current pixel, which the next call overwrites. Pixels come in order."""

    def write(self, values: Tensor, channel: int) -> None:
        """Write the network's input for new values, [B, c], to channels of the current pixel from this one on."""
        self._flat[..., channel : channel + values.shape[1]].index_copy_(1, self._index, values.unsqueeze(1))


class WholeNetwork(PixelFeatures):
    """Outputs from a run of the network on the whole image at every turn.

    Args:
        run: maps the network's input, [B, C e, H, W], to outputs [B, turns * P, H, W].
        pixels, turns, width: see :class:`PixelFeatures`.
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
    """The interface that the sampler needs of a model; it reads the parameters only if outputs are not finite.

    levels: number of values.
    """

    levels: int

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Return what :meth:`torch.nn.Module.named_parameters` does."""

    def pixel_features(self, shape: tuple[int, int, int, int], labels: Tensor | None, *, cached: bool) -> PixelFeatures:
        """Return features of images [B, C, H, W], all zeros; if not cached, the whole network computes them."""

    def seen_levels(self, dtype: torch.dtype) -> Tensor:
        """Return the network's input for each value, [levels, e]."""

    def noise_shape(self, shape: tuple[int, int, int, int]) -> tuple[int, ...]:
        """Return the shape of the noise for images [B, C, H, W], with H and W as dimensions 2 and 3."""

    def draw(self, outputs: Tensor, noise: Tensor, turn: int, temperature: float) -> Tensor:
        """Return values, int64 [B, c], from outputs [B, P] and a pixel's noise, for channels from ``turn`` on."""


class Sampler:
    """Draws a batch of images, one pixel after another in raster order.

    Args:
        model: model to sample from.
        start: integers [B, C, H, W] on the model's device, whose first rows may be known.
        labels: int64 [B], or None.
        temperature: at least 0; its effect depends on the model.
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
        # In half precision many draws would be equal, and always the first of equals taken.
        precise = torch.promote_types(pixels.dtype, torch.float32)
        self._noise = pixels.new_zeros(model.noise_shape((batch, channels, 1, 1)), dtype=precise)[:, :, 0, 0]
        self._trace = pixels.new_zeros((batch, self._features.width))
        self._seen = model.seen_levels(pixels.dtype)
        # Scaled numbers as the network's input determine the values. Learned features, and numbers that are too close
        # to each other for a dtype, do not; then the values are kept separately.
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

        noise: noise of all images, as the model takes it; or a function that fills a tensor with that of the next pixel
            in raster order.
        progress: wraps the range of rows, as tqdm does.

        Raises:
            NotFiniteError: outputs that are not finite.
        """
        height, width = self._start.shape[2:]
        start_row, step = self._features.start_row, self._step
        if self._uses_graphs and known_rows < height:
            if self._features.starts_rows:  # Capturing an empty graph gives a warning.
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
        """Copy the images to the network's input and compute the features of known rows, whatever was there before."""
        self._trace.zero_()
        start = self._start.long()
        self._features.pixels.copy_(self._seen[start].permute(0, 2, 3, 1, 4).flatten(3))
        if self._values is not None:
            self._values.copy_(start.flatten(2))
        if known_rows:
            self._features.fill(known_rows)

    def _step(self) -> None:
        """Draw the current pixel, whose position is read from device memory only."""
        for turn in range(self._features.turns):
            outputs = self._features.outputs(turn)
            self._trace.add_(outputs, alpha=0)  # A finite number times 0 is 0; anything else is NaN.
            values = self._model.draw(outputs, self._noise, turn, self._temperature)
            self._features.write(self._seen[values].flatten(1), turn * self._seen.shape[1])
            if self._values is not None:
                self._values[:, turn : turn + values.shape[1]].index_copy_(2, self._place.index, values.unsqueeze(2))

    def _drawn(self) -> Tensor:
        if self._values is not None:
            return self._values.view(self._start.shape).to(self._start.dtype, copy=True)
        # Invert the scaling, whose rounding errors are less than half a value.
        scaled = self._features.pixels.permute(0, 3, 1, 2).double() + 1
        return scaled.mul((self._model.levels - 1) / 2).round().to(self._start.dtype).contiguous()

    @property
    def _uses_graphs(self) -> bool:
        return self._start.device.type == "cuda" and self._features.kept

    def _graphs(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture the work as CUDA graphs, one for each number of levels that may begin at a pixel."""
        graphs = {}
        for row in self._place.rows_of_levels():
            self._place.go_to(row)  # The features that this computes there are computed again later.
            graphs[self._place.levels] = _captured(work, self._start.device)
        return lambda: graphs[self._place.levels]()


def _captured(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Capture the work as one CUDA graph."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()  # Preparations of a first call, such as packing weights, must not be part of the graph.
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
    return graph.replay
