"""PyTorch's own launches in the benchmarks' problems, worked out by hand, since the emulation cannot count them.

These are the steps of the eager formulations, and the launches around our kernels, such as the multiplication of
gradients by the loss's gradient and fills with zeros. cuda_traffic.py counts the work of our own kernels in the
emulation. The eager formulation of augment_patches, thousands of small launches, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from benchmark import Case
from cuda_counts import Launch, Product, Sweep
from ops import counted_ops

__all__ = ["Key", "cases_by_key", "eager_steps", "surrounding_launches"]

# Key of a row of kernels.py and of a problem in cuda_counts.json: op, label, dtype, passes.
Key = tuple[str, str, str, str]
Steps = list[Product | Sweep]
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def _math(dtype: str, float32: str) -> str:
    return float32 if dtype == "float32" else dtype


# --- Eager formulations ---


def _eager_all_keys(case: Any) -> Steps:
    m, d, size = case.rows, case.dim, SIZES[case.dtype]
    math = _math(case.dtype, "float32")
    as_float = [] if size == 4 else [Sweep(m * m * (size + 4))]
    # The product, log-softmax (which reads twice), the loss; backward the softmax's gradient and two products.
    steps: Steps = [Product(m, m, d, math, size), *as_float, Sweep(3 * m * m * 4), Sweep(m * 12, 3)]
    if case.backward:
        steps += [Sweep(m * m * 4), Sweep(3 * m * m * 4), *as_float]
        steps += [Product(m, d, m, math, size), Product(m, d, m, math, size)]
    return steps


def _eager_sampled(case: Any) -> Steps:
    pairs, row = case.queries * (16 + 1), 256 * SIZES[case.dtype]
    gathered = pairs * row
    # Gather, batched product with one column, softmax; backward outer products, and adding up by index.
    steps: Steps = [Sweep(pairs * 16), Sweep(2 * gathered), Sweep(gathered + case.queries * row), Sweep(pairs * 12, 3)]
    if case.backward:
        steps += [Sweep(pairs * 12, 3), Sweep(gathered), Sweep(gathered), Sweep(3 * gathered, 6)]
    return steps


def _eager_convolution(case: Any, inputs: int, taps: int, *, bias: bool, around: Sequence[Sweep]) -> Steps:
    """Return the steps of a convolution.

    around: other passes over memory, such as masking weights or padding images, which occur again backward.
    """
    pixels, outputs, size = case.batch * case.side**2, case.out_channels, SIZES[case.dtype]
    math = _math(case.dtype, "tf32")
    steps: Steps = [*around, Product(pixels, outputs, taps * inputs, math, size)]
    if case.backward:
        steps += [Product(pixels, inputs, taps * outputs, math, size)]
        steps += [Product(outputs, taps * inputs, pixels, math, size), *around]
        steps += [Sweep(pixels * outputs * size)] if bias else []
    return steps


def _eager_masked(case: Any) -> Steps:
    taps, size = case.kernel**2, SIZES[case.dtype]
    weight, image = taps * case.in_channels * case.out_channels, case.batch * case.side**2 * case.in_channels
    around = [Sweep(3 * weight * size), Sweep(2 * image * size)]
    return _eager_convolution(case, case.in_channels, taps, bias=True, around=around)


def _eager_shifted(case: Any) -> Steps:
    inputs = 2 * case.features
    padded = Sweep(2 * case.batch * case.side**2 * inputs * SIZES[case.dtype])
    taps = 6 if case.shift == "down" else 4
    return _eager_convolution(case, inputs, taps, bias=False, around=[padded])


def _eager_patches(case: Any) -> Steps:
    size, images = SIZES[case.dtype], case.batch * 3 * case.side**2
    cells = (case.side - case.patch) // case.stride + 1
    out = case.batch * cells**2 * 3 * case.patch**2 * size
    if case.normalised:
        return [Sweep(images * size + out)]
    # To float, scale, subtract, divide, cast, and one copy of the patches; backward the unfolds and the division.
    steps: Steps = [] if case.backward else [Sweep(images * 5), Sweep(images * 8)]
    steps += [] if size == 4 else [Sweep(images * 6)]
    steps += [Sweep(images * 8), Sweep(images * 8), Sweep(2 * out)]
    if case.backward:
        steps += [Sweep(2 * out), Sweep(2 * out), Sweep(out + images * 4), Sweep(images * 8)]
    return steps


def _eager_mixture(case: Any) -> Steps:
    one = case.batch * case.side**2 * case.components * case.channels * 4  # Bytes of each intermediate result.
    # About 45 elementwise kernels over colours and components, most with two operands; twice as many backward.
    return [Sweep(2.5 * one)] * (45 + (95 if case.backward else 0))


EAGER: dict[str, Callable[[Any], Steps]] = {
    "info_nce_all": _eager_all_keys,
    "info_nce_sampled": _eager_sampled,
    "masked_conv2d": _eager_masked,
    "shifted_conv2d": _eager_shifted,
    "extract_patches": _eager_patches,
    "logistic_mixture_nll": _eager_mixture,
}


# --- Around our kernels ---


def _elementwise(name: str, *, reads: float, writes: float) -> Launch:
    """Return an elementwise kernel with coalesced accesses of 16 bytes for each thread. reads, writes: bytes."""
    grid = max(1, -int(-max(reads, writes) // (16 * 256)))
    return Launch(
        kernel=name,
        grid=grid,
        block=256,
        read_requests=grid * 8 if reads else 0,
        write_requests=grid * 8,
        read_bytes=reads,
        written_bytes=writes,
        read_sectors=reads / 32,
        written_sectors=writes / 32,
        unique_read_bytes=reads,
        unique_written_bytes=writes,
    )


def _small(name: str, count: int = 1) -> list[Launch]:
    """Return launches on a few values, whose cost is the pause before them."""
    return [_elementwise(name, reads=32, writes=32)] * count


def _around_contrast(case: Any, queries: int, keys: int, dim: int) -> list[Launch]:
    """Return the launches that fill the loss's gradient with a one and multiply the other gradients by it."""
    if not case.backward:
        return []
    sizes = [count * dim * SIZES[case.dtype] for count in (queries, keys)]
    scaled = [_elementwise("PyTorch's product with a scalar", reads=size, writes=size) for size in sizes]
    return [*_small("PyTorch's fill"), *scaled]


