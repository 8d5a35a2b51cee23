"""The part of a batch that a process holds, so that several processes together draw the same as a single one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["BatchShare"]


@dataclass(frozen=True)
class BatchShare:
    """The rank-th of world_size equal parts of a batch.

    Every process draws random numbers for the images of the whole batch and keeps those of its own part, so that an
    image's random numbers do not depend on the number of processes.
    """

    rank: int = 0
    world_size: int = 1

    def whole(self, images: int) -> int:
        """Return the number of images in the whole batch, given that of a part."""
        return images * self.world_size

    def part(self, values: Tensor) -> Tensor:
        """Return this process's part of values [whole batch, ...]."""
        size = len(values) // self.world_size
        return values[self.rank * size : (self.rank + 1) * size]
