"""Predicts the time of every kernel and benchmark problem on GPUs that are not available, and that of eager PyTorch.

    python python/benchmarks/cuda_model.py                           # every benchmark case, on an H100
    python python/benchmarks/cuda_model.py --machine A100 --kernels  # and each of its launches
    python python/benchmarks/cuda_model.py --against results/2026-11-25-nvidia-h100-80gb-hbm3/kernels.json

All printed times are predictions from four sources: counts of our kernels' work in the emulation (cuda_counts.json,
which cuda_traffic.py makes, unless ``--counts`` names another file), PyTorch's launches around them and in the eager
formulations (cuda_pytorch.py), the compiled machine code of the kernels (machine_code.csv), and the table of machines
(cuda_machines.py). README.md compares predictions with measurements.

A launch takes the largest of three times, plus the pause before it:

- device memory: distinct bytes at the rate of a copy, or none if they fit into the second-level cache;
- the second-level cache: the sectors of all requests;
- the busiest multiprocessor: its blocks, as many at a time as registers, threads and shared memory allow. The warps of
  a scheduler queue for its tensor core, ordinary and special units, issue slots and its share of shared memory, and
  wait for loads and barriers in between. Mean value analysis (Reiser and Lavenberg, 1980) of this closed network
  gives their throughput: near the busiest unit's limit with many warps, near that of one warp's chain with few. A warp
  that reads the operands of its next products while it multiplies is in two queues at a time, like two warps.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from statistics import median as median_of
from typing import Any

from cuda_counts import COUNTS, MATH, Launch, Problem, Product, Sweep, load
from cuda_machines import MACHINES, Machine
from cuda_pytorch import eager_steps, surrounding_launches

sys.path.append(str(Path(__file__).resolve().parents[1]))
from machine_code import Budgets, Measures

__all__ = ["Code", "Predicted", "confront", "predict", "predict_eager", "predict_launch"]

# Share of the second-level cache up to which a launch's bytes are assumed to stay cached until they are read again.
RESIDENT_SHARE = 0.6
# Assumed instructions of a warp outside of its main loop, and of a warp of one of PyTorch's kernels.
OTHER_INSTRUCTIONS, ELEMENTWISE_INSTRUCTIONS = 300, 40
# Warp instructions for each request to memory, and for each exponential, logarithm, reciprocal or root, by patterns of
# kernel names. They are for kernels that do not spend their time in the main loop of machine_code.csv, and are
# estimated from the loops that machine_code.py --loops lists for 9.0.
INSTRUCTIONS = {
    # A step takes about 80 instructions to begin; 4 pixels of 3 channels take 200 to read, 175 to move, 90 to look up
    # and 180 to store, with 6, 15, 18 and 6 requests. The mix depends on the transforms that run.
    "augment::augment_patches<*>": (13, 0),
    # Between the loop of dot products, 60 for 32 loads, and that of weighted sums, 279 for 24 accesses.
    "info_nce::contrast_sampled<*>": (6, 0),
    # Staging takes 104 for 16 accesses. A component of three colours takes 267 forward and 467 backward, and 15 in the
    # mixture's sum, with 15 and 18 special functions; some of these are accesses.
    "logistic_mixture::run_tiles<*, 0>": (6.5, 13),
    "logistic_mixture::run_tiles<*, 1>": (6.5, 17),
    # Without branches that are not taken, a warp takes about 220 to begin a tile, 44 for a copy, 110 to 140 for 12
    # values that it transforms, with 6 requests, and 55 for a place in patches, from which 16 bytes leave for each of
    # several with 10 to 15 and a load and a store.
    "patches::extract_tiles<*>": (26, 0),
    # 60 for a value that is gathered, with 2 requests, and about 25 for a load and a store.
    "patches::extract_gathered<*>": (20, 0),
    # 400 for 4 pixels, with 4.5 requests where 3 patches share a pixel.
    "patches::sum_patches<*>": (90, 0),
}
# The same for the epilogues of products (csrc/core/cuda/product.cuh), in addition to their main loop.
EPILOGUES = {
    # 370 for a slot of 512 scores, another 400 for the store of a tile of 4096, and 250 to begin.
    "info_nce::multiply<*, TakeScores<*>>": (10, 26),
    # 3 for a pair that is stored, 6 for one that is added to.
    "info_nce::multiply<*, AddToSums<*>>": (3, 0),
}
# Blocks of products are persistent: the counts have a multiple of this many, for a GPU of this many multiprocessors.
COUNTED_MULTIPROCESSORS = 132
# See confront.
HOST_SHARE = 1.6


# --- One launch ---


@dataclass(frozen=True)
class Code:
    """Properties of a kernel's machine code: see Measures in machine_code.py."""

    registers: int = 32
    shared: int = 0
    loop: int = 0
    tensor: int = 0
    multiplies: int = 0
    barriers: int = 0
    loads: int = 0
    waits: int = 0
    early: int = 0
    ahead: int = 0
    reads_ahead: bool = False  # See reads_ahead in machine_code.py.

    @classmethod
    def of(cls, measures: Measures) -> Code:
        return cls(**{name: value for name, value in asdict(measures).items() if name in cls.__dataclass_fields__})


