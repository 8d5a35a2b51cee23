"""Masked (PixelCNN) convolution: some taps are hidden, so that no output sees what it is to predict.

From input [B, C, H, W] and weight [O, C, kh, kw] to [B, O, H, W] at stride 1 with zero padding, with an optional ReLU
or tanh-sigmoid gate. Rows and columns of taps that the mask hides throughout are cut off the kernel instead of being
multiplied by zero: a 3x3 kernel that sees no row below costs what a 2x3 kernel costs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gated_activation", "masked_conv2d", "masked_conv2d_reference"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_ACTIVATIONS = (None, "relu", "gated")


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor,
    dilation: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Convolve with the taps that a mask leaves visible (van den Oord et al. 2016, arXiv 1601.06759).

    Equals ``F.conv2d(input, weight * mask, bias, padding="same", dilation=dilation)`` followed by the activation. A
    kernel of even side k looks k / 2 - 1 taps back and k / 2 ahead, as PyTorch pads it.

    Args:
        input: [B, C, H, W], floating; B may be 0.
        weight: [O, C, kh, kw], of the input's dtype unless autocast brings both to one.
        bias: [O], likewise, or None.
        mask: [kh, kw] for all channels alike, or [O, C, kh, kw]; bool, or numbers 0 and 1. True keeps a tap.
        dilation: distance of neighbouring taps in pixels.
        activation: None, "relu", or "gated": tanh of the first half of the output channels times sigmoid of the
            second half, which leaves O / 2 channels (van den Oord et al. 2016, arXiv 1606.05328, equation 2).

    Returns:
        [B, O, H, W], or [B, O / 2, H, W] where gated.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, device or range. Only the CPU looks for numbers in
            the mask that are neither 0 nor 1, since looking would stall another device's stream.
    """
    _check_arguments(input, weight, bias, mask, dilation, activation)
    # Farther apart, all taps but a middle one see only padding: the same result, without sizes that overflow.
    dilation = min(dilation, 2 * max(input.shape[2:]))
    window = _visible_window(mask, input.shape[2:], dilation)
    if window is None:
        return masked_conv2d_reference(input, weight, bias, mask=mask, dilation=dilation, activation=activation)
    rows, cols = window
    top, bottom = _padding(weight.shape[2], rows, dilation)
    left, right = _padding(weight.shape[3], cols, dilation)
    weight, mask = weight[..., rows, cols], mask[..., rows, cols]
    if not bool(mask.all()):
        weight = weight * mask.to(weight.dtype)
    if top == bottom and left == right and min(top, left) >= 0:
        output = F.conv2d(input, weight, bias, padding=(top, left), dilation=dilation)
    else:
        output = F.conv2d(F.pad(input, (left, right, top, bottom)), weight, bias, dilation=dilation)
    return _activate(output, activation)


def masked_conv2d_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor,
    dilation: int = 1,
    activation: str | None = None,
) -> Tensor:
    """:func:`masked_conv2d` as one plain convolution with the masked weight, arguments unchecked."""
    output = F.conv2d(input, weight * mask.to(weight.dtype), bias, padding="same", dilation=dilation)
    return _activate(output, activation)


def gated_activation(input: Tensor) -> Tensor:
    """tanh of the first half of the channels times sigmoid of the second: [B, 2C, ...] → [B, C, ...].

    The gate of the gated PixelCNN (van den Oord et al. 2016, arXiv 1606.05328, equation 2).
    """
    features, gate = input.chunk(2, dim=1)
    return torch.tanh(features) * torch.sigmoid(gate)


def _activate(output: Tensor, activation: str | None) -> Tensor:
    if activation == "relu":
        return torch.relu(output)
    return gated_activation(output) if activation == "gated" else output


