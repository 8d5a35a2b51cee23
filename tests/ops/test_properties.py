"""Every op on arguments that Hypothesis makes up: shapes, strides, types, values and nonsense.

The result is that of a plain formulation in float64, or the documented error; never another one, a crash or a wrong
result. Hypothesis shrinks what fails to a small example; examples are the same on every run.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpc_ext.ops import (
    AugmentationPlan,
    Transform,
    augment_patches,
    extract_patches,
    info_nce,
    logistic_mixture_nll,
    masked_conv2d,
    sample_logistic_mixture,
)
from cpc_ext.ops.augment_patches import augment_patches_reference
from cpc_ext.ops.extract_patches import extract_patches_reference
from cpc_ext.ops.logistic_mixture import logistic_mixture_nll_reference, sample_logistic_mixture_reference

# Examples a test, by device as tests/conftest.py names them.
EXAMPLES = {"cpu": 200, "emulated": 20, "cuda": 100}

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
# Of a result of order one: some roundings to its type, or of float32 arithmetic.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
# Around what 32 and 64 bits hold.
HUGE = [2**31 - 1, 2**31, 2**32, 2**40, 2**62, 2**63 - 1]


@pytest.fixture
def for_examples(request: pytest.FixtureRequest) -> Callable:
    """Runs the decorated function, at once, on examples drawn from the strategies, as many as suit the device."""
    device = request.node.callspec.params["device"] if "device" in request.fixturenames else "cpu"
    examples = settings(
        max_examples=EXAMPLES[device],
        deadline=None,
        derandomize=True,
        # Drawing is slow where other jobs share the machine, which says nothing about the strategies.
        suppress_health_check=[HealthCheck.too_slow],
    )

    def decorator(**strategies: st.SearchStrategy) -> Callable:
        return lambda holds: examples(given(**strategies)(holds))()

    return decorator


# --- Tensors of any strides ---


@dataclass(frozen=True)
class Layout:
    """How the elements of a tensor lie in memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    seed: int
    negated: bool  # Holds the negatives of its elements, to be negated when read.

    def place(self, device: torch.device, dtype: torch.dtype, make: Callable) -> tuple[Tensor, Tensor]:
        """A tensor of this layout on the device, and the same elements densely on the CPU.

        ``make(n, generator)`` gives the elements. The memory around and between them holds nonsense, which spoils a
        result that it finds its way into.
        """
        at = torch.full(self.shape, self.offset, dtype=torch.int64)
        for dim, (size, stride) in enumerate(zip(self.shape, self.strides, strict=True)):
            steps = torch.arange(size) * (stride if size > 1 else 0)
            at = at + steps.view(-1, *[1] * (len(self.shape) - dim - 1))
        length = int(at.max()) + 3 if at.numel() else 3
        memory = make(length, torch.Generator().manual_seed(self.seed))
        between = torch.ones(length, dtype=torch.bool).index_fill_(0, at.flatten(), False)
        memory = torch.where(between, torch.nan if dtype.is_floating_point else 119, memory).to(dtype)
        strides, offset = self.strides, self.offset
        if self.negated and dtype in (torch.float32, torch.float64):
            stored = torch.complex(memory, -memory).to(device).conj().imag
            strides, offset = [2 * min(stride, 2**61) for stride in strides], 2 * offset + 1
            placed = stored.as_strided(self.shape, strides, offset)
            assert placed.is_neg()
        else:
            placed = memory.to(device).as_strided(self.shape, strides, offset)
        return placed, memory[at]


@st.composite
def layouts(draw, shape: tuple[int, ...]) -> Layout:
    """Dense, permuted, sliced with gaps and steps, expanded, overlapping, and strides that no memory could back."""
    kind = draw(st.sampled_from(["dense", "permuted", "sliced", "expanded", "overlapping"]))
    order = list(range(len(shape)))
    if kind in ("permuted", "sliced"):
        order = draw(st.permutations(order))
    strides, dense = [0] * len(shape), 1
    for dim in reversed(order):
        step = draw(st.integers(1, 3)) if kind == "sliced" else 1
        strides[dim] = dense * step
        dense *= max(shape[dim], 1) * step + (draw(st.integers(0, 2)) if kind == "sliced" else 0)
    if kind == "expanded":
        strides = [0 if draw(st.booleans()) else stride for stride in strides]
    if kind == "overlapping":
        strides = [draw(st.integers(0, 5)) for _ in strides]
    if draw(st.booleans()):
        # The stride of a dimension with no second element is never walked.
        strides = [draw(st.sampled_from(HUGE)) if n <= 1 else s for n, s in zip(shape, strides, strict=True)]
    offset = draw(st.integers(0, 5)) if kind != "dense" else 0
    return Layout(shape, tuple(strides), offset, draw(st.integers(0, 99)), draw(st.integers(0, 9)) == 9)


