"""Problems of conv2d: strides, paddings, few channels and few images, with and without the fused operations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cpc_ext.op_checks.agreement import Problem
from cpc_ext.op_checks.draw import normal
from cpc_ext.ops.conv2d import conv2d, conv2d_reference

__all__ = ["PROBLEMS"]


def _problem(
    label: str,
    shape: tuple[int, int, int, int],
    outputs: int,
    kernel: tuple[int, int],
    *,
    bias: bool = True,
    residual: tuple[int, int] | None = None,
    **options: Any,
) -> Problem:
    """residual: rows and columns of the result, if a residual is added."""
    tensors: dict[str, Tensor] = {
        "input": normal(*shape, seed=1).contiguous(memory_format=torch.channels_last),
        "weight": normal(outputs, shape[1], *kernel, seed=2) / (shape[1] * kernel[0] * kernel[1]) ** 0.5,
    }
    if bias:
        tensors["bias"] = normal(outputs, seed=3)
    if residual is not None:
        tensors["residual"] = normal(shape[0], outputs, *residual, seed=4)
    return Problem(
        op="conv2d",
        label=label,
        call=partial(conv2d, **options),
        reference=partial(conv2d_reference, **options),
        differentiable=tensors,
    )


PROBLEMS = [
    _problem("a block's second half", (7, 32, 6, 6), 64, (3, 3), padding=1, relu_input=True, residual=(6, 6)),
    _problem("stride, odd sizes", (2, 19, 9, 8), 33, (3, 3), stride=2, padding=1, relu_input=True),
    _problem("a shortcut", (13, 24, 5, 4), 16, (1, 1), stride=2, bias=False),
    _problem("a stem", (3, 3, 8, 7), 40, (5, 5), padding=2),
    _problem("even kernel, uneven padding", (2, 17, 4, 5), 5, (2, 4), padding=(0, 3), residual=(3, 8)),
    _problem("dilated beyond the image", (1, 20, 3, 2), 8, (3, 3), padding=4, dilation=4),
    _problem("no images", (0, 4, 5, 5), 8, (3, 3), padding=1, relu_input=True),
]
