"""Problems of predict_and_contrast: sampled keys, shared by the steps or not, all keys, exact ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cpc_ext.op_checks.agreement import Problem
from cpc_ext.op_checks.draw import integers, normal
from cpc_ext.ops.predict_and_contrast import (
    PredictAndContrastOutput,
    predict_and_contrast,
    predict_and_contrast_reference,
)

__all__ = ["PROBLEMS"]


def _losses(contrast: Callable[..., PredictAndContrastOutput], /, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the results except ranks, which differ where scores are rounded."""
    result = contrast(**arguments)
    return result.loss, result.step_losses


def _ranks(contrast: Callable[..., PredictAndContrastOutput], /, **arguments: Any) -> Tensor:
    return contrast(**arguments).rank


def _targets(steps: int, batch: int, length: int, keys: int) -> Tensor:
    """Draw targets; the last k + 1 contexts of each sequence have none in step k, which counts from 0."""
    places = torch.arange(length) + torch.arange(1, steps + 1).view(-1, 1, 1)
    return torch.where(places < length, integers(keys, steps, batch, length, seed=4), -1)


def _problem(
    label: str,
    size: tuple[int, int, int],
    batch: tuple[int, int],
    keys: int,
    *,
    samples: int | None = None,
    shared: bool = False,
    results: Callable[..., Any] = _losses,
    draw: Callable[..., Tensor] = normal,
    **options: Any,
) -> Problem:
    """size: K, D, E. batch: B, T. shared: whether the steps share their negatives."""
    steps, dim, channels = size
    others: dict[str, Any] = {"targets": _targets(steps, *batch, keys)}
    if samples is not None:
        others["negatives"] = integers(keys, *(() if shared else (steps,)), *batch, samples, seed=5)
    options = {"scale": 2 * (dim * channels) ** -0.5} | options
    return Problem(
        op="predict_and_contrast",
        label=label,
        call=partial(results, predict_and_contrast, **options),
        reference=partial(results, predict_and_contrast_reference, **options),
        differentiable={
            "contexts": draw(*batch, channels, seed=1),
            "weights": draw(*size, seed=2),
            "keys": draw(keys, dim, seed=3),
        },
        others=others,
    )


def _small_integers(*shape: int, seed: int) -> Tensor:
    """Draw values whose products and sums are exact in every dtype, so that many scores tie."""
    return integers(3, *shape, seed=seed).double() - 1


PROBLEMS = [
    _problem("sampled", (4, 64, 64), (2, 24), 48, samples=10),
    _problem("sampled, the same in all steps", (4, 48, 32), (2, 24), 48, samples=16, shared=True),
    _problem("sampled, the same in many steps", (17, 37, 19), (3, 23), 29, samples=9, shared=True),
    _problem("sampled, odd sizes", (3, 37, 19), (3, 23), 29, samples=7, shared=True),
    _problem("sampled, each loss", (3, 20, 33), (2, 17), 31, samples=9, reduction="none"),
    _problem("sampled, sum of more rows than a tile has", (2, 9, 5), (2, 211), 70, samples=3, reduction="sum"),
    _problem("all keys", (3, 32, 16), (2, 20), 40),
    _problem("all keys, odd sizes", (5, 19, 37), (3, 41), 131, reduction="sum"),
    _problem("all keys, each loss", (2, 21, 9), (1, 35), 67, reduction="none"),
    _problem("one step of one context", (1, 3, 2), (1, 2), 4, samples=1),
    _problem("no contexts", (2, 3, 2), (0, 5), 4, samples=2),
    _problem("exact ranks", (3, 6, 5), (2, 20), 50, results=_ranks, draw=_small_integers, scale=1.0),
    _problem("exact ranks, sampled", (3, 6, 5), (2, 20), 50, samples=13, results=_ranks, draw=_small_integers,
             scale=1.0),
    _problem("exact ranks, the same in many steps", (13, 6, 5), (2, 20), 50, samples=13, shared=True, results=_ranks,
             draw=_small_integers, scale=1.0),
]  # fmt: skip
