"""Ops on a device without kernels: plain PyTorch, forward and backward, and shapes on meta."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from cpc_ext import nn as cpc_nn
from cpc_ext.ops import (
    AugmentationPlan,
    _library,
    augment_patches,
    extract_patches,
    info_nce,
    logistic_mixture_nll,
    masked_conv2d,
    predict_and_contrast,
    sample_logistic_mixture,
    scores_logsumexp,
    sigmoid_contrast,
)
from cpc_ext.ops._contrast import ContrastOptions, flat_problem

pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")

MODULES = {name: sys.modules[f"cpc_ext.ops.{name}"] for name in (
    "augment_patches", "extract_patches", "info_nce", "logistic_mixture", "masked_conv2d"
)}  # fmt: skip
OPS = [name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("cpc_ext::")]

# A device without kernels.
XPU = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)


@pytest.fixture
def without_kernels(monkeypatch):
    """Make the CPU a device without kernels; returns the set of names of the ops that have run."""
    monkeypatch.setattr(_library, "nobody_watches", lambda: False)
    ran = set()

    def elsewhere(name):
        op = getattr(torch.ops.cpc_ext, name).default

        def run(*arguments):
            ran.add(name)
            return op.redispatch(XPU, *arguments)

        return run

    library = torch.library.Library("cpc_ext", "IMPL")
    for name in OPS:
        library.impl(name, elsewhere(name), "CPU", allow_override=True)
    yield ran
    library._destroy()


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def agree(actual, expected, tolerance=1e-10):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("activation", [None, "relu", "gated"])
@pytest.mark.parametrize("mask", ["plane", "channels", "numbers"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_masked_conv2d(without_kernels, mask, activation, dtype, tolerance):
    mask = {
        "plane": torch.tensor([[1, 1, 1], [1, 0, 0]]).bool(),
        "channels": torch.rand(6, 3, 2, 3, generator=torch.Generator().manual_seed(1)) < 0.5,
        "numbers": torch.tensor([[0.0, 1, 1], [1, 0, 0]]),
    }[mask]
    shapes = (2, 3, 5, 4), (6, 3, 2, 3), (6,), (2, 6, 5, 1)
    tensors = [draw(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    output = masked_conv2d(*tensors[:3], mask=mask, dilation=2, activation=activation, condition=tensors[3])
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = MODULES["masked_conv2d"].masked_conv2d_reference(
        *exact[:3], mask=mask, dilation=2, activation=activation, condition=exact[3]
    )
    agree([output], [expected], tolerance)
    upstream = draw(*output.shape, seed=7)
    agree(grad(output, tensors, upstream.to(dtype)), grad(expected, exact, upstream), 10 * tolerance)
    assert without_kernels == {"masked_conv2d", "masked_conv2d_backward"}


@pytest.mark.parametrize("activation", [None, "relu", "gated"])
def test_derivatives_of_masked_conv2d_by_finite_differences(without_kernels, activation):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [0, 0, 0]]).bool()
    tensors = [
        draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate([(1, 2, 3, 3), (2, 2, 3, 3), (2,)])
    ]

    def convolve(*tensors):
        return masked_conv2d(*tensors, mask=mask, activation=activation)

    assert gradcheck(convolve, tensors)
    assert gradgradcheck(convolve, tensors, fast_mode=True)


@pytest.mark.parametrize("samples", [None, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_info_nce(without_kernels, reduction, samples, dtype):
    generator = torch.Generator().manual_seed(0)
    queries, keys = draw(2, 5, 4, seed=1).to(dtype), draw(2, 6, 4, seed=2).to(dtype)
    weights = torch.tensor([[0.0, 1, 2, 0.5, 1], [1, 1, 3, 0, 0]], dtype=torch.float64)
    targets = torch.randint(6, (2, 5), generator=generator)
    options = {"targets": targets, "exclude": (targets + 1) % 6, "scale": 0.7, "reduction": reduction}
    if samples:
        options["negatives"] = torch.randint(6, (2, 5, samples), generator=generator)
    tensors = [tensor.requires_grad_() for tensor in (queries, keys, weights)]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    results = info_nce(queries, keys, weights=weights, **options)
    expected = MODULES["info_nce"].info_nce_reference(*exact[:2], weights=exact[2], **options)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3}[dtype]
    agree(results, expected, tolerance)
    upstream = torch.linspace(0.5, 1.5, results.loss.numel(), dtype=torch.float64).view(results.loss.shape)
    actual = grad(results.loss, tensors, upstream.to(results.loss))
    agree(actual, grad(expected.loss, exact, upstream), tolerance)
    assert "info_nce" in without_kernels
    assert ("info_nce_gradients" in without_kernels) == (reduction == "none" or dtype == torch.float16)


def test_info_nce_of_absent_queries(without_kernels):
    queries, keys, weights = draw(3, 4), draw(5, 4, seed=1), torch.tensor([1.0, 0, 2])
    negatives = torch.tensor([[2], [4], [0]])
    keys[[1, 4]], queries[1] = torch.nan, torch.nan
    tensors = [tensor.requires_grad_() for tensor in (queries, keys, weights)]
    loss = info_nce(queries, keys, weights=weights, negatives=negatives).loss
    present = torch.tensor([0, 2])
    exact = [queries.detach()[present].requires_grad_(), keys.detach().requires_grad_()]
    expected = MODULES["info_nce"].info_nce_reference(
        *exact, present, weights=weights.detach()[present], negatives=negatives[present]
    )
    agree([loss], [expected.loss])
    of_queries, of_keys, of_weights = grad(loss, tensors)
    wanted = grad(expected.loss, exact)
    agree([of_queries[present], of_keys], wanted)
    assert not of_queries[1].any()
    assert of_weights[1] == 0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_logistic_mixture(without_kernels, channels, layout):
    images = torch.randint(0, 256, (2, channels, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    params = draw(2, 2 * (10 if channels == 3 else 3), 3, 4).contiguous(memory_format=layout).requires_grad_()
    exact = params.detach().clone().requires_grad_()
    nll = logistic_mixture_nll(images, params)
    expected = MODULES["logistic_mixture"].logistic_mixture_nll_reference(images, exact)
    agree([nll], [expected])
    upstream = torch.tensor([1.0, -2.0], dtype=torch.float64)
    agree(grad(nll, params, upstream), grad(expected, exact, upstream))
    noise = torch.rand(2, 2 + channels, 3, 4, generator=torch.Generator().manual_seed(1))
    drawn = sample_logistic_mixture(params, channels=channels, noise=noise)
    assert len(drawn.unique()) > 4
    assert without_kernels == {
        *("logistic_mixture_nll", "logistic_mixture_nll_backward"),
        "sample_logistic_mixture",
    }


@pytest.mark.parametrize("patch_norm", [False, True])
def test_extract_patches(without_kernels, patch_norm):
    images = torch.rand(2, 3, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    options = {"gray": True, "mean": [0.4], "std": [0.3], "patch_norm": patch_norm, "channels_last": True}
    flip = torch.tensor([True, False])
    patches = extract_patches(images, 3, 2, flip=flip, **options)
    assert gradcheck(lambda images: extract_patches(images, 3, 2, flip=flip, **options), (images,), fast_mode=True)
    assert gradgradcheck(lambda images: extract_patches(images, 3, 2, flip=flip, **options), (images,), fast_mode=True)
    exact = images.detach().clone().requires_grad_()
    gray = (exact * torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(3, 1, 1)).sum(1)
    gray = (torch.stack([gray[0].flip(1), gray[1]]) - 0.4) / 0.3
    expected = gray.unfold(1, 3, 2).unfold(2, 3, 2)
    if patch_norm:
        centred = expected - expected.mean((3, 4), keepdim=True)
        expected = centred / (centred.square().mean((3, 4), keepdim=True).sqrt() + 0.1)
    agree([patches[:, :, :, 0]], [expected])
    upstream = draw(*expected.shape)
    agree(grad(patches, images, upstream.unsqueeze(3)), grad(expected, exact, upstream))
    assert without_kernels == {"extract_patches", "extract_patches_backward"}


def test_augment_patches(without_kernels):
    images = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    patches = augment_patches(images, 3, 3, AugmentationPlan.empty(2, 2, 2))
    assert torch.equal(patches, extract_patches(images, 3, 3))
    assert "augment_patches" in without_kernels


# --- Kernels, references and fakes of an op give the same, argument by argument ---


def contrasts(dtype):
    """Yield problems of info_nce with weights and thresholds: all keys, sampled, symmetric, and each measure."""
    queries, keys = draw(2, 3, 4, dtype=dtype), draw(2, 5, 4, seed=1, dtype=dtype)
    targets = torch.tensor([[[0, 1], [4, -1], [2, 2]], [[3, 0], [-1, -1], [1, 4]]])
    others = {
        "exclude": torch.tensor([[[2, 4], [0, -1], [-1, 1]], [[1, -1], [2, 3], [0, 0]]]),
        "key_range": torch.tensor([[[0, 5], [2, 2], [1, 4]], [[0, 5], [0, 3], [2, 5]]]),
        "key_bias": draw(2, 5, seed=2),
        "groups": (torch.tensor([[0, 1, 2], [0, 0, 3]]), torch.tensor([[0, 1, 0, 1, 2], [0, 1, 1, 0, 2]])),
        "contrast": "other",
        "scale": torch.tensor(0.7, requires_grad=True),
    }
    negatives = torch.tensor([[[1, 2], [4, 3], [0, 0]], [[4, 3], [2, 0], [0, 4]]])
    weights = torch.tensor([[0.0, 1, 2], [3, 0.5, 1]], dtype=torch.float64)
    thresholds = torch.tensor([[0.1, -1, 1], [0, 0.5, 2]])
    for num_keys, measure, given in (
        (5, "softmax", {"scale": 0.7}),
        (5, "softmax", {"targets": targets, "weights": weights, **others}),
        (5, "softmax", {"targets": targets, "weights": weights, "negatives": negatives, **others}),
        (3, "softmax", {"symmetric": True, "weights": weights, "scale": others["scale"]}),
        (5, "sigmoid", {"targets": targets, "weights": weights, "key_bias": others["key_bias"]}),
        (5, "log_sum", others),
    ):
        options = ContrastOptions(**given)
        problem, of_present = flat_problem(queries, keys[:, :num_keys], options, measure)
        problem = problem._replace(scales=None if problem.scales is None else problem.scales.detach())
        yield problem, of_present, thresholds if measure == "log_sum" else None


def problems(dtype):
    """Yield names of ops with arguments, including every combination of needed gradients."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.promote_types(dtype, torch.float32)
    choices = list(itertools.product([False, True], repeat=3))

    for problem, weights, thresholds in contrasts(dtype):
        kept = [True, True, problem.key_bias is not None, weights is not None, problem.scales is not None, True]
        needed = list(itertools.product(*([False, True] if need else [False] for need in kept)))
        for reduction, some in (("mean", needed), ("sum", needed[::3]), ("none", needed[::5])):
            for needs in some:
                yield "info_nce", (*problem, weights, thresholds, reduction, [*needs])
        row_weights = torch.tensor([[0.0, 1, 2], [3, 0.5, 1]], dtype=sums)
        for needs in choices:
            yield "info_nce_gradients", (*problem, row_weights, weights, [*needs])
        for given, mean in itertools.product(((problem.targets, None), (problem.targets, row_weights)), (False, True)):
            if problem.targets is not None:
                yield "info_nce_weights", (*given, sums, mean)
        yield "info_nce_weights", (None, row_weights, sums, True)

    predicted = draw(7, 4, dtype=dtype), draw(3, 5, 4, seed=1, dtype=dtype), draw(6, 5, seed=2, dtype=dtype)
    targets = torch.randint(-1, 6, (3, 7), generator=generator)
    for samples, needs in itertools.product((None, 1, 3), choices):
        negatives = None if samples is None else torch.randint(6, (samples, 7, 4), generator=generator)
        for reduction in ("mean", "sum", "none"):
            yield "predict_and_contrast", (*predicted, targets, negatives, 0.3, reduction, [*needs])
        row_weights = draw(3, 7, seed=3, dtype=sums)
        yield "predict_and_contrast_gradients", (*predicted, targets, negatives, 0.3, row_weights, [*needs])

    input, weight, bias, condition = (
        draw(*shape, seed=seed, dtype=dtype)
        for seed, shape in enumerate([(2, 3, 5, 4), (6, 3, 2, 3), (6,), (2, 6, 5, 4)])
    )
    plane, channels = (
        torch.tensor([[1.0, 1, 1], [1, 0, 0]], dtype=torch.float64),
        torch.rand(6, 3, 2, 3, generator=generator) < 0.5,
    )
    heard, layer, shift = (
        draw(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(2, 1, 60), (4, 1, 6), (4,)], 40)
    )
    ones = torch.ones(4, dtype=sums)
    for scale, moved in ((None, None), (ones, shift.to(sums))):
        # Where ReLU is near zero, rounding decides.
        yield "waveform_conv1d", (heard, layer, shift, scale, moved, 3, 1, 1e-5, dtype != torch.bfloat16)
        grad = draw(2, 4, 19, seed=50, dtype=dtype)
        given = (grad, heard, layer, shift, scale, moved)
        yield "waveform_conv1d_backward", (*given, 3, 1, 1e-5, dtype != torch.bfloat16)

    for stride, padding, relu_input, relu in itertools.product((1, 2), ([1, 1], [0, 2]), (False, True), (False, True)):
        arguments = stride, padding, 1, relu_input
        output = torch.ops.cpc_ext.conv2d(input, weight, bias, None, *arguments, relu)
        yield "conv2d", (input, weight, bias, output.contiguous(), *arguments, relu)
        yield "conv2d", (input, weight, None, None, *arguments, relu)
        grad = draw(*output.shape, seed=9, dtype=dtype)
        for needs in choices:
            given = grad, input, weight, output if relu else None
            yield "conv2d_backward", (*given, input.flip(0) if needs[0] else None, *arguments, [*needs])

    for activation, keep in itertools.product(("none", "relu", "gated"), (False, True)):
        yield "masked_conv2d", (input, weight, bias, channels, condition, 2, activation, keep)
        yield "masked_conv2d", (input, weight, None, plane, None, 1, activation, keep)
        grad = draw(2, 3 if activation == "gated" else 6, 5, 4, seed=9, dtype=dtype)
        saved = {"none": None, "relu": condition.clamp(min=0), "gated": condition}[activation]
        saved = None if saved is None else saved.contiguous(memory_format=torch.channels_last)
        for needs, mask in itertools.product(choices, (plane, channels)):
            yield "masked_conv2d_backward", (grad, input, weight, mask, saved, 2, activation, [*needs])

    images = torch.randint(0, 256, (2, 3, 6, 7), dtype=torch.uint8, generator=generator)
    params = draw(2, 20, 6, 7, dtype=dtype)
    for keep, layout in itertools.product((False, True), (torch.contiguous_format, torch.channels_last)):
        laid_out = params.contiguous(memory_format=layout)
        yield "logistic_mixture_nll", (images, laid_out, keep)
        yield "logistic_mixture_nll", (images[:, :1], laid_out[:, :6], keep)
        normalisers = torch.ops.cpc_ext.logistic_mixture_nll(images, laid_out, True)[1]
        yield "logistic_mixture_nll_backward", (draw(2, seed=3, dtype=sums), images, laid_out, normalisers)
    yield "sample_logistic_mixture", (params, torch.rand(2, 5, 6, 7, generator=generator), 3, 0.5)
    yield "sample_logistic_mixture", (params[:, :6], torch.rand(2, 3, 6, 7, generator=generator), 1, 1.0)

    window = 3, 2, 5, 6, torch.tensor([[0, 1], [1, 0]]), torch.tensor([True, False])
    for options in ((False, None, None, False), (True, [0.4], [0.3], True), (False, [0.1, 0.2, 0.3], None, True)):
        norm, size = options[-1], (2, 3, 6, 7)
        for last, pixels in itertools.product((False, True), (images, images.to(dtype) / 255)):
            yield "extract_patches", (pixels, *window, *options, dtype, last)
            plan = AugmentationPlan.empty(2, 2, 2)
            yield "augment_patches", (images, *window, *options, dtype, last, *plan)
            grad = draw(2, 2, 2, 1 if options[0] else 3, 3, 3, dtype=dtype)
            floating = images.to(dtype) / 255
            yield (
                "extract_patches_backward",
                (grad, floating if norm else None, size, dtype, *window, *options, dtype, last),
            )


