"""Problems of the mixture of logistics: likelihood with its gradient, and samples, for one and three colours."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from cpc_ext.op_checks.agreement import KINDS, Problem
from cpc_ext.op_checks.draw import integers, normal, uniform
from cpc_ext.ops.logistic_mixture import (
    logistic_mixture_nll,
    logistic_mixture_nll_reference,
    sample_logistic_mixture,
    sample_logistic_mixture_reference,
)

__all__ = ["PROBLEMS"]

# Neither op computes in TF32.
_TYPES = tuple(name for name in KINDS if name != "tf32")


def _params(channels: int, components: int, batch: int, height: int, width: int) -> Tensor:
    """Draw params of broad components, so that no mass is near the bound below which another formula applies."""
    params = normal(batch, components * (10 if channels == 3 else 3), height, width, seed=1) / 2
    per_colour = 3 if channels == 3 else 2
    for colour in range(channels):
        scales = components * (1 + colour * per_colour + 1)
        params[:, scales : scales + components] = params[:, scales : scales + components] / 2 - 1.5
    return params


def _likelihood(label: str, channels: int, components: int, *shape: int, channels_last: bool = False) -> Problem:
    batch, height, width = shape
    params = _params(channels, components, batch, height, width)
    if channels_last:
        params = params.contiguous(memory_format=torch.channels_last)
    images = integers(256, batch, channels, height, width, seed=2).to(torch.uint8)
    return Problem(
        op="logistic_mixture_nll",
        label=label,
        call=logistic_mixture_nll,
        reference=logistic_mixture_nll_reference,
        differentiable={"params": params},
        others={"images": images},
        kinds=_TYPES,
    )


def _samples(label: str, channels: int, components: int, *shape: int, temperature: float = 1.0) -> Problem:
    batch, height, width = shape
    options: dict[str, Any] = {"channels": channels, "temperature": temperature}
    return Problem(
        op="sample_logistic_mixture",
        label=label,
        call=partial(sample_logistic_mixture, **options),
        reference=partial(sample_logistic_mixture_reference, **options),
        differentiable={"params": _params(channels, components, batch, height, width)},
        others={"noise": uniform(batch, components + channels, height, width, seed=3)},
        kinds=_TYPES,
    )


PROBLEMS = [
    _likelihood("three colours, channels last", 3, 10, 2, 16, 16, channels_last=True),
    _likelihood("three colours, odd sizes", 3, 7, 3, 5, 3),
    _likelihood("one colour", 1, 5, 2, 9, 11),
    _likelihood("no images", 3, 2, 0, 4, 4),
    _samples("three colours", 3, 10, 2, 8, 8),
    _samples("one colour, cooler", 1, 3, 3, 5, 7, temperature=0.5),
]
