"""Problems of masked_conv2d: masks of every kind, edges, odd sizes and layouts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cpc_ext.op_checks.agreement import Problem
from cpc_ext.op_checks.draw import normal
from cpc_ext.ops.masked_conv2d import masked_conv2d, masked_conv2d_reference

__all__ = ["PROBLEMS"]

_VERTICAL = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]).bool()


def _problem(
    label: str,
    shape: tuple[int, int, int, int],
    outputs: int,
    mask: Tensor,
    *,
    bias: bool = True,
    condition: tuple[int, ...] | None = None,
    strided: bool = False,
    dilation: int = 1,
    activation: str | None = None,
) -> Problem:
    input = normal(*shape, seed=1)
    if strided:  # Every other column of a wider image, channels innermost.
        batch, channels, height, width = shape
        wider = normal(batch, channels, height, 2 * width, seed=1)
        input = wider.contiguous(memory_format=torch.channels_last)[..., ::2]
    depth = shape[1] * mask.shape[-2] * mask.shape[-1]
    tensors = {"input": input, "weight": normal(outputs, shape[1], *mask.shape[-2:], seed=2) / depth**0.5}
    if bias:
        tensors["bias"] = normal(outputs, seed=3)
    if condition is not None:
        tensors["condition"] = normal(*condition, seed=4)
    options: dict[str, Any] = {"dilation": dilation, "activation": activation}
    return Problem(
        op="masked_conv2d",
        label=label,
        call=partial(masked_conv2d, **options),
        reference=partial(masked_conv2d_reference, **options),
        differentiable=tensors,
        others={"mask": mask},
    )


PROBLEMS = [
    _problem("a batch of tiles", (3, 32, 7, 7), 64, _VERTICAL),
    _problem("odd sizes, dilated", (2, 5, 9, 13), 7, _VERTICAL, dilation=2),
    _problem("gated, conditioned", (2, 19, 6, 5), 34, _VERTICAL, activation="gated", condition=(2, 34, 1, 1)),
    _problem("ReLU, strided input", (1, 12, 8, 4), 20, _VERTICAL, strided=True, activation="relu", bias=False),
    _problem(
        "mask per channel",
        (2, 6, 5, 4),
        9,
        torch.rand(9, 6, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.4,
    ),
    _problem("even kernel, one pixel", (2, 3, 1, 1), 4, torch.ones(2, 4, dtype=torch.bool)),
    _problem("nothing visible", (1, 4, 3, 3), 8, torch.zeros(3, 3, dtype=torch.bool)),
    _problem("no images", (0, 4, 5, 5), 8, _VERTICAL),
]
