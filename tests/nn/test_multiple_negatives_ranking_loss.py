"""Accepted and refused arguments of the loss; its values are tested in tests/golden/test_sentence_transformers.py."""

import pytest
import torch

from cpc_ext.nn import MultipleNegativesRankingLoss, multiple_negatives_ranking_loss

BOTH_WAYS = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}


def draw(count=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 4, generator=generator).to(dtype) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_scale_multiplies_no_rounding(dtype):
    embeddings = [one.bfloat16().to(dtype) for one in draw(3)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = MultipleNegativesRankingLoss()(*embeddings)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, MultipleNegativesRankingLoss()(*(one.float() for one in embeddings)))


def test_both_ways_are_one_pass(monkeypatch):
    calls = []

    def counted(*arguments, **options):
        calls.append(options)
        return info_nce(*arguments, **options)

    info_nce = multiple_negatives_ranking_loss.info_nce
    monkeypatch.setattr(multiple_negatives_ranking_loss, "info_nce", counted)
    MultipleNegativesRankingLoss(**BOTH_WAYS)(*draw())
    assert [call.get("symmetric") for call in calls] == [True]


def test_a_direction_named_twice_is_one():
    assert MultipleNegativesRankingLoss(directions=["query_to_doc"] * 2).directions == ("query_to_doc",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0}, "scale must be positive, got 0"),
        ({"similarity_fct": "dot"}, "similarity_fct must be one of cos_sim, dot_score, got 'dot'"),
        ({"directions": ("doc",)}, "directions must be one of query_to_doc, .*, got 'doc'"),
        ({"directions": ("doc_to_query",)}, r"directions must include query_to_doc, got \('doc_to_query',\)"),
        ({"directions": ()}, r"directions must include query_to_doc, got \(\)"),
        ({"partition_mode": "each"}, "partition_mode must be one of joint, per_direction, got 'each'"),
        ({"gather_negatives": "all"}, "gather_negatives must be one of none, gather, ring, got 'all'"),
        (
            {"directions": ("query_to_doc", "query_to_query"), "partition_mode": "per_direction"},
            'partition_mode="per_direction" has no positive in query_to_query',
        ),
        (
            {"directions": ("query_to_doc", "query_to_query", "doc_to_doc"), "gather_negatives": "ring"},
            'gather_negatives="ring" has no doc_to_doc and query_to_query',
        ),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        MultipleNegativesRankingLoss(**options)


def test_wrong_inputs():
    loss, (anchors, positives, negatives) = MultipleNegativesRankingLoss(), draw(3)
    for embeddings in (
        (anchors[:0], positives[:0]),
        (anchors, positives[:5]),
        (anchors, positives, negatives[:, :3]),
        (anchors[0], positives[0]),
    ):
        with pytest.raises(ValueError, match=r"embeddings must all be \[B, D\] of one shape, got \("):
            loss(*embeddings)
