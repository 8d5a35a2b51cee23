"""Networks that are run a pixel or a row at a time: lists of matrix products over feature maps that are kept.

From maps whose earlier pixels are computed to the next pixel of all of them. The CPU and, in builds with CUDA, GPUs go
through the list in one call of a kernel. Otherwise PyTorch takes it step by step and tensor by tensor. Devices read
where they are from their own memory, so that the work at a pixel can be captured as a CUDA graph.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext._native import KERNEL_DEVICES, native

__all__ = ["PixelMap", "PixelMaps", "PixelPlace", "PixelSource", "PixelStep", "PixelSteps", "pixel_steps"]

# Zeros around a map's pixels, so that no tap has to ask where it is: as csrc/pixel_steps/pixel_steps.h has them.
_ABOVE, _BESIDE = 2, 1
# Elements of a block of maps, and of what a map begins at a multiple of: a cache line of float32.
_BLOCK, _ALIGNED = 1 << 22, 16


@dataclass(eq=False, frozen=True)
class PixelMap:
    """A feature map that is kept: see :class:`PixelMaps`.

    Attributes:
        data: [B, above + H, beside + W + beside, C], channels dense, zeros around the pixels.
        level: how often its resolution is halved; None for a map of one pixel that is written anew each time.
    """

    data: Tensor
    level: int | None

    @property
    def pixels(self) -> Tensor:
        """[B, H, W, C], the same memory."""
        return self.data[:, _ABOVE:, _BESIDE:-_BESIDE]

    @property
    def flat(self) -> Tensor:
        """[B, pixels with those around, C], the same memory."""
        return self.data.flatten(1, 2)


class PixelSource(NamedTuple):
    """What a step reads: pixels of a map relative to its own, at the map's resolution.

    Attributes:
        map: of the step's level or the next higher resolution.
        taps: rows below, -2 to 0, and columns to the right, -1 to 1.
    """

    map: PixelMap
    taps: list[tuple[int, int]]


@dataclass(eq=False)
class PixelStep:
    """output = activation(read values @ weight + bias + image_bias) at one pixel of a resolution.

    Attributes:
        level: its resolution, at whose pixels it is due.
        sources: in the order of the weight's rows.
        weight: [K, N], rows by source, tap and channel.
        bias: [N].
        image_bias: [B, N], or None.
        residual: where the output is gated, one half of it times the sigmoid of the other, what is added to it.
        raw, elu: where the output and its concatenated ELU go; of this level or the next higher resolution.
        offset: row and column in the 2x2 pixels of a higher resolution.
    """

    level: int
    sources: list[PixelSource]
    weight: Tensor
    bias: Tensor
    image_bias: Tensor | None = None
    residual: PixelMap | None = None
    raw: PixelMap | None = None
    elu: PixelMap | None = None
    offset: tuple[int, int] = (0, 0)


class PixelMaps:
    """Makes the maps of a batch of images, all zeros.

    They are cut from a few blocks of memory: the kernel makes sure at every pixel that its memory is still there, and
    does so of the blocks, not of every map.

    Args:
        batch, height, width: of the images.
        like: what gives the type, float32 or float64, and the device.
    """

    def __init__(self, batch: int, height: int, width: int, like: Tensor) -> None:
        self.batch, self.height, self.width = batch, height, width
        self.blocks: list[Tensor] = []
        self._like = like
        self._rest = like.new_empty(0)

    def make(self, channels: int, level: int | None) -> PixelMap:
        """A map of a resolution that is halved so often, or of one pixel."""
        height, width = (1, 1) if level is None else (self.height >> level, self.width >> level)
        shape = self.batch, _ABOVE + height, width + 2 * _BESIDE, channels
        size = math.prod(shape)
        if size > len(self._rest):
            self._rest = self._like.new_zeros(max(size, _BLOCK))
            self.blocks.append(self._rest)
        values, self._rest = self._rest[:size], self._rest[-(-size // _ALIGNED) * _ALIGNED :]
        return PixelMap(values.view(shape), level)


class PixelPlace:
    """The pixel whose turn it is, for the host and in the memory of a device.

    Attributes:
        row, col: of the image.
        position: the same, [2] int64.
        index: row * W + col, [1] int64.
        at: by level, [1] int64: the index, in a flat map of the level, of its pixel that begins here, if one does.
    """

    def __init__(self, height: int, width: int, device: torch.device, levels: int = 1) -> None:
        self._width, self._levels = width, levels
        index = torch.arange(height * width, device=device)
        row, col = index // width, index % width
        flat = [
            ((row >> level) + _ABOVE) * ((width >> level) + 2 * _BESIDE) + (col >> level) + _BESIDE
            for level in range(levels)
        ]
        # All side by side, so that going to a pixel is one copy.
        self._all = torch.stack([row, col, index, *flat], dim=1)
        self._now = self._all[0].clone()
        self.position = self._now[:2]
        self.index = self._now[2:3]
        self.at = self._now[3:].split(1)
        self._columns = [torch.arange(width >> level, device=device) for level in range(levels)]
        self._along = self._all[:width, :2].clone()
        self.go_to(0)

    def go_to(self, row: int, col: int = 0) -> None:
        self.row, self.col = row, col
        self._now.copy_(self._all[row * self._width + col])

    @property
    def levels(self) -> int:
        """In how many resolutions a pixel begins with this one."""
        both = self.row | self.col
        return next(level for level in range(self._levels, 0, -1) if both % (1 << (level - 1)) == 0)

    def rows_of_levels(self) -> list[int]:
        """For every number of levels, a row in whose first pixel so many begin."""
        return [0, *(1 << level for level in range(self._levels - 1))]

    def row_at(self) -> list[Tensor]:
        """By level, [W of the level], the indices of a row's pixels, from its first pixel's on, at which this is."""
        return [first + columns for first, columns in zip(self.at, self._columns, strict=True)]

    def row_positions(self) -> tuple[Tensor, ...]:
        """The positions of a row's pixels, from its first pixel's on, at which this is."""
        return (self.position + self._along).unbind()


class PixelSteps(ABC):
    """Steps that are run in their order. What they write is there for the next; what they read must be there."""

    @abstractmethod
    def run_pixel(self, place: PixelPlace) -> None:
        """Run the steps that are due at a pixel: those at whose resolution one begins."""

    @abstractmethod
    def run_row(self, place: PixelPlace) -> None:
        """Run the steps that are due in a row, each at all of its pixels; the place is at the row's first pixel."""


