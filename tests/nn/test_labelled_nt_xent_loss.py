"""Accepted and refused arguments of the loss; its values are tested in tests/golden/test_pytorch_metric_learning.py."""

import pytest
import torch

from cpc_ext.nn import LabelledNTXentLoss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_temperature_divides_no_rounding(dtype):
    embeddings = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).bfloat16().to(dtype)
    labels = torch.arange(9) % 3
    with torch.autocast("cpu", torch.bfloat16):
        loss = LabelledNTXentLoss()(embeddings, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, LabelledNTXentLoss()(embeddings.float(), labels))


@pytest.mark.parametrize("gap", [1e3, 1e5])
def test_losses_far_beyond_what_exponentials_hold(gap):
    """A pair that is as unlike as can be, with a negative that is the anchor: the loss is the gap of the scores."""
    embeddings = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    loss = LabelledNTXentLoss(2 / gap)(embeddings, torch.tensor([0, 0, 1, 1]))
    assert loss.item() == pytest.approx(gap, rel=1e-12)


def test_second_derivatives_are_refused():
    embeddings = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        LabelledNTXentLoss()(embeddings, torch.arange(6) % 2), embeddings, create_graph=True
    )
    with pytest.raises(RuntimeError, match="has no second derivatives"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_take_it():
    embeddings = torch.randn(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, labels = LabelledNTXentLoss(), torch.tensor([0, 1, 0, 2, 1, 0])
    leaf = embeddings.clone().requires_grad_()
    values = torch.stack([loss(one, labels) for one in leaf])
    (gradients,) = torch.autograd.grad(values.sum(), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(embeddings[1], labels), gradients[1])
    torch.testing.assert_close(torch.vmap(loss, (0, None))(embeddings, labels), values.detach())
    each = torch.vmap(torch.func.grad(loss), (0, None))(embeddings, labels)
    torch.testing.assert_close(each, gradients)


def test_without_a_gradient_none_is_formed():
    embeddings = torch.randn(6, 4)
    assert not LabelledNTXentLoss()(embeddings, torch.arange(6) % 2).requires_grad


def test_wrong_arguments():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        LabelledNTXentLoss(0)
    for embeddings, labels in ((torch.zeros(3), torch.zeros(3).long()), (torch.zeros(3, 2), torch.zeros(2).long())):
        with pytest.raises(ValueError, match=r"embeddings must be \[N, D\] and labels \[N\], got"):
            LabelledNTXentLoss()(embeddings, labels)
    with pytest.raises(TypeError, match=r"labels must be integers, got torch\.float32"):
        LabelledNTXentLoss()(torch.zeros(3, 2), torch.zeros(3))


@pytest.mark.parametrize("learnt", [False, True])
def test_it_compiles_to_one_graph(learnt):
    """How large the classes are is known only where the graph runs."""
    generator = torch.Generator().manual_seed(0)
    loss = LabelledNTXentLoss(0.3)
    if learnt:
        loss.temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for labels in ([0, 1, 0, 2, 1, 0, 0], [3, 3, 3, 3, 3, 3, 3], [0, 1, 2, 3, 4, 5, 6], [4, 4, 1, 1, 2]):
        embeddings = torch.randn(len(labels), 4, generator=generator, dtype=torch.float64).requires_grad_()
        learns = [embeddings, *([loss.temperature] if learnt else [])]
        found, expected = (call(embeddings, torch.tensor(labels)) for call in (compiled, loss))
        torch.testing.assert_close(found, expected)
        gradients = (torch.autograd.grad(value, learns) for value in (found, expected))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


def test_it_is_exported_with_an_open_number_of_embeddings():
    generator = torch.Generator().manual_seed(0)
    sizes = ({0: torch.export.Dim.DYNAMIC},) * 2
    embeddings, labels = torch.randn(11, 4, generator=generator), torch.arange(11) % 3
    exported = torch.export.export(LabelledNTXentLoss(), (embeddings[:6], labels[:6]), dynamic_shapes=sizes).module()
    torch.testing.assert_close(exported(embeddings, labels), LabelledNTXentLoss()(embeddings, labels))
