"""Predicts or measures the time of the matrix product that our kernels share (csrc/core/cuda/product.cuh), by itself.

    python python/benchmarks/cuda_product.py --trace build/trace-cpython-311/product_check
    python python/benchmarks/cuda_product.py --measure    # on this machine's GPU

tests/csrc/product_check.cu, built with -DCPC_EXT_TRACE=ON, counts the work of a tile in the emulation. nvcc compiles
each product, and the rest is taken from the machine code. Each time is printed next to the ceiling, which is what
mma.sync reaches on that GPU. Products of warp groups, with instructions that only compute capability 9.0 has, are
measured, but not predicted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from cuda_counts import MATH, Launch
from cuda_machines import MACHINES, Machine
from cuda_model import Code, Predicted, blocks_at_once, flops_of, predict_launch
from machine import at_least

sys.path.append(str(Path(__file__).resolve().parents[1]))
import machine_code
from machine_code import Kernel, find_tool, measure, reads_ahead

__all__ = ["PRODUCTS", "Product", "code_of", "compile_for_gpu", "compile_product", "count_tile", "predict"]

REPOSITORY = Path(__file__).resolve().parents[2]
SIDE = 8192
SECTOR = 32
REPEATS = 9  # Number of measurements of which the median is taken.


@dataclass(frozen=True)
class Product:
    """A product of product_check.cu: its name, template arguments, rows and columns of a tile, and bytes of a value."""

    name: str
    arguments: str
    rows: int
    columns: int
    size: int


def _products() -> dict[str, Product]:
    maths = {
        "bfloat16": ("TensorCores<BFloat16>", 2),
        "float16": ("TensorCores<Half>", 2),
        "tf32": ("TensorCores<float>", 4),
        "split_tf32": ("SplitTf32", 4),
    }
    tiles = {
        "square": ("SquareTile", 128, 128),
        "wide": ("WideTile", 128, 256),
        "low": ("LowTile", 64, 128),
        "square_groups": ("SquareGroups", 128, 128),
        "wide_groups": ("WideGroups", 128, 256),
    }
    found = {}
    for math, (math_type, size) in maths.items():
        for tile, (tile_type, rows, columns) in tiles.items():
            if tile.endswith("groups") and math != "bfloat16":
                continue
            if math not in ("bfloat16", "tf32") and tile != "square":
                continue
            for operands in ("rows-rows", "rows-columns", "columns-columns"):
                loaders = ", ".join(one.capitalize() for one in operands.split("-"))
                name = f"{math} {tile} {operands}"
                found[name] = Product(name, f"{math_type}, {tile_type}, {loaders}", rows, columns, size)
    return found


PRODUCTS = _products()


# --- What the compiler makes of it ---


def compile_product(product: Product, architecture: int, folder: Path) -> tuple[Kernel, float]:
    """Compile a product, and return the kernel and the seconds that nvcc took. Raises FileNotFoundError without nvcc.

    For 9.0 it compiles with architecture-specific features: groups of warps then multiply with wgmma.
    """
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise FileNotFoundError("no nvcc")
    source = folder / f"{product.name.replace(' ', '_')}_{architecture}.cu"  # nvcc splits options at commas.
    check = REPOSITORY / "tests" / "csrc" / "product_check.cu"
    source.write_text(f'#define CPC_ONE_PRODUCT {product.arguments}\n#include "{check}"\n')
    cubin = source.with_suffix(".cubin")
    begin = time.perf_counter()
    subprocess.run([nvcc, *_options(architecture), "-cubin", source, "-o", cubin], check=True)
    seconds = time.perf_counter() - begin
    (kernel,) = machine_code.read_kernels(cubin, architecture).values()
    return kernel, seconds


def _options(architecture: int) -> list[str]:
    target = {90: "90a"}.get(architecture, str(architecture))
    generated = f"-gencode=arch=compute_{target},code=sm_{target}"
    return ["-std=c++20", "--expt-relaxed-constexpr", f"-I{REPOSITORY / 'csrc'}", generated]


def compile_for_gpu(source: Path, folder: Path) -> Path:
    """Compile a CUDA file to a program for this machine's GPU. Raises FileNotFoundError without nvcc."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        raise FileNotFoundError("no nvcc")
    major, minor = torch.cuda.get_device_capability()
    program = folder / source.stem
    subprocess.run([nvcc, "-O2", *_options(10 * major + minor), source, "-o", program], check=True)
    return program


