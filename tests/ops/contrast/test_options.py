"""info_nce with each of its options against contrasts written out by hand, values, ranks and gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cpc_ext.ops import info_nce
from cpc_ext.ops.info_nce import info_nce_reference
from tests.ops.contrast.draw import DTYPES, draw

CPU = torch.device("cpu")
SHAPE = 9, 11, 6


def learned(value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


OPTIONS = {
    "positives": {"positives": 3},
    "one place for positives": {"positives": 1},
    "exclude": {"targets": True, "excluded": 0},
    "several excluded": {"positives": 2, "excluded": 4},
    "ranges": {"targets": True, "ranges": True},
    "same group": {"targets": True, "contrast": "same"},
    "other groups": {"positives": 3, "contrast": "other"},
    "bias": {"targets": True, "bias": torch.float32},
    "learned scale": {"targets": True, "scale": learned(0.7)},
    "everything": {
        "positives": 3,
        "excluded": 2,
        "ranges": True,
        "contrast": "other",
        "bias": torch.float32,
        "scale": learned(-0.9),
        "weights": True,
    },
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("samples", [None, 5])
@pytest.mark.parametrize("name", OPTIONS)
def test_each_option(device, name, samples, dtype):
    draw(SHAPE, dtype, samples=samples, **OPTIONS[name]).check(device)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("batch", [(2, 3), (0,)])
def test_reductions_and_batches(device, batch, samples, reduction):
    draw(SHAPE, batch=batch, samples=samples, **OPTIONS["everything"]).check(device, reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("samples", [None, 3])
def test_the_reference_is_the_formula_too(samples, reduction):
    problem = draw(SHAPE, torch.float64, batch=(2,), samples=samples, **OPTIONS["everything"])
    problem.learns = {name: tensor.double() for name, tensor in problem.learns.items()}
    arguments = problem.arguments(CPU)
    result = info_nce_reference(**arguments, reduction=reduction)
    expected, by_hand = problem.exactly(reduction)
    torch.testing.assert_close(result.loss, expected.loss, atol=1e-12, rtol=0)
    assert torch.equal(result.rank, by_hand.least)
    inputs = [arguments[name] for name in problem.learns]
    upstream = torch.linspace(0.5, 1.5, result.loss.numel(), dtype=torch.float64).view(result.loss.shape)
    for one, other in zip(torch.autograd.grad(result.loss, inputs, upstream), expected.gradients.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("samples", [None, 5])
@pytest.mark.parametrize("bias", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biases_of_any_type(device, dtype, bias, samples):
    draw(SHAPE, dtype, targets=True, bias=bias, samples=samples).check(device)


@pytest.mark.parametrize("samples", [None, 5])
def test_a_bias_that_rules_a_key_out(device, samples):
    """Keys of which -inf, or nearly so, is the bias are as good as excluded."""
    problem = draw(SHAPE, torch.float64, targets=True, bias=torch.float64, samples=samples)
    problem.given["targets"].clamp_(min=2)
    without = draw(SHAPE, torch.float64, targets=True, bias=torch.float64, samples=samples)
    without.given["targets"].clamp_(min=2)
    without.given["exclude"] = torch.tensor([0, 1]).expand(9, 2)
    problem.learns["key_bias"][0], problem.learns["key_bias"][1] = -1e30, -math.inf
    actual, expected = problem.run(device), without.run(device)
    torch.testing.assert_close(actual.loss, expected.loss)
    for name, gradient in actual.gradients.items():
        torch.testing.assert_close(gradient, expected.gradients[name])


@pytest.mark.parametrize("samples", [None, 5])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", [3, 0, -2.5, np.float32(0.3), np.float64(0.1), np.int64(2), torch.tensor(0.7),
                                   torch.tensor(2), torch.tensor(0.3, dtype=torch.bfloat16), learned(0.7),
                                   learned(0.0), learned(-1.5), learned(0.3, torch.float64),
                                   learned(0.3, torch.bfloat16)], ids=repr)  # fmt: skip
def test_scales_of_any_kind(device, scale, symmetric, samples):
    if symmetric and samples:
        return
    options = {"permuted": True, "symmetric": True} if symmetric else {"targets": True, "samples": samples}
    draw((11, 11, 6), scale=scale, bias=torch.float32, **options).check(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [0, -1.5, learned(0.0), learned(-1.5), learned(0.7), learned(1.0)], ids=repr)
@pytest.mark.parametrize("present", [97, 96, 40])
def test_absent_queries_are_in_no_keys_sum(device, present, scale, dtype):
    """Blocks of keys may hold no positive of a tile all of whose queries are absent, or beyond the last."""
    queries, keys = draw((present, present, 6), dtype).learns["queries"], draw((130, 130, 6), dtype).learns["queries"]
    for rows in {present, 130}:
        weights = None if rows == present else (torch.arange(rows) < present).to(dtype)
        given = [torch.cat([queries, keys[present:rows]]), keys[:rows]]
        options = {"scale": scale, "symmetric": True}
        if weights is not None:
            options["weights"] = weights
        results = []
        for contrast, place, kind in ((info_nce, device, dtype), (info_nce_reference, CPU, torch.float64)):
            leaves = [value.detach().to(place, kind).requires_grad_() for value in given]
            own = {name: value.to(place, kind) if isinstance(value, torch.Tensor) and name == "weights" else value
                   for name, value in options.items()}  # fmt: skip
            if isinstance(scale, torch.Tensor):
                own["scale"] = scale.detach().to(place, kind).requires_grad_()
                leaves.append(own["scale"])
            loss = contrast(*leaves[:2], **own).loss
            results.append([loss, *torch.autograd.grad(loss, leaves)])
        for mine, expected in zip(*results, strict=True):
            precise = 1e-11 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(mine.cpu().double(), expected, rtol=precise, atol=precise)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64])
def test_indices_of_unsigned_types_in_the_order_of_targets(dtype):
    queries, keys = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([1, 2, 3, 0])
    for name, values in (
        ("key_range", torch.tensor([[0, 4], [1, 4], [0, 4], [0, 3]])),
        ("exclude", torch.tensor([0, 1, 2, 3])),
        ("groups", (torch.arange(4) // 2, torch.arange(4) // 2)),
    ):
        narrow = tuple(each.to(dtype) for each in values) if name == "groups" else values.to(dtype)
        more = {"contrast": "other"} if name == "groups" else {}
        results = [
            info_nce(queries, keys, targets, symmetric=True, **{name: given}, **more).loss for given in (values, narrow)
        ]
        assert torch.equal(*results)


def test_an_index_beyond_int64_is_not_none():
    queries, keys = torch.randn(2, 4, 3)
    with pytest.raises(IndexError):
        info_nce(queries, keys, torch.tensor([0, 1, 2, -1]).to(torch.uint64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_scale_is_rounded_to_no_half_precision(device, dtype):
    """Some bits of 1.0009765 are beyond bfloat16's, and scores of a hundred times that show it."""
    queries = torch.full((1, 1), 100.0, dtype=dtype, device=device)
    keys = torch.tensor([[1.0], [0.9375]], dtype=dtype, device=device)
    for scale in (1 + 2**-10, torch.tensor(1 + 2**-10, device=device), learned(1 + 2**-10)):
        loss = info_nce(queries, keys, scale=scale).loss
        assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-6.25 * (1 + 2**-10))), rel=2e-3)


