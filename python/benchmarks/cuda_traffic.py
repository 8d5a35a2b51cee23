"""Counts the memory accesses of our CUDA kernels in the benchmarks' problems, in an emulation without a GPU.

Each problem of kernels.py runs in the emulation, with a sample of the blocks of each launch, and
csrc/core/cuda/emulation/traffic.h counts every access. Prints a table; with ``--out`` writes the counts for
cuda_model.py. With ``--check`` the program fails if a kernel requests more than traffic_budgets.py allows.
CPC_EXT_NATIVE must name a module that was built with -DCPC_EXT_TRACE=ON.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# Shared memory of a block and number of multiprocessors of an H100, which kernels query.
os.environ.setdefault("CPC_EMULATION_SHARED_KIB", "227")
os.environ.setdefault("CPC_EMULATION_MULTIPROCESSORS", "132")

import torch
from benchmark import Case, Op
from cuda_counts import MATH, Launch, Problem, save
from kernels import DTYPES, chosen_cases
from ops import counted_ops
from traffic_budgets import BUDGETS, Place, Traced, check, excess, ratio, read_budgets, write_budgets

sys.path.append(str(Path(__file__).resolve().parents[1]))
from machine_code import short_name

import cpc_ext.ops
from cpc_ext._native import native

__all__ = ["trace", "trace_case"]

SECTOR = 32
# Blocks of a launch that are run: enough to cover edges and the middle, few enough for thousands of rows.
BLOCKS = 4
# A byte whose repetition is a small number in any type: 0.0115 in float32 and bfloat16, 1.06 in float16.
FILL = 0x3C
# Ways of access that read, and that write.
READS, WRITES = ("read", "copied_from"), ("write", "atomic")


def _is_workspace(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is a workspace, the only tensors that are flat uint8."""
    return tensor.dtype == torch.uint8 and tensor.ndim == 1


