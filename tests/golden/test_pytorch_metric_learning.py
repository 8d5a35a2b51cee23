"""pytorch-metric-learning's NTXentLoss, from its own values and, where it is installed, by its side."""

import pytest
import torch
from torch.autograd import grad

from cpc_ext.nn import LabelledNTXentLoss, labelled_nt_xent_loss

EXACT = {"atol": 1e-12, "rtol": 0}
LABELS = {
    # Class 5 has one sample, which is no anchor but a negative.
    "classes": torch.tensor([2, 0, 1, 2, 2, 0, 5, 1, 0, 0, 2]),
    "one class": torch.full((11,), 3),
    "no positives": torch.arange(11),
    "two views": torch.arange(12) % 6,
    "one": torch.zeros(1, dtype=torch.int64),
    "none": torch.zeros(0, dtype=torch.int64),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nt_xent(golden, dtype):
    problem = golden("pytorch_metric_learning.nt_xent")
    embeddings = problem.tensors["embeddings"].to(dtype).requires_grad_()
    loss = LabelledNTXentLoss(problem.config["temperature"])(embeddings, problem.tensors["labels"])
    tolerance = EXACT if dtype == torch.float64 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(loss, problem.tensors["loss"].to(dtype), **tolerance)
    torch.testing.assert_close(grad(loss, embeddings)[0], problem.tensors["grad"].to(dtype), **tolerance)


@pytest.mark.parametrize("temperature", [0.07, 0.01])
@pytest.mark.parametrize("name", LABELS)
def test_beside_the_original(name, temperature):
    losses = pytest.importorskip("pytorch_metric_learning.losses", exc_type=ImportError)
    labels = LABELS[name]
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(len(labels), 5, dtype=torch.float64, generator=generator).requires_grad_()
    ours = LabelledNTXentLoss(temperature)(embeddings, labels)
    theirs = losses.NTXentLoss(temperature)(embeddings, labels)
    torch.testing.assert_close(ours, theirs, **EXACT)
    torch.testing.assert_close(grad(ours, embeddings), grad(theirs, embeddings), atol=1e-10, rtol=0)


@pytest.mark.parametrize("most", [{"_BLOCK_ROWS": 4}, {"_BLOCK_SCORES": 20}, {"_BLOCK_SCORES": 0}])
def test_pairs_in_blocks(golden, most, monkeypatch):
    problem = golden("pytorch_metric_learning.nt_xent")
    for name, value in most.items():
        monkeypatch.setattr(labelled_nt_xent_loss, name, value)
    embeddings = problem.tensors["embeddings"].requires_grad_()
    loss = LabelledNTXentLoss(problem.config["temperature"])(embeddings, problem.tensors["labels"])
    torch.testing.assert_close(loss, problem.tensors["loss"], **EXACT)
    torch.testing.assert_close(grad(loss, embeddings)[0], problem.tensors["grad"], **EXACT)
