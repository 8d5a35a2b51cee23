"""Convolution of small maps, fused with the operations around it in a residual block.

Input [B, C, H, W] and weight [O, C, kh, kw] give [B, O, H', W']. The CPU's kernels are those of the masked convolution:
taps that fall on padding in all rows of a tile cost nothing, which on maps of 4x4 pixels is a third of them. A ReLU of
the input, bias, an added residual and a ReLU of the result make no pass over memory of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.ops._checks import check_dense, check_integer, is_integer
from cpc_ext.ops._convolution import (
    Bare,
    autocast_all,
    channels_last,
    check_beside_input,
    check_image_and_weight,
    empty_image,
    through_relu,
)
from cpc_ext.ops._library import (
    autocast_dtype,
    is_plain,
    may_need_gradients,
    refuse_forward_mode,
    register,
    with_workspace,
    without_autocast,
)

__all__ = ["conv2d", "conv2d_passing", "conv2d_reference"]

_ACTIVATIONS = (None, "relu")
# The longest stride, padding and dilation, so that sums of sizes do not overflow; csrc/conv2d/plan.cpp has the same.
_MOST_PIXELS = 1 << 28


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    relu_input: bool = False,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Convolve, optionally with a ReLU of the input, an added residual, and a ReLU of the sum.

    Equals ``F.conv2d(relu(input) if relu_input else input, weight, bias, stride, padding, dilation) + residual``
    followed by the activation. Sums are in float32, or in float64 for float64 tensors. The CPU computes images that are
    large enough in pairs or squares of pixels at stride 1, where :func:`cpc_ext.ops.masked_conv2d` does. There are
    kernels for the CPU alone: on all other devices, CUDA among them, PyTorch's own convolution computes the same.

    Args:
        input: [B, C, H, W], floating; B may be 0.
        weight: [O, C, kh, kw], of the input's dtype unless autocast casts both to one.
        bias: [O], likewise, or None.
        stride: distance in input pixels between neighbouring output pixels.
        padding: rows and columns of zeros on each side of the input; a single number stands for both.
        dilation: distance of neighbouring taps in pixels.
        relu_input: whether to apply a ReLU to the input; its result is not stored.
        residual: of the output's shape and the input's dtype; added before the activation.
        activation: None or "relu".

    Returns:
        [B, O, H', W'] with H' = (H + 2 padding - dilation (kh - 1) - 1) // stride + 1 and W' likewise; on the CPU with
        the channels innermost in memory (``channels_last``) whatever the input's layout; an input of that layout is not
        copied. Differentiable in reverse mode, any number of times.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range.
        NotImplementedError: forward-mode derivatives on the CPU.
    """
    padding = _check_arguments(input, weight, bias, stride, padding, dilation, relu_input, residual, activation)
    if input.device.type != "cpu":
        return conv2d_reference(
            input,
            weight,
            bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            relu_input=relu_input,
            residual=residual,
            activation=activation,
        )
    refuse_forward_mode(input, weight, bias, residual)
    input, weight, bias, residual = autocast_all(input, weight, bias, residual)
    return _conv2d(input, weight, bias, residual, stride, list(padding), dilation, relu_input, activation == "relu")


def conv2d_passing(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    relu_input: bool = False,
) -> tuple[Tensor, Tensor]:
    """Convolve an input that also bypasses the convolution, as in a residual block; return (output, input).

    Later uses of the input must take the second result, which equals the input: its gradient is then added where the
    convolution's gradient in the input is written, not in a pass of its own. Arguments and errors are those of
    :func:`conv2d`.
    """
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "relu_input": relu_input}
    kernel = input.device.type == "cpu" and is_plain(input) and autocast_dtype(input.device) in (None, input.dtype)
    if not (kernel and may_need_gradients(input)):
        return conv2d(input, weight, bias, **options), input
    padding = _check_arguments(input, weight, bias, residual=None, activation=None, **options)
    refuse_forward_mode(input, weight, bias)
    input, weight, bias, _ = autocast_all(input, weight, bias, None)
    results: tuple[Tensor, Tensor] = _Passing.apply(  # type: ignore[no-untyped-call]
        input, weight, bias, (stride, list(padding), dilation), relu_input
    )
    return results


def conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    relu_input: bool = False,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """:func:`conv2d` in plain PyTorch, arguments unchecked."""
    output = F.conv2d(torch.relu(input) if relu_input else input, weight, bias, stride, padding, dilation)
    if residual is not None:
        output = output + residual
    return torch.relu(output) if activation == "relu" else output


