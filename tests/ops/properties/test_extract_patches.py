"""extract_patches on arguments that Hypothesis makes up; conftest.py tells how."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from cpc_ext.ops import extract_patches
from cpc_ext.ops._patch_options import PatchOptions
from cpc_ext.ops.extract_patches import extract_patches_reference
from tests.ops.properties.conftest import *


@dataclass(frozen=True)
class Patches:
    """Arguments of extract_patches, tensors as layouts."""

    images: Layout
    dtype: torch.dtype
    patch_size: int
    stride: int
    crop: tuple[int, int] | None
    offsets: Layout | None
    offsets_dtype: torch.dtype
    flip: Layout | None
    options: dict[str, Any]
    grad: Layout

    def window(self) -> tuple[int, int]:
        return self.crop or self.images.shape[2:]


def grid(window: tuple[int, int], patch_size: int, stride: int) -> tuple[int, int]:
    rows, cols = ((side - patch_size) // stride + 1 for side in window)
    return rows, cols


@st.composite
def patch_cases(draw) -> Patches:
    """Right arguments whose patches have some thousand pixels at most."""
    batch, gray = draw(st.sampled_from([1, 2, 3, 0])), draw(st.booleans())
    channels = draw(st.sampled_from([1, 3]) if gray else st.integers(1, 5))
    size = draw(st.integers(1, 24)), draw(st.integers(1, 40))
    crop = draw(st.none() | st.tuples(*(st.integers(1, side) for side in size)))
    window = crop or size
    patch_size = draw(st.integers(1, min(*window, 20)) | st.just(min(window)))
    smallest = 1
    while math.prod(grid(window, patch_size, smallest)) * patch_size**2 * batch * channels > 8192 and smallest < 40:
        smallest += 1
    stride = draw(st.integers(smallest, max(window) + smallest) | st.sampled_from(HUGE))
    out_channels = 1 if gray else channels

    def per_channel(low: float, high: float) -> st.SearchStrategy:
        return st.none() | st.lists(st.floats(low, high), min_size=out_channels, max_size=out_channels)

    rows, cols = grid(window, patch_size, stride)
    return Patches(
        images=draw(layouts((batch, channels, *size))),
        dtype=draw(st.sampled_from([torch.uint8, *FLOATING])),
        patch_size=patch_size,
        stride=stride,
        crop=crop,
        offsets=draw(st.none() | layouts((batch, 2))) if crop else None,
        offsets_dtype=draw(st.sampled_from(INTEGERS)),
        flip=draw(st.none() | layouts((batch,))),
        options={
            "gray": gray,
            "mean": draw(per_channel(-1, 1)),
            "std": draw(per_channel(0.1, 2)),
            "patch_norm": draw(st.booleans()),
            "dtype": draw(st.none() | st.sampled_from(FLOATING)),
            "channels_last": draw(st.booleans()),
        },
        grad=draw(layouts((batch, rows, cols, out_channels, patch_size, patch_size))),
    )


def patches_reference(images: Tensor, patch_size, stride, *, crop=None, offsets=None, flip=None, options) -> Tensor:
    """The oracle on dense images, in float64."""
    pixels = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    height, width = crop or images.shape[2:]
    # PyTorch's unfold cannot take strides as large as the kernels'; beyond the window they are all alike.
    stride = min(stride, height + width)
    options = options | {"dtype": torch.float64, "channels_last": False}
    return extract_patches_reference(pixels, PatchOptions(patch_size, stride, height, width, offsets, flip, **options))


def test_patches_and_their_gradients_are_the_references(device, for_examples):
    @for_examples(case=patch_cases())
    def holds(case: Patches):
        make = integers_below(256) if case.dtype == torch.uint8 else normal
        images, dense = case.images.place(device, case.dtype, make)
        placed, plain = {"crop": case.crop}, {"crop": case.crop}
        if case.offsets is not None:
            free = min(side - taken for side, taken in zip(case.images.shape[2:], case.crop, strict=True))
            placed["offsets"], plain["offsets"] = case.offsets.place(
                device, case.offsets_dtype, integers_below(free + 1)
            )
            plain["offsets"] = plain["offsets"].to(torch.int64)
        if case.flip is not None:
            placed["flip"], plain["flip"] = case.flip.place(device, torch.bool, integers_below(2))
        if case.dtype.is_floating_point:
            images, dense = images.detach().requires_grad_(), dense.double().requires_grad_()

        actual = extract_patches(images, case.patch_size, case.stride, **placed, **case.options)
        expected = patches_reference(dense, case.patch_size, case.stride, **plain, options=case.options)
        out_dtype = case.options["dtype"] or (case.dtype if case.dtype != torch.uint8 else torch.get_default_dtype())
        assert actual.dtype == out_dtype
        memory_order = (0, 1, 2, 4, 5, 3) if case.options["channels_last"] else (0, 1, 2, 3, 4, 5)
        assert actual.permute(memory_order).is_contiguous()
        # Pixels of up to 5 and mean over the least std, over the least contrast, set the size of what is rounded.
        least_std = min(case.options["std"] or [1.0])
        amplified = 6 / least_std * (10 if case.options["patch_norm"] else 1)
        arithmetic = TOLERANCE[torch.float64 if torch.float64 in (case.dtype, out_dtype) else torch.float32]
        assert_within(actual, expected, TOLERANCE[out_dtype] * (1 + expected.detach().abs()) + arithmetic * amplified)

        if case.dtype.is_floating_point:
            grad, dense_grad = case.grad.place(device, out_dtype, normal)
            (actual,) = torch.autograd.grad(actual, images, grad)
            (expected,) = torch.autograd.grad(expected, dense, dense_grad.double())
            assert actual.dtype == case.dtype
            # Sums over patches may cancel: what is rounded may be larger than what is left. A contrast known to
            # float32 only is also that inexact in the gradient.
            rounded = expected.abs().max().clamp(min=1) if expected.numel() else 1
            bound = TOLERANCE[case.dtype] * (1 + expected.abs()) + arithmetic * amplified**2 * 4 * rounded
            assert_within(actual, expected, bound)


@st.composite
def windows(draw) -> dict[str, Any]:
    """Shape of the images, patch_size, stride, crop and offsets: fitting ones, of which up to two are then replaced."""
    any_integer = st.integers(-2, 12) | st.sampled_from([-(2**63), 2**63, 2**70, *HUGE])
    batch, channels = draw(st.sampled_from([1, 2, 0])), draw(st.integers(1, 3))
    size = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
    crop = draw(st.none() | st.tuples(*(st.integers(1, side) for side in size)))
    free = [side - taken for side, taken in zip(size, crop or size, strict=True)]
    offset = st.tuples(*(st.integers(0, most) for most in free))
    arguments = {
        "shape": (batch, channels, *size),
        "patch_size": draw(st.integers(1, min(crop or size))),
        "stride": draw(st.integers(1, 9)),
        "crop": crop,
        "offsets": draw(st.none() | st.lists(offset, min_size=batch, max_size=batch)) if crop else None,
    }
    wrong = {
        "shape": st.tuples(st.just(batch), st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)),
        "patch_size": any_integer,
        "stride": any_integer,
        "crop": st.none() | st.tuples(any_integer, any_integer),
        "offsets": st.lists(
            st.tuples(*2 * [st.integers(-2, 9) | st.sampled_from([2**31, 2**62, -(2**63)])]),
            min_size=batch,
            max_size=batch,
        ),
    }
    for name in draw(st.lists(st.sampled_from(sorted(wrong)), max_size=2, unique=True)):
        arguments[name] = draw(wrong[name])
    return arguments


def test_windows_are_cut_or_refused(device, for_examples):
    """Any integers as sizes and places: the reference's patches where they name some, else a ValueError."""

    @for_examples(window=windows(), dtype=st.sampled_from([torch.uint8, torch.float32]))
    def holds(window, dtype):
        shape, patch_size, stride, crop, offsets = window.values()
        images = integers_below(256)(math.prod(shape), torch.Generator().manual_seed(0)).to(dtype).view(shape)
        if offsets is not None:
            offsets = torch.tensor(offsets, dtype=torch.int64).view(shape[0], 2)
        size = crop or shape[2:]
        right = (
            shape[1] > 0
            and 1 <= patch_size <= min(size)
            and stride >= 1
            and all(taken <= side for taken, side in zip(size, shape[2:], strict=True))
            and (offsets is None or crop is not None)
        )
        if right and offsets is not None and device.type == "cpu":
            limits = torch.tensor([side - taken for side, taken in zip(shape[2:], size, strict=True)])
            right = bool(((offsets >= 0) & (offsets <= limits)).all())

        def cut():
            return extract_patches(images.to(device), patch_size, stride, crop=crop, offsets=on(device, offsets))

        if right:
            expected = patches_reference(images, patch_size, stride, crop=crop, offsets=offsets, options={})
            assert_within(cut(), expected, 2e-6 * (1 + expected.abs()))
        else:
            with pytest.raises(ValueError, match=r"must|give crop"):
                cut()


