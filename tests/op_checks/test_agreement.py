"""Every op agrees with its reference on the problems that `cpc-ext check` runs, and the check detects faults."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import cpc_ext.ops
from cpc_ext._native import native
from cpc_ext.op_checks.agreement import KINDS, Problem, all_problems, differences, kinds_of

PROBLEMS = all_problems()


def name_of(problem):
    return f"{problem.op}-{problem.label}"


@pytest.mark.parametrize("problem", PROBLEMS, ids=name_of)
def test_ops_agree_with_their_references(device, problem):
    for kind in kinds_of(device, rounds=hasattr(native, "emulate_cuda") or device.type == "cuda"):
        if kind in problem.kinds:
            for one in differences(problem, device, kind):
                assert one.agrees, (kind, one)


def test_every_op_has_problems():
    ops = {name for name in cpc_ext.ops.__all__ if name.islower()}
    assert {problem.op for problem in PROBLEMS} == ops


def test_every_op_and_gradient_of_the_dispatcher_is_called():
    called = set()

    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "cpc_ext":
                called.add(op.name())
            return op(*args, **(kwargs or {}))

    with Names():
        for problem in PROBLEMS:
            differences(problem, torch.device("cpu"), "float32")
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cpc_ext::")}
    # The gradients that a mean forms beforehand in float32 are formed afterwards in float16.
    differences(next(one for one in PROBLEMS if one.op == "info_nce"), torch.device("cpu"), "float16")
    assert called == registered


def double(value):
    return value * 2


def made(call, reference=double, **options):
    values = torch.tensor([1.0, -3.0, 0.5], dtype=torch.float64)
    return Problem(
        op="double", label="three", call=call, reference=reference, differentiable={"value": values}, **options
    )


def results(problem, kind="float32"):
    return {one.of: one for one in differences(problem, torch.device("cpu"), kind)}


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "tf32"])
def test_what_is_right_agrees_and_an_error_beyond_rounding_does_not(kind):
    right = results(made(double), kind)
    assert list(right) == ["result 0", "gradient of value"]
    assert all(one.agrees and one.error == 0 for one in right.values())
    wrong = results(made(lambda value: value * (2 + 8 * KINDS[kind].tolerance)), kind)
    assert not any(one.agrees for one in wrong.values())
    # The largest value expected is 6, at which the error is largest, too.
    assert wrong["result 0"].error == pytest.approx(4 * KINDS[kind].tolerance, rel=0.5)
    assert wrong["result 0"].where.startswith("at [1] it is -6")


def test_a_wrong_gradient_is_seen_where_the_result_is_right():
    found = results(made(lambda value: value.detach() + value))
    assert found["result 0"].agrees
    assert not found["gradient of value"].agrees


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_seen(bad):
    broken = results(made(lambda value: torch.where(value == 0.5, bad, value * 2)))
    assert broken["result 0"].error == torch.inf
    assert "at [2]" in broken["result 0"].where
    expected = made(double, reference=lambda value: torch.where(value == 0.5, bad, value * 2))
    assert not results(expected)["result 0"].agrees
    both = made(expected.reference, reference=expected.reference)
    assert results(both)["result 0"].agrees


def test_a_wrong_shape_is_seen():
    found = results(made(lambda value: value[:2] * 2))
    assert found["result 0"].where == "the shape is (2,), not (3,)"
    assert not found["result 0"].agrees


def test_integers_must_be_equal():
    problem = made(lambda value: value.detach().int(), reference=lambda value: value.detach().int())
    assert results(problem)["result 0"].agrees
    off_by_one = replace(problem, call=lambda value: value.detach().int() + (value == 0.5))
    assert not results(off_by_one)["result 0"].agrees


def test_the_switches_of_pytorch_are_as_before():
    switch = torch.backends.cuda.matmul
    before, seen = switch.fp32_precision, []
    for kind in ("float32", "tf32"):
        results(made(lambda value: (seen.append(switch.fp32_precision), value * 2)[1]), kind)
    assert seen == ["ieee", "tf32"]
    assert switch.fp32_precision == before
