"""A run's length from the minutes it may take: some steps are measured, and the config gets as many as fill them.

What comes of it is an ordinary config with a number of steps, so that the run can be repeated and resumed like any
other, on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from statistics import median

from cpc_ext.training.config import RunConfig

__all__ = ["FirstSteps", "filled", "seconds_per_step"]

# Steps before the clock starts: the first ones choose kernels, fill caches and allocate.
_UNTIMED = 5
# How long is measured: a fiftieth of the budget within these bounds, in seconds; up to so many times as long where the
# pace still changes, as it does while images are read from the disk for the first time.
_SHARE, _SHORTEST, _LONGEST, _PATIENCE = 0.02, 1.0, 30.0, 3.0
# Parts that this is measured in. The last ones count, and end it where none took so many times as long as another.
_PARTS, _COUNTED, _ALIKE = 8, 4, 1.15
# Seconds of a run's first steps that tell its pace.
_TELLING = 5.0
# A checkpoint this often, as a share of the run, but not sooner than after these seconds.
_CHECKPOINTS, _BETWEEN_CHECKPOINTS = 0.05, 30.0
# Lines of the log that a run has at least, as far as it has steps, and the largest share that is spent on warm-up.
_LINES = 50
_WARMUP = 0.1


def seconds_per_step(take: Callable[[int], float], budget: float) -> float:
    """How long a step takes, measured.

    take: takes that many steps and tells how many seconds it was, the same in all processes.
    budget: seconds that the run may take, of which this takes a few hundredths.
    """
    take(_UNTIMED)
    goal = min(max(_SHARE * budget, _SHORTEST), _LONGEST)
    paces = [take(1)]
    spent = paces[0]
    while spent < _PATIENCE * goal:
        # Several at once, so that waiting for a device does not count in every step.
        steps = max(1, round(goal / _PARTS / max(paces[-1], 1e-9)))
        seconds = take(steps)
        paces.append(seconds / steps)
        spent += seconds
        counted = paces[-_COUNTED:]
        if spent >= goal and max(counted) <= _ALIKE * min(counted):
            break
    return median(paces[-_COUNTED:])


class FirstSteps:
    """The pace of a run that is not measured before it begins, told by its first steps."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def pace(self, seconds: float) -> float | None:
        """Seconds a step, or None while it is too early to say. seconds: that the next one took."""
        self._seconds.append(seconds)
        # The first one also prepares, which tells where a step takes so long itself.
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
    """The config of a run that fills its time budget, in steps.

    Checkpoints and lines of the log come as often as suits its length; a new run's warm-up is at most a tenth of it.

    seconds_per_step: what a step takes from now on.
    steps, seconds: of the run so far, which count.
    given: the options that the user chose, by names of fields, which stay as they are.
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
