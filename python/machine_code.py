"""Measures the machine code of the CUDA kernels in the compiled module: registers, spills, loads and the main loop.

    python python/machine_code.py                           # the installed module, compute capability 9.0
    python python/machine_code.py --kernel score --loops    # these kernels, and each of their loops
    python python/machine_code.py --write                   # write the present figures as budgets to machine_code.csv

Nothing is compiled: cuobjdump and nvdisasm, which the ``test`` extra installs, read the kernels from the built module
(``CPC_EXT_NATIVE``, else the installed one). ``tests/csrc/test_machine_code.py`` compares every kernel with its line in
machine_code.csv.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field, fields
from functools import cached_property
from pathlib import Path

BUDGETS = Path(__file__).with_suffix(".csv")
ARCHITECTURES = (80, 90, 120)
# From compute capability 9.0 on, the shared memory that the system reserves in every block counts as the kernel's.
RESERVED_SHARED_BYTES = 1024


# --- Instructions, as cuobjdump prints them ---


@dataclass(frozen=True)
class Instruction:
    """One instruction, with the compiler's schedule: bits 105 to 125 of the 128 that encode it.

    A load sets one of six barriers until its value has arrived; instructions that need the value wait for that barrier.
    """

    address: int
    guard: str
    opcode: str
    operands: str
    schedule: int

    @cached_property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def is_tensor(self) -> bool:
        """True for a matrix product on tensor cores."""
        return self.name in ("HMMA", "IMMA", "DMMA", "QMMA", "OMMA", "HGMMA", "IGMMA", "QGMMA")

    @property
    def is_global_load(self) -> bool:
        """True for a load from global memory into registers or, by LDGSTS, into shared memory."""
        return self.name in ("LDG", "LDGSTS")

    @property
    def width(self) -> int:
        """Bytes that a thread moves."""
        found = re.search(r"\.(?:[US](8|16)|(64|128))(?:\.|$)", self.opcode)
        return int(found[1] or found[2]) // 8 if found else 4

    @property
    def barrier(self) -> int | None:
        """The barrier that is set until this instruction's result has arrived, or None."""
        number = self.schedule >> 5 & 7
        return None if number == 7 else number

    def waits_for(self, barrier: int) -> bool:
        if self.name == "DEPBAR":
            return self.operands.startswith(f"SB{barrier}, 0x0")
        return bool(self.schedule >> 11 >> barrier & 1)

    @property
    def target(self) -> int | None:
        """The address that a branch jumps to, or None."""
        found = re.search(r"\b0x([0-9a-f]+)$", self.operands) if self.name == "BRA" else None
        return int(found[1], 16) if found else None


@dataclass
class Kernel:
    """A kernel for one architecture. name: as in the sources, without namespaces except the op's."""

    name: str
    architecture: int
    registers: int
    shared: int
    stack: int
    code: list[Instruction] = field(default_factory=list)

    @cached_property
    def loops(self) -> list[Sequence[Instruction]]:
        """Code from the target of each backward branch to the branch; the outer one of nested loops comes first."""
        index = {instruction.address: i for i, instruction in enumerate(self.code)}
        ends: dict[int, int] = {}
        for i, instruction in enumerate(self.code):
            first = index.get(-1 if instruction.target is None else instruction.target, i)
            if first < i:
                ends[first] = i  # If several branches have the same target, the last one ends the loop.
        return [self.code[first : last + 1] for first, last in sorted(ends.items())]

    @cached_property
    def main_loop(self) -> Sequence[Instruction]:
        """The smallest loop with most tensor-core products or else multiply-adds; else the one with most loads."""

        for count in (_products, _multiplies):
            most = max(map(count, self.loops), default=0)
            if most > 0:
                return min((loop for loop in self.loops if count(loop) >= 0.9 * most), key=len)
        innermost = [loop for loop in self.loops if not any(_within(other, loop) for other in self.loops)]
        return max(innermost, key=lambda loop: (sum(i.is_global_load for i in loop), len(loop)), default=[])


def _products(code: Sequence[Instruction]) -> int:
    return sum(instruction.is_tensor for instruction in code)


def _multiplies(code: Sequence[Instruction]) -> int:
    """Return the number of multiply-adds if they are at least a quarter of the code, as in a matrix product, else 0.

    Divisions and exponentials have a smaller share.
    """
    count = sum(instruction.name in ("FFMA", "DFMA") for instruction in code)
    return count if 4 * count >= len(code) else 0


def _within(inner: Sequence[Instruction], outer: Sequence[Instruction]) -> bool:
    return outer[0].address <= inner[0].address and inner[-1].address <= outer[-1].address and inner is not outer


