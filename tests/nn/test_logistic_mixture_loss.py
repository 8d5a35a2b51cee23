"""The mixture of logistics as a loss: bits per dimension against known values."""

import math

import pytest
import torch

from cpc_ext.nn import LogisticMixtureLoss
from cpc_ext.ops import logistic_mixture_nll


@pytest.mark.parametrize(("channels", "params_of_component"), [(1, 3), (3, 10)])
def test_loss_is_the_mean_nats_in_bits(channels, params_of_component):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, channels, 5, 6), dtype=torch.uint8, generator=generator)
    params = torch.randn(4, 2 * params_of_component, 5, 6, generator=generator).requires_grad_()
    loss = LogisticMixtureLoss()(images, params)
    nll = logistic_mixture_nll(images, params)
    torch.testing.assert_close(loss, nll.mean() / (channels * 5 * 6 * math.log(2)))
    (gradient,) = torch.autograd.grad(loss, params)
    (of_nats,) = torch.autograd.grad(nll.sum(), params)
    torch.testing.assert_close(gradient, of_nats / (images.numel() * math.log(2)))


def test_a_certain_value_costs_nothing_and_a_far_one_its_distance():
    images = torch.zeros(1, 1, 1, 1, dtype=torch.uint8)
    params = torch.tensor([0.0, -20.0, 0.0]).view(1, 3, 1, 1)
    assert LogisticMixtureLoss()(images, params).item() == pytest.approx(0, abs=1e-7)
    # Twenty scales above the bin: log of the sigmoid is -20.
    params[0, 1] = 19 + 1 / 255
    assert LogisticMixtureLoss()(images, params).item() == pytest.approx(20 / math.log(2), rel=1e-5)


def test_no_values():
    with pytest.raises(ValueError, match="images must hold at least one value"):
        LogisticMixtureLoss()(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(0, 10, 4, 4))
