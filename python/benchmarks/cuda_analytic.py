"""Counts of the benchmark problems' launches worked out from the kernels' tiles, and their eager formulations.

They stand in until launches are watched in the emulation, and check what that counts. Each function follows the host
code and the main loop of one ``csrc/OP/cuda.cu``; what happens once a row, such as exponentials, is there where it
counts. Not here: what PyTorch does around our kernels, but for the sort by keys; and the eager formulation of
augment_patches, thousands of small launches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from benchmark import Case
from cuda_counts import Launch, Problem, Product, Sweep
from ops import all_ops
from ops.augment_patches import AUGMENTATIONS

from cpc_ext.nn import MaskedConv2d, ShiftedConv2d
from cpc_ext.ops import Transform

__all__ = ["analytic_problems", "eager_steps"]

# Where the kernels look at the GPU they run on, it is this one.
MULTIPROCESSORS = 132
TYPES = {"float32": "float", "bfloat16": "BFloat16", "float16": "Half"}
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _up(value: float, by: int) -> int:
    return -(-int(value) // by)


def _elementwise(
    kernel: str, threads: float, *, block: int, reads: float, writes: float, requests: float = 1, **more: Any
) -> Launch:
    """A kernel whose neighbouring threads access neighbouring memory; reads and writes are bytes, all different."""
    grid = max(1, _up(threads, block))
    warps = grid * _up(block, 32)
    return Launch(
        kernel=kernel,
        grid=grid,
        block=block,
        read_requests=warps * requests,
        write_requests=warps,
        read_bytes=reads,
        written_bytes=writes,
        read_sectors=reads / 32,
        written_sectors=writes / 32,
        unique_read_bytes=reads,
        unique_written_bytes=writes,
        **more,
    )


# --- info_nce with all keys ---


@dataclass(frozen=True)
class TileProduct:
    """How ``multiply`` in info_nce/cuda.cu goes through a slice of 64 bytes of depth, in a block of 4 warps."""

    math: str
    value: int  # Bytes of a value in shared memory.
    products: dict[str, float]  # Of a warp and slice.
    multiplies: dict[str, float]  # Of a thread and slice.
    loads: int  # Wavefronts of a warp's loads from shared memory.

    @property
    def depth(self) -> int:
        return 64 // self.value

    def of(self, blocks: float, slices: float) -> dict[str, Any]:
        """Counts of so many blocks. A thread moves 4 chunks of 16 bytes a slice, a warp each in 4 wavefronts."""
        warps = 4 * blocks * slices
        return {
            "mma": {name: count * warps for name, count in self.products.items()},
            "multiplies": {name: count * 32 * warps for name, count in self.multiplies.items()},
            "shared_requests": warps * (4 + self.loads / (4 if self.value == 2 else 1)),
            "shared_wavefronts": warps * (16 + self.loads),
            "ldmatrix": warps * self.loads / 4 if self.value == 2 else 0,
            "barriers": 2 * warps,
            "read_requests": 4 * warps,
            "read_bytes": blocks * slices * 2 * 64 * 64,
            "read_sectors": blocks * slices * 2 * 64 * 2,
        }


# 8 products of 16 x 8 a step of depth, 16 for bfloat16, whose operands are 4 ldmatrix of 4 wavefronts; 8 for TF32, with
# 16 loads of single values. On the ordinary units a thread has 4 x 8 sums, and reads 4 + 8 values for each depth, which
# the compiler joins to 48 loads of 16 bytes a slice: 4 and 8 lanes at a time read different ones, so a wavefront each.
IN_BFLOAT16 = TileProduct("InBFloat16", 2, {"m16n8k16.bf16": 16}, {}, 2 * 16)
IN_TF32 = TileProduct("InTf32", 4, {"m16n8k8.tf32": 16}, {}, 2 * 16)
IN_FLOAT = TileProduct("InFloat", 4, {}, {"float32": 512}, 48)


@dataclass(frozen=True)
class AllKeys:
    """The class of that name: as many keys as rows, one entry."""

    rows: int
    dim: int
    dtype: str
    backward: bool

    @property
    def product(self) -> TileProduct:
        return {"float32": IN_FLOAT, "bfloat16": IN_BFLOAT16, "float16": IN_TF32}[self.dtype]

    @property
    def arguments(self) -> str:
        return f"<{TYPES[self.dtype]}, {self.product.math}>"

    @property
    def group(self) -> int:
        """Queries of a group, whose powers stay in the second-level cache."""
        padded = _up(self.rows, 64) * 64
        rows = 1024 if self.rows > 8192 else max((32 << 20) // (padded * self.product.value), 64)
        return min(rows // 64 * 64, padded)

    @property
    def chunk(self) -> int:
        """Keys that a group's powers are of at a time."""
        padded = _up(self.rows, 64) * 64
        return min((32 << 20) // (1024 * self.product.value) // 64 * 64 if self.rows > 8192 else padded, padded)

    @property
    def parts(self) -> int:
        """Parts that the queries' gradient is summed in."""
        wanted = 256 // (_up(self.group, 64) * _up(self.dim, 64))
        parts = max(1, min(wanted, max(self.chunk // 512, 1)))
        return _up(self.chunk, max(_up(_up(self.chunk, parts), 64) * 64, 64))

    def launches(self) -> list[Launch]:
        launches = []
        chunks = [min(self.chunk, self.rows - key) for key in range(0, self.rows, self.chunk)]
        for first in range(0, self.rows, self.group):
            m = min(self.group, self.rows - first)
            launches += [*(self.score(m, keys) for keys in chunks), self.finish_rows(m)]
            if not self.backward:
                continue
            for keys in chunks:
                launches += [self.score(m, keys)] if len(chunks) > 1 else []
                launches += [self.add_to_queries(m, keys), self.add_to_keys(m, keys, ends=len(chunks) == 1)]
            launches.append(self.finish_queries(m))
        return launches

    def score(self, m: int, keys: int) -> Launch:
        blocks = _up(m, 64) * _up(keys, 64)
        counts = self.product.of(blocks, self.dim / self.product.depth)
        powers = blocks * 64 * 64 * self.product.value if self.backward else 0
        # Scores go through shared memory: written once, read for the maximum and for the powers, and to leave.
        counts["shared_wavefronts"] += blocks * 64 * 64 * (5 if self.backward else 4) / 32
        return Launch(
            kernel=f"info_nce::score{self.arguments}",
            grid=blocks,
            block=128,
            dynamic_shared_bytes=64 * 66 * 4,
            transcendentals=blocks * 64 * 64,
            unique_read_bytes=(m + keys) * self.dim * SIZES[self.dtype],
            unique_written_bytes=powers,
            written_bytes=powers,
            written_sectors=powers / 32,
            **counts,
        )

    def finish_rows(self, m: int) -> Launch:
        tiles = _up(self.rows, 64)
        return _elementwise(
            f"info_nce::finish_rows{self.arguments}",
            m,
            block=128,
            reads=m * tiles * 4 * (4 if self.backward else 3),
            writes=m * tiles * 4 if self.backward else m * 8,
            requests=tiles * (4 if self.backward else 3),
            transcendentals=m * tiles * (2 if self.backward else 1),
            instructions=_up(m, 128) * 4 * tiles * (60 if self.backward else 40),
        )

    def add_to_queries(self, m: int, keys: int) -> Launch:
        blocks = _up(m, 64) * _up(self.dim, 64) * self.parts
        sums = m * self.dim * 4 * self.parts
        return self._gradient("add_to_queries", blocks, keys / self.parts, keys, m * keys, sums)

    def add_to_keys(self, m: int, keys: int, *, ends: bool) -> Launch:
        sums = keys * self.dim * (SIZES[self.dtype] if ends else 4)
        return self._gradient("add_to_keys", _up(keys, 64) * _up(self.dim, 64), m, m, m * keys, sums)

    def _gradient(self, name: str, blocks: int, depth: float, others: int, powers: int, sums: float) -> Launch:
        counts = self.product.of(blocks, depth / self.product.depth)
        # Beside each chunk of powers its factor is read.
        counts["read_requests"] *= 1.5
        counts["read_sectors"] *= 1.25
        return Launch(
            kernel=f"info_nce::{name}{self.arguments}",
            grid=blocks,
            block=128,
            dynamic_shared_bytes=2 * 64 * 80,
            unique_read_bytes=powers * self.product.value + others * self.dim * SIZES[self.dtype],
            unique_written_bytes=sums,
            written_bytes=sums,
            written_sectors=2 * sums / 32,  # 4 bytes at a time, every other.
            **counts,
        )

    def finish_queries(self, m: int) -> Launch:
        return _elementwise(
            f"info_nce::finish_queries{self.arguments}",
            m * self.dim,
            block=128,
            reads=m * self.dim * 4 * self.parts,
            writes=m * self.dim * SIZES[self.dtype],
            requests=self.parts + 1,
            instructions=m * self.dim / 32 * (60 + 20 * self.parts),  # Long divisions for the place.
        )


# --- info_nce with sampled keys ---


def contrast_sampled(queries: int, keys: int, dim: int, samples: int, dtype: str, backward: bool) -> list[Launch]:
    """A warp a query, then, once PyTorch has sorted the pairs by key, a warp a key; a lane takes every 32nd value."""
    size, pairs = SIZES[dtype], samples + 1
    arguments = f"<{TYPES[dtype]}, float>"
    passes = pairs * (2 if backward else 1)
    warp_loads = dim / 32 * passes
    read = queries * (passes + 1) * dim * size  # The query itself is read again for each pair, from the first level.
    launches = [
        Launch(
            kernel=f"info_nce::contrast_sampled{arguments}",
            grid=_up(queries, 4),
            block=128,
            read_requests=queries * warp_loads * 1.5,
            read_bytes=read,
            read_sectors=read / 32,
            unique_read_bytes=(queries + keys) * dim * size + queries * pairs * 8,
            unique_written_bytes=queries * (pairs * 4 + (dim * size if backward else 0)),
            written_sectors=queries * (pairs + (dim * size / 32 if backward else 0)),
            multiplies={"float32": queries * passes * dim},
            shuffles=queries * pairs * 5,
            instructions=queries * pairs * (60 + dim / 32 * (6 if backward else 4)),
        )
    ]
    if backward:
        entries = 8 * queries * pairs
        # Joining targets and negatives, and a radix sort of 64 bits and their places in 8 passes.
        for name, count, moved in (("join", 6, 2 * entries), ("sort", 9, 4 * entries), ("search", 1, keys * 8 * 20)):
            pass_ = _elementwise(f"PyTorch's {name}", moved / 16, block=256, reads=moved / 2, writes=moved / 2)
            launches += [pass_] * count
        read = queries * pairs * dim * size
        launches.append(
            Launch(
                kernel=f"info_nce::sum_sampled_keys{arguments}",
                grid=_up(keys, 4),
                block=128,
                read_requests=queries * pairs * (dim / 32 + 2),
                read_bytes=read,
                read_sectors=read / 32 + 2 * queries * pairs,
                unique_read_bytes=queries * dim * size + queries * pairs * 12,
                unique_written_bytes=keys * dim * size,
                written_sectors=keys * dim * size / 32,
                multiplies={"float32": queries * pairs * dim},
                instructions=queries * pairs * (40 + 3 * dim / 32),
            )
        )
    return launches


# --- Convolutions ---


@dataclass(frozen=True)
class Convolution:
    """taps: offsets (dy, dx) of what an output sees."""

    batch: int
    inputs: int
    outputs: int
    side: int
    taps: tuple[tuple[int, int], ...]
    dtype: str
    bias: bool

    @property
    def size(self) -> int:
        return SIZES[self.dtype]

    @property
    def pixels(self) -> int:
        return self.batch * self.side**2

    @property
    def seen(self) -> float:
        """Taps that do not fall on the padding, of a pixel on average."""
        inside = [max(0, self.side - abs(dy)) * max(0, self.side - abs(dx)) for dy, dx in self.taps]
        return sum(inside) / self.side**2

    @property
    def math(self) -> str:
        return f"TensorCores<{TYPES[self.dtype]}>"

    @property
    def mma(self) -> str:
        return "m16n8k8.tf32" if self.size == 4 else "m16n8k16.bf16"

    def is_large(self, columns: int) -> bool:
        return 3 * _up(columns, 128) * 128 <= 4 * _up(columns, 64) * 64


LARGE, SMALL = "Tile<4, 2, 4, 4, 2, true>", "Tile<2, 2, 2, 4, 4, false>"


def pack(c: Convolution, inputs: int, outputs: int) -> Launch:
    """pack_weights: a block for 32 outputs and 64 bytes of depth."""
    depth = 64 // c.size
    blocks = _up(outputs, 32) * _up(len(c.taps) * inputs, depth)
    values = blocks * 32 * depth
    weights = c.outputs * c.inputs * len(c.taps) * c.size
    return Launch(
        kernel=f"masked_conv::pack_weights<{TYPES[c.dtype]}>",
        grid=blocks,
        block=256,
        read_requests=2 * values / 32,
        read_bytes=values * (c.size + 1),
        read_sectors=values * 2,  # The weight's taps are innermost: a value is a sector, as is its mask's.
        unique_read_bytes=weights * 9 / len(c.taps),
        unique_written_bytes=values * c.size,
        written_sectors=values * c.size / 32,
        instructions=values / 32 * 100,
    )


def convolve(c: Convolution, inputs: int, outputs: int) -> Launch:
    """convolve_tile: rows of pixels times outputs, 64 bytes of depth at a time, three slices ahead."""
    whole = inputs * c.size % 16 == 0
    large = whole and c.is_large(_up(outputs, 32) * 32) and _up(c.pixels, 128) * _up(outputs, 128) >= MULTIPROCESSORS
    side, warps_of_block, row_tiles = (128, 8, 4) if large else (64, 4, 2)
    blocks = _up(c.pixels, side) * _up(outputs, side)
    slices = c.seen * inputs * c.size / 64
    warps = blocks * warps_of_block * slices
    copied = blocks * slices * 2 * side * 64
    written = c.pixels * outputs * c.size
    return Launch(
        kernel=f"masked_conv::convolve_tile<{c.math}, {LARGE if large else SMALL}>",
        grid=blocks,
        block=32 * warps_of_block,
        dynamic_shared_bytes=4 * 2 * side * 64,
        mma={c.mma: warps * row_tiles * 4 * 2},
        ldmatrix=warps * 2 * (2 + row_tiles),
        shared_requests=warps * 2 * (2 + row_tiles),
        shared_wavefronts=warps * 2 * (2 + row_tiles) * 4 + copied / 128,
        copies={"16": copied / 16} if whole else {str(c.size): copied / c.size},
        read_requests=copied / 512,
        read_bytes=copied,
        read_sectors=copied / 32,
        unique_read_bytes=(c.pixels * inputs + len(c.taps) * inputs * outputs) * c.size,
        unique_written_bytes=written,
        written_bytes=written,
        written_sectors=written / 32,
        barriers=warps,
    )


def weight_gradient(c: Convolution) -> list[Launch]:
    """sum_weight_grad, whose depth is the pixels of a part, and the sum of its parts."""
    depth = len(c.taps) * c.inputs
    whole = c.inputs * c.size % 16 == 0 and c.outputs * c.size % 16 == 0
    large = whole and c.is_large(c.outputs) and c.is_large(depth)
    side, warps_of_block, row_tiles = (128, 8, 4) if large else (64, 4, 2)
    tiles = _up(c.outputs, side) * _up(depth, side)
    parts = max(1, min(264 // tiles, max(c.pixels // 128, 1)))
    slices = _up(c.pixels / parts, 64 // c.size)
    warps = tiles * parts * warps_of_block * slices
    copied = tiles * parts * slices * 2 * side * 64
    sums = parts * c.outputs * depth * 4
    # Values of two bytes are transposed by ldmatrix; of four, 8 of B and 4 a row tile of A are loaded for 8 of depth.
    wavefronts = 2 * (2 + row_tiles) * 4 if c.size == 2 else 2 * (8 + 4 * row_tiles)
    product = Launch(
        kernel=f"masked_conv::sum_weight_grad<{c.math}, {LARGE if large else SMALL}>",
        grid=tiles * parts,
        block=32 * warps_of_block,
        dynamic_shared_bytes=4 * 2 * side * 64,
        mma={c.mma: warps * row_tiles * 4 * 2},
        shared_wavefronts=warps * wavefronts + copied / 128,
        copies={"16": copied / 16},
        read_requests=copied / 512,
        read_bytes=copied,
        read_sectors=copied / 32,
        unique_read_bytes=c.pixels * (c.inputs + c.outputs) * c.size,
        unique_written_bytes=sums,
        written_bytes=sums,
        written_sectors=sums / 32,
        barriers=warps,
    )
    values = c.outputs * depth
    finish = _elementwise(
        f"masked_conv::finish_weight_grad<{TYPES[c.dtype]}>",
        values,
        block=256,
        reads=sums,
        writes=values * 32,  # Taps are innermost: a sector each.
        requests=parts,
        instructions=values / 32 * (150 + 6 * parts),
    )
    return [product, finish]


def bias_gradient(c: Convolution) -> list[Launch]:
    read = c.pixels * c.outputs * c.size
    across = min(32, 1 << (_up(c.outputs * c.size, 16) - 1).bit_length())
    blocks = 128 * _up(_up(c.outputs * c.size, 16), across)
    sums = _elementwise(
        f"masked_conv::differentiate_activation<{TYPES[c.dtype]}>",
        blocks * 512,
        block=512,
        reads=read,
        writes=128 * c.outputs * 4,
        requests=max(1, read / 16 / (blocks * 512)),
        instructions=read / 512 * 40 + blocks * 16 * 200,
        dynamic_shared_bytes=2 * 512 * 16 // c.size * 4,
    )
    parts = _elementwise(
        f"masked_conv::sum_bias_parts<{TYPES[c.dtype]}>",
        c.outputs * 8,
        block=256,
        reads=128 * c.outputs * 4,
        writes=c.outputs * c.size,
        requests=16,
    )
    return [sums, parts]


def convolution(c: Convolution, backward: bool) -> list[Launch]:
    launches = [pack(c, c.inputs, c.outputs), convolve(c, c.inputs, c.outputs)]
    if backward:
        filled = c.outputs * c.inputs * 9 * c.size
        launches += bias_gradient(c) if c.bias else []
        launches += [pack(c, c.outputs, c.inputs), convolve(c, c.outputs, c.inputs)]
        launches += [_elementwise("memset", filled / 16, block=256, reads=0, writes=filled), *weight_gradient(c)]
    return launches


# --- Patches and likelihoods ---


def patches(batch: int, side: int, patch: int, stride: int, dtype: str, backward: bool) -> list[Launch]:
    """extract_staged: patches of a row share what they read; a thread reads 4 pixels, writes 16 bytes at a time."""
    size = SIZES[dtype]
    pixel = 4 if backward else 1
    cells = (side - patch) // stride + 1
    values = batch * cells**2 * 3 * patch**2
    tile = max(1, min(cells, ((32 << 10) // 4 // (3 * patch) - patch) // stride + 1))
    blocks = batch * cells * _up(cells, tile)
    groups = blocks * 3 * patch * _up((tile - 1) * stride + patch, 4)
    chunks = values * size / 16
    images = batch * 3 * side**2
    forward = Launch(
        kernel=f"patches::extract_staged<float, {TYPES[dtype]}>",
        grid=blocks,
        block=256,
        dynamic_shared_bytes=3 * patch * ((tile - 1) * stride + patch + 16) * 4,
        read_requests=groups / 32,
        read_bytes=groups * 4 * pixel,
        read_sectors=groups * 4 * pixel / 32,
        unique_read_bytes=images * pixel,
        unique_written_bytes=values * size,
        written_bytes=values * size,
        written_sectors=values * size / 32,
        # 4 stores a group and what is written, 16 bytes of floats at a time, which also passes through local memory.
        shared_wavefronts=groups * 4 / 32 + values * 4 / 128 + chunks * 8 / 32,
        multiplies={"float32": groups * 4},
        # By the lengths of its loops, less what is not taken for uint8 in whole chunks.
        instructions=groups / 32 * 200 + chunks / 32 * 150,
    )
    if not backward:
        return [forward]
    covered = values / images  # Patches of a pixel.
    return [
        forward,
        _elementwise(
            "patches::sum_patches<float>",
            batch * 3 * _up(side, 4) * 256,
            block=256,
            reads=values * size,
            writes=images * 4,
            requests=covered,
            # By the lengths of its loops: over pixels, patch rows and patches.
            instructions=images / 32 * (350 + 100 * covered**0.5 + 55 * covered),
        ),
    ]


def mixture(
    batch: int, channels: int, side: int, components: int, layout: str, dtype: str, backward: bool
) -> list[Launch]:
    """run_tiles: a thread a pixel. Instructions are those of the loops in the machine code, for 9.0."""
    size = SIZES[dtype]
    pixels = batch * side**2
    count = components * (10 if channels == 3 else 3)
    parameters = pixels * count * size
    staged = layout == "channels last"
    words = count * size // 4
    blocks = batch * _up(side**2, 128)
    arguments = f"<{TYPES[dtype]}, {channels}"

    def tiles(of_pass: int, of_component: float, functions: float) -> Launch:
        moved = words * 13 * (1 + of_pass) if staged else 0
        shared = pixels * words / 32 * (2 + 2 * of_pass) if staged else 0
        return Launch(
            kernel=f"logistic_mixture::run_tiles{arguments}, {of_pass}>",
            grid=blocks,
            block=128,
            dynamic_shared_bytes=128 * (words | 1) * 4 if staged else 0,
            read_requests=blocks * 4 * ((words if staged else count) + channels + 2),
            read_bytes=parameters + pixels * channels,
            read_sectors=(parameters + pixels * channels) / 32,
            unique_read_bytes=parameters + pixels * channels,
            unique_written_bytes=parameters if of_pass else pixels * 8,
            written_sectors=(parameters if of_pass else pixels * 8) / 32,
            shared_wavefronts=shared,
            transcendentals=pixels * components * functions,
            instructions=pixels / 32 * (components * of_component + moved + 200),
        )

    by_colour = channels / 3
    forward = tiles(0, 15 + 267 * by_colour, 1 + 3 * 4 * by_colour)
    nats = _elementwise("logistic_mixture::sum_parts", batch * 128, block=128, reads=blocks * 4, writes=batch * 4)
    return [forward, nats, *([tiles(1, 15 + 467 * by_colour, 1 + 3 * 6 * by_colour)] if backward else [])]


def augmented(batch: int, side: int, patch: int, stride: int, transforms: float, dtype: str) -> Launch:
    """augment_patches: a block of 128 threads a patch, bytes in shared memory; so many transforms of a patch."""
    size = SIZES[dtype]
    cells = (side - patch) // stride + 1
    count, area = batch * cells**2, patch**2
    images, out = batch * 3 * side**2, count * 3 * area * size
    places = count * area
    # A place of a transform takes about 20 instructions, each of its three pixels 15; a value that is written 25.
    return Launch(
        kernel="augment::augment_patches",
        grid=count,
        block=128,
        dynamic_shared_bytes=2 * 3 * _up(area, 16) * 16,
        read_requests=3 * places / 32,
        read_bytes=3 * places,
        read_sectors=3 * places / min(patch, 32),
        unique_read_bytes=images,
        unique_written_bytes=out,
        written_bytes=out,
        written_sectors=out / 32,
        shared_wavefronts=3 * places / 32 * (1 + 2 * transforms + 1),
        barriers=count * 4 * (2 + 2 * transforms),
        instructions=places / 32 * ((1 + transforms) * (20 + 3 * 15) + 3 * 25) + count * 4 * 300,
    )


# --- Problems and their eager formulations ---


@dataclass(frozen=True)
class Worked:
    """A case worked out: what the op must do at least, our launches, and eager's steps."""

    minimum_bytes: float
    minimum_flops: float
    math: str
    launches: Sequence[Launch]
    eager: Sequence[Product | Sweep] | None


def _math(dtype: str, float32: str) -> str:
    return float32 if dtype == "float32" else dtype


def _all_keys(case: Any) -> Worked:
    m, d, size = case.rows, case.dim, SIZES[case.dtype]
    math = _math(case.dtype, "float32")
    scores = m * m * size
    as_float = [] if size == 4 else [Sweep(scores + m * m * 4)]
    # The product, log-softmax (which reads twice), the loss; backward the softmax's gradient and two products.
    eager: list[Product | Sweep] = [Product(m, m, d, math, size), *as_float, Sweep(3 * m * m * 4), Sweep(m * 12, 3)]
    if case.backward:
        back = [Sweep(m * m * 4), Sweep(3 * m * m * 4), *as_float]
        eager += [*back, Product(m, d, m, math, size), Product(m, d, m, math, size)]
    passes = 3 if case.backward else 1
    return Worked(
        2 * m * d * size * (2 if case.backward else 1),
        2 * m * m * d * passes,
        math,
        AllKeys(m, d, case.dtype, case.backward).launches(),
        eager,
    )


def _sampled(case: Any) -> Worked:
    q, n, d, s, size = case.queries, case.keys, 256, 16, SIZES[case.dtype]
    gathered = q * (s + 1) * d * size
    # Gather, batched product with one column, softmax; backward outer products, and adding up by index.
    eager: list[Product | Sweep] = [Sweep(q * (s + 1) * 16, 1), Sweep(2 * gathered), Sweep(gathered + q * d * size)]
    eager += [Sweep(q * (s + 1) * 12, 3)]
    if case.backward:
        eager += [Sweep(q * (s + 1) * 12, 3), Sweep(gathered), Sweep(gathered), Sweep(3 * gathered, 6)]
    moved = (q + n) * d * size + q * (s + 1) * 8
    return Worked(
        moved + ((q + n) * d * size if case.backward else 0),
        0,
        "float32",
        contrast_sampled(q, n, d, s, case.dtype, case.backward),
        eager,
    )


def _convolve_case(case: Any, c: Convolution, eager_taps: int, extra: Sequence[Sweep]) -> Worked:
    math = _math(c.dtype, "tf32")
    forward = Product(c.pixels, c.outputs, eager_taps * c.inputs, math, c.size)
    eager: list[Product | Sweep] = [*extra, forward]
    if case.backward:
        eager += [Product(c.pixels, c.inputs, eager_taps * c.outputs, math, c.size)]
        eager += [Product(c.outputs, eager_taps * c.inputs, c.pixels, math, c.size), *extra]
        eager += [Sweep(c.pixels * c.outputs * c.size)] if c.bias else []
    weights = len(c.taps) * c.inputs * c.outputs
    moved = (c.pixels * (c.inputs + c.outputs) + weights) * c.size
    return Worked(
        moved * (2 if case.backward else 1),
        2 * c.pixels * len(c.taps) * c.inputs * c.outputs * (3 if case.backward else 1),
        math,
        convolution(c, case.backward),
        eager,
    )


def _taps(mask: torch.Tensor) -> tuple[tuple[int, int], ...]:
    """Offsets from the centre of what a mask [k, k] lets through."""
    return tuple((int(y) - mask.shape[0] // 2, int(x) - mask.shape[1] // 2) for y, x in mask.nonzero())


def _masked(case: Any) -> Worked:
    taps = _taps(MaskedConv2d(1, 1, case.kernel, case.mask).mask.reshape(case.kernel, case.kernel))
    c = Convolution(case.batch, case.in_channels, case.out_channels, case.side, taps, case.dtype, True)
    weight = case.kernel**2 * c.inputs * c.outputs * c.size
    return _convolve_case(case, c, case.kernel**2, [Sweep(3 * weight), Sweep(2 * c.pixels * c.inputs * c.size)])


def _shifted(case: Any) -> Worked:
    kernel = (2, 3) if case.shift == "down" else (2, 2)
    taps = _taps(ShiftedConv2d(2, 1, kernel, case.shift).visible)
    c = Convolution(case.batch, 2 * case.features, case.out_channels, case.side, taps, case.dtype, False)
    return _convolve_case(case, c, kernel[0] * kernel[1], [Sweep(2 * c.pixels * c.inputs * c.size)])


def _patches(case: Any) -> Worked:
    size = SIZES[case.dtype]
    images = case.batch * 3 * case.side**2
    cells = (case.side - case.patch) // case.stride + 1
    out = case.batch * cells**2 * 3 * case.patch**2 * size
    pixel = 4 if case.backward else 1
    # To float, scale, subtract, divide, cast, and one copy of the patches; backward the unfolds and the division.
    casts = ([] if case.backward else [Sweep(images * 5), Sweep(images * 8)]) + (
        [] if size == 4 else [Sweep(images * 6)]
    )
    eager: list[Product | Sweep] = [*casts, Sweep(images * 8), Sweep(images * 8), Sweep(2 * out)]
    if case.backward:
        eager += [Sweep(2 * out), Sweep(2 * out), Sweep(out + images * 4), Sweep(images * 8)]
    launches = patches(case.batch, case.side, case.patch, case.stride, case.dtype, case.backward)
    return Worked((images * pixel + out) * (2 if case.backward else 1), 0, "float32", launches, eager)


def _mixture(case: Any) -> Worked:
    size = SIZES[case.dtype]
    pixels = case.batch * case.side**2
    parameters = pixels * case.components * (10 if case.channels == 3 else 3) * size
    one = pixels * case.components * case.channels * 4  # What every intermediate result takes.
    # About 45 elementwise kernels over colours and components, most with two operands; twice as many backward.
    eager: list[Product | Sweep] = [Sweep(2.5 * one)] * 45 + ([Sweep(2.5 * one)] * 95 if case.backward else [])
    moved = (pixels * case.channels + parameters) * (2 if case.backward else 1) + (parameters if case.backward else 0)
    arguments = case.batch, case.channels, case.side, case.components, case.layout, case.dtype, case.backward
    return Worked(moved, 0, "float32", mixture(*arguments), eager)


def _augmented(case: Any) -> Worked:
    cells = (case.side - case.patch) // case.stride + 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plan = AUGMENTATIONS[case.augmentation].plan(16, cells, cells, case.patch, channels=3)
    given = sum(tensor.nbytes for tensor in plan if isinstance(tensor, torch.Tensor)) / 16 * case.batch
    transforms = (plan.codes != Transform.NONE).sum().item() / (16 * cells**2)
    launch = augmented(case.batch, case.side, case.patch, case.stride, transforms, case.dtype)
    moved = launch.unique_read_bytes + launch.unique_written_bytes + given
    return Worked(moved, 0, "float32", [launch], None)


WORKED: dict[str, Callable[[Any], Worked]] = {
    "augment_patches": _augmented,
    "info_nce_all": _all_keys,
    "info_nce_sampled": _sampled,
    "masked_conv2d": _masked,
    "shifted_conv2d": _shifted,
    "extract_patches": _patches,
    "logistic_mixture_nll": _mixture,
}


@cache
def _worked() -> dict[tuple[str, str, str, str], Worked]:
    def key(name: str, case: Case) -> tuple[str, str, str, str]:
        return name, case.label, case.dtype, "forward+backward" if case.backward else "forward"

    return {key(name, case): work(case) for name, work in WORKED.items() for case in all_ops()[name].cases}


def analytic_problems() -> list[Problem]:
    """Every benchmark case of the ops above."""
    return [
        Problem(
            **dict(zip(("op", "label", "dtype", "passes"), key, strict=True)),
            source="analytic",
            minimum_bytes=worked.minimum_bytes,
            minimum_flops=worked.minimum_flops,
            math=worked.math,
            launches=tuple(worked.launches),
        )
        for key, worked in _worked().items()
    ]


def eager_steps(key: tuple[str, str, str, str]) -> Sequence[Product | Sweep] | None:
    """The eager formulation of a benchmark case, None where it is not worked out."""
    worked = _worked().get(key)
    return None if worked is None else worked.eager
