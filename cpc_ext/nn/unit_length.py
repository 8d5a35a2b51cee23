"""Vectors brought to length 1, whatever length they have."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["unit_length"]


def unit_length(vectors: Tensor, dim: int = -1) -> Tensor:
    """Vectors along ``dim``, of any finite length, divided by their Euclidean norm; zero vectors stay zeros.

    Other than with :func:`torch.nn.functional.normalize`, squares neither overflow nor vanish, and short vectors are
    not taken for zeros: entries are first divided by the largest of their vector.
    """
    if vectors.shape[dim] == 0:
        return vectors
    largest = vectors.detach().abs().amax(dim, keepdim=True)
    # A constant: the result does not depend on it.
    return F.normalize(vectors / torch.where(largest == 0, 1, largest), dim=dim)
