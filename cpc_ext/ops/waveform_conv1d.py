"""The first layer of audio encoders: convolution of one channel, bias, channel norm and ReLU in one pass.

The output is by far the largest of such an encoder, a hundred times the waveform for 512 channels, so reading and
writing it takes most of the time. Separate layers read and write it once each, and again in the backward pass. This op
writes it once; its backward pass computes it again from the waveform, and reads only the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.ops._checks import DTYPES, check_dense, check_integer, dtype_name
from cpc_ext.ops._contrast_arguments import check_number
from cpc_ext.ops._library import autocast_dtype, in_forward_mode, may_need_gradients, register

__all__ = ["waveform_conv1d", "waveform_conv1d_reference"]


def waveform_conv1d(
    waveforms: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    relu: bool = False,
) -> Tensor:
    """Convolve waveforms, normalise each frame over its channels, and apply ReLU, in this order.

    The CPU has a kernel for float32, bfloat16 and float16, which sums in float32. PyTorch's own operations compute the
    layer on other devices, in float64, in forward-mode differentiation, and where a gradient in the waveforms may be
    requested.

    Args:
        waveforms: [B, 1, T], float32, bfloat16, float16 or float64.
        weight: [C, 1, K], of the waveforms' dtype.
        bias: [C], likewise, or None.
        stride: samples from one frame to the next.
        padding: number of zeros on either side of a waveform.
        scale, shift: [C] floating, factor and summand of the normalised channels. Give both or neither: without them
            nothing is normalised. Normalisation is by the mean and the unbiased variance over the C channels of a
            frame, as in CPC_audio's channel norm (Rivière et al. 2020, arXiv 2002.02848).
        eps: added to the variance.
        relu: whether to apply a ReLU to the result.

    Returns:
        [B, C, L] with L = (T + 2 * padding - K) // stride + 1 and C innermost in memory, of the waveforms' dtype, or
        autocast's. Differentiable in all tensors, but only once where the kernel runs.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range.
    """
    check_dense("waveforms", waveforms)
    check_dense("weight", weight)
    for name, value in (("bias", bias), ("scale", scale), ("shift", shift)):
        if value is not None:
            check_dense(name, value)
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None and not value.is_floating_point():
            raise TypeError(f"{name} must be floating, got {dtype_name(value.dtype)}")
    for name, value in (("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)):
        if value is not None and value.device != waveforms.device:
            raise ValueError(f"{name} must be on {waveforms.device}, as waveforms are, got {value.device}")
    check_number("eps", eps)
    if not isinstance(relu, bool):
        raise TypeError(f"relu must be a bool, got {type(relu).__name__}")
    _check_shapes(waveforms, weight, bias, stride, padding, scale, shift)
    autocast = autocast_dtype(waveforms.device)
    if autocast is not None and waveforms.dtype != torch.float64:
        waveforms, weight = waveforms.to(autocast), weight.to(autocast)
        bias = None if bias is None else bias.to(autocast)
    for name, value in (("waveforms", waveforms), ("weight", weight), ("bias", bias)):
        if value is not None and (value.dtype not in DTYPES or value.dtype != waveforms.dtype):
            wanted = dtype_name(waveforms.dtype) if waveforms.dtype in DTYPES else ", ".join(map(dtype_name, DTYPES))
            raise TypeError(f"{name} must be {wanted}, got {dtype_name(value.dtype)}")
    # All strides beyond the waveform are equivalent; the op's schema holds integers of 64 bits.
    stride = min(stride, waveforms.shape[2] + 2 * padding)
    op = _Layer(waveforms, weight, bias, scale, shift, stride, padding, float(eps), relu)
    if not _has_kernel(waveforms) or in_forward_mode() or may_need_gradients(waveforms):
        return waveform_conv1d_reference(*op)
    if scale is not None and shift is not None:
        op = op._replace(scale=scale.float(), shift=shift.float())
    return _waveform_conv1d(*op)


def _check_shapes(
    waveforms: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    if waveforms.ndim != 3 or waveforms.shape[1] != 1:
        raise ValueError(f"waveforms must be [B, 1, T], got shape {tuple(waveforms.shape)}")
    if weight.ndim != 3 or weight.shape[1] != 1 or 0 in weight.shape:
        raise ValueError(f"weight must be [C, 1, K], got shape {tuple(weight.shape)}")
    if (scale is None) != (shift is None):
        raise ValueError("give both scale and shift, or neither")
    for name, value in (("bias", bias), ("scale", scale), ("shift", shift)):
        if value is not None and tuple(value.shape) != (len(weight),):
            raise ValueError(f"{name} must be [{len(weight)}], a number for each channel, got {tuple(value.shape)}")
    if scale is not None and len(weight) < 2:
        raise ValueError("a frame of one channel cannot be normalised: weight must have at least 2 channels")
    check_integer("stride", stride, 1)
    check_integer("padding", padding, 0)
    if waveforms.shape[2] + 2 * padding < weight.shape[2]:
        raise ValueError(
            f"waveforms of {waveforms.shape[2]} samples are shorter than the kernel of {weight.shape[2]} taps"
        )


class _Layer(NamedTuple):
    """The op's arguments."""

    waveforms: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    stride: int
    padding: int
    eps: float
    relu: bool

    @property
    def frames(self) -> int:
        return (self.waveforms.shape[2] + 2 * self.padding - self.weight.shape[2]) // self.stride + 1


