"""The parts of a model in a step: each learns by a loss of its own, on what the one before it has made.

Of several processes each trains all parts on its share of a batch; in a pipeline, see there, each trains one.
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
        learners: of those parts that this process trains.
    """

    def __init__(self, task: Task, config: RunConfig, ranks: Ranks) -> None:
        self.modules = task.parts()
        self._ranks = ranks
        self.learners = [Learner(index, self.modules[index], config, ranks) for index in self._mine()]

    @property
    def losses(self) -> list[str]:
        """What the losses of this process are called among the scalars of :meth:`update`."""
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
        """An update of every part on the batch of these indices; it waits for the device no more than a learner's.

        Returns the scalars of the parts that this process trains.
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
        """A meter's means of all parts, and where there are several also over them, which come first."""
        means = self._gathered(meter.means())
        count = len(self.modules)
        if count == 1:
            return means
        names = [name.removesuffix("_module_0") for name in means if name.endswith("_module_0")]
        over_parts = {name: sum(means[self._named(name, part)] for part in range(count)) / count for name in names}
        return over_parts | means

    def any(self, flag: bool) -> bool:
        """Whether the flag was set in any process; all are told the same before the same step."""
        return self._ranks.any(flag)

    def state_dict(self, meters: dict[str, Meter]) -> dict[str, Any]:
        """What a checkpoint keeps of the learners and these meters; complete in the main process. All call it."""
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
        """Go on from ``state``. An exception, of nearly any type, where it is not of these parts."""
        single = len(self.modules) == 1
        for learner in self.learners:
            learner.load_state_dict(
                {name: state[name] if single else state[name][learner.index] for name in ("optimizer", "scaler")}
            )
        for name, meter in meters.items():
            meter.load_state_dict(self._measured_here(state[name]))

    def bring_weights(self) -> None:
        """Let the main process's model have the weights of all parts, wherever they are trained. All call it."""

    def finish(self) -> None:
        """Wait for all that is under way between the processes."""

    def _mine(self) -> Sequence[int]:
        """Which parts this process trains."""
        return range(len(self.modules))

    def _take(self, batch: np.ndarray, fetch: Fetcher) -> Handover:
        """What the first part of this process gets."""
        return Handover(fetch(batch))

    def _give(self, handed: Handover) -> None:
        """Hand on what the last part of this process has made."""

    def _gathered(self, means: dict[str, float]) -> dict[str, float]:
        """The means of all parts, from those of this process's."""
        return means

    def _collected(
        self, learners: list[dict[str, Any]], meters: dict[str, dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
        """States of all learners and meters, from this process's; the weights of all go into the model."""
        return learners, meters

    def _measured_here(self, meter: dict[str, Any]) -> dict[str, Any]:
        """A meter's state with the values of the parts that this process trains."""
        return meter

    def _named(self, name: str, part: int) -> str:
        """What a part's value is called where there are several parts."""
        return name if len(self.modules) == 1 else f"{name}_module_{part}"
