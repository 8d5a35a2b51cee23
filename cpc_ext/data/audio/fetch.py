"""Batches of windows of recordings on the training device, given the samples at which the windows begin.

If all recordings fit on a CUDA device, they are copied there once, and each batch is indexed there in one step.
Otherwise a batch is cut out of the array or mapped file, and copied to CUDA through pinned memory while the device
computes.
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
    """Returns batches of windows on a device.

    waveforms: recordings to cut windows out of. device: device of the batches. window: samples of a window.
    resident: keep all recordings on the device. Default: on CUDA if they take at most a quarter of the free memory.

    Raises ValueError if the recordings together are shorter than a window.
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
        # A plain array, because slicing a np.memmap takes microseconds longer.
        self._samples = np.asarray(waveforms.samples)
        if not 1 <= window <= len(self._samples):
            raise ValueError(f"window: expected 1..{len(self._samples)} samples, got {window}")
        if resident is None:
            resident = fits(self._samples, self.device)
        self._resident = upload(self._samples, self.device) if resident else None

    @property
    def resident(self) -> bool:
        """Return whether all recordings are on the device."""
        return self._resident is not None

    def __call__(self, starts: np.ndarray | Sequence[int]) -> Tensor:
        """Return the windows that begin at these samples (integers, [B]): int16 [B, 1, window] on the device.

        Raises IndexError if a window does not lie within the samples, TypeError if starts are not integers.
        """
        chosen = require_indices("starts", starts, len(self._samples) - self.window + 1)
        if self._resident is not None:
            return self._resident.unfold(0, self.window, 1)[send(chosen, self.device)][:, None]
        windows = np.lib.stride_tricks.sliding_window_view(self._samples, self.window)
        return send(windows[chosen], self.device)[:, None]

    def labels(self, starts: np.ndarray) -> Tensor | None:
        """Return the speakers at the first samples of windows: int64 [B] on the device; None if not known."""
        speakers = self.waveforms.speakers_at(np.asarray(starts))
        return None if speakers is None else send(speakers, self.device)
