"""The training step over a model's parts, each of which learns by its own loss on the output of the part before it.

Each process trains all parts on its share of the batch; with :class:`~cpc_ext.training.pipeline.Pipeline` each process
trains one part on whole batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from cpc_ext.training.config import RunConfig
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.learner import Learner
from cpc_ext.training.meter import FiniteGuard, Meter
from cpc_ext.training.random_streams import RandomStreams
from cpc_ext.training.task import Fetcher, Handover, Task

__all__ = ["Parts"]


class Parts:
    """All parts of a task, trained in this process.

    Attributes:
        modules: the parts, first to last, see :meth:`cpc_ext.training.task.Task.parts`.
        learners: one for each part that this process trains.
    """

    def __init__(self, task: Task, config: RunConfig, ranks: Ranks) -> None:
        self.modules = task.parts()
        self._ranks = ranks
        self.learners = [Learner(index, self.modules[index], config, ranks) for index in self._mine()]

    @property
    def losses(self) -> list[str]:
        """Names of this process's losses among the scalars of :meth:`update`."""
        return [self._named("loss", learner.index) for learner in self.learners]

    def update(
        self,
        step: int,
        batch: np.ndarray,
        fetch: Fetcher,
        streams: RandomStreams,
        *,
        learning_rate: float,
        guard: FiniteGuard,
    ) -> dict[str, Tensor]:
        """Update every part once; waits for the device only where :meth:`Learner.update` does.

        Args:
            step: number of the update.
            batch: int64 [B], the indices of the batch's examples.
            fetch: returns the examples and labels of indices.
            streams: the run's random numbers.
            learning_rate: of this update.
            guard: watches the losses and gradients for values that are not finite.

        Returns:
            The scalars of the parts that this process trains.
        """
        labels = fetch.labels(batch)
        handed = self._take(batch, fetch)
        measured: dict[str, Tensor] = {}
        for learner in self.learners:
            values, handed = learner.update(step, handed, labels, streams, learning_rate=learning_rate, guard=guard)
            measured |= {self._named(name, learner.index): value for name, value in values.items()}
        self._give(handed)
        return measured

    def means(self, meter: Meter) -> dict[str, float]:
        """Return a meter's means for all parts; with several parts, the means over the parts come first."""
        means = self._gathered(meter.means())
        count = len(self.modules)
        if count == 1:
            return means
        names = [name.removesuffix("_module_0") for name in means if name.endswith("_module_0")]
        over_parts = {name: sum(means[self._named(name, part)] for part in range(count)) / count for name in names}
        return over_parts | means

    def any(self, flag: bool) -> bool:
        """Return whether the flag was set in any process; all processes get the same answer before the same step."""
        return self._ranks.any(flag)

    def state_dict(self, meters: dict[str, Meter]) -> dict[str, Any]:
        """Return the state of learners and meters, complete in the main process only. All processes must call it."""
        learners, states = self._collected(
            [learner.state_dict() for learner in self.learners],
            {name: meter.state_dict() for name, meter in meters.items()},
        )
        single = len(self.modules) == 1
        return {
            **{
                name: learners[0][name] if single else [learner[name] for learner in learners]
                for name in ("optimizer", "scaler")
            },
            **states,
        }

    def load_state_dict(self, state: dict[str, Any], meters: dict[str, Meter]) -> None:
        """Restore ``state``. Raises an exception, of nearly any type, if it is not a state of these parts."""
        single = len(self.modules) == 1
        for learner in self.learners:
            learner.load_state_dict(
                {name: state[name] if single else state[name][learner.index] for name in ("optimizer", "scaler")}
            )
        for name, meter in meters.items():
            meter.load_state_dict(self._measured_here(state[name]))

    def bring_weights(self) -> None:
        """Load the weights of all parts into the main process's model. All processes must call it."""

    def finish(self) -> None:
        """Wait for all pending communication between the processes."""

    def _mine(self) -> Sequence[int]:
        """Return the indices of the parts that this process trains."""
        return range(len(self.modules))

    def _take(self, batch: np.ndarray, fetch: Fetcher) -> Handover:
        """Return the input of this process's first part."""
        return Handover(fetch(batch))

    def _give(self, handed: Handover) -> None:
        """Pass on the output of this process's last part."""

    def _gathered(self, means: dict[str, float]) -> dict[str, float]:
        """Return the means of all parts, given the means of this process's parts."""
        return means

    def _collected(
        self, learners: list[dict[str, Any]], meters: dict[str, dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
        """Return the states of all learners and meters, given this process's; load the weights of all parts."""
        return learners, meters

    def _measured_here(self, meter: dict[str, Any]) -> dict[str, Any]:
        """Return a meter's state with only the values of the parts that this process trains."""
        return meter

    def _named(self, name: str, part: int) -> str:
        """Return the name of a part's scalar, with a suffix if there are several parts."""
        return name if len(self.modules) == 1 else f"{name}_module_{part}"
