"""Counts of the work of a benchmark problem's launches on a GPU, made without one: the JSON that cuda_model.py reads.

A file is ``{"problems": [...]}``. A problem is named as a row of kernels.py: op, label, dtype and passes. It has

- ``source``: "traced" if the kernels were traced in the emulation;
- ``minimum_bytes``: each input read once and each output written once; ``minimum_flops``, and ``math``, the type of the
  multiplications (a key of ``Machine.tensor`` or ``Machine.ordinary``);
- ``launches`` in their order, each with the counts below, for the whole grid. A producer that traces some blocks states
  their number as ``sampled_blocks``, and scales their counts to the grid.

Fields with their default value are left out. Of identical launches, ``launches`` has one, and ``order`` gives the
sequence. cuda_counts.json has every benchmark case; cuda_traffic.py makes it.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = ["COUNTS", "MATH", "Launch", "Problem", "Product", "Sweep", "load", "save"]

COUNTS = Path(__file__).with_name("cuda_counts.json")
# Names of the types in the names of products, such as m16n8k16.bf16, in PyTorch and in machines.
MATH = {"bf16": "bfloat16", "f16": "float16", "tf32": "tf32"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch.

    kernel: its name in machine_code.csv, such as ``info_nce::score<float, InTf32>``, which ``short_names`` of
        machine_code.py makes of a symbol; a name without colons, such as "memset", is PyTorch's or the runtime's.
    grid, block: number of blocks, and of threads in a block. dynamic_shared_bytes: dynamic shared memory of a block.
    sampled_blocks: number of traced blocks; 0 if the counts were worked out by hand.
    requests, bytes, sectors: accesses to global memory: instructions of warps, bytes requested by threads, and sectors
        of 32 bytes touched by each request. Reads include those of asynchronous copies.
    unique bytes: bytes of distinct sectors, the least traffic from and to device memory.
    shared_requests: warp instructions that access shared memory, including ldmatrix. shared_wavefronts: passes of 128
        bytes that they take, including those of asynchronous copies into shared memory. conflict_wavefronts: those of
        the passes that are due to bank conflicts.
    mma: warp instructions by shape and type, such as ``m16n8k16.bf16``.
    ldmatrix, barriers, shuffles: warp instructions. copies: asynchronous copies of threads by their size in bytes.
    accesses: accesses of threads to any memory.
    multiplies: multiply-adds of threads on the ordinary units by type, ``float32`` or ``float64``.
    transcendentals: exponentials, logarithms, reciprocals and roots of threads.
    instructions: warp instructions; None leaves them to the model, which takes them from the machine code.
    busiest: work of the busiest multiprocessor relative to the mean, for persistent blocks that divide the work: 1.08
        if 340 blocks share 4096 tiles, of which some take 13.
    """

    kernel: str
    grid: int
    block: int
    dynamic_shared_bytes: int = 0
    sampled_blocks: int = 0
    read_requests: float = 0
    write_requests: float = 0
    read_bytes: float = 0
    written_bytes: float = 0
    read_sectors: float = 0
    written_sectors: float = 0
    unique_read_bytes: float = 0
    unique_written_bytes: float = 0
    shared_requests: float = 0
    shared_wavefronts: float = 0
    conflict_wavefronts: float = 0
    mma: dict[str, float] = field(default_factory=dict)
    ldmatrix: float = 0
    copies: dict[str, float] = field(default_factory=dict)
    barriers: float = 0
    shuffles: float = 0
    accesses: float = 0
    multiplies: dict[str, float] = field(default_factory=dict)
    transcendentals: float = 0
    instructions: float | None = None
    busiest: float = 1

    @property
    def warps(self) -> int:
        return self.grid * -(-self.block // 32)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem and its launches. passes: "forward" or "forward+backward"."""

    op: str
    label: str
    dtype: str
    passes: str
    source: str
    minimum_bytes: float
    minimum_flops: float = 0
    math: str = "float32"
    launches: tuple[Launch, ...] = ()

    @property
    def key(self) -> tuple[str, str, str, str]:
        """The key that the problem shares with a row of kernels.py."""
        return self.op, self.label, self.dtype, self.passes


@dataclass(frozen=True)
class Product:
    """A matrix product of cuBLAS or cuDNN, [m, k] times [k, n]. math: type of the products. size: bytes of a value."""

    m: float
    n: float
    k: float
    math: str
    size: int = 4


@dataclass(frozen=True)
class Sweep:
    """A pass over memory, such as an elementwise kernel. bytes: read and written. kernels: launches that share them."""

    bytes: float
    kernels: int = 1


def save(path: Path, problems: list[Problem]) -> None:
    """Write problems with rounded counts, and one line for each problem and launch, so that diffs can be read."""
    texts = []
    for problem in problems:
        every = [json.dumps(_changed(launch)) for launch in problem.launches]
        different = list(dict.fromkeys(every))
        order = [different.index(launch) for launch in every]
        head = _changed(problem) | ({"order": order} if len(every) > len(different) else {})
        launches = ",\n  ".join(different)
        texts.append(f'{json.dumps(head)[:-1]}, "launches": [\n  {launches}]}}')
    path.write_text('{"problems": [\n' + ",\n".join(texts) + "\n]}\n")


def _changed(counts: Launch | Problem) -> dict[str, Any]:
    """Return the fields that differ from their default, except launches."""
    changed = {}
    for each in fields(counts):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        value = _rounded(getattr(counts, each.name))
        if each.name != "launches" and value != default:
            changed[each.name] = value
    return changed


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(count) for name, count in value.items()}
    return round(value) if isinstance(value, float) else value


def load(path: Path) -> list[Problem]:
    """Read problems from a file. Raises ValueError, TypeError or IndexError if it does not have the form above."""

    def problem(values: dict[str, Any]) -> Problem:
        launches = [Launch(**launch) for launch in values.pop("launches")]
        order = values.pop("order", range(len(launches)))
        return Problem(**values, launches=tuple(launches[i] for i in order))

    return [problem(values) for values in json.loads(path.read_text())["problems"]]