def pixel_steps(steps: Sequence[PixelStep], maps: PixelMaps) -> PixelSteps:
    """A network of steps, ready to be run; tensors are read and written where they are now.

    Sums are in the maps' type; those of kernels are the same at a pixel, in a row and for any number of threads or
    blocks. There is no gradient.

    Args:
        steps: in the order in which they are run. Of their tensors those that maps did not make must stay as they are.
        maps: where the maps of the steps come from.

    Raises:
        ValueError: shapes, types, taps or offsets other than :class:`PixelStep` says, or a step that writes what it
            reads; where a kernel runs also layouts.
    """
    kernel = maps._like.device.type in KERNEL_DEVICES and hasattr(native, "PixelSteps")
    return (_KernelSteps if kernel else _ReferenceSteps)(steps, maps)


class _KernelSteps(PixelSteps):
    """One call, on CUDA one launch, a pixel or a row."""

    def __init__(self, steps: Sequence[PixelStep], maps: PixelMaps) -> None:
        self._kernel = native.PixelSteps(
            [
                (
                    step.level,
                    [(source.map.data, _scale(step, source.map), source.taps) for source in step.sources],
                    step.weight,
                    step.bias,
                    step.image_bias,
                    None if step.residual is None else step.residual.data,
                    None if step.raw is None else step.raw.data,
                    None if step.elu is None else step.elu.data,
                    _scale(step, step.raw or step.elu),
                    step.offset,
                )
                for step in steps
            ],
            maps.batch,
            maps.height,
            maps.width,
            maps.blocks,
        )
        # Copies, as a device reads the weights where they are, also where the steps of the caller have others by then.
        self._steps = [copy(step) for step in steps]
        self._plan: Tensor | None = None
        if self._kernel.on_device:
            plan = torch.frombuffer(bytearray(self._kernel.plan()), dtype=torch.uint8)
            self._plan = plan.to(maps._like.device, copy=True)

    def run_pixel(self, place: PixelPlace) -> None:
        if self._plan is None:
            self._kernel.run_pixel(place.row, place.col)
        else:
            self._kernel.run_on_device(self._plan, place.position, False)

    def run_row(self, place: PixelPlace) -> None:
        if self._plan is None:
            self._kernel.run_row(place.row)
        else:
            self._kernel.run_on_device(self._plan, place.position, True)


def _scale(step: PixelStep, map: PixelMap | None) -> int:
    """By how much a step's row and column are multiplied in a map; 0 where that has only one pixel, or is missing."""
    return 0 if map is None or map.level is None else 1 << (step.level - map.level)


