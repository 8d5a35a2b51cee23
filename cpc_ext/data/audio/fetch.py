"""Batches of windows of recordings by where they begin, on the training device.

Where all recordings fit on a CUDA device they are copied there once, and a batch is cut there in one step. Elsewhere it
is cut out of the array or mapped file, and travels to CUDA through pinned memory while the device computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cpc_ext.data.audio.dataset import WaveformSet
from cpc_ext.data.audio.windows import WINDOW
from cpc_ext.data.on_device import fits, require_indices, send, upload


class WaveformFetcher:
    """Gives batches of windows on a device.

    waveforms: where they come from. device: where batches are wanted. window: samples of each.
    resident: keep all recordings on the device. Default: on CUDA where they take at most a quarter of the free memory.

    Raises ValueError where there is no window of that length.
    """

    def __init__(
        self,
        waveforms: WaveformSet,
        device: torch.device | str = "cpu",
        window: int = WINDOW,
        *,
        resident: bool | None = None,
    ) -> None:
        self.waveforms = waveforms
        self.device = torch.device(device)
        self.window = window
        # Not the mapped file's own class, whose every slice costs microseconds more.
        self._samples = np.asarray(waveforms.samples)
        if not 1 <= window <= len(self._samples):
            raise ValueError(f"window: expected 1..{len(self._samples)} samples, got {window}")
        if resident is None:
            resident = fits(self._samples, self.device)
        self._resident = upload(self._samples, self.device) if resident else None

    @property
    def resident(self) -> bool:
        """Whether all recordings are on the device."""
        return self._resident is not None

    def __call__(self, starts: np.ndarray | Sequence[int]) -> Tensor:
        """The windows that begin at these samples (integers, [B]): int16 [B, 1, window] on the device.

        Raises IndexError where a window does not lie in the sound, TypeError where they are not integers.
        """
        chosen = require_indices("starts", starts, len(self._samples) - self.window + 1)
        if self._resident is not None:
            return self._resident.unfold(0, self.window, 1)[send(chosen, self.device)][:, None]
        windows = np.lib.stride_tricks.sliding_window_view(self._samples, self.window)
        return send(windows[chosen], self.device)[:, None]

    def labels(self, starts: np.ndarray) -> Tensor | None:
        """Who speaks where these windows begin: int64 [B] on the device; None where that is not known."""
        speakers = self.waveforms.speakers_at(np.asarray(starts))
        return None if speakers is None else send(speakers, self.device)
