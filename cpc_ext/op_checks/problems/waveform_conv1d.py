"""Problems of the first layer of audio encoders: with and without norm, whole tiles and odd sizes."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from cpc_ext.op_checks.agreement import KINDS, Problem
from cpc_ext.op_checks.draw import normal
from cpc_ext.ops.waveform_conv1d import waveform_conv1d, waveform_conv1d_reference

__all__ = ["PROBLEMS"]

# The op does not compute in TF32.
_TYPES = tuple(name for name in KINDS if name != "tf32")
# Near the zero of a ReLU, rounding to 16 bits would decide whether there is a gradient.
_EXACT = ("float64", "float32")


def _problem(
    label: str, shape: tuple[int, int], channels: int, taps: int, *, norm: bool, bias: bool = True, **options: Any
) -> Problem:
    tensors: dict[str, Tensor] = {"weight": normal(channels, 1, taps, seed=2) * taps**-0.5}
    if bias:
        tensors["bias"] = normal(channels, seed=3)
    if norm:
        tensors |= {"scale": 1 + normal(channels, seed=4) / 4, "shift": normal(channels, seed=5)}
    batch, samples = shape
    return Problem(
        op="waveform_conv1d",
        label=label,
        call=partial(_in_type, waveform_conv1d, **options),
        reference=partial(_in_type, waveform_conv1d_reference, **options),
        differentiable=tensors,
        others={"waveforms": normal(batch, 1, samples, seed=1)},
        kinds=_EXACT if options.get("relu") else _TYPES,
    )


def _in_type(layer: Any, waveforms: Tensor, weight: Tensor, **others: Any) -> Tensor:
    """Call the layer with waveforms in the dtype; they get no gradient, which no kernel computes."""
    made: Tensor = layer(waveforms.to(weight.dtype), weight, **others)
    return made


PROBLEMS = [
    _problem("whole tiles", (2, 5120), 64, 10, norm=False, stride=5),
    _problem("channel norm", (2, 5120), 64, 10, norm=True, stride=5, padding=3),
    _problem("channel norm and ReLU, odd sizes", (3, 777), 13, 10, norm=True, stride=5, padding=2, relu=True),
    _problem("ReLU, overlapping", (1, 400), 6, 7, norm=False, bias=False, stride=2, relu=True),
    _problem("stride beyond the kernel", (2, 300), 5, 3, norm=True, stride=7),
    _problem("a frame", (1, 10), 3, 10, norm=True, stride=5),
    _problem("no waveforms", (0, 100), 4, 10, norm=False, stride=5),
]
