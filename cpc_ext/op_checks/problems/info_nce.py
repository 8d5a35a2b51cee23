"""Problems of info_nce: all keys and sampled ones, with and without targets, weights and exclusions."""

from __future__ import annotations

from functools import partial
from typing import Any

from cpc_ext.op_checks.agreement import Problem
from cpc_ext.op_checks.draw import integers, normal
from cpc_ext.ops.info_nce import info_nce, info_nce_reference

__all__ = ["PROBLEMS"]


def _problem(
    label: str,
    batch: tuple[int, ...],
    rows: int,
    keys: int,
    dim: int,
    *,
    samples: int | None = None,
    targets: bool = True,
    weights: bool = False,
    exclude: bool = False,
    reduction: str = "mean",
) -> Problem:
    tensors = {"queries": normal(*batch, rows, dim, seed=1), "keys": normal(*batch, keys, dim, seed=2)}
    if weights:  # Some of them 0: those queries are absent.
        tensors["weights"] = integers(4, *batch, rows, seed=3).double() / 2
    others = {}
    if targets:
        others["targets"] = integers(keys, *batch, rows, seed=4)
    if samples is not None:
        others["negatives"] = integers(keys, *batch, rows, samples, seed=5)
    if exclude:
        others["exclude"] = (others["targets"] + 1) % keys
    options: dict[str, Any] = {"scale": 2 * dim**-0.5, "reduction": reduction}
    return Problem(
        op="info_nce",
        label=label,
        call=partial(info_nce, **options),
        reference=partial(info_nce_reference, **options),
        differentiable=tensors,
        others=others,
    )


PROBLEMS = [
    _problem("all keys, tiles", (), 128, 192, 64),
    _problem("all keys, odd sizes", (2,), 67, 131, 37, exclude=True, weights=True),
    _problem("all keys, positives on the diagonal", (3,), 5, 5, 1, targets=False),
    _problem("all keys, each loss", (), 33, 70, 16, reduction="none"),
    _problem("sampled", (2,), 40, 50, 64, samples=16),
    _problem("sampled, odd sizes", (), 35, 9, 19, samples=33, exclude=True, weights=True),
    _problem("sampled, sum", (), 7, 3, 5, samples=1, reduction="sum"),
    _problem("no queries", (2,), 0, 4, 8),
]
