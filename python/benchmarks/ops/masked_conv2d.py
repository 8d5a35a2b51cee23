"""masked_conv2d against the convolution with a masked weight, in both memory formats. Ours gives channels-last results.

"eager, visible rows" makes use of the fact that rows below the centre are hidden: it keeps only the other rows, as
programs of PixelCNN++ do, and convolves the image, padded at its top, with a kernel of fewer rows, channels-last.

The floating-point operations are those of the visible taps alone, including taps on the padding; a formulation that
multiplies hidden taps by zero does more. Backward computes the gradients of input, weight and bias, twice the forward
work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from benchmark import Case, Op, Problem, both_passes, compiled
from torch import Tensor

from cpc_ext.nn import MaskedConv2d
from cpc_ext.ops import masked_conv2d


def plain_convolution(input: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Convolve in plain PyTorch, with the masked weight in an ordinary convolution."""
    return F.conv2d(input, weight * mask, bias, padding=weight.shape[-1] // 2)


def convolve_visible_rows(input: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the same with a weight [O, C, visible rows, k]. mask: None if it hides none of these taps."""
    padded = F.pad(input, (0, 0, weight.shape[2] - 1, 0))
    return F.conv2d(padded, weight if mask is None else weight * mask, bias, padding=(0, weight.shape[-1] // 2))


@dataclass(frozen=True)
class ConvCase(Case):
    """A square kernel with a named mask on a batch of square feature maps."""

    batch: int
    in_channels: int
    out_channels: int
    side: int
    kernel: int
    mask: str

    @property
    def label(self) -> str:
        map_size = f"[{self.batch},{self.in_channels},{self.side},{self.side}]"
        return f"{map_size} {self.kernel}x{self.kernel} {self.mask} to {self.out_channels}"

    @property
    def size(self) -> int:
        return self.batch


def prepare(case: ConvCase, device: torch.device) -> Problem:
    dtype = getattr(torch, case.dtype)
    mask = MaskedConv2d(1, 1, case.kernel, case.mask).mask.to(device)
    fan_in = case.in_channels * int(mask.sum())
    input = torch.randn(case.batch, case.in_channels, case.side, case.side, device=device, dtype=dtype)
    shape = case.out_channels, case.in_channels, case.kernel, case.kernel
    weight = torch.randn(shape, device=device, dtype=dtype) * fan_in**-0.5
    bias = torch.randn(case.out_channels, device=device, dtype=dtype)
    plain_mask = mask.to(dtype)  # Programs keep it as a buffer of the weight's dtype.
    grad = torch.randn(case.batch, case.out_channels, case.side, case.side, device=device, dtype=dtype)
    contiguous = [tensor.requires_grad_(case.backward) for tensor in (input, weight, bias)]
    channels_last = [*map(_to_channels_last, contiguous[:2]), bias]
    grad_last = grad.to(memory_format=torch.channels_last)
    rows = case.kernel // 2 + 1
    visible_rows = [channels_last[0], _to_channels_last(weight[:, :, :rows]), bias]
    rows_mask = None if mask[:rows].all() else plain_mask[:rows]

    def run(convolve, inputs: list[Tensor], grad: Tensor, mask: Tensor | None):
        output = convolve(*inputs, mask)
        if not case.backward:
            return output
        grad_input, grad_weight, grad_bias = torch.autograd.grad(output, inputs, grad)
        return grad_input, grad_weight[:, :, :rows], grad_bias

    def ours(input: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        return masked_conv2d(input, weight, bias, mask=mask)

    plain_compiled = compiled(plain_convolution)
    positions = case.batch * case.side**2
    return Problem(
        {
            "eager": lambda: run(plain_convolution, contiguous, grad, plain_mask),
            "eager, channels last": lambda: run(plain_convolution, channels_last, grad_last, plain_mask),
            "eager, visible rows": lambda: run(convolve_visible_rows, visible_rows, grad_last, rows_mask),
            "compiled": lambda: run(plain_compiled, contiguous, grad, plain_mask),
            "ours": lambda: run(ours, contiguous, grad, mask),
            "ours, channels last": lambda: run(ours, channels_last, grad_last, mask),
        },
        2 * positions * fan_in * case.out_channels * (3 if case.backward else 1),
        compared="ours, channels last",
        # cuDNN multiplies float32 as TF32 unless told otherwise.
        product="tfloat32"
        if device.type == "cuda" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32
        else None,
    )


def _to_channels_last(tensor: Tensor) -> Tensor:
    return tensor.detach().to(memory_format=torch.channels_last).requires_grad_(tensor.requires_grad)


CASES = (
    # The vertical stack of the context network on CPCV2-PyTorch's 7x7 grid, over the batch.
    *(
        case
        for batch in (1, 4, 16, 64, 256)
        for case in both_passes(ConvCase, batch, 256, 512, 7, 3, "vertical", sweep=True, quick=batch == 16)
    ),
    *both_passes(ConvCase, 64, 256, 512, 7, 3, "vertical", dtype="bfloat16"),
    # Layers of PixelCNN on CIFAR-10, and its first layer.
    *both_passes(ConvCase, 16, 160, 320, 32, 3, "B"),
    *both_passes(ConvCase, 16, 160, 320, 32, 3, "B", dtype="bfloat16"),
    *both_passes(ConvCase, 16, 128, 128, 32, 3, "B"),
    ConvCase(16, 3, 128, 32, 7, "A"),
)

OPS = (Op("masked_conv2d", "compute", "feature maps [256, 7, 7]", CASES, prepare),)
