"""Batches of indices in seeded random order, from a position that can be saved and restored exactly.

An epoch's order follows from the seed and the epoch's number alone, so two numbers are the whole state.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


class EpochSampler:
    """Yields one epoch of batches a pass; every pass has an order of its own.

    count: number of images. batch_size: images a batch, all processes together. seed: of the order.
    drop_last: leave out what is left when no full batch can be made; otherwise it makes a smaller last batch.
    rank, world_size: of several processes that share an epoch, each gets its own part of every batch. The batches
        themselves do not depend on how many there are.

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
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0..{world_size - 1}, got {rank}")
        if not drop_last and world_size > 1:
            raise ValueError("drop_last: must be True where several processes share an epoch")
        if batch_size % world_size:
            raise ValueError(f"batch_size: expected a multiple of the {world_size} processes, got {batch_size}")
        if count < 1 or (drop_last and batch_size > count):
            raise ValueError(f"batch_size: expected at most {count} images, got {batch_size}")
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.batch = 0

    def __len__(self) -> int:
        """Batches an epoch."""
        full, rest = divmod(self.count, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[np.ndarray]:
        """What is left of the current epoch, as int64 arrays; then the next epoch becomes current.

        Each holds this process's part of a batch, [batch_size / world_size]. A batch counts as done when it
        is handed out: state saved after training on it goes on with the next.
        """
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        part = self.batch_size // self.world_size
        batches = len(self)
        while self.batch < batches:
            start = self.batch * self.batch_size + self.rank * part
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

    def _order(self) -> dict[str, int]:
        return {
            "count": self.count,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "drop_last": int(self.drop_last),
        }
