"""The random number generators of a run: one for each purpose, so that none disturbs another.

Drawing other negatives, for example, does not change the crops. Checkpoints save these generators and PyTorch's own, so
that a resumed run draws what it would have drawn without the break. The order of the images needs no generator here: it
follows from the seed and the number of the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from cpc_ext.data import BatchShare

__all__ = ["RandomStreams", "seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's CPU generator during the block, as for initial weights, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class RandomStreams:
    """Generators derived from one seed; PyTorch's own, which draw dropout masks, are seeded too.

    Processes that share a batch all draw the same numbers, for the whole batch. PyTorch's own generators draw only for
    this process's rows, so they are seeded differently in each process.

    Args:
        seed: the run's seed.
        device: the training device.
        share: this process's share of what is drawn for the whole batch; None for all of it.
        rank: rank of this process.

    Attributes:
        share: as above.
        views: generator of crops and flips, on the CPU, so that a seed gives the same ones on every device.
        negatives: generator of sampled negatives, on the training device.
    """

    def __init__(self, seed: int, device: torch.device, share: BatchShare | None = None, *, rank: int = 0) -> None:
        self._device = device
        self._rank = rank
        self.share = BatchShare() if share is None else share
        # The seeds must differ, or crops, negatives and dropout would use the same random numbers.
        self.views = torch.Generator().manual_seed(2 * seed)
        self.negatives = torch.Generator(device).manual_seed(2 * seed + 1)
        torch.manual_seed(int(np.random.SeedSequence((seed, rank)).generate_state(1, np.uint64)[0]))

    def state_dict(
        self, gathered: Callable[[dict[str, Any]], list[dict[str, Any]] | None] = lambda own: [own]
    ) -> dict[str, Any]:
        """Return the state of the generators of all processes, complete in the main process only.

        Args:
            gathered: gathers a value from every process; returns a list of them by rank in the main process, and None
                in the others.
        """
        own = {
            "torch": torch.get_rng_state(),
            "torch_device": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
        }
        return {
            "views": self.views.get_state(),
            "negatives": self.negatives.get_state(),
            "device": self._device.type,
            "own": gathered(own),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore ``state``.

        Some generators keep their initial seeds instead: those of the training device if the run moves to another kind
        of device, and PyTorch's own in processes that the run did not have before.
        """
        same_device = state["device"] == self._device.type
        self.views.set_state(state["views"])
        if same_device:
            self.negatives.set_state(state["negatives"])
        # Older checkpoints have only the state of the first process, at the top level.
        own = dict(enumerate(state.get("own", [state]))).get(self._rank)
        if own is None:
            return
        torch.set_rng_state(own["torch"])
        if same_device and own["torch_device"] is not None:
            torch.cuda.set_rng_state(own["torch_device"], self._device)
