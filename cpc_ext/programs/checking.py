"""The work of `cpc-ext check`: run every op's problems on every device; print a table, the build and the machine."""

from __future__ import annotations

import time
import traceback
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cpc_ext._native import KERNEL_DEVICES
from cpc_ext.build_info import report
from cpc_ext.op_checks.agreement import Problem, all_problems, differences, kinds_of
from cpc_ext.programs.check import Command
from cpc_ext.training.errors import TrainingError

__all__ = ["check"]


class _Outcome(NamedTuple):
    """Result of a problem in one kind: its largest error relative to the allowed one, and messages of failures."""

    share: float
    failures: list[str]


def check(command: Command) -> None:
    """Print the table and the environment. Raises TrainingError if an op differs from its reference or raises."""
    started = time.monotonic()
    problems, failures = all_problems(), 0
    for device in _devices(command.device):
        failures += _check_device(device, problems)
    print(f"{report()}\n")
    seconds = f"{time.monotonic() - started:.0f} s"
    if failures:
        raise TrainingError(
            f"{failures} of the ops' results are wrong here ({seconds}); all of the above belongs into a bug report"
        )
    print(f"all ops agree with their references ({seconds})")


def _devices(which: str) -> list[torch.device]:
    cuda = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if which == "cuda" and not cuda:
        raise TrainingError("--device cuda: PyTorch finds no CUDA device")
    return [*([] if which == "cuda" else [torch.device("cpu")]), *([] if which == "cpu" else cuda)]


def _check_device(device: torch.device, problems: Sequence[Problem]) -> int:
    kinds, name_width = kinds_of(device), max(len(_name(problem)) for problem in problems)
    kernels = "kernels" if device.type in KERNEL_DEVICES else "references, as this build has no kernels for it"
    print(f"{device}: {kernels}; the largest error as a share of the one allowed")
    print(" " * name_width + "".join(f"{kind:>10}" for kind in kinds))
    told: list[str] = []
    for problem in problems:
        cells = []
        for kind in kinds:
            if kind not in problem.kinds:
                cells.append("")
                continue
            outcome = _outcome(problem, device, kind)
            cells.append("FAILED" if outcome.failures else f"{outcome.share:.2f}")
            told += [f"{_name(problem)}, {kind} on {device}: {failure}" for failure in outcome.failures]
        print(f"{_name(problem):<{name_width}}" + "".join(f"{cell:>10}" for cell in cells), flush=True)
    print("\n".join(["", *told, ""] if told else [""]))
    return len(told)


def _name(problem: Problem) -> str:
    return f"{problem.op}: {problem.label}"


def _outcome(problem: Problem, device: torch.device, kind: str) -> _Outcome:
    try:
        compared = differences(problem, device, kind)
    except Exception as error:
        # Report any exception and go on, so that the report shows it along with the other problems.
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return _Outcome(0.0, [f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"])
    shares = [one.error / one.allowed if one.allowed else 0.0 for one in compared]
    failures = [
        f"{one.of} is off by {one.error:.2g} of the largest value, {one.allowed:.2g} is allowed; {one.where}"
        for one in compared
        if not one.agrees
    ]
    return _Outcome(max(shares), failures)
