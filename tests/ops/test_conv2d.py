"""conv2d against PyTorch's convolution with ReLUs and a sum around it."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cpc_ext.ops import conv2d, masked_conv2d
from cpc_ext.ops.conv2d import conv2d_passing, conv2d_reference

# Half a unit in the last place of a type: the error of rounding a result to it.
ROUNDING = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}
DTYPES = list(ROUNDING)


@dataclass(frozen=True)
class Case:
    batch: int
    channels: int
    out_channels: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int | tuple[int, int] = 1
    dilation: int = 1
    relu_input: bool = False
    activation: str | None = None
    residual: str | None = None  # Its layout.
    bias: bool = True
    layout: str = "channels_last"

    @property
    def options(self):
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "relu_input": self.relu_input,
            "activation": self.activation,
        }

    def tensors(self, dtype, seed=0) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        fan_in = self.channels * self.kernel[0] * self.kernel[1]
        tensors = {
            "input": random(self.batch, self.channels, *self.size),
            "weight": random(self.out_channels, self.channels, *self.kernel) * fan_in**-0.5,
        }
        if self.bias:
            tensors["bias"] = random(self.out_channels)
        if self.residual is not None:
            plain = conv2d_reference(tensors["input"], tensors["weight"], **self.options | {"activation": None})
            tensors["residual"] = laid_out(random(*plain.shape), self.residual)
        tensors["input"] = laid_out(tensors["input"], self.layout)
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def laid_out(tensor, layout):
    """Return the same values in another memory layout."""
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wider = tensor.new_zeros(*tensor.shape[:3], 2 * tensor.shape[3])
        return wider[..., ::2].copy_(tensor)
    return tensor.contiguous()


CASES = [
    Case(1, 1, 1, (1, 1), (1, 1), padding=0),
    Case(7, 16, 64, (5, 6), residual="channels_last", relu_input=True),
    Case(13, 33, 70, (8, 8), activation="relu", residual="nchw", relu_input=True),
    # More channels than the weight's gradient has side by side, on the CPU.
    Case(3, 302, 20, (3, 4), (1, 2), padding=0, activation="relu"),
    # Few channels, whose taps are multiplied as one.
    Case(5, 3, 64, (8, 9), (5, 5), padding=2, layout="nchw"),
    Case(14, 1, 20, (6, 6), (5, 5), stride=2, padding=2, relu_input=True, bias=False),
    Case(2, 5, 17, (9, 7), (7, 7), stride=2, padding=3, activation="relu"),
    # Strides: all pixels of the input, or a part of them, have a gradient.
    Case(6, 32, 64, (8, 8), stride=2, relu_input=True),
    Case(11, 64, 48, (7, 5), (1, 1), stride=2, padding=0, relu_input=True, residual="sliced"),
    Case(3, 17, 32, (9, 10), (2, 3), stride=3, padding=(0, 1), residual="nchw"),
    Case(2, 20, 16, (4, 4), (1, 1), stride=5, padding=2, activation="relu"),
    # Paddings and distances of taps, among which some see nothing but padding.
    Case(4, 24, 40, (3, 4), padding=3, relu_input=True, layout="sliced"),
    Case(4, 24, 40, (9, 8), padding=0),
    Case(3, 16, 33, (7, 7), (3, 2), padding=(4, 1), dilation=2, activation="relu"),
    Case(2, 40, 24, (2, 2), (5, 5), padding=7, dilation=3),
    # Groups of images with a rest, and blocks that begin within a pixel's images.
    Case(100, 16, 16, (1, 1), padding=1, relu_input=True),
    Case(25, 16, 130, (4, 3), relu_input=True, residual="channels_last"),
    Case(1, 40, 32, (17, 15), stride=2, relu_input=True),
    # So many channels that copies of the pixels make blocks smaller.
    Case(7, 520, 8, (6, 6), relu_input=True),
    # These are computed in pairs of pixels, in all types that are multiplied as float32.
    Case(9, 33, 68, (5, 7), relu_input=True, residual="channels_last"),
    Case(20, 32, 40, (4, 4), (5, 5), padding=2, activation="relu"),
    Case(8, 48, 32, (7, 6), padding=0, relu_input=True),
    Case(12, 32, 32, (4, 5), (2, 4), padding=(1, 3)),
    # And these in squares of 2x2 pixels.
    Case(9, 33, 68, (12, 11), relu_input=True, residual="channels_last"),
    Case(20, 32, 40, (8, 8), (5, 5), padding=2, activation="relu"),
    Case(20, 48, 32, (9, 10), padding=0, relu_input=True),
    Case(13, 32, 33, (9, 9), (2, 4), padding=(1, 3)),
    Case(13, 33, 32, (9, 10), (4, 2), padding=(2, 0), residual="nchw", layout="nchw"),
    # So many channels that a sum takes more than one step, or the weight's gradient more than one block.
    Case(7, 360, 32, (13, 12), (2, 2), padding=(0, 1)),
    Case(3, 150, 32, (19, 20)),
]


def results(call, tensors, upstream, **options):
    """Return the output, and the gradients of all tensors."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output = call(**leaves, **options)
    return [output.detach(), *torch.autograd.grad(output, list(leaves.values()), upstream.to(output.dtype))]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_agrees_with_float64_in_each_type(dtype, case):
    tensors = case.tensors(dtype)
    exact = {name: tensor.double() for name, tensor in tensors.items()}
    wanted = conv2d_reference(**exact, **case.options)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(9)).to(dtype).double()
    if case.activation == "relu":
        upstream[wanted.abs() < 0.05] = 0  # Rounding decides on which side of zero they are.
    actual = results(conv2d, tensors, upstream, **case.options)
    expected = results(conv2d_reference, exact, upstream, **case.options)
    for name, one, other in zip(("output", *tensors), actual, expected, strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        error = (one.double() - other).abs().max()
        # The error is a result's rounding, and in float32 and float64 those of its sums.
        allowed = (2 if dtype in (torch.float16, torch.bfloat16) else 64) * ROUNDING[dtype] * other.abs().max()
        assert error <= allowed, f"{name}: {error / other.abs().max():.1e}"


@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[8], CASES[12]], ids=str)
def test_gradients_by_finite_differences(case):
    small = Case(
        2, 2, 3, case.size, case.kernel, case.stride, case.padding, case.dilation, case.relu_input, case.activation,
        case.residual,
    )  # fmt: skip
    tensors = [tensor.requires_grad_() for tensor in small.tensors(torch.float64).values()]

    def convolve(input, weight, bias, *residual):
        return conv2d(input, weight, bias, residual=residual[0] if residual else None, **small.options)

    assert torch.autograd.gradcheck(convolve, tensors)
    assert torch.autograd.gradgradcheck(convolve, tensors, fast_mode=True)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_that_nobody_wants_are_absent(wanted, activation):
    case = Case(2, 3, 4, (5, 6), activation=activation, relu_input=True)
    tensors = case.tensors(torch.float64)
    input, weight, bias = tensors.values()
    geometry = (1, [1, 1], 1)
    output = torch.ops.cpc_ext.conv2d(input, weight, bias, None, *geometry, True, activation == "relu")
    saved = output if activation else None
    grads = torch.ops.cpc_ext.conv2d_backward(
        torch.ones_like(output), input, weight, saved, None, *geometry, True, wanted
    )
    assert [result.numel() > 0 for result in grads] == [activation is not None, *wanted]
    assert not any(torch._C._is_alias_of(one, other) for one, other in itertools.combinations(grads, 2))
    expected = results(conv2d_reference, tensors, torch.ones_like(output), **case.options)[1:]
    for one, other, needed in zip(grads[1:], expected, wanted, strict=True):
        if needed:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_nan_reaches_only_what_sees_it():
    """Also through a ReLU, which keeps it, and where pixels are computed in pairs or squares."""
    for dtype, batch in itertools.product(DTYPES, [10, 30]):
        case = Case(batch, 32, 32, (6, 7), relu_input=True)
        tensors = case.tensors(dtype)
        tensors["input"][3, 5, 2, 4] = float("nan")
        output = conv2d(**tensors, **case.options)
        seen = torch.zeros(batch, 6, 7, dtype=torch.bool)
        seen[3, 1:4, 3:6] = True
        assert output.isnan().any(1).equal(seen)


