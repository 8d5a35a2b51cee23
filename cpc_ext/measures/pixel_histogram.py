"""A baseline for pixel models that knows only the position and colour of a value; a PixelCNN must beat it.

Every position and colour has its own histogram of the training images' values, smoothed towards the histogram of its
colour over all positions. The strength of the smoothing is chosen by leave-one-out likelihood of the training images,
which follows from the counts.
"""

from __future__ import annotations

import math

import numpy as np

__all__ = ["static_histogram_bits_per_dim"]

# Weight of the colour's histogram in that of a position, in training images; an infinite weight would leave only it.
_STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 1e4, 1e6)


def static_histogram_bits_per_dim(train: np.ndarray, test: np.ndarray, levels: int = 256) -> float:
    """Return the bits per dimension that the histograms of ``train`` need for ``test``.

    Both are integers [N, C, H, W] from 0 to below ``levels``, N at least 1.
    """
    count, channels, height, _ = train.shape
    overall = np.stack([_counts(train[:, channel].reshape(-1, 1), levels)[0] for channel in range(channels)])
    overall = (overall + 1) / (overall.sum(1, keepdims=True) + levels)
    left_out = np.zeros(len(_STRENGTHS))
    nats = np.zeros(len(_STRENGTHS))
    for channel in range(channels):
        for row in range(height):  # One row at a time, as all histograms of large images would take much memory.
            counts = _counts(train[:, channel, row], levels)  # [W, levels]
            tested = _counts(test[:, channel, row], levels)
            for index, strength in enumerate(_STRENGTHS):
                prior = strength * overall[channel]
                # Leaving an image out lowers the count of its value by one, for each of the images that have the value.
                left_out[index] -= (counts * np.log(np.maximum(counts - 1, 0) + prior)).sum()
                left_out[index] += counts.sum() * math.log(max(count - 1, 0) + strength)
                nats[index] -= (tested * np.log(counts + prior)).sum() - tested.sum() * math.log(count + strength)
    # With a single image all strengths are equally good, and rounding must not choose: take the colour's histogram.
    chosen = left_out.argmin() if count > 1 else len(_STRENGTHS) - 1
    return float(nats[chosen]) / (test.size * math.log(2))


def _counts(values: np.ndarray, levels: int) -> np.ndarray:
    """Count each value in every column of integers [N, W]: float64 [W, levels]."""
    width = values.shape[1]
    flat = np.asarray(values, dtype=np.int64) + np.arange(width) * levels
    return np.bincount(flat.ravel(), minlength=width * levels).reshape(width, levels).astype(np.float64)