@torch.no_grad()
def test_references_make_tensors_where_the_arguments_are():
    some = [*problems(torch.float32)]
    for name, arguments in (*dict(some).items(), *dict(reversed(some)).items()):
        if name != "augment_patches":  # It looks at values, which meta has not.
            on_meta = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments]
            results = getattr(torch.ops.cpc_ext, name).default.redispatch(XPU, *on_meta)
            assert all(one.is_meta for one in (results if isinstance(results, list | tuple) else [results])), name


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPS)
@torch.no_grad()
def test_kernels_references_and_fakes_agree(name, dtype):
    def form(tensor):
        steps = zip(tensor.stride(), tensor.shape, strict=True)
        return tensor.shape, tensor.dtype, [step for step, size in steps if size > 1]

    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    op = getattr(torch.ops.cpc_ext, name).default
    compared = 0
    for arguments in (arguments for one, arguments in problems(dtype) if one == name):
        on_meta = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments]
        results = op(*arguments), op.redispatch(XPU, *arguments), op(*on_meta)
        for kernel, plain, fake in zip(*(r if isinstance(r, list | tuple) else [r] for r in results), strict=True):
            assert form(kernel) == form(plain) == form(fake)
            # Scores of predictions that are rounded, as they are without a kernel, may lie the other way round.
            rounded = name == "predict_and_contrast" and dtype == torch.bfloat16 and not kernel.is_floating_point()
            # Normalisers are the kernel's own affair.
            if not rounded and (name != "logistic_mixture_nll" or kernel.ndim == 1):
                torch.testing.assert_close(plain, kernel, rtol=tolerance, atol=tolerance, equal_nan=True)
            compared += 1
    assert compared


