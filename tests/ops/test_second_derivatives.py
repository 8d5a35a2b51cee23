"""Second derivatives: correct for ops that have them, and an error for ops that do not, in all cases."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import functional, grad, gradgradcheck
from torch.utils.checkpoint import checkpoint

from cpc_ext import nn as cpc_nn
from cpc_ext.models import GatedPixelCNN
from cpc_ext.models.pixels import masked_features
from cpc_ext.nn import masked_conv2d as layer_module
from cpc_ext.nn import unit_length as unit_length_module
from cpc_ext.nn.across_ranks import ring_info_nce
from cpc_ext.ops import (
    extract_patches,
    info_nce,
    logistic_mixture_nll,
    masked_conv2d,
    scores_logsumexp,
    sigmoid_contrast,
)
from cpc_ext.ops.info_nce import info_nce_reference
from cpc_ext.ops.masked_conv2d import masked_conv2d_reference

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")


def draw(*shape, seed=0, device="cpu", dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(device)


# --- masked_conv2d ---

MASKS = {
    "ones": torch.ones(3, 3, dtype=torch.bool),
    "causal": torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool(),
    "even": torch.tensor([[1, 0], [1, 1]]).bool(),
    "row": torch.tensor([[1, 1, 0]]).bool(),
    "nothing": torch.zeros(1, 1, dtype=torch.bool),
    "channels": torch.rand(4, 2, 3, 3, generator=torch.Generator().manual_seed(7)) < 0.5,
}


def convolution_arguments(mask, device):
    """Input, weight, bias and condition of a small problem, 4 channels out of 2."""
    shapes = (2, 2, 3, 4), (4, 2, *mask.shape[-2:]), (4,), (2, 4, 1, 1)
    return [draw(*shape, seed=seed, device=device).requires_grad_() for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("activation", [None, "relu", "gated"])
@pytest.mark.parametrize(("mask", "dilation"), [*((name, 1) for name in MASKS), ("causal", 2), ("even", 3)])
def test_masked_conv2d_has_second_derivatives(device, mask, dilation, activation):
    visible = MASKS[mask].to(device)
    input, weight, bias, condition = convolution_arguments(MASKS[mask], device)
    options = {"mask": visible, "dilation": dilation, "activation": activation}
    assert gradgradcheck(lambda x, w: masked_conv2d(x, w, **options), (input, weight), fast_mode=True)
    assert gradgradcheck(
        lambda x, w, b, c: masked_conv2d(x, w, b, condition=c, **options),
        (input, weight, bias, condition),
        fast_mode=True,
    )


@pytest.mark.parametrize("activation", [None, "relu", "gated"])
def test_derivatives_of_any_order_with_a_constant_upstream_gradient(device, activation):
    """A sum's gradient is a constant, of which nothing downstream can tell that a second derivative is wanted."""
    results = []
    for convolve in (masked_conv2d, masked_conv2d_reference):
        tensors = convolution_arguments(MASKS["causal"], device)
        options = {"mask": MASKS["causal"].to(device), "activation": activation}
        value = convolve(*tensors[:3], condition=tensors[3], **options).sum()
        orders = [value]
        for _ in range(3):
            wanted = grad(value, tensors, create_graph=True, allow_unused=True)
            value = sum((part.pow(3).sum() for part in wanted if part is not None), torch.zeros_like(value))
            orders.append(value)
            if not value.requires_grad:
                break
        results.append(orders)
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


