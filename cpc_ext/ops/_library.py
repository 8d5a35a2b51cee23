"""Makes PyTorch know an op: its schema, and who computes it on which device.

Plain ``torch.library`` definitions: the wrappers of ``torch.library.custom_op`` cost some microseconds a call more,
which small batches feel.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cpc_ext._native import KERNEL_DEVICES, native

__all__ = [
    "autocast_dtype",
    "differentiable_once",
    "refuse_forward_mode",
    "register",
    "tf32_allowed",
    "without_autocast",
    "workspace_of",
]

_library = torch.library.Library("cpc_ext", "DEF")


def register(
    schema: str,
    *,
    reference: Callable,
    kernel: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
) -> torch._ops.OpOverload:
    """Define ``cpc_ext::NAME(...)`` and return it.

    Args:
        schema: name, arguments and results, as of ``torch.library.Library.define``. Results alias no argument.
        reference: plain PyTorch; runs on devices without a kernel.
        kernel: runs on the devices that this build has kernels for.
        fake: gives empty results, for tracing.
        backward, setup_context: the gradient, as of ``torch.library.register_autograd``. What backward gives is
            differentiated in turn where a graph of it is asked for, so it must be made of differentiable operations
            then, or be :func:`differentiable_once`.
    """
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    for device in KERNEL_DEVICES:
        _library.impl(name, kernel, device.upper())
    torch.library.register_fake(f"cpc_ext::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"cpc_ext::{name}", backward, setup_context=setup_context, lib=_library)
    return getattr(torch.ops.cpc_ext, name).default


def differentiable_once(name: str) -> Callable[[Callable], Callable]:
    """Decorator of a backward function: differentiating what it gives is a RuntimeError that names the op.

    PyTorch's own ``once_differentiable`` raises only where the incoming gradient requires one, and only where all of
    the graph is gone through; otherwise what backward gives counts as constant, and second derivatives come out as
    zeros or lack a part.

    The function is ``backward(ctx, saved, *gradients)``, where ``saved`` is ``ctx.saved_tensors``. Among them there
    must be arguments or results of the op that require a gradient, through which the refusal is found.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            saved = ctx.saved_tensors  # Once, as activation checkpointing asks for.
            if not torch.is_grad_enabled():  # Nobody asked for a graph of the gradients (create_graph).
                return backward(ctx, saved, *gradients)
            with torch.no_grad():
                results = backward(ctx, saved, *gradients)
            sources = [tensor for tensor in (*gradients, *saved) if tensor is not None and tensor.requires_grad]
            return tuple(result if result is None else _Refusal.apply(name, result, *sources) for result in results)

        return wrapper

    return decorate


class _Refusal(torch.autograd.Function):
    """A gradient as it is, in whose place in the graph there is an error."""

    @staticmethod
    def forward(ctx: Any, name: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name} has no second derivatives: its gradient cannot be differentiated. Compute what needs them in "
            "plain PyTorch, or detach the gradient if it is to count as a constant"
        )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast brings tensors of a device to; None where it is off, or where the device has none (meta)."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A context in which autocast is off for a device."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


# Objects of which PyTorch has one each; looking them up anew costs some microseconds.
_FP32_PRECISIONS = {"convolution": torch.backends.cudnn.conv, "product": torch.backends.cuda.matmul}


def tf32_allowed(tensor: Tensor, work: str) -> bool:
    """Whether kernels may round float32 to TF32 on a tensor's device, in a "convolution" or matrix "product".

    ``torch.backends.cudnn.conv.fp32_precision`` and ``torch.backends.cuda.matmul.fp32_precision`` decide, in which
    PyTorch also reflects its older switches (``allow_tf32``, ``torch.set_float32_matmul_precision``) and those above
    them (``torch.backends.fp32_precision``). The CPU's kernels never round, emulated ones of CUDA do.
    """
    return (tensor.is_cuda or hasattr(native, "emulate_cuda")) and _FP32_PRECISIONS[work].fp32_precision == "tf32"


def workspace_of(tensor: Tensor, size: int) -> Tensor | None:
    """Memory of ``size`` bytes on a tensor's device, as a kernel asks for it; None for none."""
    return tensor.new_empty(size, dtype=torch.uint8) if size else None


def refuse_forward_mode(*inputs: Tensor | None) -> None:
    """NotImplementedError where a tensor carries a tangent, which the ops would drop."""
    if forward_ad._current_level < 0:
        return
    for tensor in inputs:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError("the ops of cpc_ext have no forward-mode derivatives")
