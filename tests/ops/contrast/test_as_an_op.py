"""The contrastive ops as PyTorch ops: opcheck, tracing, export, autocast and vmap."""

from __future__ import annotations

import pytest
import torch

from cpc_ext.ops import _contrast, info_nce, scores_logsumexp, sigmoid_contrast
from tests.ops.contrast.draw import MEASURES, draw

CPU = torch.device("cpu")
EVERYTHING = {
    "positives": 3,
    "excluded": 2,
    "ranges": True,
    "contrast": "other",
    "bias": torch.float32,
    "scale": torch.tensor(0.9, requires_grad=True),
    "weights": True,
}
PROBLEMS = {
    "all keys": EVERYTHING,
    "sampled": EVERYTHING | {"samples": 4},
    "both ways": {"symmetric": True, "weights": True, "scale": torch.tensor(0.9, requires_grad=True)},
    "log-sums": {name: value for name, value in EVERYTHING.items() if name not in ("positives", "weights")}
    | {"measure": "log_sum"},
    "sigmoids": {name: EVERYTHING[name] for name in ("positives", "weights", "scale")} | {"measure": "sigmoid"},
}


def problem(name, dtype=torch.float32, **options):
    return draw((8, 8, 5), dtype, **PROBLEMS[name] | options)


@pytest.mark.parametrize(
    ("name", "reduction"), [("all keys", "none"), ("sampled", "mean"), ("both ways", "mean"), ("log-sums", "none")]
)
def test_opcheck(name, reduction):
    drawn = problem(name)
    options = drawn.given | {key: value.requires_grad_() for key, value in drawn.learns.items()}
    queries, keys = options.pop("queries"), options.pop("keys")
    flat, weights = _contrast.flat_problem(queries, keys, _contrast.ContrastOptions(**options), drawn.measure)
    tensors = [value.detach() if isinstance(value, torch.Tensor) else value for value in (*flat, weights)]
    for at, field in enumerate(("queries", "keys", *flat._fields[2:], "weights")):
        if field in ("queries", "keys", "key_bias", "scales", "weights") and tensors[at] is not None:
            tensors[at].requires_grad_()
    formed = reduction == "mean"
    needs = [formed, formed, formed and flat.key_bias is not None, weights is not None, True, False]
    torch.library.opcheck(torch.ops.cpc_ext.info_nce, (*tensors, None, reduction, needs))
    row_weights = torch.ones(1, 8) if weights is None else weights.detach()
    with torch.no_grad():
        constants = [value.detach() if isinstance(value, torch.Tensor) else value for value in tensors[:-1]]
    torch.library.opcheck(torch.ops.cpc_ext.info_nce_gradients, (*constants, row_weights, None, [True, True, True]))


@pytest.mark.parametrize("name", ["sampled", "both ways", "log-sums", "sigmoids"])
def test_compiles_to_one_graph(name):
    drawn = problem(name)

    def loss(**arguments):
        output = MEASURES[drawn.measure](**arguments | {"queries": arguments["queries"] * 2})
        value, *others = output if isinstance(output, tuple) else (output,)
        return torch.where(value.isfinite(), value, 0).sum(), *others

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        arguments = drawn.arguments(CPU)
        value, *others = function(**arguments)
        gradients = torch.autograd.grad(value, [arguments[name] for name in drawn.learns])
        results.append([value, *others, *gradients])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_a_compiled_function_takes_any_value_of_its_scale():
    """One graph for all, and a scale that is none is an error of the kernel's."""
    queries, keys = draw((4, 5, 3)).learns.values()
    torch._dynamo.reset()
    compiled = torch.compile(lambda scale: info_nce(queries, keys, scale=scale).loss, fullgraph=True, backend="eager")
    for value in (0.5, -1.0, 0.0, 3.0):
        torch.testing.assert_close(compiled(torch.tensor(value)), info_nce(queries, keys, scale=value).loss)
    for value in (torch.inf, torch.nan):
        with pytest.raises(ValueError, match="scale must be finite"):
            compiled(torch.tensor(value))
    for value in (0.5, -1.0, 2, 3.0):
        torch.testing.assert_close(compiled(value), info_nce(queries, keys, scale=value).loss)


