"""A line of processes, each of which trains one part of a model and sends what it makes to the next.

As nothing flows back, a process goes on with the next batch as soon as its features are on their way: a few steps lie
between the first process and the last, and they only wait for each other where something is logged or saved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cpc_ext.training.config import RunConfig
from cpc_ext.training.distribution import Ranks
from cpc_ext.training.errors import TrainingError
from cpc_ext.training.parts import Parts
from cpc_ext.training.task import Fetcher, Handover, Task

__all__ = ["Pipeline"]

# Features of so many steps may be on their way to the next process, for as much memory.
_UNDER_WAY = 2
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A header goes before the first features: type, layout, number of dimensions, and room for their sizes.
_MOST_DIMENSIONS = 4
_HEADER = 3 + _MOST_DIMENSIONS


class Pipeline(Parts):
    """The parts of a task, each trained by a process of its own on whole batches; this one has one of them.

    Raises:
        TrainingError: another number of processes than of parts.
    """

    def __init__(self, task: Task, config: RunConfig, ranks: Ranks) -> None:
        super().__init__(task, config, ranks)
        self._link = _Link(ranks)

    def any(self, flag: bool) -> bool:
        return self._link.any(flag)

    def bring_weights(self) -> None:
        found = self._ranks.gather_on_main(_to_cpu(self.modules[self._ranks.rank].state_dict()))
        if found is not None:
            self._take_weights(found)

    def finish(self) -> None:
        self._link.finish()

    def _mine(self) -> Sequence[int]:
        count = len(self.modules)
        if count != self._ranks.world_size:
            raise TrainingError(
                f"--pipeline needs a process for each of {count} modules: start it by torchrun --standalone "
                f"--nproc-per-node {count}, not with {self._ranks.world_size}, or give --no-pipeline"
            )
        return [self._ranks.rank]

    def _take(self, batch: np.ndarray, fetch: Fetcher) -> Handover:
        return super()._take(batch, fetch) if self._ranks.rank == 0 else Handover(self._link.receive())

    def _give(self, handed: Handover) -> None:
        self._link.send(handed.features)

    def _gathered(self, means: dict[str, float]) -> dict[str, float]:
        return {name: value for found in self._ranks.gather(means) for name, value in found.items()}

    def _collected(
        self, learners: list[dict[str, Any]], meters: dict[str, dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
        (learner,) = learners
        found = self._ranks.gather_on_main(_to_cpu((self.modules[self._ranks.rank].state_dict(), learner, meters)))
        if found is None:
            return learners, meters
        self._take_weights([weights for weights, _, _ in found])
        for name, meter in meters.items():
            for _, _, others in found:
                meter["sums"] |= others[name]["sums"]
        return [learner for _, learner, _ in found], meters

    def _take_weights(self, found: Sequence[dict[str, Any]]) -> None:
        """Those of the other processes' parts, of the weights of all, into the model of this one, the first."""
        for module, weights in zip(self.modules[1:], found[1:], strict=True):
            module.load_state_dict(weights)

    def _measured_here(self, meter: dict[str, Any]) -> dict[str, Any]:
        mine = self._named("", self._ranks.rank)
        return {**meter, "sums": {name: value for name, value in meter["sums"].items() if name.endswith(mine)}}


class _Link:
    """A process's connections to the one before it and the one after it."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._previous = ranks.rank - 1
        self._next = ranks.rank + 1 if ranks.rank + 1 < ranks.world_size else None
        self._sending: deque[tuple[Any, Tensor]] = deque()
        self._flags: deque[tuple[Any, Tensor]] = deque()
        # The shape of the features that arrive: all steps have the same.
        self._form: tuple[torch.dtype, bool, list[int]] | None = None
        self._announced = False

    def receive(self) -> Tensor:
        """The features that the process before has sent for this step: [N, D, h, w], of sequences [N, D, L]."""
        if self._form is None:
            header = torch.empty(_HEADER, dtype=torch.int64)
            dist.recv(header, self._previous)
            number, channels_last, dimensions, *shape = header.tolist()
            self._form = _DTYPES[number], bool(channels_last), shape[:dimensions]
        dtype, channels_last, shape = self._form
        features = torch.empty(
            shape,
            dtype=dtype,
            device=self._ranks.device,
            memory_format=torch.channels_last if channels_last else torch.contiguous_format,
        )
        dist.recv(_bytes(features, channels_last), self._previous)
        return features

    def send(self, features: Tensor) -> None:
        """Send this step's features to the next process, if there is one; they must stay as they are."""
        if self._next is None:
            return
        channels_last = features.ndim == 4 and features.is_contiguous(memory_format=torch.channels_last)
        if not channels_last:
            features = features.contiguous()
        if not self._announced:
            sizes = [*features.shape, *([0] * (_MOST_DIMENSIONS - features.ndim))]
            header = torch.tensor([_DTYPES.index(features.dtype), int(channels_last), features.ndim, *sizes])
            dist.send(header, self._next)
            self._announced = True
        content = _bytes(features, channels_last)
        self._sending.append((dist.isend(content, self._next), content))
        while len(self._sending) > _UNDER_WAY:
            self._sending.popleft()[0].wait()

    def any(self, flag: bool) -> bool:
        """Whether the flag was set in any process, some steps ago: the last process is as many behind the first."""
        return self._ranks.any_before(flag, self._flags, 2 * self._ranks.world_size)

    def finish(self) -> None:
        """Wait for all that is under way."""
        for work, _ in (*self._sending, *self._flags):
            work.wait()
        self._sending.clear()
        self._flags.clear()


def _to_cpu(tree: Any) -> Any:
    """Dicts, lists and tuples with all tensors in them on the CPU."""
    if isinstance(tree, Tensor):
        return tree.cpu()
    if isinstance(tree, dict):
        return {name: _to_cpu(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_to_cpu(value) for value in tree)
    return tree


def _bytes(features: Tensor, channels_last: bool) -> Tensor:
    """The memory of features, uint8 [bytes]: not every backend sends every type."""
    return (features.permute(0, 2, 3, 1) if channels_last else features).reshape(-1).view(torch.uint8)
