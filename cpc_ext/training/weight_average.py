"""A running average of a model's weights, which is often better than the weights of any one step.

In the first updates it forgets faster, as there is little to remember: what it keeps grows with their number.
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

    Update n keeps the share min(decay, (1 + n) / (10 + n)) of the average and takes the rest from the model.

    Attributes:
        model: with the average as its weights, in evaluation mode.

    Args:
        model: whose weights it starts from.
        decay: the share that an update keeps at most, from 0 to 1.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model: Model = copy.deepcopy(model).requires_grad_(False).eval()
        self._decay = decay
        self._updates = 0

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Take in the weights of ``model``, without waiting for the device."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)

    def state_dict(self) -> dict[str, Any]:
        weights: dict[str, Tensor] = self.model.state_dict()
        return {_UPDATES: self._updates} | {_PREFIX + name: value for name, value in weights.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """KeyError, TypeError or RuntimeError where ``state`` is not of such a model."""
        if type(state[_UPDATES]) is not int or state[_UPDATES] < 0:
            raise TypeError(f"expected a number of updates, got {state[_UPDATES]!r}")
        self._updates = state[_UPDATES]
        self.model.load_state_dict(averaged_weights(state))


def averaged_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """The weights of the model in a :meth:`WeightAverage.state_dict`; none where it holds no average."""
    return {name.removeprefix(_PREFIX): value for name, value in state.items() if name.startswith(_PREFIX)}
