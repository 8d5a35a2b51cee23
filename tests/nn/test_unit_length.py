"""Vectors of any length brought to length 1, and the losses and votes that are made of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import grad

from cpc_ext.measures.knn import knn_scores
from cpc_ext.nn import NTXentLoss
from cpc_ext.nn.unit_length import unit_length

LENGTHS = (1e-30, 1e-20, 1e-6, 1.0, 1e6, 1e20, 1e30)


def views(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 5, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dim", [0, 1])
def test_values_and_gradients(length, dim):
    vectors = (views()[0] * length).requires_grad_()
    exact = vectors.detach().double().requires_grad_()
    expected = exact / exact.norm(dim=dim, keepdim=True)
    actual = unit_length(vectors, dim)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-7)
    upstream = views()[1]
    for one, other in zip(grad(actual, vectors, upstream), grad(expected, exact, upstream.double()), strict=True):
        torch.testing.assert_close(one.double() * length, other * length, rtol=1e-5, atol=1e-6)


def test_vectors_of_several_lengths_and_of_none():
    vectors = torch.tensor([[3e-25, 4e-25], [3e25, 4e25], [0, 0], [0, 1e-42]], requires_grad=True)
    lengthened = unit_length(vectors)
    torch.testing.assert_close(lengthened.detach(), torch.tensor([[0.6, 0.8], [0.6, 0.8], [0, 0], [0, 1]]))
    assert torch.equal(unit_length(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert unit_length(torch.zeros(2, 0)).shape == (2, 0)
    (gradient,) = grad(lengthened[:3].sum(), vectors)
    assert gradient.isfinite().all()
    assert gradient[0].any()
    assert not gradient[2].any()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("other", [1.0, 1e15])
def test_nt_xent_of_views_of_any_length(length, other):
    first, second = views()
    expected = NTXentLoss(0.3).contrast(first.double().requires_grad_(), second.double())
    tensors = (first * length).requires_grad_(), (second * other).requires_grad_()
    output = NTXentLoss(0.3).contrast(*tensors)
    for name, value in output._asdict().items():
        torch.testing.assert_close(value.double(), getattr(expected, name), rtol=1e-5, atol=1e-6)
    exact = first.double().requires_grad_(), second.double().requires_grad_()
    wanted = grad(NTXentLoss(0.3)(*exact), exact)
    for gradient, factor, of_unit in zip(grad(output.loss, tensors), (length, other), wanted, strict=True):
        torch.testing.assert_close(gradient.double() * factor, of_unit, rtol=1e-4, atol=1e-6)


def test_what_a_transform_does_not_transform():
    first, second = views()
    together = torch.vmap(lambda one: one + unit_length(second))(first)
    torch.testing.assert_close(together, first[:, None] + F.normalize(second))


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e20])
def test_bfloat16_views_are_compared_by_their_directions(value):
    first, second = views(torch.bfloat16)
    first[0] *= value
    loss = NTXentLoss(0.3)(first, second)
    similar = torch.cat([first, second]).double()
    similar = similar / similar.norm(dim=1, keepdim=True).clamp(min=1e-300)
    logits = (similar @ similar.T / 0.3).fill_diagonal_(-torch.inf)
    torch.testing.assert_close(loss.double(), F.cross_entropy(logits, torch.arange(12).roll(6)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_votes_of_neighbours_do_not_depend_on_lengths(length):
    labelled, queries = views()
    labels = torch.arange(6) % 3
    expected = knn_scores(labelled, labels, queries, classes=3, neighbours=2)
    torch.testing.assert_close(
        knn_scores(labelled * length, labels, queries / length, classes=3, neighbours=2), expected, rtol=1e-4, atol=1e-8
    )
