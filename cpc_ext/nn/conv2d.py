"""PyTorch's convolution layer, on the kernels of :func:`cpc_ext.ops.conv2d` where they are faster.

From input [B, C, H, W] to [B, O, H', W']. A ReLU of the input and an added residual may come with a call, so that a
pre-activation block makes no pass over memory for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cpc_ext._native import native
from cpc_ext.ops._library import autocast_dtype, may_take_kernels
from cpc_ext.ops.conv2d import conv2d, conv2d_passing

__all__ = ["Conv2d", "kernel_pays"]

# What python/benchmarks/conv2d_choice.csv was measured with; "native" is one of these where it was built.
_IS_MEASURED = native.build_info()["simd"] in ("avx512", "avx512_bf16", "native")


class _Pays(NamedTuple):
    """Maps of up to so many pixels, at least so many in a batch of eight images or more, and channels on both sides."""

    most_pixels: int
    pixels_in_batch: int
    channels: int


# By type, side of the kernel up to 1, 3 and above, and whether there is a stride.
_RULES: dict[tuple[torch.dtype, int, bool], tuple[_Pays, ...]] = {
    (torch.float32, 1, False): (_Pays(1024, 1000, 64),),
    (torch.float32, 1, True): (_Pays(256, 256, 16), _Pays(1024, 4000, 128)),
    (torch.float32, 3, False): (_Pays(64, 4000, 32), _Pays(1024, 512, 64)),
    (torch.float32, 3, True): (_Pays(256, 2000, 32), _Pays(1024, 512, 64)),
    (torch.float32, 5, False): (_Pays(16, 256, 64),),
    (torch.bfloat16, 1, False): (_Pays(4, 1000, 64),),
    (torch.bfloat16, 1, True): (_Pays(64, 256, 16), _Pays(256, 2000, 64)),
    (torch.bfloat16, 3, False): (
        _Pays(4, 300, 16),
        _Pays(16, 1000, 64),
        _Pays(16, 4000, 32),
        _Pays(64, 4000, 64),
        _Pays(256, 50_000, 64),
    ),
    (torch.bfloat16, 3, True): (
        _Pays(4, 300, 16),
        _Pays(64, 1000, 64),
        _Pays(64, 4000, 32),
        _Pays(256, 5000, 64),
    ),
}
_FEWEST_IMAGES = 8


def kernel_pays(
    dtype: torch.dtype, batch: int, channels: tuple[int, int], size: tuple[int, int], kernel: int, stride: int
) -> bool:
    """Whether the CPU's kernel is faster than PyTorch's convolution, forwards and backwards together.

    The rule sums up what ``python/benchmarks/conv2d_choice.py`` has measured, which is beside it as a table.

    Args:
        dtype: what is convolved.
        batch: images.
        channels: of input and output.
        size: rows and columns of the output.
        kernel: the longer side of the kernel.
        stride: of the convolution.
    """
    if batch < _FEWEST_IMAGES:
        return False
    pixels = size[0] * size[1]
    rules = _RULES.get((dtype, 1 if kernel == 1 else 3 if kernel <= 3 else 5, stride > 1), ())
    return any(
        pixels <= most and batch * pixels >= least and min(channels) >= narrowest for most, least, narrowest in rules
    )


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d`: the same arguments, parameters and state dict, and up to rounding the same results.

    On a CPU with AVX-512, where :func:`kernel_pays` says so, :func:`cpc_ext.ops.conv2d` computes it, whose results have
    the channels innermost in memory. Else, and in forward-mode differentiation, in ``torch.export``, with groups,
    strides or dilations that differ between rows and columns, padding other than zeros or "same" padding, PyTorch does.
    """

    if TYPE_CHECKING:  # What a call gives, which PyTorch declares to be anything.

        def __call__(self, input: Tensor, *, relu_input: bool = False, residual: Tensor | None = None) -> Tensor: ...

    def forward(self, input: Tensor, *, relu_input: bool = False, residual: Tensor | None = None) -> Tensor:
        """Convolve, after a ReLU of the input where ``relu_input``; ``residual``, of the result's shape, is added."""
        if self.takes_kernel(input):
            return conv2d(input, self.weight, self.bias, **self._geometry(), relu_input=relu_input, residual=residual)
        output = super().forward(torch.relu(input) if relu_input else input)
        if residual is None:
            return output
        if residual.shape != output.shape:
            raise ValueError(f"residual must be {list(output.shape)}, as the result, got {list(residual.shape)}")
        return output + (residual if autocast_dtype(input.device) is None else residual.to(output.dtype))

    def passing(self, input: Tensor, *, relu_input: bool = False) -> tuple[Tensor, Tensor]:
        """What a call without residual gives, and the input: what else uses that is to use the second result.

        Where the kernel runs, gradients that come back to that are added as it writes the input's.
        """
        if self.takes_kernel(input):
            return conv2d_passing(input, self.weight, self.bias, **self._geometry(), relu_input=relu_input)
        return self.forward(input, relu_input=relu_input), input

    def takes_kernel(self, input: Tensor) -> bool:
        """Whether a call with such an input runs on the kernel."""
        if input.device.type != "cpu" or input.ndim != 4 or not _IS_MEASURED:
            return False
        if not (may_take_kernels() and self._is_covered()):
            return False
        dtype = (None if input.dtype == torch.float64 else autocast_dtype(input.device)) or input.dtype
        geometry = self._geometry()
        rows, columns = (
            (side + 2 * pad - geometry["dilation"] * (k - 1) - 1) // geometry["stride"] + 1
            for side, pad, k in zip(input.shape[2:], geometry["padding"], self.kernel_size, strict=True)
        )
        if min(rows, columns) < 1:  # PyTorch says what is wrong.
            return False
        channels = self.in_channels, self.out_channels
        return kernel_pays(dtype, input.shape[0], channels, (rows, columns), max(self.kernel_size), geometry["stride"])

    def _is_covered(self) -> bool:
        return (
            self.groups == 1
            and self.stride[0] == self.stride[1]
            and self.dilation[0] == self.dilation[1]
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
        )

    def _geometry(self) -> dict[str, Any]:
        return {"stride": self.stride[0], "padding": self.padding, "dilation": self.dilation[0]}
