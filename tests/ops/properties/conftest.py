"""Every op on arguments that Hypothesis makes up: shapes, strides, types, values and nonsense.

The result is that of a plain formulation in float64, or the documented error; never another one, a crash or a wrong
result. Hypothesis shrinks what fails to a small example; examples are the same on every run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

# Examples a test, by device as tests/conftest.py names them.
EXAMPLES = {"cpu": 200, "emulated": 20, "cuda": 100}

FLOATING = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
# Errors of a result of order one: some roundings to its type, or of float32 arithmetic.
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


NOT_FLOATING = [torch.int64, torch.bool, torch.complex64]
NOT_INDICES = [*FLOATING, torch.bool, torch.complex64, torch.float8_e5m2]
ENORMOUS = 10**400
