"""The discretized mixture of logistics as a loss: images and mixture parameters to mean bits per dimension."""

from __future__ import annotations

import math

from torch import Tensor

from cpc_ext.nn.typed import Module
from cpc_ext.ops.logistic_mixture import logistic_mixture_nll

__all__ = ["LogisticMixtureLoss"]


class LogisticMixtureLoss(Module):
    """Mean bits per dimension under a mixture of logistics; see :func:`cpc_ext.ops.logistic_mixture_nll`.

    A dimension is one colour of one pixel; uniform values cost 8 bits each.
    """

    def forward(self, images: Tensor, params: Tensor) -> Tensor:
        """Compute the mean bits per dimension, a scalar in float32, or float64 for float64 params.

        Args:
            images: [B, C, H, W] uint8, C = 1 or 3; B, H and W at least 1.
            params: [B, P, H, W] floating, P = 3 K for one channel and 10 K for three.

        Raises:
            TypeError, ValueError: as in :func:`cpc_ext.ops.logistic_mixture_nll`, and for images without a value.
        """
        nll = logistic_mixture_nll(images, params)
        if images.numel() == 0:
            raise ValueError(f"images must hold at least one value, got shape {tuple(images.shape)}")
        return nll.sum() / (images.numel() * math.log(2))
