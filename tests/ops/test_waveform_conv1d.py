"""The first layer of encoders of sound: values and gradients of the kernel against plain PyTorch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad as gradient_of
from torch.func import jvp, vmap

from cpc_ext.ops import waveform_conv1d

# Tolerances for the rounding of sums of 10 products and of some thousand frames, relative to the largest value.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# Batch, channels, samples, taps, stride, padding: tiles that are full, cut, and less than a register of frames.
SIZES = [
    (2, 16, 20480, 10, 5, 3),
    (2, 7, 333, 10, 5, 2),
    (1, 33, 2000, 3, 1, 1),
    (3, 64, 700, 7, 9, 0),
    (1, 2, 10, 10, 5, 0),
    (1, 5, 3, 9, 4, 3),
]


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(waveforms, weight, bias, scale, shift, *, stride, padding, relu):
    made = F.conv1d(waveforms, weight, bias, stride, padding)
    if scale is not None:
        made = (made - made.mean(1, keepdim=True)) / (made.var(1, keepdim=True) + 1e-5).sqrt()
        made = made * scale[:, None] + shift[:, None]
    return F.relu(made) if relu else made


def problem(batch, channels, samples, taps, *, bias=True, norm=True):
    return (
        draw(batch, 1, samples, seed=0),
        draw(channels, 1, taps, seed=1) * taps**-0.5,
        draw(channels, seed=2) if bias else None,
        1 + draw(channels, seed=3) / 4 if norm else None,
        draw(channels, seed=4) if norm else None,
    )


def with_gradients(layer, waveforms, parameters, grad):
    leaves = [None if one is None else one.detach().requires_grad_() for one in parameters]
    made = layer(waveforms, *leaves)
    return made, *torch.autograd.grad(made, [one for one in leaves if one is not None], grad.to(made.dtype))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("bias", "norm"), [(True, False), (True, True), (False, True), (False, False)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values_and_gradients(size, bias, norm, relu, dtype):
    *shape, stride, padding = size
    waveforms, *parameters = (
        # Both compute with rounded arguments, so that their rounding does not count as the kernel's error.
        None if one is None else one.to(dtype).double()
        for one in problem(*shape, bias=bias, norm=norm)
    )

    def ours(waveforms, weight, bias, scale, shift):
        return waveform_conv1d(
            waveforms, weight, bias, stride=stride, padding=padding, scale=scale, shift=shift, relu=relu
        )

    expected = plain(waveforms, *parameters, stride=stride, padding=padding, relu=False)
    grad = draw(*expected.shape, seed=5).to(dtype).double()
    if relu:
        # If rounding determines the sign of a value, it also determines the gradient.
        grad *= expected.abs() > 8 * TOLERANCES[dtype]

    def reference(waveforms, *parameters):
        return plain(waveforms, *parameters, stride=stride, padding=padding, relu=relu)

    exact = with_gradients(reference, waveforms, parameters, grad)
    typed = [None if one is None else one.to(dtype) for one in parameters]
    typed[2:] = [None if one is None else one.float() for one in parameters[2:]]
    made = with_gradients(ours, waveforms.to(dtype), typed, grad)
    assert made[0].dtype == dtype
    for one, other in zip(made, exact, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).abs().max() <= TOLERANCES[dtype] * max(other.abs().max(), 1)


def test_strided_arguments_and_gradients():
    waveforms, weight, bias, scale, shift = (one.float() for one in problem(2, 12, 500, 10))
    expanded = waveforms[:1].expand(3, 1, 500)
    apart = torch.stack([weight, weight], 3)[..., 0]
    every_other = torch.stack([bias, bias], 1)[:, 0]
    options = {"stride": 5, "padding": 2, "scale": scale, "shift": shift, "relu": True}
    expected = waveform_conv1d(waveforms[:1].repeat(3, 1, 1), weight, bias, **options)
    apart.requires_grad_()
    made = waveform_conv1d(expanded, apart, every_other, **options)
    assert torch.equal(made, expected)
    grad = draw(*made.shape[::-1], seed=6).float().permute(2, 1, 0)
    (one,) = torch.autograd.grad(made, apart, grad, retain_graph=True)
    (other,) = torch.autograd.grad(made, apart, grad.contiguous())
    assert torch.equal(one, other)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_shows(bad, norm):
    """A ReLU would hide it, and a run that has diverged would go on with a loss that is finite."""
    waveforms, *parameters = (None if one is None else one.float() for one in problem(2, 7, 333, 10, norm=norm))
    waveforms[1, 0, 100] = bad
    options = {"stride": 5, "padding": 2, "relu": True}

    def ours(waveforms, weight, bias, scale, shift):
        return waveform_conv1d(waveforms, weight, bias, scale=scale, shift=shift, **options)

    def reference(waveforms, *parameters):
        return plain(waveforms, *parameters, **options)

    grad = draw(*ours(waveforms, *parameters).shape, seed=5)
    made = with_gradients(ours, waveforms, parameters, grad)
    assert made[0].isfinite().logical_not().any((1, 2)).tolist() == [False, True]
    for one, other in zip(made, with_gradients(reference, waveforms, parameters, grad), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("stride", [2**15, 2**30, 2**60, 2**63 - 1, 2**70])
def test_a_stride_beyond_the_waveform_leaves_one_frame(stride):
    waveforms, weight, bias, *_ = (one.float() for one in problem(2, 7, 333, 10))
    results = []
    for given in (stride, 333):
        leaf = weight.clone().requires_grad_()
        made = waveform_conv1d(waveforms, leaf, bias, stride=given)
        results.append((made, *torch.autograd.grad(made.sum(), leaf)))
    assert results[0][0].shape == (2, 7, 1)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize("threads", [2, 3])
def test_the_same_bits_on_any_number_of_threads(threads):
    waveforms, *parameters = (one.float() for one in problem(3, 64, 8000, 10))

    def layer(waveforms, weight, bias, scale, shift):
        return waveform_conv1d(waveforms, weight, bias, stride=5, padding=3, scale=scale, shift=shift, relu=True)

    grad = draw(3, 64, 1600, seed=5)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            results.append(with_gradients(layer, waveforms, parameters, grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_gradients_by_finite_differences_in_everything():
    arguments = [one.requires_grad_() for one in problem(2, 4, 40, 5)]

    def layer(waveforms, weight, bias, scale, shift):
        return waveform_conv1d(waveforms, weight, bias, stride=3, padding=1, scale=scale, shift=shift)

    assert torch.autograd.gradcheck(layer, arguments)
    assert torch.autograd.gradgradcheck(layer, arguments)


def test_a_gradient_in_the_waveforms_is_taken():
    waveforms, weight, bias, *_ = (one.float() for one in problem(2, 4, 100, 10))
    made = waveform_conv1d(waveforms.requires_grad_(), weight, bias, stride=5, relu=True)
    (grad,) = torch.autograd.grad(made.sum(), waveforms)
    (expected,) = torch.autograd.grad(F.relu(F.conv1d(waveforms, weight, bias, 5)).sum(), waveforms)
    torch.testing.assert_close(grad, expected)


def test_a_gradient_in_the_waveforms_is_taken_outside_of_vmap():
    waveforms, weight, *_ = (one.float() for one in problem(2, 4, 100, 10))
    batch = torch.stack([waveforms, waveforms * 2])

    def total(layer, batch):
        return vmap(lambda one: layer(one, weight).square())(batch).sum()

    grad, expected = (
        gradient_of(lambda x, layer=layer: total(layer, x))(batch) for layer in (waveform_conv1d, F.conv1d)
    )
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("name", ["waveforms", "weight", "scale"])
def test_forward_mode(name):
    waveforms, weight, _, scale, shift = (one.float() for one in problem(2, 4, 100, 10))
    given = {"waveforms": waveforms, "weight": weight, "scale": scale, "shift": shift}
    tangent = draw(*given[name].shape, seed=5).float()

    def layer(value):
        return waveform_conv1d(**given | {name: value}, stride=5)

    def exact(value):
        arguments = {key: one.double() for key, one in (given | {name: value}).items()}
        return plain(**arguments, bias=None, stride=5, padding=0, relu=False)

    expected = jvp(exact, (given[name].double(),), (tangent.double(),))[1].float()
    torch.testing.assert_close(jvp(layer, (given[name],), (tangent,))[1], expected, rtol=1e-4, atol=1e-5)
    with forward_ad.dual_level():
        made = forward_ad.unpack_dual(layer(forward_ad.make_dual(given[name], tangent)))
    torch.testing.assert_close(made.tangent, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [False, True])
def test_what_is_no_number_stays_so_behind_relu(norm):
    waveforms, weight, _, scale, shift = (one.float() for one in problem(1, 4, 30, 10))
    waveforms[0, 0, 12] = torch.nan
    parameters = {"scale": scale, "shift": shift} if norm else {}
    made = waveform_conv1d(waveforms, weight, stride=10, relu=True, **parameters)
    assert made.isnan().tolist() == [[[False, True, False]] * 4]


def test_second_derivatives_are_refused_where_the_kernel_runs():
    waveforms, weight, *_ = (one.float() for one in problem(1, 4, 100, 10))
    made = waveform_conv1d(waveforms, weight.requires_grad_(), relu=True)
    (grad,) = torch.autograd.grad(made.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="waveform_conv1d has no second derivatives"):
        grad.sum().backward()


def test_autocast():
    waveforms, *parameters = (one.float() for one in problem(2, 8, 400, 10))
    options = {"stride": 5, "scale": parameters[2], "shift": parameters[3], "relu": True}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = waveform_conv1d(waveforms, *parameters[:2], **options)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.float(), waveform_conv1d(waveforms, *parameters[:2], **options), rtol=0, atol=0.05)


def test_no_waveforms():
    weight = torch.randn(4, 1, 10, requires_grad=True)
    made = waveform_conv1d(torch.zeros(0, 1, 100), weight, stride=5)
    assert made.shape == (0, 4, 19)
    (grad,) = torch.autograd.grad(made.sum(), weight)
    assert not grad.any()


def test_what_is_registered():
    waveforms, weight, bias, scale, shift = (one.float() for one in problem(2, 4, 100, 10))
    arguments = (waveforms, weight.requires_grad_(), bias, scale.requires_grad_(), shift, 5, 2, 1e-5, True)
    torch.library.opcheck(torch.ops.cpc_ext.waveform_conv1d.default, arguments)


def test_compiles():
    waveforms, weight, bias, *_ = (one.float() for one in problem(2, 4, 100, 10))
    weight.requires_grad_()

    def layer(waveforms):
        return waveform_conv1d(waveforms, weight, bias, stride=5, relu=True)

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(waveforms), layer(waveforms))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"waveforms": torch.zeros(2, 100)}, ValueError, r"waveforms must be \[B, 1, T\]"),
        ({"waveforms": torch.zeros(2, 2, 100)}, ValueError, r"waveforms must be \[B, 1, T\]"),
        ({"waveforms": torch.zeros(2, 1, 100, dtype=torch.int16)}, TypeError, "waveforms must be float32"),
        ({"waveforms": torch.zeros(2, 1, 9)}, ValueError, "shorter than the kernel of 10 taps"),
        ({"weight": torch.zeros(4, 1, 10, dtype=torch.float64)}, TypeError, "weight must be float32"),
        ({"weight": torch.zeros(4, 2, 10)}, ValueError, r"weight must be \[C, 1, K\]"),
        ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[4\]"),
        ({"scale": torch.ones(4)}, ValueError, "both scale and shift"),
        ({"scale": torch.ones(4), "shift": torch.ones(3)}, ValueError, r"shift must be \[4\]"),
        ({"scale": torch.ones(4), "shift": torch.ones(4, dtype=torch.int64)}, TypeError, "shift must be floating"),
        ({"scale": torch.ones(4, dtype=torch.bool), "shift": torch.ones(4)}, TypeError, "scale must be floating"),
        ({"bias": torch.zeros(4, device="meta")}, ValueError, "bias must be on cpu, as waveforms are, got meta"),
        ({"relu": "no"}, TypeError, "relu must be a bool, got str"),
        ({"eps": "small"}, TypeError, "eps must be a number"),
        ({"stride": 0}, ValueError, "stride must be at least 1"),
        ({"stride": 1.5}, TypeError, "stride must be an int, got float"),
        ({"padding": -1}, ValueError, "padding must be at least 0"),
        ({"padding": 2**62, "stride": 2**62}, ValueError, "padding must be in 0..281474976710656"),
    ],
)
def test_wrong_arguments(change, error, words):
    arguments = {"waveforms": torch.zeros(2, 1, 100), "weight": torch.zeros(4, 1, 10), "bias": torch.zeros(4)}
    with pytest.raises(error, match=words):
        waveform_conv1d(**{**arguments, **change})


def test_one_channel_cannot_be_normalised():
    with pytest.raises(ValueError, match="at least 2 channels"):
        waveform_conv1d(torch.zeros(1, 1, 20), torch.zeros(1, 1, 10), scale=torch.ones(1), shift=torch.zeros(1))
