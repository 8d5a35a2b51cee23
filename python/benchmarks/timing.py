"""Timing of alternatives in turn, so that all of them run under the same conditions, with medians.

On the CPU a call is timed by the clock. On CUDA it is timed on the device, between two events, while the untimed calls
before it keep the queue filled: the result is the rate at which such calls follow each other, as in a training loop.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Plan", "Time", "interleaved", "make_plan", "timed"]

# A call that takes this long accesses far more memory than a cache holds, so that the calls before it matter little.
SLOW_SECONDS = 0.1
FEWEST_REPEATS = 5


@dataclass(frozen=True)
class Time:
    """Seconds of one call: the median and the quartiles over all calls."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> Time:
        """Compute the median and quartiles of at least two measurements."""
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(statistics.median(seconds), low, high)

    def __str__(self) -> str:
        return f"{self.median * 1e3:.2f} ms ({self.low * 1e3:.2f} to {self.high * 1e3:.2f})"


@dataclass(frozen=True)
class Plan:
    """Numbers of calls of a case's alternatives: timed rounds, rounds before these, and untimed calls of each."""

    repeats: int
    warmup: int
    untimed: Mapping[str, int]


def timed(call: Callable[[], object], device: torch.device | str) -> Callable[[], float]:
    """Start a timed call, and return a function that waits for its end and returns the seconds."""
    if torch.device(device).type != "cuda":
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return lambda: seconds
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()

    def wait() -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return wait


def make_plan(
    alternatives: Mapping[str, Callable[[], object]], *, repeats: int, seconds: float, device: torch.device | str
) -> Plan:
    """Call each alternative twice, and plan ``repeats`` rounds of all, or fewer to stay within ``seconds``.

    Slow calls get one untimed call instead of three, and at least five rounds remain.
    """
    pilot = {}
    for name, call in alternatives.items():
        call()
        pilot[name] = timed(call, device)()
    untimed = {name: 1 if value > SLOW_SECONDS else 3 for name, value in pilot.items()}
    warmup = 1 if max(pilot.values()) > SLOW_SECONDS else 3
    round_seconds = sum((1 + untimed[name]) * value for name, value in pilot.items())
    affordable = int(seconds / round_seconds) - warmup
    return Plan(max(min(FEWEST_REPEATS, repeats), min(repeats, affordable)), warmup, untimed)


def interleaved(
    alternatives: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    device: torch.device | str = "cpu",
    warmup: int = 3,
    untimed: int | Mapping[str, int] = 3,
) -> dict[str, Time]:
    """Time every alternative ``repeats`` times, at least twice, one after another in each round.

    Before each timed call come ``untimed`` ones, since the previous alternative leaves its data in the caches and the
    memory allocator, and the last-level cache of a current server takes three calls to settle.
    """
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for round_ in range(warmup + repeats):
        for name, call in alternatives.items():
            for _ in range(untimed if isinstance(untimed, int) else untimed[name]):
                call()
            duration = timed(call, device)()
            if round_ >= warmup:
                seconds[name].append(duration)
    return {name: Time.of(values) for name, values in seconds.items()}
