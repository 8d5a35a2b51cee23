"""The parts of an op's benchmark, and the measurement of one of its cases.

An op defines its cases and, for each, the alternatives that compute the same result: the plain formulation ("eager"),
its compiled version, and ours. Everything else is common to all ops: results are compared, calls are timed in turn,
memory is measured, and the rate is related to a ceiling of this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

import torch
from ceilings import copy_of, product_flops_per_second
from memory import peak_extra_bytes
from timing import Time, interleaved, make_plan

__all__ = ["BASELINE", "COMPILED", "OURS", "Case", "Op", "Problem", "both_passes", "compiled", "measure"]

BASELINE, COMPILED, OURS, CEILING = "eager", "compiled", "ours", "copy into existing memory"
# Time limit of one case, without compiling and memory measurement.
CASE_SECONDS = 6.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one problem. An op's own class adds its sizes as fields, and describes them in ``label``.

    dtype: dtype of the op's inputs, by its name in torch.
    backward: whether the gradients of the floating-point inputs are computed, too.
    quick: whether the case is part of a quick run.
    sweep: whether the case is a point of the op's curve in the chart.
    """

    dtype: str = "float32"
    backward: bool = False
    quick: bool = False
    sweep: bool = False

    @property
    def label(self) -> str:
        raise NotImplementedError

    @property
    def size(self) -> int:
        """Position of the case on the chart's horizontal axis."""
        raise NotImplementedError

    @property
    def sizes(self) -> dict[str, Any]:
        """The fields that the op's own class adds."""
        shared = {field.name for field in fields(Case)}
        return {name: value for name, value in asdict(self).items() if name not in shared}


@dataclass(frozen=True)
class Problem:
    """A case prepared on a device.

    alternatives: calls by name, including "eager" and "ours". All return the same tensor or tuple of tensors; a result
        of None is not compared.
    work: the fewest bytes that a memory-bound op must read and write, or the fewest floating-point operations of a
        compute-bound one.
    headline: the alternative whose share of the ceiling is reported.
    compared: the alternative of ours that is compared with the fastest of the others, the fair rival. Names of our
        alternatives begin with "ours".
    copied_bytes: size of the copy that is a memory-bound op's ceiling. Default: as much traffic as ``work``.
    product: precision of the matrix product that is a compute-bound op's ceiling. Default: the case's dtype.
    tolerance: largest difference between alternatives, as a share of a result's largest value.
    left_out: alternatives that must not be called here, with the reason.
    """

    alternatives: Mapping[str, Callable[[], Any]]
    work: float
    headline: str = OURS
    compared: str = OURS
    copied_bytes: int | None = None
    product: str | None = None
    tolerance: float = 2e-2
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Op:
    """An op's benchmark.

    bound: what limits a good implementation: "memory" is reported in GB/s against a copy, "compute" in GFLOP/s against
        a matrix product.
    size: what the chart's horizontal axis counts.
    prepare: prepares a case on a device.
    counted: whether the emulation counts the op's work on CUDA; False if PyTorch's matrix products do most of it.
    """

    name: str
    bound: Literal["memory", "compute"]
    size: str
    cases: Sequence[Case]
    prepare: Callable[[Any, torch.device], Problem]
    counted: bool = True


def _passes(case: Case) -> str:
    """Return "forward" or "forward+backward"."""
    return "forward+backward" if case.backward else "forward"


def both_passes(case_class: type[Case], *sizes: Any, **options: Any) -> list[Case]:
    """Return the case as a forward pass, and as a forward and backward pass."""
    return [case_class(*sizes, backward=backward, **options) for backward in (False, True)]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for the shapes that it is called with."""
    return torch.compile(function, dynamic=False)


def measure(op: Op, case: Case, device: str, repeats: int, without: Sequence[str] = ()) -> dict[str, Any]:
    """Measure one row of results: times, achieved rates and their share of the ceiling, and peak extra memory.

    without: names of alternatives to skip.

    Alternatives that cannot run here (no compiler for ``torch.compile``, not enough memory) have no times, and are
    listed under "failed" with the reason. Ours must run and agree with eager.
    """
    # PyTorch recompiles a function only a limited number of times before it runs it eagerly.
    torch.compiler.reset()
    problem = op.prepare(case, torch.device(device))
    wanted = {name: call for name, call in problem.alternatives.items() if name not in without}
    problem = replace(problem, alternatives=wanted)
    running, failed = _those_that_run(problem)
    peaks = {name: peak_extra_bytes(call, device) for name, call in running.items()}
    timed = dict(running)
    if op.bound == "memory":
        copied = int(problem.work / 2) if problem.copied_bytes is None else problem.copied_bytes
        timed[CEILING] = copy_of(copied, device)
    plan = make_plan(timed, repeats=repeats, seconds=CASE_SECONDS, device=device)
    times = interleaved(timed, repeats=plan.repeats, device=device, warmup=plan.warmup, untimed=plan.untimed)
    if op.bound == "memory":
        ceiling = 2 * copied / times.pop(CEILING).median
    else:
        ceiling = product_flops_per_second(problem.product or case.dtype, device)
    fair = min((name for name in times if not name.startswith(OURS)), key=lambda name: times[name].median)
    return {
        "op": op.name,
        "case": case.sizes,
        "label": case.label,
        "dtype": case.dtype,
        "passes": _passes(case),
        "size": case.size if case.sweep else None,
        "bound": op.bound,
        "work": problem.work,
        "ceiling_per_second": ceiling,
        "headline": problem.headline,
        "fair": fair,
        "compared": problem.compared,
        "against_fair": times[fair].median / times[problem.compared].median,
        "repeats": plan.repeats,
        "alternatives": {
            name: _figures(value, times.get(BASELINE), problem.work, ceiling, peaks[name])
            for name, value in times.items()
        },
        "failed": failed,
    }


def _those_that_run(problem: Problem) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    running, failed = {}, dict(problem.left_out)
    results = {}
    for name, call in problem.alternatives.items():
        try:
            results[name] = call()
        except (RuntimeError, ImportError, OSError) as error:
            if name == OURS:
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        running[name] = call
    compared = {name: result for name, result in results.items() if result is not None}
    by = BASELINE if BASELINE in compared else next(iter(compared))
    for name, result in compared.items():
        _check_agreement(name, result, by, compared[by], problem.tolerance)
    return running, failed


def _check_agreement(name: str, result: Any, by: str, expected: Any, tolerance: float) -> None:
    """Raise AssertionError if a result of `name` differs from that of `by` by more than the tolerance.

    tolerance: as a share of the expected result's largest value.
    """
    pairs = zip(*(value if isinstance(value, tuple) else (value,) for value in (result, expected)), strict=True)
    for index, (actual, wanted) in enumerate(pairs):
        actual, wanted = actual.detach().float(), wanted.detach().float()
        difference = (actual - wanted).abs().max() / wanted.abs().max()
        if not difference <= tolerance:
            raise AssertionError(f"result {index} of {name} is {difference:.1e} of the largest value off {by}'s")


def _figures(time: Time, baseline: Time | None, work: float, ceiling: float, peak: int) -> dict[str, Any]:
    return {
        "seconds": asdict(time),
        "against_eager": None if baseline is None else baseline.median / time.median,
        "per_second": work / time.median,
        "share_of_ceiling": work / time.median / ceiling,
        "peak_extra_bytes": peak,
    }
