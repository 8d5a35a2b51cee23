"""Sampling from networks whose outputs are not finite is an error, never an image."""

from __future__ import annotations

import math

import pytest
import torch

from cpc_ext.models import GatedPixelCNN, PixelCNN, PixelCNNPP
from cpc_ext.models.pixels import stream_features
from cpc_ext.ops import sample_logistic_mixture
from cpc_ext.ops.pixel_steps import _ReferenceSteps

MODELS = {
    "pixelcnn": lambda: PixelCNN(3, hidden_channels=6, layers=1),
    "gated": lambda: GatedPixelCNN(3, channels=6, layers=1),
    "++": lambda: PixelCNNPP(3, channels=4, blocks=1, mixtures=2),
}


@pytest.fixture(params=["kernel", "tensors"])
def runner(request, monkeypatch):
    """Run PixelCNN++'s steps by the CPU's kernel, and by tensor operations as on other devices."""
    if request.param == "tensors":
        monkeypatch.setattr(stream_features, "pixel_steps", _ReferenceSteps)


def model_of(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def last_bias(model):
    return (model.nin_out if isinstance(model, PixelCNNPP) else model.logits_layer).bias


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_outputs_that_are_not_finite(runner, name, cached, value):
    model = model_of(name)
    last_bias(model)[-1] = value  # Of the last colour only.
    culprit = "nin_out.bias" if name == "++" else "logits_layer.bias"
    for temperature in (1.0, 0.0):
        with pytest.raises(RuntimeError, match=f"outputs are not finite for 2 of 2 images.*{culprit} is not"):
            model.sample(2, 4, cached=cached, temperature=temperature)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_weights_that_are_nan(runner, name):
    model = model_of(name)
    for parameter in model.parameters():
        parameter.fill_(math.nan)
    with pytest.raises(RuntimeError, match="not finite for 1 of 1 images"):
        model.sample(1, 4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_finite_weights_whose_features_overflow(runner, name):
    model = model_of(name)
    if name == "++":  # Whose other layers are normalised.
        model.nin_out.weight_g.fill_(3e38)
    else:
        for parameter in model.parameters():
            parameter.mul_(1e30)
    with pytest.raises(RuntimeError, match="its weights are finite"):
        model.sample(1, 4)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_completion(runner, name, cached):
    model = model_of(name)
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    completed = model.sample(2, 4, images=images, known_rows=2, cached=cached)
    assert torch.equal(completed[:, :, :2], images[:, :, :2])
    last_bias(model).fill_(math.nan)
    # Nothing is left to draw, so nothing is wrong.
    assert torch.equal(model.sample(2, 4, images=images, known_rows=4, cached=cached), images)
    with pytest.raises(RuntimeError, match="not finite for 2 of 2 images"):
        model.sample(2, 4, images=images, known_rows=3, cached=cached)


@torch.no_grad()
def test_only_the_class_that_is_broken():
    model = GatedPixelCNN(1, channels=4, layers=1, num_classes=3).eval()
    model.layers[0].class_biases[1].weight[1] = math.nan
    assert model.sample(2, 4, labels=torch.tensor([0, 2])).shape == (2, 1, 4, 4)
    with pytest.raises(RuntimeError, match="not finite for 1 of 3 images"):
        model.sample(3, 4, labels=torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_op_warns_on_the_cpu(value):
    params, noise = torch.zeros(1, 20, 2, 2), torch.full((1, 5, 2, 2), 0.3)
    expected = sample_logistic_mixture(params, noise=noise)
    params[0, 2, 1, 1] = value
    with pytest.warns(RuntimeWarning, match="params are not finite"):
        samples = sample_logistic_mixture(params, noise=noise)
    same = torch.ones(2, 2, dtype=torch.bool)
    same[1, 1] = False
    assert torch.equal(samples[:, :, same], expected[:, :, same])
