"""The random numbers of a run: one generator a purpose, owned by the run, so that none disturbs another.

Drawing other negatives, say, leaves the crops as they were. Together with the generators that PyTorch's own layers use
they are saved in checkpoints, which makes a resumed run draw what it would have drawn. The order of the images is not
among them: it follows from the seed and the epoch's number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cpc_ext.data import BatchShare

__all__ = ["RandomStreams", "seeded"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's own generator draws the numbers of a seed, as for initial weights, and is then as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


class RandomStreams:
    """Generators seeded from one seed; PyTorch's own generators are seeded with it as well.

    Of several processes that share a batch each draws the same numbers, those of the whole batch.

    Attributes:
        share: the part of the batch that this process takes of what is drawn for all of it.
        views: of crops and flips; on the CPU, so that a seed gives the same ones on every device.
        negatives: of sampled negatives; on the training device.
    """

    def __init__(self, seed: int, device: torch.device, share: BatchShare | None = None) -> None:
        self._device = device
        self.share = BatchShare() if share is None else share
        # The two must differ in their seeds, or crops and negatives would be made of the same numbers.
        self.views = torch.Generator().manual_seed(2 * seed)
        self.negatives = torch.Generator(device).manual_seed(2 * seed + 1)
        torch.manual_seed(seed)

    def state_dict(self) -> dict[str, Any]:
        return {
            "views": self.views.get_state(),
            "negatives": self.negatives.get_state(),
            "device": self._device.type,
            "torch": torch.get_rng_state(),
            "torch_device": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. A run that moves to another kind of device draws its negatives anew."""
        self.views.set_state(state["views"])
        torch.set_rng_state(state["torch"])
        if state["device"] != self._device.type:
            return
        self.negatives.set_state(state["negatives"])
        if state["torch_device"] is not None:
            torch.cuda.set_rng_state(state["torch_device"], self._device)
