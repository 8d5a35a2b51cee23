"""Choosing the number of steps that fill a run's time budget, from a measurement of some steps.

The result is an ordinary config with a number of steps, so that the run can be repeated and resumed like any other, on
any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from statistics import median

from cpc_ext.training.config import RunConfig

__all__ = ["FirstSteps", "filled", "seconds_per_step"]

# Warm-up steps that are not timed: the first ones choose kernels, fill caches and allocate.
_UNTIMED = 5
# The measurement takes this share of the budget, clamped to these bounds in seconds. While the pace still changes, as
# when images are read from disk for the first time, it may take up to _PATIENCE times as long.
_SHARE, _SHORTEST, _LONGEST, _PATIENCE = 0.02, 1.0, 30.0, 3.0
# The measurement consists of about _PARTS intervals. Only the last _COUNTED count, and it ends when the slowest of them
# takes at most _ALIKE times as long per step as the fastest.
_PARTS, _COUNTED, _ALIKE = 8, 4, 1.15
# Seconds of a run's first steps from which its pace is estimated.
_TELLING = 5.0
# Time between checkpoints: this share of the budget, but at least so many seconds.
_CHECKPOINTS, _BETWEEN_CHECKPOINTS = 0.05, 30.0
# Minimum number of log lines, if the run has that many steps, and maximum share of the steps spent on warm-up.
_LINES = 50
_WARMUP = 0.1


def seconds_per_step(take: Callable[[int], float], budget: float) -> float:
    """Measure the time per step.

    Args:
        take: takes the given number of steps and returns the seconds, the same in all processes.
        budget: time budget of the run in seconds; the measurement takes a few percent of it.

    Returns:
        Seconds per step.
    """
    take(_UNTIMED)
    goal = min(max(_SHARE * budget, _SHORTEST), _LONGEST)
    paces = [take(1)]
    spent = paces[0]
    while spent < _PATIENCE * goal:
        # Time several steps together, so that the wait for the device does not count in every step.
        steps = max(1, round(goal / _PARTS / max(paces[-1], 1e-9)))
        seconds = take(steps)
        paces.append(seconds / steps)
        spent += seconds
        counted = paces[-_COUNTED:]
        if spent >= goal and max(counted) <= _ALIKE * min(counted):
            break
    return median(paces[-_COUNTED:])


class FirstSteps:
    """Estimates the pace of a run from its first steps, without a measurement before it begins."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def pace(self, seconds: float) -> float | None:
        """Add the seconds of the next step; return the seconds per step, or None while it is too early to say."""
        self._seconds.append(seconds)
        # The first step includes setup, so it counts only while there is no other.
        counted = self._seconds[1:] or self._seconds
        return median(counted) if sum(counted) >= _TELLING else None


def filled(
    config: RunConfig,
    seconds_per_step: float,
    *,
    steps: int = 0,
    seconds: float = 0.0,
    given: Collection[str] = (),
) -> RunConfig:
    """Return a config whose number of steps fills the time budget.

    The intervals of checkpoints and log lines are adapted to the run's length, and a new run's warm-up is limited to a
    tenth of it.

    Args:
        config: a config with a time budget.
        seconds_per_step: expected time per step from now on.
        steps: number of steps done so far, which count.
        seconds: time spent in them, which counts.
        given: field names of the options that the user set: warmup_steps and log_every stay as they are then.
    """
    options = config.optimization
    assert options.time_budget is not None
    left = max(0.0, 60 * options.time_budget - seconds)
    total = max(1, steps + math.floor(left / seconds_per_step))
    between = max(_BETWEEN_CHECKPOINTS, _CHECKPOINTS * 60 * options.time_budget)
    length = {"time_budget": None, "steps": total}
    if steps == 0 and "warmup_steps" not in given:
        length["warmup_steps"] = min(options.warmup_steps, math.floor(_WARMUP * total))
    often = {"checkpoint_every": max(1, math.floor(between / seconds_per_step))}
    if "log_every" not in given:
        often["log_every"] = min(config.output.log_every, max(1, total // _LINES))
    return config.model_copy(
        update={
            "optimization": options.model_copy(update=length),
            "output": config.output.model_copy(update=often),
        }
    )
