"""PyTorch's convolution layer, with the kernels of :func:`cpc_ext.ops.conv2d` where they are faster.

Input [B, C, H, W] gives [B, O, H', W']. A call can include a ReLU of the input and an added residual, so that a
pre-activation block makes no pass over memory for them.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from cpc_ext._native import native
from cpc_ext.ops._library import autocast_dtype, may_take_kernels
from cpc_ext.ops.conv2d import conv2d, conv2d_passing

__all__ = ["Conv2d", "kernel_pays", "vector_instructions"]


def vector_instructions() -> str | None:
    """Return which instructions the kernels use of those of python/benchmarks/conv2d_choice.csv: avx512, avx2 or None.

    None also if they are told to use less than PyTorch has, by CPC_EXT_ISA.
    """
    kernels: str = native.build_info()["simd"].removesuffix("_bf16")
    pytorch = torch.backends.cpu.get_cpu_capability().lower()
    return pytorch if pytorch in _RULES and kernels in (pytorch, "native") else None


class _Pays(NamedTuple):
    """Bounds within which the kernel is faster.

    They are the most pixels of a map, and the fewest pixels in a batch, channels, and images.
    """

    most_pixels: int
    pixels_in_batch: int
    channels: int
    images: int = 8


# By dtype, side of the kernel (1; 3 for up to 3; 5 for more), and whether the stride is above 1.
_AVX512: dict[tuple[torch.dtype, int, bool], tuple[_Pays, ...]] = {
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
_AVX2: dict[tuple[torch.dtype, int, bool], tuple[_Pays, ...]] = {
    (torch.float32, 1, False): (_Pays(4, 700, 64),),
    (torch.float32, 1, True): (_Pays(16, 32, 16), _Pays(1024, 32, 64)),
    (torch.float32, 3, False): (_Pays(4, 32, 16), _Pays(16, 1000, 32), _Pays(64, 1000, 32), _Pays(1024, 256, 64)),
    (torch.float32, 3, True): (_Pays(4, 32, 16), _Pays(16, 32, 32), _Pays(1024, 32, 64)),
    (torch.float32, 5, False): (_Pays(16, 32, 16), _Pays(16, 4, 64, images=1)),
}
# AVX2 has no products of 16-bit types, and PyTorch takes ten times as long as in float32.
_ANY_SIZE = 1 << 40
for _dtype, _strided in itertools.product((torch.bfloat16, torch.float16), (False, True)):
    _AVX2[_dtype, 1, _strided] = (
        _Pays(_ANY_SIZE, 512, 1),
        _Pays(_ANY_SIZE, 32, 64),
        _Pays(_ANY_SIZE, 1024, 1, images=1),
        _Pays(_ANY_SIZE, 64, 64, images=1),
        _Pays(_ANY_SIZE, 16, 256, images=1),
    )
    _AVX2[_dtype, 3, _strided] = _AVX2[_dtype, 5, _strided] = (
        _Pays(_ANY_SIZE, 128, 1),
        _Pays(_ANY_SIZE, 32, 32),
        _Pays(_ANY_SIZE, 256, 1, images=1),
        _Pays(_ANY_SIZE, 64, 16, images=1),
        _Pays(_ANY_SIZE, 16, 64, images=1),
    )
_RULES = {"avx512": _AVX512, "avx2": _AVX2}
_SIMD = vector_instructions()


def kernel_pays(
    dtype: torch.dtype,
    batch: int,
    channels: tuple[int, int],
    size: tuple[int, int],
    kernel: int,
    stride: int,
    *,
    simd: str | None,
) -> bool:
    """Return whether the CPU's kernel is faster than PyTorch's convolution, forward and backward together.

    The rules summarise measurements of ``python/benchmarks/conv2d_choice.py``, in the table beside it.

    Args:
        dtype: dtype of the convolution.
        batch: number of images.
        channels: numbers of channels of input and output.
        size: rows and columns of the output.
        kernel: the longer side of the kernel.
        stride: stride of the convolution.
        simd: instructions of the processor, see :func:`vector_instructions`.
    """
    if simd is None:
        return False
    pixels = size[0] * size[1]
    rules = _RULES[simd].get((dtype, 1 if kernel == 1 else 3 if kernel <= 3 else 5, stride > 1), ())
    return any(
        pixels <= most and batch * pixels >= least and min(channels) >= narrowest and batch >= fewest
        for most, least, narrowest, fewest in rules
    )


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` with the same arguments, parameters and state dict, and up to rounding the same results.

    On a CPU with AVX-512 or AVX2, :func:`cpc_ext.ops.conv2d` computes the convolution where :func:`kernel_pays` says
    that it is faster; its results are channels-last. In all other cases PyTorch does: also in forward-mode
    differentiation and ``torch.export``, with groups, with strides or dilations that differ between rows and columns,
    with padding modes other than zeros, and with padding given as a string.
    """

    if TYPE_CHECKING:  # PyTorch declares the result of a call as Any.

        def __call__(self, input: Tensor, *, relu_input: bool = False, residual: Tensor | None = None) -> Tensor: ...

    def forward(self, input: Tensor, *, relu_input: bool = False, residual: Tensor | None = None) -> Tensor:
        """Convolve, with a ReLU of the input if ``relu_input``, and add ``residual``, which has the result's shape."""
        if self.takes_kernel(input):
            return conv2d(input, self.weight, self.bias, **self._geometry(), relu_input=relu_input, residual=residual)
        output = super().forward(torch.relu(input) if relu_input else input)
        if residual is None:
            return output
        if residual.shape != output.shape:
            raise ValueError(f"residual must be {list(output.shape)}, as the result, got {list(residual.shape)}")
        return output + (residual if autocast_dtype(input.device) is None else residual.to(output.dtype))

    def passing(self, input: Tensor, *, relu_input: bool = False) -> tuple[Tensor, Tensor]:
        """Return the result of a call without residual, and the input, for other uses of it.

        Other uses of the input must take the second result: where the kernel runs, it adds their gradient while it
        writes that of the input.
        """
        if self.takes_kernel(input):
            return conv2d_passing(input, self.weight, self.bias, **self._geometry(), relu_input=relu_input)
        return self.forward(input, relu_input=relu_input), input

    def takes_kernel(self, input: Tensor) -> bool:
        """Return whether the kernel computes a call with this input."""
        if input.device.type != "cpu" or input.ndim != 4 or _SIMD is None:
            return False
        if not (may_take_kernels() and self._is_covered()):
            return False
        dtype = (None if input.dtype == torch.float64 else autocast_dtype(input.device)) or input.dtype
        geometry = self._geometry()
        rows, columns = (
            (side + 2 * pad - geometry["dilation"] * (k - 1) - 1) // geometry["stride"] + 1
            for side, pad, k in zip(input.shape[2:], geometry["padding"], self.kernel_size, strict=True)
        )
        if min(rows, columns) < 1:  # PyTorch raises the error.
            return False
        channels = self.in_channels, self.out_channels
        size, kernel, stride = (rows, columns), max(self.kernel_size), geometry["stride"]
        return kernel_pays(dtype, input.shape[0], channels, size, kernel, stride, simd=_SIMD)

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
