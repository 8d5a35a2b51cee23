"""Group norm, with and without a gradient of its input, against PyTorch's."""

import pytest
import torch

from cpc_ext.nn.group_norm import GroupNorm


@pytest.mark.parametrize("of_input", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dims", [0, 1, 2])
def test_values_and_gradients(of_input, affine, dims, monkeypatch):
    torch.manual_seed(0)
    # The plain layer's own gradient of the weight is safe for contiguous input.
    input = torch.randn(3, 8, *[4] * dims, dtype=torch.float64, requires_grad=of_input)
    layers = [norm(2, 8, eps=0.1, affine=affine).double() for norm in (GroupNorm, torch.nn.GroupNorm)]
    if affine:
        for layer in layers:
            layer.weight.data, layer.bias.data = torch.arange(8).double() + 2, torch.arange(8).double()
    if not of_input and affine:
        monkeypatch.setattr(torch.nn.GroupNorm, "forward", None)
    results = []
    for layer in layers:
        output = layer(input)
        variables = [*layer.parameters(), *[input] * of_input]
        results.append([output, *(torch.autograd.grad((output**2).sum(), variables) if variables else ())])
        monkeypatch.undo()
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_channels_last_input_without_gradient():
    layer = GroupNorm(2, 8)
    input = torch.randn(3, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    output = layer(input)
    output.square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, 2 * output.sum((0, 2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_result_has_the_type_of_the_input(dtype):
    assert GroupNorm(2, 8)(torch.randn(3, 8, 5, dtype=dtype)).dtype == dtype
