"""NT-Xent against its formula, with the batch's negatives and with those of a memory bank."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.nn import DecoupledContrastiveLoss, NTXentLoss


def features(seed=0, images=6, dim=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, dim, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2)]


def test_loss_and_ranks_are_those_of_the_similarity_matrix():
    first, second = features()
    output = NTXentLoss(0.3).contrast(first, second)

    views = torch.cat([first, second])
    similarity = F.cosine_similarity(views[:, None], views[None], dim=2).fill_diagonal_(-torch.inf) / 0.3
    targets = torch.arange(12).roll(6)
    expected = F.cross_entropy(similarity, targets)
    torch.testing.assert_close(output.loss, expected, atol=1e-12, rtol=0)
    for ours, theirs in zip(
        *(torch.autograd.grad(loss, [first, second]) for loss in (output.loss, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    positions = [
        row.argsort(descending=True).tolist().index(target) for row, target in zip(similarity, targets, strict=True)
    ]
    assert output.accuracy == sum(position == 0 for position in positions) / 12
    assert output.top5_accuracy == pytest.approx(sum(position < 5 for position in positions) / 12)
    assert output.mean_position == pytest.approx(sum(positions) / 12 + 1)
    assert output.mutual_information == pytest.approx(math.log(11) - output.loss.item())


def test_one_image_has_nothing_to_be_taken_for():
    output = NTXentLoss().contrast(torch.randn(1, 3), torch.randn(1, 3))
    assert output.loss == output.mutual_information == 0
    assert output.accuracy == output.top5_accuracy == output.mean_position == 1


def test_everything_stays_on_its_device():
    assert all(value.is_meta for value in NTXentLoss().contrast(*torch.empty(2, 4, 3, device="meta")))


def test_collapsed_features_come_last():
    same = torch.ones(4, 3)
    output = NTXentLoss().contrast(same, same)
    assert output.accuracy == 0
    assert output.mean_position == 7
    assert output.loss.item() == pytest.approx(math.log(7))


def test_half_precision_is_compared_in_float32():
    first, second = (value.detach().bfloat16() for value in features())
    loss = NTXentLoss()(first, second)
    assert loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert NTXentLoss()(first, second) == loss


@pytest.mark.parametrize("loss", [NTXentLoss(), DecoupledContrastiveLoss()], ids=["nt-xent", "dcl"])
def test_the_wider_of_two_types_counts(loss):
    first, second = (value.detach().float() for value in features())
    expected = loss(first.double(), second.double())
    for views in ((first, second.double()), (first.double(), second)):
        torch.testing.assert_close(loss(*views), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"gather_negatives": "some"}, "gather_negatives must be one of none, gather, ring, got 'some'"),
    ],
)
def test_wrong_arguments(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        NTXentLoss(**arguments)


@pytest.mark.parametrize("shapes", [((2, 3), (3, 3)), ((2,), (2,)), ((0, 3), (0, 3)), ((2, 3, 1), (2, 3, 1))])
def test_wrong_shapes(shapes):
    with pytest.raises(ValueError, match="first and second must both be"):
        NTXentLoss()(*map(torch.ones, shapes))
