"""Code that the ops share: registration, refused arguments, and the arguments of kernels that only CUDA runs."""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cpc_ext._native import KERNEL_DEVICES, native
from cpc_ext.ops import (
    _library,
    conv2d,
    extract_patches,
    info_nce,
    logistic_mixture_nll,
    masked_conv2d,
    scores_logsumexp,
    sigmoid_contrast,
)
from cpc_ext.ops.masked_conv2d import PixelConvolution

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


# --- Registering ---


def test_an_op_runs_its_kernel_its_reference_or_its_fake(monkeypatch):
    def twice(name):
        def run(op):
            ran.append((name, op))
            return op.x * op.options.factor

        return run

    ran = []
    with torch.library._scoped_library("cpc_ext", "FRAGMENT") as library:
        monkeypatch.setattr(_library, "_library", library)
        op = _library.register(
            "test_twice",
            Twice,
            Tensor,
            reference=twice("reference"),
            kernel=twice("kernel"),
            fake=twice("fake"),
            setup_context=lambda ctx, op, result: ctx.save_for_backward(op.x, result),
            backward=lambda ctx, saved, gradient: {"y": None, "x": gradient * saved[0] + saved[1]},
        )
        assert callable(op)
        op = torch.ops.cpc_ext.test_twice.default
        assert str(op._schema) == (
            "cpc_ext::test_twice(Tensor x, SymInt[] size, float factor, bool? flag, Tensor? y) -> Tensor"
        )
        assert torch.Tag.pt2_compliant_tag in op.tags
        x = draw(3).requires_grad_()
        typed = Twice(x, Options([1], 2.0, None), None)
        result = op(typed.x, *typed.options, typed.y)
        op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.XPU), x, [1], 2.0, None, None)
        op(x.detach().to("meta"), [1], 2.0, None, None)
        assert [name for name, _ in ran] == ["kernel", "reference", "fake"]
        assert all(type(given) is Twice and given.options == typed.options for _, given in ran)
        assert torch.equal(result, x * 2)
        assert torch.equal(grad(result, x, torch.full_like(x, 5))[0], x * 5 + x * 2)


class Options(NamedTuple):
    size: list[int]
    factor: float
    flag: bool | None


class Twice(NamedTuple):
    x: Tensor
    options: Options
    y: Tensor | None


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, None)
        return x * x

    @staticmethod
    @_library.differentiable_once("square")
    def backward(ctx, saved, gradient):
        """The gradient of a square."""
        assert not torch.is_grad_enabled()
        x, nothing = saved
        assert nothing is None
        return (2 * x * gradient,)


def test_what_is_differentiable_once():
    assert (Square.backward.__name__, Square.backward.__doc__) == ("backward", "The gradient of a square.")
    x = draw(3).requires_grad_()
    for create_graph in (False, True):
        (gradient,) = grad(Square.apply(x).sum(), x, create_graph=create_graph)
        assert torch.equal(gradient, 2 * x)
        assert gradient.requires_grad == create_graph
    with pytest.raises(RuntimeError, match="square has no second derivatives"):
        grad(gradient.sum(), x)
    upstream = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = grad(Square.apply(x), x, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="square has no second derivatives"):
        grad(gradient.sum(), upstream)


def test_autocast_as_seen_by_the_ops():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert _library.autocast_dtype(cpu) is _library.autocast_dtype(meta) is None
    with torch.autocast("cpu", torch.float16):
        assert _library.autocast_dtype(cpu) == torch.float16
        assert _library.autocast_dtype(meta) is None
        with _library.without_autocast(cpu):
            assert _library.autocast_dtype(cpu) is None
        with _library.without_autocast(meta):
            assert _library.autocast_dtype(cpu) == torch.float16


