"""The contrast in plain PyTorch, with its scores in memory: [B, M, N], or gathered keys [B, M, P + S, D]."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext.ops._contrast_problem import Contrast, Gradients, default_targets, sums_dtype

__all__ = ["each_query", "gradients", "losses_and_ranks"]


class _Scores(NamedTuple):
    """Scores with a column for each key, C = N, or with sampled negatives for each key named, C = P + S.

    Attributes:
        dots, scores: [B, M, C], dot products, and these with scale and bias.
        keys: [B, M, C, D] gathered, or [B, N, D].
        named: [B, M, C], the index of each column's key; None where the columns are the keys.
        positives: [B, M, C] bool, the query's positives.
        rivals: [B, M, C] bool, the keys contrasted with them.
        counted: [B, M, C] bool, the rivals that count in the rank.
        in_columns: [B, M, C] bool, the terms of the columns' log-sums in a symmetric contrast.
        valid: [B, M] bool, queries whose indices and ranges are valid.
    """

    dots: Tensor
    scores: Tensor
    keys: Tensor
    named: Tensor | None
    positives: Tensor
    rivals: Tensor
    counted: Tensor
    in_columns: Tensor
    valid: Tensor


def losses_and_ranks(problem: Contrast, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the loss and rank of every query, [B, M]; the loss is differentiable any number of times.

    present: [B, M], the queries that are in the columns of a symmetric contrast; None: all.
    """
    s = _scores(problem, present)
    return _losses(problem, s), _ranks(s)


