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
from cpc_ext.data.on_device import fits, require_indices, send, upload


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
            resident = fits(self._array, self.device)
        self._resident = upload(self._array, self.device) if resident else None

    @property
    def resident(self) -> bool:
        """Whether all images are on the device."""
        return self._resident is not None

    def __call__(self, indices: np.ndarray | Sequence[int]) -> Tensor:
        """The images at `indices` (integers, [B], from 0): uint8 [B, C, H, W] on the device, in any strides.

        Raises IndexError where an index is outside the set, TypeError where they are not integers.
        """
        chosen = require_indices("indices", indices, len(self.image_set))
        if self._resident is not None:
            return self._resident[send(chosen, self.device)].permute(self._restored)
        return send(self._array[chosen], self.device).permute(self._restored)

    def labels(self, indices: np.ndarray) -> Tensor | None:
        """The labels at `indices`, int64 [B] on the device; None where the set has none."""
        return None if self.image_set.labels is None else self.known_labels(indices)

    def known_labels(self, indices: np.ndarray) -> Tensor:
        """The same; ValueError where the set has none."""
        return send(self.image_set.known_labels[indices], self.device)
