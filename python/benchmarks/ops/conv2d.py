"""conv2d against PyTorch's convolution, alone and as in a residual block: after a ReLU, and with a residual added.

The floating-point operations are those of all taps, including taps on the padding, which ours skips for tiles that see
only padding. Backward computes the gradients of input, weight and bias, twice the forward work. There is no kernel for
CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from benchmark import Case, Op, Problem, both_passes
from torch import Tensor

from cpc_ext.ops import conv2d
from cpc_ext.ops.conv2d import conv2d_reference

FAIR = "eager, channels last"


@dataclass(frozen=True)
class PlainConvCase(Case):
    """A square kernel, padded so that stride 1 keeps the size, on a batch of square feature maps."""

    batch: int
    in_channels: int
    out_channels: int
    side: int
    kernel: int = 3
    stride: int = 1
    in_block: bool = False

    @property
    def label(self) -> str:
        map_size = f"[{self.batch},{self.in_channels},{self.side},{self.side}]"
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        block = ", ReLU and residual" if self.in_block else ""
        return f"{map_size} {self.kernel}x{self.kernel} to {self.out_channels}{stride}{block}"

    @property
    def size(self) -> int:
        return self.batch


def prepare(case: PlainConvCase, device: torch.device) -> Problem:
    dtype = getattr(torch, case.dtype)
    fan_in = case.in_channels * case.kernel**2
    side = (case.side - 1) // case.stride + 1
    shape = case.out_channels, case.in_channels, case.kernel, case.kernel
    input = torch.randn(case.batch, case.in_channels, case.side, case.side, device=device, dtype=dtype)
    weight = torch.randn(shape, device=device, dtype=dtype) * fan_in**-0.5
    bias = torch.randn(case.out_channels, device=device, dtype=dtype)
    grad, residual = (torch.randn(case.batch, case.out_channels, side, side, device=device, dtype=dtype) for _ in "gr")

    def call(convolve: Callable[..., Tensor], memory_format: torch.memory_format) -> Callable[[], object]:
        def laid_out(tensor: Tensor) -> Tensor:
            return tensor.to(memory_format=memory_format)

        inputs = [one.detach().requires_grad_(case.backward) for one in (laid_out(input), laid_out(weight), bias)]
        options = {"relu_input": True, "residual": laid_out(residual)} if case.in_block else {}
        grad_output = laid_out(grad)

        def run() -> object:
            output = convolve(*inputs, stride=case.stride, padding=case.kernel // 2, **options)
            return torch.autograd.grad(output, inputs, grad_output) if case.backward else output

        return run

    work = 2 * case.batch * side**2 * fan_in * case.out_channels
    return Problem(
        {
            "eager": call(conv2d_reference, torch.contiguous_format),
            FAIR: call(conv2d_reference, torch.channels_last),
            "ours": call(conv2d, torch.channels_last),
        },
        work * (3 if case.backward else 1),
        tolerance=1e-3 if case.dtype == "float32" else 5e-2,
    )


# Encoders of CPC on 16 images of 7x7 patches: their stacks, and the convolutions between.
_LAYERS = ((64, 64, 16, 1), (128, 128, 8, 1), (256, 256, 4, 1), (64, 128, 16, 2), (128, 256, 8, 2))

CASES = (
    *(
        case
        for batch in (8, 49, 196)
        for case in both_passes(PlainConvCase, batch, 256, 256, 4, sweep=True, quick=batch == 49)
    ),
    *(
        case
        for dtype in ("float32", "bfloat16")
        for channels, outputs, side, stride in _LAYERS
        for in_block in (False, True)
        if not (in_block and stride > 1)
        for case in both_passes(
            PlainConvCase,
            784,
            channels,
            outputs,
            side,
            stride=stride,
            in_block=in_block,
            dtype=dtype,
            sweep=dtype == "float32" and side == 4 and not in_block,
        )
    ),
)

OPS = (Op("conv2d", "compute", "feature maps [256, 4, 4]", CASES, prepare, counted=False),)