def normal(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator, dtype=torch.float64)


def small_integers(n: int, generator: torch.Generator) -> Tensor:
    """Values whose sums and products are exact in every type, and often equal."""
    return torch.randint(-2, 3, (n,), generator=generator)


def integers_below(end: int) -> Callable:
    return lambda n, generator: torch.randint(max(end, 1), (n,), generator=generator)


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Equal up to ``bound``, an absolute one; NaN only where the plain formulation has it."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().cpu().double(), expected.detach()
    error = torch.where(actual.isnan() & expected.isnan(), 0.0, (actual - expected).abs())
    assert bool((error <= bound).all()), (
        f"off by {error.max().item():.3g}, more than {torch.as_tensor(bound).max():.3g}"
    )


# --- Nonsense ---

NOT_TENSORS = st.sampled_from([1, 1.5, "x", [0.0], {}, np.zeros((2, 3, 6, 7)), torch.float32, object()])
NOT_NUMBERS = st.sampled_from(["3", "", [3], (), {}, 1j, object(), torch.zeros(2), np.zeros(3)])


def tensors(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    wrong_dtypes: list[torch.dtype],
    *,
    fits: Callable[[tuple[int, ...]], bool] | None = None,
    leads: bool = False,
) -> st.SearchStrategy:
    """Tensors that cannot stand in for one of this shape and dtype: of another shape, type or device.

    Shapes that ``fits`` takes for right are left out. What ``leads``, other arguments are measured by: such a tensor is
    wrong whatever they are, and not by its device.
    """
    shapes = st.lists(st.integers(0, 4), max_size=6).map(tuple)
    wrong_shapes = shapes.filter(lambda other: not fits(other) if fits else other != shape)
    return st.one_of(
        wrong_shapes.map(lambda other: torch.zeros(other, dtype=dtype)),
        st.sampled_from(wrong_dtypes).map(lambda other: torch.zeros(shape, dtype=other)),
        *([] if leads else [st.just(torch.zeros(shape, dtype=dtype, device="meta"))]),
    )


def other_layouts(shape: tuple[int, ...], dtype: torch.dtype) -> st.SearchStrategy:
    right = torch.zeros(shape, dtype=dtype)
    return st.sampled_from([right.to_sparse(), torch.nested.nested_tensor([right, right], layout=torch.jagged)])


def on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) and value.device.type == "cpu" else value


@st.composite
def some_wrong(draw, wrong: dict[str, st.SearchStrategy]) -> dict[str, Any]:
    """One to three arguments by name, none of them right."""
    names = draw(st.lists(st.sampled_from(sorted(wrong)), min_size=1, max_size=3, unique=True))
    return {name: draw(wrong[name]) for name in names}


def refused(*names: str) -> Any:
    """What comes of wrong arguments: an error that names one of them."""
    return pytest.raises((TypeError, ValueError), match=rf"\b({'|'.join(names)})\b")


# --- extract_patches ---


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
    options = {"gray": False, "mean": None, "std": None, "patch_norm": False} | options | {"dtype": torch.float64}
    return extract_patches_reference(
        pixels, patch_size, stride, height, width, offsets, flip, **options | {"channels_last": False}
    )


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


NOT_FLOATING = [torch.int64, torch.bool, torch.complex64]
NOT_INDICES = [*FLOATING, torch.bool, torch.complex64, torch.float8_e5m2]
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
ENORMOUS = 10**400
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


# --- augment_patches ---


@dataclass(frozen=True)
class Augmentation:
    """Arguments of augment_patches, tensors as layouts."""

    images: Layout
    patch_size: int
    stride: int
    flip: Layout | None
    codes: Layout
    parameters: Layout
    partners: Layout
    displacements: Layout
    fill: int
    magnitude: float
    options: dict[str, Any]