def _visible_window(mask: Tensor, size: tuple[int, int], dilation: int) -> tuple[slice, slice] | None:
    """The rows and columns that hold every tap which is visible and reaches an input of ``size``.

    None where there are none or looking is costly.
    """
    if mask.device.type != "cpu":
        return None  # reading the mask would stall the stream
    taps = mask.ne(0).reshape(-1, *mask.shape[-2:]).any(0)
    window = []
    for visible, length in zip((taps.any(1).tolist(), taps.any(0).tolist()), size, strict=True):
        before = _before(len(visible), dilation)
        kept = [tap for tap, seen in enumerate(visible) if seen and abs(tap * dilation - before) < length]
        if not kept:
            return None
        window.append(slice(kept[0], kept[-1] + 1))
    return window[0], window[1]


def _before(size: int, dilation: int) -> int:
    """How far before the output's pixel the first of ``size`` taps looks."""
    return dilation * (size - 1) // 2


def _padding(size: int, window: slice, dilation: int) -> tuple[int, int]:
    """Padding before and after the input for the taps in ``window`` of ``size``; negative values crop."""
    before = _before(size, dilation)
    after = dilation * (size - 1) - before
    return before - dilation * window.start, after - dilation * (size - window.stop)


def _check_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, dilation: int, activation: str | None
) -> None:
    for name, value in (("input", input), ("weight", weight), ("mask", mask)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if bias is not None and not isinstance(bias, Tensor):
        raise TypeError(f"bias must be a tensor or None, got {type(bias).__name__}")
    for name, value in (("input", input), ("weight", weight), ("bias", bias), ("mask", mask)):
        if value is not None and (value.layout != torch.strided or value.is_nested):
            raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    for name, value in (("input", input), ("weight", weight)):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be floating, got {value.dtype}")
        if value.ndim != 4:
            expected = "[B, C, H, W]" if name == "input" else "[O, C, kh, kw]"
            raise ValueError(f"{name} must be {expected}, got shape {tuple(value.shape)}")
    if 0 in input.shape[2:]:
        raise ValueError(f"input must have at least one row and column, got shape {tuple(input.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"weight must not be empty, got shape {tuple(weight.shape)}")
    if input.shape[1] != weight.shape[1]:
        raise ValueError(f"input must have the weight's {weight.shape[1]} channels, got {input.shape[1]}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    if mask.shape not in (weight.shape[2:], weight.shape):
        raise ValueError(
            f"mask must have shape {tuple(weight.shape[2:])} or {tuple(weight.shape)}, got {tuple(mask.shape)}"
        )
    for name, value in (("weight", weight), ("bias", bias), ("mask", mask)):
        if value is not None and value.device != input.device:
            raise ValueError(f"{name} must be on the input's device {input.device}, got {value.device}")
    _check_dtypes(input, weight, bias)
    _check_mask_values(mask)
    if isinstance(dilation, bool) or not isinstance(dilation, int):
        raise TypeError(f"dilation must be an int, got {type(dilation).__name__}")
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    if activation not in _ACTIVATIONS:
        raise ValueError(f'activation must be None, "relu" or "gated", got {activation!r}')
    if activation == "gated" and weight.shape[0] % 2:
        raise ValueError(f"gated activation needs an even number of output channels, got {weight.shape[0]}")


def _check_dtypes(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if input.dtype not in _DTYPES:
        raise TypeError(f"input must have one of the dtypes {_DTYPES}, got {input.dtype}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is None or value.dtype == input.dtype:
            continue
        dtypes = {value.dtype, input.dtype}
        # Autocast brings all but float64 to its own type.
        if torch.float64 in dtypes or not dtypes.issubset(_DTYPES) or not torch.is_autocast_enabled(input.device.type):
            raise TypeError(f"{name} must have the input's dtype {input.dtype}, got {value.dtype}")


def _check_mask_values(mask: Tensor) -> None:
    if mask.dtype == torch.bool:
        return
    if mask.is_complex():
        raise TypeError(f"mask must be bool or real numbers, got {mask.dtype}")
    if mask.device.type == "cpu" and not bool((mask.eq(0) | mask.eq(1)).all()):
        raise ValueError("mask must be bool or hold only 0 and 1")
