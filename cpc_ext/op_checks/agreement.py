"""Comparison of an op's kernels with its reference: one problem, one device, one dtype at a time.

The op runs on the device in the dtype. Its reference, plain PyTorch, runs on the CPU in float64, on the same values
rounded to that dtype. Forward results and gradients are compared, relative to the largest expected value.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpc_ext._found import found_in

__all__ = ["KINDS", "Difference", "Problem", "all_problems", "differences", "fp32_precision", "kinds_of"]


class Kind(NamedTuple):
    """A precision in which an op computes.

    dtype: dtype of the floating-point arguments.
    tolerance: largest error of a result, as a fraction of the largest expected value.
    """

    dtype: torch.dtype
    tolerance: float


# Tolerances are a few roundings of a result to its dtype; for float32 they include those of its sums.
KINDS = {
    "float64": Kind(torch.float64, 1e-12),
    "float32": Kind(torch.float32, 5e-6),
    "tf32": Kind(torch.float32, 2e-3),
    "bfloat16": Kind(torch.bfloat16, 2**-6),
    "float16": Kind(torch.float16, 2**-9),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A call of an op that can be made on any device.

    Attributes:
        op: name of the op in :mod:`cpc_ext.ops`.
        label: what is awkward about the problem.
        call: takes ``differentiable`` and ``others`` by name and returns a tensor or a tuple of tensors.
        reference: the same in plain PyTorch, differentiable by PyTorch's own formulas.
        differentiable: float64 arguments; they are rounded to the dtype, and gradients are taken in them.
        others: further arguments; tensors, also those in named tuples, are moved to the device unchanged.
        gives: name of the argument by which ``call`` takes the dtype; None if it follows from the other arguments.
        kinds: names in ``KINDS`` of the precisions that the op supports; by default all.
    """

    op: str
    label: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    differentiable: Mapping[str, Tensor] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    gives: str | None = None
    kinds: tuple[str, ...] = tuple(KINDS)


class Difference(NamedTuple):
    """The error of a result or gradient.

    Attributes:
        of: what is compared, such as "result 0" or "gradient of keys".
        error: the largest difference as a fraction of the largest expected value; infinite for a wrong shape or where
            only one of the two values is finite.
        allowed: the largest error that rounding explains.
        where: one line about the worst position.
    """

    of: str
    error: float
    allowed: float
    where: str

    @property
    def agrees(self) -> bool:
        """Return whether the error is no larger than the allowed one."""
        return self.error <= self.allowed


def all_problems() -> list[Problem]:
    """Return the problems of all ops."""
    modules = [import_module(name) for name in sorted(found_in(f"{__package__}.problems").values())]
    return [problem for module in modules for problem in module.PROBLEMS]


def kinds_of(device: torch.device, *, rounds: bool | None = None) -> list[str]:
    """Return the names of a device's kinds; "tf32" only if it ``rounds`` to TF32, which by default CUDA alone does."""
    rounds = device.type == "cuda" if rounds is None else rounds
    return [name for name in KINDS if name != "tf32" or rounds]


@contextlib.contextmanager
def fp32_precision(value: str) -> Iterator[None]:
    """Return a context with PyTorch's precision of float32 products and convolutions on CUDA at "ieee" or "tf32"."""
    switches: tuple[Any, ...] = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = value
        yield
    finally:
        for switch, old in zip(switches, before, strict=True):
            switch.fp32_precision = old


def differences(problem: Problem, device: torch.device, kind: str) -> list[Difference]:
    """Compare each result and gradient of a problem on a device with the reference's.

    Errors of the op are passed on.
    """
    dtype, tolerance = KINDS[kind]
    rounded = {name: value.to(dtype) for name, value in problem.differentiable.items()}
    with fp32_precision("tf32" if kind == "tf32" else "ieee"):
        actual = _results(problem, problem.call, rounded, device, dtype)
    exact = {name: value.double() for name, value in rounded.items()}
    with warnings.catch_warnings():
        # Performance warnings of plain PyTorch do not matter here.
        warnings.filterwarnings("ignore", message="Using padding='same'")
        expected = _results(problem, problem.reference, exact, torch.device("cpu"), torch.float64)
    return [_difference(name, actual[name], expected[name], tolerance) for name in expected]


def _results(
    problem: Problem,
    call: Callable[..., Any],
    differentiable: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return results and gradients by their names, those of :attr:`Difference.of`."""
    inputs = {name: value.to(device).requires_grad_() for name, value in differentiable.items()}
    others = {name: _on(value, device) for name, value in problem.others.items()}
    told = {} if problem.gives is None else {problem.gives: dtype}
    made = call(**inputs, **others, **told)
    outputs: list[Tensor] = [made] if isinstance(made, Tensor) else list(made)
    results = {f"result {index}": output.detach() for index, output in enumerate(outputs)}
    learns = [output for output in outputs if output.requires_grad]
    if learns:
        upstream = [_upstream(output) for output in learns]
        gradients = torch.autograd.grad(learns, list(inputs.values()), upstream)
        results |= {f"gradient of {name}": value for name, value in zip(inputs, gradients, strict=True)}
    return results


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return type(value)(*(_on(one, device) for one in value)) if hasattr(value, "_fields") else value


def _upstream(output: Tensor) -> Tensor:
    """Return a varied gradient of a result, whose values are exact in every dtype."""
    values = torch.arange(output.numel(), dtype=torch.float64).mul(0.7).cos().mul(4).round().div(4).add(0.125)
    return values.view(output.shape).to(output)


def _difference(of: str, actual: Tensor, expected: Tensor, tolerance: float) -> Difference:
    if actual.shape != expected.shape:
        shapes = f"the shape is {tuple(actual.shape)}, not {tuple(expected.shape)}"
        return Difference(of, float("inf"), tolerance, shapes)
    allowed = tolerance if expected.is_floating_point() else 0.0
    if expected.numel() == 0:
        return Difference(of, 0.0, allowed, "there are no values")
    actual, expected = actual.cpu().double(), expected.double()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    off = torch.where(same, 0.0, (actual - expected).abs())
    off = torch.where(off.isnan(), torch.inf, off)
    largest = expected[expected.isfinite()].abs().max().item() if bool(expected.isfinite().any()) else 0.0
    worst = int(off.argmax())
    error = off.flatten()[worst].item()
    place = [int(index) for index in torch.unravel_index(torch.tensor(worst), off.shape)]
    where = f"at {place} it is {actual.flatten()[worst]:.6g}, not {expected.flatten()[worst]:.6g}"
    return Difference(of, error / largest if largest else error, allowed, where)
