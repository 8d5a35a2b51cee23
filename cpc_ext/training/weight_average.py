"""A running average of a model's weights, which often performs better than the weights of any single step.

The decay grows with the number of updates, so that the average moves away from the initial weights quickly.
"""

from __future__ import annotations

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage", "averaged_weights"]

_PREFIX = "average."
_UPDATES = "average_updates"

Model = TypeVar("Model", bound=nn.Module)


class WeightAverage(Generic[Model]):
    """The exponential moving average of a model's parameters.

    Update n, from 1, uses the decay d = min(decay, (1 + n) / (10 + n)): average ← d · average + (1 - d) · model.

    Attributes:
        model: a copy of the model with the averaged weights, in evaluation mode.

    Args:
        model: the model from whose weights the average starts.
        decay: the largest decay, from 0 to 1.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model: Model = copy.deepcopy(model).requires_grad_(False).eval()
        self._decay = decay
        self._updates = 0

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Update the average with the weights of ``model``, without waiting for the device."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        weights: dict[str, Tensor] = self.model.state_dict()
        return {_UPDATES: self._updates} | {_PREFIX + name: value for name, value in weights.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state``. Raises KeyError, TypeError or RuntimeError if it does not fit the model."""
        if type(state[_UPDATES]) is not int or state[_UPDATES] < 0:
            raise TypeError(f"expected a number of updates, got {state[_UPDATES]!r}")
        self._updates = state[_UPDATES]
        self.model.load_state_dict(averaged_weights(state))


def averaged_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """Return the model's weights in a :meth:`WeightAverage.state_dict`; an empty dict if it holds no average."""
    return {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
