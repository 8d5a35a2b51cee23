"""Batches of indices in seeded random order, with a position that can be saved and restored exactly.

An epoch's order depends on the seed and the epoch's number alone, so that epoch and batch number are the whole state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np


class BatchTooLargeError(ValueError):
    """The batch size exceeds the number of examples. most: the largest possible batch size."""

    def __init__(self, most: int, of: str, got: int) -> None:
        self.most = most
        super().__init__(f"batch_size: expected at most {most} {of}, got {got}")


class BatchSampler(ABC):
    """Base class of samplers: one pass yields the batches of an epoch, whose content derived classes draw.

    batch_size: examples in a batch, over all processes. seed: seed of the order.
    rank, world_size: this process and the number of processes that share an epoch. Each gets its own part of every
        batch; the batches themselves do not depend on the number of processes.
    drop_last: make full batches only.

    Raises ValueError if processes would get unequal parts.
    """

    def __init__(self, batch_size: int, *, seed: int, drop_last: bool, rank: int, world_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0..{world_size - 1}, got {rank}")
        if not drop_last and world_size > 1:
            raise ValueError("drop_last: must be True where several processes share an epoch")
        if batch_size % world_size:
            raise ValueError(f"batch_size: expected a multiple of the {world_size} processes, got {batch_size}")
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.batch = 0

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of batches in an epoch."""

    @property
    @abstractmethod
    def mean_batch(self) -> float:
        """Mean number of examples in a batch, over all processes, in an epoch."""

    @abstractmethod
    def _drawn(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw an epoch: the content of its batches, int64, end to end, and their len(self) + 1 offsets."""

    @abstractmethod
    def _order(self) -> dict[str, int]:
        """Return the settings that determine the order, with which alone a saved position is valid."""

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield the remaining batches of the current epoch as int64 arrays; then the next epoch becomes current.

        Each array is this process's part of a batch, [batch_size / world_size]. A batch counts as done when it is
        yielded, so that a state saved after training on it continues with the next.
        """
        order, edges = self._drawn(np.random.default_rng((self.seed, self.epoch)))
        batches = len(self)
        while self.batch < batches:
            start, end = edges[self.batch : self.batch + 2]
            part = (end - start) // self.world_size
            start += self.rank * part
            self.batch += 1
            if self.batch == batches:
                self.epoch, self.batch = self.epoch + 1, 0
                yield order[start : start + part]
                return
            yield order[start : start + part]

    def state_dict(self) -> dict[str, int]:
        """Return the position, and the settings that determine the order; the same for any number of processes."""
        return {**self._order(), "epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from a saved position. Raises ValueError if it belongs to another order of batches."""
        for name, mine in self._order().items():
            if state.get(name) != mine:
                raise ValueError(f"sampler state: expected {name} {mine}, got {state.get(name)}")
        if state["epoch"] < 0 or not 0 <= state["batch"] < len(self):
            raise ValueError(f"sampler state: no batch {state['batch']} of epoch {state['epoch']}")
        self.epoch, self.batch = state["epoch"], state["batch"]


class EpochSampler(BatchSampler):
    """Yields batches of all indices, in a new random order every epoch.

    count: number of images. batch_size, seed, rank, world_size: see :class:`BatchSampler`.
    drop_last: leave out the remaining images that do not fill a batch; otherwise they make a smaller last batch.

    Raises ValueError if no batch can be made, or if processes would get unequal parts.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(batch_size, seed=seed, drop_last=drop_last, rank=rank, world_size=world_size)
        if count < 1 or (drop_last and batch_size > count):
            raise BatchTooLargeError(count, "images", batch_size)
        self.count = count

    def __len__(self) -> int:
        full, rest = divmod(self.count, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @property
    def mean_batch(self) -> float:
        return min(self.count, len(self) * self.batch_size) / len(self)

    def _drawn(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        edges = np.minimum(np.arange(len(self) + 1) * self.batch_size, self.count)
        return rng.permutation(self.count), edges

    def _order(self) -> dict[str, int]:
        return {
            "count": self.count,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "drop_last": int(self.drop_last),
        }
