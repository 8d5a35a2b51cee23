"""How many directions encodings make use of: what tells a collapsed encoder before any label does.

From encodings [N, D] to a number between 1, where they lie on a line, and D, where they vary alike in all directions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpc_ext.measures.finite import check_finite

__all__ = ["effective_rank"]


def effective_rank(features: Tensor) -> float:
    """exp(entropy of p), p the singular values of the centred features over their sum (Roy & Vetterli 2007, eq. 4).

    features: floating [N, D], at least one. 0 where they are all alike, which is a complete collapse. ValueError where
    they are not finite.

    Garrido et al. 2023, arXiv 2210.02885 (RankMe), take it of encodings that are not centred; there the mean, which
    tells nothing of an image, counts as a direction, and a collapsed encoder comes to 1.
    """
    check_finite("features", features)
    centred = features.double() - features.double().mean(0)
    values = torch.linalg.svdvals(centred)
    # What is left of encodings that are alike but for rounding, relative to their size.
    smallest = torch.finfo(torch.float32).eps * max(features.shape) * float(features.double().abs().max())
    values = values[values > smallest]
    if not len(values):
        return 0.0
    shares = values / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))