@cache
def _codes() -> dict[tuple[int, str], Code]:
    return {key: Code.of(measures) for key, measures in Budgets.load().measures.items()}


def code_of(kernel: str, machine: Machine) -> Code:
    """Return a kernel's code. Raises KeyError if it is neither in machine_code.csv nor PyTorch's or the runtime's."""
    if "::" not in kernel:
        return Code()
    # Products on tensor cores in machine_code.csv read ahead, except split ones.
    return replace(_codes()[machine.sm, kernel], reads_ahead="::multiply<TensorCores" in kernel)


@dataclass(frozen=True)
class Predicted:
    """The predicted time of a launch.

    seconds: including the pause before the launch. terms: seconds by each limit alone. bound: the largest of these,
    "launch" if the pause is longer than the launch, or "latency" if no limit comes near.
    """

    seconds: float
    terms: dict[str, float]
    bound: str


def blocks_at_once(machine: Machine, launch: Launch, code: Code) -> int:
    """Return the number of blocks that a multiprocessor holds; registers are allocated to warps in units of 256."""
    warps = -(-launch.block // 32)
    registers = -(-code.registers * 32 // 256) * 256 * warps
    shared = launch.dynamic_shared_bytes + code.shared + 1024
    return max(
        1,
        min(
            machine.blocks,
            machine.threads // (32 * warps),
            machine.registers // registers,
            machine.shared_size // shared,
        ),
    )


def flops_of(mma: str) -> float:
    """Return the floating-point operations of a warp's product from its name, such as m16n8k16.bf16."""
    m, n, k = map(int, re.search(r"m(\d+)n(\d+)k(\d+)", mma).groups())  # type: ignore[union-attr]
    return 2 * m * n * k


def _share(machine: Machine, mma: str) -> float:
    """Return the share of the peak that a product reaches; Hopper's wgmma.m64n256k16.bf16 and the like reach all."""
    return 1 if mma.startswith("wgmma") else machine.mma_share


@dataclass(frozen=True)
class Turns:
    """The number of turns of a warp's main loop, and the instructions that it issues in total."""

    count: float
    instructions: float


def turns_of(launch: Launch, code: Code) -> Turns:
    """Estimate the turns of the main loop from the products, else the multiply-adds, else the loads.

    Instructions are those of the launch if counted, else follow INSTRUCTIONS, else the loop's length. The latter counts
    all branches, also those not taken, and so gives too many instructions rather than too few.
    """
    warps = launch.warps
    products, multiplies = sum(launch.mma.values()) / warps, sum(launch.multiplies.values()) / 32 / warps
    if code.tensor and products:
        count = products / code.tensor
    elif code.multiplies and multiplies and not products:
        count = multiplies / code.multiplies
    else:
        count = launch.read_requests / warps / code.loads if code.loads else 1
    if launch.instructions is not None:
        return Turns(count, launch.instructions / warps)
    estimate = next((INSTRUCTIONS[name] for name in INSTRUCTIONS if fnmatchcase(launch.kernel, name)), None)
    if estimate is not None:
        requests = launch.read_requests + launch.write_requests + launch.shared_requests
        every = estimate[0] * requests + estimate[1] * launch.transcendentals / 32
        return Turns(count, every / warps + OTHER_INSTRUCTIONS)
    other = float(OTHER_INSTRUCTIONS if code.loop else ELEMENTWISE_INSTRUCTIONS)
    epilogue = next((EPILOGUES[name] for name in EPILOGUES if fnmatchcase(launch.kernel, name)), (0, 0))
    requests = launch.read_requests - sum(launch.copies.values()) / 32 + launch.write_requests
    other += (epilogue[0] * requests + epilogue[1] * launch.transcendentals / 32) / warps
    return Turns(count, max(count * code.loop, products + multiplies) + other)


def demands_of(machine: Machine, launch: Launch, turns: Turns) -> dict[str, float]:
    """Return the clocks for which a warp occupies each unit of its scheduler; a multiprocessor has four schedulers."""
    warps, share = launch.warps, machine.issue
    copied = sum(int(size) * count for size, count in launch.copies.items())
    moved = max(0, 32 * launch.read_sectors - copied) + 32 * launch.written_sectors
    by_sm = {
        "tensor": sum(
            count * flops_of(name) / (machine.tensor[MATH[name.rpartition(".")[2]]] * _share(machine, name))
            for name, count in launch.mma.items()
        ),
        "multiply": sum(count / machine.ordinary[name] for name, count in launch.multiplies.items()),
        "special": launch.transcendentals / machine.special,
        # Data from global memory takes the same path; asynchronous copies are included in the wavefronts.
        "shared": (launch.shared_wavefronts * 128 + moved) / machine.shared_bytes,
    }
    return {**{name: clocks * share / warps for name, clocks in by_sm.items()}, "issue": turns.instructions}


def waits_of(machine: Machine, launch: Launch, code: Code, turns: Turns, busy: float) -> float:
    """Return the clocks that a warp waits for memory and barriers. busy: clocks of a turn of its loop, of all warps."""
    read = launch.read_sectors * 32
    resident = launch.unique_read_bytes < RESIDENT_SHARE * machine.l2_bytes
    from_dram = 0 if resident or not read else min(1, launch.unique_read_bytes / read)
    latency = from_dram * machine.latency_dram + (1 - from_dram) * machine.latency_l2
    copies = sum(launch.copies.values()) / 32 / launch.warps / max(turns.count, 1)
    loads = launch.read_requests / launch.warps / max(turns.count, 1) - copies
    of_turn = code.barriers * 2 * machine.latency_shared
    if loads > 0 and code.loads:
        waits = min(code.waits, loads)
        hidden = (code.tensor or code.multiplies) and not code.early
        of_turn += max(0, latency - busy) if hidden else waits * latency
    if copies > 0:
        of_turn += max(0, latency - (code.ahead + 1) * busy)
    return latency + turns.count * of_turn  # The first load is before the loop.


def throughput(demands: Sequence[float], waiting: float, warps: float) -> float:
    """Return the jobs per clock of a closed queueing network, by mean value analysis.

    demands: clocks of a job at each unit, which has a queue. waiting: clocks of a job without a queue. warps: number of
    jobs.
    """
    if warps < 1:
        return warps * throughput(demands, waiting, 1)
    queues = [0.0] * len(demands)
    rate = 0.0
    for jobs in range(1, int(warps) + 1):
        times = [demand * (1 + queue) for demand, queue in zip(demands, queues, strict=True)]
        rate = jobs / (waiting + sum(times))
        queues = [rate * time for time in times]
    more = warps - int(warps)
    if more > 0:
        times = [demand * (1 + queue) for demand, queue in zip(demands, queues, strict=True)]
        rate += more * ((int(warps) + 1) / (waiting + sum(times)) - rate)
    return rate


def predict_launch(machine: Machine, launch: Launch, code: Code) -> Predicted:
    at_once = blocks_at_once(machine, launch, code)
    if "::multiply<" in launch.kernel and launch.grid % COUNTED_MULTIPROCESSORS == 0:
        launch = replace(launch, grid=machine.multiprocessors * at_once)
    turns = turns_of(launch, code)
    demands = demands_of(machine, launch, turns)
    blocks = -(-launch.grid // machine.multiprocessors)  # Of the busiest multiprocessor.
    warps_of_block = -(-launch.block // 32) / machine.issue  # On a scheduler.
    # A product or multiply-add occupies its issue slot and its unit at the same time, so the two are not added.
    own = (sum(launch.mma.values()) + sum(launch.multiplies.values()) / 32) / launch.warps
    queued = [*(demands[name] for name in demands if name != "issue"), max(0, demands["issue"] - own)]
    limit = max(demands.values())

    def clocks(blocks: int, at_once: int) -> float:
        warps = at_once * warps_of_block * (2 if code.reads_ahead else 1)
        busy = max(sum(queued), warps * limit) / max(turns.count, 1)
        rate = throughput(queued, waits_of(machine, launch, code, turns, busy), warps)
        return blocks * warps_of_block / min(rate, 1 / max(limit, 1e-9))

    whole = blocks // min(at_once, blocks) * min(at_once, blocks)
    rest = blocks - whole  # The last wave.
    total = launch.busiest * (clocks(whole, min(at_once, blocks)) + (clocks(rest, rest) if rest else 0))
    different = launch.unique_read_bytes + launch.unique_written_bytes
    sectors = launch.read_sectors + launch.written_sectors
    terms = {
        **{name: value * blocks * warps_of_block / machine.clock for name, value in demands.items()},
        "dram": 0.0
        if different < RESIDENT_SHARE * machine.l2_bytes
        else different / (machine.dram * machine.copy_share),
        "l2": sectors * 32 / machine.l2,
    }
    seconds = max(total / machine.clock, terms["dram"], terms["l2"])
    largest = max(terms, key=lambda name: terms[name])
    pause = machine.launch
    bound = "launch" if pause > seconds else largest if terms[largest] > 0.7 * seconds else "latency"
    return Predicted(seconds + pause, terms, bound)


# --- A problem, and the same in eager PyTorch ---


def _memory(machine: Machine, size: float) -> float:
    """Return the seconds to move bytes, from the second-level cache if the previous call leaves them there."""
    fits = size < RESIDENT_SHARE * machine.l2_bytes
    return size / (machine.l2 if fits else machine.dram * machine.copy_share)


def predict_eager(machine: Machine, steps: Iterable[Product | Sweep]) -> float:
    """Return seconds on the device. A product reaches cuBLAS's usual share, less the idle part of its last wave."""
    seconds = 0.0
    for step in steps:
        if isinstance(step, Sweep):
            seconds += _memory(machine, step.bytes) + step.kernels * machine.launch
            continue
        # Tiles of 128 x 128, or 64 x 64 if these are too few; products deeper than wide are split along the depth.
        tile = 128 if -(-step.m // 128) * -(-step.n // 128) >= machine.multiprocessors else 64
        tiles = -(-step.m // tile) * -(-step.n // tile)
        split = max(1, min(machine.multiprocessors // tiles, step.k // 512))
        waves = -(-tiles * split // machine.multiprocessors)
        full = waves * machine.multiprocessors * tile * tile * 2 * step.k / split
        multiply = full / (machine.peak(step.math) * machine.product_share)
        moved = step.size * (step.m * step.k + step.k * step.n + step.m * step.n)
        seconds += max(multiply, _memory(machine, moved)) + machine.launch
    return seconds


@dataclass(frozen=True)
class Row:
    """Predicted seconds of a problem on a machine. floor: the fewest bytes or operations at the machine's peak."""

    problem: Problem
    launches: tuple[Predicted, ...]
    ours: float
    floor: float
    eager: float | None

    @property
    def bound(self) -> str:
        """The limit that bounds most of the time."""
        shares: dict[str, float] = {}
        for launch in self.launches:
            shares[launch.bound] = shares.get(launch.bound, 0) + launch.seconds
        return max(shares, key=lambda name: shares[name], default="nothing")


def completed(problem: Problem) -> Problem:
    """Return the problem with PyTorch's launches around our kernels added."""
    return replace(problem, launches=(*problem.launches, *surrounding_launches(problem.key)))


def predict(machine: Machine, problem: Problem, eager: Iterable[Product | Sweep] | None = None) -> Row:
    launches = tuple(predict_launch(machine, each, code_of(each.kernel, machine)) for each in problem.launches)
    of_pass = problem.minimum_bytes / (2 if "backward" in problem.passes else 1)
    memory = machine.l2 if of_pass < RESIDENT_SHARE * machine.l2_bytes else machine.dram
    floor = max(problem.minimum_bytes / memory, problem.minimum_flops / machine.peak(problem.math))
    return Row(
        problem,
        launches,
        sum(launch.seconds for launch in launches),
        floor,
        None if eager is None else predict_eager(machine, eager),
    )


# --- The program ---

HEAD = f"{'':58}{'ours':>9}{'floor':>9}{'ours/floor':>11}{'eager':>9}{'eager/ours':>11}  bound by"


def describe(row: Row) -> str:
    problem = row.problem
    name = f"{problem.op}  {problem.label}  {problem.dtype}  {'both' if 'backward' in problem.passes else 'forward'}"
    eager = (f"{row.eager * 1e6:>9.1f}", f"{row.eager / row.ours:>10.2f}x") if row.eager else (f"{'-':>9}", f"{'':>11}")
    return (
        f"{name:<100}\n{'':58}{row.ours * 1e6:>9.1f}{row.floor * 1e6:>9.1f}{row.ours / row.floor:>10.1f}x"
        f"{eager[0]}{eager[1]}  {row.bound}"
    )


def describe_launches(row: Row) -> Iterable[str]:
    for launch, time in zip(row.problem.launches, row.launches, strict=True):
        terms = ", ".join(f"{name} {seconds * 1e6:.1f}" for name, seconds in time.terms.items() if seconds > 5e-8)
        shape = f"{launch.kernel}  {launch.grid} x {launch.block}"
        yield f"    {shape:<84}{time.seconds * 1e6:>8.1f} us  {time.bound:<8} ({terms})"


def confront(rows: Sequence[Row], measured: dict[str, Any]) -> list[str]:
    """Compare predictions with a result file of kernels.py: lines with both times and their ratio, and a summary.

    Queueing a call takes the host some time, whatever the size, and that varies by half. If a case took less than
    HOST_SHARE times as long as the op's quickest case, its measured time is that of queueing, and the line says so.
    """
    results = {(row["op"], row["label"], row["dtype"], row["passes"]): row for row in measured["results"]}

    def median(result: dict[str, Any], name: str) -> float:
        return result["alternatives"].get(name, {}).get("seconds", {}).get("median", float("nan"))

    quickest: dict[tuple[str, str, str], float] = {}
    for result in results.values():
        for name in (result["compared"], "eager"):
            key = result["op"], result["passes"], name
            quickest[key] = min(quickest.get(key, float("inf")), median(result, name))
    lines = [f"{'predicted, then measured, in us; their ratio':<100}{'ours':>25}{'eager':>27}"]
    ratios: dict[bool, list[float]] = {True: [], False: []}  # True: ours, False: eager.
    for row in rows:
        result = results.get(row.problem.key)
        if result is None:
            continue
        line = f"{' '.join(row.problem.key):<100}"
        for name, predicted in ((result["compared"], row.ours), ("eager", row.eager)):
            seconds = median(result, name)
            by_host = seconds < HOST_SHARE * quickest[result["op"], result["passes"], name]
            ratio = "  host" if by_host else f"{predicted / seconds:>6.2f}" if predicted else f"{'':>6}"
            line += f"{'-' if predicted is None else f'{predicted * 1e6:.1f}':>10}{seconds * 1e6:>10.1f}{ratio}"
            if predicted and not by_host:
                ratios[name == result["compared"]].append(predicted / seconds)
        lines.append(line)
    medians = (
        f"{who} {median_of(ratios[key]):.2f} of {len(ratios[key])}"
        for who, key in (("ours", True), ("eager", False))
        if ratios[key]
    )
    return [*lines, f"predicted / measured, median where the device was the limit: {', '.join(medians) or 'nowhere'}"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--machine", nargs="+", default=["H100"], choices=[*MACHINES], help="GPUs (default H100)")
    parser.add_argument("--op", nargs="+", metavar="NAME", help="predict only these ops (default: all)")
    parser.add_argument(
        "--counts", type=Path, metavar="FILE", default=COUNTS, help=f"counts of the work (default {COUNTS.name})"
    )
    parser.add_argument("--kernels", action="store_true", help="also show each launch, with the time of every limit")
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="compare with a result of kernels.py on the first machine"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the predictions there")
    arguments = parser.parse_args()
    for name in ("counts", "against"):
        path = getattr(arguments, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name}: there is no file {path}")
    if arguments.against:
        device = json.loads(arguments.against.read_text())["machine"]["device"]
        if arguments.machine[0] not in device:
            parser.error(f"--against: {arguments.against} is of {device}, and --machine {arguments.machine[0]} another")
    return arguments


def main(arguments: argparse.Namespace) -> None:
    problems = [completed(problem) for problem in load(arguments.counts)]
    if arguments.op:
        if unknown := set(arguments.op) - {problem.op for problem in problems}:
            sys.exit(f"--op: no counts of {', '.join(sorted(unknown))} in {arguments.counts}")
        problems = [problem for problem in problems if problem.op in arguments.op]
    document: dict[str, Any] = {"what": "predicted seconds, not measured", "results": []}
    for machine in (MACHINES[name] for name in arguments.machine):
        rows = [predict(machine, problem, eager_steps(problem.key)) for problem in problems]
        print(f"\n{machine.name}: predicted microseconds on the device; counts {problems[0].source}\n{HEAD}")
        for row in rows:
            print(describe(row))
            if arguments.kernels:
                print("\n".join(describe_launches(row)))
        if arguments.against and machine.name == arguments.machine[0]:
            print()
            print("\n".join(confront(rows, json.loads(arguments.against.read_text()))))
        document["results"] += [
            {
                "machine": machine.name,
                **dict(zip(("op", "label", "dtype", "passes"), row.problem.key, strict=True)),
                "counts": row.problem.source,
                "predicted": {"ours": row.ours, "floor": row.floor, "eager": row.eager, "bound": row.bound},
                "launches": [
                    {"kernel": launch.kernel, **asdict(time)}
                    for launch, time in zip(row.problem.launches, row.launches, strict=True)
                ],
            }
            for row in rows
        ]
    if arguments.out:
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written: {arguments.out}")


if __name__ == "__main__":
    main(parse_arguments())
