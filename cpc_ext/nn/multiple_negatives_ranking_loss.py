"""The losses that sentence-transformers trains retrieval with: an anchor identifies its text among all of the batch.

Embeddings of anchors, of their positives and of hard negatives, [B, D] each, give a scalar.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpc_ext.nn.across_ranks import EXCHANGES, exchange_with, ring_info_nce
from cpc_ext.nn.typed import Module
from cpc_ext.nn.unit_length import unit_length
from cpc_ext.ops._checks import check_floating
from cpc_ext.ops._contrast_arguments import check_positive
from cpc_ext.ops._library import without_autocast
from cpc_ext.ops.info_nce import info_nce
from cpc_ext.ops.scores_logsumexp import scores_logsumexp

__all__ = ["MultipleNegativesRankingLoss"]

_SIMILARITIES = ("cos_sim", "dot_score")
_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
_PARTITIONS = ("joint", "per_direction")


class MultipleNegativesRankingLoss(Module):
    """sentence-transformers' loss of this name with its options (Henderson et al. 2017, arXiv 1705.00652).

    With s the scaled similarity, anchor (query) a_i, its positive p_i and all documents d of the batch, which are the
    positives and then the hard negatives, ``loss_i = log Z_i - s(a_i, p_i)``, and the loss is the mean over i. Z_i sums
    exp(s) over the directions: query_to_doc, s(a_i, d) for all documents; query_to_query, s(a_i, a_j) for all other
    anchors; doc_to_query, s(a_j, p_i) for all anchors; doc_to_doc, s(p_i, d) for all documents of other anchors. All
    four together are GTE's loss (Li et al. 2023, arXiv 2308.03281); query_to_doc and doc_to_query per direction are
    that of the former MultipleNegativesSymmetricRankingLoss.

    Their loss passes sentences through a model; this one takes embeddings. To train their models with it::

        class Loss(sentence_transformers.losses.MultipleNegativesRankingLoss):
            fast = cpc_ext.nn.MultipleNegativesRankingLoss()

            def compute_loss_from_embeddings(self, embeddings, labels):
                return self.fast(*embeddings)

    Args:
        scale: factor of similarities, positive.
        similarity_fct: "cos_sim" or "dot_score".
        directions: the directions that Z_i sums over, including "query_to_doc".
        partition_mode: "joint", one Z_i of all directions, or "per_direction", the mean of a log Z_i for each; the
            latter only for query_to_doc and doc_to_query, as the others do not contain the positive.
        gather_negatives: whose texts to contrast where several processes share a batch: "none", the process's own;
            "gather", those of all, as sentence-transformers' ``gather_across_devices`` does; "ring", the same without
            holding them all at once, for the directions query_to_doc and doc_to_query. The loss is that of the
            process's own anchors.

    Raises:
        TypeError, ValueError: an argument of another type or value.
    """

    def __init__(
        self,
        scale: float = 20.0,
        similarity_fct: str = "cos_sim",
        *,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        gather_negatives: str = "none",
    ) -> None:
        super().__init__()
        check_positive("scale", scale)
        for name, choice, allowed in (
            ("similarity_fct", similarity_fct, _SIMILARITIES),
            *(("directions", direction, _DIRECTIONS) for direction in directions),
            ("partition_mode", partition_mode, _PARTITIONS),
            ("gather_negatives", gather_negatives, EXCHANGES),
        ):
            if choice not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {choice!r}")
        if "query_to_doc" not in directions:
            raise ValueError(f"directions must include query_to_doc, got {tuple(directions)}")
        if among := sorted({"query_to_query", "doc_to_doc"}.intersection(directions)):
            if partition_mode == "per_direction":
                raise ValueError(f'partition_mode="per_direction" has no positive in {" and ".join(among)}')
            if gather_negatives == "ring":
                raise ValueError(f'gather_negatives="ring" has no {" and ".join(among)}')
        self.scale = scale
        self.similarity_fct = similarity_fct
        self.directions = tuple(dict.fromkeys(directions))
        self.partition_mode = partition_mode
        self.gather_negatives = gather_negatives

    def forward(self, anchors: Tensor, positives: Tensor, *hard_negatives: Tensor) -> Tensor:
        """Compute the loss, in float32, or float64 for float64 inputs, even under autocast.

        Args:
            anchors: floating [B, D].
            positives: [B, D]; row i is the positive of anchor i.
            hard_negatives: any number of [B, D]; row i of each is a hard negative of anchor i.

        Raises:
            TypeError: embeddings that are not floating tensors.
            ValueError: embeddings of different shapes, or none.
        """
        embeddings = (anchors, positives, *hard_negatives)
        for place, one in enumerate(embeddings):
            check_floating(("anchors", "positives")[place] if place < 2 else f"hard_negatives[{place - 2}]", one)
        if anchors.ndim != 2 or anchors.shape[0] == 0 or any(one.shape != anchors.shape for one in embeddings):
            shapes = ", ".join(str(tuple(one.shape)) for one in embeddings)
            raise ValueError(f"embeddings must all be [B, D] of one shape, got {shapes}")
        # At least in float32, even under autocast: a scale of 20 multiplies rounding of the similarity by that.
        with without_autocast(anchors.device):
            wide = [one.to(torch.promote_types(one.dtype, torch.float32)) for one in embeddings]
            if self.similarity_fct == "cos_sim":
                wide = [unit_length(one) for one in wide]
            return self._loss(wide[0], wide[1:])

    def _loss(self, anchors: Tensor, docs: list[Tensor]) -> Tensor:
        """Return the loss of anchors [B, D] with ``docs``, their positives and hard negatives."""
        exchange = exchange_with(self.gather_negatives)
        positives, batch = docs[0], anchors.shape[0]
        joint = self.partition_mode == "joint" and len(self.directions) > 1
        if not joint and len(self.directions) == 2 and len(docs) == 1 and exchange.world == 1:
            return info_nce(anchors, positives, scale=self.scale, symmetric=True).loss
        every = torch.cat([exchange.gathered(doc) for doc in docs])
        queries = exchange.gathered(anchors) if len(self.directions) > 1 else anchors
        own = torch.arange(batch, device=anchors.device) + exchange.own_of(batch).start

        def find(rows: Tensor, keys: Tensor) -> Tensor:
            """Return log Z - s(a, p), or its mean, where the positive is among the keys."""
            if exchange.ring:
                losses = ring_info_nce(rows, keys, own, scale=self.scale).loss
                return losses if joint else losses.mean()
            # Gradients of a mean are formed with the loss.
            return info_nce(rows, keys, own, scale=self.scale, reduction="none" if joint else "mean").loss

        logs = []
        for direction in self.directions:
            if direction == "query_to_doc":
                logs.append(find(anchors, every))
            elif direction == "doc_to_query":
                logs.append(find(positives, queries))
            else:
                rows, keys = (anchors, queries) if direction == "query_to_query" else (positives, every)
                related = own.unsqueeze(1) + torch.arange(0, keys.shape[0], queries.shape[0], device=own.device)
                log_sum = scores_logsumexp(rows, keys, scale=self.scale, exclude=related)
                logs.append(log_sum - self.scale * (anchors * positives).sum(1))
        stacked = torch.stack(logs)
        return (stacked.logsumexp(0) if joint else stacked).mean()

    def extra_repr(self) -> str:
        return (
            f"scale={self.scale}, similarity_fct={self.similarity_fct}, directions={self.directions}, "
            f"partition_mode={self.partition_mode}, gather_negatives={self.gather_negatives}"
        )
