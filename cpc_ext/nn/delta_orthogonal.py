"""Delta-orthogonal weights: a convolution that starts as an orthogonal map of each pixel's channels.

The middle tap is an orthogonal matrix and all other taps are zero, so that neither activations nor gradients grow or
shrink through many layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["delta_orthogonal_"]


@torch.no_grad()
def delta_orthogonal_(weight: Tensor, gain: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
    """Fill the weight of a convolution in place (Xiao et al. 2018, arXiv 1806.05393, algorithm 1), and return it.

    The paper requires at least as many output as input channels. With fewer, the rows of the middle tap are
    orthonormal instead of its columns, as with :func:`torch.nn.init.orthogonal_`.

    Args:
        weight: [O, I, kh, kw] with odd kernel sizes.
        gain: factor of the orthogonal matrix; sqrt(2) if a ReLU precedes the convolution.
        generator: generator of the random matrix.

    Raises:
        ValueError: a weight of another shape.
    """
    if weight.ndim != 4 or weight.shape[2] % 2 == 0 or weight.shape[3] % 2 == 0:
        raise ValueError(f"weight must be [O, I, kh, kw] with odd kernel sizes, got shape {tuple(weight.shape)}")
    middle = torch.empty(weight.shape[:2], dtype=weight.dtype, device=weight.device)
    nn.init.orthogonal_(middle, gain, generator)
    weight.zero_()
    weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2] = middle
    return weight
