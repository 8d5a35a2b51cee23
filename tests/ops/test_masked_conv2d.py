"""masked_conv2d against a plain convolution with the masked weight."""

import itertools
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from cpc_ext._native import native
from cpc_ext.ops import masked_conv2d
from cpc_ext.ops.masked_conv2d import (
    PixelConvolution,
    gated_activation,
    masked_conv2d_reference,
)

# The module, whose name in the package is the function's.
module = sys.modules["cpc_ext.ops.masked_conv2d"]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

MASKS = {
    "above": [[1, 1, 1], [1, 1, 1], [0, 0, 0]],
    "raster": [[1, 1, 1], [1, 0, 0], [0, 0, 0]],
    "left": [[1, 0, 0], [1, 0, 0], [1, 0, 0]],
    "below right": [[0, 0, 0], [0, 0, 0], [0, 0, 1]],
    "all": [[1, 1, 1]] * 3,
    "nothing": [[0, 0, 0]] * 3,
    "even": [[1, 1], [0, 1]],
    "row": [[1, 1, 0]],
    "wide": [[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]],
    "pixel": [[1]],
}
# Half a unit in the last place: the relative error of rounding a result to the type.
ROUNDING = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
DTYPES = list(ROUNDING)


def color_groups_mask(out_channels, channels, kh, kw, groups=3):
    """Raster order, where a colour also sees the earlier colours of its own pixel (PixelCNN's masks)."""
    mask = torch.ones(out_channels, channels, kh, kw, dtype=torch.bool)
    mask[:, :, kh // 2 + 1 :] = mask[:, :, kh // 2, kw // 2 + 1 :] = False
    of_output, of_input = (torch.arange(n) * groups // n for n in (out_channels, channels))
    mask[:, :, kh // 2, kw // 2] = of_input < of_output[:, None]
    return mask


def random_mask(*shape, seed=1, visible=0.3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < visible


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    out_channels: int
    size: tuple[int, int]
    mask: str = "raster"  # Of MASKS; "colours" or "random": a mask of its own for each channel.
    dilation: int = 1
    activation: str | None = None
    condition: tuple[int, ...] | None = None  # Sizes that broadcast, -1 for those of the output.
    layout: str = "nchw"
    weight_layout: str = "nchw"

    def mask_tensor(self):
        if self.mask == "colours":
            return color_groups_mask(self.out_channels, self.channels, 3, 3)
        if self.mask == "random":
            return random_mask(self.out_channels, self.channels, 2, 3)
        return torch.tensor(MASKS[self.mask], dtype=torch.bool)

    def tensors(self, dtype, seed=0):
        """Return input, weight, bias, and condition or None. Weights are scaled so that inputs of gates are near 1."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        mask = self.mask_tensor()
        input = random(self.batch, self.channels, *self.size)
        weight = random(self.out_channels, self.channels, *mask.shape[-2:])
        weight /= (self.channels * mask.shape[-1] * mask.shape[-2]) ** 0.5
        condition = None
        if self.condition is not None:
            full = (self.batch, self.out_channels, *self.size)
            condition = random(
                *(a if b == -1 else b for a, b in zip(full[-len(self.condition) :], self.condition, strict=True))
            )
        tensors = [input, weight, random(self.out_channels), condition]
        tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        tensors[0] = laid_out(tensors[0], self.layout)
        tensors[1] = laid_out(tensors[1], self.weight_layout)
        return tensors


def laid_out(tensor, layout):
    """Return the same values in another memory layout."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "shifted":  # Dense with the channels innermost, but the first value at no round address.
        memory = tensor.new_zeros(tensor.numel() + 1)[1:]
        batch, channels, height, width = tensor.shape
        memory = memory.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return memory.copy_(tensor)
    if layout == "sliced":
        memory = tensor.new_zeros(*tensor.shape[:3], 2 * tensor.shape[3])
        return memory[..., ::2].copy_(tensor)
    return tensor.contiguous()


CASES = [
    Case(1, 1, 2, (1, 1), "all", activation="gated"),
    Case(2, 3, 6, (5, 6), "colours", activation="relu"),
    Case(2, 3, 34, (7, 7), "wide", activation="gated", condition=(-1, -1, -1, -1), layout="channels_last"),
    Case(9, 5, 6, (7, 7), "left", dilation=2, condition=(-1, 1, 1), layout="sliced"),
    Case(1, 17, 6, (5, 6), "even", activation="relu", condition=(-1, -1, 1, 1)),
    Case(2, 16, 34, (5, 6), "random", activation="gated", layout="shifted"),
    # Enough for the large tiles of the CUDA kernels, forwards and, in the first, backwards.
    Case(9, 24, 136, (5, 6), "above", activation="gated", condition=(1, -1, -1, -1), layout="channels_last"),
    Case(5, 32, 130, (8, 8), "random", activation="relu"),
    Case(3, 33, 66, (5, 6), "row", activation="relu"),
    Case(9, 40, 8, (5, 5), "raster", dilation=3),
    # The widest tiles of the CUDA kernels, and weights that they need not pack; in the last, some slices see nothing.
    Case(3, 32, 160, (9, 9), "left", condition=(-1, -1, -1, -1)),
    Case(3, 64, 152, (9, 9), "even", activation="gated", layout="channels_last", weight_layout="channels_last"),
    Case(34, 32, 90, (3, 5), "raster", activation="gated", layout="channels_last", weight_layout="channels_last"),
    Case(34, 24, 40, (4, 3), "wide", condition=(1, -1, 1, 1), layout="channels_last"),
    # Weights of 16 bits that the gradient in the input need not pack either: three tiles, and slices left out.
    Case(3, 160, 64, (9, 9), "raster", activation="gated", layout="channels_last", weight_layout="channels_last"),
    Case(3, 120, 128, (9, 11), "even", layout="channels_last", weight_layout="channels_last"),
    Case(2, 72, 192, (5, 5), "above", activation="relu", layout="channels_last", weight_layout="channels_last"),
    Case(34, 32, 64, (4, 3), "wide", layout="channels_last", weight_layout="channels_last"),
    # Small maps, of which two teams of warps sum values of 16 bits, also of a pixel alone.
    Case(2, 64, 72, (7, 7), "above", activation="gated", condition=(1, -1, 1, 1), layout="channels_last"),
    Case(40, 128, 96, (4, 5), "left", layout="channels_last", weight_layout="channels_last"),
    Case(2, 3, 4, (4, 4), "nothing", activation="gated", condition=(-1, 1, 1)),
    # The CPU computes these in pairs of pixels, in all types that it multiplies as float32.
    Case(9, 33, 68, (5, 7), "raster", activation="gated", condition=(-1, -1, -1, -1)),
    Case(35, 32, 32, (1, 8), "wide"),
    Case(35, 38, 33, (4, 2), "all"),
    # And these in squares of 2x2 pixels.
    Case(17, 33, 68, (8, 9), "above", activation="gated", condition=(-1, -1, -1, -1)),
    Case(8, 32, 40, (12, 11), "all"),
    Case(9, 36, 33, (11, 12), "left", condition=(1, -1, 1, 1)),
]


def may_be_in_pairs(device, case, dtype):
    pixels = case.batch * case.size[0] * case.size[1]
    enough = pixels >= 256 and min(case.channels, case.out_channels) >= 32
    return device.type == "cpu" and dtype != torch.float64 and enough and case.mask in MASKS and case.dilation == 1


def compare(case, device, dtype, tf32=False):
    """Compare results and gradients with a convolution in float64, up to the rounding of the types."""
    mask = case.mask_tensor()
    tensors = case.tensors(dtype)
    placed = [None if tensor is None else tensor.to(device).requires_grad_() for tensor in tensors]
    input, weight, bias, condition = placed
    options = {"dilation": case.dilation, "activation": case.activation}
    output = masked_conv2d(input, weight, bias, mask=mask.to(device), condition=condition, **options)

    exact = [None if tensor is None else tensor.double().requires_grad_() for tensor in tensors]
    expected = masked_conv2d_reference(*exact[:3], mask=mask, condition=exact[3], **options)
    # The sum of the absolute values of the terms of each sum, which bounds the errors.
    absolute = [None if tensor is None else tensor.double().abs().requires_grad_() for tensor in tensors]
    terms = masked_conv2d_reference(*absolute[:3], mask=mask, condition=absolute[3], dilation=case.dilation)

    assert output.dtype == dtype
    assert output.is_contiguous(memory_format=torch.channels_last)
    rounding = ROUNDING[dtype]
    one_sum = 2 * ROUNDING[torch.float64 if dtype == torch.float64 else torch.float32]  # Tensor cores cut digits off.

    def relative_error(number):  # Of a sum of so many terms, to the sum of their absolute values.
        return number * one_sum + (2**-10 if tf32 else 0)

    def assert_within(actual, expected, error):
        smallest = 2**-24 if dtype == torch.float16 else 0
        excess = (actual.cpu().double() - expected).abs() - (rounding * expected.abs() * (1 + 1e-6) + error + smallest)
        assert excess.max() <= 0, f"off by {excess.max():.3g} more than rounding explains"

    taps = mask.shape[-1] * mask.shape[-2]
    error = relative_error(case.channels * taps + 2) * terms.detach()
    if case.activation == "gated":
        error = sum(error.chunk(2, dim=1)) + 8 * one_sum
    assert_within(output, expected, error)

    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    present = [i for i in range(4) if tensors[i] is not None]
    actual = torch.autograd.grad(output, [placed[i] for i in present], gradient.to(device))
    wanted = torch.autograd.grad(expected, [exact[i] for i in present], gradient.double())
    bound = gradient.double().abs()
    bounds = torch.autograd.grad(
        terms, [absolute[i] for i in present], torch.cat([bound, bound], 1) if case.activation == "gated" else bound
    )
    pixels = case.batch * case.size[0] * case.size[1]
    numbers = [case.out_channels * taps, pixels, pixels, pixels]
    # A gate's gradient is of the rounded values that went into it, and is rounded itself.
    of_gate = 8 * rounding if case.activation == "gated" else 0
    for i, one, other, bound in zip(present, actual, wanted, bounds, strict=True):
        assert one.dtype == dtype
        # A broadcast condition's gradient is summed by PyTorch, in the type.
        summed = pixels * rounding if i == 3 and tensors[3].numel() < terms.numel() else 0
        assert_within(one, other, (relative_error(numbers[i]) + of_gate + summed) * bound)
        if i == 1:
            assert not one.cpu()[~mask.expand_as(one)].any()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.channels}-{case.out_channels}-{case.mask}")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_agrees_with_float64_in_each_type(device, dtype, case):
    compare(case, device, dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.channels}-{case.out_channels}-{case.mask}")
def test_float32_with_tf32_allowed(device, case, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    compare(case, device, torch.float32, tf32=True)


@pytest.mark.parametrize("activation", [None, "relu", "gated"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("name", MASKS)
def test_equals_convolution_with_masked_weight(device, name, dilation, activation):
    compare(Case(2, 3, 4, (5, 6), name, dilation, activation), device, torch.float64)


def test_gradients_that_nobody_wants_are_not_computed(device):
    case = Case(2, 3, 4, (5, 6), activation="gated")
    mask = case.mask_tensor().to(device)
    for wanted in range(3):
        tensors = [tensor.to(device) for tensor in case.tensors(torch.float64)[:3]]
        tensors[wanted].requires_grad_()
        exact = [tensor.detach().clone() for tensor in tensors]
        exact[wanted].requires_grad_()
        masked_conv2d(*tensors, mask=mask, activation="gated").square().sum().backward()
        masked_conv2d_reference(*exact, mask=mask, activation="gated").square().sum().backward()
        torch.testing.assert_close(tensors[wanted].grad, exact[wanted].grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
def test_absent_gradients_share_no_memory(device, wanted, activation):
    case = Case(2, 3, 4, (5, 6), activation=activation)
    tensors = [tensor.to(device) for tensor in case.tensors(torch.float64)[:3]]
    mask = case.mask_tensor().to(device)
    output = torch.ops.cpc_ext.masked_conv2d(*tensors, mask, None, 1, activation or "none", False)[0]
    results = torch.ops.cpc_ext.masked_conv2d_backward(
        torch.ones_like(output), *tensors[:2], mask, output if activation else None, 1, activation or "none", wanted
    )
    assert [result.numel() > 0 for result in results] == [activation is not None, *wanted]
    assert not any(torch._C._is_alias_of(one, other) for one, other in itertools.combinations(results, 2))


@pytest.mark.parametrize("activation", [None, "relu", "gated"])
def test_gradients_by_finite_differences(device, activation):
    case = Case(1, 2, 2, (3, 3), activation=activation, condition=(-1, -1, 1, 1))
    mask = case.mask_tensor().to(device)
    tensors = [tensor.to(device).requires_grad_() for tensor in case.tensors(torch.float64)]
    assert torch.autograd.gradcheck(
        lambda input, weight, bias, condition: masked_conv2d(
            input, weight, bias, mask=mask, activation=activation, condition=condition
        ),
        tensors,
    )


def test_what_the_mask_hides_may_be_anything(device):
    case = Case(2, 3, 6, (4, 5), "colours")
    mask = case.mask_tensor()
    input, weight, bias, _ = (tensor if tensor is None else tensor.to(device) for tensor in case.tensors(torch.float32))
    spoilt = weight.masked_fill(~mask.to(device), torch.nan).requires_grad_()
    output = masked_conv2d(input, spoilt, bias, mask=mask.to(device))
    torch.testing.assert_close(output, masked_conv2d(input, weight, bias, mask=mask.to(device)), rtol=0, atol=0)
    output.sum().backward()
    assert not spoilt.grad.cpu()[~mask].any()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("size", [(9, 8), (9, 7), (2, 2), (3, 1)])
def test_sums_of_whole_numbers_are_exact(device, name, size):
    # Pairs of pixels add and halve the values that single pixels multiply, which is exact, so that any error shows.
    mask = torch.tensor(MASKS[name], dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)

    def whole(*shape):
        return torch.randint(-4, 5, shape, generator=generator).float()

    batch = -(-256 // (size[0] * size[1]))
    tensors = whole(batch, 32, *size), whole(35, 32, *mask.shape), whole(35)
    output = whole(batch, 35, *size)
    results = []
    for function, place in ((masked_conv2d, device), (masked_conv2d_reference, torch.device("cpu"))):
        placed = [tensor.to(place, copy=True).requires_grad_() for tensor in tensors]
        result = function(*placed, mask=mask.to(place))
        results.append([result, *torch.autograd.grad(result, placed, output.to(place))])
    for actual, expected in zip(*results, strict=True):
        assert actual.cpu().equal(expected)


@pytest.mark.parametrize(("batch", "channels", "width"), [(2, 3, 6), (10, 32, 6), (10, 32, 7)])
def test_nan_reaches_only_what_sees_it(device, batch, channels, width):
    case = Case(batch, channels, 32, (5, width), activation="relu")
    input, weight, bias, _ = (tensor if tensor is None else tensor.to(device) for tensor in case.tensors(torch.float32))
    mask = case.mask_tensor()
    clean = masked_conv2d(input, weight, bias, mask=mask.to(device), activation="relu")
    input[0, 1, 2, 3] = torch.nan
    output = masked_conv2d(input, weight, bias, mask=mask.to(device), activation="relu").cpu()
    sees = torch.zeros(batch, 1, 5, width, dtype=torch.bool)
    for i, j in mask.nonzero().tolist():
        sees[0, 0, 2 + 1 - i, 3 + 1 - j] = True
    assert output.isnan().equal(sees.expand_as(output))
    assert output[~sees.expand_as(output)].equal(clean.cpu()[~sees.expand_as(output)])


@pytest.mark.parametrize("differentiable", [False, True])
def test_gradients_pass_a_relu_where_it_keeps_nan(device, differentiable):
    """As PyTorch's: what is no number must not look like a gradient of zero."""
    case = Case(2, 3, 5, (4, 5), activation="relu")
    input, weight, bias, _ = case.tensors(torch.float64)
    input[0, 1, 2, 3] = torch.nan
    mask = torch.ones_like(case.mask_tensor())  # Behind a hidden tap the reference has 0 times NaN.
    grad = torch.ones(2, 5, 4, 5, dtype=torch.float64)
    gradients = []
    for function, place in ((masked_conv2d, device), (masked_conv2d_reference, torch.device("cpu"))):
        placed = [tensor.to(place, copy=True).requires_grad_() for tensor in (input, weight, bias)]
        result = function(*placed, mask=mask.to(place), activation="relu")
        gradients.append(torch.autograd.grad(result, placed, grad.to(place), create_graph=differentiable))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.channels}-{case.out_channels}-{case.mask}")
def test_a_pixel_alone_is_the_same(device, dtype, case):
    mask = case.mask_tensor().to(device)
    input, weight, bias, condition = (None if tensor is None else tensor.to(device) for tensor in case.tensors(dtype))
    if case.layout != "shifted":
        input = laid_out(input, "channels_last")
    options = {"dilation": case.dilation, "activation": case.activation}
    expected = masked_conv2d(input, weight, bias, mask=mask, condition=condition, **options)
    convolution = PixelConvolution(weight, bias, mask=mask, **options)
    output = torch.full_like(expected, 7)
    rows, cols = case.size
    for row, col in {(0, 0), (rows // 2, cols // 2), (rows - 1, 0), (rows - 1, cols - 1)}:
        convolution(input, output, torch.tensor([row, col], device=device), condition=condition)
        rtol, atol = (2 * ROUNDING[dtype], 4e-6) if may_be_in_pairs(device, case, dtype) else (0, 0)
        torch.testing.assert_close(output[:, :, row, col], expected[:, :, row, col], rtol=rtol, atol=atol)
        output[:, :, row, col] = 7
        assert output.eq(7).all()


@pytest.mark.parametrize(
    "case", [*CASES, Case(1, 2, 2, (1, 1), "above", dilation=3)], ids=lambda case: f"{case.channels}-{case.mask}"
)
def test_a_pixel_alone_without_kernels(monkeypatch, case):
    input, weight, bias, condition = case.tensors(torch.float64)
    input[0, 0, 0, 0] = torch.nan  # Also for what reaches beyond the corner.
    mask = case.mask_tensor()
    options = {"mask": mask, "dilation": case.dilation, "activation": case.activation}
    expected = masked_conv2d_reference(input, weight, bias, condition=condition, **options)
    monkeypatch.setattr(module, "KERNEL_DEVICES", ())
    convolution = PixelConvolution(weight, bias, **options | {"mask": mask.double()})
    output = torch.full_like(expected, 7)
    rows, cols = case.size
    for position in {(0, 0), (rows // 2, cols // 2), (rows - 1, 0), (rows - 1, cols - 1), (0, cols - 1)}:
        convolution(input, output, torch.tensor(position), condition=condition)
        pixel = (..., *position)
        torch.testing.assert_close(output[pixel], expected[pixel], rtol=0, atol=1e-12, equal_nan=True)
        output[pixel] = 7
        assert output.eq(7).all()


@pytest.mark.parametrize(
    "input", [torch.zeros(2, 2, 5, 6), torch.zeros(2, 0, 5, 6), torch.zeros(2, 3, 5, 6, dtype=torch.bfloat16)]
)
def test_a_pixel_of_another_input_than_the_weights(device, input):
    case = Case(2, 3, 4, (5, 6))
    _, weight, *_ = (None if tensor is None else tensor.to(device) for tensor in case.tensors(torch.float32))
    convolution = PixelConvolution(weight, mask=case.mask_tensor().to(device))
    output = torch.zeros(2, 5, 6, 4, device=device, dtype=input.dtype).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match=r"input must be \[B, 3, H, W\] of torch.float32, got shape"):
        convolution(laid_out(input.to(device), "channels_last"), output, torch.tensor((1, 1), device=device))


@pytest.mark.parametrize("activation", [None, "gated"])
def test_a_mask_has_no_gradient(device, activation):
    mask = torch.ones(3, 3, device=device, requires_grad=True)
    input, weight = torch.randn(1, 2, 4, 4, device=device), torch.randn(4, 2, 3, 3, device=device)
    assert not masked_conv2d(input, weight, mask=mask, activation=activation).requires_grad


def test_a_pixel_without_channels_is_refused_by_the_module_itself(device):
    """Kernels go along the channels, of which there must be one."""
    input, output = torch.empty(2, 0, 5, 6, device=device), torch.empty(2, 3, 5, 6, device=device)
    packed, position = (
        torch.empty(0, dtype=torch.uint8, device=device),
        torch.zeros(2, dtype=torch.int64, device=device),
    )
    of_kernel = {"outputs": 3, "taps": [4], "kh": 3, "kw": 3, "dilation": 1, "activation": "none", "tf32": False}
    tensors = {"input": input, "packed": packed, "bias": None, "condition": None, "output": output}
    with pytest.raises(ValueError, match="input must have channels"):
        module.native.masked_conv2d_packed(**tensors, position=position, **of_kernel)


@pytest.mark.parametrize(("position", "nearest"), [((-1, 9), (0, 5)), ((2**40, -(2**40)), (4, 0))])
def test_a_pixel_outside_the_image(device, request, position, nearest):
    case = Case(2, 3, 4, (5, 6))
    mask = case.mask_tensor().to(device)
    input, weight, *_ = (None if tensor is None else tensor.to(device) for tensor in case.tensors(torch.float32))
    convolution = PixelConvolution(weight, mask=mask)
    output = torch.zeros(2, 5, 6, 4, device=device).permute(0, 3, 1, 2)
    at = torch.tensor(position, device=device)
    if request.node.callspec.params["device"] == "cpu":
        with pytest.raises(ValueError, match="position must lie in the input of 5x6"):
            convolution(laid_out(input, "channels_last"), output, at)
    else:  # Looking at it would stall the stream: clamped.
        convolution(laid_out(input, "channels_last"), output, at)
        row, col = nearest
        assert output[:, :, row, col].equal(masked_conv2d(input, weight, mask=mask)[:, :, row, col])
        output[:, :, row, col] = 0
        assert not output.any()


def test_mask_and_weight_of_any_strides(device):
    case = Case(2, 5, 6, (4, 5), "colours")
    input, weight, bias, _ = case.tensors(torch.float32)
    mask = case.mask_tensor()
    expected = masked_conv2d_reference(input, weight, bias, mask=mask)
    reversed_order = [
        tensor.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0).to(device) for tensor in (weight, mask)
    ]
    reversed_order[0].requires_grad_()
    output = masked_conv2d(input.to(device), reversed_order[0], bias.to(device), mask=reversed_order[1])
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-5, atol=1e-5)
    (expected_grad,) = torch.autograd.grad(
        masked_conv2d_reference(input, weight.requires_grad_(), bias, mask=mask).square().sum(), weight
    )
    (grad,) = torch.autograd.grad(output.square().sum(), reversed_order[0])
    torch.testing.assert_close(grad.cpu(), expected_grad, rtol=1e-4, atol=1e-4)


def test_gradient_with_any_strides(device):
    case = Case(2, 5, 6, (4, 5))
    input, weight, bias, _ = (tensor if tensor is None else tensor.to(device) for tensor in case.tensors(torch.float64))
    weight.requires_grad_()
    output = masked_conv2d(input, weight, bias, mask=case.mask_tensor().to(device))
    gradient = torch.randn(6, 1, 5, 4, dtype=torch.float64, device=device).permute(1, 0, 3, 2).expand(2, 6, 4, 5)
    (one,) = torch.autograd.grad(output, weight, gradient, retain_graph=True)
    (other,) = torch.autograd.grad(output, weight, gradient.contiguous())
    assert one.equal(other)


def test_mask_per_channel_and_no_bias(device):
    mask = random_mask(4, 3, 3, 3)
    input, weight, *_ = Case(2, 3, 4, (5, 6), "all").tensors(torch.float64)
    output = masked_conv2d(input.to(device), weight.to(device), mask=mask.to(device)).cpu()
    torch.testing.assert_close(output, F.conv2d(input, weight * mask, padding=1), atol=1e-12, rtol=0)


def test_channels_last_stays(device):
    case = Case(2, 3, 4, (5, 6), layout="channels_last")
    input, weight, bias, _ = (tensor if tensor is None else tensor.to(device) for tensor in case.tensors(torch.float32))
    output = masked_conv2d(input, weight, bias, mask=case.mask_tensor().to(device))
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_results_do_not_vary(request, device, dtype):
    case = Case(24, 17, 34, (7, 7), activation="gated")  # Large enough for three threads.
    mask = case.mask_tensor().to(device)

    def run(threads):
        torch.set_num_threads(threads)
        tensors = [tensor.to(device).requires_grad_() for tensor in case.tensors(dtype)[:3]]
        output = masked_conv2d(*tensors, mask=mask, activation="gated")
        return output, *torch.autograd.grad(output, tensors, output.detach())

    before = torch.get_num_threads()
    try:
        on_threads = request.node.callspec.params["device"] == "cpu"
        first, *others = [run(threads) for threads in ((1, 2, 2, 3) if on_threads else (1, 1))]
    finally:
        torch.set_num_threads(before)
    for other in others:
        assert all(a.equal(b) for a, b in zip(first, other, strict=True))


def test_empty_batch(device):
    mask = torch.tensor(MASKS["above"], device=device)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, device=device, requires_grad=True)
    input = torch.zeros(0, 3, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    output = masked_conv2d(input, weight, bias, mask=mask, activation="gated")
    output.sum().backward()
    assert output.shape == (0, 2, 5, 6)
    assert input.grad.shape == input.shape
    assert not weight.grad.any()
    assert not bias.grad.any()
    position = torch.zeros(2, dtype=torch.int64, device=device)
    PixelConvolution(weight, bias, mask=mask, activation="gated")(input.detach(), output.detach(), position)


def test_opcheck(device):
    case = Case(2, 3, 4, (3, 4), activation="gated", condition=(-1, -1, -1, -1))
    input, weight, bias, condition = (tensor.to(device).requires_grad_() for tensor in case.tensors(torch.float32))
    mask = case.mask_tensor().to(device)
    torch.library.opcheck(
        torch.ops.cpc_ext.masked_conv2d.default, (input, weight, bias, mask, condition, 1, "gated", True)
    )
    torch.library.opcheck(torch.ops.cpc_ext.masked_conv2d.default, (input, weight, None, mask, None, 2, "relu", False))


def test_compiles_into_one_graph():
    case = Case(2, 3, 4, (5, 6), activation="gated")
    mask = case.mask_tensor()
    tensors = [tensor.requires_grad_() for tensor in case.tensors(torch.float32)[:3]]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(input, weight, bias):
        return masked_conv2d(input * 2, weight, bias, mask=mask, activation="gated").relu()

    plain = masked_conv2d(tensors[0] * 2, *tensors[1:], mask=mask, activation="gated").relu()
    output = compiled(*tensors)
    torch.testing.assert_close(output, plain)
    for one, other in zip(
        torch.autograd.grad(output.square().sum(), tensors),
        torch.autograd.grad(plain.square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_autocast(device):
    case = Case(2, 3, 4, (5, 6), activation="gated", condition=(-1, 1, 1))
    tensors = [tensor.to(device).requires_grad_() for tensor in case.tensors(torch.float32)]
    mask = case.mask_tensor().to(device)
    with torch.autocast(device.type, torch.bfloat16):
        output = masked_conv2d(*tensors[:3], mask=mask, activation="gated", condition=tensors[3])
    assert output.dtype == torch.bfloat16
    cast = [tensor.detach().bfloat16() for tensor in tensors]
    assert output.equal(masked_conv2d(*cast[:3], mask=mask, activation="gated", condition=cast[3]))
    output.float().square().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 and tensor.grad.any() for tensor in tensors)


def test_more_taps_than_the_cuda_kernels_take(device, request):
    side = 29  # 841 taps, above kMaxTaps in csrc/masked_conv/cuda.cu.
    tensors = [tensor.to(device) for tensor in (torch.ones(1, 1, 30, 30), torch.ones(2, 1, side, side))]
    mask = torch.ones(side, side, dtype=torch.bool, device=device)
    if request.node.callspec.params["device"] == "cpu":
        torch.testing.assert_close(
            masked_conv2d(*tensors, mask=mask), masked_conv2d_reference(*tensors, mask=mask), rtol=1e-5, atol=1e-4
        )
    else:
        with pytest.raises(ValueError, match="at most 768 visible taps, got 841"):
            masked_conv2d(*tensors, mask=mask)


@pytest.mark.cuda
def test_a_cuda_graph_moves_the_pixel():
    case = Case(9, 40, 64, (7, 7), activation="gated")
    mask = case.mask_tensor().cuda()
    input, weight, bias, _ = (tensor if tensor is None else tensor.cuda() for tensor in case.tensors(torch.bfloat16))
    input = laid_out(input, "channels_last")
    expected = masked_conv2d(input, weight, bias, mask=mask, activation="gated")
    convolution = PixelConvolution(weight, bias, mask=mask, activation="gated")
    output, position = torch.zeros_like(expected), torch.zeros(2, dtype=torch.int64, device="cuda")
    convolution(input, output, position)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        convolution(input, output, position)
    for row in range(7):
        for col in range(7):
            position.copy_(torch.tensor([row, col]))
            graph.replay()
    assert output.equal(expected)


@pytest.mark.cuda
def test_more_than_two_to_the_31_values_on_cuda():
    mask = torch.tensor(MASKS["raster"], dtype=torch.bool, device="cuda")
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16) / 16
    one = torch.randn(1, 64, 64, 64, device="cuda", dtype=torch.bfloat16)
    input = one.expand(8200, 64, 64, 64).contiguous(memory_format=torch.channels_last)
    assert input.numel() > 2**31
    output = masked_conv2d(input, weight, mask=mask)
    assert output[-1].equal(masked_conv2d(one, weight, mask=mask)[0])


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
        *(
            (
                {name: torch.ones(shape).to_sparse()},
                TypeError,
                f"^{name} must be a dense tensor, got layout torch.sparse",
            )
            for name, shape in (("input", (1, 3, 4, 4)), ("weight", (4, 3, 3, 3)), ("bias", 4), ("mask", (3, 3)))
        ),
        ({"condition": torch.ones(4, 1, 1).to_sparse()}, TypeError, "^condition must be a dense tensor"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        ({"dilation": 1.0}, TypeError, "dilation must be an int, got float"),
        ({"activation": "tanh"}, ValueError, 'activation must be None, "relu" or "gated", got \'tanh\''),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"input": torch.zeros(1, 3, 4, 4), "weight": torch.zeros(4, 3, 3, 3), "mask": torch.ones(3, 3)}
    with pytest.raises(error, match=message):
        masked_conv2d(**{**arguments, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float64},
        {"mask": torch.ones(32, 32, 3, 3, dtype=torch.bool)},
        {"dilation": 2},
        {"channels": 31},
        {"batch": 1, "width": 15},
        {"batch": 256, "width": 1},
    ],
    ids=lambda change: " ".join(change),
)
def test_where_pixels_are_computed_together(change):
    """Pairs take 12 weights of three rows of three taps, in place of 9, and squares 16."""

    def weights_packed(dtype=torch.float32, mask=None, dilation=1, channels=32, batch=1, width=16):
        weight = torch.ones(32, channels, 3, 3, dtype=dtype)
        mask = torch.ones(3, 3, dtype=torch.bool) if mask is None else mask
        input, output = (torch.zeros(batch, 16, width, n, dtype=dtype).permute(0, 3, 1, 2) for n in (channels, 32))
        size = native.masked_conv2d_workspace(
            weight, mask, input, None, None, output, None, None, dilation, "none", False
        )
        return size // (32 * channels * max(4, weight.element_size()))

    assert weights_packed() == weights_packed(torch.float16) == 12
    assert weights_packed(batch=4) == weights_packed(torch.float16, batch=4) == 16
    assert weights_packed(batch=4, channels=384) == 16
    assert weights_packed(batch=4, channels=385) == 12
    # Only the middle taps reach an image of a single column.
    assert weights_packed(**change) == (3 if change.get("width") == 1 else 9)
