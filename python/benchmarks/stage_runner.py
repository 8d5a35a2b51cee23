"""Runs programs one after another within a total time. Each has the remaining time as its limit, and a log of its own.

A stage that fails or runs out of time does not stop the others. A stage that no longer fits, or whose requirement
failed, is skipped with the reason. Outcomes are reported after every stage, so that an interrupted run has a report.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Examined", "Outcome", "Stage", "run_stages"]

FAILED = ("failed", "timed out")
# Time between SIGTERM and SIGKILL for a stage that is out of time.
GRACE_SECONDS = 5


@dataclass(frozen=True)
class Examined:
    """The verdict on a finished stage's exit status and output."""

    passed: bool
    note: str = ""


@dataclass(frozen=True)
class Stage:
    """Programs that run in order, up to the first that fails.

    least: smallest remaining time in seconds with which it is started.
    most: limit in seconds, even if more time remains.
    needs: names of stages that must have passed.
    skip: a reason not to run it here.
    examine: judges exit status and log. Default: zero is a pass.
    """

    name: str
    commands: Sequence[Sequence[str]]
    least: float = 10
    most: float = 3600
    needs: Sequence[str] = ()
    skip: str | None = None
    examine: Callable[[int, Path], Examined] | None = None


@dataclass(frozen=True)
class Outcome:
    """The outcome of a stage. status: "passed", "failed", "timed out" or "skipped". log: its file, or None."""

    name: str
    status: str
    seconds: float = 0.0
    note: str = ""
    log: Path | None = None

    @property
    def bad(self) -> bool:
        return self.status in FAILED


def run_stages(
    stages: Sequence[Stage],
    *,
    logs: Path,
    seconds: float,
    environment: Mapping[str, str],
    folder: Path,
    report: Callable[[Sequence[Outcome]], None],
) -> list[Outcome]:
    """Run the stages in order, all of them within ``seconds``.

    logs: folder for NAME.log. folder: where the programs run. report: called with all outcomes after every stage.
    """
    deadline = time.monotonic() + seconds
    outcomes: list[Outcome] = []
    logs.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        left = deadline - time.monotonic()
        reason = _reason_to_skip(stage, left, outcomes)
        if reason is not None:
            outcomes.append(Outcome(stage.name, "skipped", note=reason))
        else:
            # Ending a stage takes time, too.
            limit = min(left - GRACE_SECONDS, stage.most)
            outcomes.append(_run(stage, limit, logs / f"{stage.name.replace(' ', '-')}.log", environment, folder))
        report(outcomes)
    return outcomes


def _reason_to_skip(stage: Stage, left: float, outcomes: Sequence[Outcome]) -> str | None:
    if stage.skip is not None:
        return stage.skip
    missing = [outcome.name for outcome in outcomes if outcome.name in stage.needs and outcome.status != "passed"]
    if missing:
        return f"needs {', '.join(missing)}, which did not pass"
    if left - GRACE_SECONDS < stage.least:
        return f"{max(left, 0):.0f} s left, needs at least {stage.least:.0f} s"
    return None


def _run(stage: Stage, limit: float, log: Path, environment: Mapping[str, str], folder: Path) -> Outcome:
    start = time.monotonic()
    status, returned = "passed", 0
    with log.open("w") as output:
        for command in stage.commands:
            print(f"$ {shlex.join(command)}", file=output, flush=True)
            returned = _run_command(command, start + limit - time.monotonic(), output, environment, folder)
            if returned != 0:
                break
    seconds = time.monotonic() - start
    if returned is None:
        return Outcome(stage.name, "timed out", seconds, f"stopped after its limit of {limit:.0f} s", log)
    examined = Examined(returned == 0, "" if returned == 0 else f"exit status {returned}")
    if stage.examine is not None:
        examined = stage.examine(returned, log)
    status = "passed" if examined.passed else "failed"
    return Outcome(stage.name, status, seconds, examined.note, log)


def _run_command(
    command: Sequence[str], limit: float, output, environment: Mapping[str, str], folder: Path
) -> int | None:
    """Run a program, and return its exit status, or None if it hit the limit and was ended with its children."""
    try:
        # A separate session, so that its children can be ended with it.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            cwd=folder,
            start_new_session=True,
        )
    except OSError as error:
        print(error, file=output)
        return 127
    try:
        return process.wait(max(limit, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    if process.poll() is not None:
        return
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        # The process group exists until the process has been waited for.
        os.killpg(process.pid, signal_number)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return
