"""Per-channel mean and standard deviation of uint8 images, in colour and in grey.

They are computed from an evenly spaced sample, so that a memory-mapped set of any size takes a fraction of a second and
the same set always gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpc_ext.ops.extract_patches import LUMA

SAMPLE = 1000


@dataclass(frozen=True)
class PixelStatistics:
    """Mean and standard deviation of pixels in 0..1.

    mean, std: one number for each channel. gray_mean, gray_std: those of the ITU-R 601 grey image.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    gray_mean: float
    gray_std: float

    @classmethod
    def of(cls, moments: Mapping[str, Any]) -> PixelStatistics:
        """Return the statistics in a mapping read from JSON, which has lists in place of tuples."""
        return cls(tuple(moments["mean"]), tuple(moments["std"]), moments["gray_mean"], moments["gray_std"])


def pixel_statistics(images: np.ndarray) -> PixelStatistics:
    """Compute statistics of uint8 images [N, C, H, W], C 1 or 3, over at most 1000. Raises ValueError if N is 0."""
    count, channels = images.shape[:2]
    if count == 0:
        raise ValueError("images: there are none to compute statistics of")
    if channels not in (1, 3):
        raise ValueError(f"images: expected 1 or 3 channels, got {channels}")
    indices = np.linspace(0, count - 1, min(count, SAMPLE)).astype(np.int64)
    weights = np.asarray(LUMA if channels == 3 else (1.0,))
    # Exact moments: every grey moment follows from the channels' means and their second-moment matrix.
    first = np.zeros(channels)
    second = np.zeros((channels, channels))
    for index in indices:
        pixels = np.asarray(images[index], dtype=np.float32).reshape(channels, -1) / 255
        first += pixels.mean(axis=1, dtype=np.float64)
        second += (pixels @ pixels.T).astype(np.float64) / pixels.shape[1]
    mean = first / len(indices)
    covariance = second / len(indices) - np.outer(mean, mean)
    # A channel that never varies would make normalising divide by zero; 1/255 is the smallest step a pixel takes.
    std = np.sqrt(np.diag(covariance).clip(min=0)).clip(min=1 / 255)
    gray_std = max(float(np.sqrt(max(weights @ covariance @ weights, 0.0))), 1 / 255)
    return PixelStatistics(
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        gray_mean=float(weights @ mean),
        gray_std=gray_std,
    )