MASK = torch.ones(1, 1, dtype=torch.bool)
IMAGES = torch.zeros(1, 1, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("op", "shapes"),
    [
        (
            lambda q, k, w, b, s: info_nce(q, k, weights=w, key_bias=b, scale=s),
            [(2, 3), (2, 3), (2,), (2,), ()],
        ),
        (lambda q, k, b, s: scores_logsumexp(q, k, key_bias=b, scale=s), [(2, 3), (2, 3), (2,), ()]),
        (lambda q, k, w, b, s: sigmoid_contrast(q, k, weights=w, bias=b, scale=s), [(2, 3), (2, 3), (2,), (), ()]),
        (
            lambda x, w, b, r: conv2d(x, w, b, residual=r, relu_input=True),
            [(1, 1, 2, 2), (2, 1, 1, 1), (2,), (1, 2, 2, 2)],
        ),
        (
            lambda x, w, b, c: masked_conv2d(x, w, b, mask=MASK, condition=c),
            [(1, 1, 2, 2), (2, 1, 1, 1), (2,), (2, 1, 1)],
        ),
        (lambda x: extract_patches(x, 1, 1), [(1, 1, 2, 2)]),
        (lambda params: logistic_mixture_nll(IMAGES, params), [(1, 3, 2, 2)]),
    ],
    ids=[
        "info_nce",
        "scores_logsumexp",
        "sigmoid_contrast",
        "conv2d",
        "masked_conv2d",
        "extract_patches",
        "logistic_mixture_nll",
    ],
)
def test_tangents_are_refused_in_each_argument(op, shapes):
    tensors = [draw(*shape).abs() for shape in shapes]
    for i, tensor in enumerate(tensors):
        with forward_ad.dual_level():
            op(*tensors)
            dual = forward_ad.make_dual(tensor, torch.ones_like(tensor))
            with pytest.raises(NotImplementedError, match="the ops of cpc_ext have no forward-mode derivatives"):
                op(*tensors[:i], dual, *tensors[i + 1 :])


# --- Arguments of CUDA's kernels that the CPU's ignore ---


@pytest.fixture
def given(monkeypatch):
    """A function that records the calls of a module's kernels, and returns the list of their names and arguments."""
    calls = []

    class Watched:
        def __init__(self, **answers):
            self.answers = answers

        def __getattr__(self, name):
            if name in self.answers:
                return lambda *_, **__: self.answers[name]
            kernel = getattr(native, name)

            def run(*arguments, **named):
                calls.append((name, named or arguments))
                return kernel(*arguments, **named)

            return run if callable(kernel) else kernel

    def watch(module, **answers):
        monkeypatch.setattr(sys.modules[f"cpc_ext.ops.{module}"], "native", Watched(**answers))
        return calls

    return watch


@pytest.mark.parametrize("allowed", [False, True])
def test_each_kernel_is_told_whether_it_may_round(given, monkeypatch, allowed):
    of_module = {"_contrast": "product", "masked_conv2d": "convolution"}
    for module, work in of_module.items():
        calls = given(module)
        monkeypatch.setattr(
            sys.modules[f"cpc_ext.ops.{module}"],
            "tf32_allowed",
            lambda tensor, kind, work=work: allowed if kind == work and isinstance(tensor, Tensor) else None,
        )
    input, weight = (draw(2, 2, 3, 3, dtype=torch.float32).requires_grad_() for _ in range(2))
    info_nce(input[0, 0], weight[0, 0], reduction="none").loss.sum().backward()
    masked_conv2d(input, weight, mask=torch.ones(3, 3, dtype=torch.bool)).sum().backward()
    pixel = PixelConvolution(weight, mask=torch.ones(3, 3, dtype=torch.bool))
    image = input.detach().contiguous(memory_format=torch.channels_last)
    pixel(image, torch.empty_like(image), torch.tensor([1, 2]))
    names = ("info_nce", "masked_conv2d", "masked_conv2d_backward", "masked_conv2d_packed")
    # Without names it is the last but the workspace.
    told = [(name, given["tf32"] if isinstance(given, dict) else given[-2]) for name, given in calls if name in names]
    assert {name for name, _ in told} == set(names)
    assert all(value is allowed for _, value in told)


# --- Calls that go to the kernel straight ---


def each_op(dtype=torch.float64):
    """Return ops with gradients by name, each as a function of one tensor, and that tensor."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    return {
        "info_nce": (lambda x: info_nce(x, x.flip(0) + 1, scale=0.5).loss, draw(5, 3, dtype=dtype)),
        "info_nce of batches": (lambda x: info_nce(x, x + 1, reduction="none").loss, draw(2, 5, 3, dtype=dtype)),
        "masked_conv2d": (lambda x: masked_conv2d(x, x, mask=mask, activation="gated"), draw(2, 2, 2, 3, dtype=dtype)),
        "extract_patches": (lambda x: extract_patches(x, 2, 1, patch_norm=True), draw(2, 3, 4, 5, dtype=dtype)),
    }


class Seen(TorchDispatchMode):
    """Records the names of the ops that went through the dispatcher."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.names.add(function._schema.name.partition("::")[2])
        return function(*arguments, **(named or {}))