def test_several_positives_as_published(device):
    """SupCon's L_out, with every other sample contrasted and those of the same label as positives."""
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 3])
    features = torch.nn.functional.normalize(draw((7, 7, 5), torch.float64).learns["queries"], dim=1)
    targets = torch.full((7, 3), -1)
    for m, label in enumerate(labels):
        same = [n for n in range(7) if n != m and labels[n] == label]
        targets[m, : len(same)] = torch.tensor(same)
    result = info_nce(*[features.to(device)] * 2, targets.to(device), exclude=torch.arange(7, device=device), scale=10)
    losses = []
    for m in range(7):
        scores = features[m] @ features.T * 10
        others = torch.cat([scores[:m], scores[m + 1 :]]).logsumexp(0)
        same = [scores[n] for n in targets[m].tolist() if n >= 0]
        losses += [-sum(score - others for score in same) / len(same)] if same else []
    assert len(losses) == 5
    torch.testing.assert_close(result.loss.cpu(), torch.stack(losses).mean())


def test_rows_without_a_positive_are_absent(device):
    problem = draw(SHAPE, torch.float64, positives=2)
    problem.given["targets"][:] = -1
    for reduction in ("mean", "sum", "none"):
        result = problem.run(device, reduction)
        assert not any(tensor.any() for tensor in (result.loss, *result.gradients.values()))
    assert problem.run(device).accuracy == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_places_for_positives(device, reduction):
    queries = torch.ones(3, 2, device=device, requires_grad=True)
    result = info_nce(queries, queries, torch.zeros(3, 0, dtype=torch.int64, device=device), reduction=reduction)
    assert not result.loss.any()
    assert not torch.autograd.grad(result.loss.sum(), queries)[0].any()


