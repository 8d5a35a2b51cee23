"""PixelCNN++ and its mixture of logistics as of the PyTorch port, reproduced from its weights."""

import re

import pytest
import torch

from cpc_ext.models import PixelCNNPP
from cpc_ext.ops import logistic_mixture_nll

TOLERANCES = {torch.float64: {"atol": 1e-9, "rtol": 1e-9}, torch.float32: {"atol": 1e-4, "rtol": 1e-4}}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
def test_logistic_mixture(golden, channels, memory_format, dtype):
    problem = golden(f"pixel_cnn_pp.logistic_mixture_{channels}ch")
    images = ((problem.tensors["x"] + 1) * 127.5).round().to(torch.uint8)
    params = problem.tensors["params"].to(dtype, memory_format=memory_format).requires_grad_()

    nll = logistic_mixture_nll(images, params)
    nll.sum().backward()

    torch.testing.assert_close(nll.sum(), problem.tensors["nll_sum"].to(dtype), **TOLERANCES[dtype])
    torch.testing.assert_close(params.grad, problem.tensors["grad_params"].to(dtype), **TOLERANCES[dtype])


def rename(state):
    """The port's names: ours have no level for the wrapped layer."""
    return {re.sub(r"\.(conv|deconv|lin_a)\.(weight_g|weight_v|bias)$", r".\2", name): v for name, v in state.items()}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("channels", [1, 3])
def test_model(golden, channels, dtype):
    problem = golden(f"pixel_cnn_pp.model_{channels}ch")
    config = problem.config
    model = PixelCNNPP(
        channels, channels=config["nr_filters"], blocks=config["nr_resnet"], mixtures=config["nr_logistic_mix"]
    ).double()
    model.load_state_dict(rename(problem.state()))
    model.to(dtype).eval()
    x = problem.tensors["x"]

    params = model.mixture(x.to(dtype), None)

    torch.testing.assert_close(params, problem.tensors["y"].to(dtype), **TOLERANCES[dtype])
    images = ((x + 1) * 127.5).round().to(torch.uint8)
    if "nll_sum" in problem.tensors:
        torch.testing.assert_close(images.double() / 127.5 - 1, x)
        torch.testing.assert_close(model.nats(images).sum(), problem.tensors["nll_sum"].to(dtype), **TOLERANCES[dtype])