def test_pixels_are_cast_as_pytorch_casts(device, for_examples):
    """Infinities, NaN, subnormal numbers and ties of rounding."""

    @for_examples(
        # Via 32 bits, since PyTorch rounds doubles to 16 bits in two steps.
        values=st.lists(st.floats(width=32) | st.floats(width=16), min_size=1, max_size=40),
        dtype=st.sampled_from(FLOATING),
        out_dtype=st.sampled_from(FLOATING),
        channels_last=st.booleans(),
        flip=st.booleans(),
    )
    def holds(values, dtype, out_dtype, channels_last, flip):
        pixels = torch.tensor(values, dtype=torch.float64).to(dtype).view(1, 1, 1, -1)
        patches = extract_patches(
            pixels.to(device),
            1,
            1,
            dtype=out_dtype,
            channels_last=channels_last,
            flip=torch.tensor([flip], device=device),
        )
        expected = (pixels.flip(-1) if flip else pixels).to(out_dtype)
        torch.testing.assert_close(patches.cpu().flatten(), expected.flatten(), rtol=0, atol=0, equal_nan=True)


def right_patch_arguments(device: torch.device) -> dict[str, Any]:
    return {
        "images": torch.zeros(2, 3, 6, 7, device=device),
        "patch_size": 3,
        "stride": 2,
        "crop": (5, 5),
        "offsets": torch.zeros(2, 2, dtype=torch.int64, device=device),
        "flip": torch.zeros(2, dtype=torch.bool, device=device),
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
    }


