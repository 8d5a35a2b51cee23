"""nn.Conv2d against PyTorch's layer: state, results, and the choice between our kernel and PyTorch's."""

import csv
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from cpc_ext.models.encoders.layers import begin_block
from cpc_ext.nn import Conv2d
from cpc_ext.nn import conv2d as module
from cpc_ext.nn.conv2d import kernel_pays

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

TABLE = Path(__file__).parents[2] / "python/benchmarks/conv2d_choice.csv"


@pytest.fixture(params=[True, False])
def kernel(request, monkeypatch):
    """Force or forbid our kernel wherever it is applicable."""
    monkeypatch.setattr(module, "_SIMD", "avx512")
    monkeypatch.setattr(module, "kernel_pays", lambda *_, simd: request.param)
    return request.param


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(*arguments, **options):
    """Return our layer and PyTorch's, with the same weights."""
    plain = nn.Conv2d(*arguments, **options, dtype=torch.float64)
    ours = Conv2d(*arguments, **options, dtype=torch.float64)
    ours.load_state_dict(plain.state_dict())
    return ours, plain


@pytest.mark.parametrize(
    ("options", "covered"),
    [
        ({}, True),
        ({"padding": 1, "bias": False}, True),
        ({"stride": 2, "padding": (1, 2), "dilation": 2}, True),
        ({"stride": (2, 1)}, False),
        ({"dilation": (1, 2)}, False),
        ({"groups": 2}, False),
        ({"padding": "same"}, False),
        ({"padding": 1, "padding_mode": "reflect"}, False),
    ],
)
def test_computes_what_pytorch_does(kernel, options, covered):
    ours, plain = pair(4, 6, (3, 2), **options)
    input = draw(3, 4, 7, 6).requires_grad_()
    assert ours.takes_kernel(input) == (kernel and covered)
    output, expected = ours(input), plain(input)
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)
    upstream = draw(*expected.shape, seed=1)
    for one, other in zip(
        torch.autograd.grad(output, [input, *ours.parameters()], upstream),
        torch.autograd.grad(expected, [input, *plain.parameters()], upstream),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    full = ours(input, relu_input=True, residual=upstream)
    torch.testing.assert_close(full, plain(input.relu()) + upstream, rtol=1e-12, atol=1e-12)
    output, passed = ours.passing(input, relu_input=True)
    torch.testing.assert_close(output, plain(input.relu()), rtol=1e-12, atol=1e-12)
    assert passed.equal(input)


def test_is_pytorchs_layer_to_everybody_else(kernel):
    ours, plain = pair(4, 6, 3)
    assert isinstance(ours, nn.Conv2d)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert repr(ours) == repr(plain)
    copy = pickle.loads(pickle.dumps(ours))
    input = draw(2, 4, 5, 5)
    assert copy(input).equal(ours(input))
    with pytest.raises(RuntimeError, match=r"channels|size"):
        ours(draw(2, 4, 2, 2))  # As PyTorch says it.
    unbatched = draw(4, 5, 5)
    torch.testing.assert_close(ours(unbatched), plain(unbatched))
    assert not ours.takes_kernel(unbatched)


def test_forward_mode_is_left_to_pytorch(kernel):
    ours, plain = pair(4, 6, 3)
    input, tangent = draw(3, 4, 5, 5), draw(3, 4, 5, 5, seed=1)
    for call in (lambda layer, x: layer(x.relu()), lambda layer, x: layer(x, relu_input=True)):
        expected = torch.func.jvp(lambda x: plain(x.relu()), (input,), (tangent,))
        actual = torch.func.jvp(lambda x, call=call: call(ours, x), (input,), (tangent,))
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_runs_under_autocast(kernel):
    layer = Conv2d(8, 8, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.randn(2, 8, 4, 4), relu_input=True)
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("batch", [2, 128])
def test_a_residual_is_taken_alike_on_any_path(kernel, batch):
    layer = Conv2d(64, 64, 3, padding=1)
    input, residual = torch.randn(2, batch, 64, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(input, residual=residual).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="residual"):
        layer(input, residual=residual[:1])


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("shortcut", [False, True])
def test_a_block_begins_as_it_is_written(kernel, normed, shortcut):
    first, plain = pair(4, 4, 3, padding=1)
    other = pair(4, 4, 1) if shortcut else (None, None)
    input = draw(3, 4, 5, 5).requires_grad_()
    behind = input * 2 - 0.5 if normed else input
    features, residual = begin_block(input, behind, first, other[0])
    activated = behind.relu()
    expected = plain(activated), other[1](activated) if shortcut else input
    for one, wanted in zip((features, residual), expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12)
    losses = [(one.square() + two.exp()).sum() for one, two in ((features, residual), expected)]
    ours, theirs = (torch.autograd.grad(loss, input, retain_graph=True)[0] for loss in losses)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def measured():
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def pays(row):
    sizes = [int(row[name]) for name in ("images", "in_channels", "out_channels", "side", "kernel", "stride")]
    images, before, after, side, kernel, stride = sizes
    dtype = getattr(torch, row["dtype"])
    return kernel_pays(dtype, images, (before, after), (side, side), kernel, stride, simd=row["simd"])


@pytest.mark.parametrize("simd", ["avx512", "avx2"])
def test_the_rule_takes_what_was_measured_to_be_faster(simd):
    """Nowhere is it much slower than PyTorch, and of what it gives up little is much faster."""
    rows = [row for row in measured() if row["simd"] == simd]
    ratios = [float(row["pytorch_ms"]) / float(row["ours_ms"]) for row in rows]
    taken = [ratio for row, ratio in zip(rows, ratios, strict=True) if pays(row)]
    assert len(taken) > 200
    assert min(taken) > 0.9
    assert sum(ratio < 0.97 for ratio in taken) < 0.05 * len(taken)
    assert sum(taken) / len(taken) > 1.2
    left = [ratio for row, ratio in zip(rows, ratios, strict=True) if not pays(row)]
    assert sum(ratio > 1.3 for ratio in left) < 0.1 * len(left)


def test_the_table_tells_what_the_rule_takes():
    assert all((row["takes"] == "ours") == pays(row) for row in measured())


def test_no_kernel_where_nothing_was_measured(monkeypatch):
    layer, input = Conv2d(64, 64, 3, padding=1), torch.randn(64, 64, 4, 4)
    for known in ("avx512", "avx2", None):
        monkeypatch.setattr(module, "_SIMD", known)
        assert layer.takes_kernel(input) == (known is not None)
        assert not layer.takes_kernel(input.to("meta"))
        assert not layer.takes_kernel(input[:1])
        assert not layer.takes_kernel(input.double())
