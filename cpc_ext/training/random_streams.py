"""The random numbers of a run: one generator a purpose, owned by the run, so that none disturbs another.

Drawing other negatives, say, leaves the crops as they were. Together with the generators that PyTorch's own layers use
they are saved in checkpoints, which makes a resumed run draw what it would have drawn. The order of the images is not
among them: it follows from the seed and the epoch's number.
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
    """PyTorch's generator of the CPU draws numbers of a seed, as for initial weights, and is then as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class RandomStreams:
    """Generators seeded from one seed, and PyTorch's own, which draw what layers drop out.

    Of several processes that share a batch each draws the same numbers, those of the whole batch. PyTorch's own
    generators draw for the rows of this process alone, so that each process has others.

    Args:
        seed: of the run.
        device: the training device.
        share: the part of the batch that this process takes of what is drawn for all of it; None takes all.
        rank: number of this process.

    Attributes:
        share: as above.
        views: of crops and flips; on the CPU, so that a seed gives the same ones on every device.
        negatives: of sampled negatives; on the training device.
    """

    def __init__(self, seed: int, device: torch.device, share: BatchShare | None = None, *, rank: int = 0) -> None:
        self._device = device
        self._rank = rank
        self.share = BatchShare() if share is None else share
        # All must differ in their seeds, or crops, negatives and dropout would be made of the same numbers.
        self.views = torch.Generator().manual_seed(2 * seed)
        self.negatives = torch.Generator(device).manual_seed(2 * seed + 1)
        torch.manual_seed(int(np.random.SeedSequence((seed, rank)).generate_state(1, np.uint64)[0]))

    def state_dict(
        self, gathered: Callable[[dict[str, Any]], list[dict[str, Any]] | None] = lambda own: [own]
    ) -> dict[str, Any]:
        """The state of the generators of all processes, complete in the main one.

        gathered: from what each process passes to a list of all of it, by rank, in the main process; None in others.
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
        """Go on from ``state``.

        A run that moves to another kind of device draws its negatives anew, and one of more processes than it had
        what the further ones drop out.
        """
        same_device = state["device"] == self._device.type
        self.views.set_state(state["views"])
        if same_device:
            self.negatives.set_state(state["negatives"])
        # A checkpoint of before there was one for each process has that of the first.
        own = dict(enumerate(state.get("own", [state]))).get(self._rank)
        if own is None:
            return
        torch.set_rng_state(own["torch"])
        if same_device and own["torch_device"] is not None:
            torch.cuda.set_rng_state(own["torch_device"], self._device)
