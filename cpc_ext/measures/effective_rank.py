"""Effective rank: the number of directions that encodings use, which shows a collapsed encoder without labels.

It is 1 for encodings [N, D] on a line, and D for encodings that vary equally in all directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpc_ext.measures.finite import check_finite

__all__ = ["effective_rank"]


def effective_rank(features: Tensor) -> float:
    """Return exp(entropy of p), p the singular values of centred features over their sum (Roy & Vetterli 2007, eq. 4).

    features: floating [N, D], at least one. The result is 0 if they are all alike, a complete collapse. ValueError if
    they are not finite.

    Garrido et al. 2023, arXiv 2210.02885 (RankMe), do not centre the encodings; there the mean, which says nothing
    about an image, counts as a direction, and a collapsed encoder has rank 1.
    """
    check_finite("features", features)
    centred = features.double() - features.double().mean(0)
    values = torch.linalg.svdvals(centred)
    # Encodings that are alike but for rounding leave singular values up to this, relative to their size.
    smallest = torch.finfo(torch.float32).eps * max(features.shape) * float(features.double().abs().max())
    values = values[values > smallest]
    if not len(values):
        return 0.0
    shares = values / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))
