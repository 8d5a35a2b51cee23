"""Problems of info_nce and related ops: all keys and sampled ones, every option, both directions, exact ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpc_ext.op_checks.agreement import Problem
from cpc_ext.op_checks.draw import integers, normal
from cpc_ext.ops.info_nce import InfoNCEOutput, info_nce, info_nce_reference
from cpc_ext.ops.scores_logsumexp import scores_logsumexp, scores_logsumexp_reference
from cpc_ext.ops.sigmoid_contrast import sigmoid_contrast, sigmoid_contrast_reference

__all__ = ["PROBLEMS"]


class _Groups(NamedTuple):
    queries: Tensor
    keys: Tensor


def _loss_and_accuracy(contrast: Callable[..., InfoNCEOutput], /, **arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the results except ranks, which differ where scores are rounded."""
    return contrast(**arguments)[:2]


def _ranks(contrast: Callable[..., InfoNCEOutput], /, **arguments: Any) -> Tensor:
    return contrast(**arguments).rank


_OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "info_nce": (partial(_loss_and_accuracy, info_nce), partial(_loss_and_accuracy, info_nce_reference)),
    "scores_logsumexp": (scores_logsumexp, scores_logsumexp_reference),
    "sigmoid_contrast": (sigmoid_contrast, sigmoid_contrast_reference),
}


def _problem(
    label: str,
    batch: tuple[int, ...],
    rows: int,
    keys: int,
    dim: int,
    *,
    op: str = "info_nce",
    samples: int | None = None,
    targets: bool = True,
    positives: int = 0,
    weights: bool = False,
    exclude: bool = False,
    key_range: bool = False,
    learns: tuple[str, ...] = (),
    **options: Any,
) -> Problem:
    """positives: number per query, every other one absent; 0: one. learns: which of scale, key_bias, bias learn."""
    tensors = {"queries": normal(*batch, rows, dim, seed=1), "keys": normal(*batch, keys, dim, seed=2)}
    if weights:  # Queries whose weight is 0 are absent.
        tensors["weights"] = integers(4, *batch, rows, seed=3).double() / 2
    scale = 2 * dim**-0.5
    learned = {
        "scale": torch.tensor(scale, dtype=torch.float64),
        "key_bias": normal(*batch, keys, seed=6),
        "bias": torch.tensor(-3.0, dtype=torch.float64),
    }
    tensors |= {name: learned[name] for name in learns}
    if "scale" not in learns:
        options["scale"] = scale
    others: dict[str, Any] = {}
    if positives:
        named = integers(keys, *batch, rows, positives, seed=4)
        others["targets"] = torch.where(torch.arange(positives) % 2 == 1, -1, named)
    elif targets:
        others["targets"] = integers(keys, *batch, rows, seed=4)
    if samples is not None:
        others["negatives"] = integers(keys, *batch, rows, samples, seed=5)
    if exclude:
        nearest = others.get("targets", torch.zeros(*batch, rows, dtype=torch.int64))
        others["exclude"] = ((nearest.max(-1, keepdim=True).values if positives else nearest) + 1) % keys
        if positives:
            others["exclude"] = others["exclude"].masked_fill((others["exclude"] == nearest).any(-1, keepdim=True), -1)
    if key_range:
        others["key_range"] = integers(keys + 1, *batch, rows, 2, seed=7).sort(-1).values
    if "contrast" in options:
        # Numbers of groups differ only above their low 32 bits, and some queries' groups have no key.
        others["groups"] = _Groups(integers(4, *batch, rows, seed=8) << 32, integers(3, *batch, keys, seed=9) << 32)
    call, reference = (partial(function, **options) for function in _OPS[op])
    return Problem(op=op, label=label, call=call, reference=reference, differentiable=tensors, others=others)


def _exact_ranks(samples: int | None) -> Problem:
    """Make a problem whose scores are small integers, exact in every dtype, so that many tie."""
    others = {"targets": integers(70, 40, seed=4)}
    if samples is not None:
        others["negatives"] = integers(70, 40, samples, seed=5)
    tensors = {"queries": integers(5, 40, 6, seed=1).double() - 2, "keys": integers(5, 70, 6, seed=2).double() - 2}
    return Problem(
        op="info_nce",
        label="exact ranks" if samples is None else "exact ranks, sampled",
        call=partial(_ranks, info_nce),
        reference=partial(_ranks, info_nce_reference),
        differentiable=tensors,
        others=others,
    )


_log_sums = partial(_problem, op="scores_logsumexp", targets=False)
_sigmoids = partial(_problem, op="sigmoid_contrast")
_both_ways = partial(_problem, targets=False, symmetric=True)

PROBLEMS = [
    _problem("all keys, tiles", (), 128, 192, 64),
    _problem("all keys, odd sizes", (2,), 67, 131, 37, exclude=True, weights=True),
    _problem("all keys, positives on the diagonal", (3,), 5, 5, 1, targets=False),
    _problem("all keys, each loss", (), 33, 70, 16, reduction="none"),
    _problem("all keys, several positives", (2,), 35, 67, 19, positives=5, exclude=True, reduction="sum"),
    _problem("all keys, learned scale and biases", (), 40, 65, 24, learns=("scale", "key_bias"), weights=True),
    _problem("all keys, ranges", (2,), 33, 50, 9, key_range=True),
    _problem("all keys, same group", (), 33, 50, 9, contrast="same"),
    _problem("all keys, every option", (2,), 20, 70, 12, positives=3, weights=True, exclude=True, key_range=True,
             learns=("scale", "key_bias"), contrast="other"),
    _problem("sampled", (2,), 40, 50, 64, samples=16),
    _problem("sampled, odd sizes", (), 35, 9, 19, samples=33, exclude=True, weights=True),
    _problem("sampled, sum", (), 7, 3, 5, samples=1, reduction="sum"),
    _problem("sampled, every option", (2,), 20, 40, 12, samples=9, positives=3, weights=True, exclude=True,
             key_range=True, learns=("scale", "key_bias"), contrast="other"),
    _problem("no queries", (2,), 0, 4, 8),
    _exact_ranks(None),
    _exact_ranks(17),
    _both_ways("both ways", (), 64, 64, 32),
    _both_ways("both ways, every option", (2,), 37, 37, 11, weights=True, key_range=True,
               learns=("scale", "key_bias"), contrast="other"),
    _log_sums("all keys", (2,), 33, 70, 16),
    _log_sums("every option", (), 40, 17, 11, exclude=True, learns=("scale", "key_bias"), contrast="same"),
    _sigmoids("positives on the diagonal", (2,), 33, 70, 16, targets=False, bias=-10.0),
    _sigmoids("learned scale and bias", (), 40, 65, 11, positives=3, weights=True, learns=("scale", "bias"),
              reduction="none"),
]  # fmt: skip
