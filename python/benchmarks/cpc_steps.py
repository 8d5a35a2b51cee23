"""All steps of CPC with every key of a step as a negative: one call with a range of keys per step, and alternatives.

The grid is 7x7, with five steps and one row skipped, as in CPCV2-PyTorch's example. The contexts of step k are
contrasted with the encodings from row k + 1 on. Alternatives: ours is one call of ``info_nce`` with ``key_range``; "a
call a step" has no superfluous keys, but five calls; "marks" is one call with additional features that remove keys
which a step must not see from its softmax; "eager" is one cross-entropy for each step. Times include the gradients of
contexts and encodings.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from machine import add_common_arguments, at_least, describe, result_file, write_json
from timing import interleaved, make_plan
from torch import Tensor

from cpc_ext.ops import info_nce

GRID, STEPS, SKIP = 7, 5, 1
BATCHES, QUICK_BATCHES = (4, 16, 64), (4,)
# Marks lower a logit by the square of this.
MARK = 2.0**15


class Problem(NamedTuple):
    """Keys [N, D], and each step's queries [M_k, D] and first key."""

    keys: Tensor
    queries: list[Tensor]
    firsts: list[int]


def make_problem(batch: int, dim: int, device: str) -> Problem:
    torch.manual_seed(0)
    rows = [GRID - SKIP - step for step in range(1, STEPS + 1)]
    keys = torch.randn(GRID * GRID * batch, dim, device=device).requires_grad_()
    queries = [(torch.randn(count * GRID * batch, dim, device=device) * dim**-0.5).requires_grad_() for count in rows]
    return Problem(keys, queries, [(GRID - count) * GRID * batch for count in rows])


def in_ranges(problem: Problem) -> Tensor:
    keys, queries, firsts = problem
    begins = torch.cat([keys.new_full((len(one),), first) for one, first in zip(queries, firsts, strict=True)]).long()
    key_range = torch.stack([begins, torch.full_like(begins, len(keys))], 1)
    return info_nce(torch.cat(queries), keys, _targets(problem, 0), key_range=key_range, reduction="sum").loss


def call_a_step(problem: Problem) -> Tensor:
    losses = [
        info_nce(one, problem.keys[first:], reduction="sum").loss
        for one, first in zip(problem.queries, problem.firsts, strict=True)
    ]
    return torch.stack(losses).sum()


def with_marks(problem: Problem) -> Tensor:
    keys, queries, firsts = problem
    start, width = firsts[0], -(-(keys.shape[1] + STEPS - 1) // 8) * 8 - keys.shape[1]
    keys, joined = keys[start:], torch.cat(queries)
    of_keys, of_queries = keys.new_zeros(len(keys), width), joined.new_zeros(len(joined), width)
    end = len(queries[0])
    for mark, (first, query) in enumerate(zip(firsts[1:], queries[1:], strict=True)):
        of_keys[: first - start, mark] = -MARK
        of_queries[end : end + len(query), mark] = MARK
        end += len(query)
    keys, joined = torch.cat([keys, of_keys], 1), torch.cat([joined, of_queries], 1)
    return info_nce(joined, keys, _targets(problem, start), reduction="sum").loss


def eager(problem: Problem) -> Tensor:
    losses = [
        F.cross_entropy(one @ problem.keys[first:].T, torch.arange(len(one), device=one.device), reduction="sum")
        for one, first in zip(problem.queries, problem.firsts, strict=True)
    ]
    return torch.stack(losses).sum()


def _targets(problem: Problem, start: int) -> Tensor:
    """Return the positives of all queries, counted from key ``start``: query i of a step has the step's key i."""
    device = problem.keys.device
    pairs = zip(problem.queries, problem.firsts, strict=True)
    return torch.cat([torch.arange(first - start, first - start + len(one), device=device) for one, first in pairs])


ALTERNATIVES: dict[str, Callable[[Problem], Tensor]] = {
    "eager": eager,
    "a call a step": call_a_step,
    "marks": with_marks,
    "ours": in_ranges,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=at_least(1), default=256, help="features of an encoding (default 256)")
    parser.add_argument("--repeats", type=at_least(2), default=20, help="rounds (default 20)")
    add_common_arguments(parser)
    return parser.parse_args()


def main(arguments: argparse.Namespace) -> None:
    results = []
    for batch in QUICK_BATCHES if arguments.quick else BATCHES:
        problem = make_problem(batch, arguments.dim, arguments.device)
        leaves = [problem.keys, *problem.queries]

        def both_passes(loss: Callable[[Problem], Tensor], problem=problem, leaves=leaves) -> Callable[[], object]:
            return lambda: torch.autograd.grad(loss(problem), leaves)

        calls = {name: both_passes(loss) for name, loss in ALTERNATIVES.items()}
        expected = calls["eager"]()
        for call in calls.values():
            for one, other in zip(call(), expected, strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
        plan = make_plan(calls, repeats=arguments.repeats, seconds=20, device=arguments.device)
        times = interleaved(
            calls, repeats=plan.repeats, warmup=plan.warmup, untimed=plan.untimed, device=arguments.device
        )
        print(f"{batch} images of {arguments.dim} features")
        for name, time in times.items():
            print(f"  {name:16} {time}", flush=True)
        results.append({"batch": batch, "seconds": {name: time.median for name, time in times.items()}})
    if arguments.out is not None:
        out = result_file(arguments.out, arguments.device, "cpc_steps")
        machine = describe(arguments.device)
        write_json(out, {"machine": machine, "dim": arguments.dim, "complete": True, "results": results})
        print(f"written: {out}")


if __name__ == "__main__":
    main(parse_arguments())
