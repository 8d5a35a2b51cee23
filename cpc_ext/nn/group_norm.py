"""Group norm that can be trained on input without a gradient, as the first layer behind a boundary is."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GroupNorm"]


class GroupNorm(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm`, whose backward pass on the CPU crashes for channels-last input without a gradient.

    As of PyTorch 2.13 its kernel writes the input's gradient whether or not it was asked for. Such input is normalised
    without a graph here, and weight and bias are applied to what comes out.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.requires_grad or not self.affine or input.device.type != "cpu":
            return super().forward(input)
        normalized = F.group_norm(input, self.num_groups, eps=self.eps)
        shape = (1, -1, *[1] * (input.ndim - 2))
        return (normalized * self.weight.view(shape) + self.bias.view(shape)).to(normalized.dtype)