def test_queues_as_momentum_contrast_has_them(device):
    """Keys are a batch's and then a queue; each query contrasts its own key with the queue alone."""
    problem = draw((5, 13, 6), torch.float64)
    problem.given["key_range"] = torch.tensor([5, 13]).expand(5, 2)
    queries, keys = problem.learns.values()
    scores = 0.7 * torch.cat([(queries * keys[:5]).sum(1, keepdim=True), queries @ keys[5:].T], 1)
    expected = torch.nn.functional.cross_entropy(scores, torch.zeros(5, dtype=torch.int64))
    result = problem.run(device)
    torch.testing.assert_close(result.loss.cpu(), expected)
    assert torch.equal(result.rank.cpu(), (scores[:, 1:] >= scores[:, :1]).sum(1))
    problem.check(device)


@pytest.mark.parametrize("samples", [None, 4])
@pytest.mark.parametrize("way", ["key_range", "groups", "exclude"])
def test_a_query_alone_with_its_positive_has_no_loss(device, way, samples):
    problem = draw((4, 4, 3), samples=samples)
    problem.given |= {
        "key_range": {"key_range": torch.tensor([[0, 0], [4, 4], [2, 2], [3, 4]])},
        "groups": {"groups": (torch.full((4,), 2**33), torch.zeros(4, dtype=torch.int64)), "contrast": "same"},
        "exclude": {"exclude": torch.tensor([[n for n in range(4) if n != m] for m in range(4)])},
    }[way]
    if samples:
        problem.given["negatives"] = ((torch.arange(4) + 1) % 4).unsqueeze(1).expand(4, samples)
    result = problem.run(device, "none")
    assert not result.loss.any()
    assert not result.rank.any()
    assert (result.accuracy == 1).all()
    assert not any(gradient.any() for gradient in result.gradients.values())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint64])
def test_integers_of_any_type(device, dtype):
    wide = draw(SHAPE, positives=2, excluded=2, ranges=True, contrast="same", samples=3)
    wide.given["targets"].clamp_(min=0)
    wide.given["exclude"] = (wide.given["targets"][:, :1] + torch.arange(1, 3)) % 11
    wide.given["exclude"][(wide.given["exclude"].unsqueeze(-1) == wide.given["targets"].unsqueeze(-2)).any(-1)] = 0
    free = ~(wide.given["targets"] == 0).any(-1)
    wide.given = {name: value[free] if isinstance(value, torch.Tensor) else value for name, value in wide.given.items()}
    wide.given["groups"] = (torch.arange(9)[free] % 3, torch.arange(11) % 3)
    wide.learns["queries"] = wide.learns["queries"][free]
    assert len(wide.learns["queries"]) > 3
    narrow = {
        name: tuple(one.to(dtype) for one in value) if name == "groups" else value.to(dtype)
        for name, value in wide.given.items()
        if name not in ("scale", "contrast")
    }
    expected = wide.run(device)
    wide.given |= narrow
    assert torch.equal(wide.run(device).loss, expected.loss)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("samples", [None, 5])
def test_gradients_by_finite_differences(samples, reduction):
    problem = draw((4, 6, 3), torch.float64, samples=samples, **OPTIONS["everything"] | {"scale": 1.0})
    problem.learns |= {"scale": torch.tensor(1.3), "weights": problem.learns["weights"] + 0.3}
    problem.learns = {name: tensor.double() for name, tensor in problem.learns.items()}
    del problem.given["scale"]
    arguments = problem.arguments(CPU)

    def loss(*tensors):
        return info_nce(**arguments | dict(zip(problem.learns, tensors, strict=True)), reduction=reduction).loss

    assert torch.autograd.gradcheck(loss, [arguments[name] for name in problem.learns])
