"""The mixture of logistics of the PyTorch port of PixelCNN++, reproduced."""

import pytest
import torch

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
