"""Batches of uint8 images by index, on the training device.

If the whole set fits on a CUDA device, it is copied there once, and batches are made there. Otherwise a batch is copied
out of the array or mapped file, and to CUDA through pinned memory while the device computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cpc_ext.data.images.dataset import ImageSet
from cpc_ext.data.on_device import fits, require_indices, send, upload


class ImageFetcher:
    """Returns batches of an image set on a device, by index.

    image_set: images to take batches from.
    device: device of the batches.
    resident: keep all images on the device. Default: on CUDA if they take at most a quarter of the free memory.
    """

    def __init__(
        self, image_set: ImageSet, device: torch.device | str = "cpu", *, resident: bool | None = None
    ) -> None:
        self.image_set = image_set
        self.device = torch.device(device)
        # Images may be stored with their axes in another order (STL-10: columns first). Batches keep that order in
        # memory, as copying whole images is fastest; a permuted view restores [B, C, H, W].
        strides = image_set.images.strides[1:]
        self._stored = (0, *sorted((1, 2, 3), key=lambda axis: -strides[axis - 1]))
        self._restored = tuple(int(axis) for axis in np.argsort(self._stored))
        self._array = np.asarray(image_set.images).transpose(self._stored)
        if resident is None:
            resident = fits(self._array, self.device)
        self._resident = upload(self._array, self.device) if resident else None

    @property
    def resident(self) -> bool:
        """Return whether all images are on the device."""
        return self._resident is not None

    def __call__(self, indices: np.ndarray | Sequence[int]) -> Tensor:
        """Return the images at `indices` (integers, [B], from 0): uint8 [B, C, H, W] on the device, with any strides.

        Raises IndexError if an index is outside the set, TypeError if the indices are not integers.
        """
        chosen = require_indices("indices", indices, len(self.image_set))
        if self._resident is not None:
            return self._resident[send(chosen, self.device)].permute(self._restored)
        return send(self._array[chosen], self.device).permute(self._restored)

    def labels(self, indices: np.ndarray) -> Tensor | None:
        """Return the labels at `indices`, int64 [B] on the device, or None if the set has none."""
        return None if self.image_set.labels is None else self.known_labels(indices)

    def known_labels(self, indices: np.ndarray) -> Tensor:
        """Return the labels at `indices`, int64 [B] on the device. Raises ValueError if the set has none."""
        return send(self.image_set.known_labels[indices], self.device)