def find_tool(name: str) -> str | None:
    """Return the path of a program of CUDA, preferably the one in the wheel, or None."""
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations if spec else None) or ()
    folders = [str(folder) for place in places for folder in Path(place).glob("*/bin")]
    return shutil.which(name, path=os.pathsep.join([*folders, os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))


def _output(command: Sequence[str], **options: object) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout  # type: ignore[call-overload]


def _cuobjdump(*arguments: str) -> str:
    program, disassembler = find_tool("cuobjdump"), find_tool("nvdisasm")
    if program is None or disassembler is None:
        raise FileNotFoundError("cuobjdump and nvdisasm are missing: pip install -c constraints.txt '.[test]'")
    path = os.pathsep.join([str(Path(disassembler).parent), os.environ.get("PATH", "")])
    return _output([program, *arguments], env={**os.environ, "PATH": path})


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """Return the short names of kernels, such as ``info_nce::score<float, InTf32>``, by their mangled names."""
    mangled = list(mangled)
    demangled = _output(["c++filt"], input="\n".join(mangled)).splitlines()
    return {raw: short_name(whole) for raw, whole in zip(mangled, demangled, strict=True)}


def short_name(demangled: str) -> str:
    name = demangled.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\((?:int|bool|cpc::[\w:]+)\)", "", name)  # Casts of template arguments.
    op = re.search(r"cpc::(\w+)::cuda::", name)  # A kernel that ops share has only the op of its arguments.
    depth, end = 0, len(name)
    for i, character in enumerate(name):  # The parameters begin at the first parenthesis outside of template arguments.
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            end = i
            break
    short = re.sub(r"\b(?:\w+::)+", "", name[:end]).replace(" >", ">")
    return f"{op[1]}::{short}" if op else short


INSTRUCTION = re.compile(
    r"\s+/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?\w+)\s+)?"
    r"(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>.*?)\s*;\s+/\* 0x"
)
ENCODING = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")


def parse_code(lines: Iterable[str]) -> Iterator[tuple[str, Instruction]]:
    """Yield the instructions in the output of ``cuobjdump -sass``, with the mangled names of their functions."""
    function, pending = "", None
    for line in lines:
        if found := INSTRUCTION.match(line):
            pending = found
        elif pending and (found := ENCODING.match(line)):
            schedule = int(found[1], 16) >> 41 & 0x1FFFFF
            address, guard = int(pending["address"], 16), pending["guard"] or ""
            yield function, Instruction(address, guard, pending["opcode"], pending["operands"], schedule)
            pending = None
        elif found := re.match(r"\s+Function : (\S+)", line):
            function = found[1]


def read_kernels(module: Path, architecture: int, select: str = "") -> dict[str, Kernel]:
    """Return the kernels of a compiled module or cubin whose short names contain ``select``, by these names."""
    arguments = ("-arch", f"sm_{architecture}", str(module))
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", _cuobjdump("-res-usage", *arguments))
    names = short_names(name for name, *_ in usage)
    reserved = RESERVED_SHARED_BYTES if architecture >= 90 else 0
    kernels = {
        name: Kernel(names[name], architecture, int(registers), int(shared) - reserved, int(stack))
        for name, registers, stack, shared in usage
        if select in names[name]
    }
    if kernels:
        chosen = () if not select else ("-fun", ",".join(kernels))
        for name, instruction in parse_code(_cuobjdump("-sass", *chosen, *arguments).splitlines()):
            kernels[name].code.append(instruction)
    return {kernel.name: kernel for kernel in sorted(kernels.values(), key=lambda kernel: kernel.name)}


# --- Measures of a kernel ---


@dataclass(frozen=True)
class Measures:
    """Measures of a kernel's machine code.

    Of the whole kernel:

    - registers: registers per thread. shared: bytes of static shared memory. stack: bytes per thread in local memory.
    - local: instructions that access local memory, because values were spilled or are indexed by variables.
    - generic: accesses whose memory space is known only at run time. calls: calls of functions, such as long divisions.
    - split: narrow global loads in groups of four or more neighbouring values, which one wide load could replace.

    Of its main loop:

    - loop: instructions. tensor: products on tensor cores. multiplies: multiply-adds on the ordinary units.
    - barriers: __syncthreads and the like.
    - loads: loads from global memory. load_bytes: bytes that a thread loads with them.
    - waits: places that wait for such a load. ahead: groups of asynchronous copies that may still be in flight.
    - early: loads that a loop, which multiplies values from shared memory, waits for before it multiplies anything, so
      that no computation hides their latency.
    """

    registers: int
    shared: int
    stack: int
    local: int
    generic: int
    calls: int
    split: int
    loop: int
    tensor: int
    multiplies: int
    barriers: int
    loads: int
    load_bytes: int
    waits: int
    early: int
    ahead: int


def measure(kernel: Kernel) -> Measures:
    names = Counter(instruction.name for instruction in kernel.code)
    loop = kernel.main_loop
    loads = [instruction for instruction in loop if instruction.is_global_load]
    tensor, multiplies = _products(loop), _multiplies(loop)
    barriers = sum(instruction.name == "BAR" for instruction in loop)
    pending = (re.search(r", 0x([0-9a-f]+)$", i.operands) for i in loop if i.name == "DEPBAR")
    waits = [wait for i, load in enumerate(loop) if load.name == "LDG" and (wait := _wait_for(loop, i)) is not None]
    return Measures(
        registers=kernel.registers,
        shared=kernel.shared,
        stack=kernel.stack,
        local=names["LDL"] + names["STL"],
        generic=names["LD"] + names["ST"] + names["ATOM"],
        calls=names["CALL"],
        split=sum(len(run) for run in split_loads(kernel.code)),
        loop=len(loop),
        tensor=tensor,
        multiplies=multiplies,
        barriers=barriers,
        loads=len(loads),
        load_bytes=sum(load.width for load in loads),
        waits=len({place for place, _ in waits}),
        early=sum(not hidden for _, hidden in waits) if tensor or (multiplies and barriers) else 0,
        ahead=max((int(groups[1], 16) for groups in pending if groups), default=0),
    )


def _wait_for(loop: Sequence[Instruction], load: int) -> tuple[int, bool] | None:
    """Return the place that waits for a load, in this iteration or the next, and whether products lie in between."""
    barrier = loop[load].barrier
    hidden = False
    for step in range(1, len(loop) if barrier is not None else 0):
        place = (load + step) % len(loop)
        if loop[place].waits_for(barrier or 0):
            return place, hidden
        hidden = hidden or loop[place].is_tensor or loop[place].name in ("FFMA", "DFMA")
    return None


def reads_ahead(loop: Sequence[Instruction]) -> bool:
    """Return whether products hide the latency of most of a loop's loads from shared memory."""
    loads = [i for i, instruction in enumerate(loop) if instruction.name in ("LDSM", "LDS") and not instruction.guard]
    waits = [wait for i in loads if (wait := _wait_for(loop, i)) is not None]
    return sum(hidden for _, hidden in waits) * 2 > len(waits) > 0


def split_loads(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Return runs, within basic blocks, of four or more global loads from neighbouring addresses.

    The loads of a run have the same width and guard.
    """
    starts = {instruction.target for instruction in code}
    runs: dict[tuple[str, int, str], list[list[tuple[int, Instruction]]]] = {}
    found = []

    def close() -> None:
        for values in runs.values():
            found.extend([load for _, load in run] for run in values if len(run) >= 4)
        runs.clear()

    for instruction in code:
        if instruction.address in starts:
            close()
        address = re.search(r"\[(R\d+)(?:\.64)?(?:\+(-?0x[0-9a-f]+))?\]", instruction.operands)
        if instruction.name == "LDG" and instruction.width < 16 and address:
            offset, width = int(address[2] or "0", 16), instruction.width
            of_base = runs.setdefault((address[1], width, instruction.guard), [])
            for run in of_base:
                if offset in (run[-1][0] + width, run[0][0] - width):
                    run.insert(len(run) if offset > run[-1][0] else 0, (offset, instruction))
                    break
            else:
                of_base.append([(offset, instruction)])
        if instruction.name in ("BRA", "EXIT", "CALL", "RET"):
            close()
    close()
    return found


# --- Budgets ---


@dataclass(frozen=True)
class Budgets:
    """Measures of each kernel when the budgets were written, by architecture and name, and the nvcc that was used."""

    nvcc: str
    measures: dict[tuple[int, str], Measures]

    @classmethod
    def load(cls, path: Path = BUDGETS) -> Budgets:
        with path.open(newline="") as file:
            nvcc = file.readline().removeprefix("# nvcc ").strip()
            rows = list(csv.DictReader(file))
        names = [field.name for field in fields(Measures)]
        return cls(
            nvcc,
            {(int(row["sm"]), row["kernel"]): Measures(**{name: int(row[name]) for name in names}) for row in rows},
        )

    def save(self, path: Path = BUDGETS) -> None:
        with path.open("w", newline="") as file:
            file.write(f"# nvcc {self.nvcc}\n")
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["sm", "kernel", *(field.name for field in fields(Measures))])
            for (architecture, name), measures in sorted(self.measures.items(), key=lambda item: (item[0][1], item[0])):
                writer.writerow([architecture, name, *astuple(measures)])


def worse_than(budget: Measures, now: Measures) -> list[str]:
    """Return how a kernel is worse than its budget, a line per measure.

    Registers are compared in units of eight, in which they are allocated; a loop may grow by a twentieth.
    """

    def eights(registers: int) -> int:
        return (registers + 7) // 8 * 8

    allowed = {**asdict(budget), "registers": eights(budget.registers), "loop": int(budget.loop * 1.05)}
    # More of these is not worse; their shares of the loop and of the loads are compared below.
    for name in ("tensor", "multiplies", "load_bytes", "ahead"):
        del allowed[name]
    lost = [
        f"{name} {value}, budget {getattr(budget, name)}"
        for name, value in asdict(now).items()
        if value > allowed.get(name, value)
    ]
    for name in ("tensor", "multiplies"):
        products, wanted = getattr(now, name), getattr(budget, name)
        if products * budget.loop < 0.95 * wanted * now.loop:
            lost.append(f"{name} {products} in a loop of {now.loop}, budget {wanted} in {budget.loop}")
    if now.ahead < budget.ahead:
        lost.append(f"ahead {now.ahead}, budget {budget.ahead}")
    if now.load_bytes * budget.loads < 0.95 * budget.load_bytes * now.loads:
        lost.append(f"{now.loads} loads of {now.load_bytes} bytes, budget {budget.loads} of {budget.load_bytes}")
    return lost


# --- The program ---


def compiled_module() -> tuple[Path, str | None]:
    """Return the compiled module that cpc_ext uses, and the nvcc of its kernels, or None if it has no kernels."""
    from cpc_ext._native import native

    cuda = native.build_info()["cuda"]
    return Path(native.__file__), None if cuda in (None, "emulated") else cuda


def widths(code: Iterable[Instruction]) -> str:
    """Return the number of memory accesses by instruction and bytes, such as ``LDG 4x16 32x2``."""
    moving = ("LDG", "LDGSTS", "STG", "LDS", "LDSM", "STS", "LDL", "STL", "LD", "ST")
    counts = Counter((moving.index(i.name), i.width) for i in code if i.name in moving)
    found: dict[str, list[str]] = {}
    for (kind, width), count in sorted(counts.items(), reverse=True):
        found.setdefault(moving[kind], []).append(f"{count}x{width}" if moving[kind] != "LDSM" else str(count))
    return ", ".join(f"{name} {' '.join(found[name])}" for name in moving if name in found)


def print_kernels(kernels: Iterable[Kernel], *, loops: bool) -> None:
    header = f"{'sm':>4}" + "".join(f"{field.name:>11}" for field in fields(Measures))
    for kernel in kernels:
        print(f"\n{kernel.name}\n{header}")
        print(f"{kernel.architecture:>4}" + "".join(f"{value:>11}" for value in astuple(measure(kernel))))
        share = _products(kernel.main_loop) / max(len(kernel.main_loop), 1)
        print(f"     main loop: {share:.1%} on tensor cores; {widths(kernel.main_loop) or 'no access to memory'}")
        for loop in kernel.loops if loops else ():
            names = Counter(instruction.name for instruction in loop)
            print(
                f"     {loop[0].address:05x}-{loop[-1].address:05x} {len(loop)} instructions, {_products(loop)} tensor,"
                f" {_multiplies(loop)} multiply-adds, {names['BAR']} barriers; {widths(loop)}"
            )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--arch", type=int, nargs="+", default=[90], metavar="SM", help="architectures, such as 80 or 120 (default 90)"
    )
    parser.add_argument("--kernel", default="", metavar="PART", help="show only kernels whose names contain this")
    parser.add_argument("--loops", action="store_true", help="also show every loop with its memory accesses")
    parser.add_argument("--module", type=Path, help="another compiled module, or a cubin, to read")
    parser.add_argument("--write", action="store_true", help=f"write the budgets for {ARCHITECTURES}")
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    module, nvcc = (arguments.module, None) if arguments.module else compiled_module()
    if arguments.write:
        if nvcc is None:
            raise SystemExit(f"{module} has no CUDA code")
        kernels = [kernel for sm in ARCHITECTURES for kernel in read_kernels(module, sm).values()]
        Budgets(nvcc, {(kernel.architecture, kernel.name): measure(kernel) for kernel in kernels}).save()
        print(f"written: {BUDGETS}, {len(kernels)} kernels")
        return
    for architecture in arguments.arch:
        try:
            kernels = read_kernels(module, architecture, arguments.kernel).values()
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"{module} has no code for sm_{architecture}: {error.stderr.strip()}") from None
        print_kernels(kernels, loops=arguments.loops)


if __name__ == "__main__":
    main(parse_arguments())
