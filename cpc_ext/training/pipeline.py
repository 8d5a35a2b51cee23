"""Pipeline training: each process trains one part of a model and sends its output features to the next process.

No gradients flow back, so a process starts the next batch as soon as it has begun to send its features. The first
process is a few steps ahead of the last, and they wait for each other only to log, observe or save.
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

# Maximum number of steps whose features are being sent to the next process; each holds its memory until then.
_UNDER_WAY = 2
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A header precedes the first features: dtype, layout, number of dimensions, and that many sizes, padded with zeros.
_MOST_DIMENSIONS = 4
_HEADER = 3 + _MOST_DIMENSIONS


class Pipeline(Parts):
    """The parts of a task, of which each process trains one on whole batches.

    Raises:
        TrainingError: the number of processes is not the number of parts.
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
        """Load the other processes' weights into this process's model; ``found`` holds those of all parts, by rank."""
        for module, weights in zip(self.modules[1:], found[1:], strict=True):
            module.load_state_dict(weights)

    def _measured_here(self, meter: dict[str, Any]) -> dict[str, Any]:
        mine = self._named("", self._ranks.rank)
        return {**meter, "sums": {name: value for name, value in meter["sums"].items() if name.endswith(mine)}}


class _Link:
    """A process's connections to the processes before and after it."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._previous = ranks.rank - 1
        self._next = ranks.rank + 1 if ranks.rank + 1 < ranks.world_size else None
        self._sending: deque[tuple[Any, Tensor]] = deque()
        self._flags: deque[tuple[Any, Tensor]] = deque()
        # Dtype, whether it is channels_last, and shape of received features: the same in all steps.
        self._form: tuple[torch.dtype, bool, list[int]] | None = None
        self._announced = False

    def receive(self) -> Tensor:
        """Receive this step's features from the process before: [N, D, h, w], or [N, D, L] for sequences."""
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
        """Send this step's features to the next process, if there is one; they must not be modified afterwards."""
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
        """Return whether the flag was set in any process some steps ago, so that no process waits for a later one."""
        return self._ranks.any_before(flag, self._flags, 2 * self._ranks.world_size)

    def finish(self) -> None:
        """Wait for all pending communication."""
        for work, _ in (*self._sending, *self._flags):
            work.wait()
        self._sending.clear()
        self._flags.clear()


def _to_cpu(tree: Any) -> Any:
    """Copy a tree of dicts, lists and tuples, with all tensors moved to the CPU."""
    if isinstance(tree, Tensor):
        return tree.cpu()
    if isinstance(tree, dict):
        return {name: _to_cpu(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_to_cpu(value) for value in tree)
    return tree


def _bytes(features: Tensor, channels_last: bool) -> Tensor:
    """View the memory of features as uint8 [bytes], because not every backend can send every dtype."""
    return (features.permute(0, 2, 3, 1) if channels_last else features).reshape(-1).view(torch.uint8)
