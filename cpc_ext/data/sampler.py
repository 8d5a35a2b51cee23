"""Batches of indices in seeded random order, from a position that can be saved and restored exactly.

An epoch's order follows from the seed and the epoch's number alone, so two numbers are the whole state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np


class BatchTooLargeError(ValueError):
    """A batch that the examples do not fill. most: how large one may be."""

    def __init__(self, most: int, of: str, got: int) -> None:
        self.most = most
        super().__init__(f"batch_size: expected at most {most} {of}, got {got}")


class BatchSampler(ABC):
    """Yields one epoch of batches a pass; what is in them is up to those that derive from it.

    batch_size: examples a batch, all processes together. seed: of the order.
    rank, world_size: of several processes that share an epoch, each gets its own part of every batch. The batches
        themselves do not depend on how many there are.
    drop_last: whether there are full batches only.

    Raises ValueError where processes would get unequal parts.
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
        """Batches an epoch."""

    @property
    @abstractmethod
    def mean_batch(self) -> float:
        """Examples of a batch, all processes together, in the mean over an epoch."""

    @abstractmethod
    def _drawn(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """An epoch: what its batches hold, int64, one after another, and the len(self) + 1 places where they begin."""

    @abstractmethod
    def _order(self) -> dict[str, int]:
        """What a position means anything with."""

    def __iter__(self) -> Iterator[np.ndarray]:
        """What is left of the current epoch, as int64 arrays; then the next epoch becomes current.

        Each holds this process's part of a batch, [batch_size / world_size]. A batch counts as done when it
        is handed out: state saved after training on it goes on with the next.
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
        """The position, and what it means anything with: equal on all processes, however many there are."""
        return {**self._order(), "epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position. ValueError where it belongs to another order of batches."""
        for name, mine in self._order().items():
            if state.get(name) != mine:
                raise ValueError(f"sampler state: expected {name} {mine}, got {state.get(name)}")
        if state["epoch"] < 0 or not 0 <= state["batch"] < len(self):
            raise ValueError(f"sampler state: no batch {state['batch']} of epoch {state['epoch']}")
        self.epoch, self.batch = state["epoch"], state["batch"]


class EpochSampler(BatchSampler):
    """Batches of all indices, in an order of its own every epoch.

    count: number of images. batch_size, seed, rank, world_size: see :class:`BatchSampler`.
    drop_last: leave out what is left when no full batch can be made; otherwise it makes a smaller last batch.

    Raises ValueError where no batch can be made, or where processes would get unequal parts.
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