def _around_all_keys(case: Any) -> list[Launch]:
    return _around_contrast(case, case.rows, case.rows, case.dim)


def _around_sampled(case: Any) -> list[Launch]:
    return _around_contrast(case, case.queries, case.keys, 256)


def _around_shifted(case: Any) -> list[Launch]:
    """Return the launches that pad the weight to 3 x 3, a fill and a copy, and that cut its gradient out again."""
    inputs = 2 * case.features
    weight = (6 if case.shift == "down" else 4) * inputs * case.out_channels * SIZES[case.dtype]
    copied = _elementwise("PyTorch's copy", reads=weight, writes=weight)
    padded = [_elementwise("PyTorch's fill", reads=0, writes=weight * 9 / (6 if case.shift == "down" else 4)), copied]
    return [*padded, *([copied] if case.backward else [])]


def _around_mixture(case: Any) -> list[Launch]:
    """Return the launches of summing the images' nats, as the benchmark does, and of the gradient, a repeated one."""
    return [*_small("PyTorch's sum"), *_small("PyTorch's fill"), *_small("PyTorch's copy")] if case.backward else []


AROUND: dict[str, Callable[[Any], list[Launch]]] = {
    "info_nce_all": _around_all_keys,
    "info_nce_sampled": _around_sampled,
    "shifted_conv2d": _around_shifted,
    "logistic_mixture_nll": _around_mixture,
}


# --- By case ---


@cache
def cases_by_key() -> dict[Key, Case]:
    """Return every counted benchmark case by its key."""
    return {
        (op.name, case.label, case.dtype, "forward+backward" if case.backward else "forward"): case
        for op in counted_ops().values()
        for case in op.cases
    }


def eager_steps(key: Key) -> Sequence[Product | Sweep] | None:
    """Return the steps of a benchmark case's eager formulation, or None if they are not worked out."""
    case = cases_by_key().get(key)
    return None if case is None or key[0] not in EAGER else EAGER[key[0]](case)


def surrounding_launches(key: Key) -> Sequence[Launch]:
    """Return the launches of PyTorch and the runtime around our kernels in a benchmark case."""
    case = cases_by_key().get(key)
    return () if case is None or key[0] not in AROUND else AROUND[key[0]](case)
