"""The learning rate as a function of the update's number, so that checkpoints need no scheduler state."""

from __future__ import annotations

import math

__all__ = ["learning_rate"]


def learning_rate(
    step: int, *, peak: float, total_steps: int, warmup_steps: int, schedule: str, floor: float = 0.0
) -> float:
    """Return the learning rate of update ``step`` (1 is the first).

    It rises linearly to ``peak``, which update ``warmup_steps`` reaches, then stays ("constant") or follows half a
    cosine ("cosine") that would reach ``floor`` times ``peak`` one update after the last.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps - 1) / max(total_steps - warmup_steps, 1)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
