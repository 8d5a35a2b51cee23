"""Properties of all contrastive losses: gradients, precision, compiling and memory; and errors for wrong arguments.

Their values are compared with other libraries' in tests/golden/test_losses.py.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import grad, gradcheck
from torch.profiler import ProfilerActivity, profile

from cpc_ext import nn

QUEUE = torch.nn.functional.normalize(torch.randn(5, 3, generator=torch.Generator().manual_seed(9)), dim=1)
SCALE, BIAS = torch.tensor(1.7, dtype=torch.float64), torch.tensor(-0.4, dtype=torch.float64)


class Case(NamedTuple):
    make: Callable[[], torch.nn.Module]
    call: Callable[..., Tensor]  # Of the module and two tensors [N, D].
    rounds: bool = False  # Whether autocast rounds what it compares.


def with_queue(loss: torch.nn.Module, queue: torch.nn.Module, *views: Tensor) -> Tensor:
    """A loss of the same queue in every call."""
    with torch.no_grad():
        queue.keys[: queue.size] = QUEUE.repeat(1, queue.keys.shape[1] // 3 + 1)[:, : queue.keys.shape[1]]
        queue.position.zero_()
    return loss(*views)


def labels_of(features: Tensor) -> Tensor:
    return torch.arange(len(features), device=features.device) * 7 % 3


CASES = {
    "clip": Case(nn.CLIPLoss, lambda loss, a, b: loss(a, b, SCALE.to(a.device))),
    "clip-bias": Case(nn.CLIPLoss, lambda loss, a, b: loss(a, b, 1.7, BIAS)),
    "siglip": Case(nn.SigLIPLoss, lambda loss, a, b: loss(a, b, SCALE, BIAS)),
    "siglip-no-bias": Case(nn.SigLIPLoss, lambda loss, a, b: loss(a, b, 1.7)),
    "sup-con": Case(lambda: nn.SupConLoss(0.7), lambda loss, a, b: loss(torch.stack([a, b], 1), labels_of(a))),
    "sup-con-one": Case(
        lambda: nn.SupConLoss(0.7, "one"), lambda loss, a, b: loss(torch.stack([a, b], 1), labels_of(a))
    ),
    "sup-con-mask": Case(
        lambda: nn.SupConLoss(0.7),
        lambda loss, a, b: loss(torch.stack([a, b], 1), mask=labels_of(a)[:, None] == labels_of(a)),
    ),
    "sup-con-views": Case(lambda: nn.SupConLoss(0.7), lambda loss, a, b: loss(torch.stack([a, b], 1))),
    "nt-xent": Case(nn.NTXentLoss, lambda loss, a, b: loss(a, b)),
    "nt-xent-bank": Case(
        lambda: nn.NTXentLoss(0.5, (5, 3)), lambda loss, a, b: with_queue(loss, loss.memory_bank, a, b)
    ),
    "moco": Case(lambda: nn.MoCoLoss(3, 5, 0.5), lambda loss, a, b: with_queue(loss, loss.queue, a, b)),
    "dcl": Case(nn.DecoupledContrastiveLoss, lambda loss, a, b: loss(a, b)),
    "info-nce": Case(lambda: nn.InfoNCELoss(0.7), lambda loss, a, b: loss(a, b, symmetric=True).loss, rounds=True),
}


def views(images: int = 4, dim: int = 3, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(images, dim, generator=generator).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_finite_differences(name):
    case = CASES[name]
    loss = case.make().double()
    first, second = views()
    # MoCo's keys get no gradient.
    assert gradcheck(lambda a, b: case.call(loss, a, b), (first, second.requires_grad_(name != "moco")))
    if name not in ("moco", "nt-xent-bank"):  # What changes a queue is no function to be transformed.
        (expected,) = grad(case.call(loss, first, second), first)
        transformed = torch.func.grad(lambda first: case.call(loss, first, second.detach()))
        torch.testing.assert_close(transformed(first.detach()), expected)


@pytest.mark.parametrize("name", CASES)
def test_half_precision_and_autocast_compute_in_float32(name):
    case = CASES[name]
    loss, given = case.make(), views(6, dtype=torch.bfloat16)
    value = case.call(loss, *given)
    exact = case.call(case.make().double(), *(view.double() for view in given))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, atol=1e-5, rtol=1e-5)
    assert all(
        gradient.dtype == torch.bfloat16 for gradient in grad(value, given, allow_unused=True) if gradient is not None
    )
    singles = [view.detach().float() * 1.001 for view in given]
    expected = case.call(loss, *singles)
    with torch.autocast("cpu", torch.bfloat16):
        assert (case.call(loss, *singles) == expected) != case.rounds


@pytest.mark.parametrize("name", CASES)
def test_everything_stays_on_its_device(name):
    case = CASES[name]
    given = [view.detach().to("meta").requires_grad_() for view in views()]
    loss = case.call(case.make().double().to("meta"), *given)
    assert loss.is_meta
    gradients = grad(loss, given, allow_unused=True)
    assert all(gradient.is_meta for gradient in gradients if gradient is not None)


@pytest.mark.parametrize("name", ["clip", "siglip", "sup-con", "nt-xent", "moco", "dcl"])
def test_each_compiles_to_one_graph(name):
    case = CASES[name]
    loss, given = case.make().double(), views()
    expected = case.call(loss, *given)
    torch.compiler.reset()
    compiled = torch.compile(lambda a, b: case.call(loss, a, b), fullgraph=True, backend="aot_eager")(*given)
    torch.testing.assert_close(compiled, expected)
    gradients = (grad(loss, given, allow_unused=True) for loss in (compiled, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["clip", "siglip", "sup-con-views", "nt-xent", "dcl"])
def test_each_exports_for_any_number_of_images(name):
    case = CASES[name]

    class Loss(torch.nn.Module):
        def forward(self, a, b):
            return case.call(case.make(), a, b)

    images = {0: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(
        Loss(), tuple(map(Tensor.detach, views(6))), dynamic_shapes=(images, images)
    ).module()
    given = [view.detach() for view in views(9)]
    torch.testing.assert_close(exported(*given), Loss()(*given))


def peak_bytes(call: Callable[[], object]) -> int:
    """Return the peak of bytes that PyTorch's CPU allocator has allocated during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        call()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.parametrize("name", ["siglip", "sup-con", "nt-xent", "dcl"])
