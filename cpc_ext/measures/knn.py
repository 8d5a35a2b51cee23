"""Weighted nearest neighbours: how well the classes of the nearest encodings tell an image's.

From frozen encodings [N, D] to a score of every class: each of the k nearest votes for its class with exp(cosine / τ)
(Wu et al. 2018, arXiv 1805.01978, section 3.4). There is nothing to fit and nothing to choose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NEIGHBOURS", "TEMPERATURE", "knn_accuracy", "knn_scores"]

NEIGHBOURS = 200
TEMPERATURE = 0.07
# Images whose similarities to all labelled ones are in memory at a time.
_CHUNK = 1024


def knn_scores(
    labelled: Tensor,
    labels: Tensor,
    queries: Tensor,
    *,
    classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Tensor:
    """Votes for every class, float64 [M, classes], of queries [M, D] by labelled encodings [N, D] with labels [N].

    neighbours: k; all N vote where there are fewer. Votes are divided by the largest that one neighbour could give,
    exp(1 / temperature). ValueError for encodings that are not finite.
    """
    import torch

    from cpc_ext.measures.finite import check_finite
    from cpc_ext.nn.unit_length import unit_length

    check_finite("labelled", labelled)
    check_finite("queries", queries)
    keys = unit_length(labelled.double())
    votes = []
    for chunk in torch.split(queries.double(), _CHUNK):
        similarity, nearest = (unit_length(chunk) @ keys.T).topk(min(neighbours, len(keys)), dim=1)
        weights = ((similarity - 1) / temperature).exp()
        votes.append(weights.new_zeros(len(chunk), classes).scatter_add_(1, labels[nearest], weights))
    return torch.cat(votes)


def knn_accuracy(
    labelled: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    classes: int,
    neighbours: int = NEIGHBOURS,
) -> float:
    """The fraction of queries [M, D] whose class, of int64 [M], has the most votes; the others as of knn_scores."""
    scores = knn_scores(labelled, labels, queries, classes=classes, neighbours=neighbours)
    return (scores.argmax(1) == query_labels).double().mean().item()
