"""Ops under the transforms of torch.func: gradients of functions, of batches of them, and by compiled ones."""

from __future__ import annotations

import pytest
import torch
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from cpc_ext.ops import (
    conv2d,
    extract_patches,
    info_nce,
    logistic_mixture_nll,
    masked_conv2d,
    scores_logsumexp,
    sigmoid_contrast,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated"),
]
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
IMAGES = torch.randint(0, 256, (2, 3, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
INDICES = torch.tensor([2, 0, 1])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Functions to a scalar, and the shapes of their arguments.
FUNCTIONS = {
    "info_nce": (
        lambda q, k, w, s, b: info_nce(q, k, weights=w.exp(), scale=s, key_bias=b).loss,
        [(3, 2), (4, 2), (3,), (), (4,)],
    ),
    "info_nce sum": (lambda q, k, s: info_nce(q, k, INDICES, scale=s, reduction="sum").loss, [(3, 2), (4, 2), ()]),
    "info_nce none": (
        lambda q, k, w: (info_nce(q, k, weights=w.exp(), reduction="none").loss * w).sum(),
        [(3, 2), (4, 2), (3,)],
    ),
    "sampled": (lambda q, k: info_nce(q, k, negatives=INDICES[:, None]).loss, [(3, 2), (4, 2)]),
    "symmetric": (
        lambda q, k, s: info_nce(q, k, INDICES, symmetric=True, scale=s, exclude=(INDICES + 1) % 3).loss,
        [(3, 2), (3, 2), ()],
    ),
    "queries alone": (lambda q, s: info_nce(q, q, scale=s).loss, [(3, 2), ()]),
    "scores_logsumexp": (lambda q, k, b: scores_logsumexp(q, k, key_bias=b).tanh().sum(), [(3, 2), (4, 2), (4,)]),
    "sigmoid_contrast": (
        lambda q, k, s, b: sigmoid_contrast(q, k, INDICES, scale=s, bias=b),
        [(3, 2), (4, 2), (), ()],
    ),
    "conv2d": (
        lambda x, w, b, r: (
            conv2d(x, w, b, stride=2, padding=1, relu_input=True, residual=r, activation="relu").square().sum()
        ),
        [(1, 2, 4, 3), (4, 2, 3, 3), (4,), (1, 4, 2, 2)],
    ),
    "masked_conv2d": (
        lambda x, w, b: masked_conv2d(x, w, b, mask=MASK, activation="relu").square().sum(),
        [(1, 2, 4, 3), (4, 2, 3, 3), (4,)],
    ),
    "masked_conv2d gated": (
        lambda x, w, c: masked_conv2d(x, w, mask=MASK, activation="gated", condition=c).square().sum(),
        [(1, 2, 4, 3), (4, 2, 3, 3), (1, 4, 1, 1)],
    ),
    "extract_patches": (lambda x: extract_patches(x, 2, 1, patch_norm=True).exp().sum(), [(1, 1, 3, 4)]),
    "logistic_mixture_nll": (lambda p: logistic_mixture_nll(IMAGES, p).tanh().sum(), [(2, 20, 3, 3)]),
}
TWICE = [name for name in FUNCTIONS if name.startswith(("conv2d", "masked", "extract"))]


@pytest.fixture(params=FUNCTIONS)
def case(request):
    """A function, and arguments of it."""
    function, shapes = FUNCTIONS[request.param]
    return function, [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]


def expected(function, arguments):
    leaves = [tensor.detach().requires_grad_() for tensor in arguments]
    return torch.autograd.grad(function(*leaves), leaves)


def agree(actual, wanted):
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_gradients_of_functions(case):
    function, arguments = case
    everything = tuple(range(len(arguments)))
    agree(grad(function, argnums=everything)(*arguments), expected(function, arguments))
    agree([grad(function)(*arguments)], expected(function, arguments)[:1])
    value, pull = vjp(function, *arguments)
    torch.testing.assert_close(value, function(*arguments))
    agree(pull(2 * torch.ones_like(value)), [2 * one for one in expected(function, arguments)])


def test_gradients_of_each_of_a_batch(case):
    """Each argument in turn is a batch, as each sample's gradients, and those of ensembles, have it."""
    function, arguments = case
    everything = tuple(range(len(arguments)))
    for at in everything:
        batch = torch.stack([arguments[at], arguments[at] * 0.5 + 0.1, -arguments[at]])
        each = [[*arguments[:at], one, *arguments[at + 1 :]] for one in batch]
        given = [*arguments[:at], batch, *arguments[at + 1 :]]
        dims = tuple(0 if other == at else None for other in everything)
        wanted = [torch.stack(parts) for parts in zip(*(expected(function, one) for one in each), strict=True)]
        agree(vmap(grad(function, argnums=everything), in_dims=dims)(*given), wanted)
        # And the other way round: one gradient of a batch's sum, by torch.func and by autograd.
        sums = [whole if other == at else whole.sum(0) for other, whole in enumerate(wanted)]

        def total(*tensors, dims=dims):
            return vmap(function, in_dims=dims)(*tensors).sum()

        agree(grad(total, argnums=everything)(*given), sums)
        agree(expected(total, given), sums)


def test_inside_of_outer_gradients(case):
    """What is not given to the transformed function, but learns by ordinary autograd."""
    function, arguments = case
    outer = [tensor.detach().requires_grad_() for tensor in arguments]
    value, _ = vjp(lambda first: function(first, *outer[1:]), outer[0])
    agree(torch.autograd.grad(value, outer), expected(function, arguments))


def test_jacobians():
    queries, keys = draw(3, 2), draw(4, 2, seed=1)
    for function in (
        lambda q, k: info_nce(q, k, reduction="none").loss,
        lambda q, k: scores_logsumexp(q, k),
        lambda q, k: sigmoid_contrast(q, k, reduction="none"),
    ):
        wanted = torch.autograd.functional.jacobian(function, (queries, keys))
        agree(jacrev(function, argnums=(0, 1))(queries, keys), wanted)


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives(name):
    function, shapes = FUNCTIONS[name]
    arguments = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    wanted = torch.autograd.functional.hessian(lambda first: function(first, *arguments[1:]), arguments[0])
    agree([jacrev(grad(function))(*arguments)], [wanted])


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in TWICE])
def test_what_has_no_second_derivatives(name):
    function, shapes = FUNCTIONS[name]
    arguments = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    with pytest.raises(RuntimeError, match="has no second derivatives"):
        grad(lambda *tensors: grad(function)(*tensors).sum())(*arguments)
    with pytest.raises(RuntimeError, match="has no second derivatives"):
        jacrev(jacrev(function))(*arguments)


def test_forward_mode_is_refused(case):
    function, arguments = case
    for derive in (
        lambda: jvp(lambda first: function(first, *arguments[1:]), (arguments[0],), (arguments[0],)),
        lambda: jacfwd(function)(*arguments),
        lambda: hessian(function)(*arguments),
    ):
        with pytest.raises(NotImplementedError, match="the ops of cpc_ext have no forward-mode derivatives"):
            derive()


def test_traced(case):
    function, arguments = case
    torch.testing.assert_close(functionalize(function)(*arguments), function(*arguments))


@pytest.mark.parametrize("name", ["symmetric", "masked_conv2d"])
def test_compiled(name):
    function, shapes = FUNCTIONS[name]
    arguments = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    torch._dynamo.reset()
    compiled = torch.compile(grad(function), backend="aot_eager")
    agree([compiled(*arguments)], expected(function, arguments)[:1])