@st.composite
def augmentations(draw) -> Augmentation:
    """Right arguments whose patches have some thousand pixels at most."""
    batch, channels = draw(st.sampled_from([1, 2, 0])), draw(st.sampled_from([1, 3]))
    size = draw(st.integers(1, 20)), draw(st.integers(1, 24))
    patch_size = draw(st.integers(1, min(size)))
    stride = draw(st.integers(max(1, patch_size // 2), 30) | st.sampled_from(HUGE))
    cells = (batch, *grid(size, patch_size, stride))
    steps = draw(st.integers(0, 3))
    gray = draw(st.booleans())
    out_channels = 1 if gray else channels
    return Augmentation(
        images=draw(layouts((batch, channels, *size))),
        patch_size=patch_size,
        stride=stride,
        flip=draw(st.none() | layouts((batch,))),
        codes=draw(layouts((*cells, steps))),
        parameters=draw(layouts((*cells, steps, 3))),
        partners=draw(layouts(cells)),
        displacements=draw(layouts((*cells, 2, 4, 4))),
        fill=draw(st.integers(0, 255)),
        magnitude=draw(st.sampled_from([1.0, 1.0, 10.0, 1e4, 1e30])),
        options={
            "gray": gray,
            "mean": draw(st.none() | st.just([0.4] * out_channels)),
            "std": draw(st.none() | st.just([0.5] * out_channels)),
            "patch_norm": draw(st.booleans()),
            "dtype": draw(st.sampled_from(FLOATING)),
            "channels_last": draw(st.booleans()),
        },
    )


def test_augmented_patches_are_the_references(device, for_examples):
    """Any transforms with any parameters, on any strides of images and plans."""

    @for_examples(case=augmentations())
    def holds(case: Augmentation):
        images, dense = case.images.place(device, torch.uint8, integers_below(256))
        count = math.prod(case.partners.shape)
        placed = [
            case.codes.place(device, torch.uint8, integers_below(len(Transform))),
            case.parameters.place(device, torch.float32, lambda n, g: normal(n, g) * case.magnitude),
            case.partners.place(device, torch.int64, integers_below(count)),
            case.displacements.place(device, torch.float32, lambda n, g: normal(n, g) * case.magnitude),
        ]
        plan, dense_plan = (AugmentationPlan(*tensors, case.fill) for tensors in zip(*placed, strict=True))
        flip, dense_flip = None, None
        if case.flip is not None:
            flip, dense_flip = case.flip.place(device, torch.bool, integers_below(2))

        actual = augment_patches(images, case.patch_size, case.stride, plan, flip=flip, **case.options)
        height, width = case.images.shape[2:]
        options = case.options | {"dtype": torch.float64}
        expected = augment_patches_reference(
            dense, case.patch_size, min(case.stride, height + width), height, width, None, dense_flip,
            *(options[name] for name in ("gray", "mean", "std", "patch_norm", "dtype", "channels_last")), *dense_plan,
        )  # fmt: skip
        assert actual.dtype == case.options["dtype"]
        # Pixels less the mean are up to 2 deviations, which the least contrast of 0.1 amplifies.
        amplified = 20 if case.options["patch_norm"] else 2
        assert_within(
            actual, expected, TOLERANCE[actual.dtype] * (1 + expected.abs()) + TOLERANCE[torch.float32] * amplified
        )


WRONG_AUGMENT_ARGUMENTS = {
    "images": st.none()
    | NOT_TENSORS
    | tensors(
        (2, 3, 6, 7),
        torch.uint8,
        [torch.int8, torch.bool, *FLOATING],
        fits=lambda shape: len(shape) == 4,
        leads=True,
    ),
    "codes": st.none()
    | NOT_TENSORS
    | other_layouts((2, 2, 3, 2), torch.uint8)
    | tensors((2, 2, 3, 2), torch.uint8, [torch.int64, torch.int8, torch.float32]),
    "parameters": st.none()
    | NOT_TENSORS
    | other_layouts((2, 2, 3, 2, 3), torch.float32)
    | tensors((2, 2, 3, 2, 3), torch.float32, [torch.float64, torch.bfloat16, torch.int64]),
    "partners": NOT_TENSORS
    | other_layouts((2, 2, 3), torch.int64)
    | tensors((2, 2, 3), torch.int64, [torch.int32, *FLOATING]),
    "displacements": NOT_TENSORS
    | other_layouts((2, 2, 3, 2, 4, 4), torch.float32)
    | tensors((2, 2, 3, 2, 4, 4), torch.float32, [torch.float64, torch.int64]),
    "fill": st.none() | NOT_NUMBERS | st.sampled_from([-1, 256, 1.5, True, 2**70]),
    "plan": st.none() | NOT_TENSORS | st.just((torch.zeros(2, 2, 3, 0, dtype=torch.uint8), torch.zeros(2, 2, 3, 0, 3))),
    "crop": WRONG_PATCH_ARGUMENTS["crop"],
    "flip": WRONG_PATCH_ARGUMENTS["flip"],
    "mean": WRONG_PATCH_ARGUMENTS["mean"],
    "dtype": WRONG_PATCH_ARGUMENTS["dtype"],
}


def test_wrong_arguments_of_augment_patches(device, for_examples):
    @for_examples(wrong=some_wrong(WRONG_AUGMENT_ARGUMENTS))
    def holds(wrong):
        plan = AugmentationPlan(
            torch.zeros(2, 2, 3, 2, dtype=torch.uint8),
            torch.zeros(2, 2, 3, 2, 3),
            torch.zeros(2, 2, 3, dtype=torch.int64),
            torch.zeros(2, 2, 3, 2, 4, 4),
        )
        fields = {name: wrong[name] for name in wrong if name in AugmentationPlan._fields}
        plan = AugmentationPlan(*(on(device, value) for value in plan._replace(**fields)))
        arguments = {"images": torch.zeros(2, 3, 6, 7, dtype=torch.uint8), "plan": plan}
        arguments |= {name: value for name, value in wrong.items() if name not in fields}
        arguments = {name: on(device, value) for name, value in arguments.items()}
        with refused(*wrong):
            augment_patches(arguments.pop("images"), 3, 2, arguments.pop("plan"), **arguments)


def test_codes_and_partners_stand_for_something(device, request, for_examples):
    """Any numbers: a ValueError on the CPU where they name nothing, elsewhere no transform and a clamped partner."""
    on_cpu = request.node.callspec.params["device"] == "cpu"

    @for_examples(
        code=st.integers(0, 255), partner=st.integers(-2, 14) | st.integers(-(2**63), 2**63 - 1), at=st.integers(0, 11)
    )
    def holds(code, partner, at):
        images = integers_below(256)(2 * 3 * 6 * 7, torch.Generator().manual_seed(0)).view(2, 3, 6, 7).to(torch.uint8)
        codes = torch.full((2, 2, 3, 1), int(Transform.SAMPLE_PAIRING), dtype=torch.uint8)
        partners = torch.zeros(2, 2, 3, dtype=torch.int64)
        codes.view(-1)[(at + 5) % 12], partners.view(-1)[at] = code, partner
        plan = AugmentationPlan(codes, torch.full((2, 2, 3, 1, 3), 0.5), partners, torch.ones(2, 2, 3, 2, 4, 4))

        def augmented():
            return augment_patches(images.to(device), 3, 2, AugmentationPlan(*(on(device, value) for value in plan)))

        if on_cpu and (code >= len(Transform) or not 0 <= partner < 12):
            with pytest.raises(ValueError, match=r"plan\.(codes|partners) must be"):
                augmented()
        else:
            expected = augment_patches_reference(
                images, 3, 2, 6, 7, None, None, False, None, None, False, torch.float64, False, *plan
            )
            assert_within(augmented(), expected, 2e-6)


# --- masked_conv2d ---


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


# --- info_nce ---


@dataclass(frozen=True)
class Contrast:
    """Arguments of info_nce, tensors as layouts."""

    dtypes: tuple[torch.dtype, torch.dtype]
    values: Callable
    queries: Layout
    keys: Layout
    targets: Layout | None
    negatives: Layout | None
    exclude: Layout | None
    weights: Layout | None
    index_dtype: torch.dtype
    weights_dtype: torch.dtype
    no_weight: bool
    scale: float
    reduction: str


@st.composite
def contrasts(draw) -> Contrast:
    batch = draw(st.sampled_from([(), (), (1,), (2,), (2, 2), (0,), (2, 0)]))
    num_queries, num_keys, dim, samples = (draw(st.integers(low, 5)) for low in (0, 1, 0, 0))
    if num_queries == 0:
        num_keys = draw(st.integers(0, 5))
    rows = (*batch, num_queries)
    return Contrast(
        dtypes=draw(st.tuples(st.sampled_from(FLOATING), st.sampled_from(FLOATING))),
        values=draw(st.sampled_from([normal, small_integers])),
        queries=draw(layouts((*rows, dim))),
        keys=draw(layouts((*batch, num_keys, dim))),
        targets=draw(layouts(rows) if num_queries > num_keys else st.none() | layouts(rows)),
        negatives=draw(st.none() | layouts((*rows, samples))),
        exclude=draw(st.none() | layouts(rows)),
        weights=draw(st.none() | layouts(rows)),
        index_dtype=draw(st.sampled_from(INTEGERS)),
        weights_dtype=draw(st.sampled_from(FLOATING)),
        no_weight=draw(st.integers(0, 5)) == 5,
        scale=draw(st.floats(-2, 2, width=16) | st.integers(-2, 2)),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
    )


def row_by_row(queries, keys, targets, negatives, exclude, scale) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and margins [M] of [M, D] queries: a softmax a row. The margin is that of the positive's score above all
    others'. Last, the largest absolute value of what is summed to a score."""
    losses, margins, largest = [], [], [torch.zeros((), dtype=torch.float64)]
    for m, query in enumerate(queries):
        target = int(targets[m])
        contrasted = range(len(keys)) if negatives is None else [target, *negatives[m].tolist()]
        contrasted = [n for n in contrasted if exclude is None or n != int(exclude[m])]
        scores = torch.stack([scale * (query * keys[n]).sum() for n in contrasted])
        positive = scale * (query * keys[target]).sum()
        losses.append(-(torch.exp(positive - scores.max()) / torch.exp(scores - scores.max()).sum()).log())
        others = [scores[i].detach() for i, n in enumerate(contrasted) if n != target]
        margins.append(min((positive.detach() - other for other in others), default=positive.new_tensor(math.inf)))
        largest += [abs(scale) * (query * keys[n]).detach().abs().sum() for n in contrasted]
    empty = queries.new_zeros(0)
    return torch.stack(losses) if losses else empty, torch.stack(margins) if margins else empty, max(largest)


def test_info_nce_and_its_gradients_are_softmaxes_of_rows(device, for_examples):
    @for_examples(case=contrasts())
    def holds(case: Contrast):
        queries, dense_queries = case.queries.place(device, case.dtypes[0], case.values)
        keys, dense_keys = case.keys.place(device, case.dtypes[1], case.values)
        queries, keys = queries.detach().requires_grad_(), keys.detach().requires_grad_()
        dense_queries, dense_keys = (dense.double().requires_grad_() for dense in (dense_queries, dense_keys))
        *batch, num_queries, dim = dense_queries.shape
        num_keys = dense_keys.shape[-2]
        options, plain = {}, {"exclude": None, "negatives": None}
        for name in ("targets", "negatives", "exclude"):
            layout = getattr(case, name)
            if layout is not None:
                # A key that the query is not contrasted with must not be its positive: these have halves of their own.
                low, high = {"targets": (0, (num_keys + 1) // 2), "exclude": ((num_keys + 1) // 2, num_keys)}.get(
                    name, (0, num_keys)
                )
                assume(low < high or math.prod(layout.shape) == 0)
                drawn = integers_below(high - low)
                options[name], plain[name] = layout.place(
                    device, case.index_dtype, lambda n, generator, drawn=drawn, low=low: drawn(n, generator) + low
                )
                plain[name] = plain[name].to(torch.int64)
        if case.targets is None:
            plain["targets"] = torch.arange(num_queries).expand(*batch, num_queries)
            assume(case.exclude is None or not bool((plain["exclude"] == plain["targets"]).any()))
        weights = torch.ones(*batch, num_queries, dtype=torch.float64)
        if case.weights is not None:
            options["weights"], dense_weights = case.weights.place(
                device, case.weights_dtype, lambda n, g: integers_below(4)(n, g) * (not case.no_weight) / 2
            )
            weights = dense_weights.double()

        loss, accuracy = info_nce(queries, keys, scale=case.scale, reduction=case.reduction, **options)
        dtype = torch.float64 if torch.float64 in case.dtypes else torch.float32
        assert loss.dtype == accuracy.dtype == dtype

        entries = math.prod(batch)
        flat = {
            name: None if value is None else value.reshape(entries, *value.shape[len(batch) :])
            for name, value in plain.items()
        }
        flat_queries = dense_queries.reshape(entries, num_queries, dim)
        flat_keys = dense_keys.reshape(entries, num_keys, dim)
        outcomes = [
            row_by_row(
                flat_queries[b],
                flat_keys[b],
                **{name: None if value is None else value[b] for name, value in flat.items()},
                scale=case.scale,
            )
            for b in range(entries)
        ]
        rows = (*batch, num_queries)
        losses = torch.stack([outcome[0] for outcome in outcomes]).view(rows) if outcomes else weights * 0
        margins = torch.stack([outcome[1] for outcome in outcomes]).view(rows) if outcomes else weights * 0
        largest = max((float(outcome[2]) for outcome in outcomes), default=0.0)
        total = weights.sum() if bool(weights.sum() > 0) else torch.ones(())
        expected = weights * losses
        if case.reduction != "none":
            expected = expected.sum() / (total if case.reduction == "mean" else 1)
        bound = 4 * TOLERANCE[dtype] * (1 + largest) * (1 + weights.sum())
        assert_within(loss, expected, bound)

        rights = (margins > 0).double()
        # Small integers have exact scores and ties; of others a tie may round either way.
        unclear = (margins.abs() <= bound) if case.values is normal else torch.zeros_like(rights)
        if case.reduction == "none":
            assert_within(accuracy, rights, unclear.double())
        else:
            assert_within(
                accuracy, (weights * rights).sum() / total, TOLERANCE[dtype] + (weights * unclear).sum() / total
            )

        assert not accuracy.requires_grad
        actual = torch.autograd.grad(loss.sum(), (queries, keys))
        expected = torch.autograd.grad(
            expected.sum() + 0 * (dense_queries.sum() + dense_keys.sum()), (dense_queries, dense_keys)
        )
        for one, other, own in zip(actual, expected, case.dtypes, strict=True):
            assert one.dtype == own
            # The slopes of a loss are sums of keys or queries, of up to 5, whose weights are as inexact as the loss.
            assert_within(one, other, TOLERANCE[own] * (1 + other.abs()) + 20 * bound)


def test_indices_name_keys(device, request, for_examples):
    """Any 64-bit numbers: an IndexError on the CPU where they name no key, a NaN loss elsewhere."""
    on_cpu = request.node.callspec.params["device"] == "cpu"

    @for_examples(
        num_keys=st.integers(1, 4),
        targets=st.lists(st.integers(0, 3), min_size=3, max_size=3),
        name=st.sampled_from(["targets", "negatives", "exclude"]),
        value=st.integers(-2, 6) | st.integers(-(2**63), 2**63 - 1),
        at=st.integers(0, 2),
    )
    def holds(num_keys, targets, name, value, at):
        targets = torch.tensor(targets).clamp(max=num_keys - 1)
        indices = {"targets": targets, "negatives": targets[:, None], "exclude": (targets + 1) % num_keys}
        if name != "exclude" or num_keys == 1:
            del indices["exclude"]
        assume(name in indices)
        indices[name] = indices[name].clone()
        indices[name].view(-1)[at] = value
        generator = torch.Generator().manual_seed(0)
        queries, keys = normal(3 * 2, generator).view(3, 2), normal(num_keys * 2, generator).view(num_keys, 2)

        def contrast(indices, **options):
            tensors = {name: on(device, value) for name, value in indices.items()}
            return info_nce(queries.to(device), keys.to(device), **tensors, **options)

        names_no_key = not 0 <= value < num_keys
        names_positive = name == "exclude" and value == targets[at]
        if on_cpu and names_no_key:
            with pytest.raises(IndexError, match=f"{name} must be in"):
                contrast(indices)
        elif on_cpu and names_positive:
            with pytest.raises(ValueError, match="exclude must not name the positive"):
                contrast(indices)
        else:
            others = {key: tensor.clone() for key, tensor in indices.items()}
            if names_no_key or names_positive:
                others[name].view(-1)[at] = -1 if name == "exclude" else 0
            losses, *_ = row_by_row(queries, keys, scale=1.0, **{"negatives": None, "exclude": None} | others)
            if names_no_key or names_positive:
                losses[at] = math.nan
            assert_within(contrast(indices, reduction="none").loss, losses, 1e-12)


WRONG_CONTRAST_ARGUMENTS = {
    "queries": st.none()
    | NOT_TENSORS
    | other_layouts((3, 2), torch.float32)
    | tensors(
        (3, 2),
        torch.float32,
        [*NOT_FLOATING, torch.float8_e4m3fn],
        fits=lambda shape: len(shape) >= 2,
        leads=True,
    ),
    "keys": st.none()
    | NOT_TENSORS
    | other_layouts((4, 2), torch.float32)
    | tensors(
        (4, 2),
        torch.float32,
        [*NOT_FLOATING, torch.float8_e5m2],
        fits=lambda shape: len(shape) == 2 and shape[0] >= 3 and shape[1] == 2,
    ),
    "targets": NOT_TENSORS | other_layouts((3,), torch.int64) | tensors((3,), torch.int64, NOT_INDICES),
    "negatives": NOT_TENSORS
    | other_layouts((3, 2), torch.int64)
    | tensors((3, 2), torch.int64, NOT_INDICES, fits=lambda shape: len(shape) == 2 and shape[0] == 3),
    "exclude": NOT_TENSORS | other_layouts((3,), torch.int64) | tensors((3,), torch.int64, NOT_INDICES),
    "weights": NOT_TENSORS
    | other_layouts((3,), torch.float32)
    | tensors((3,), torch.float32, [*INTEGERS, torch.bool, torch.complex64]),
    "scale": st.none() | NOT_NUMBERS | st.sampled_from([True, math.inf, -math.inf, math.nan, ENORMOUS, -ENORMOUS]),
    "reduction": st.sampled_from([None, "", "max", "MEAN", 1, [], {}, torch.zeros(3), object()]),
}


def test_wrong_arguments_of_info_nce(device, for_examples):
    @for_examples(wrong=some_wrong(WRONG_CONTRAST_ARGUMENTS))
    def holds(wrong):
        arguments = {"queries": torch.zeros(3, 2), "keys": torch.zeros(4, 2)} | wrong
        with refused(*wrong):
            info_nce(**{name: on(device, value) for name, value in arguments.items()})


def test_weights_are_not_negative(for_examples):
    @for_examples(weight=st.floats(width=32), dtype=st.sampled_from(FLOATING))
    def holds(weight, dtype):
        weights = torch.tensor([1.0, weight]).to(dtype)
        if bool(weights[1] < 0):
            with pytest.raises(ValueError, match="weights must not be negative"):
                info_nce(torch.eye(2), torch.eye(2), weights=weights)
        else:
            loss = info_nce(torch.eye(2), torch.eye(2), weights=weights, reduction="none").loss
            torch.testing.assert_close(loss, weights.float() * loss[0], equal_nan=True)


def test_any_finite_scale_is_taken(for_examples):
    @for_examples(scale=st.integers(-(10**300), 10**300) | st.floats(allow_nan=False))
    def holds(scale):
        queries, keys = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        if math.isfinite(scale):
            loss = info_nce(queries, keys, scale=scale).loss
            expected = torch.nn.functional.softplus(torch.tensor(float(scale), dtype=torch.float64), threshold=40)
            torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        else:
            with pytest.raises(ValueError, match="scale must be finite"):
                info_nce(queries, keys, scale=scale)


# --- logistic_mixture_nll and sample_logistic_mixture ---


@dataclass(frozen=True)
class Mixture:
    """Arguments of both, tensors as layouts."""

    images: Layout
    params: Layout
    dtype: torch.dtype
    scales: tuple[float, float, float]
    grad: Layout
    noise: Layout
    noise_dtype: torch.dtype
    temperature: float

    def make_params(self, n: int, generator: torch.Generator) -> Tensor:
        """Parameters of three sizes, so that log-scales lie above -6."""
        sizes = torch.tensor(self.scales, dtype=torch.float64)[torch.randint(3, (n,), generator=generator)]
        return normal(n, generator).clamp(-3, 3) * sizes


@st.composite
def mixtures(draw) -> Mixture:
    channels, components = draw(st.sampled_from([1, 3])), draw(st.integers(1, 6))
    batch = draw(st.sampled_from([1, 2, 3, 0]))
    size = draw(st.tuples(st.integers(1, 8), st.integers(1, 9)))
    count = components * (10 if channels == 3 else 3)
    return Mixture(
        images=draw(layouts((batch, channels, *size))),
        params=draw(layouts((batch, count, *size))),
        dtype=draw(st.sampled_from(FLOATING)),
        scales=draw(st.tuples(*3 * [st.sampled_from([0.1, 0.5, 1.0, 2.0])])),
        grad=draw(layouts((batch,))),
        noise=draw(layouts((batch, components + channels, *size))),
        noise_dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        temperature=draw(st.sampled_from([0, 1]) | st.floats(0, 2)),
    )


def values_with_edges(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-128, 384, (n,), generator=generator).clamp(0, 255)


def test_mixture_likelihoods_and_their_gradients_are_the_references(device, for_examples):
    @for_examples(case=mixtures())
    def holds(case: Mixture):
        images, dense_images = case.images.place(device, torch.uint8, values_with_edges)
        params, dense = case.params.place(device, case.dtype, case.make_params)
        params, dense = params.detach().requires_grad_(), dense.double().requires_grad_()
        actual = logistic_mixture_nll(images, params)
        expected = logistic_mixture_nll_reference(dense_images, dense)
        compute = torch.float64 if case.dtype == torch.float64 else torch.float32
        assert actual.dtype == compute
        assert_within(actual, expected, TOLERANCE[compute] * 20 * (1 + expected.detach().abs()))

        grad, dense_grad = case.grad.place(device, compute, normal)
        (actual,) = torch.autograd.grad(actual, params, grad)
        (expected,) = torch.autograd.grad(expected, dense, dense_grad.double())
        assert actual.dtype == case.dtype
        # A value's distance from the mean is exact to float32, and multiplied by up to e^6 twice.
        sharpest = math.exp(3 * max(case.scales))
        bound = TOLERANCE[case.dtype] * (1 + expected.abs()) + TOLERANCE[compute] * (1 + sharpest) ** 2
        assert_within(actual, expected, bound * (1 + dense_grad.abs().max() if len(dense_grad) else 1))


def test_mixture_samples_are_the_references(device, for_examples):
    @for_examples(case=mixtures())
    def holds(case: Mixture):
        channels = case.images.shape[1]
        params, dense = case.params.place(device, case.dtype, case.make_params)
        noise, dense_noise = case.noise.place(
            device, case.noise_dtype, lambda n, generator: torch.rand(n, generator=generator)
        )
        actual = sample_logistic_mixture(params, channels=channels, noise=noise, temperature=case.temperature)
        expected = sample_logistic_mixture_reference(dense, dense_noise, channels, case.temperature)
        assert torch.equal(actual.cpu(), expected)


WRONG_MIXTURE_ARGUMENTS = {
    "images": st.none()
    | NOT_TENSORS
    | other_layouts((2, 3, 4, 5), torch.uint8)
    # Without a device of their own: what params are measured by.
    | tensors((2, 3, 4, 5), torch.uint8, [torch.float32, torch.int64, torch.bool], leads=True),
    "params": st.none()
    | NOT_TENSORS
    | other_layouts((2, 10, 4, 5), torch.float32)
    | tensors((2, 10, 4, 5), torch.float32, [*NOT_FLOATING, torch.float8_e4m3fn]),
}


def test_wrong_arguments_of_logistic_mixture_nll(device, for_examples):
    @for_examples(wrong=some_wrong(WRONG_MIXTURE_ARGUMENTS))
    def holds(wrong):
        arguments = {"images": torch.zeros(2, 3, 4, 5, dtype=torch.uint8), "params": torch.zeros(2, 10, 4, 5)} | wrong
        # Images and params that are both of another size may fit each other.
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else None for value in arguments.values()]
        assume(len(wrong) == 1 or None in shapes or shapes[0][:1] + shapes[0][2:] != shapes[1][:1] + shapes[1][2:])
        with refused("params", *wrong):  # Which the others are measured by.
            logistic_mixture_nll(**{name: on(device, value) for name, value in arguments.items()})


WRONG_SAMPLING_ARGUMENTS = {
    "params": WRONG_MIXTURE_ARGUMENTS["params"].filter(lambda value: not isinstance(value, Tensor) or value.ndim != 4),
    "channels": st.none() | NOT_NUMBERS | st.sampled_from([True, 0, 1, 2, 4, -3, 3.0, ENORMOUS]),
    "noise": NOT_TENSORS
    | other_layouts((2, 4, 4, 5), torch.float32)
    | tensors((2, 4, 4, 5), torch.float32, [*NOT_FLOATING, torch.float16, torch.bfloat16]),
    "temperature": st.none() | NOT_NUMBERS | st.sampled_from([True, -1, -1e-9, math.inf, math.nan, ENORMOUS]),
}


def test_wrong_arguments_of_sample_logistic_mixture(device, for_examples):
    @for_examples(wrong=some_wrong(WRONG_SAMPLING_ARGUMENTS))
    def holds(wrong):
        arguments = {"params": torch.zeros(2, 10, 4, 5), "noise": torch.zeros(2, 4, 4, 5)} | wrong
        with refused("params", *wrong):  # Which the others are measured by.
            sample_logistic_mixture(**{name: on(device, value) for name, value in arguments.items()})