def test_no_matrix_of_pairs_is_in_memory(name):
    case, given = CASES[name], views(4096, 16, torch.float32)
    loss = case.make()
    # Not even one of a byte a pair.
    assert peak_bytes(lambda: grad(case.call(loss, *given), given)) < 4096 * 4096


@pytest.mark.parametrize("rows", [1, 8])
def test_a_queue_is_not_copied(rows):
    for loss in (nn.MoCoLoss(64, 65536), nn.NTXentLoss(0.1, (65536, 64))):
        given = views(rows, 64, torch.float32)
        peak = peak_bytes(lambda loss=loss, given=given: grad(loss(*given), given[0]))
        assert peak < 4 * 65536 * 64 / 4


# --- Wrong arguments ---

ONES = torch.ones(2, 3)
WRONG = {
    "clip-horovod": (lambda: nn.CLIPLoss(use_horovod=True), "use_horovod must be False"),
    "clip-exchange": (
        lambda: nn.CLIPLoss(gather_negatives="some"),
        "gather_negatives must be one of none, gather, ring, got 'some'",
    ),
    "clip-both": (
        lambda: nn.CLIPLoss(world_size=2, gather_negatives="ring"),
        "asks the process group for its size, got world_size 2",
    ),
    "clip-rank": (lambda: nn.CLIPLoss(rank=2, world_size=2), "rank must be below world_size 2, got 2"),
    "clip-group": (
        lambda: nn.CLIPLoss(rank=1, world_size=2)(ONES, ONES, 1.0),
        "rank and world_size must be the process group's 0 and 1, got 1 and 2",
    ),
    "clip-shape": (
        lambda: nn.CLIPLoss()(ONES, ONES[:1], 1.0),
        r"image_features and text_features must both be \[B, D\], got \(2, 3\) and \(1, 3\)",
    ),
    "clip-none": (lambda: nn.CLIPLoss()(ONES[:0], ONES[:0], 1.0), r"must both be \[B, D\], got \(0, 3\)"),
    "clip-scale": (lambda: nn.CLIPLoss()(ONES, ONES, torch.ones(2)), "logit_scale must be a number or a tensor of one"),
    "clip-bias": (lambda: nn.CLIPLoss()(ONES, ONES, 1.0, torch.ones(2)), "logit_bias must be a number or a tensor of"),
    "siglip-way": (lambda: nn.SigLIPLoss(dist_impl="ring"), "dist_impl must be None or one of bidir, shift, reduce"),
    "siglip-exchange": (
        lambda: nn.SigLIPLoss(gather_negatives="ring"),
        "gather_negatives must be one of none, gather, got 'ring'",
    ),
    "siglip-shape": (lambda: nn.SigLIPLoss()(ONES[0], ONES[0], 1.0), r"must both be \[B, D\], got \(3,\) and \(3,\)"),
    "siglip-bias": (lambda: nn.SigLIPLoss()(ONES, ONES, 1.0, torch.ones(2)), "logit_bias must be a number"),
    "sup-con-mode": (lambda: nn.SupConLoss(contrast_mode="two"), "contrast_mode must be one of all, one, got 'two'"),
    "sup-con-temperature": (lambda: nn.SupConLoss(0), "temperature must be positive, got 0"),
    "sup-con-base": (lambda: nn.SupConLoss(base_temperature=-1), "base_temperature must be positive, got -1"),
    "sup-con-shape": (lambda: nn.SupConLoss()(ONES), r"features must be \[B, views, ...\], each at least 1"),
    "sup-con-both": (lambda: nn.SupConLoss()(ONES[:, None], ONES[:, 0], ONES[:, :2]), "labels and mask cannot both"),
    "sup-con-labels": (lambda: nn.SupConLoss()(ONES[:, None], ONES), r"labels must have shape \(2,\), got \(2, 3\)"),
    "sup-con-mask": (lambda: nn.SupConLoss()(ONES[:, None], mask=ONES), r"mask must have shape \(2, 2\), got \(2, 3\)"),
    "sup-con-negative": (lambda: nn.SupConLoss()(ONES[:, None], mask=-ONES[:, :2]), "must not be negative, got -1"),
    "sup-con-some-negative": (
        lambda: nn.SupConLoss()(ONES[:, None], mask=torch.tensor([[1, -1], [3, 2]])),
        "mask must not be negative, got -1",
    ),
    "clip-no-bias": (lambda: nn.CLIPLoss()(ONES, ONES, 1.0, float("nan")), "logit_bias must be finite, got nan"),
    "clip-scale-tensor": (
        lambda: nn.CLIPLoss()(ONES, ONES, torch.tensor(float("nan"))),
        "logit_scale must be finite, got nan",
    ),
    "siglip-no-bias": (
        lambda: nn.SigLIPLoss()(ONES, ONES, 1.0, torch.tensor([float("inf")])),
        "logit_bias must be finite, got inf",
    ),
    "nt-xent-no-bank": (lambda: nn.NTXentLoss(0.5, None), r"memory_bank_size must be 0, or .*, got None"),
    "nt-xent-bank-floats": (lambda: nn.NTXentLoss(0.5, (8.0, 3)), r"memory_bank_size must be 0, or .*, got \(8.0, 3\)"),
    "nt-xent-bank": (lambda: nn.NTXentLoss(0.5, 8), r"memory_bank_size must be 0, or \(number of features, D\)"),
    "nt-xent-bank-pair": (lambda: nn.NTXentLoss(0.5, (8, 0)), r"memory_bank_size must be 0, or .*, got \(8, 0\)"),
    "nt-xent-bank-ring": (
        lambda: nn.NTXentLoss(0.5, (8, 3), gather_negatives="ring"),
        'must be "none" or "gather" with a memory bank',
    ),
    "nt-xent-two-words": (
        lambda: nn.NTXentLoss(gather_distributed=True, gather_negatives="ring"),
        "gather_distributed means gather_negatives=\"gather\", got 'ring'",
    ),
    "nt-xent-width": (
        lambda: nn.NTXentLoss(0.5, (8, 4))(ONES, ONES),
        r"keys must have the queue's 4 features, got \(2, 3\)",
    ),
    "moco-dim": (lambda: nn.MoCoLoss(0), "dim must be at least 1, got 0"),
    "moco-size": (lambda: nn.MoCoLoss(3, 0), "size must be at least 1, got 0"),
    "moco-temperature": (lambda: nn.MoCoLoss(3, 5, -0.1), "temperature must be positive, got -0.1"),
    "moco-no-temperature": (lambda: nn.MoCoLoss(3, 5, 0), "temperature must be positive, got 0"),
    "moco-exchange": (lambda: nn.MoCoLoss(3, 5, gather_negatives="ring"), "must be one of none, gather, got 'ring'"),
    "moco-shape": (
        lambda: nn.MoCoLoss(3, 5)(ONES, ONES[:0]),
        r"queries and keys must both be \[B, D\], got \(2, 3\) and \(0, 3\)",
    ),
    "moco-width": (lambda: nn.MoCoLoss(4, 5)(ONES, ONES), r"keys must have the queue's 4 features, got \(2, 3\)"),
    "dcl-temperature": (lambda: nn.DecoupledContrastiveLoss(0), "temperature must be positive, got 0"),
    "dcl-shape": (lambda: nn.DecoupledContrastiveLoss()(ONES, ONES[0]), r"first and second must both be \[N, D\]"),
    "dcl-one": (lambda: nn.DecoupledContrastiveLoss()(ONES[:1], ONES[:1]), "must be of at least two images"),
    "dcl-weights": (
        lambda: nn.DecoupledContrastiveLoss(weight_fn=torch.mul)(ONES, ONES),
        r"weight_fn must give \(2,\), got \[\(2, 3\), \(2, 3\)\]",
    ),
    "info-nce-lowest": (
        lambda: nn.InfoNCELoss(0.005, learnable=True),
        "temperature must be at least 1 / max_scale = 0.01, got 0.005",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_one_pair_has_nothing_to_be_taken_for():
    assert nn.CLIPLoss()(ONES[:1], ONES[:1], 3.0) == 0
    assert nn.SupConLoss()(ONES[:1, None]) == nn.SupConLoss()(ONES[:1, None, :1]) == 0
    torch.testing.assert_close(nn.SigLIPLoss()(ONES[:1], ONES[:1], 1.0), -torch.tensor(3.0).sigmoid().log())


def test_a_bias_that_is_added_to_all_logits_gets_a_gradient_of_zero():
    bias = torch.tensor(0.0, requires_grad=True)
    loss = nn.CLIPLoss()(*views(), 1.7, bias)
    assert loss == nn.CLIPLoss()(*views(), 1.7)
    assert grad(loss, bias)[0] == 0


def test_labels_are_any_numbers():
    features, labels = torch.stack(views(), 1), torch.tensor([2, -1, 2, 7])
    expected = nn.SupConLoss()(features, labels)
    for other in (labels.double() / 4, labels.to(torch.int8), labels[:, None]):
        assert nn.SupConLoss()(features, other) == expected


WHOLE = torch.ones(2, 3, dtype=torch.int64)
WRONG_TYPES = {
    "clip-image": (lambda: nn.CLIPLoss()(None, ONES, 1.0), "image_features must be a tensor, got NoneType"),
    "siglip-text": (lambda: nn.SigLIPLoss()(ONES, WHOLE, 1.0), r"text_features must be floating, got torch\.int64"),
    "clip-scale": (lambda: nn.CLIPLoss()(ONES, ONES, torch.tensor(True)), "logit_scale must be a real number"),
    "nt-xent-first": (lambda: nn.NTXentLoss()(WHOLE, WHOLE), r"first must be floating, got torch\.int64"),
    "nt-xent-second": (lambda: nn.NTXentLoss()(ONES, [[1.0] * 3] * 2), "second must be a tensor, got list"),
    "nt-xent-temperature": (lambda: nn.NTXentLoss("0.1"), "temperature must be a number or a tensor, got str"),
    "dcl-first": (lambda: nn.DecoupledContrastiveLoss()(WHOLE, WHOLE), r"first must be floating, got torch\.int64"),
    "sup-con-features": (lambda: nn.SupConLoss()(WHOLE[None]), r"features must be floating, got torch\.int64"),
    "sup-con-labels": (lambda: nn.SupConLoss()(ONES[None], [0]), "labels must be a tensor, got list"),
    "sup-con-mask": (
        lambda: nn.SupConLoss()(ONES[None], mask=torch.eye(1).to_sparse()),
        "mask must be a dense tensor, got layout torch.sparse_coo",
    ),
    "labelled-embeddings": (
        lambda: nn.LabelledNTXentLoss()(WHOLE, WHOLE[:, 0]),
        r"embeddings must be floating, got torch\.int64",
    ),
    "labelled-labels": (lambda: nn.LabelledNTXentLoss()(ONES, [0, 1]), "labels must be a tensor, got list"),
    "moco-keys": (lambda: nn.MoCoLoss(3, 5)(ONES, WHOLE), r"keys must be floating, got torch\.int64"),
    "moco-size": (lambda: nn.MoCoLoss(3, 5.0), "size must be an int, got float"),
    "ranking-positives": (
        lambda: nn.MultipleNegativesRankingLoss()(ONES, None),
        "positives must be a tensor, got NoneType",
    ),
    "ranking-negatives": (
        lambda: nn.MultipleNegativesRankingLoss()(ONES, ONES, ONES, WHOLE),
        r"hard_negatives\[1\] must be floating, got torch\.int64",
    ),
}


@pytest.mark.parametrize("name", WRONG_TYPES)
def test_wrong_types(name):
    call, message = WRONG_TYPES[name]
    with pytest.raises(TypeError, match=message):
        call()


OF_TEMPERATURE = {
    "info-nce": lambda first, second, temperature: nn.InfoNCELoss(temperature)(first, second).loss,
    "nt-xent": lambda first, second, temperature: nn.NTXentLoss(temperature)(first, second),
    "dcl": lambda first, second, temperature: nn.DecoupledContrastiveLoss(temperature)(first, second),
    "sup-con": lambda first, second, temperature: nn.SupConLoss(temperature)(
        torch.stack([first, second], 1), torch.tensor([0, 1, 0, 2])
    ),
    "labelled": lambda first, second, temperature: nn.LabelledNTXentLoss(temperature)(
        torch.cat([first, second]), torch.arange(8) % 3
    ),
    "ranking": lambda first, second, temperature: nn.MultipleNegativesRankingLoss(1 / temperature)(first, second),
}


@pytest.mark.parametrize("name", OF_TEMPERATURE)
def test_a_temperature_that_is_learnt_gets_its_whole_gradient(name):
    first, second = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    temperature = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda learnt: OF_TEMPERATURE[name](first, second, learnt), temperature)


def test_the_examples_of_the_documentation_run():
    text = (Path(__file__).parents[2] / "docs" / "losses.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 5
    for example in examples:
        exec(compile(example, "docs/losses.md", "exec"), {})


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2.5e-3), (torch.float16, 3e-4)])
def test_supervised_contrast_of_16_bits_loses_only_theirs(dtype, tolerance):
    """The gradients of log-sums and of similarities nearly cancel: neither may be rounded before they are added."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 10
    centers = F.normalize(torch.randn(10, 64, generator=generator), dim=1)
    views = centers[labels][:, None] + 0.3 / 8 * torch.randn(128, 2, 64, generator=generator)
    features = F.normalize(views, dim=2).to(dtype)
    gradients = []
    for given in (features, features.double()):
        leaf = given.clone().requires_grad_()
        nn.SupConLoss()(leaf, labels).backward()
        gradients.append(leaf.grad.double())
    assert (gradients[0] - gradients[1]).norm() < tolerance * gradients[1].norm()
