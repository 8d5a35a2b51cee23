"""A problem of pixel_steps: a step and a gated one that reads it, compared with the whole image at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext.op_checks.agreement import Problem
from cpc_ext.op_checks.draw import normal
from cpc_ext.ops import PixelMaps, PixelPlace, PixelSource, PixelStep, pixel_steps

__all__ = ["PROBLEMS"]

_BATCH, _HEIGHT, _WIDTH, _CHANNELS, _INNER = 2, 5, 6, 3, 4
# Offsets (rows, columns) from a pixel; those of the second step were written by earlier pixels or rows, or just now.
_TAPS, _OWN_TAPS = [(-2, 1), (-1, -1), (0, -1)], [(-1, 0), (0, -1), (0, 0)]


def _by_pixel(**tensors: Tensor) -> tuple[Tensor, Tensor]:
    image, weight, bias, gate, gate_bias = (value.detach() for value in tensors.values())
    maps = PixelMaps(_BATCH, _HEIGHT, _WIDTH, image)
    source, inner, output = (maps.make(channels, 0) for channels in (_CHANNELS, _INNER, _INNER))
    source.pixels.copy_(image)
    steps = [
        PixelStep(0, [PixelSource(source, _TAPS)], weight, bias, raw=inner),
        PixelStep(0, [PixelSource(inner, _OWN_TAPS)], gate, gate_bias, residual=inner, raw=output),
    ]
    run, place = pixel_steps(steps, maps), PixelPlace(_HEIGHT, _WIDTH, image.device)
    for row in range(_HEIGHT):
        for col in range(_WIDTH):
            place.go_to(row, col)
            run.run_pixel(place)
    return inner.pixels, output.pixels


def _at_once(**tensors: Tensor) -> tuple[Tensor, Tensor]:
    image, weight, bias, gate, gate_bias = (value.detach() for value in tensors.values())
    inner = _read(image, _TAPS) @ weight + bias
    return inner, inner + F.glu(_read(inner, _OWN_TAPS) @ gate + gate_bias, dim=3)


def _read(pixels: Tensor, taps: list[tuple[int, int]]) -> Tensor:
    """Gather the values at the taps: [B, H, W, C] → [B, H, W, taps * C]."""
    padded = F.pad(pixels, (0, 0, 1, 1, 2, 0))
    return torch.cat([padded[:, 2 + y : 2 + y + _HEIGHT, 1 + x : 1 + x + _WIDTH] for y, x in taps], dim=3)


PROBLEMS = [
    Problem(
        op="pixel_steps",
        label="a gated step on another",
        call=_by_pixel,
        differentiable={
            "image": normal(_BATCH, _HEIGHT, _WIDTH, _CHANNELS, seed=1),
            "weight": normal(len(_TAPS) * _CHANNELS, _INNER, seed=2) / 3,
            "bias": normal(_INNER, seed=3),
            "gate": normal(len(_OWN_TAPS) * _INNER, 2 * _INNER, seed=4) / 3,
            "gate_bias": normal(2 * _INNER, seed=5),
        },
        reference=_at_once,
        kinds=("float64", "float32"),
    )
]
