"""Choice of a few images spread over a whole set, which may be sorted by class or have its classes in turn."""

from __future__ import annotations

import numpy as np

__all__ = ["spread"]


def spread(count: int, total: int) -> np.ndarray:
    """Return ascending indices, int64 [min(count, total)], of images out of ``total``: one from each of equal parts.

    The place within a part is drawn with a fixed seed: equal steps would hit the same classes again and again if these
    take turns.
    """
    count = min(count, total)
    edges = np.arange(count + 1) * total // max(count, 1)
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])
