"""What the launches of a benchmark problem do on a GPU, counted without one: the JSON that cuda_model.py reads.

A file is ``{"problems": [...]}``. A problem is named as a row of kernels.py: op, label, dtype and passes. It has

- ``source``: "traced" where the kernels ran in the emulation and were watched;
- ``minimum_bytes``: each input read once and each output written once; ``minimum_flops`` and ``math``, the type they
  are multiplied in (a key of ``Machine.tensor`` or ``Machine.ordinary``);
- ``launches`` in their order, each with the counts below, of the whole grid. A producer that watches some blocks gives
  their number as ``sampled_blocks`` and scales what it counted to the grid.

Fields that have their default are left out. Where launches are the same, ``launches`` has each once and ``order`` says
which follows which. cuda_counts.json has every benchmark case; cuda_traffic.py makes it.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

__all__ = ["COUNTS", "MATH", "Launch", "Problem", "Product", "Sweep", "load", "save"]

COUNTS = Path(__file__).with_name("cuda_counts.json")
# What the types in the names of products, such as m16n8k16.bf16, are elsewhere.
MATH = {"bf16": "bfloat16", "f16": "float16", "tf32": "tf32"}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch.

    kernel: its name as in machine_code.csv, such as ``info_nce::score<float, InTf32>``, which ``short_names`` of
        machine_code.py makes of a symbol; without colons, such as "memset", it is PyTorch's or the runtime's.
    grid, block: blocks, and threads of one. dynamic_shared_bytes: of a block.
    sampled_blocks: blocks that were watched; 0 where the counts were worked out by hand.
    requests, bytes, sectors: of global memory, those of asynchronous copies among the reads: instructions of warps,
        bytes that threads ask for, and sectors of 32 bytes that each request touches.
    unique bytes: different ones, in whole sectors: what must come from and go to device memory at least.
    shared_requests: instructions of warps that access shared memory, ldmatrix among them. shared_wavefronts: passes of
        128 bytes that they take, those of asynchronous copies into shared memory among them; conflict_wavefronts: how
        many of them bank conflicts cost.
    mma: instructions of warps by shape and type, such as ``m16n8k16.bf16``.
    ldmatrix, barriers, shuffles: instructions of warps. copies: asynchronous copies of threads by their bytes.
    accesses: of threads, to any memory.
    multiplies: multiply-adds of threads on the ordinary units by type, ``float32`` or ``float64``.
    transcendentals: exponentials, logarithms, reciprocals and roots of threads.
    instructions: of warps; None leaves it to the model, which takes them from the machine code.
    busiest: what the multiprocessor with most to do has to do, as a multiple of their mean, where blocks stay and take
        their shares of the work: 1.08 where 340 blocks share 4096 tiles, and some take 13.
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
        """What a row of kernels.py has too."""
        return self.op, self.label, self.dtype, self.passes


@dataclass(frozen=True)
class Product:
    """A matrix product of cuBLAS or cuDNN, [m, k] times [k, n]. math: what it is multiplied in. size: bytes a value."""

    m: float
    n: float
    k: float
    math: str
    size: int = 4


@dataclass(frozen=True)
class Sweep:
    """A pass over memory, such as an elementwise kernel: bytes read and written. kernels: launches that share them."""

    bytes: float
    kernels: int = 1


def save(path: Path, problems: list[Problem]) -> None:
    """Counts become whole numbers. A problem and each of its launches take a line, so that differences can be read."""
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
    """Fields without their default, launches apart."""
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
    """ValueError, TypeError or IndexError for what is not as above."""

    def problem(values: dict[str, Any]) -> Problem:
        launches = [Launch(**launch) for launch in values.pop("launches")]
        order = values.pop("order", range(len(launches)))
        return Problem(**values, launches=tuple(launches[i] for i in order))

    return [problem(values) for values in json.loads(path.read_text())["problems"]]
