"""Masked (PixelCNN) convolution: some taps are hidden, so that no output sees the pixels that it has to predict.

Input [B, C, H, W] and weight [O, C, kh, kw] give [B, O, H, W] at stride 1 with zero padding. The kernels compute one
matrix product over the visible taps; taps that the mask hides in all channels cost nothing, forward and backward. Bias,
an added condition, and a ReLU or tanh-sigmoid gate are applied before a result is written to memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext._native import KERNEL_DEVICES, native
from cpc_ext.ops._checks import check_dense, check_integer
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
    may_need_gradients,
    refuse_forward_mode,
    register,
    tf32_allowed,
    values_at_hand,
    with_workspace,
    without_autocast,
)

__all__ = ["PixelConvolution", "gated_activation", "masked_conv2d", "masked_conv2d_reference"]

_ACTIVATIONS = (None, "relu", "gated")


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor,
    dilation: int = 1,
    activation: str | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """Convolve with the taps that a mask leaves visible (van den Oord et al. 2016, arXiv 1601.06759).

    Equals ``F.conv2d(input, weight * mask, bias, padding="same", dilation=dilation) + condition`` followed by the
    activation. A kernel of even side k looks k / 2 - 1 taps back and k / 2 ahead, as PyTorch pads it. Sums are in
    float32, or in float64 for float64 tensors. Where the CPU multiplies float32 (all types but float64, and bfloat16
    only without instructions for it), it computes images that are large enough in pairs of pixels (F(2, 3) of Lavin and
    Gray 2016, arXiv 1509.09308, along the rows), or, of up to 384 channels, in squares of 2x2 pixels (F(2x2, 3x3)): up
    to a third or 56 % fewer multiplications, and rounding errors that are no larger. On CUDA, factors in float32 are
    rounded to TF32 where ``torch.backends.cudnn.conv.fp32_precision`` is "tf32", the default; else three such products
    make one (3xTF32), which is exact to 2^-20 of its size, and NaN where a factor is infinite.

    Args:
        input: [B, C, H, W], floating; B may be 0.
        weight: [O, C, kh, kw], of the input's dtype unless autocast casts both to one. On CUDA, ``channels_last``
            weights whose channels fill a multiple of 64 bytes need not be packed for the forward pass.
        bias: [O], likewise, or None.
        mask: [kh, kw] for all channels alike, or [O, C, kh, kw]; bool, or numbers 0 and 1. True keeps a tap. The CPU
            reads its values in every call. Reading would stall another device's stream, so there the first call finds
            the taps that no channel sees, and later calls do so again only after the mask has been changed in place.
            They miss changes that PyTorch does not record (through ``mask.data`` or foreign memory): a tap that such
            a change reveals may stay hidden. During the capture of a CUDA graph, and for masks made in inference mode,
            no call reads the values: the result is the same, but only hidden taps that an earlier call found are
            skipped.
        dilation: distance of neighbouring taps in pixels.
        activation: None, "relu", or "gated": tanh of the first half of the output channels times sigmoid of the
            second half, which leaves O / 2 channels (van den Oord et al. 2016, arXiv 1606.05328, equation 2).
        condition: broadcastable to [B, O, H, W], of the input's dtype; added before the activation.

    Returns:
        [B, O, H, W], or [B, O / 2, H, W] where gated, with the channels innermost in memory (``channels_last``)
        whatever the input's layout; an input of that layout is not copied. Differentiable in reverse mode, any number
        of times; the weight's gradient is exactly zero where the mask hides it.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range. Numbers in the mask other than 0
            and 1 are found on the CPU alone, since reading them would stall another device's stream.
        NotImplementedError: forward-mode derivatives.
    """
    _check_arguments(input, weight, bias, mask, dilation, activation, condition)
    refuse_forward_mode(input, weight, bias, condition)
    input, weight, bias, condition = autocast_all(input, weight, bias, condition)
    # At larger dilations all taps but a middle one see only padding: the same result, without sizes that overflow.
    dilation = min(dilation, 2 * max(input.shape[2:]))
    if condition is not None:
        condition = condition.expand(input.shape[0], weight.shape[0], *input.shape[2:])
    if mask.requires_grad:
        mask = mask.detach()  # It has no gradient. Otherwise keep the object, under which _visible caches its taps.
    # The gate's gradient needs its input.
    keep = activation == "gated" and may_need_gradients(input, weight, bias, condition)
    return _masked_conv2d(input, weight, bias, mask, condition, dilation, activation or "none", keep)[0]


def masked_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor,
    dilation: int = 1,
    activation: str | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """:func:`masked_conv2d` as one plain convolution with the masked weight, arguments unchecked."""
    output = F.conv2d(input, weight * mask.to(weight.dtype), bias, padding="same", dilation=dilation)
    return _activate(output if condition is None else output + condition, activation)


def gated_activation(input: Tensor) -> Tensor:
    """Multiply tanh of the first half of the channels by sigmoid of the second: [B, 2C, ...] → [B, C, ...].

    The gate of the gated PixelCNN (van den Oord et al. 2016, arXiv 1606.05328, equation 2).
    """
    features, gate = input.chunk(2, dim=1)
    return torch.tanh(features) * torch.sigmoid(gate)


def _activate(output: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return torch.relu(output)
    return gated_activation(output) if activation == "gated" else output


def _check_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor,
    dilation: int,
    activation: str | None,
    condition: Tensor | None,
) -> None:
    check_image_and_weight(input, weight)
    check_dense("mask", mask)
    for name, tensor in (("bias", bias), ("condition", condition)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(tensor).__name__}")
        if tensor is not None:
            check_dense(name, tensor)
    weight_sizes = weight.shape
    if bias is not None and bias.shape != weight_sizes[:1]:
        raise ValueError(f"bias must have shape ({weight_sizes[0]},), got {tuple(bias.shape)}")
    if mask.shape != weight_sizes[2:] and mask.shape != weight_sizes:
        raise ValueError(
            f"mask must have shape {tuple(weight_sizes[2:])} or {tuple(weight_sizes)}, got {tuple(mask.shape)}"
        )
    if condition is not None:
        shape = (input.shape[0], weight.shape[0], *input.shape[2:])
        # Shapes that expand accepts: at most as many dimensions, each of the size or 1.
        aligned = zip(reversed(condition.shape), reversed(shape), strict=False)
        if condition.ndim > 4 or any(size not in (1, wanted) for size, wanted in aligned):
            raise ValueError(f"condition must broadcast to {shape}, got shape {tuple(condition.shape)}")
    if mask.device != input.device:
        raise ValueError(f"mask must be on the input's device {input.device}, got {mask.device}")
    check_beside_input(input, (("weight", weight), ("bias", bias), ("condition", condition)))
    _check_mask_values(mask)
    check_integer("dilation", dilation, 1)
    if activation not in _ACTIVATIONS:
        raise ValueError(f'activation must be None, "relu" or "gated", got {activation!r}')
    if activation == "gated" and weight.shape[0] % 2:
        raise ValueError(f"gated activation needs an even number of output channels, got {weight.shape[0]}")


def _check_mask_values(mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        return
    if mask.is_complex():
        raise TypeError(f"mask must be bool or real numbers, got {mask.dtype}")
    if not values_at_hand(mask):
        return
    if not bool((mask.eq(0) | mask.eq(1)).all()):
        raise ValueError("mask must be bool or hold only 0 and 1")


# --- The op: visible taps of a mask, and calls of the kernels ---


class _Visible(NamedTuple):
    """A mask as the kernels take it."""

    mask: Tensor  # bool, of the mask's shape
    taps: list[int] | None  # Indices i * kw + j of the taps that some channel sees, in order; None: unknown.


# Masks on devices where reading stalls the stream, by id: a weak reference, the version, the mask as bool (None: it is
# bool already) and its visible taps. A value must not hold a strong reference to its mask.
_looked_at: dict[int, tuple[weakref.ref[Tensor], int, Tensor | None, list[int]]] = {}


def _visible(mask: Tensor) -> _Visible:
    """Return a mask as the kernels take it; where reading it stalls a stream, do so only once for each version."""
    if mask.device.type == "cpu":
        return _Visible(mask if mask.dtype == torch.bool else mask.ne(0), None)
    key = id(mask)
    kept = _looked_at.get(key)
    if kept is not None and kept[0]() is mask and not mask.is_inference() and kept[1] == mask._version:
        return _Visible(mask if kept[2] is None else kept[2], kept[3])
    seen = mask if mask.dtype == torch.bool else mask.ne(0)
    if mask.is_inference() or (mask.is_cuda and torch.cuda.is_current_stream_capturing()):
        # CUDA's kernels, unlike the CPU's, read hidden weights as zeros whichever taps they are given.
        return _Visible(seen, list(range(mask.shape[-2:].numel())))
    taps = seen.reshape(-1, *seen.shape[-2:]).any(0).flatten().nonzero().flatten().tolist()
    mask_lives = weakref.ref(mask, lambda _: _looked_at.pop(key, None))
    _looked_at[key] = mask_lives, mask._version, None if seen is mask else seen, taps
    return _Visible(seen, taps)


class _Convolution(NamedTuple):
    """The op's arguments, those of :func:`masked_conv2d` after the checks."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    mask: Tensor
    condition: Tensor | None
    dilation: int
    activation: str  # "none", "relu" or "gated".
    keep: bool  # Whether to return the activation's input.