class _Recorder:
    """Stands in for the compiled module, and records all tensors that its functions were given.

    It fills workspaces first. Otherwise a kernel that skips zeros of a previous kernel would skip values that this
    kernel's blocks would have written if they had been run.
    """

    def __init__(self) -> None:
        self.tensors: dict[int, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(native, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **named: Any) -> Any:
            for one in (*arguments, *named.values()):
                if isinstance(one, torch.Tensor) and one.numel():
                    self.tensors[one.untyped_storage().data_ptr()] = one
                    if _is_workspace(one):
                        one.fill_(FILL)
            return value(*arguments, **named)

        return call


@contextlib.contextmanager
def _recorded() -> Iterator[_Recorder]:
    recorder = _Recorder()
    modules = [
        importlib.import_module(info.name) for info in pkgutil.iter_modules(cpc_ext.ops.__path__, "cpc_ext.ops.")
    ]
    modules = [module for module in modules if getattr(module, "native", None) is native]
    native.emulate_cuda(True)
    try:
        for module in modules:
            vars(module)["native"] = recorder
        yield recorder
    finally:
        for module in modules:
            vars(module)["native"] = native
        native.emulate_cuda(False)


def trace(call: Callable[[], Any], *, blocks: int = BLOCKS) -> tuple[list[Traced], list[torch.Tensor]]:
    """Trace a call on CPU tensors, and return its launches and the tensors that the kernels were given.

    Args:
        call: the call; its results are wrong, as not all blocks are run.
        blocks: number of blocks of each launch to run, one from each of as many equal parts of its grid; 0 runs all.
    """
    with _recorded() as recorder:
        native.begin_trace({"traffic": {}}, blocks)
        try:
            call()
        finally:
            launches = native.end_trace()["traffic"]
    tensors = list(recorder.tensors.values())
    ranges = [(one.untyped_storage().data_ptr(), one.untyped_storage().nbytes()) for one in tensors]
    return [_traced(launch, ranges) for launch in launches], tensors


def _traced(counted: dict[str, Any], ranges: Sequence[tuple[int, int]]) -> Traced:
    places = tuple(Place(**one) for one in counted["places"])
    scale = counted["grid"] / counted["blocks_run"]

    def total(what: str, ways: Sequence[str], space: str) -> float:
        return scale * sum(getattr(one, what) for one in places if one.way in ways and one.space == space)

    everything = (*READS, *WRITES, "copied_to", "matrix")
    wavefronts, ideal = (total(what, everything, "shared") for what in ("units", "ideal"))
    return Traced(
        Launch(
            kernel=short_name(counted["function"]),
            grid=counted["grid"],
            block=counted["block"],
            dynamic_shared_bytes=counted["shared_bytes"],
            sampled_blocks=counted["blocks_run"],
            read_requests=total("requests", READS, "global"),
            write_requests=total("requests", WRITES, "global"),
            read_bytes=total("bytes", READS, "global"),
            written_bytes=total("bytes", WRITES, "global"),
            read_sectors=total("units", READS, "global"),
            written_sectors=total("units", WRITES, "global"),
            unique_read_bytes=_unique(counted["stretches"], 2, ranges, scale),
            unique_written_bytes=_unique(counted["stretches"], 3, ranges, scale),
            shared_requests=total("requests", ("read", "write", "atomic", "matrix"), "shared"),
            shared_wavefronts=wavefronts,
            conflict_wavefronts=wavefronts - ideal,
            mma={shape: scale * count for shape, count in counted["mma"].items()},
            ldmatrix=total("requests", ("matrix",), "shared"),
            copies={size: scale * count for size, count in counted["copies"].items()},
            multiplies={kind: scale * count for kind, count in counted["multiplies"].items() if count},
            transcendentals=scale * counted["special"],
            barriers=scale * counted["barriers"],
            shuffles=scale * counted["shuffles"],
            accesses=total("lanes", everything, "shared") + total("lanes", everything, "global"),
        ),
        places,
    )


def _unique(stretches: Sequence[Sequence[int]], column: int, ranges: Sequence[tuple[int, int]], scale: float) -> float:
    """Estimate the distinct bytes that the whole grid touches: those of the blocks that were run, scaled to the grid.

    The estimate for a tensor is limited to its size, so that data which all blocks share is not counted repeatedly.
    """
    of_range = dict.fromkeys(range(len(ranges)), 0)
    elsewhere = 0
    for stretch in stretches:
        owner = next(
            (i for i, (at, size) in enumerate(ranges) if at <= stretch[0] + SECTOR and stretch[0] < at + size), -1
        )
        if owner < 0:
            elsewhere += stretch[column]
        else:
            of_range[owner] += stretch[column]
    known = sum(min(scale * count * SECTOR, ranges[i][1] + SECTOR) for i, count in of_range.items())
    return known + scale * elsewhere * SECTOR


def trace_case(op: Op, case: Case, *, blocks: int = BLOCKS) -> tuple[Problem, list[Traced]]:
    """Trace a benchmark case, and return it as a problem for cuda_model.py with its launches."""
    torch.manual_seed(0)
    problem = op.prepare(case, torch.device("cpu"))
    traced, tensors = trace(problem.alternatives[problem.compared], blocks=blocks)
    proper = [one for one in tensors if not _is_workspace(one)]
    products = {math for one in traced for math in one.launch.mma}
    counts = Problem(
        op=op.name,
        label=case.label,
        dtype=case.dtype,
        passes="forward+backward" if case.backward else "forward",
        source="traced",
        minimum_bytes=float(sum(one.nbytes for one in proper)),
        minimum_flops=problem.work if op.bound == "compute" else 0,
        math=MATH[min(products).partition(".")[2]] if products else case.dtype,
        launches=tuple(one.launch for one in traced),
    )
    return counts, traced


def print_problem(problem: Problem, traced: Sequence[Traced]) -> None:
    print(f"\n{problem.op}  {problem.label}  {problem.dtype}  {problem.passes}")
    print(f"  at least {problem.minimum_bytes / 2**20:.2f} MiB; launches touch {excess(problem):.2f} times as much")
    print(f"  {'kernel':<52}{'blocks':>8}{'unique':>9}{'asked':>9}{'sectors':>9}{'conflicts':>11}{'mma':>11}")
    for one in traced:
        launch = one.launch
        unique = (launch.unique_read_bytes + launch.unique_written_bytes) / 2**20
        asked = (launch.read_sectors + launch.written_sectors) * SECTOR / 2**20
        sectors, conflicts = ratio(one.places, "global"), ratio(one.places, "shared")
        print(
            f"  {launch.kernel:<52}{launch.grid:>8}{unique:>9.2f}{asked:>9.2f}{sectors:>9.2f}"
            f"{conflicts:>11.2f}{sum(launch.mma.values()):>11.3g}"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = list(counted_ops())
    parser.add_argument("--op", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="dtypes of every case (default: the case's own)")
    parser.add_argument(
        "--blocks", type=int, default=BLOCKS, help=f"number of blocks to run of each launch (default {BLOCKS}; 0: all)"
    )
    parser.add_argument("--quick", action="store_true", help="only a few small sizes")
    parser.add_argument("--places", action="store_true", help="also show each kernel's places with the most traffic")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the counts there")
    parser.add_argument("--check", action="store_true", help="exit with status 1 if a kernel exceeds its limits")
    parser.add_argument("--update", action="store_true", help=f"write these counts as budgets to {BUDGETS.name}")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    if not hasattr(native, "begin_trace"):
        sys.exit("CPC_EXT_NATIVE must name a module built with -DCPC_EXT_TRACE=ON")
    ops, results = counted_ops(), []
    for name in arguments.op:
        for case in chosen_cases(ops[name], arguments.dtype, arguments.quick):
            problem, traced = trace_case(ops[name], case, blocks=arguments.blocks)
            results.append((problem, traced))
            print_problem(problem, traced)
            if arguments.places:
                print_places(traced)
    print(
        "\nunique: MiB of device memory that a launch touches; asked: those of all requests, before any cache; sectors,"
        "\nconflicts: sectors of device memory and wavefronts of shared memory, as multiples of how few would do"
    )
    if arguments.out is not None:
        save(arguments.out, [problem for problem, _ in results])
        print(f"written: {arguments.out}")
    if arguments.update:
        write_budgets(results)
    if arguments.check:
        wrong = check(results, read_budgets())
        print("\n".join(["", *wrong] if wrong else ["\nno kernel asks for more than it may"]))
        sys.exit(1 if wrong else 0)


def print_places(traced: Sequence[Traced]) -> None:
    for one in traced:
        for place in sorted(one.places, key=lambda place: place.ideal - place.units)[:5]:
            if place.units > place.ideal:
                print(f"    {place.way} {place.space}: {place.units} for {place.ideal}  {place.place}")


if __name__ == "__main__":
    main(parse_arguments())
