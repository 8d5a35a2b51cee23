"""Timing of alternatives against each other: in turn, so that all of them see the same machine, and as medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

__all__ = ["Time", "interleaved"]


@dataclass(frozen=True)
class Time:
    """Seconds of one call: the median and the quartiles over all calls."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ms ({self.low * 1e3:.2f} to {self.high * 1e3:.2f})"


def interleaved(
    alternatives: dict[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device | str = "cpu",
    warmup: int = 3,
    untimed: int = 3,
) -> dict[str, Time]:
    """Time every alternative ``repeats`` times, one after another in each round.

    Before each timed call come ``untimed`` ones: what the alternative before it left in the caches and the memory
    allocator is not this one's doing, and the last-level cache of a current server takes three calls to settle.
    """
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for round_ in range(warmup + repeats):
        for name, call in alternatives.items():
            for _ in range(untimed):
                call()
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if round_ >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Time(statistics.median(values), *_quartiles(values)) for name, values in seconds.items()}


def _quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4)
    return low, high
