"""predict_and_contrast against info_nce of each step's predictions, and against its reference in float64."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cpc_ext.op_checks.agreement import differences, fp32_precision
from cpc_ext.op_checks.problems.predict_and_contrast import PROBLEMS
from cpc_ext.ops import info_nce, predict_and_contrast
from cpc_ext.ops.predict_and_contrast import predict_and_contrast_reference

CPU = torch.device("cpu")


class Drawn(NamedTuple):
    """Contexts, weights and keys, whose scores are about 1, and the op's other arguments."""

    tensors: tuple[Tensor, ...]
    options: dict[str, Any]

    def learning(self, device=CPU, dtype=None):
        return [tensor.detach().to(device, dtype).requires_grad_() for tensor in self.tensors]

    def given(self, device=CPU):
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.options.items()}

    def results(self, device=CPU, dtype=None, op=predict_and_contrast):
        """The op's output, and the gradients of contexts, weights and keys."""
        tensors = self.learning(device, dtype)
        output = op(*tensors, **self.given(device))
        upstream = torch.linspace(0.5, 1.5, output.loss.numel(), dtype=torch.float64).view(output.loss.shape)
        return output, torch.autograd.grad(output.loss, tensors, upstream.to(output.loss))


def draw(size=(3, 6, 5), batch=(2, 9), keys=14, *, samples=None, shared=False, dtype=torch.float64, **options):
    """Draw a problem. size: K, D, E. Step k uses the positions before the sequence's last k + 1."""
    (steps, dim, channels), length = size, batch[1]
    generator = torch.Generator().manual_seed(steps + 7 * dim + 13 * channels + length)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = (
        normal(*batch, channels) * max(channels, 1) ** -0.5,
        normal(*size) * max(dim, 1) ** -0.5,
        normal(keys, dim),
    )
    targets = torch.randint(max(keys, 1), (steps, *batch), generator=generator)
    after = torch.arange(length) + torch.arange(1, steps + 1).view(-1, 1, 1)
    options["targets"] = torch.where(after.expand(targets.shape) < length, targets, -1)
    if samples is not None:
        leading = () if shared else (steps,)
        options["negatives"] = torch.randint(max(keys, 1), (*leading, *batch, samples), generator=generator)
    return Drawn(tuple(tensor.to(dtype) for tensor in tensors), options)


KINDS = {
    "all keys": {},
    "sampled": {"samples": 4},
    "sampled, shared": {"samples": 20, "shared": True},  # More than there are keys: some are drawn twice.
}


def step_by_step(contexts, weights, keys, targets, negatives=None, scale=1.0):
    """Losses, ranks and the number of rows of each step, by info_nce of its predictions."""
    losses, ranks = [], []
    for step, matrix in enumerate(weights):
        rows = targets[step] >= 0
        drawn = None
        if negatives is not None:
            drawn = (negatives[step] if negatives.ndim == 4 else negatives)[rows]
        result = info_nce(
            contexts[rows] @ matrix.T, keys, targets[step][rows], negatives=drawn, scale=scale, reduction="none"
        )
        losses.append(result.loss)
        ranks.append(result.rank)
    return losses, ranks