@pytest.mark.parametrize("channels", [16, 17, 32])
@pytest.mark.parametrize("relus", [{"activation": "relu"}, {"relu_input": True}])
def test_gradients_pass_a_relu_where_it_keeps_nan(relus, channels):
    """As PyTorch's: what is no number must not look like a gradient of zero."""
    case = Case(3, channels, channels, (6, 7), **relus)
    tensors = case.tensors(torch.float64)
    tensors["input"][1, 5, 2, 4] = float("nan")
    upstream = torch.randn(3, channels, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if case.activation is not None:  # What does not pass may be anything.
        upstream[conv2d_reference(**tensors, **case.options) <= 0] = float("inf")
    expected = results(conv2d_reference, tensors, upstream, **case.options)
    for one, other in zip(results(conv2d, tensors, upstream, **case.options), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, equal_nan=True)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors.values()]
    twice = torch.autograd.grad(conv2d(*leaves, **case.options), leaves, upstream, create_graph=True)
    for one, other in zip(twice, expected[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_channels_are_innermost():
    tensors = Case(3, 4, 8, (5, 4), stride=2, layout="nchw").tensors(torch.float32)
    output = conv2d(**tensors, stride=2, padding=1)
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("stride", [1, 2])
def test_results_do_not_vary(dtype, stride):
    case = Case(24, 34, 40, (9, 8), stride=stride, relu_input=True, residual="channels_last")
    tensors = case.tensors(dtype)
    upstream = torch.ones_like(tensors["residual"])
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            runs.append(results(conv2d, tensors, upstream, **case.options))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(one.equal(other) for one, other in zip(runs[0], run, strict=True))


def test_empty_batch():
    case = Case(0, 3, 4, (5, 6), stride=2, relu_input=True, activation="relu")
    tensors = case.tensors(torch.float32)
    output, of_input, *others = results(conv2d, tensors, torch.zeros(0, 4, 3, 3), **case.options)
    assert output.shape == (0, 4, 3, 3)
    assert of_input.shape == (0, 3, 5, 6)
    assert not any(gradient.any() for gradient in others)


def test_opcheck():
    case = Case(2, 3, 4, (5, 4), stride=2, residual="channels_last")
    input, weight, bias, residual = (tensor.requires_grad_() for tensor in case.tensors(torch.float32).values())
    op = torch.ops.cpc_ext.conv2d.default
    torch.library.opcheck(op, (input, weight, bias, residual, 2, [1, 1], 1, True, False))
    torch.library.opcheck(op, (input, weight, None, None, 1, [0, 1], 1, False, True))


@pytest.mark.parametrize("passing", [False, True])
def test_compiles_into_one_graph(passing):
    case = Case(2, 3, 3, (5, 6), relu_input=True)
    tensors = [tensor.requires_grad_() for tensor in case.tensors(torch.float32).values()]

    def block(input, weight, bias):
        if passing:
            output, input = conv2d_passing(input * 2, weight, bias, padding=1, relu_input=True)
            return output + input
        return conv2d(input * 2, weight, bias, padding=1, relu_input=True, activation="relu").tanh()

    plain, output = block(*tensors), torch.compile(block, fullgraph=True, backend="aot_eager")(*tensors)
    torch.testing.assert_close(output, plain)
    for one, other in zip(
        torch.autograd.grad(output.square().sum(), tensors),
        torch.autograd.grad(plain.square().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_numbers_that_are_left_open_are_ints():
    input, weight = Case(2, 3, 4, (8, 6), bias=False).tensors(torch.float64).values()

    class Layer(torch.nn.Module):
        def forward(self, input):
            rows = input.shape[2]
            made = conv2d(input, weight, stride=rows // 4, padding=rows // 8, dilation=rows // 8)
            mask = torch.ones(3, 3, dtype=torch.bool)
            return made, masked_conv2d(input, weight, mask=mask, dilation=rows // 4)

    sizes = {2: torch.export.Dim.DYNAMIC}
    exported = torch.export.export(Layer(), (input,), dynamic_shapes=(sizes,)).module()
    for one, other in zip(exported(input), Layer()(input), strict=True):
        torch.testing.assert_close(one, other)


def test_autocast():
    case = Case(2, 3, 4, (5, 6), residual="channels_last", activation="relu")
    tensors = {name: tensor.requires_grad_() for name, tensor in case.tensors(torch.float32).items()}
    with torch.autocast("cpu", torch.bfloat16):
        output = conv2d(**tensors, padding=1, activation="relu")
    assert output.dtype == torch.bfloat16
    cast = {name: tensor.detach().bfloat16() for name, tensor in tensors.items()}
    assert output.equal(conv2d(**cast, padding=1, activation="relu"))
    output.float().square().sum().backward()
    assert all(tensor.grad.dtype == torch.float32 and tensor.grad.any() for tensor in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("used", ["both", "output", "input"])
def test_an_input_that_goes_past_has_both_gradients(dtype, stride, used):
    case = Case(7, 33, 33, (6, 5), stride=stride, relu_input=True)
    tensors = [tensor.requires_grad_() for tensor in case.tensors(dtype).values()]
    options = {"stride": stride, "padding": 1, "relu_input": True}

    def loss(pair):
        output, input = pair
        return (output.square().sum() if used != "input" else 0) + (input.exp().sum() if used != "output" else 0)

    ours = torch.autograd.grad(loss(conv2d_passing(*tensors, **options)), tensors, allow_unused=True)
    plain = torch.autograd.grad(loss((conv2d(*tensors, **options), tensors[0])), tensors, allow_unused=True)
    for one, other in zip(ours, plain, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)


def test_an_input_that_goes_past_has_second_derivatives():
    tensors = [
        tensor.requires_grad_() for tensor in Case(1, 2, 2, (3, 3), relu_input=True).tensors(torch.float64).values()
    ]

    def block(*tensors):
        output, input = conv2d_passing(*tensors, padding=1, relu_input=True)
        return output.tanh() + input.square()

    assert torch.autograd.gradgradcheck(block, tensors)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_input_that_goes_past_may_be_the_same_for_all_of_a_vmap():
    input, weight, bias = Case(2, 3, 4, (5, 4), relu_input=True).tensors(torch.float64).values()
    weights = torch.stack([weight, -weight])

    def block(weight):
        return conv2d_passing(input, weight, bias, relu_input=True)

    both, inputs = torch.vmap(block, out_dims=(0, None))(weights)
    assert inputs is input
    torch.testing.assert_close(both, torch.stack([conv2d(input, one, bias, relu_input=True) for one in weights]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": [1.0]}, TypeError, "input must be a tensor, got list"),
        ({"input": torch.zeros(1, 3, 4, 4, dtype=torch.int64)}, TypeError, "input must be floating, got torch.int64"),
        ({"input": torch.zeros(3, 4, 4)}, ValueError, r"input must be \[B, C, H, W\], got shape \(3, 4, 4\)"),
        ({"input": torch.zeros(1, 3, 0, 4)}, ValueError, "input must have at least one row and column"),
        ({"input": torch.zeros(1, 2, 4, 4)}, ValueError, "input must have the weight's 3 channels, got 2"),
        ({"weight": torch.zeros(4, 3, 3)}, ValueError, r"weight must be \[O, C, kh, kw\]"),
        ({"weight": torch.zeros(0, 3, 3, 3)}, ValueError, "weight must not be empty"),
        ({"weight": torch.zeros(4, 3, 5, 3)}, ValueError, "weight's kernel of 5x3 taps must fit into the padded input"),
        ({"weight": torch.zeros(4, 3, 3, 3, device="meta")}, ValueError, "weight must be on the input's device cpu"),
        ({"weight": torch.zeros(4, 3, 3, 3).double()}, TypeError, "weight must have the input's dtype torch.float32"),
        ({"bias": 0.0}, TypeError, "bias must be a tensor, got float"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias must have shape \(4,\), got \(3,\)"),
        ({"residual": torch.zeros(1, 4, 4, 4)}, ValueError, r"residual must have shape \(1, 4, 2, 2\), got"),
        ({"residual": torch.zeros(1, 4, 2, 2).half()}, TypeError, "residual must have the input's dtype"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"stride": (1, 1)}, TypeError, "stride must be an int, got tuple"),
        ({"padding": -1}, ValueError, "padding must not be negative, got -1"),
        ({"padding": (1, 1, 1)}, TypeError, "padding must be an int or two"),
        ({"padding": (1, 0.5)}, TypeError, "padding must be an int or two"),
        ({"stride": 1 << 70}, ValueError, "stride must be at most 268435456, got 1180591620717411303424"),
        ({"padding": (0, 1 << 62)}, ValueError, "padding must be at most 268435456, got 4611686018427387904"),
        ({"dilation": 1 << 70}, ValueError, "dilation must be at most 268435456, got"),
        ({"dilation": True}, TypeError, "dilation must be an int, got bool"),
        ({"relu_input": 1}, TypeError, "relu_input must be a bool, got int"),
        ({"activation": "gated"}, ValueError, "activation must be None or \"relu\", got 'gated'"),
    ],
)
def test_wrong_arguments(change, error, message):
    arguments = {"input": torch.zeros(1, 3, 4, 4), "weight": torch.zeros(4, 3, 3, 3)}
    with pytest.raises(error, match=message):
        conv2d(**{**arguments, **change})
