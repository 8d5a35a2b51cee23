"""sentence-transformers' MultipleNegativesRankingLoss, from its own values and, where it is installed, by its side."""

import pytest
import torch
from torch.autograd import grad

from cpc_ext.nn import MultipleNegativesRankingLoss

EXACT = {"atol": 1e-12, "rtol": 0}
ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH_WAYS = ("query_to_doc", "doc_to_query")
# Number of hard negatives of each anchor, and options.
CASES = {
    "pairs": (0, {}),
    "hard": (2, {}),
    "dot": (1, {"scale": 0.7, "similarity_fct": "dot_score"}),
    "symmetric": (0, {"directions": BOTH_WAYS, "partition_mode": "per_direction"}),
    "symmetric_hard": (2, {"directions": BOTH_WAYS, "partition_mode": "per_direction", "scale": 5.0}),
    "two_joint": (1, {"directions": BOTH_WAYS}),
    "gte": (0, {"directions": ALL_DIRECTIONS}),
    "gte_hard": (2, {"directions": ALL_DIRECTIONS, "scale": 5.0}),
}


def found(loss, embeddings):
    """The loss and its gradients by name."""
    names = ["anchors", "positives", "hard.0", "hard.1"]
    gradients = grad(loss, embeddings)
    return {"loss": loss.detach(), **{f"grad_{name}": one for name, one in zip(names, gradients, strict=False)}}


def embeddings_of(tensors, hard, dtype=torch.float64):
    names = ["anchors", "positives", "hard.0", "hard.1"][: 2 + hard]
    return [tensors[name].to(dtype).requires_grad_() for name in names]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_multiple_negatives(golden, case, dtype):
    problem = golden("sentence_transformers.multiple_negatives")
    hard, options = CASES[case]
    embeddings = embeddings_of(problem.tensors, hard, dtype)
    tolerance = EXACT if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
    for name, value in found(MultipleNegativesRankingLoss(**options)(*embeddings), embeddings).items():
        torch.testing.assert_close(value, problem.tensors[f"{case}.{name}"].to(dtype), **tolerance)


@pytest.mark.parametrize("case", CASES)
def test_beside_the_original(case):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses", exc_type=ImportError)
    hard, options = CASES[case]
    generator = torch.Generator().manual_seed(1)
    embeddings = [torch.randn(9, 5, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2 + hard)]
    ours = found(MultipleNegativesRankingLoss(**options)(*embeddings), embeddings)
    theirs = found(original(losses, options)(embeddings, None), embeddings)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **EXACT)


def original(losses, options):
    """Return the library's loss as a function of embeddings."""
    from sentence_transformers import util

    options = dict(options)
    if "similarity_fct" in options:
        options["similarity_fct"] = getattr(util, options["similarity_fct"])
    return losses.MultipleNegativesRankingLoss(None, **options).compute_loss_from_embeddings
