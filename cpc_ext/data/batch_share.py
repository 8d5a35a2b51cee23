"""Which part of a batch a process holds, so that several processes together draw what a single one would."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["BatchShare"]


@dataclass(frozen=True)
class BatchShare:
    """The rank-th of world_size equal parts of a batch.

    Random numbers of images are drawn for the whole batch on every process, each of which takes its own: what an image
    gets then does not depend on how many processes there are.
    """

    rank: int = 0
    world_size: int = 1

    def whole(self, images: int) -> int:
        """Images of the whole batch where a part has ``images``."""
        return images * self.world_size

    def part(self, values: Tensor) -> Tensor:
        """Those of values [whole batch, ...] that belong to this process's images."""
        size = len(values) // self.world_size
        return values[self.rank * size : (self.rank + 1) * size]
