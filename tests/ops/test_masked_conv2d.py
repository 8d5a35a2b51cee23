"""masked_conv2d against a plain convolution with the masked weight."""

import pytest
import torch
import torch.nn.functional as F

from cpc_ext.ops import masked_conv2d
from cpc_ext.ops.masked_conv2d import gated_activation, masked_conv2d_reference

MASKS = {
    "above": [[1, 1, 1], [1, 1, 1], [0, 0, 0]],
    "raster": [[1, 1, 1], [1, 0, 0], [0, 0, 0]],
    "left": [[1, 0, 0], [1, 0, 0], [1, 0, 0]],
    "below right": [[0, 0, 0], [0, 0, 0], [0, 0, 1]],
    "all": [[1, 1, 1]] * 3,
    "nothing": [[0, 0, 0]] * 3,
    "even": [[1, 1], [0, 1]],
    "row": [[1, 1, 0]],
}


def problem(mask, channels=3, out_channels=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    input = torch.randn(2, channels, 5, 6, dtype=dtype, generator=generator)
    weight = torch.randn(out_channels, channels, *mask.shape[-2:], dtype=dtype, generator=generator)
    bias = torch.randn(out_channels, dtype=dtype, generator=generator)
    return [tensor.requires_grad_() for tensor in (input, weight, bias)]


@pytest.mark.parametrize("activation", [None, "relu", "gated"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_equals_convolution_with_masked_weight(name, dilation, activation):
    mask = torch.tensor(MASKS[name])
    input, weight, bias = problem(mask)

    output = masked_conv2d(input, weight, bias, mask=mask.bool(), dilation=dilation, activation=activation)
    expected = F.conv2d(input, weight * mask, bias, padding="same", dilation=dilation)
    if activation == "relu":
        expected = expected.clamp(min=0)
    if activation == "gated":
        expected = expected[:, :2].tanh() * expected[:, 2:].sigmoid()

    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)
    gradient = torch.randn_like(output)
    actual = torch.autograd.grad(output, (input, weight, bias), gradient)
    for one, other in zip(actual, torch.autograd.grad(expected, (input, weight, bias), gradient), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_mask_per_channel_and_no_bias():
    mask = torch.rand(4, 3, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.3
    input, weight, _ = problem(mask)
    torch.testing.assert_close(
        masked_conv2d(input, weight, mask=mask), F.conv2d(input, weight * mask, padding=1), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(
        masked_conv2d(input, weight, mask=mask), masked_conv2d_reference(input, weight, mask=mask), atol=1e-12, rtol=0
    )


def test_gradients_by_finite_differences():
    mask = torch.tensor(MASKS["raster"])
    input, weight, bias = problem(mask, channels=2, out_channels=2)
    assert torch.autograd.gradcheck(
        lambda *tensors: masked_conv2d(*tensors, mask=mask, activation="gated"), (input[:1, :, :3, :3], weight, bias)
    )


def test_channels_last_stays():
    mask = torch.tensor(MASKS["above"])
    input, weight, bias = problem(mask, dtype=torch.float32)
    output = masked_conv2d(input.to(memory_format=torch.channels_last), weight, bias, mask=mask)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_empty_batch():
    mask = torch.tensor(MASKS["above"])
    _, weight, bias = problem(mask)
    input = torch.zeros(0, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    output = masked_conv2d(input, weight, bias, mask=mask, activation="gated")
    output.sum().backward()
    assert output.shape == (0, 2, 5, 6)
    assert input.grad.shape == input.shape
    assert not weight.grad.any()


def test_gated_activation():
    features = torch.tensor([[0.5, -1.0, 2.0, 0.0]])
    expected = torch.tensor([[0.5, -1.0]]).tanh() * torch.tensor([[2.0, 0.0]]).sigmoid()
    torch.testing.assert_close(gated_activation(features), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
        ({"input": torch.zeros(1, 3, 4, 4, dtype=torch.int64)}, TypeError, "input must be floating, got torch.int64"),
        ({"input": torch.zeros(3, 4, 4)}, ValueError, r"input must be \[B, C, H, W\], got shape \(3, 4, 4\)"),
        ({"input": torch.zeros(1, 2, 4, 4)}, ValueError, "input must have the weight's 3 channels, got 2"),
        ({"weight": torch.zeros(4, 3, 3)}, ValueError, r"weight must be \[O, C, kh, kw\]"),
        ({"weight": torch.zeros(0, 3, 3, 3)}, ValueError, "weight must not be empty"),
        ({"weight": torch.zeros(4, 3, 3, 3, device="meta")}, ValueError, "weight must be on the input's device cpu"),
        ({"weight": torch.zeros(3, 3, 3, 3), "activation": "gated"}, ValueError, "even number of output channels"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor or None, got float"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(4,\), got \(3,\)"),
        ({"mask": [[1]]}, TypeError, "mask must be a tensor, got list"),
        ({"mask": torch.ones(2, 2)}, ValueError, r"mask must have shape \(3, 3\) or \(4, 3, 3, 3\), got \(2, 2\)"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        ({"dilation": 1.0}, TypeError, "dilation must be an int, got float"),
        ({"activation": "tanh"}, ValueError, 'activation must be None, "relu" or "gated", got \'tanh\''),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"input": torch.zeros(1, 3, 4, 4), "weight": torch.zeros(4, 3, 3, 3), "mask": torch.ones(3, 3)}
    with pytest.raises(error, match=message):
        masked_conv2d(**{**arguments, **change})