# --- The meta device, which has no values and no autocast ---


def test_every_op_on_meta_gives_the_cpus_shapes():
    def results(device):
        def empty(*shape, dtype=torch.float32):
            return torch.zeros(shape, dtype=dtype, device=device).requires_grad_(dtype == torch.float32)

        queries, keys, images, weight = empty(4, 3), empty(5, 3), empty(2, 3, 8, 8), empty(4, 3, 3, 3)
        bytes_ = empty(2, 3, 8, 8, dtype=torch.uint8)
        mask = torch.ones(3, 3, dtype=torch.bool, device=device)
        grids = empty(1, 2, 3, 5, 5), empty(1, 2, 3, 5, 5)
        outputs = [
            *info_nce(queries, keys),
            *info_nce(queries, keys, reduction="none", negatives=empty(4, 2, dtype=torch.int64)),
            *info_nce(queries, keys[:4], torch.arange(4, device=device), symmetric=True, scale=empty()),
            sigmoid_contrast(queries, keys, bias=empty()),
            scores_logsumexp(queries, keys, key_bias=empty(5)),
            *predict_and_contrast(empty(2, 4, 6), empty(3, 3, 6), keys, empty(3, 2, 4, dtype=torch.int64)),
            masked_conv2d(images, weight, mask=mask),
            masked_conv2d(images, weight, mask=mask, activation="gated", condition=empty(2, 4, 1, 1)),
            extract_patches(images, 4, 2),
            logistic_mixture_nll(bytes_, empty(2, 20, 8, 8)),
            sample_logistic_mixture(empty(2, 20, 8, 8)),
            augment_patches(bytes_, 4, 4, AugmentationPlan.empty(2, 2, 2, device=device)),
            *cpc_nn.NTXentLoss().contrast(queries, queries),
            *cpc_nn.GridInfoNCE(3, pred_steps=2, neg_samples="all").to(device)(*grids),
            *cpc_nn.TargetInfoNCE(3, pred_steps=2).to(device)(*grids),
        ]
        loss = sum(output.float().sum() for output in outputs if output.requires_grad)
        return [*outputs, *grad(loss, (queries, keys, images, weight, *grids))]

    for meta, cpu in zip(results("meta"), results("cpu"), strict=True):
        assert meta.device.type == "meta"
        assert (meta.shape, meta.dtype, meta.stride()) == (cpu.shape, cpu.dtype, cpu.stride())