NOT_STEPS = NOT_NUMBERS.filter(lambda value: not isinstance(value, Tensor | np.ndarray))
WRONG_PATCH_ARGUMENTS = {
    "images": st.none()
    | NOT_TENSORS
    | tensors(
        (2, 3, 6, 7),
        torch.float32,
        [*NOT_FLOATING, torch.int8, torch.float8_e4m3fn],
        fits=lambda shape: len(shape) == 4,
        leads=True,
    ),
    "patch_size": st.none() | NOT_STEPS,
    "stride": st.none() | NOT_STEPS,
    "crop": st.sampled_from([5, "ab", (), (5,), (5, 5, 5), (5, "5"), (None, 5), (7, 7), (6, 8), (-1, 5), (5, 0)]),
    "offsets": NOT_TENSORS | tensors((2, 2), torch.int64, NOT_INDICES),
    "flip": NOT_TENSORS | tensors((2,), torch.bool, [*INTEGERS, torch.float32, torch.complex64]),
    "mean": st.sampled_from([0.5, "abc", "abcd", [], [0.5], [0.5] * 4, [None] * 3, [1j] * 3, [[0.5]] * 3, object()]),
    "std": st.sampled_from([0.5, [], [1.0] * 2, [1.0, 0.0, 1.0], [-1.0] * 3, [math.nan] * 3, [-math.inf] * 3, "abc"]),
    "dtype": st.sampled_from(["float32", 3, float, np.float32, [], torch.uint8, torch.float8_e4m3fn, *NOT_FLOATING]),
}


def extract_with(device: torch.device, wrong: dict[str, Any]) -> None:
    arguments = right_patch_arguments(device) | {name: on(device, value) for name, value in wrong.items()}
    images, patch_size, stride = (arguments.pop(name) for name in ("images", "patch_size", "stride"))
    with refused(*wrong):
        extract_patches(images, patch_size, stride, **arguments)


def test_wrong_arguments_of_extract_patches(device, for_examples):
    @for_examples(wrong=some_wrong(WRONG_PATCH_ARGUMENTS))
    def holds(wrong):
        extract_with(device, wrong)


BOOLS = ["gray", "patch_norm", "channels_last"]
SPARSE_IMAGES = torch.zeros(2, 3, 6, 7).to_sparse()


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: value} for name in ("patch_size", "stride") for value in (2.0, 2.5, math.nan)),
        {"crop": (math.nan, 5)},
        *({"mean": None, "std": None, name: value} for name in BOOLS for value in ("yes", [])),
        {"mean": [ENORMOUS] * 3},
        {"std": [ENORMOUS] * 3},
        {"images": SPARSE_IMAGES},
        {"offsets": torch.zeros(2, 2, dtype=torch.int64).to_sparse()},
        {"flip": torch.zeros(2, dtype=torch.bool).to_sparse()},
    ],
    ids=lambda wrong: "-".join(f"{name}-{str(value)[:12]}" for name, value in wrong.items()),
)
def test_arguments_that_extract_patches_refuses(device, wrong):
    extract_with(device, wrong)


def test_strides_beyond_64_bits(device):
    patches = extract_patches(torch.ones(1, 1, 4, 4, device=device), 2, 2**63)
    assert patches.shape == (1, 1, 1, 1, 2, 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_derivatives_that_extract_patches_lacks_are_refused(device):
    images = torch.rand(1, 1, 4, 4, dtype=torch.float64, device=device)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: extract_patches(x, 2, 2), (images,), (torch.ones_like(images),))
