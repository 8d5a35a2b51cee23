"""Our conversions of half precision for compilers without the type (csrc/core/half.h), compared with NumPy's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)


@pytest.fixture(scope="module")
def program(compiled) -> Path:
    return compiled("half_check")


def converted(program: Path, what: str, values: np.ndarray, dtype: type) -> np.ndarray:
    done = subprocess.run([program, what], input=values.tobytes(), stdout=subprocess.PIPE, check=True)
    return np.frombuffer(done.stdout, dtype)


def equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Compare bit for bit, where all NaNs are equal."""
    numbers = ~np.isnan(one)
    bits = np.uint16 if one.dtype == np.float16 else np.uint32
    return np.array_equal(numbers, ~np.isnan(other)) and np.array_equal(
        one[numbers].view(bits), other[numbers].view(bits)
    )


def test_every_half_is_widened(program):
    assert equal(converted(program, "half", HALVES, np.float32), HALVES.astype(np.float32))


@pytest.mark.parametrize(("name", "dtype"), [("float", np.float32), ("double", np.float64)])
def test_values_are_rounded_to_nearest_even(program, name, dtype):
    wide = HALVES[np.isfinite(HALVES)].astype(dtype)
    # Halves and midpoints between neighbours, with the values next to both; values of all magnitudes; and overflows.
    steps = np.sort(wide)
    exact = np.concatenate([steps, (steps[1:] + steps[:-1]) / 2])
    rng = np.random.default_rng(0)
    drawn = (rng.standard_normal(10**5) * 2.0 ** rng.integers(-30, 18, 10**5)).astype(dtype)
    limits = np.array([65519.99, 65520, 65536, 1e30, 2.0**-25, 2.0**-24, 2.0**-14, 0, np.inf, np.nan], dtype)
    values = np.concatenate([exact, drawn, limits, [np.finfo(dtype).smallest_subnormal]]).astype(dtype)
    values = np.concatenate(
        [values, -values, np.nextafter(values, dtype(np.inf)), np.nextafter(values, dtype(-np.inf))]
    )
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    assert equal(converted(program, name, values, np.float16), expected)
