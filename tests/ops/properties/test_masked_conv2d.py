"""masked_conv2d on arguments that Hypothesis makes up; conftest.py tells how."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from cpc_ext.ops import masked_conv2d
from tests.ops.properties.conftest import *


@dataclass(frozen=True)
class Convolution:
    """Arguments of masked_conv2d, tensors as layouts."""

    dtype: torch.dtype
    input: Layout
    weight: Layout
    bias: Layout | None
    mask: Layout
    mask_dtype: torch.dtype
    mask_kind: str
    dilation: int
    activation: str | None
    grad: Layout


@st.composite
def convolutions(draw) -> Convolution:
    batch, channels, out_channels = (
        draw(st.sampled_from([1, 2, 3, 0])),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
    )
    size, kernel = ((draw(st.integers(1, most)), draw(st.integers(1, most))) for most in (6, 5))
    activation = draw(st.sampled_from([None, "relu", "gated"]))
    if activation == "gated":
        out_channels = 2 * ((out_channels + 1) // 2)
    weight = (out_channels, channels, *kernel)
    return Convolution(
        dtype=draw(st.sampled_from(FLOATING)),
        input=draw(layouts((batch, channels, *size))),
        weight=draw(layouts(weight)),
        bias=draw(st.none() | layouts((out_channels,))),
        mask=draw(layouts(draw(st.sampled_from([kernel, weight])))),
        mask_dtype=draw(st.sampled_from([torch.bool, torch.int64, torch.uint8, *FLOATING])),
        mask_kind=draw(st.sampled_from(["random", "sparse", "one", "zero"])),
        dilation=draw(st.integers(1, 3) | st.integers(1, 9) | st.sampled_from([*HUGE, 2**63, 2**70])),
        activation=activation,
        grad=draw(layouts((batch, out_channels // 2 if activation == "gated" else out_channels, *size))),
    )


def tap_by_tap(input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, dilation: int) -> Tensor:
    """The convolution as a sum over taps of shifted inputs."""
    batch, _, height, width = input.shape
    # Zeros that depend on the arguments, so that there is a gradient where no tap reaches.
    output = input.new_zeros(batch, weight.shape[0], height, width) + 0 * (input.sum() + weight.sum())
    if bias is not None:
        output = output + bias.view(-1, 1, 1)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            dy = dilation * i - dilation * (weight.shape[2] - 1) // 2
            dx = dilation * j - dilation * (weight.shape[3] - 1) // 2
            if abs(dy) >= height or abs(dx) >= width:
                continue
            seen = input[:, :, max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)]
            shifted = torch.nn.functional.pad(seen, (max(-dx, 0), max(dx, 0), max(-dy, 0), max(dy, 0)))
            output = output + torch.einsum("bchw,oc->bohw", shifted, weight[:, :, i, j] * mask[..., i, j])
    return output


def activated(output: Tensor, activation: str | None) -> Tensor:
    if activation == "gated":
        features, gate = output.split(output.shape[1] // 2, dim=1)
        return features.tanh() * gate.sigmoid()
    return output.clamp(min=0) if activation == "relu" else output


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_masked_convolutions_and_their_gradients_are_sums_over_taps(device, for_examples):
    shares = {"random": 0.5, "sparse": 0.9, "one": 0.0, "zero": 1.0}

    @for_examples(case=convolutions())
    def holds(case: Convolution):
        names = ["input", "weight", "bias"] if case.bias is not None else ["input", "weight"]
        placed, plain = {}, {}
        for name in names:
            tensor, dense = getattr(case, name).place(device, case.dtype, normal)
            placed[name], plain[name] = tensor.detach().requires_grad_(), dense.double().requires_grad_()
        hidden = shares[case.mask_kind]
        mask, dense_mask = case.mask.place(
            device, case.mask_dtype, lambda n, generator: torch.rand(n, generator=generator) >= hidden
        )
        plain = {"bias": None} | plain | {"mask": dense_mask.double(), "dilation": case.dilation}

        actual = masked_conv2d(**placed, mask=mask, dilation=case.dilation, activation=case.activation)
        before = tap_by_tap(**plain)
        expected = activated(before, case.activation)
        assert actual.dtype == case.dtype
        if not expected.numel():
            assert actual.shape == expected.shape
            actual.sum().backward()
            return
        # The terms of a sum may cancel; their absolute values tell what is rounded.
        absolute = {
            name: value.detach().abs().requires_grad_() if isinstance(value, Tensor) else value
            for name, value in plain.items()
        }
        terms = tap_by_tap(**absolute)
        bound = TOLERANCE[case.dtype] * (1 + terms.detach().max())
        assert_within(actual, expected, bound)

        grad, dense_grad = case.grad.place(device, case.dtype, normal)
        dense_grad = dense_grad.double()
        if case.activation == "relu":
            # Where rounding may change the sign, the slope may be 0 or 1.
            clear = before.detach().abs() > bound
            grad, dense_grad = grad * clear.to(device), dense_grad * clear
        actual = torch.autograd.grad(actual, list(placed.values()), grad)
        expected = torch.autograd.grad(expected, [plain[name] for name in names], dense_grad)
        # The slopes of the activations are at most one, and so are theirs.
        outer = dense_grad.abs() if case.activation != "gated" else dense_grad.abs().repeat(1, 2, 1, 1)
        terms_grads = torch.autograd.grad(terms, [absolute[name] for name in names], outer)
        for one, other, terms_grad in zip(actual, expected, terms_grads, strict=True):
            assert_within(one, other, 2 * (TOLERANCE[case.dtype] + bound) * (1 + terms_grad.max()))


WRONG_CONVOLUTION_ARGUMENTS = {
    "input": st.none()
    | NOT_TENSORS
    | other_layouts((2, 3, 4, 5), torch.float32)
    | st.sampled_from([torch.zeros(2, 3, 0, 5), torch.zeros(0, 3, 4, 0)])
    | tensors(
        (2, 3, 4, 5),
        torch.float32,
        [*NOT_FLOATING, torch.float8_e4m3fn],
        fits=lambda shape: len(shape) == 4,
        leads=True,
    ),
    "weight": st.none()
    | NOT_TENSORS
    | other_layouts((4, 3, 3, 3), torch.float32)
    | tensors(
        (4, 3, 3, 3),
        torch.float32,
        [*NOT_FLOATING, torch.float8_e4m3fn, *FLOATING[1:]],
        fits=lambda shape: len(shape) == 4 and shape[1] == 3 and 0 not in shape,
    ),
    "bias": NOT_TENSORS
    | other_layouts((4,), torch.float32)
    | tensors((4,), torch.float32, [*NOT_FLOATING, torch.float8_e4m3fn, *FLOATING[1:]]),
    "mask": st.none()
    | NOT_TENSORS
    | other_layouts((3, 3), torch.int64)
    | tensors(
        (3, 3),
        torch.float32,
        [torch.complex64, torch.complex128],
        fits=lambda shape: shape in ((3, 3), (4, 3, 3, 3)),
    ),
    "condition": NOT_TENSORS
    | other_layouts((2, 4, 4, 5), torch.float32)
    | tensors(
        (2, 4, 4, 5),
        torch.float32,
        [*NOT_FLOATING, torch.float8_e4m3fn, *FLOATING[1:]],
        fits=lambda shape: (
            len(shape) <= 4 and all(n in (1, m) for n, m in zip(shape[::-1], (5, 4, 4, 2), strict=False))
        ),
    ),
    "dilation": st.none() | NOT_NUMBERS | st.sampled_from([0, -1, -(2**70), 1.0, math.nan, True]),
    "activation": st.sampled_from(["", "tanh", "RELU", 1, True, [], {}, torch.zeros(3), object()]),
}


def test_wrong_arguments_of_masked_conv2d(device, for_examples):
    @for_examples(wrong=some_wrong(WRONG_CONVOLUTION_ARGUMENTS))
    def holds(wrong):
        arguments = {
            "input": torch.zeros(2, 3, 4, 5),
            "weight": torch.zeros(4, 3, 3, 3),
            "bias": torch.zeros(4),
            "mask": torch.ones(3, 3),
        }
        with refused(*wrong):
            masked_conv2d(**{name: on(device, value) for name, value in (arguments | wrong).items()})


def test_masks_hold_zeros_and_ones(for_examples):
    @for_examples(value=st.floats() | st.integers(-3, 3), at=st.integers(0, 8))
    def holds(value, at):
        mask = torch.ones(3, 3, dtype=torch.float64)
        mask.view(-1)[at] = value
        input, weight = torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3)
        if value in (0, 1):
            assert masked_conv2d(input, weight, mask=mask)[0, 0, 1, 1] == 8 + value
        else:
            with pytest.raises(ValueError, match="mask must be bool or hold only 0 and 1"):
                masked_conv2d(input, weight, mask=mask)


@pytest.mark.parametrize("dtype", FLOATING)
def test_autocast_brings_the_arguments_of_masked_conv2d_to_one_dtype(device, dtype):
    input, weight = torch.ones(1, 1, 3, 3, dtype=dtype, device=device), torch.ones(1, 1, 3, 3, device=device)
    mask = torch.ones(3, 3, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        if dtype == torch.float64:
            with pytest.raises(TypeError, match="weight must have the input's dtype"):
                masked_conv2d(input, weight, mask=mask)
        else:
            assert masked_conv2d(input, weight, mask=mask)[0, 0, 1, 1] == 9