def penalty(convolve, input, weight, **options):
    """Return the weight's gradient of a critic's loss with WGAN-GP's penalty (arXiv 1704.00028, equation 3)."""
    input, weight = input.clone().requires_grad_(), weight.clone().requires_grad_()
    output = convolve(input, weight, **options).mean()
    (of_input,) = grad(output, input, create_graph=True)
    return grad(output + 10 * (of_input.norm() - 1) ** 2, weight)[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradient_penalty_through_a_masked_convolution(device, dtype):
    mask = MASKS["causal"].to(device)
    input, weight = draw(1, 2, 5, 5, device=device), draw(2, 2, 3, 3, seed=1, device=device)
    ours = penalty(masked_conv2d, input.to(dtype), weight.to(dtype), mask=mask)
    expected = penalty(
        lambda x, w: F.conv2d(x, w * mask, padding=1), input.to(dtype).double(), weight.to(dtype).double()
    )
    assert expected.abs().max() > 0.1
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def test_gradient_penalty_through_a_pixel_model(monkeypatch):
    torch.manual_seed(0)
    model = GatedPixelCNN(1, channels=4, layers=2, num_classes=2).double()
    images = torch.randint(0, 256, (2, 1, 4, 4), generator=torch.Generator().manual_seed(0))

    def of_weights():
        weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        loss = model.bits_per_dim(images, torch.tensor([0, 1]))
        first = grad(loss, weights, create_graph=True)
        return grad(sum(part.square().sum() for part in first), weights, allow_unused=True)

    ours = of_weights()
    for module in (layer_module, masked_features):
        monkeypatch.setattr(module, "masked_conv2d", masked_conv2d_reference)
    for one, other in zip(ours, of_weights(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_a_step_of_maml_through_a_masked_convolution():
    """The loss after a gradient step, differentiated through the step (Finn et al. 2017, arXiv 1703.03400)."""
    mask, input = MASKS["causal"], draw(2, 2, 4, 4)

    def after_a_step(convolve):
        weight = draw(4, 2, 3, 3, seed=1).requires_grad_()
        (step,) = grad(
            convolve(input, weight, mask=mask, activation="gated").square().mean(), weight, create_graph=True
        )
        return grad(convolve(input.flip(0), weight - 0.5 * step, mask=mask, activation="gated").mean(), weight)[0]

    torch.testing.assert_close(after_a_step(masked_conv2d), after_a_step(masked_conv2d_reference), rtol=1e-10, atol=0)


def test_gradient_alone_is_the_same_with_and_without_a_graph(device):
    for activation in (None, "relu", "gated"):
        tensors = convolution_arguments(MASKS["channels"], device)
        output = masked_conv2d(
            *tensors[:3], condition=tensors[3], mask=MASKS["channels"].to(device), activation=activation
        )
        upstream = draw(*output.shape, seed=9, device=device)
        plain = grad(output, tensors, upstream, retain_graph=True)
        for one, other in zip(plain, grad(output, tensors, upstream, create_graph=True), strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)


# --- extract_patches ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop": (5, 4), "offsets": torch.tensor([[0, 1], [1, 2]]), "flip": torch.tensor([True, False])},
        {"gray": True, "mean": [0.4], "std": [0.3], "channels_last": True},
        {"patch_norm": True},
        {"patch_norm": True, "gray": True, "channels_last": True, "std": [0.5]},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_extract_patches_has_second_derivatives(device, options):
    options = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in options.items()}
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = images.to(device).requires_grad_()
    assert gradgradcheck(lambda images: extract_patches(images, 3, 2, **options), (images,), fast_mode=True)


def test_second_derivative_of_normalised_patches_with_a_constant_upstream_gradient(device):
    images = torch.rand(1, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)

    def normalised(image):
        centred = image - image.mean()
        return (centred / (centred.square().mean().sqrt() + 0.1)).flatten()[0]

    ours, expected = (
        functional.hessian(f, images)
        for f in (lambda image: extract_patches(image, 3, 1, patch_norm=True).flatten()[0], normalised)
    )
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


# --- Ops without second derivatives ---


def grids(first, second):
    """Encodings and contexts [1, 2, 3, 4, 2] out of two tensors [4, 12]."""
    return first.view(1, 2, 3, 4, 2), second.view(1, 2, 3, 4, 2)


def grid_loss(first, second, **options):
    torch.manual_seed(0)
    return cpc_nn.GridInfoNCE(3, pred_steps=2, skip=0, **options).double()(*grids(first, second)).loss


def target_loss(first, second):
    torch.manual_seed(0)
    return cpc_nn.TargetInfoNCE(3, pred_steps=2, skip=0).double()(*grids(first, second)).loss


INDICES = torch.tensor([1, 0, 3, 2])
WEIGHTS = torch.tensor([1.0, 0, 2, 3], dtype=torch.float64)
LOSSES = {
    "mean": lambda a, b: info_nce(a, b).loss,
    "sum": lambda a, b: info_nce(a, b, weights=WEIGHTS, reduction="sum").loss,
    "none": lambda a, b: info_nce(a, b, reduction="none").loss.sum(),
    "sampled": lambda a, b: info_nce(a, b, negatives=INDICES[:, None]).loss,
    "scaled": lambda a, b: info_nce(a, b, scale=a[0, 0].exp(), key_bias=b[:, 0]).loss,
    "symmetric": lambda a, b: info_nce(a, b, INDICES, symmetric=True).loss,
    "log-sum": lambda a, b: scores_logsumexp(a, b, exclude=INDICES).sum(),
    "sigmoid": lambda a, b: sigmoid_contrast(a, b, scale=b[0, 0].exp(), bias=a[0, 1]),
    "ring": lambda a, b: ring_info_nce(a, b, INDICES).loss.mean(),
    "ring-uneven": lambda a, b: ring_info_nce(a, b.T.contiguous().T, INDICES).loss.mean(),
    "nt-xent": lambda a, b: cpc_nn.NTXentLoss(0.5)(a, b),
    "module": lambda a, b: cpc_nn.InfoNCELoss(0.5)(a, b).loss,
    "grid": grid_loss,
    "grid-all": lambda a, b: grid_loss(a, b, neg_samples="all"),
    "target": target_loss,
}


def refused(op="info_nce"):
    return pytest.raises(RuntimeError, match=f"{op} has no second derivatives")


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_of_contrast_are_refused(name):
    loss, op = LOSSES[name], "predict_and_contrast" if name == "grid" else "info_nce"
    first, second = (draw(4, 12, seed=seed).requires_grad_() for seed in range(2))
    for upstream in (lambda value: value, lambda value: value.square(), lambda value: 3 * value):
        for by in (first, second):
            (gradient,) = grad(upstream(loss(first, second)), by, create_graph=True)
            for other in (first, second):
                with refused(op):
                    grad(gradient.sum(), other, retain_graph=True, allow_unused=True)
            with refused(op):
                gradient.square().sum().backward()
    with refused(op):
        functional.hessian(lambda queries: loss(queries, second), first.detach())
    with refused(op):
        functional.hvp(lambda queries: loss(queries, second), first.detach(), torch.ones_like(first))

    weight = draw(12, 12, seed=3).requires_grad_()
    (step,) = grad(loss(first.detach() @ weight, second.detach()), weight, create_graph=True)
    with refused(op):
        grad(loss(second.detach() @ (weight - 0.5 * step), first.detach()), weight)


@pytest.mark.parametrize("name", LOSSES)
def test_first_derivatives_of_contrast_are_as_ever(name):
    loss = LOSSES[name]
    first, second = (draw(4, 12, seed=seed).requires_grad_() for seed in range(2))
    value = loss(first, second)
    plain = grad(value, (first, second), retain_graph=True)
    again = grad(value, (first, second), retain_graph=True)
    with_graph = grad(value, (first, second), create_graph=True)
    value.backward()
    for one, *others in zip(plain, again, with_graph, (first.grad, second.grad), strict=True):
        assert not one.requires_grad
        assert all(torch.equal(one, other) for other in others)
    # A gradient that counts as a constant may be used in what is differentiated.
    (a_step,) = grad(loss(first, second), first, create_graph=True)
    loss(first - a_step.detach(), second).backward()


def test_second_derivatives_in_weights_scales_biases_and_in_the_upstream_gradient_are_refused():
    queries, keys = (draw(4, 3, seed=seed).requires_grad_() for seed in range(2))
    weights, bias = WEIGHTS.clone().requires_grad_(), draw(4, seed=2).requires_grad_()
    upstream, scale = (torch.tensor(2.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = info_nce(queries, keys, weights=weights, scale=scale, key_bias=bias, reduction="sum").loss
    for by in (queries, weights, scale, bias):
        (gradient,) = grad(loss, by, upstream, create_graph=True)
        for other in (queries, keys, weights, scale, bias, upstream):
            with refused():
                grad(gradient.sum(), other, retain_graph=True)


def test_second_derivatives_of_the_mixture_are_refused():
    images = torch.randint(0, 256, (2, 3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for loss in (lambda params: logistic_mixture_nll(images, params).sum(),
                 lambda params: cpc_nn.LogisticMixtureLoss()(images, params)):  # fmt: skip
        for dtype in (torch.float32, torch.float64):
            params = draw(2, 20, 3, 3, dtype=dtype).requires_grad_()
            scale = torch.ones((), dtype=dtype, requires_grad=True)
            (gradient,) = grad(loss(params * scale), params, create_graph=True)
            for by in (params, scale):
                with pytest.raises(RuntimeError, match="logistic_mixture_nll has no second derivatives"):
                    grad(gradient.sum(), by, retain_graph=True)
            with pytest.raises(RuntimeError, match="logistic_mixture_nll has no second derivatives"):
                functional.hessian(loss, params.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_refused_behind_activation_checkpointing(reduction):
    queries, keys = (draw(4, 3, seed=seed).requires_grad_() for seed in range(2))
    loss = checkpoint(
        lambda q, k: info_nce(q * 2, k, reduction=reduction).loss.sum(), queries, keys, use_reentrant=False
    )
    (gradient,) = grad(loss, queries, create_graph=True)
    expected = grad(info_nce_reference(queries * 2, keys, reduction=reduction).loss.sum(), queries)[0]
    torch.testing.assert_close(gradient.detach(), expected)
    with refused():
        grad(gradient.sum(), keys)


def test_gradients_of_compiled_functions():
    """Compiled functions have first derivatives; PyTorch refuses second ones of all of them."""
    mask, input, weight = MASKS["causal"], draw(1, 2, 4, 4).requires_grad_(), draw(2, 2, 3, 3, seed=1).requires_grad_()

    def loss(input, weight):
        features = masked_conv2d(input, weight, mask=mask, activation="gated").flatten(2)[0]
        return info_nce(features.T, features.T).loss + extract_patches(input, 2, 1, patch_norm=True).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, actual = (grad(f(input, weight), (input, weight)) for f in (loss, compiled))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)
    output = compiled(input, weight)
    with pytest.raises(RuntimeError):
        grad(grad(output, input, create_graph=True)[0].sum(), weight)


# --- Vectors of length 1 ---


def test_unit_length_has_derivatives_of_any_order():
    vectors = draw(3, 4).requires_grad_()
    assert gradgradcheck(unit_length_module.unit_length, (vectors,))