def code_of(kernel: Kernel) -> Code:
    return replace(Code.of(measure(kernel)), reads_ahead=reads_ahead(kernel.main_loop))


# --- What a tile does ---


def _counts(program: Path, product: Product, depth: int) -> dict[str, Any]:
    """Return product_check's counts for one tile."""
    command = [program, *product.name.split(), str(product.rows), str(product.columns), str(depth)]
    environment = {**os.environ, "CPC_EMULATION_SHARED_KIB": "227"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    (launch,) = json.loads(done.stdout)["traffic"]
    return launch  # type: ignore[no-any-return]


def _launch(counted: Mapping[str, Any]) -> Launch:
    def total(what: str, ways: Sequence[str], space: str) -> float:
        places = [one for one in counted["places"] if one["way"] in ways and one["space"] == space]
        return float(sum(one[what] for one in places))

    of_shared = ("read", "write", "matrix", "copied_to")
    return Launch(
        kernel="product",
        grid=1,
        block=counted["block"],
        dynamic_shared_bytes=counted["shared_bytes"],
        read_requests=total("requests", ("copied_from",), "global"),
        write_requests=total("requests", ("write",), "global"),
        read_sectors=total("units", ("copied_from",), "global"),
        written_sectors=total("units", ("write",), "global"),
        shared_requests=total("requests", ("read", "write", "matrix"), "shared"),
        shared_wavefronts=total("units", of_shared, "shared"),
        conflict_wavefronts=total("units", of_shared, "shared") - total("ideal", of_shared, "shared"),
        mma={name: float(count) for name, count in counted["mma"].items()},
        copies={size: float(count) for size, count in counted["copies"].items()},
        barriers=float(counted["barriers"]),
        shuffles=float(counted["shuffles"]),
    )


def _combined(first: Any, second: Any, share: float) -> Any:
    """Interpolate or extrapolate counts linearly from first (share 0) to second (share 1)."""
    if isinstance(first, dict):
        return {name: _combined(first[name], second[name], share) for name in first}
    return first + share * (second - first) if isinstance(first, float) else first


def count_tile(program: Path, product: Product, depth: int) -> Launch:
    """Count the work of one tile. Counts are linear in the depth, so that they follow from two smaller depths."""
    shallow, deep = 256, 512
    one, two = (_launch(_counts(program, product, each)) for each in (shallow, deep))
    share = (depth - shallow) / (deep - shallow)
    pairs = {each.name: (getattr(one, each.name), getattr(two, each.name)) for each in fields(one)}
    return Launch(**{name: _combined(*pair, share) for name, pair in pairs.items()})


# --- The whole product ---


def of_all_tiles(machine: Machine, tile: Launch, product: Product, code: Code, side: int) -> Launch:
    """Return the launch that multiplies matrices of side x side with persistent blocks."""
    tiles = -(-side // product.rows) * -(-side // product.columns)
    grid = min(tiles, machine.multiprocessors * blocks_at_once(machine, tile, code))
    of_launch = ("kernel", "grid", "block", "dynamic_shared_bytes", "busiest", "instructions")
    scaled = {
        each.name: _scaled(getattr(tile, each.name), tiles) for each in fields(tile) if each.name not in of_launch
    }
    return replace(
        replace(tile, **scaled),
        grid=grid,
        unique_read_bytes=2 * side * side * product.size,
        unique_written_bytes=tile.written_sectors * SECTOR * tiles,
        busiest=-(-tiles // grid) * grid / tiles,
    )


def _scaled(value: Any, by: float) -> Any:
    return {name: by * count for name, count in value.items()} if isinstance(value, dict) else by * value


@dataclass(frozen=True)
class Share:
    """A predicted time, and its ceiling, the time of the products on tensor cores alone."""

    time: Predicted
    ceiling: float

    @property
    def of_ceiling(self) -> float:
        return self.ceiling / self.time.seconds


def predict(machine: Machine, tile: Launch, product: Product, code: Code, side: int = SIDE) -> Share:
    launch = of_all_tiles(machine, tile, product, code, side)
    rates = {name: machine.tensor[MATH[name.rpartition(".")[2]]] * machine.mma_share for name in launch.mma}
    clocks = sum(count * flops_of(name) / rates[name] for name, count in launch.mma.items())
    return Share(predict_launch(machine, launch, code), clocks / (machine.multiprocessors * machine.clock))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--trace", type=Path, metavar="PROGRAM", help="predict with product_check of a trace build")
    what.add_argument("--measure", action="store_true", help="measure on this machine's GPU")
    parser.add_argument(
        "--product", nargs="+", choices=list(PRODUCTS), metavar="NAME", help="products (default: all of rows)"
    )
    parser.add_argument("--machine", nargs="+", default=list(MACHINES), choices=list(MACHINES))
    parser.add_argument("--side", type=at_least(1), default=SIDE, help=f"rows, columns and depth (default {SIDE})")
    arguments = parser.parse_args()
    if arguments.measure and not torch.cuda.is_available():
        parser.error("--measure needs a GPU, and PyTorch with CUDA")
    if arguments.product is None:
        of_rows = [name for name in PRODUCTS if "rows-rows" in name]
        arguments.product = [name for name in of_rows if arguments.measure or "groups" not in name]
    return arguments


def measured(arguments: argparse.Namespace) -> None:
    side = arguments.side
    print(f"measured on {torch.cuda.get_device_name()}, {side} x {side} x {side}, the median of {REPEATS}")
    with tempfile.TemporaryDirectory() as folder:
        program = compile_for_gpu(REPOSITORY / "tests" / "csrc" / "product_check.cu", Path(folder))
        for name in arguments.product:
            command = [program, *name.split(), *[str(side)] * 3]
            environment = {**os.environ, "REPEATS": str(REPEATS)}
            done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
            milliseconds = float(done.stdout)
            print(f"{name:<32}{milliseconds:>8.3f} ms, {2 * side**3 / milliseconds / 1e9:.0f} TFLOP/s", flush=True)


def predicted(arguments: argparse.Namespace) -> None:
    print(f"predicted, for {arguments.side} x {arguments.side} x {arguments.side}; the ceiling is mma.sync's")
    with tempfile.TemporaryDirectory() as folder:
        for product in (PRODUCTS[name] for name in arguments.product):
            tile = count_tile(arguments.trace, product, arguments.side)
            codes: dict[int, Code] = {}
            for machine in (MACHINES[name] for name in arguments.machine):
                if machine.sm not in codes:
                    kernel, seconds = compile_product(product, machine.sm, Path(folder))
                    codes[machine.sm] = code_of(kernel)
                    print(f"{product.name}: sm_{machine.sm}: {measure(kernel)}, compiled in {seconds:.1f} s")
                share = predict(machine, tile, product, codes[machine.sm], arguments.side)
                terms = ", ".join(f"{name} {value * 1e3:.2f}" for name, value in share.time.terms.items() if value > 0)
                print(
                    f"{product.name:<32}{machine.name:<10}{share.time.seconds * 1e3:>8.3f} ms, {share.of_ceiling:.1%}"
                    f" of the ceiling, bound by {share.time.bound} ({terms})",
                    flush=True,
                )


if __name__ == "__main__":
    given = parse_arguments()
    measured(given) if given.measure else predicted(given)