def each_query(
    problem: Contrast, thresholds: Tensor | None, present: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return each query's loss, rank, derivative of the loss in the scale, and best positive's score, [B, M]."""
    s = _scores(problem, present)
    losses = torch.where(s.valid, _losses(problem, s), math.nan)
    slopes = torch.where(s.valid, _slopes_in_scale(problem, s), math.nan)
    return losses, torch.where(s.valid, _ranks(s, thresholds), -1), slopes, torch.where(s.valid, _best(s), math.nan)


def gradients(
    problem: Contrast, row_weights: Tensor, needs: Sequence[bool], present: Tensor | None = None
) -> Gradients:
    """Return the gradients of the sum of row weights [B, M] times losses, in queries, keys and biases as needed.

    present: [B, M], which queries are present; None: those of a weight other than 0.

    They are written out, because autograd is not available in an op's forward pass, which forms gradients, too.
    """
    if problem.keys is None:
        apart = problem._replace(keys=problem.queries)
        both = gradients(apart, row_weights, [needs[0], needs[0], needs[2]], present)
        return both._replace(queries=both.queries + both.keys, keys=both.keys.new_empty(0))
    queries, keys = problem.queries, problem.keys
    results = [queries.new_empty(0), keys.new_empty(0), keys.new_empty(0, dtype=sums_dtype(queries))]
    if not any(needs):
        return Gradients(*results)
    present = row_weights != 0 if present is None else present
    # Absent rows may hold anything, such as NaN.
    problem = problem._replace(queries=torch.where(present.unsqueeze(-1), queries, 0))
    s = _scores(problem, present)
    counts = (s.valid & present).unsqueeze(-1)
    slopes = torch.where(counts, _slopes(problem, s, torch.where(counts.squeeze(-1), row_weights, 0)), 0)
    scale = _scale(problem)
    q = torch.where(counts, problem.queries.to(slopes.dtype), 0)
    if needs[0]:
        of_queries = slopes @ s.keys if s.named is None else (slopes.unsqueeze(-2) @ s.keys).squeeze(-2)
        of_queries = torch.where(counts, of_queries * scale, 0)
        results[0] = torch.where(counts | ~present.unsqueeze(-1), of_queries, math.nan).to(queries.dtype)
    if s.named is None:
        if needs[1]:
            results[1] = (slopes.mT @ q * scale).to(keys.dtype)
        if needs[2]:
            results[2] = slopes.sum(1)
        return Gradients(*results)
    first = torch.arange(keys.shape[0], device=keys.device).mul_(keys.shape[1]).view(-1, 1, 1)
    places = (s.named + first).flatten()
    if needs[1]:
        of_pairs = slopes.unsqueeze(-1) * q.unsqueeze(-2)
        sums = of_pairs.new_zeros((keys.shape[:2].numel(), keys.shape[2]))
        results[1] = (sums.index_add_(0, places, of_pairs.flatten(0, 2)) * scale).view(keys.shape).to(keys.dtype)
    if needs[2]:
        results[2] = (
            slopes.new_zeros(keys.shape[:2].numel()).index_add_(0, places, slopes.flatten()).view(keys.shape[:2])
        )
    return Gradients(*results)


def _scale(problem: Contrast) -> Tensor | float:
    return problem.scale if problem.scales is None else problem.scale * problem.scales.squeeze(0)


def _scores(problem: Contrast, present: Tensor | None = None) -> _Scores:
    queries, keys = (tensor.to(sums_dtype(problem.queries)) for tensor in (problem.queries, problem.contrasted()))
    num_keys = keys.shape[1]
    last = max(num_keys - 1, 0)
    targets, exclude = problem.targets, problem.exclude
    if targets is None:
        targets = default_targets(queries)
        if problem.measure == "log_sum":
            targets = targets[..., :0]
    valid = torch.ones(queries.shape[:2], dtype=torch.bool, device=queries.device)
    for indices, least in ((targets, -1), (problem.negatives, 0), (exclude, -1)):
        if indices is not None:
            valid = valid & ((indices >= least) & (indices < num_keys)).all(-1)
    if exclude is not None:
        valid = valid & ~((targets.unsqueeze(-1) == exclude.unsqueeze(-2)) & (targets >= 0).unsqueeze(-1)).any((-2, -1))
    if problem.key_range is not None:
        begin, end = problem.key_range.unbind(-1)
        valid = valid & (begin >= 0) & (begin <= end) & (end <= num_keys)
    there = (targets >= 0) & (targets < num_keys)
    within = targets.clamp(0, last)
    named = None
    if problem.negatives is None:
        dots = queries @ keys.mT
        contrasted = torch.arange(num_keys, device=keys.device).expand(dots.shape)
        # Targets of -1 go to an additional column, which is cut off.
        places = dots.new_zeros((*dots.shape[:2], num_keys + 1), dtype=torch.bool)
        positives = places.scatter(2, torch.where(there, within, num_keys), torch.ones_like(there))[..., :num_keys]
        rivals = ~positives
        counted = rivals
    else:
        named = torch.cat([within, problem.negatives.clamp(0, last)], dim=-1)
        keys = _gather_keys(keys, named) if num_keys else keys.new_zeros(*named.shape, keys.shape[2])
        dots = (keys @ queries.unsqueeze(-1)).squeeze(-1)
        contrasted = named
        positives = torch.cat([there, torch.zeros_like(problem.negatives, dtype=torch.bool)], dim=-1)
        rivals = torch.cat([torch.zeros_like(there), torch.ones_like(problem.negatives, dtype=torch.bool)], dim=-1)
        own = ((named.unsqueeze(-1) == within.unsqueeze(-2)) & there.unsqueeze(-2)).any(-1)
        counted = rivals & ~own
    allowed = _allowed(problem, contrasted)
    rivals = rivals & allowed
    in_columns = positives | (rivals if present is None else rivals & present.unsqueeze(-1))
    bias: Tensor | float = 0.0
    if problem.key_bias is not None:
        bias = problem.key_bias.to(dots.dtype).unsqueeze(1).expand(*queries.shape[:2], num_keys)
        bias = bias if named is None else bias.gather(2, named)
    scores = dots * _scale(problem) + bias
    return _Scores(dots, scores, keys, named, positives, rivals, counted & allowed, in_columns, valid)


def _allowed(problem: Contrast, contrasted: Tensor) -> Tensor:
    """Return which keys [B, M, C] key_range, exclude and groups allow."""
    allowed = torch.ones_like(contrasted, dtype=torch.bool)
    if problem.exclude is not None:
        for one in problem.exclude.unbind(-1):
            allowed = allowed & (contrasted != one.unsqueeze(-1))
    if problem.key_range is not None:
        begin, end = problem.key_range.unsqueeze(-2).unbind(-1)
        allowed = allowed & (contrasted >= begin) & (contrasted < end)
    if problem.query_groups is not None and problem.key_groups is not None:
        of_keys = problem.key_groups.unsqueeze(1).expand(*contrasted.shape[:2], problem.key_groups.shape[1])
        of_keys = of_keys if problem.negatives is None else of_keys.gather(2, contrasted)
        same = of_keys == problem.query_groups.unsqueeze(-1)
        allowed = allowed & (same if problem.contrast == "same" else ~same)
    return allowed


def _gather_keys(keys: Tensor, indices: Tensor) -> Tensor:
    """Gather keys [B, N, D] at indices [B, M, S] → [B, M, S, D]."""
    batch, num_keys, dim = keys.shape
    first = torch.arange(batch, device=keys.device).mul_(num_keys).view(batch, 1, 1)
    # The backward of an embedding look-up sums the gradients of repeated keys far faster than that of indexing.
    return F.embedding(indices + first, keys.reshape(batch * num_keys, dim))


def _log_sum(scores: Tensor, of: Tensor, dim: int) -> Tensor:
    """Return the log-sum-exp of the scores that ``of`` selects; of none, -inf with a gradient of 0, not NaN."""
    some = of.any(dim, keepdim=True)
    total = torch.where(of | ~some, torch.where(some, scores, 0), -math.inf).logsumexp(dim)
    return torch.where(some.squeeze(dim), total, -math.inf)


def _losses(problem: Contrast, s: _Scores) -> Tensor:
    count = s.positives.sum(-1)
    if problem.measure == "log_sum":
        return _log_sum(s.scores, s.rivals, -1)
    if problem.measure == "sigmoid":
        # Exact for all scores; softplus is not beyond its threshold.
        losses = -F.logsigmoid(torch.where(s.positives, s.scores, -s.scores))
        losses = torch.where(s.positives | s.rivals, losses, 0).sum(-1)
        return torch.where(count > 0, losses, 0)
    positive = torch.where(s.positives, s.scores, 0).sum(-1) / count.clamp_min(1)
    losses = _log_sum(s.scores, s.positives | s.rivals, -1) - positive
    if problem.symmetric:
        losses = (losses + _log_sum(s.scores, s.in_columns, 1) - positive) / 2
    return torch.where(count > 0, losses, 0)


def _slopes(problem: Contrast, s: _Scores, row_weights: Tensor) -> Tensor:
    """Return the derivative in the scores, [B, M, C], of the losses [B, M] times the row weights."""
    weights = row_weights.unsqueeze(-1)
    contrasted = s.positives | s.rivals
    count = s.positives.sum(-1, keepdim=True)
    if problem.measure == "sigmoid":
        slopes = torch.where(s.positives, -(-s.scores).sigmoid(), s.scores.sigmoid())
        return torch.where(contrasted & (count > 0), weights * slopes, 0)
    scores = torch.where(contrasted, s.scores, -math.inf)
    pulls = torch.where(s.positives, weights / count.clamp_min(1), 0)
    slopes = torch.where(contrasted.any(-1, keepdim=True), scores.softmax(-1), 0) * weights - pulls
    if problem.symmetric:
        columns = torch.where(s.in_columns, s.scores, -math.inf).softmax(1) * row_weights.unsqueeze(-2)
        slopes = (slopes + columns - torch.where(s.positives, weights, 0)) / 2
    return slopes if problem.measure == "log_sum" else torch.where(count > 0, slopes, 0)


def _slopes_in_scale(problem: Contrast, s: _Scores) -> Tensor:
    """Return the derivative of every query's loss in the scale, [B, M]."""
    ones = s.scores.new_ones(s.scores.shape[:2])
    one_way = problem._replace(symmetric=False)

    def of_rows(s: _Scores) -> Tensor:
        slopes = _slopes(one_way, s, ones)
        return torch.where(slopes == 0, 0, slopes * s.dots).sum(-1)

    if not problem.symmetric:
        return of_rows(s)
    turned = s._replace(dots=s.dots.mT, scores=s.scores.mT, positives=s.positives.mT, rivals=s.in_columns.mT)
    return (of_rows(s) + of_rows(turned)) / 2


def _best(s: _Scores) -> Tensor:
    lowest = s.scores.new_full((*s.scores.shape[:2], 1), -math.inf)
    return torch.cat([lowest, torch.where(s.positives, s.scores, -math.inf)], -1).amax(-1)


@torch.no_grad()
def _ranks(s: _Scores, thresholds: Tensor | None = None) -> Tensor:
    best = _best(s)
    if thresholds is not None:
        best = torch.where(s.positives.any(-1), best, thresholds.to(best.dtype))
    # NaN counts as not below the best.
    return (s.counted & ~(s.scores < best.unsqueeze(-1))).sum(-1)
