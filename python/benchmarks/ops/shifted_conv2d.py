"""PixelCNN++'s shifted convolutions, as rectangular kernels in PyTorch, and as visible taps of a masked convolution.

The kernel is 2x3 and ends at the output's row, or 2x2 and ends at its column as well, on channels-last features. Eager
pads the image on the other sides only and convolves; "cut" pads both sides alike, which needs no copy, and crops the
result. Backward computes the gradients of input and weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from benchmark import Case, Op, Problem, both_passes, compiled
from torch import Tensor

from cpc_ext.nn import ShiftedConv2d
from cpc_ext.ops import masked_conv2d


@dataclass(frozen=True)
class ShiftedCase(Case):
    """A layer from 2F channels, a concatenated ELU, on a batch of square feature maps."""

    batch: int
    features: int
    out_channels: int
    side: int
    shift: str

    @property
    def label(self) -> str:
        return f"[{self.batch},{2 * self.features},{self.side},{self.side}] {self.shift} to {self.out_channels}"

    @property
    def size(self) -> int:
        return self.features


def prepare(case: ShiftedCase, device: torch.device) -> Problem:
    dtype = getattr(torch, case.dtype)
    kernel_size = (2, 3) if case.shift == "down" else (2, 2)
    layer = ShiftedConv2d(2 * case.features, case.out_channels, kernel_size, case.shift).to(device)
    visible = layer.visible
    hidden = [size - kernel for size, kernel in zip(visible.shape, kernel_size, strict=True)]
    shape = case.batch, case.side, case.side
    input, grad = (
        torch.randn(*shape, channels, device=device, dtype=dtype).permute(0, 3, 1, 2)
        for channels in (2 * case.features, case.out_channels)
    )
    inputs = [input, layer.weight.detach().to(dtype)]
    for tensor in inputs:
        tensor.requires_grad_(case.backward)
    right = 1 if case.shift == "down" else 0

    def padded(input: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (1, right, 1, 0)), weight)

    def cut(input: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(input, weight, padding=1)[:, :, : case.side, : case.side]

    def ours(input: Tensor, weight: Tensor) -> Tensor:
        return masked_conv2d(input, F.pad(weight, (0, hidden[1], 0, hidden[0])), mask=visible)

    def run(convolve):
        output = convolve(*inputs)
        return torch.autograd.grad(output, inputs, grad) if case.backward else output

    plain_compiled = compiled(padded)
    work = 2 * inputs[1].numel() * case.batch * case.side**2 * (3 if case.backward else 1)
    return Problem(
        {
            "eager": lambda: run(padded),
            "eager, cut": lambda: run(cut),
            "compiled": lambda: run(plain_compiled),
            "ours": lambda: run(ours),
        },
        work,
        # cuDNN multiplies float32 as TF32 unless told otherwise.
        product="tfloat32"
        if device.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32
        else None,
    )


CASES = tuple(
    case
    for features in (24, 48, 96, 160)
    for shift in ("down", "down-right")
    for case in both_passes(
        ShiftedCase, 16, features, 2 * features, 32, shift, sweep=shift == "down", quick=features == 24
    )
)

OPS = (Op("shifted_conv2d", "compute", "features", CASES, prepare),)
