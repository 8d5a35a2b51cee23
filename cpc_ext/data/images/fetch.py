"""Batches of uint8 images by index, on the training device.

Where the whole set fits on a CUDA device it is copied there once and a batch never leaves it. Elsewhere a batch is
copied out of the array or mapped file, on CUDA through pinned memory that travels while the device computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cpc_ext.data.images.dataset import ImageSet

# Share of the free device memory that a resident set may take; the rest is the model's.
RESIDENT_SHARE = 0.25
UPLOAD_BYTES = 256 << 20


class ImageFetcher:
    """Gives batches of an image set on a device, by index.

    image_set: where the images come from.
    device: where batches are wanted.
    resident: keep all images on the device. Default: on CUDA where they take at most a quarter of the free memory.
    """

    def __init__(
        self, image_set: ImageSet, device: torch.device | str = "cpu", *, resident: bool | None = None
    ) -> None:
        self.image_set = image_set
        self.device = torch.device(device)
        # Images may be stored with their axes in another order (STL-10: columns first). Batches keep that order in
        # memory, as copying whole images is fastest, and are put right by strides.
        strides = image_set.images.strides[1:]
        self._stored = (0, *sorted((1, 2, 3), key=lambda axis: -strides[axis - 1]))
        self._restored = tuple(int(axis) for axis in np.argsort(self._stored))
        self._array = np.asarray(image_set.images).transpose(self._stored)
        if resident is None:
            resident = self._fits()
        self._resident = self._upload() if resident else None

    @property
    def resident(self) -> bool:
        """Whether all images are on the device."""
        return self._resident is not None

    def __call__(self, indices: np.ndarray | Sequence[int]) -> Tensor:
        """The images at `indices` (integers, [B], from 0): uint8 [B, C, H, W] on the device, in any strides.

        Raises IndexError where an index is outside the set, TypeError where they are not integers.
        """
        indices = np.asarray(indices)
        if indices.size == 0:
            indices = indices.astype(np.int64)
        if indices.dtype.kind not in "iu" or indices.ndim != 1:
            raise TypeError(f"indices: expected integers [B], got {indices.dtype} {list(indices.shape)}")
        count = len(self.image_set)
        if indices.size and not (indices.min() >= 0 and indices.max() < count):
            raise IndexError(f"indices: expected 0..{count - 1}, got {indices.min()}..{indices.max()}")
        if self._resident is not None:
            chosen = torch.from_numpy(indices.astype(np.int64))
            if self.device.type == "cuda":
                chosen = chosen.pin_memory()
            return self._resident[chosen.to(self.device, non_blocking=True)].permute(self._restored)
        batch = torch.from_numpy(self._array[indices])
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True).permute(self._restored)

    def labels(self, indices: np.ndarray) -> Tensor | None:
        """The labels at `indices`, int64 [B] on the device; None where the set has none."""
        return None if self.image_set.labels is None else self.known_labels(indices)

    def known_labels(self, indices: np.ndarray) -> Tensor:
        """The same; ValueError where the set has none."""
        labels = torch.from_numpy(self.image_set.known_labels[indices])
        if self.device.type == "cuda":
            labels = labels.pin_memory()
        return labels.to(self.device, non_blocking=True)

    def _fits(self) -> bool:
        if self.device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(self.device)
        return bool(self._array.nbytes <= RESIDENT_SHARE * free)

    def _upload(self) -> Tensor:
        resident = torch.empty(self._array.shape, dtype=torch.uint8, device=self.device)
        step = max(1, UPLOAD_BYTES // max(1, self._array[:1].nbytes))
        for start in range(0, len(self._array), step):
            # A copy, as PyTorch warns of read-only arrays such as a mapped file.
            resident[start : start + step] = torch.from_numpy(self._array[start : start + step].copy())
        return resident