class Dispatched(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), named=None):
        return function(*arguments, **(named or {}))


@pytest.fixture
def asked():
    """Record the calls of the ops' kernels by PyTorch's dispatcher."""
    calls = []
    library = torch.library.Library("cpc_ext", "IMPL")
    for name in ("info_nce", "masked_conv2d", "extract_patches"):
        op = getattr(torch.ops.cpc_ext, name).default

        def run(*arguments, op=op, name=name):
            calls.append(name)
            return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.XPU), *arguments)

        library.impl(name, run, "CPU", allow_override=True)
    yield calls
    library._destroy()


@pytest.mark.parametrize("name", each_op())
@pytest.mark.parametrize("learns", [False, True])
def test_a_call_that_nobody_watches_leaves_the_dispatcher_out(asked, name, learns):
    function, x = each_op()[name]
    function(x.requires_grad_(learns))
    assert asked == []
    with Dispatched():
        function(x)
    assert asked == [name.split()[0]]


@pytest.mark.parametrize("name", each_op())
def test_a_straight_call_is_the_dispatched_one(monkeypatch, name):
    function, x = each_op(torch.float32)[name]
    x.requires_grad_()
    straight = function(x)
    straight_gradient = grad(straight.square().sum(), x)[0]
    with torch.no_grad():
        assert torch.equal(function(x), straight)
    with torch.inference_mode():
        assert torch.equal(function(x.detach().clone()), straight)
    assert not straight._is_view()
    monkeypatch.setattr(_library, "nobody_watches", lambda: False)
    dispatched = function(x)
    assert torch.equal(dispatched, straight)
    assert (dispatched.stride(), dispatched.dtype) == (straight.stride(), straight.dtype)
    assert torch.equal(grad(dispatched.square().sum(), x)[0], straight_gradient)


@pytest.mark.parametrize("name", each_op())
def test_modes_and_the_profiler_see_each_call(name):
    function, x = each_op()[name]
    op = name.split()[0]
    with Seen() as seen:
        function(x)
    assert op in seen.names
    with torch.profiler.profile() as profile:
        function(x)
    assert f"cpc_ext::{op}" in {event.name for event in profile.events()}


@pytest.mark.parametrize("name", each_op())
def test_a_tensor_whose_memory_holds_other_values(name):
    """A view of a conjugate's imaginary part is negated where it is read."""
    function, x = each_op()[name]
    negated = torch.complex(torch.zeros_like(x), x).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(function(negated), function(-x))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_what_counts_as_plain_is_what_tensors_are(device):
    zeros = functools.partial(torch.zeros, 1, device=device)
    tensors = [zeros(), torch.nn.Parameter(zeros()), zeros(requires_grad=True)[0]]
    with torch.inference_mode():
        tensors.append(zeros())
        assert _library.nobody_watches()
    found = {torch._C._dispatch_keys(tensor).raw_repr() for tensor in tensors}
    assert found <= _library._PLAIN_KEYS
    assert len(found) * len(KERNEL_DEVICES) == len(_library._PLAIN_KEYS)
    assert _library.nobody_watches()


# --- Workspaces ---


def test_a_workspace_that_is_left_out():
    """Small ones are the module's own; of others it tells the size."""

    def problem(rows):
        queries, losses = draw(1, rows, 4, dtype=torch.float32), torch.zeros(1, rows)
        ranks = torch.zeros(1, rows, dtype=torch.int64)
        given = queries, queries, *[None] * 11, losses, ranks, *[None] * 5
        return losses, (*given, 1.0, 1.0, "softmax", "all", False, False, False)

    losses, small = problem(5)
    size = native.info_nce_workspace(*small)
    assert 0 < size < 2**20
    assert native.info_nce(*small, torch.zeros(size, dtype=torch.uint8)) == 0
    expected = losses.clone()
    losses.fill_(torch.nan)
    assert native.info_nce(*small, None) == 0
    assert torch.equal(losses, expected)
    losses, large = problem(300_000)
    size = native.info_nce_workspace(*large)
    assert size > 2**20
    assert native.info_nce(*large, None) == size
    assert not losses.any()
