"""Parts that the convolutions share: checks, autocast, channels-last images, and higher derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpc_ext.ops._checks import DTYPES, check_floating
from cpc_ext.ops._library import autocast_dtype, without_autocast

__all__ = [
    "Bare",
    "autocast_all",
    "channels_last",
    "check_beside_input",
    "check_image_and_weight",
    "empty_image",
    "through_relu",
]


def check_image_and_weight(input: Tensor, weight: Tensor) -> None:
    """Raise TypeError or ValueError unless input is [B, C, H, W] and weight [O, C, kh, kw], floating and not empty.

    The batch alone may be empty.
    """
    for name, value in (("input", input), ("weight", weight)):
        check_floating(name, value)
        if value.ndim != 4:
            expected = "[B, C, H, W]" if name == "input" else "[O, C, kh, kw]"
            raise ValueError(f"{name} must be {expected}, got shape {tuple(value.shape)}")
    sizes, weight_sizes = input.shape, weight.shape
    if sizes[2] == 0 or sizes[3] == 0:
        raise ValueError(f"input must have at least one row and column, got shape {tuple(sizes)}")
    if 0 in weight_sizes:
        raise ValueError(f"weight must not be empty, got shape {tuple(weight_sizes)}")
    if sizes[1] != weight_sizes[1]:
        raise ValueError(f"input must have the weight's {weight_sizes[1]} channels, got {sizes[1]}")


def check_beside_input(input: Tensor, others: Sequence[tuple[str, Tensor | None]]) -> None:
    """Raise unless the input has a dtype of the kernels, and all others, given by name, have its dtype and device.

    Dtypes other than float64 may differ under autocast, which casts them to one.
    """
    dtype, device = input.dtype, input.device
    if dtype not in DTYPES:
        raise TypeError(f"input must have one of the dtypes {DTYPES}, got {dtype}")
    for name, other in others:
        if other is None:
            continue
        if other.device != device:
            raise ValueError(f"{name} must be on the input's device {device}, got {other.device}")
        if other.dtype == dtype:
            continue
        dtypes = {other.dtype, dtype}
        if torch.float64 in dtypes or not dtypes.issubset(DTYPES) or autocast_dtype(device) is None:
            raise TypeError(f"{name} must have the input's dtype {dtype}, got {other.dtype}")


def autocast_all(
    input: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the tensors in autocast's dtype where it is on, unless the input is float64."""
    dtype = autocast_dtype(input.device)
    if dtype is None or input.dtype == torch.float64:
        return input, weight, bias, added
    bias, added = (None if tensor is None else tensor.to(dtype) for tensor in (bias, added))
    return input.to(dtype), weight.to(dtype), bias, added


def channels_last(tensor: Tensor) -> Tensor:
    """Return the tensor in dense channels-last layout."""
    if tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def empty_image(like: Tensor, channels: int, size: Sequence[int]) -> Tensor:
    """Return an empty channels-last tensor [B, channels, *size], with the B, dtype and device of ``like``."""
    height, width = size
    strides = (height * width * channels, 1, width * channels, channels)
    return like.new_empty_strided((like.shape[0], channels, height, width), strides)


def through_relu(grad: Tensor, values: Tensor) -> Tensor:
    """Backpropagate through a ReLU, of argument or result ``values``; where these are NaN, the gradient passes."""
    return grad.masked_fill(values <= 0, 0)


@dataclass(frozen=True)
class Bare:
    """A convolution without bias, summand and activations.

    Attributes:
        convolve: (input, weight, mask) → output.
        gradients: (grad, input, weight, mask, needs) → gradients in input and weight. ``needs`` says whether those in
            input, weight and bias are needed; one that is not needed has no defined value.
    """

    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    gradients: Callable[[Tensor, Tensor, Tensor, Tensor | None, list[bool]], tuple[Tensor, Tensor]]

    def derivatives(
        self, grad: Tensor, input: Tensor, weight: Tensor, mask: Tensor | None, of_input: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients in input and weight, None if not requested; differentiable any number of times."""
        results: tuple[Tensor | None, Tensor | None] = _Gradients.apply(  # type: ignore[no-untyped-call]
            grad, input, weight, mask, self, of_input, of_weight
        )
        return results


class _Gradients(torch.autograd.Function):
    """Gradients of a bare convolution in input and weight, as functions of grad, input and weight.

    The product <grad, convolution(input, weight)> is linear in each of the three tensors, so its second derivatives are
    its first derivatives with other tensors in their places.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor, input: Tensor, weight: Tensor, mask: Tensor | None, bare: Bare, of_input: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_input, grad_weight = bare.gradients(grad, input, weight, mask, [of_input, of_weight, False])
        return grad_input if of_input else None, grad_weight if of_weight else None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.bare, _, _ = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, as_input: Tensor | None, as_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, input, weight, mask = ctx.saved_tensors
        bare: Bare = ctx.bare
        of_grad = of_input = of_weight = None
        with without_autocast(grad.device):
            if as_input is not None:
                of_grad = bare.convolve(as_input, weight, mask) if ctx.needs_input_grad[0] else None
                if ctx.needs_input_grad[2]:
                    of_weight = bare.derivatives(grad, as_input, weight, mask, False, True)[1]
            if as_weight is not None:
                if ctx.needs_input_grad[0]:
                    of_both = bare.convolve(input, as_weight, mask)
                    of_grad = of_both if of_grad is None else of_grad + of_both
                if ctx.needs_input_grad[1]:
                    of_input = bare.derivatives(grad, input, as_weight, mask, True, False)[0]
        return of_grad, of_input, of_weight, None, None, None, None
