"""Losses and ops with symbolic sizes and without access to values: compile, export, transforms, fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import vmap

from cpc_ext.nn import GridInfoNCE, NTXentLoss, SequenceInfoNCE, SupConLoss, TargetInfoNCE
from cpc_ext.ops import info_nce, masked_conv2d, predict_and_contrast, sample_logistic_mixture


def grids(batch):
    return torch.randn(1, batch, 4, 5, 5), torch.randn(1, batch, 4, 5, 5)


def sequences(batch):
    return torch.randn(batch, 6, 12), torch.randn(batch, 6, 12)


@pytest.mark.parametrize(
    ("loss", "inputs"),
    [
        (lambda: GridInfoNCE(4, pred_steps=2), grids),
        (lambda: SequenceInfoNCE(6, 6, pred_steps=2, sampling="shifted", neg_samples=3), sequences),
        (lambda: SequenceInfoNCE(6, 6, pred_steps=2, sampling="offsets", neg_samples=3), sequences),
        (lambda: sample_logistic_mixture, lambda batch: (torch.randn(batch, 10, 4, 4),)),
    ],
    ids=["grid", "shifted", "offsets", "mixture"],
)
def test_a_last_batch_that_is_smaller_compiles(loss, inputs):
    compiled = torch.compile(loss(), backend="aot_eager")
    for batch in (6, 7, 5):
        compiled(*inputs(batch))


def test_a_masked_convolution_whose_weight_has_open_sizes_compiles():
    def convolve(input, weight):
        return masked_conv2d(input, weight, mask=torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]]))

    compiled = torch.compile(convolve, backend="aot_eager", dynamic=True, fullgraph=True)
    input, weight = torch.randn(2, 3, 5, 7), torch.randn(6, 3, 3, 3)
    torch.testing.assert_close(compiled(input, weight), convolve(input, weight))


class OfOp(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, *given):
        return self.op(*given).loss


@pytest.mark.parametrize("op", ["info_nce", "predict_and_contrast"])
def test_exported_sizes_stay_open(op):
    batch = torch.export.Dim("batch", min=2, max=64)
    if op == "info_nce":
        module, sizes = OfOp(info_nce), ({0: batch}, {0: batch})

        def given(count):
            return torch.randn(count, 6, 5, 4), torch.randn(count, 6, 5, 4)
    else:
        weights, keys = torch.randn(2, 5, 3), torch.randn(6, 5)
        module = OfOp(lambda contexts, targets: predict_and_contrast(contexts, weights, keys, targets))
        sizes = ({0: batch}, {1: batch})

        def given(count):
            return torch.randn(count, 4, 3), torch.randint(0, 6, (2, count, 4))

    exported = torch.export.export(module, given(3), dynamic_shapes=(sizes,))
    for count in (3, 9):
        inputs = given(count)
        torch.testing.assert_close(exported.module()(*inputs), module(*inputs))


class AllOutputs(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, *given):
        return tuple(self.call(*given))


@pytest.mark.parametrize(
    ("loss", "inputs", "batch"),
    [
        (lambda: GridInfoNCE(4, pred_steps=2, neg_samples="all"), grids, 1),
        (lambda: GridInfoNCE(4, pred_steps=2, neg_samples=3), grids, 1),
        (lambda: TargetInfoNCE(4, pred_steps=2), grids, 1),
        (lambda: SequenceInfoNCE(6, 6, pred_steps=2, sampling="all"), sequences, 0),
        (lambda: SequenceInfoNCE(6, 6, pred_steps=2, sampling="shifted", neg_samples=3), sequences, 0),
        (lambda: NTXentLoss().contrast, lambda batch: (torch.randn(batch, 5), torch.randn(batch, 5)), 0),
    ],
    ids=["grid, all", "grid", "target", "sequence, all", "sequence", "nt-xent"],
)
def test_exported_batches_stay_open(loss, inputs, batch):
    """Also in the bound on mutual information, which is of how many keys there are."""
    objective = AllOutputs(loss())
    sizes = ({batch: torch.export.Dim.DYNAMIC},) * 2
    exported = torch.export.export(objective, inputs(4), dynamic_shapes=(sizes,)).module()
    for count in (2, 7):
        given = inputs(count)
        found, expected = (seeded(call, given) for call in (exported, objective))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def seeded(call, given):
    torch.manual_seed(0)
    return call(*given)


def test_batched_gradients():
    generator = torch.Generator().manual_seed(0)
    contexts, weights, keys = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((1, 4, 3), (2, 5, 3), (6, 5))
    )
    targets = torch.arange(8).reshape(2, 1, 4) % 6

    def losses(contexts):
        return predict_and_contrast(contexts, weights, keys, targets).loss.expand(2)

    plain = torch.autograd.functional.jacobian(losses, contexts)
    torch.testing.assert_close(torch.autograd.functional.jacobian(losses, contexts, vectorize=True), plain)


def test_vmap_where_values_are_looked_at():
    params, noise = torch.randn(3, 1, 10, 4, 4), torch.full((1, 4, 4, 4), 0.5)
    drawn = vmap(lambda each: sample_logistic_mixture(each, noise=noise))(params)
    assert torch.equal(drawn, torch.stack([sample_logistic_mixture(each, noise=noise) for each in params]))
    images, weight, mask = torch.randn(3, 2, 3, 6, 6), torch.randn(4, 3, 3, 3), torch.ones(3, 3, 3)
    mask[:, 1:] = 0
    made = vmap(lambda seen, image: masked_conv2d(image, weight, mask=seen))(mask, images)
    expected = torch.stack([masked_conv2d(image, weight, mask=seen) for seen, image in zip(mask, images, strict=True)])
    torch.testing.assert_close(made, expected)


def test_fake_tensors_have_no_values_to_look_at():
    with FakeTensorMode():
        queries, keys = torch.randn(2, 8, 4)
        assert info_nce(queries, keys, torch.arange(8), weights=torch.ones(8)).loss.shape == ()
        assert NTXentLoss()(queries, keys).shape == ()
        assert SupConLoss()(torch.randn(8, 2, 4), mask=torch.eye(8)).shape == ()
        assert masked_conv2d(torch.randn(1, 2, 4, 4), torch.randn(4, 2, 3, 3), mask=torch.ones(3, 3)).shape[1] == 4
        assert sample_logistic_mixture(torch.randn(1, 10, 4, 4)).shape == (1, 3, 4, 4)
