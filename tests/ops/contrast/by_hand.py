"""Contrasts written out in float64, one query after the other, from the sets of keys that info_nce describes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["ByHand", "contrast_by_hand"]


class ByHand(NamedTuple):
    """Losses, bounds on the ranks of rounded scores (least, most), and whether a query has a positive, all [*, M]."""

    losses: Tensor
    least: Tensor
    most: Tensor
    present: Tensor


def contrast_by_hand(
    queries: Tensor, keys: Tensor, *, measure: str = "softmax", unsure: float = 0.0, **options: Any
) -> ByHand:
    """Losses and ranks by the options of info_nce, for "log_sum" and "sigmoid" as well.

    unsure: how far a score may be off, as a share of it.
    """
    if queries.ndim > 2:
        entries = [
            contrast_by_hand(q, k, measure=measure, unsure=unsure, **_of_entry(options, index))
            for index, (q, k) in enumerate(zip(queries, keys, strict=True))
        ]
        if not entries:
            empty = queries.new_zeros(queries.shape[:-1])
            return ByHand(empty, empty.long(), empty.long(), empty.bool())
        return ByHand(*map(torch.stack, zip(*entries, strict=True)))
    return _Entry(queries, keys, measure, unsure, options).results()


def _of_entry(options: dict[str, Any], index: int) -> dict[str, Any]:
    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(of, value))
        return value[index] if isinstance(value, Tensor) and value.ndim else value

    return {name: of(value) for name, value in options.items()}


class _Entry:
    """The contrast of queries [M, D] with keys [N, D]."""

    def __init__(self, queries: Tensor, keys: Tensor, measure: str, unsure: float, options: dict[str, Any]) -> None:
        self.queries, self.keys, self.measure, self.unsure, self.options = queries, keys, measure, unsure, options
        given: Callable[[str], Any] = options.get
        self.lists = {
            name: None if given(name) is None else [row.reshape(-1).tolist() for row in given(name)]
            for name in ("targets", "negatives", "exclude", "key_range")
        }
        self.groups = None if given("groups") is None else [side.tolist() for side in given("groups")]
        self.absent = [False] * len(queries) if given("weights") is None else (given("weights") == 0).tolist()
        self.sets = [self._sets(m) for m in range(len(queries))]
        # The queries that contrast each key.
        self.contrasting: list[list[int]] = [[] for _ in keys]
        for m, (_, contrasted) in enumerate(self.sets):
            for n in contrasted:
                self.contrasting[n].append(m)

    def _sets(self, m: int) -> tuple[list[int], list[int]]:
        """Return the positives P and the contrasted keys C of query m; sampled keys as often as they were drawn."""
        of_query = {name: values[m] for name, values in self.lists.items() if values is not None}
        positives = set() if self.measure == "log_sum" else set(of_query.get("targets", [m])) - {-1}
        begin, end = of_query.get("key_range", (0, len(self.keys)))
        excluded = set(of_query.get("exclude", ()))
        same = self.options.get("contrast", "all") == "same"

        def contrasted(n: int) -> bool:
            return (
                begin <= n < end
                and n not in excluded
                and (self.groups is None or (self.groups[0][m] == self.groups[1][n]) == same)
            )

        drawn = of_query.get("negatives")
        candidates = drawn if drawn is not None else [n for n in range(len(self.keys)) if n not in positives]
        return sorted(positives), [n for n in candidates if contrasted(n)]

    def scores(self, rows: list[int], columns: list[int]) -> Tensor:
        """Compute the scores of pairs, [len(rows)]. Other rows and columns, which may hold NaN, are not read."""
        if not rows:
            return self.queries.new_zeros(0)
        scores = self.options.get("scale", 1.0) * (self.queries[rows] * self.keys[columns]).sum(-1)
        bias = self.options.get("key_bias")
        return scores if bias is None else scores + bias[columns]

    def results(self) -> ByHand:
        losses, least, most, present = [], [], [], []
        for m, (positives, contrasted) in enumerate(self.sets):
            good, bad = (self.scores([m] * len(columns), columns) for columns in (positives, contrasted))
            losses.append(self._loss(m, good, bad))
            best = float(good.detach().max()) if len(good) else -torch.inf
            counted = [float(s) for n, s in zip(contrasted, bad.detach(), strict=True) if n not in positives]
            slack = self.unsure * (1 + abs(best)) if len(good) else 0.0
            least.append(sum(not score < best + slack for score in counted))
            most.append(sum(not score < best - slack for score in counted))
            present.append(bool(positives) or self.measure == "log_sum")
        empty = self.queries.new_zeros(0)
        return ByHand(
            torch.stack(losses) if losses else empty,
            torch.tensor(least, dtype=torch.int64),
            torch.tensor(most, dtype=torch.int64),
            torch.tensor(present, dtype=torch.bool),
        )

    def _loss(self, m: int, good: Tensor, bad: Tensor) -> Tensor:
        if self.measure == "log_sum":
            return bad.logsumexp(0) if len(bad) else self.queries.new_tensor(-torch.inf)
        if not len(good):
            return self.queries.new_zeros(())
        if self.measure == "sigmoid":
            return -torch.nn.functional.logsigmoid(torch.cat([good, -bad])).sum()
        loss = torch.cat([good, bad]).logsumexp(0) - good.mean()
        if not self.options.get("symmetric"):
            return loss
        (own,) = self.sets[m][0]
        others = [other for other in self.contrasting[own] if other != m and not self.absent[other]]
        column = self.scores([m, *others], [own] * (1 + len(others)))
        return (loss + column.logsumexp(0) - column[0]) / 2
