"""The product that kernels share (csrc/core/cuda/product.cuh): it is right, and has no races and no bank conflicts.

Tests of its machine code and its predicted time on GPUs are in test_product_speed.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

# Errors of the results from rounding results and operands, as a share of the sum of the products' magnitudes.
TOLERANCES = {
    ("bfloat16", "square"): 1.001 * 2**-8,
    ("float16", "square"): 1.001 * 2**-11,
    "bfloat16": 2**-21,
    "float16": 2**-21,
    "tf32": 2**-10,
    "split_tf32": 2**-19.5,
}
PRODUCTS = [
    f"{math} {tile} {operands}"
    for math, tile in [
        *(("bfloat16", tile) for tile in ("square", "wide", "low", "fifth")),
        ("float16", "square"),
        *(("tf32", tile) for tile in ("square", "wide", "low")),
        ("split_tf32", "square"),
        *(("bfloat16", f"{tile}_groups") for tile in ("square", "wide", "fifth")),
        ("float16", "wide_groups"),
    ]
    for operands in ("rows-rows", "rows-columns", "columns-columns")
]
TEAMS = ["bfloat16 middle_teams taps", "bfloat16 low_teams taps"]
CONVOLUTIONS = ["bfloat16 square taps", "tf32 low taps", *TEAMS]
# Rows, columns and depth: only edges; odd sizes; several tiles; fewer slices of depth than stages; several slices; no
# depth.
SIZES = [(1, 1, 1), (131, 263, 77), (300, 257, 129), (128, 256, 64), (65, 9, 200), (5, 7, 0)]


def run(program: Path, product: str, size: tuple[int, int, int], **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"} | variables
    if "groups" in product:  # GPUs with wgmma have this much.
        environment["CPC_EMULATION_SHARED_KIB"] = "227"
    environment.pop("LD_PRELOAD", None)  # The program has its own sanitizer; this process may run under another.
    command = [program, *product.split(), *map(str, size)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def error_of(program: Path, product: str, size: tuple[int, int, int], **variables: str) -> float:
    done = run(program, product, size, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return float(done.stdout)


def tolerance_of(product: str) -> float:
    math, tile, _ = product.split()
    return TOLERANCES.get((math, tile), TOLERANCES.get(math, 0.0))


@pytest.fixture
def program(emulation: Path) -> Path:
    return emulation / "product_check"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("product", PRODUCTS)
def test_products_are_right(program, product, size):
    assert error_of(program, product, size) <= tolerance_of(product)


@pytest.mark.parametrize(
    "product", ["bfloat16 square rows-columns", "bfloat16 low columns-columns", "tf32 wide rows-rows"]
)
def test_entries_of_a_batch_are_products_of_their_own(program, product):
    assert error_of(program, product, (131, 150, 80), ENTRIES="3") <= tolerance_of(product)


@pytest.mark.cuda
def test_products_are_right_on_the_gpu(compiled_for_gpu):
    program = compiled_for_gpu("product_check")
    for product in PRODUCTS:
        for size in SIZES if "groups" in product else [(300, 257, 129)]:
            assert error_of(program, product, size) <= tolerance_of(product) + 2**-18, (product, size)


# Images, outputs and channels: slices of several taps, slices with parts of two taps, and taps of several slices.
@pytest.mark.parametrize(
    ("product", "size"),
    [
        *((product, size) for product in CONVOLUTIONS[:2] for size in [(1, 5, 8), (3, 130, 24), (2, 64, 80)]),
        # Tiles of two teams need taps that are whole pairs of slices, and columns that are whole chunks.
        *((product, size) for product in TEAMS for size in [(1, 8, 64), (3, 136, 128), (2, 64, 192)]),
    ],
)
def test_convolutions_are_right(program, product, size):
    assert error_of(program, product, size) <= TOLERANCES[product.split()[0]]


@pytest.mark.parametrize(
    "variables",
    [
        *({"CPC_EMULATION_SHARED_KIB": str(kib)} for kib in (99, 163, 227)),
        *({"CPC_EMULATION_GRID": str(blocks)} for blocks in (1, 3)),
        *({"CPC_EMULATION_ORDER": order} for order in ("forward", "backward", "greedy")),
        {"CPC_EMULATION_COPIES": "early"},
        {"CPC_EMULATION_MULTIPROCESSORS": "132"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "product",
    [
        *("bfloat16 square columns-columns", "bfloat16 wide rows-rows"),
        *("tf32 low columns-columns", "split_tf32 square rows-rows"),
        *("bfloat16 square_groups columns-columns", "bfloat16 fifth_groups rows-columns"),
    ],
)
def test_products_are_the_same_whatever_a_gpu_does(program, product, variables):
    assert error_of(program, product, SEVERAL_TILES, **variables) == usual_error(program, product)


SEVERAL_TILES = (260, 270, 77)


@cache
def usual_error(program: Path, product: str) -> float:
    return error_of(program, product, SEVERAL_TILES)


@pytest.mark.parametrize("product", [name for name in PRODUCTS if "square" in name])
def test_products_are_right_with_a_tensor_cores_sums(program, product):
    """Tensor cores truncate their sums, so errors grow with the depth, also those of split products."""
    assert error_of(program, product, (65, 70, 500), CPC_EMULATION_MATH="gpu") <= tolerance_of(product) + 2**-18


def test_split_products_are_more_exact_by_far(program):
    plain, split = (error_of(program, f"{math} square rows-rows", (65, 70, 200)) for math in ("tf32", "split_tf32"))
    assert split < plain / 300


def test_operands_that_no_product_takes_are_refused(program):
    assert error_of(program, "bfloat16 square refused", (16, 16, 24)) == 0


def test_every_product_is_run(program):
    names = subprocess.run([program], capture_output=True, text=True, check=False).stdout.split("\n")
    assert sorted(filter(None, names)) == sorted([*PRODUCTS, *CONVOLUTIONS, "bfloat16 square refused"])


# --- Accesses ---


def traced(program: Path, product: str, size: tuple[int, int, int], **variables: str) -> dict:
    done = run(program, product, size, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    (launch,) = json.loads(done.stdout)["traffic"]
    return launch


def conflicts(launch: dict) -> int:
    return sum(place["units"] - place["ideal"] for place in launch["places"] if place["space"] == "shared")


@pytest.mark.parametrize("blocks", [None, 1])
@pytest.mark.parametrize("product", [*PRODUCTS, *CONVOLUTIONS])
def test_products_neither_race_nor_conflict(trace, product, blocks):
    grid = {} if blocks is None else {"CPC_EMULATION_GRID": str(blocks)}
    size = (300, 300, 136)
    if product in CONVOLUTIONS:
        size = (4, 136, 64 if product in TEAMS else 24)
    launch = traced(trace / "product_check", product, size, **grid)
    assert conflicts(launch) == 0
    assert set(launch["copies"]) == {"16"}
    reads = [place for place in launch["places"] if place["way"] == "read"]
    assert all(place["space"] == "shared" for place in reads)  # Of values that ldmatrix cannot transpose.


@pytest.mark.parametrize("product", [name for name in PRODUCTS if name.startswith(("bfloat16", "tf32"))])
def test_whole_tiles_ask_for_no_more_sectors_than_they_need(trace, product):
    columns = 640 if "fifth" in product else 512
    launch = traced(trace / "product_check", product, (256, columns, 256))
    of_global = [place for place in launch["places"] if place["space"] == "global"]
    assert of_global
    assert all(place["units"] == place["ideal"] for place in of_global)


# --- Planted faults are found ---

ONE = "'-DCPC_ONE_PRODUCT=TensorCores<BFloat16>, SquareTile, Rows, Rows'"

# A line of a header, and its replacement. Comments in these lines must match the header's.
RACES = {
    "barrier": ("__syncthreads();  // The next slice is there for all, and all have read this one.", ""),
    "entry": ("__syncthreads();  // The first slice is there for all.", ""),
    "wait": ("wait_for_copies<Tile::kStages - 2>();", "wait_for_copies<Tile::kStages - 1>();"),
    "stage": ("if (last) this->start(free);", "if (step == 0) this->start(free);"),
}
RACES_OF_GROUPS = {
    "barrier": ("pass();  // The next slice is there for all, and all have read the one before.", ""),
    "wait": ("wait_for_copies<Tile::kStages - 2>();", "wait_for_copies<Tile::kStages - 1>();"),
    "products": ("wait_for_all_but<1>(sums);", "wait_for_all_but<2>(sums);"),
    "stage": ("this->start(stage_ == 0 ? kRing - 1 : stage_ - 1);", "this->start(stage_);"),
}
RACES_OF_TEAMS = {
    "given": ("__syncthreads();  // What the other team gives is there.", ""),
    "taken": ("__syncthreads();  // What follows overwrites it.", ""),
}


@pytest.mark.parametrize("fault", RACES)
def test_a_planted_race_is_found(trace, tmp_path, fault):
    done = run(program_with(trace, "product.cuh", *RACES[fault], tmp_path), "one of them", (130, 140, 200))
    assert done.returncode == 1
    assert re.match(r"kernel multiply: \d+ races?\n", done.stdout)


@pytest.mark.parametrize("fault", RACES_OF_GROUPS)
def test_a_planted_race_of_groups_is_found(trace, tmp_path, fault):
    groups = ONE.replace("SquareTile", "SquareGroups")
    program = program_with(trace, "warpgroup_product.cuh", *RACES_OF_GROUPS[fault], tmp_path, groups)
    done = run(program, "one of them", (130, 140, 300))
    assert done.returncode == 1
    assert re.match(r"kernel multiply: \d+ races?\n", done.stdout)


@pytest.mark.parametrize("fault", RACES_OF_TEAMS)
def test_a_planted_race_of_two_teams_is_found(trace, tmp_path, fault):
    program = program_with(trace, "product.cuh", *RACES_OF_TEAMS[fault], tmp_path, "-DCPC_TWO_TEAMS")
    done = run(program, "one of them", (1, 8, 64))
    assert done.returncode == 1
    assert re.match(r"kernel convolve: \d+ races?\n", done.stdout)


def test_planted_conflicts_are_counted(trace, tmp_path):
    program = program_with(trace, "warp_product.cuh", "(chunk ^ (row / 2 % kChunksOfSlice))", "chunk", tmp_path)
    assert conflicts(traced(program, "one of them", (130, 140, 200))) > 1000


def program_with(trace: Path, header: str, line: str, instead: str, folder: Path, option: str = ONE) -> Path:
    """Build the traced program of one product from sources in which `line` is replaced by `instead`."""
    sources = folder / "csrc"
    shutil.copytree(REPOSITORY / "csrc", sources)
    text = (sources / "core" / "cuda" / header).read_text()
    assert text.count(line) == 1
    (sources / "core" / "cuda" / header).write_text(text.replace(line, instead))
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    commands = subprocess.run([ninja, "-C", trace, "-t", "commands", "product_check"], capture_output=True, text=True)
    *compile_commands, link = commands.stdout.strip().split("\n")
    (command,) = (one for one in compile_commands if "product_check.cu" in one)
    made, mine = re.search(r" -o (\S+)", command)[1], folder / "product_check.o"
    command = command.replace(f"-o {made}", f"{option} -o {mine}")
    command = command.replace(str(REPOSITORY / "csrc"), str(sources))
    link = link.replace(made, str(mine)).replace("-o product_check", f"-o {folder / 'product_check'}")
    for step in (command, link):
        done = subprocess.run(step, shell=True, cwd=trace, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder / "product_check"
