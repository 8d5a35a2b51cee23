"""Means of the steps' scalars, accumulated on the training device so that no step waits for it.

The host waits for the device only when it reads a mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["FiniteGuard", "Meter"]


class Meter:
    """Running means of named scalars."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self.count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one step's values: scalars on the device, with the same names in every step."""
        for name, value in values.items():
            value = value.detach().float()
            # Not in place: under torch.compile with CUDA graphs the value's memory is reused by the next step.
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self.count += 1

    def means(self) -> dict[str, float]:
        """Return each name's mean since the last reset, or an empty dict if nothing was added; waits for the device."""
        if not self.count:
            return {}
        return dict(zip(self._sums, (torch.stack(list(self._sums.values())) / self.count).tolist(), strict=True))

    def reset(self) -> None:
        self._sums.clear()
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state``. Raises KeyError, TypeError, AttributeError or RuntimeError if it is not of a meter."""
        if type(state["count"]) is not int or state["count"] < 0:
            raise TypeError(f"expected a number of steps, got {state['count']!r}")
        self._sums = {name: value.to(self._device, torch.float32).reshape(()) for name, value in state["sums"].items()}
        self.count = state["count"]


class FiniteGuard:
    """Remembers, on the device, the first step with a value that is not finite."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.full((), -1, dtype=torch.int64, device=device)

    def watch(self, step: int, *values: Tensor) -> None:
        finite = torch.stack([value.detach().isfinite().all() for value in values]).all()
        self._first = torch.where(finite | (self._first >= 0), self._first, step)

    def first_bad_step(self) -> int | None:
        """Return the first step with such a value, or None if there is none; waits for the device."""
        step = int(self._first)
        return None if step < 0 else step
