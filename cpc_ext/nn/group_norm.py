"""Group norm that also works on the CPU for channels-last input without a gradient, as after a detached input."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GroupNorm"]


class GroupNorm(nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` with a workaround for a crash of its backward pass on the CPU.

    For channels-last input without a gradient, PyTorch's kernel, as of 2.13, writes the input's gradient although it
    is not requested. Here such input is normalised without a graph, and weight and bias are applied to the result.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.requires_grad or not self.affine or input.device.type != "cpu":
            return super().forward(input)
        normalized = F.group_norm(input, self.num_groups, eps=self.eps)
        shape = (1, -1, *[1] * (input.ndim - 2))
        return (normalized * self.weight.view(shape) + self.bias.view(shape)).to(normalized.dtype)