@pytest.mark.parametrize("name", PROBLEMS)
def test_exports(name):
    drawn = problem(name)

    class Loss(torch.nn.Module):
        def forward(self, queries, keys, scale):
            options = {key: value for key, value in drawn.learns.items() if key not in ("queries", "keys", "scale")}
            output = MEASURES[drawn.measure](queries, keys, scale=scale, **drawn.given | options)
            return output if isinstance(output, torch.Tensor) else tuple(output)

    given = tuple(drawn.learns[key].detach() for key in ("queries", "keys", "scale"))
    exported = torch.export.export(Loss(), given).module()
    other = given[0].flip(0), given[1] * 0.5, given[2] + 1
    torch.testing.assert_close(exported(*other), Loss()(*other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PROBLEMS)
def test_autocast_rounds_what_is_multiplied_alone(device, name, dtype):
    """Queries and keys are; scales, biases and weights are not."""
    drawn = problem(name)
    with torch.autocast(device.type, dtype):
        actual = drawn.run(device)
    rounded = problem(name)
    rounded.learns |= {key: drawn.learns[key].to(dtype) for key in ("queries", "keys")}
    expected = rounded.run(device)
    assert actual.loss.dtype == torch.float32
    assert torch.equal(actual.loss, expected.loss)
    for key, gradient in actual.gradients.items():
        assert gradient.dtype == drawn.learns[key].dtype
        assert torch.equal(gradient, expected.gradients[key].to(gradient.dtype))


@pytest.mark.parametrize("batched", [("queries",), ("keys", "scale"), ("targets", "exclude", "key_range")])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_some_arguments(batched):
    drawn = problem("all keys")
    arguments = {key: value.detach() if isinstance(value, torch.Tensor) else value
                 for key, value in drawn.arguments(CPU).items()}  # fmt: skip
    other = draw((8, 8, 5), seed=5, **PROBLEMS["all keys"]).arguments(CPU)
    if "targets" not in batched:
        other |= {name: arguments[name] for name in ("targets", "exclude", "key_range")}
    stacked = {name: torch.stack([arguments[name], other[name].detach()]) for name in batched}
    results = torch.vmap(lambda some: tuple(info_nce(**arguments | some)))(stacked)
    for at in range(2):
        one = info_nce(**arguments | {name: values[at] for name, values in stacked.items()})
        for actual, expected in zip(results, one, strict=True):
            torch.testing.assert_close(actual[at], expected)


@pytest.mark.parametrize("name", PROBLEMS)
def test_backward_twice(device, name):
    drawn = problem(name)
    arguments = drawn.arguments(device)
    output = MEASURES[drawn.measure](**arguments)
    loss = output if isinstance(output, torch.Tensor) else output.loss
    inputs = [arguments[key] for key in drawn.learns]
    first = torch.autograd.grad(loss, inputs, torch.ones_like(loss), retain_graph=True)
    second = torch.autograd.grad(loss, inputs, torch.ones_like(loss) * 2)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(2 * one, other)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_gradient_at_a_time(device, name, dtype):
    drawn = problem(name, dtype)
    together = drawn.run(device)
    for key in drawn.learns:
        alone = drawn.run(device, wanted=(key,))
        assert torch.equal(alone.loss, together.loss)
        torch.testing.assert_close(alone.gradients[key], together.gradients[key], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_gradient_at_all(device, name):
    drawn = problem(name)
    expected = drawn.run(device)
    with torch.no_grad():
        output = MEASURES[drawn.measure](**drawn.arguments(device))
    loss, *others = output if isinstance(output, tuple) else (output,)
    assert not loss.requires_grad
    assert torch.equal(loss, expected.loss)
    for one, other in zip(others, (expected.accuracy, expected.rank), strict=False):
        assert torch.equal(one, other)


def test_float16_gradients_survive_a_mean(device):
    """A GradScaler multiplies the loss, not what the forward pass has formed."""
    drawn = draw((2048, 64, 8), torch.float16, targets=True, scale=torch.tensor(0.7, requires_grad=True))
    exact = drawn.exactly("sum", by_reference=True)[0].gradients  # Those of half the sum.
    arguments = drawn.arguments(device)
    loss = info_nce(**arguments).loss * 2.0**14
    gradients = torch.autograd.grad(loss, [arguments[name] for name in drawn.learns])
    for name, gradient in zip(drawn.learns, gradients, strict=True):
        expected = exact[name] * 2 * 2.0**14 / 2048
        tolerance = 2.0**-9 * float(expected.abs().max())
        torch.testing.assert_close(gradient.double().cpu(), expected, rtol=2**-9, atol=tolerance)


def test_ranks_and_accuracies_have_no_gradient(device):
    result = info_nce(**problem("all keys").arguments(device))
    assert result.loss.requires_grad
    assert not result.accuracy.requires_grad
    assert result.rank.dtype == torch.int64


@pytest.mark.parametrize("op", [scores_logsumexp, sigmoid_contrast])
def test_kin_promote_different_types(op):
    queries, keys = draw((4, 5, 3)).learns.values()
    for one, other, expected in ((torch.float32, torch.bfloat16, torch.float32), (torch.float64, torch.float32,
                                  torch.float64), (torch.float16, torch.bfloat16, torch.float32)):  # fmt: skip
        assert op(queries.to(one), keys.to(other)).dtype == expected
