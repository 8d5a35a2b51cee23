"""Networks that are run one pixel or row at a time: lists of matrix products over cached feature maps.

Given the earlier pixels of all maps, a run computes their next pixel. The CPU and, in builds with CUDA, GPUs run the
whole list in one kernel call; elsewhere PyTorch runs it step by step. Devices read the current position from their own
memory, so that the work at a pixel can be captured as a CUDA graph.
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

# Width of the zero border above and beside a map's pixels, so that taps need no bounds checks; csrc/pixel_steps/
# pixel_steps.h has the same.
_ABOVE, _BESIDE = 2, 1
# Elements of a block of maps, and the alignment of a map in elements: a cache line of float32.
_BLOCK, _ALIGNED = 1 << 22, 16


@dataclass(eq=False, frozen=True)
class PixelMap:
    """A cached feature map, made by :class:`PixelMaps`.

    Attributes:
        data: [B, above + H, beside + W + beside, C], channels dense, with a border of zeros around the pixels.
        level: how many times its resolution is halved; None for a map of one pixel that every run overwrites.
    """

    data: Tensor
    level: int | None

    @property
    def pixels(self) -> Tensor:
        """The pixels without the border, [B, H, W, C], as a view."""
        return self.data[:, _ABOVE:, _BESIDE:-_BESIDE]

    @property
    def flat(self) -> Tensor:
        """All pixels with the border, [B, pixels, C], as a view."""
        return self.data.flatten(1, 2)


class PixelSource(NamedTuple):
    """An input of a step: pixels of a map around the step's pixel.

    Attributes:
        map: a map of the step's level or the next higher resolution.
        taps: offsets from the step's pixel at the map's resolution: rows, -2 to 0, and columns, -1 to 1.
    """

    map: PixelMap
    taps: list[tuple[int, int]]


@dataclass(eq=False)
class PixelStep:
    """output = activation(read values @ weight + bias + image_bias) at one pixel of a resolution.

    Attributes:
        level: level of its resolution; the step runs once for each pixel of that.
        sources: inputs, in the order of the weight's rows.
        weight: [K, N], rows ordered by source, tap and channel.
        bias: [N].
        image_bias: [B, N], a bias for each image, or None.
        residual: map to add to the output. With it the output is gated: its first half times the sigmoid of the second.
        raw, elu: maps to write the output and its concatenated ELU to, of this level or the next higher resolution.
        offset: row and column among the 2x2 pixels of a higher resolution that the step writes to.
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
    """Allocator of the maps of a batch of images, filled with zeros.

    Maps are slices of a few large blocks: at every pixel the kernel checks that its memory still exists, and so has to
    check only the blocks instead of every map.

    Args:
        batch, height, width: number and size of the images.
        like: tensor whose dtype, float32 or float64, and device the maps get.
    """

    def __init__(self, batch: int, height: int, width: int, like: Tensor) -> None:
        self.batch, self.height, self.width = batch, height, width
        self.blocks: list[Tensor] = []
        self._like = like
        self._rest = like.new_empty(0)

    def make(self, channels: int, level: int | None) -> PixelMap:
        """Allocate a map at a level, or with None one of a single pixel."""
        height, width = (1, 1) if level is None else (self.height >> level, self.width >> level)
        shape = self.batch, _ABOVE + height, width + 2 * _BESIDE, channels
        size = math.prod(shape)
        if size > len(self._rest):
            self._rest = self._like.new_zeros(max(size, _BLOCK))
            self.blocks.append(self._rest)
        values, self._rest = self._rest[:size], self._rest[-(-size // _ALIGNED) * _ALIGNED :]
        return PixelMap(values.view(shape), level)


class PixelPlace:
    """The current pixel, on the host and in the memory of a device.

    Attributes:
        row, col: position in the image, on the host.
        position: row and column, [2] int64 on the device.
        index: row * W + col, [1] int64 on the device.
        at: by level, [1] int64 on the device: index, in a flat map of that level, of the pixel that begins at this
            position, if one does.
    """

    def __init__(self, height: int, width: int, device: torch.device, levels: int = 1) -> None:
        self._width, self._levels = width, levels
        index = torch.arange(height * width, device=device)
        row, col = index // width, index % width
        flat = [
            ((row >> level) + _ABOVE) * ((width >> level) + 2 * _BESIDE) + (col >> level) + _BESIDE
            for level in range(levels)
        ]
        # All in one tensor, so that moving to a pixel takes one copy.
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
        """Number of levels, from the first, at which a pixel begins at the current position."""
        both = self.row | self.col
        return next(level for level in range(self._levels, 0, -1) if both % (1 << (level - 1)) == 0)

    def rows_of_levels(self) -> list[int]:
        """Return, for every possible value of :attr:`levels`, a row whose first pixel has that value."""
        return [0, *(1 << level for level in range(self._levels - 1))]

    def row_at(self) -> list[Tensor]:
        """Return, by level, the flat indices of a row's pixels, [W of the level]; this must be at its first pixel."""
        return [first + columns for first, columns in zip(self.at, self._columns, strict=True)]

    def row_positions(self) -> tuple[Tensor, ...]:
        """Return the positions of a row's pixels; this must be at its first pixel."""
        return (self.position + self._along).unbind()


class PixelSteps(ABC):
    """A list of steps that run in order: each may read what earlier ones wrote, and earlier pixels of all maps."""

    @abstractmethod
    def run_pixel(self, place: PixelPlace) -> None:
        """Run the steps of all levels at which a pixel begins at the place."""

    @abstractmethod
    def run_row(self, place: PixelPlace) -> None:
        """Run those steps at all of a row's pixels of their level; the place must be at the row's first pixel."""


def pixel_steps(steps: Sequence[PixelStep], maps: PixelMaps) -> PixelSteps:
    """Prepare a network of steps to be run; runs read and write the tensors at their present addresses.

    Sums are in the maps' dtype; kernels give the same sums by pixel and by row, for any number of threads or blocks.
    There is no gradient.

    Args:
        steps: the steps in the order in which they run. Their tensors, except for maps, must not change.
        maps: the allocator of the steps' maps.

    Raises:
        ValueError: shapes, dtypes, taps or offsets other than those of :class:`PixelStep`, or a step that writes what
            it reads; where a kernel runs, also unsupported layouts.
    """
    kernel = maps._like.device.type in KERNEL_DEVICES and hasattr(native, "PixelSteps")
    return (_KernelSteps if kernel else _ReferenceSteps)(steps, maps)


class _KernelSteps(PixelSteps):
    """Steps run by one kernel call, on CUDA one launch, for each pixel or row."""

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
        # Copies keep the weights alive, which a device reads in place, even if the caller assigns others to its steps.
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
    """Return the factor from a step's row and column to those of a map; 0 if that has one pixel only, or is None."""
    return 0 if map is None or map.level is None else 1 << (step.level - map.level)


def _check_step(step: PixelStep, maps: PixelMaps) -> None:
    """Check a step as csrc/pixel_steps/check.cpp does, with the same messages, except for layouts."""
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
    """Check a step's sources and return the number of values that it reads."""
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
    """Steps in plain PyTorch. Only values on the device, and the number of levels to run, depend on the position."""

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
        """Run the steps of the first ``levels`` levels, at the pixels ``at`` of each level."""
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