def _check_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int | tuple[int, int],
    dilation: int,
    relu_input: bool,
    residual: Tensor | None,
    activation: str | None,
) -> tuple[int, int]:
    """Check the arguments of :func:`conv2d` and return the padding of rows and of columns."""
    check_image_and_weight(input, weight)
    paddings = _check_numbers(stride, padding, dilation, relu_input, activation)
    shape = _output_shape(input, weight, stride, paddings, dilation)
    if min(shape[2:]) < 1:
        raise ValueError(
            f"weight's kernel of {weight.shape[2]}x{weight.shape[3]} taps must fit into the padded input, got shape "
            f"{tuple(input.shape)} with padding {paddings} and dilation {dilation}"
        )
    for name, added, wanted in (("bias", bias, shape[1:2]), ("residual", residual, shape)):
        if added is not None and check_dense(name, added).shape != wanted:
            raise ValueError(f"{name} must have shape {tuple(wanted)}, got {tuple(added.shape)}")
    check_beside_input(input, (("weight", weight), ("bias", bias), ("residual", residual)))
    return paddings


def _check_numbers(
    stride: int, padding: int | tuple[int, int], dilation: int, relu_input: bool, activation: str | None
) -> tuple[int, int]:
    check_integer("stride", stride, 1)
    check_integer("dilation", dilation, 1)
    both = tuple(padding) if isinstance(padding, Sequence) else (padding, padding)
    if len(both) != 2 or not all(map(is_integer, both)):
        raise TypeError(f"padding must be an int or two, got {padding!r}")
    if min(both) < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    for name, value in (("stride", stride), ("padding", max(both)), ("dilation", dilation)):
        if value > _MOST_PIXELS:
            raise ValueError(f"{name} must be at most {_MOST_PIXELS}, got {value}")
    if not isinstance(relu_input, bool):
        raise TypeError(f"relu_input must be a bool, got {type(relu_input).__name__}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f'activation must be None or "relu", got {activation!r}')
    return both


def _output_shape(
    input: Tensor, weight: Tensor, stride: int, padding: Sequence[int], dilation: int
) -> tuple[int, int, int, int]:
    sides = zip(input.shape[2:], weight.shape[2:], padding, strict=True)
    height, width = ((side + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for side, k, pad in sides)
    return input.shape[0], weight.shape[0], height, width


# --- The op ---


class _Convolution(NamedTuple):
    """The op's arguments, those of :func:`conv2d` after the checks."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor | None
    stride: int
    padding: list[int]
    dilation: int
    relu_input: bool
    relu: bool


class _Gradient(NamedTuple):
    """Arguments of the op's gradient. output: that of a final ReLU or None; passed: added to the input's gradient."""

    grad: Tensor
    input: Tensor
    weight: Tensor
    output: Tensor | None
    passed: Tensor | None
    stride: int
    padding: list[int]
    dilation: int
    relu_input: bool
    needs: list[bool]  # Whether the gradients of input, weight and bias are needed.


class _GradientResults(NamedTuple):
    """Gradients; those that are not needed are empty, and so is ``preactivation`` without a final ReLU."""

    preactivation: Tensor
    input: Tensor
    weight: Tensor
    bias: Tensor


def _empty_output(op: _Convolution) -> Tensor:
    _, channels, *size = _output_shape(op.input, op.weight, op.stride, op.padding, op.dilation)
    return empty_image(op.input, channels, size)


def _reference_op(op: _Convolution) -> Tensor:
    output = conv2d_reference(
        op.input,
        op.weight,
        op.bias,
        stride=op.stride,
        padding=(op.padding[0], op.padding[1]),
        dilation=op.dilation,
        relu_input=op.relu_input,
        residual=op.residual,
        activation="relu" if op.relu else None,
    )
    return channels_last(output)


def _kernel(op: _Convolution) -> Tensor:
    if op.input.device.type != "cpu":
        return _reference_op(op)
    output = _empty_output(op)
    if output.numel() == 0:
        return output
    with_workspace(
        native.conv2d,
        output,
        op.weight,
        channels_last(op.input),
        None if op.bias is None else op.bias.contiguous(),
        op.residual,
        output,
        op.stride,
        *op.padding,
        op.dilation,
        op.relu_input,
        op.relu,
    )
    return output


def _backward_reference(op: _Gradient) -> _GradientResults:
    needs_input, needs_weight, needs_bias = op.needs
    grad = op.grad if op.output is None else through_relu(op.grad, op.output)
    grad_input = grad_weight = grad  # Placeholders, not used below where neither is needed.
    if needs_input or needs_weight:
        with torch.enable_grad():
            activated = torch.relu(op.input) if op.relu_input else op.input
            leaves = [activated.detach().requires_grad_(), op.weight.detach().requires_grad_()]
            output = F.conv2d(leaves[0], leaves[1], None, op.stride, op.padding, op.dilation)
        grad_input, grad_weight = torch.autograd.grad(output, leaves, grad)
    if needs_input:
        grad_input = _finished(grad_input, op.input if op.relu_input else None, op.passed)
    return _GradientResults(
        preactivation=grad.new_empty(0) if op.output is None else channels_last(grad).clone(),
        input=channels_last(grad_input).clone() if needs_input else grad.new_empty(0),
        weight=torch.empty_like(op.weight).copy_(grad_weight) if needs_weight else grad.new_empty(0),
        bias=grad.sum((0, 2, 3)) if needs_bias else grad.new_empty(0),
    )


def _finished(grad_input: Tensor, through: Tensor | None, passed: Tensor | None) -> Tensor:
    """Backpropagate through the ReLU of the input ``through``, if any, and add the gradient ``passed``, if any."""
    if through is not None:
        grad_input = through_relu(grad_input, through)
    return grad_input if passed is None else grad_input + passed


def _empty_gradients(op: _Gradient) -> _GradientResults:
    grad, weight = op.grad, op.weight
    needs_input, needs_weight, needs_bias = op.needs
    return _GradientResults(
        preactivation=grad.new_empty(0) if op.output is None else empty_image(grad, grad.shape[1], grad.shape[2:]),
        input=empty_image(grad, op.input.shape[1], op.input.shape[2:]) if needs_input else grad.new_empty(0),
        weight=torch.empty_like(weight) if needs_weight else grad.new_empty(0),  # Laid out as the weight is.
        bias=grad.new_empty(weight.shape[0]) if needs_bias else grad.new_empty(0),
    )


def _backward_kernel(op: _Gradient) -> _GradientResults:
    if op.grad.device.type != "cpu":
        return _backward_reference(op)
    results = _empty_gradients(op)
    if op.grad.numel() == 0:
        for result in results:
            result.zero_()
        return results
    needs_input, needs_weight, needs_bias = op.needs
    with_workspace(
        native.conv2d_backward,
        op.grad,
        op.weight,
        channels_last(op.grad),
        channels_last(op.input),
        op.output,
        None if op.output is None else results.preactivation,
        op.passed if needs_input else None,
        results.input if needs_input else None,
        results.weight if needs_weight else None,
        results.bias if needs_bias else None,
        op.stride,
        *op.padding,
        op.dilation,
        op.relu_input,
    )
    return results


def _setup_context(ctx: Any, op: _Convolution, output: Tensor) -> None:
    ctx.save_for_backward(op.input, op.weight, output if op.relu else None)
    ctx.geometry = op.stride, op.padding, op.dilation
    ctx.relu_input = op.relu_input


def _backward(ctx: Any, kept: Sequence[Any], grad: Tensor, passed: Tensor | None = None) -> dict[str, Tensor | None]:
    """Return the gradients by name; ``passed`` is added to the input's."""
    input, weight, output = kept
    needs_input, needs_weight, needs_bias, needs_residual, *_ = ctx.needs_input_grad
    if passed is not None:
        passed = passed.to(input.dtype)
    if torch.is_grad_enabled():
        with without_autocast(input.device):
            if output is not None:
                grad = through_relu(grad, output)
            activated = torch.relu(input) if ctx.relu_input else input
            bare = _bare(ctx.geometry)
            of_input, of_weight = bare.derivatives(grad, activated, weight, None, needs_input, needs_weight)
            if of_input is not None:
                of_input = _finished(of_input, input if ctx.relu_input else None, passed)
            return {
                "input": of_input,
                "weight": of_weight,
                "bias": grad.sum((0, 2, 3)) if needs_bias else None,
                "residual": grad if needs_residual else None,
            }
    needs = [needs_input, needs_weight, needs_bias]
    preactivation, of_input, of_weight, of_bias = _conv2d_backward(
        grad, input, weight, output, passed, *ctx.geometry, ctx.relu_input, needs
    )
    return {
        "input": of_input if needs_input else None,
        "weight": of_weight if needs_weight else None,
        "bias": of_bias if needs_bias else None,
        "residual": (grad if output is None else preactivation) if needs_residual else None,
    }


class _Passing(torch.autograd.Function):
    """The op, with its input as a second result."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], relu_input: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(input, weight)
        ctx.geometry, ctx.relu_input = geometry, relu_input
        ctx.set_materialize_grads(False)
        return _conv2d(input, weight, bias, None, *geometry, relu_input, False), input.view_as(input)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return passed, None, None, None, None
        by_name = _backward(ctx, (*ctx.saved_tensors, None), grad, passed)
        return by_name["input"], by_name["weight"], by_name["bias"], None, None


def _bare(geometry: tuple[Any, ...]) -> Bare:
    """Return the bare convolution of a stride, padding and dilation."""

    def convolve(input: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
        output: Tensor = _conv2d(input, weight, None, None, *geometry, False, False)
        return output

    def gradients(
        grad: Tensor, input: Tensor, weight: Tensor, mask: Tensor | None, needs: list[bool]
    ) -> tuple[Tensor, Tensor]:
        results = _conv2d_backward(grad, input, weight, None, None, *geometry, False, needs)
        return results[1], results[2]

    return Bare(convolve, gradients)


_conv2d = register(
    "conv2d",
    _Convolution,
    Tensor,
    reference=_reference_op,
    kernel=_kernel,
    fake=_empty_output,
    setup_context=_setup_context,
    backward=_backward,
)
_conv2d_backward = register(
    "conv2d_backward",
    _Gradient,
    _GradientResults,
    reference=_backward_reference,
    kernel=_backward_kernel,
    fake=_empty_gradients,
)