class _Results(NamedTuple):
    """Results. preactivation: the activation's input; if not kept, empty, or None in a call past the dispatcher."""

    output: Tensor
    preactivation: Tensor


class _Gradient(NamedTuple):
    """Arguments of the op's gradient. saved: the output of a ReLU, or the input of a gate."""

    grad: Tensor
    input: Tensor
    weight: Tensor
    mask: Tensor
    saved: Tensor | None
    dilation: int
    activation: str
    needs: list[bool]  # Whether the gradients of input, weight and bias are needed.


class _GradientResults(NamedTuple):
    """Gradients. preactivation: that in the activation's input, not needed where there is no activation.

    Those that are not needed are empty, or None in a call that bypasses the dispatcher.
    """

    preactivation: Tensor
    input: Tensor
    weight: Tensor
    bias: Tensor


def _empty_results(op: _Convolution) -> _Results:
    return _without_none(_needed_results(op), op.input)


def _needed_results(op: _Convolution) -> _Results:
    """Allocate the results; those that are not needed are None."""
    input, channels, size = op.input, op.weight.shape[0], op.input.shape[2:]
    preactivation: Any = empty_image(input, channels, size) if op.keep else None
    return _Results(empty_image(input, channels // 2 if op.activation == "gated" else channels, size), preactivation)


_Some = TypeVar("_Some", bound=tuple[Any, ...])


def _without_none(results: _Some, input: Tensor) -> _Some:
    """Replace None by empty tensors."""
    return type(results)(*(input.new_empty(0) if result is None else result for result in results))


def _kernel(op: _Convolution) -> _Results:
    return _without_none(_straight(op), op.input)


def _straight(op: _Convolution) -> _Results:
    """Run the kernel; results that are not needed are None."""
    results = output, preactivation = _needed_results(op)
    if output.numel() == 0:
        return results
    visible = _visible(op.mask)
    with_workspace(
        native.masked_conv2d,
        output,
        op.weight,
        visible.mask,
        channels_last(op.input),
        None if op.bias is None else op.bias.contiguous(),
        op.condition,
        output,
        preactivation,
        visible.taps,
        op.dilation,
        op.activation,
        tf32_allowed(op.input, "convolution"),
    )
    return results


def _reference_op(op: _Convolution) -> _Results:
    masked = op.weight * op.mask.to(op.weight.dtype)
    preactivation = F.conv2d(op.input, masked, op.bias, padding="same", dilation=op.dilation)
    if op.condition is not None:
        preactivation = preactivation + op.condition
    output = channels_last(_activate(preactivation, op.activation))
    # An op's results must not share memory.
    return _Results(output, channels_last(preactivation).clone() if op.keep else op.input.new_empty(0))


def _backward_reference(op: _Gradient) -> _GradientResults:
    needs_input, needs_weight, needs_bias = op.needs
    grad = _activation_grad(op.grad, op.saved, op.activation)
    grad_input = grad_weight = grad  # Placeholders, not used below where neither is needed.
    if needs_input or needs_weight:
        with torch.enable_grad():
            leaves = [op.input.detach().requires_grad_(), op.weight.detach().requires_grad_()]
            masked = leaves[1] * op.mask.to(op.weight.dtype)
            output = F.conv2d(leaves[0], masked, padding="same", dilation=op.dilation)
        grad_input, grad_weight = torch.autograd.grad(output, leaves, grad)
    return _GradientResults(
        preactivation=channels_last(grad).clone() if op.activation != "none" else grad.new_empty(0),
        input=channels_last(grad_input) if needs_input else grad.new_empty(0),
        weight=torch.empty_like(op.weight).copy_(grad_weight) if needs_weight else grad.new_empty(0),
        bias=grad.sum((0, 2, 3)) if needs_bias else grad.new_empty(0),
    )


def _activation_grad(grad: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    """Backpropagate through an activation to its input."""
    if saved is None:
        return grad
    if activation == "relu":
        return through_relu(grad, saved)
    features, gate = saved.chunk(2, dim=1)
    features, gate = torch.tanh(features), torch.sigmoid(gate)
    return torch.cat([grad * gate * (1 - features.square()), grad * features * gate * (1 - gate)], dim=1)


def _empty_gradients(op: _Gradient) -> _GradientResults:
    return _without_none(_needed_gradients(op), op.grad)


def _needed_gradients(op: _Gradient) -> _GradientResults:
    """Allocate the gradients; those that are not needed are None."""
    grad, weight, size = op.grad, op.weight, op.grad.shape[2:]
    needs_input, needs_weight, needs_bias = op.needs
    gradients: tuple[Any, ...] = (
        empty_image(grad, weight.shape[0], size) if op.activation != "none" else None,
        empty_image(grad, weight.shape[1], size) if needs_input else None,
        torch.empty_like(weight) if needs_weight else None,  # Laid out as the weight is.
        grad.new_empty(weight.shape[0]) if needs_bias else None,
    )
    return _GradientResults(*gradients)


def _backward_kernel(op: _Gradient) -> _GradientResults:
    return _without_none(_straight_backward(op), op.grad)


def _straight_backward(op: _Gradient) -> _GradientResults:
    """Run the gradient's kernel; gradients that are not needed are None."""
    results, weight = _needed_gradients(op), op.weight
    if op.grad.numel() == 0:
        for result in results:
            if result is not None:
                result.zero_()
        return results
    visible = _visible(op.mask)
    with_workspace(
        native.masked_conv2d_backward,
        op.grad,
        weight,
        visible.mask,
        channels_last(op.grad),
        channels_last(op.input) if op.needs[1] else None,
        op.saved,
        *results,
        visible.taps,
        op.dilation,
        op.activation,
        tf32_allowed(op.grad, "convolution"),
    )
    return results


def _setup_context(ctx: Any, op: _Convolution, results: _Results) -> None:
    output, preactivation = results
    saved = None if op.activation == "none" else output if op.activation == "relu" else preactivation
    ctx.save_for_backward(op.input, op.weight, op.mask, saved)
    ctx.dilation, ctx.activation, ctx.keep = op.dilation, op.activation, op.keep
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, kept: Sequence[Any], grad: Tensor | None, grad_preactivation: Tensor | None
) -> dict[str, Tensor | None]:
    if not ctx.keep:  # PyTorch 2.11 may pass a gradient of the empty tensor in its place.
        grad_preactivation = None
    if grad is None and grad_preactivation is None:
        return {}
    input, weight, mask, saved = kept
    needs_input, needs_weight, needs_bias, _, needs_condition, *_ = ctx.needs_input_grad
    # Only second derivatives have a gradient in the preactivation, or need the graph of this one.
    if grad is None or grad_preactivation is not None or torch.is_grad_enabled():
        with without_autocast(input.device):
            grad = _differentiable_activation_grad(grad, saved, ctx.activation, grad_preactivation)
            bare = _bare(ctx.dilation)
            grad_input, grad_weight = bare.derivatives(grad, input, weight, mask, needs_input, needs_weight)
            return {
                "input": grad_input,
                "weight": grad_weight,
                "bias": grad.sum((0, 2, 3)) if needs_bias else None,
                "condition": grad if needs_condition else None,
            }
    needs = [needs_input, needs_weight, needs_bias]
    gradient = _Gradient(grad, input, weight, mask, saved, ctx.dilation, ctx.activation, needs)
    of_preactivation, of_input, of_weight, of_bias = _masked_conv2d_backward(*gradient)
    of_condition = grad if ctx.activation == "none" else of_preactivation
    return {
        "input": of_input if needs_input else None,
        "weight": of_weight if needs_weight else None,
        "bias": of_bias if needs_bias else None,
        "condition": of_condition if needs_condition else None,
    }


def _differentiable_activation_grad(
    grad: Tensor | None, saved: Tensor | None, activation: str, more: Tensor | None
) -> Tensor:
    """Backpropagate to the activation's input in plain PyTorch; ``more``: its gradient from elsewhere, to be added."""
    if grad is None:
        assert more is not None
        return more
    compute = torch.promote_types(grad.dtype, torch.float32)
    inner = _activation_grad(grad.to(compute), None if saved is None else saved.to(compute), activation)
    return (inner if more is None else inner + more).to(grad.dtype)


def _bare(dilation: int) -> Bare:
    """Return the bare convolution of a dilation."""

    def convolve(input: Tensor, weight: Tensor, mask: Tensor | None) -> Tensor:
        output: Tensor = _masked_conv2d(input, weight, None, mask, None, dilation, "none", False)[0]
        return output

    def gradients(
        grad: Tensor, input: Tensor, weight: Tensor, mask: Tensor | None, needs: list[bool]
    ) -> tuple[Tensor, Tensor]:
        results = _masked_conv2d_backward(grad, input, weight, mask, None, dilation, "none", needs)
        return results[1], results[2]

    return Bare(convolve, gradients)


_masked_conv2d = register(
    "masked_conv2d",
    _Convolution,
    _Results,
    reference=_reference_op,
    kernel=_kernel,
    fake=_empty_results,
    direct=_straight,
    setup_context=_setup_context,
    backward=_backward,
)
_masked_conv2d_backward = register(
    "masked_conv2d_backward",
    _Gradient,
    _GradientResults,
    reference=_backward_reference,
    kernel=_backward_kernel,
    fake=_empty_gradients,
    direct=_straight_backward,
)


# --- One pixel at a time ---


class PixelConvolution:
    """A masked convolution with fixed weights that computes one pixel of a batch at a time, for sampling.

    A call costs the work of one pixel. Its result has the same bits as that of :func:`masked_conv2d` at that pixel,
    except where that computes pairs or squares of pixels. Weights are packed at the first call for a size of image:
    later changes of them do not count.

    Args:
        weight, bias, mask, dilation, activation: as of :func:`masked_conv2d`.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        mask: Tensor,
        dilation: int = 1,
        activation: str | None = None,
    ) -> None:
        # An empty image, for the checks of all other arguments; each call checks its own input.
        _check_arguments(weight.new_empty((0, weight.shape[1], 1, 1)), weight, bias, mask, dilation, activation, None)
        self.weight, self.bias = weight.detach(), None if bias is None else bias.detach().contiguous()
        self.mask, self.dilation, self.activation = mask, dilation, activation
        self._mask, taps = _visible(mask)
        self._taps = native.masked_conv2d_taps(self._mask) if taps is None else taps
        self._packed: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def __call__(self, input: Tensor, output: Tensor, position: Tensor, *, condition: Tensor | None = None) -> None:
        """Write ``output[:, :, row, col]``.

        Args:
            input: [B, C, H, W], dense and channels-last.
            output: [B, O, H, W], or [B, O / 2, H, W] where gated, channels-last; other pixels are left unchanged.
            position: [2] int64, the row and column, on the input's device.
            condition: broadcastable to [B, O, H, W]; added before the activation.
        """
        if condition is not None:
            condition = condition.expand(input.shape[0], self.weight.shape[0], *input.shape[2:])
        if input.device.type not in KERNEL_DEVICES:
            self._reference(input, output, position, condition)
            return
        # The kernel sees only the packed weight, whose shape and dtype it cannot check.
        if input.shape[1] != self.weight.shape[1] or input.dtype != self.weight.dtype:
            raise ValueError(
                f"input must be [B, {self.weight.shape[1]}, H, W] of {self.weight.dtype}, "
                f"got shape {tuple(input.shape)} of {input.dtype}"
            )
        size = tuple(input.shape[2:])
        if size not in self._packed:
            packing = {
                "weight": self.weight,
                "mask": self._mask,
                "taps": self._taps,
                "dilation": self.dilation,
                "height": size[0],
                "width": size[1],
                "gated": self.activation == "gated",
            }
            packed = input.new_empty(native.masked_conv2d_packed_bytes(**packing), dtype=torch.uint8)
            native.masked_conv2d_pack(**packing, packed=packed)
            self._packed[size] = packed
        outputs, _, kh, kw = self.weight.shape
        native.masked_conv2d_packed(
            input=input,
            packed=self._packed[size],
            bias=self.bias,
            condition=condition,
            position=position,
            output=output,
            outputs=outputs,
            taps=self._taps,
            kh=kh,
            kw=kw,
            dilation=self.dilation,
            activation=self.activation or "none",
            tf32=tf32_allowed(input, "convolution"),
        )

    def _reference(self, input: Tensor, output: Tensor, position: Tensor, condition: Tensor | None) -> None:
        kh, kw = self.weight.shape[2:]
        rows, cols = (
            at + torch.arange(size, device=input.device) * self.dilation - self.dilation * (size - 1) // 2
            for at, size in zip(position, (kh, kw), strict=True)
        )
        inside = ((rows >= 0) & (rows < input.shape[2]))[:, None] & ((cols >= 0) & (cols < input.shape[3]))
        seen = input[:, :, rows.clamp(0, input.shape[2] - 1)][..., cols.clamp(0, input.shape[3] - 1)]
        seen = torch.where(inside, seen, 0)  # A product would let NaN through.
        pixel = F.conv2d(seen, self.weight * self.mask.to(self.weight.dtype), self.bias)
        if condition is not None:
            pixel = pixel + condition[:, :, position[0], position[1]][..., None, None]
        output[:, :, position[0], position[1]] = _activate(pixel, self.activation)[..., 0, 0]