class _Gradient(NamedTuple):
    """Arguments of the gradient in all tensors but the waveforms."""

    grad: Tensor
    layer: _Layer


def waveform_conv1d_reference(
    waveforms: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    eps: float = 1e-5,
    relu: bool = False,
) -> Tensor:
    """The op in plain PyTorch: the tests' reference, and the implementation where there is no kernel."""
    made = F.conv1d(waveforms, weight, bias, stride, padding).transpose(1, 2).contiguous().transpose(1, 2)
    if scale is not None and shift is not None:
        computed = made.float() if made.dtype in (torch.bfloat16, torch.float16) else made
        variance, mean = torch.var_mean(computed, 1, keepdim=True)
        normalised = (computed - mean) * torch.rsqrt(variance + eps)
        made = (normalised * scale[:, None] + shift[:, None]).to(made.dtype)
    return torch.relu(made) if relu else made


def _has_kernel(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype != torch.float64


def _empty(op: _Layer) -> Tensor:
    """Allocate the result, a frame's channels adjacent in memory, as the following layers and the loss read them."""
    return op.waveforms.new_empty(op.waveforms.shape[0], op.frames, op.weight.shape[0]).transpose(1, 2)


def _kernel(op: _Layer) -> Tensor:
    if not _has_kernel(op.waveforms):
        return waveform_conv1d_reference(*op)
    out = _empty(op)
    native.waveform_conv1d(*op[:5], out.transpose(1, 2), *op[5:])
    return out


def _empty_sums(op: _Gradient) -> Tensor:
    channels, _, taps = op.layer.weight.shape
    return op.grad.new_empty((channels, taps + 3), dtype=torch.float32)


def _backward_kernel(op: _Gradient) -> Tensor:
    if not _has_kernel(op.grad):
        return _backward_reference(op)
    sums = _empty_sums(op)
    native.waveform_conv1d_backward(*op.layer[:5], op.grad.transpose(1, 2).contiguous(), sums, *op.layer[5:])
    return sums


def _backward_reference(op: _Gradient) -> Tensor:
    sums = _empty_sums(op).zero_()
    taps, layer = op.layer.weight.shape[2], op.layer
    places: dict[str, slice | int] = {"weight": slice(taps), "bias": taps, "scale": taps + 1, "shift": taps + 2}
    leaves = {
        name: getattr(layer, name).detach().requires_grad_() for name in places if getattr(layer, name) is not None
    }
    with torch.enable_grad():
        made = waveform_conv1d_reference(*layer._replace(**leaves))
    for name, grad in zip(leaves, torch.autograd.grad(made, list(leaves.values()), op.grad), strict=True):
        sums[:, places[name]] = grad.flatten(1) if name == "weight" else grad
    return sums


def _setup_context(ctx: Any, op: _Layer, output: Tensor) -> None:
    ctx.save_for_backward(*op[:5])
    ctx.settings = op[5:]


def _backward(ctx: Any, saved: Sequence[Any], grad: Tensor) -> dict[str, Tensor | None]:
    waveforms, weight, bias, scale, shift = saved
    channels, _, taps = weight.shape
    sums = _waveform_conv1d_backward(grad, waveforms, weight, bias, scale, shift, *ctx.settings)
    of_weight, of_bias, of_scale, of_shift = sums.split([taps, 1, 1, 1], 1)
    return {
        "weight": of_weight.to(weight.dtype).view(channels, 1, taps),
        "bias": None if bias is None else of_bias[:, 0].to(bias.dtype),
        "scale": None if scale is None else of_scale[:, 0],
        "shift": None if shift is None else of_shift[:, 0],
    }


_waveform_conv1d = register(
    "waveform_conv1d",
    _Layer,
    Tensor,
    reference=lambda op: waveform_conv1d_reference(*op),
    kernel=_kernel,
    fake=_empty,
    setup_context=_setup_context,
    backward=_backward,
    once=True,
)
_waveform_conv1d_backward = register(
    "waveform_conv1d_backward",
    _Gradient,
    Tensor,
    reference=_backward_reference,
    kernel=_backward_kernel,
    fake=_empty_sums,
)
