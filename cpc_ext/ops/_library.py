"""Makes PyTorch know an op: its schema, and who computes it on which device.

Plain ``torch.library`` definitions: the wrappers of ``torch.library.custom_op`` cost some microseconds a call more,
which small batches feel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from cpc_ext._native import KERNEL_DEVICES

__all__ = ["refuse_forward_mode", "register"]

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
        backward, setup_context: the gradient, as of ``torch.library.register_autograd``. Second derivatives are refused
            with a RuntimeError; PyTorch would take them for zeros.
    """
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeExplicitAutograd")
    for device in KERNEL_DEVICES:
        _library.impl(name, kernel, device.upper())
    torch.library.register_fake(f"cpc_ext::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"cpc_ext::{name}", once_differentiable(backward), setup_context=setup_context, lib=_library
        )
    return getattr(torch.ops.cpc_ext, name).default


def refuse_forward_mode(*inputs: Tensor | None) -> None:
    """NotImplementedError where a tensor carries a tangent, which the ops would drop."""
    if forward_ad._current_level < 0:
        return
    for tensor in inputs:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError("the ops of cpc_ext have no forward-mode derivatives")
