"""Means of what the steps measure, kept on the training device so that no step waits for it.

Between log lines values are only added up there; reading a mean is the one point where the host waits.
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
        """Count one step's values: scalars on the device, the same names each time."""
        for name, value in values.items():
            value = value.detach().float()
            # Not in place: under torch.compile with CUDA graphs the value's memory is reused by the next step.
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
        self.count += 1

    def means(self) -> dict[str, float]:
        """Mean of every name since the last reset; waits for the device. Empty where nothing was counted."""
        if not self.count:
            return {}
        return dict(zip(self._sums, (torch.stack(list(self._sums.values())) / self.count).tolist(), strict=True))

    def reset(self) -> None:
        self._sums.clear()
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. KeyError, TypeError, AttributeError or RuntimeError where it is none."""
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
        """The step, or None while all was finite; waits for the device."""
        step = int(self._first)
        return None if step < 0 else step