@pytest.mark.parametrize("implementation", [predict_and_contrast, predict_and_contrast_reference])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_info_nce_of_each_steps_predictions(kind, reduction, implementation):
    drawn = draw(**KINDS[kind], scale=0.7, reduction=reduction)
    tensors = drawn.learning()
    output = implementation(*tensors, **drawn.options)
    targets = drawn.options["targets"]
    options = {name: value for name, value in drawn.options.items() if name != "reduction"}
    losses, ranks = step_by_step(*tensors, **options)

    means = torch.stack([step.mean() for step in losses])
    rights = torch.stack([(step == 0).double().mean() for step in ranks])
    every = torch.zeros(targets.shape, dtype=torch.float64).masked_scatter(targets >= 0, torch.cat(losses))
    rank = torch.full_like(targets, -1).masked_scatter(targets >= 0, torch.cat(ranks))
    expected = {"mean": means.mean(), "sum": torch.cat(losses).sum(), "none": every}[reduction]
    torch.testing.assert_close(output.loss, expected, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(output.step_losses, means.detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(output.step_accuracies, rights)
    torch.testing.assert_close(output.accuracy, (rank == 0).double() if reduction == "none" else rights.mean())
    assert torch.equal(output.rank, rank)
    upstream = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).view(expected.shape)
    actual, wanted = (torch.autograd.grad(loss, tensors, upstream) for loss in (output.loss, expected))
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(device, kind, reduction):
    drawn = draw((2, 3, 2), (2, 4), 5, **KINDS[kind], scale=1.3, reduction=reduction)
    given = drawn.given(device)
    assert torch.autograd.gradcheck(
        lambda *tensors: predict_and_contrast(*tensors, **given).loss, drawn.learning(device)
    )


@pytest.mark.parametrize("kind", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.label)
def test_equals_the_reference(device, problem, kind):
    for difference in differences(problem, device, kind):
        assert difference.agrees, difference


# D, E and the rows of a step at the edges of registers, tiles and blocks.
@pytest.mark.parametrize("dim", [1, 7, 8, 16, 17, 33, 100])
@pytest.mark.parametrize("channels", [1, 6, 15, 48, 65, 300])
@pytest.mark.parametrize("kind", ["all keys", "sampled, shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_width(dim, channels, kind, dtype):
    drawn = draw((2, dim, channels), (1, 23), 11, **KINDS[kind], dtype=dtype)
    check_against_reference(drawn)


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 96, 97, 700, 1500])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows(length, kind, dtype):
    """Also more than are predicted at once, and steps without any row."""
    check_against_reference(draw((3, 40, 24), (2, length), 50, **KINDS[kind], dtype=dtype, reduction="sum"))


# Steps and D at the edges of registers and tiles; from a third of a register's lanes on the steps go together.
@pytest.mark.parametrize("steps", [4, 6, 12, 16, 17, 70])
@pytest.mark.parametrize("dim", [1, 15, 16, 17, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_negatives_that_many_steps_share(steps, dim, dtype):
    check_against_reference(draw((steps, dim, 24), (2, steps + 3), 50, samples=20, shared=True, dtype=dtype))


@pytest.mark.parametrize("samples", [0, 1, 6, 7])
def test_few_negatives_that_many_steps_share(samples):
    drawn = draw((12, 40, 24), (3, 150), 9, samples=samples, shared=True, dtype=torch.float32, reduction="sum")
    check_against_reference(drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_weight_may_hold_anything(kind):
    """What keys get of a context, and it of a key, is none where a loss has no gradient."""
    drawn = draw((12, 6, 5), (1, 20), **KINDS[kind], dtype=torch.float32, reduction="none")
    contexts, weights, keys = drawn.learning()
    upstream = torch.ones_like(drawn.options["targets"], dtype=torch.float32)
    upstream[:, 0, 2] = 0
    expected = torch.autograd.grad(
        predict_and_contrast(contexts, weights, keys, **drawn.options).loss, (contexts, keys), upstream
    )
    with torch.no_grad():
        contexts[0, 2] = torch.nan
    loss = predict_and_contrast(contexts, weights, keys, **drawn.options).loss
    assert loss[:12, 0, 2].isnan().all()
    of_contexts, of_keys = torch.autograd.grad(loss, (contexts, keys), upstream)
    torch.testing.assert_close(of_keys, expected[1])
    assert not of_contexts[0, 2].any()
    if "negatives" not in drawn.options:
        return
    # A key that this context alone names.
    other = 13
    for name in ("negatives", "targets"):
        drawn.options[name].clamp_(max=other - 1)
    drawn.options["negatives"][..., 2, 0] = other
    contexts, weights, keys = drawn.learning()
    with torch.no_grad():
        keys[other] = torch.nan
    loss = predict_and_contrast(contexts, weights, keys, **drawn.options).loss
    of_contexts, of_keys = torch.autograd.grad(loss, (contexts, keys), upstream)
    assert of_contexts.isfinite().all()
    assert not of_contexts[0, 2].any()
    assert of_keys.isfinite().all()


def test_a_step_without_weight_leaves_the_others_as_they_are():
    """One prediction of a context whose steps share their negatives is infinite."""
    drawn = draw((12, 6, 5), (1, 20), 14, samples=20, shared=True, dtype=torch.float32, reduction="none")
    contexts, weights, keys = drawn.learning()
    upstream = torch.ones_like(drawn.options["targets"], dtype=torch.float32)
    upstream[3] = 0
    expected = torch.autograd.grad(predict_and_contrast(contexts, weights, keys, **drawn.options).loss, keys, upstream)
    with torch.no_grad():
        weights[3] = torch.inf
    loss = predict_and_contrast(contexts, weights, keys, **drawn.options).loss
    of_keys = torch.autograd.grad(loss, keys, upstream)
    torch.testing.assert_close(of_keys, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("contexts", [0, 1, 4, 7])
def test_parts_of_predictions_that_another_op_contrasts(monkeypatch, kind, contexts):
    """As on CUDA, of so many contexts at a time; 0: less than one's predictions may be in memory."""
    module = sys.modules[predict_and_contrast.__module__]
    monkeypatch.setattr(module, "native", SimpleNamespace(info_nce_on_cpu=lambda tensor: False))
    monkeypatch.setattr(module, "_PREDICTION_BYTES", contexts * 3 * 6 * 4)
    check_against_reference(draw(**KINDS[kind], dtype=torch.float32))


def check_against_reference(drawn):
    output, gradients = drawn.results()
    exact = Drawn(tuple(tensor.double() for tensor in drawn.tensors), drawn.options)
    expected, wanted = exact.results(op=predict_and_contrast_reference)
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.step_losses.double(), expected.step_losses, rtol=1e-5, atol=1e-5)
    assert output.loss.dtype == torch.float32
    # Results are rounded to bfloat16, and where the processor multiplies it the gradients of predictions, too, of which
    # those of contexts and weights are made.
    rounded = {"contexts": 2**-7, "weights": 2**-7, "keys": 2**-8}
    for name, one, other in zip(("contexts", "weights", "keys"), gradients, wanted, strict=True):
        largest = float(other.abs().max())
        tolerance = 1e-5 if one.dtype == torch.float32 else rounded[name]
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * max(largest, 1e-3), msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_absent_rows_may_hold_anything(device, kind):
    """A context that no step uses, and negatives of rows that a step does not have."""
    drawn = draw(**KINDS[kind])
    contexts, weights, keys = drawn.learning(device)
    given = drawn.given(device)
    given["targets"][:, 0, 3] = -1
    with torch.no_grad():
        contexts[0, 3] = torch.nan
    expected = predict_and_contrast(contexts.detach().nan_to_num(5), weights, keys, **given)
    wanted = torch.autograd.grad(expected.loss, (weights, keys))
    absent = given["targets"] == -1
    if given.get("negatives") is not None:
        shared = given["negatives"].ndim == 3
        given["negatives"][absent.all(0) if shared else absent] = 1 << 40
    output = predict_and_contrast(contexts, weights, keys, **given)
    of_contexts, *others = torch.autograd.grad(output.loss, (contexts, weights, keys))
    assert torch.equal(output.loss, expected.loss)
    assert (output.rank[absent] == -1).all()
    for one, other in zip(others, wanted, strict=True):
        assert torch.equal(one, other)
    assert (of_contexts[absent.all(0)] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_absent_losses_count_for_nothing(device, kind):
    drawn = draw(**KINDS[kind], reduction="none")
    tensors, given = drawn.learning(device), drawn.given(device)
    loss = predict_and_contrast(*tensors, **given).loss
    expected = torch.autograd.grad(loss.sum(), tensors, retain_graph=True)
    upstream = torch.where(given["targets"] == -1, torch.nan, 1.0).to(loss)
    for one, other in zip(torch.autograd.grad(loss, tensors, upstream), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_non_contiguous_arguments(device, kind):
    drawn = draw(**KINDS[kind], dtype=torch.float32)
    tensors, given = drawn.learning(device), drawn.given(device)
    expected = predict_and_contrast(*tensors, **given)
    wanted = torch.autograd.grad(expected.loss, tensors)

    def turned(tensor):
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    given |= {name: turned(value) for name, value in given.items() if isinstance(value, Tensor)}
    output = predict_and_contrast(*map(turned, tensors), **given)
    for one, other in zip(output, expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(torch.autograd.grad(output.loss, tensors), wanted, strict=True):
        assert torch.equal(one, other)


def test_indices_of_any_integers():
    drawn = draw(samples=4)
    expected = predict_and_contrast(*drawn.tensors, **drawn.options)
    for dtype in (torch.int32, torch.int16, torch.int8):
        narrow = {name: value.to(dtype) for name, value in drawn.options.items()}
        assert torch.equal(predict_and_contrast(*drawn.tensors, **narrow).loss, expected.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_one_gradient_at_a_time(device, kind, dtype):
    drawn = draw(**KINDS[kind], dtype=dtype)
    _, together = drawn.results(device)
    for place, expected in enumerate(together):
        tensors = [tensor.detach() for tensor in drawn.learning(device)]
        tensors[place].requires_grad_()
        loss = predict_and_contrast(*tensors, **drawn.given(device)).loss
        (alone,) = torch.autograd.grad(loss, tensors[place], torch.full_like(loss, 0.5))
        assert torch.equal(alone, expected)


def test_without_gradients(device):
    drawn = draw(samples=4)
    expected = predict_and_contrast(*drawn.learning(device), **drawn.given(device))
    with torch.no_grad():
        output = predict_and_contrast(*drawn.learning(device), **drawn.given(device))
    assert not output.loss.requires_grad
    for one, other in zip(output, expected, strict=True):
        assert torch.equal(one, other)
    assert [one.requires_grad for one in expected] == [True, False, False, False, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_rounds_what_is_multiplied(device, dtype):
    drawn = draw(samples=4, dtype=torch.float32)
    tensors = drawn.learning(device)
    with torch.autocast(device.type, dtype):
        output = predict_and_contrast(*tensors, **drawn.given(device))
    rounded = Drawn(tuple(tensor.to(dtype) for tensor in drawn.tensors), drawn.options)
    expected, wanted = rounded.results(device)
    assert torch.equal(output.loss, expected.loss)
    assert output.loss.dtype == torch.float32
    for one, other in zip(torch.autograd.grad(output.loss, tensors, torch.tensor(0.5)), wanted, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other.float())


def test_different_types_are_promoted():
    contexts, weights, keys = draw(samples=4).tensors
    options = draw(samples=4).options
    assert (
        predict_and_contrast(contexts.float(), weights.bfloat16(), keys.half(), **options).loss.dtype == torch.float32
    )
    assert predict_and_contrast(contexts.float(), weights, keys.half(), **options).loss.dtype == torch.float64


def test_float16_gradients_survive_a_mean(device):
    """A GradScaler multiplies the loss, not what the forward pass has formed."""
    drawn = draw((2, 8, 8), (1, 2048), 64, samples=3, dtype=torch.float16, scale=2.0**-8)
    tensors = drawn.learning(device)
    loss = predict_and_contrast(*tensors, **drawn.given(device)).loss * 2.0**20
    exact = Drawn(tuple(tensor.double() for tensor in drawn.tensors), drawn.options).learning()
    expected = predict_and_contrast_reference(*exact, **drawn.options).loss * 2.0**20
    for one, other in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=2**-8, atol=2**-8 * float(other.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_refused(kind):
    tensors, options = draw(**KINDS[kind]).learning(), draw(**KINDS[kind]).options
    for reduction in ("mean", "none"):
        loss = predict_and_contrast(*tensors, **options, reduction=reduction).loss
        (gradient,) = torch.autograd.grad(loss.sum(), tensors[0], create_graph=True)
        with pytest.raises(RuntimeError, match="predict_and_contrast has no second derivatives"):
            gradient.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_backward_again(device, kind):
    """Also where what came of the first time, and the leaves' gradients, have been written to."""
    drawn = draw(**KINDS[kind])
    tensors = drawn.learning(device)
    loss = predict_and_contrast(*tensors, **drawn.given(device)).loss
    first = torch.autograd.grad(2 * loss, tensors, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.zero_()
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        for tensor, gradient in zip(tensors, kept, strict=True):
            torch.testing.assert_close(2 * tensor.grad, times * gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_as_an_op(kind):
    drawn = draw(**KINDS[kind], dtype=torch.float32)
    expected, wanted = drawn.results()
    tensors = drawn.learning()
    compiled = torch.compile(lambda *t: predict_and_contrast(*t, **drawn.options), fullgraph=True, backend="aot_eager")
    output = compiled(*tensors)
    for one, other in zip(output, expected, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(torch.autograd.grad(output.loss, tensors, torch.tensor(0.5)), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_grad():
    one, other = draw(samples=4), draw(samples=4)
    stacked = [torch.stack([tensor, 2 * tensor]) for tensor in one.tensors]
    losses = torch.vmap(lambda *tensors: predict_and_contrast(*tensors, **one.options).loss)(*stacked)
    gradients = torch.func.grad(lambda *tensors: predict_and_contrast(*tensors, **one.options).loss, (0, 1, 2))
    torch.testing.assert_close(losses[1], predict_and_contrast(*(2 * x for x in other.tensors), **one.options).loss)
    for actual, expected in zip(gradients(*one.tensors), one.results()[1], strict=True):
        torch.testing.assert_close(actual, 2 * expected)


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("size", "batch"), [((3, 6, 5), (0, 9)), ((3, 6, 5), (2, 0)), ((0, 6, 5), (2, 9))])
def test_no_rows(device, samples, reduction, size, batch):
    drawn = draw(size, batch, samples=samples, reduction=reduction)
    output, gradients = drawn.results(device)
    assert output.loss.sum() == output.accuracy.sum() == 0
    assert output.rank.shape == (size[0], *batch)
    assert output.step_losses.tolist() == [0] * size[0]
    for gradient, tensor in zip(gradients, drawn.tensors, strict=True):
        assert gradient.shape == tensor.shape
        assert not gradient.any()


def test_no_negatives_and_no_features(device):
    drawn = draw(samples=0)
    output, gradients = drawn.results(device)
    assert output.loss == 0
    assert output.accuracy == 1
    assert not any(bool(gradient.any()) for gradient in gradients)
    flat = draw((3, 0, 5), samples=4)
    assert flat.results(device)[0].loss.item() == pytest.approx(math.log(5))
    without = draw((3, 6, 0), samples=4)
    assert without.results(device)[0].loss.item() == pytest.approx(math.log(5))


@pytest.mark.parametrize("implementation", [predict_and_contrast, predict_and_contrast_reference])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_steps(kind, reduction, implementation, dtype):
    drawn = draw((0, 6, 5), **KINDS[kind], reduction=reduction, dtype=dtype)
    output, gradients = drawn.results(op=implementation)
    assert [tuple(value.shape) for value in output] == [
        *(2 * [(0, 2, 9) if reduction == "none" else ()]),
        *[(0, 2, 9), (0,), (0,)],
    ]
    assert (output.loss.dtype, output.rank.dtype) == (torch.promote_types(dtype, torch.float32), torch.int64)
    assert output.loss.sum() == output.accuracy.sum() == 0
    for tensor, gradient in zip(drawn.tensors, gradients, strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_large_scores_do_not_overflow():
    contexts, weights = torch.tensor([[[1e4], [1e4]]]), torch.tensor([[[1.0]]])
    output = predict_and_contrast(contexts, weights, torch.tensor([[1e4], [-1e4]]), torch.tensor([[[0, 1]]]))
    assert output.loss == 1e8
    assert output.accuracy == 0.5


def test_ties_are_wrong_but_copies_of_the_positive_do_not_count():
    contexts, weights = torch.ones(1, 1, 1), torch.ones(1, 1, 1)
    keys, targets = torch.tensor([[1.0], [1.0], [0.0]]), torch.zeros(1, 1, 1, dtype=torch.int64)
    assert predict_and_contrast(contexts, weights, keys, targets).rank == 1
    assert predict_and_contrast(contexts, weights, keys, targets, negatives=torch.tensor([[[0, 2]]])).rank == 0


CONTEXTS, WEIGHTS, KEYS = torch.zeros(2, 4, 3), torch.zeros(5, 6, 3), torch.zeros(7, 6)
TARGETS, NEGATIVES = torch.zeros(5, 2, 4, dtype=torch.int64), torch.zeros(2, 4, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"contexts": None}, TypeError, "contexts must be a tensor, got NoneType"),
        ({"contexts": CONTEXTS.long()}, TypeError, "contexts must be floating with 16 bits or more, got torch.int64"),
        ({"keys": KEYS.to(torch.float8_e4m3fn)}, TypeError, "keys must be floating with 16 bits or more"),
        ({"contexts": CONTEXTS[0]}, ValueError, r"contexts must be \[B, T, E\], got shape \(4, 3\)"),
        ({"weights": WEIGHTS[0]}, ValueError, r"weights must be \[K, D, E\], got shape \(6, 3\)"),
        ({"weights": WEIGHTS[..., :2]}, ValueError, r"weights must be \[K, D, 3\] for contexts of 3, got \(5, 6, 2\)"),
        ({"keys": KEYS[:, :2]}, ValueError, r"keys must be \[N, 6\] for weights \(5, 6, 3\), got \(7, 2\)"),
        ({"keys": KEYS.to_sparse()}, TypeError, "keys must be a dense tensor"),
        ({"keys": KEYS.to("meta")}, ValueError, "keys must be on the contexts' device cpu, got meta"),
        ({"targets": None}, TypeError, "targets must be a tensor, got NoneType"),
        ({"targets": TARGETS.float()}, TypeError, "targets must be integers, got torch.float32"),
        ({"targets": TARGETS[0]}, ValueError, r"targets must be \[5, 2, 4\], got shape \(2, 4\)"),
        ({"targets": TARGETS + 7}, IndexError, "targets must be in 0..6 for 7 keys, or -1 for none, got 7..7"),
        ({"targets": TARGETS - 2}, IndexError, "targets must be in 0..6 for 7 keys, or -1 for none, got -2..-2"),
        ({"negatives": NEGATIVES[0]}, ValueError, r"negatives must be \[5, 2, 4, S\] or \[2, 4, S\], got shape \(4, 3"),
        ({"negatives": NEGATIVES.bool()}, TypeError, "negatives must be integers, got torch.bool"),
        ({"negatives": [0]}, TypeError, "negatives must be a tensor, got list"),
        ({"negatives": NEGATIVES + 7}, IndexError, "negatives must be in 0..6 for 7 keys, got 7..7"),
        ({"negatives": NEGATIVES - 1}, IndexError, "negatives must be in 0..6 for 7 keys, got -1..-1"),
        ({"negatives": NEGATIVES.to("meta")}, ValueError, "negatives must be on the contexts' device cpu, got meta"),
        ({"keys": KEYS[:0]}, IndexError, "targets must be in 0..-1 for 0 keys"),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a number, got Tensor"),
        ({"scale": "1"}, TypeError, "scale must be a number or a tensor, got str"),
        ({"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
        ({"reduction": "max"}, ValueError, 'reduction must be "mean", "sum" or "none", got \'max\''),
    ],
)
def test_wrong_arguments(change, error, message):
    given = {"contexts": CONTEXTS, "weights": WEIGHTS, "keys": KEYS, "targets": TARGETS} | change
    with pytest.raises(error, match=message):
        predict_and_contrast(**given)


def test_the_largest_number_of_an_unsigned_type_is_not_minus_one():
    keys = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([255, 1, 255, 2]).expand(5, 2, 4)
    expected = predict_and_contrast(CONTEXTS, WEIGHTS, keys, targets)
    result = predict_and_contrast(CONTEXTS, WEIGHTS, keys, targets.to(torch.uint8))
    for one, other in zip(result, expected, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(IndexError, match=r"targets must be in 0\.\.299 for 300 keys"):
        predict_and_contrast(CONTEXTS, WEIGHTS, keys, torch.full((5, 2, 4), 2**64 - 1, dtype=torch.uint64))


@pytest.mark.parametrize("name", ["targets", "negatives"])
def test_an_index_that_names_no_key(device, name):
    """On the CPU an error; where nobody looks, the row's own affair, and its step's."""
    drawn = draw(samples=4, reduction="none")
    tensors, given = drawn.learning(device), drawn.given(device)
    given[name][1, 0, 2] = 14
    if sys.modules[predict_and_contrast.__module__].native.info_nce_on_cpu(tensors[0]):
        with pytest.raises(IndexError, match=f"{name} must be in 0..13 for 14 keys"):
            predict_and_contrast(*tensors, **given)
        return
    output = predict_and_contrast(*tensors, **given)
    of_contexts, of_weights, of_keys = torch.autograd.grad(output.loss.sum(), tensors)
    assert output.loss.isnan().nonzero().tolist() == [[1, 0, 2]]
    assert output.rank[1, 0, 2] == -1
    assert of_contexts.isnan().all(2).nonzero().tolist() == [[0, 2]]
    assert of_contexts.isnan().any(2).sum() == 1
    assert of_weights.isnan().flatten(1).any(1).tolist() == [False, True, False]
    assert of_keys.isfinite().all()


def test_forward_mode_is_refused():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(CONTEXTS, CONTEXTS)
        with pytest.raises(NotImplementedError, match="no forward-mode derivatives"):
            predict_and_contrast(dual, WEIGHTS, KEYS, TARGETS)


@pytest.mark.parametrize("steps", [3, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(kind, steps):
    drawn = draw((steps, 40, 70), (2, 500), 90, **KINDS[kind], dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(drawn.results())
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for one, other in zip(results[0][0] + tuple(results[0][1]), result[0] + tuple(result[1]), strict=True):
            assert torch.equal(one, other)


def test_float32_is_exact_where_tf32_is_off(device):
    drawn = draw((2, 32, 64), (2, 20), 30, samples=5, dtype=torch.float32)
    with fp32_precision("ieee"):
        output, _ = drawn.results(device)
    exact = predict_and_contrast_reference(*(tensor.double() for tensor in drawn.tensors), **drawn.options)
    torch.testing.assert_close(output.loss.double().cpu(), exact.loss, rtol=5e-6, atol=0)
