"""A few images of a set, from all of it: sets are often sorted by class, or have their classes in turn."""

from __future__ import annotations

import numpy as np

__all__ = ["spread"]


def spread(count: int, total: int) -> np.ndarray:
    """Indices, ascending int64 [min(count, total)], of images out of ``total``: one from each of equal parts.

    Where in its part an image lies is drawn, always alike: equal steps would meet the same classes again and again
    where these take turns.
    """
    count = min(count, total)
    edges = np.arange(count + 1) * total // max(count, 1)
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])
