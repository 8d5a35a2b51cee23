"""Weighted nearest-neighbour classification of images by frozen encodings [N, D].

Each of the k nearest neighbours votes for its class with weight exp(cosine / τ) (Wu et al. 2018, arXiv 1805.01978,
section 3.4). Nothing is fitted and no hyperparameter is tuned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NEIGHBOURS", "TEMPERATURE", "knn_accuracy", "knn_scores"]

NEIGHBOURS = 200
TEMPERATURE = 0.07
# Number of images whose similarities to all labelled ones are in memory at a time.
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
    """Return votes for every class, float64 [M, classes], for queries [M, D] by labelled encodings [N, D], labels [N].

    neighbours: k; if there are fewer, all N vote. Votes are divided by exp(1 / temperature), the largest that one
    neighbour can give. ValueError for encodings that are not finite.
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
    """Return the fraction of queries [M, D] whose class, int64 [M], gets the most votes; see :func:`knn_scores`."""
    scores = knn_scores(labelled, labels, queries, classes=classes, neighbours=neighbours)
    return (scores.argmax(1) == query_labels).double().mean().item()