def _check_step(step: PixelStep, maps: PixelMaps) -> None:
    """What csrc/pixel_steps/check.cpp asks of a step, layouts aside, in its words."""
    _require(step.raw is not None or step.elu is not None, "a step must have raw or elu to write to")
    read = [("residual", step.residual), *(("a source's map", source.map) for source in step.sources)]
    for written, map, others in (("raw", step.raw, [*read, ("elu", step.elu)]), ("elu", step.elu, read)):
        for name, other in others:
            _require(map is None or map is not other, f"{written} must not share memory with {name}")
    _require(
        all(side % (1 << step.level) == 0 for side in (maps.height, maps.width)),
        f"level must be one that the images' sides can be halved to, got {step.level}",
    )
    weight = step.weight
    _require(weight.ndim == 2 and weight.numel() > 0, f"weight must be [K, N], got {list(weight.shape)}")
    outputs = features = weight.shape[1]
    _check_tensor("weight", weight, maps, _checked_depth(step, maps), outputs)
    _check_tensor("bias", step.bias, maps, outputs)
    if step.image_bias is not None:
        _check_tensor("image_bias", step.image_bias, maps, maps.batch, outputs)
    if step.residual is not None:
        _require(outputs % 2 == 0, f"gated outputs must be even in number, got {outputs}")
        features = outputs // 2
        _check_map("residual", step.residual, step, maps, 1, features)
    scale = _scale(step, step.raw or step.elu)
    _require(0 <= scale <= 2, f"output_scale must be 0, 1 or 2, got {scale}")
    _require(
        all(0 <= place < max(scale, 1) for place in step.offset),
        "offset must be within the output_scale x output_scale pixels",
    )
    for name, map, channels in (("raw", step.raw, features), ("elu", step.elu, 2 * features)):
        if map is not None:
            _check_map(name, map, step, maps, scale, channels)


def _checked_depth(step: PixelStep, maps: PixelMaps) -> int:
    """How many values a step reads."""
    depth = 0
    for map, taps in step.sources:
        scale, channels = _scale(step, map), map.data.shape[3]
        _require(scale in (1, 2), "a source's scale must be 1 or 2")
        _check_map("a source's map", map, step, maps, scale, channels)
        for row, col in taps:
            within = -_ABOVE <= row <= 0 and -_BESIDE <= col <= _BESIDE
            _require(within, f"taps must be within the map's border, got ({row}, {col})")
        depth += channels * len(taps)
    return depth


def _check_map(name: str, map: PixelMap, step: PixelStep, maps: PixelMaps, scale: int, channels: int) -> None:
    height, width = ((side >> step.level) * scale if scale else 1 for side in (maps.height, maps.width))
    _check_tensor(name, map.data, maps, maps.batch, _ABOVE + height, width + 2 * _BESIDE, channels)


def _check_tensor(name: str, tensor: Tensor, maps: PixelMaps, *shape: int) -> None:
    _require(tensor.dtype == maps._like.dtype, f"{name} must have the type of the other tensors")
    _require(tensor.shape == shape, f"{name} must be {list(shape)}, got {list(tensor.shape)}")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


class _ReferenceSteps(PixelSteps):
    """Plain PyTorch. The work depends on where it is only by values on the device, and by which levels begin there."""

    def __init__(self, steps: Sequence[PixelStep], maps: PixelMaps) -> None:
        for step in steps:
            _check_step(step, maps)
        self._steps = steps
        self._offsets = [[self._tap_offsets(source) for source in step.sources] for step in steps]

    def run_pixel(self, place: PixelPlace) -> None:
        self._run(place.at, place.levels)

    def run_row(self, place: PixelPlace) -> None:
        self._run(place.row_at(), place.levels)

    def _run(self, at: Sequence[Tensor], levels: int) -> None:
        """At these pixels of each level; only steps of the first so many levels."""
        for step, offsets in zip(self._steps, self._offsets, strict=True):
            if step.level < levels:
                self._run_step(step, offsets, at)

    @staticmethod
    def _tap_offsets(source: PixelSource) -> Tensor:
        pitch = source.map.data.shape[2]
        return torch.tensor([row * pitch + col for row, col in source.taps], device=source.map.data.device)

    @staticmethod
    def _run_step(step: PixelStep, offsets: list[Tensor], at: Sequence[Tensor]) -> None:
        def indices_in(map: PixelMap) -> Tensor:
            if map.level is None:
                return torch.full_like(at[0], _ABOVE * map.data.shape[2] + _BESIDE)
            return at[map.level][:: _scale(step, map)]

        read = []
        for source, taps in zip(step.sources, offsets, strict=True):
            indices = (indices_in(source.map)[:, None] + taps).flatten()
            values = source.map.flat.index_select(1, indices)
            read.append(values.unflatten(1, (-1, len(taps))).flatten(2))
        output = torch.cat(read, dim=2) @ step.weight + step.bias
        if step.image_bias is not None:
            output = output + step.image_bias[:, None]
        if step.residual is not None:
            output = step.residual.flat.index_select(1, indices_in(step.residual)) + F.glu(output, dim=2)
        for map, values in ((step.raw, output), (step.elu, F.elu(torch.cat([output, -output], dim=2)))):
            if map is not None:
                indices = indices_in(map) + (step.offset[0] * map.data.shape[2] + step.offset[1])
                map.flat.index_copy_(1, indices, values)
