"""Every function of the compiled module, called directly with extreme arguments.

Empty dimensions, freed or shared memory, and sizes larger than any memory must give a result or a clear error, never a
crash, on the CPU and on emulated CUDA.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import cpc_ext.ops  # noqa: F401 (registers the ops)
from cpc_ext._native import native

REFUSED = (ValueError, TypeError, IndexError)


def aligned(size: int) -> Tensor:
    memory = torch.empty(size + 64, dtype=torch.uint8)
    return memory[-memory.data_ptr() % 64 :][:size]


def channels_last(*shape: int) -> Tensor:
    batch, channels, height, width = shape
    return torch.zeros(batch, height, width, channels).permute(0, 3, 1, 2)


def bytes_of(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def indices(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def filled(tensor: Tensor) -> Tensor:
    """Fill a result, so that it shows if a call writes nothing."""
    return tensor.fill_(7)


# --- Every function, at sizes of which any may be zero ---
# A caller makes the tensors of one call of these sizes, calls, and returns what was written.


def extract(m, *, batch=2, channels=3, side=8, patch=4, stride=2, backward=False, norm=False, gray=False):
    grid = max(side - patch, 0) // max(stride, 1) + 1
    patches = torch.ones(batch, grid, grid, 1 if gray else channels, patch, patch)
    values = [1.0] * patches.shape[3]
    images = torch.zeros(batch, channels, side, side)
    options = patch, stride, side, side, None, torch.zeros(batch, dtype=torch.bool), gray, norm, False, values, values
    if not backward:
        m.extract_patches(images, filled(patches), *options)
        return {"patches": (patches, torch.zeros if norm else torch.ones)}
    problem = filled(images), patches, images.clone() if norm else None, *options
    m.extract_patches_backward(*problem, aligned(m.extract_patches_backward_workspace(*problem)))
    return {}


def augment(m, *, batch=2, channels=3, side=8, patch=4, stride=2, steps=2):
    grid = max(side - patch, 0) // max(stride, 1) + 1
    patches = filled(torch.empty(batch, grid, grid, channels, patch, patch))
    images, codes, places = (
        bytes_of(batch, channels, side, side),
        bytes_of(batch, grid, grid, steps),
        (batch, grid, grid),
    )
    options = patch, stride, side, side, None, None, False, False, False, [1.0] * channels, [0.0] * channels
    partners, displacements = indices(*places), torch.zeros(*places, 2, 4, 4)
    parameters = torch.zeros(*places, steps, 3)
    problem = images, patches, *options, codes, parameters, partners, displacements, 0
    m.augment_patches(*problem, aligned(m.augment_patches_workspace(*problem)))
    return {"patches": (patches, torch.zeros)}


def contrast(
    m, *, batch=2, rows=3, keys=4, dim=5, samples=None, positives=1, excluded=0, gradients=True, targets=True,
    measure="softmax", symmetric=False, masked=False, alone=False
):  # fmt: skip
    keys = rows if alone else keys
    queries = torch.zeros(batch, rows, dim)
    key_tensor = queries if alone else torch.zeros(batch, keys, dim)
    alone = alone and m.info_nce_on_cpu(queries)
    named = torch.full((batch, rows, positives), -1)
    named[..., :1] = 0
    tensors = {
        "queries": queries,
        "keys": key_tensor,
        "targets": named if targets else None,
        "negatives": None if samples is None else indices(batch, rows, samples),
        "exclude": torch.full((batch, rows, excluded), -1) if masked else None,
        "key_range": torch.tensor([0, keys]).repeat(batch, rows, 1) if masked else None,
        "query_groups": indices(batch, rows) if masked else None,
        "key_groups": indices(batch, keys) if masked else None,
        "key_bias": torch.zeros(batch, keys) if masked else None,
        "scales": torch.ones(1) if masked else None,
        "row_weights": torch.ones(batch, rows) if masked else None,
        "thresholds": torch.zeros(batch, rows) if measure == "log_sum" else None,
        "present": torch.ones(batch, rows) if symmetric else None,
    }
    losses, slopes, bests = (filled(torch.empty(batch, rows)) for _ in range(3))
    ranks = filled(indices(batch, rows))
    shapes = queries.shape, key_tensor.shape, (batch, keys)
    gradient = [filled(torch.empty(shape)) if gradients else None for shape in shapes]
    if alone:
        gradient[1:] = None, None
    options = 1.0, 1.0, measure, "same" if masked else "all", symmetric, alone, False
    arguments = *tensors.values(), losses, ranks, slopes, bests, *gradient, *options
    workspace = aligned(m.info_nce_workspace(*arguments))
    m.info_nce(*arguments, workspace)
    # With all scores 0 every key, or every negative beside the positive, is as likely as the other.
    others = keys if samples is None else samples + 1
    loss = float(np.log(others)) if others else -np.inf
    if measure == "sigmoid":
        loss = keys * np.log(2)
    present = measure == "log_sum" or not targets or positives > 0
    # On CUDA, which cannot look at indices, a target or negative that names no key gives NaN.
    wrong = keys == 0 and measure != "log_sum" and (present or bool(samples))
    loss = float("nan") if wrong else loss if present else 0.0
    expected = {"losses": (losses, lambda shape: torch.full(shape, loss))}
    for name, tensor in zip(("grad_queries", "grad_keys"), gradient[:2], strict=True):
        if tensor is not None:
            value = float("nan") if wrong and name == "grad_queries" else 0.0
            expected[name] = (tensor, lambda shape, value=value: torch.full(shape, value))
    return expected


def weigh(m, *, batch=2, rows=3, positives=2, mean=False):
    result, targets = filled(torch.empty(batch, rows)), torch.full((batch, rows, positives), -1)
    targets[..., -1:] = 0
    problem = result, targets, torch.full((batch, rows), 0.5), mean
    m.info_nce_weights(*problem, aligned(m.info_nce_weights_workspace(*problem)))
    value = (1 / max(batch * rows, 1) if mean else 0.5) if positives else 0.0
    return {"row_weights": (result, lambda shape: torch.full(shape, value))}


def reduce(m, *, batch=2, rows=3):
    loss, accuracy = filled(torch.empty(())), filled(torch.empty(()))
    problem = torch.ones(batch, rows), indices(batch, rows), None, loss, accuracy, True
    m.info_nce_reduced(*problem, aligned(m.info_nce_reduced_workspace(*problem)))
    value = float(batch * rows > 0)
    return {name: (one, lambda shape: torch.full(shape, value)) for name, one in (("loss", loss), ("right", accuracy))}


def predict(_, *, rows=3, channels=2, steps=2, dim=3, keys=4, samples=None, shared=False):
    """Call predict_and_contrast, which only the CPU has."""
    contexts, weights, key_tensor = (
        torch.zeros(rows, channels),
        torch.zeros(steps, dim, channels),
        torch.zeros(keys, dim),
    )
    negatives = None if samples is None else indices(1 if shared else steps, rows, samples)
    losses, ranks = filled(torch.empty(steps, rows)), filled(indices(steps, rows))
    gradients = [filled(torch.empty_like(tensor)) for tensor in (contexts, weights, key_tensor)]
    tensors = contexts, weights, key_tensor, indices(steps, rows), negatives, torch.ones(steps, rows)
    problem = *tensors, losses, ranks, *gradients, 1.0
    native.predict_and_contrast(*problem, aligned(native.predict_and_contrast_workspace(*problem)))
    others = keys if samples is None else samples + 1
    expected = {"losses": (losses, lambda shape: torch.full(shape, float(np.log(max(others, 1)))))}
    names = "grad_contexts", "grad_weights", "grad_keys"
    return expected | {name: (tensor, torch.zeros) for name, tensor in zip(names, gradients, strict=True)}


def likelihood(m, *, batch=2, channels=3, components=2, height=3, width=4, backward=False):
    params = torch.zeros(batch, (10 if channels == 3 else 3) * components, height, width)
    images, normalisers = bytes_of(batch, channels, height, width), torch.ones(batch, 2, height, width)
    if backward:
        gradient = filled(torch.empty_like(params))
        m.logistic_mixture_nll_backward(images, params, normalisers, torch.zeros(batch), gradient)
        return {"params_grad": (gradient, torch.zeros)}
    nll = filled(torch.empty(batch))
    problem = images, params, nll, normalisers
    m.logistic_mixture_nll(*problem, aligned(m.logistic_mixture_nll_workspace(*problem)))
    return {"nll": (nll, torch.zeros)} if height * width == 0 else {}


def draw(m, *, batch=2, channels=3, components=2, height=3, width=4):
    params = torch.zeros(batch, (10 if channels == 3 else 3) * components, height, width)
    noise = torch.full((batch, components + channels, height, width), 0.5)
    images = filled(bytes_of(batch, channels, height, width))
    m.sample_logistic_mixture(params, noise, images, 1.0)
    return {"images": (images, lambda shape: torch.full(shape, 128.0))}


def convolve(m, *, batch=2, inputs=3, outputs=4, height=3, width=5, kh=3, kw=3, taps=(0, 1), keep=True):
    weight, mask = torch.ones(outputs, inputs, kh, kw), torch.ones(kh, kw, dtype=torch.bool)
    output, preactivation = (filled(channels_last(batch, outputs, height, width)) for _ in range(2))
    tensors = weight, mask, channels_last(batch, inputs, height, width), torch.zeros(outputs), None, output
    problem = *tensors, preactivation if keep else None, list(taps), 1, "relu", False
    m.masked_conv2d(*problem, aligned(m.masked_conv2d_workspace(*problem)))
    return {"output": (output, torch.zeros)}


def convolve_plainly(m, *, batch=2, inputs=3, outputs=4, height=3, width=5, kh=3, kw=3, stride=1, relu=True):
    weight, input = torch.ones(outputs, inputs, kh, kw), channels_last(batch, inputs, height, width)
    rows, columns = ((side + 2 - k) // max(stride, 1) + 1 for side, k in ((height, kh), (width, kw)))
    output = filled(channels_last(batch, outputs, rows, columns))
    problem = weight, input, torch.zeros(outputs), None, output, stride, 1, 1, 1, True, relu
    m.conv2d(*problem, aligned(m.conv2d_workspace(*problem)))
    return {"output": (output, torch.zeros)}


def plain_convolution_gradients(m, *, batch=2, inputs=3, outputs=4, height=3, width=5, kh=3, kw=3, stride=1, relu=True):
    weight, input = torch.ones(outputs, inputs, kh, kw), channels_last(batch, inputs, height, width)
    rows, columns = ((side + 2 - k) // max(stride, 1) + 1 for side, k in ((height, kh), (width, kw)))
    grad = channels_last(batch, outputs, rows, columns)
    output, before = (grad.clone(), filled(grad.clone())) if relu else (None, None)
    of_input, of_weight, of_bias = filled(input.clone()), filled(weight.clone()), filled(torch.empty(outputs))
    tensors = weight, grad, input, output, before, None, of_input, of_weight, of_bias
    problem = *tensors, stride, 1, 1, 1, True
    m.conv2d_backward(*problem, aligned(m.conv2d_backward_workspace(*problem)))
    return {name: (tensor, torch.zeros) for name, tensor in zip(("input", "weight", "bias"), tensors[-3:], strict=True)}


def convolve_a_pixel(m, *, batch=2, inputs=3, outputs=4, height=3, width=5, kh=3, kw=3, taps=(0, 1)):
    weight, mask, taps = torch.ones(outputs, inputs, kh, kw), torch.ones(kh, kw, dtype=torch.bool), list(taps)
    packing = weight, mask, taps, 1, height, width, False
    packed = aligned(m.masked_conv2d_packed_bytes(*packing))
    m.masked_conv2d_pack(*packing, packed)
    tensors = channels_last(batch, inputs, height, width), packed, torch.zeros(outputs), None, indices(2)
    output = filled(channels_last(batch, outputs, height, width))
    m.masked_conv2d_packed(*tensors, output, outputs, taps, kh, kw, 1, "relu", False)
    return {}


def convolution_gradients(
    m, *, batch=2, inputs=3, outputs=4, height=3, width=5, kh=3, kw=3, taps=(0, 1), activation="gated"
):
    weight, mask = torch.ones(outputs, inputs, kh, kw), torch.ones(kh, kw, dtype=torch.bool)
    grad = channels_last(batch, outputs // 2 if activation == "gated" else outputs, height, width)
    input, saved = channels_last(batch, inputs, height, width), channels_last(batch, outputs, height, width)
    before, grad_input = filled(saved.clone()), filled(input.clone())
    grad_weight, grad_bias = filled(weight.clone()), filled(torch.empty(outputs))
    plain = activation == "none"
    kept = (None, None) if plain else (saved, before)
    tensors = weight, mask, grad, input, *kept, grad_input, grad_weight, grad_bias
    problem = *tensors, list(taps), 1, activation, False
    m.masked_conv2d_backward(*problem, aligned(m.masked_conv2d_backward_workspace(*problem)))
    results = {"grad_input": grad_input, "grad_weight": grad_weight, "grad_bias": grad_bias}
    results |= {} if plain else {"grad_preactivation": before}
    return {name: (tensor, torch.zeros) for name, tensor in results.items()}


def steps(m, *, batch=2, height=4, width=4, channels=3, outputs=4, taps=((0, 0),), count=1):
    def new_map(n: int) -> Tensor:
        return torch.zeros(batch, height + 2, width + 2, n)

    raw = new_map(outputs)
    weight, bias = torch.ones(channels * len(taps), outputs), torch.ones(outputs)
    step = (0, [(new_map(channels), 1, list(taps))], weight, bias, None, None, raw, None, 1, (0, 0))
    network = m.PixelSteps([step] * count, batch, height, width)
    if network.on_device:
        plan = torch.frombuffer(bytearray(network.plan()), dtype=torch.uint8).clone()
        for whole_row in (True, False):
            network.run_on_device(plan, torch.zeros(2, dtype=torch.int64), whole_row)
    else:
        network.run_row(0)
        network.run_pixel(0, 0)
    return {"raw": (raw[:, 2, 1:-1], torch.ones if count else torch.zeros)}


def warp(m, *, items=3, pairs=4, dim=5):
    distances = filled(torch.empty(pairs))
    places = torch.arange(items)
    m.dtw_distances(torch.zeros(items, dim), places, torch.ones_like(places), indices(pairs, 2), distances)
    return {"distances": (distances, lambda shape: torch.full(shape, 0.5))}


def waveform_layer(m, *, batch=2, channels=3, frames=20, norm=True, backward=False):
    taps, stride = 4, 3
    waveforms, weight = torch.ones(batch, 1, (frames - 1) * stride + taps), torch.ones(channels, 1, taps)
    scale = torch.ones(channels) if norm else None
    out = filled(torch.empty(batch, frames, channels))
    sums = filled(torch.empty(channels, taps + 3))
    if not backward:
        m.waveform_conv1d(waveforms, weight, None, scale, scale, out, stride, 0, 1e-5, False)
        # Frames whose channels are alike are the shift.
        return {"out": (out, lambda shape: torch.full(shape, 1.0 if norm else taps))}
    m.waveform_conv1d_backward(
        waveforms, weight, None, scale, scale, torch.ones_like(out), sums, stride, 0, 1e-5, False
    )
    if norm:
        return {"gradient of the shift": (sums[:, -1], lambda shape: torch.full(shape, float(batch * frames)))}
    return {"gradient of the weight": (sums[:, :taps], lambda shape: torch.full(shape, float(batch * frames)))}


CALLS: dict[str, tuple[Callable, dict, dict]] = {
    # Name: caller, fixed arguments, and sizes with the values to try besides the usual ones.
    "extract_patches": (extract, {}, {"batch": [0, 1], "channels": [0], "side": [0], "patch": [0, 8], "stride": [0]}),
    "extract_patches normalised": (extract, {"norm": True}, {"batch": [0], "channels": [0]}),
    "extract_patches gray": (extract, {"gray": True}, {"batch": [0], "channels": [0, 1]}),
    "extract_patches_backward": (
        extract,
        {"backward": True},
        {"batch": [0], "channels": [0], "side": [0], "patch": [0], "stride": [0]},
    ),
    "extract_patches_backward normalised": (
        extract,
        {"backward": True, "norm": True},
        {"batch": [0], "channels": [0], "side": [0], "patch": [0]},
    ),
    "augment_patches": (augment, {}, {"batch": [0], "channels": [0, 1], "side": [0], "patch": [0, 8], "steps": [0]}),
    "info_nce": (contrast, {}, {"batch": [0], "rows": [0], "keys": [0, 1], "dim": [0], "positives": [0, 3]}),
    "info_nce without targets": (contrast, {"targets": False}, {"batch": [0], "rows": [0, 4], "keys": [0], "dim": [0]}),
    "info_nce losses only": (contrast, {"gradients": False}, {"batch": [0], "rows": [0], "keys": [0], "dim": [0]}),
    "info_nce sampled": (
        contrast,
        {"samples": 2},
        {"batch": [0], "rows": [0], "keys": [0, 1], "dim": [0], "samples": [0], "positives": [0, 2]},
    ),
    "info_nce masked": (
        contrast,
        {"masked": True},
        {"batch": [0], "rows": [0], "keys": [0, 1], "dim": [0], "positives": [0, 3], "excluded": [2]},
    ),
    "info_nce sampled and masked": (
        contrast,
        {"masked": True, "samples": 3},
        {"batch": [0], "rows": [0], "keys": [0, 1], "dim": [0], "positives": [0, 3], "excluded": [2]},
    ),
    "info_nce both ways": (
        contrast,
        {"symmetric": True, "targets": False, "rows": 4},
        {"batch": [0], "rows": [0], "keys": [0], "dim": [0], "masked": [True]},
    ),
    "info_nce of queries alone": (
        contrast,
        {"alone": True, "targets": False},
        {"batch": [0], "rows": [0, 1], "dim": [0], "masked": [True]},
    ),
    "info_nce of log-sums": (
        contrast,
        {"measure": "log_sum", "targets": False},
        {"batch": [0], "rows": [0, 9], "keys": [0, 1], "dim": [0], "masked": [True]},
    ),
    "info_nce of sigmoids": (
        contrast,
        {"measure": "sigmoid"},
        {"batch": [0], "rows": [0], "keys": [0, 1], "dim": [0], "positives": [0, 3]},
    ),
    "info_nce_weights": (weigh, {}, {"batch": [0], "rows": [0, 20_000], "positives": [0, 1], "mean": [True]}),
    "info_nce_reduced": (reduce, {}, {"batch": [0], "rows": [0, 1, 20_000]}),
    "conv2d": (
        convolve_plainly,
        {},
        {
            "batch": [0, 1],
            "inputs": [0, 1],
            "outputs": [0, 1],
            "height": [0],
            "width": [0],
            "kh": [0, 1],
            "stride": [0, 2],
        },
    ),
    "conv2d_backward": (
        plain_convolution_gradients,
        {},
        {
            "batch": [0, 1],
            "inputs": [0, 1],
            "outputs": [0, 1],
            "height": [0],
            "kw": [0, 1],
            "stride": [0, 2],
            "relu": [False],
        },
    ),
    "predict_and_contrast": (
        predict,
        {},
        {"rows": [0], "channels": [0], "steps": [0, 1], "dim": [0], "keys": [0, 1]},
    ),
    "predict_and_contrast sampled": (
        predict,
        {"samples": 2},
        {"rows": [0], "channels": [0], "steps": [0], "dim": [0], "keys": [0, 1], "samples": [0], "shared": [True]},
    ),
    "predict_and_contrast shared": (
        predict,
        {"samples": 7, "steps": 12, "shared": True},
        {"rows": [0], "channels": [0], "steps": [0], "dim": [0], "keys": [0, 1], "samples": [0]},
    ),
    "logistic_mixture_nll": (
        likelihood,
        {},
        {"batch": [0], "channels": [0, 1], "components": [0], "height": [0], "width": [0]},
    ),
    "logistic_mixture_nll_backward": (
        likelihood,
        {"backward": True},
        {"batch": [0], "channels": [0, 1], "components": [0], "height": [0], "width": [0]},
    ),
    "sample_logistic_mixture": (
        draw,
        {},
        {"batch": [0], "channels": [0, 1], "components": [0], "height": [0], "width": [0]},
    ),
    "masked_conv2d": (
        convolve,
        {},
        {name: [0] for name in ("batch", "inputs", "outputs", "height", "width", "kh", "kw")} | {"taps": [()]},
    ),
    "masked_conv2d at a position": (
        convolve_a_pixel,
        {},
        {name: [0] for name in ("batch", "inputs", "height", "width")} | {"taps": [()]},
    ),
    "masked_conv2d_backward": (
        convolution_gradients,
        {},
        {name: [0] for name in ("batch", "inputs", "outputs", "height", "width", "kh", "kw")}
        | {"taps": [()], "activation": ["relu", "none"]},
    ),
    "masked_conv2d_backward in pairs": (
        convolution_gradients,
        {"inputs": 32, "outputs": 32, "height": 16, "width": 16, "activation": "none"},
        {name: [0] for name in ("batch", "height", "width")} | {"taps": [()]},
    ),
    "masked_conv2d_backward in squares": (
        convolution_gradients,
        {"batch": 4, "inputs": 32, "outputs": 32, "height": 16, "width": 16, "activation": "none"},
        {name: [0] for name in ("batch", "height", "width")} | {"taps": [()]},
    ),
    **{
        f"waveform_conv1d{'_backward' * backward}{' normalised' * norm}": (
            waveform_layer,
            {"backward": backward, "norm": norm},
            {"batch": [0, 1], "frames": [1, 300], **({} if norm else {"channels": [0, 1]})},
        )
        for backward in (False, True)
        for norm in (False, True)
    },
    "dtw_distances": (warp, {}, {"items": [0], "pairs": [0], "dim": [0]}),
    "PixelSteps": (
        steps,
        {},
        {name: [0] for name in ("batch", "height", "width", "channels", "outputs", "count")} | {"taps": [()]},
    ),
}
# Sizes that make no valid problem, and the functions' errors.
ERRORS = {
    ("patch", 0): "patch_size must be at least 1",
    ("stride", 0): "stride must be (at least 1|in 1\\.\\.)",
    ("side", 0): "must hold a patch",
    ("channels", 0): "channels|weight must|\\[B, 1, H, W\\]|scale and shift|gray needs",
    ("components", 0): "params must be",
    ("keys", 0): "targets|must be in 0..-1|as many as queries|key_range",
    ("rows", 0): "as many as queries",
    ("rows", 4): "",
    ("items", 0): "pairs must name items",
    ("outputs", 0): "weight must|there must be outputs",
    ("inputs", 0): "weight must",
    ("kh", 0): "weight must|taps must be in",
    ("kw", 0): "weight must|taps must be in",
    ("height", 0): "position must lie|rows and columns|the input's side must be",
    ("width", 0): "position must lie|rows and columns|the input's side must be",
    ("taps", ()): "weight must",
}


@pytest.fixture(params=["cpu", "emulated"])
def module(request):
    if request.param == "cpu":
        yield native
        return
    emulated = request.getfixturevalue("emulated_native")
    emulated.emulate_cuda(True)
    yield emulated
    emulated.emulate_cuda(False)


def test_every_op_is_called():
    ops = {name.removeprefix("cpc_ext::") for name in torch._C._dispatch_get_all_op_names() if "cpc_ext::" in name}
    # The gradients of these are results of their own functions.
    assert ops - {"info_nce_gradients", "predict_and_contrast_gradients"} <= {name.split()[0] for name in CALLS}


@pytest.mark.parametrize("name", CALLS)
def test_nothing_in_a_dimension(module, name):
    call, always, edges = CALLS[name]
    variants = [{}, *({size: value} for size, values in edges.items() for value in values)]
    # Two edges at once, such as no images of no rows.
    variants += [a | b for a in variants[1:] for b in variants[1:] if next(iter(a)) < next(iter(b))]
    answers = 0
    for sizes in variants:
        refused = ""
        try:
            written = call(module, **always | sizes)
        except REFUSED as error:
            refused = str(error)
        if refused:
            known = [message for size, message in ERRORS.items() if size in sizes.items()]
            assert any(re.search(message, refused) for message in known), f"{sizes}: {refused}"
            continue
        answers += 1
        for result, (tensor, expected) in written.items():
            values = expected(tensor.shape).to(tensor.dtype)
            torch.testing.assert_close(
                tensor, values, equal_nan=True, msg=lambda text, s=sizes, r=result: f"{s}, {r}: {text}"
            )
    assert answers > 1


def test_an_empty_batch_has_a_gradient_of_zeros_in_the_weight(module):
    """In weights of any layout, and where nothing is left of the images."""
    for shape in ((0, 3, 2, 2), (2, 3, 0, 2), (2, 3, 2, 0)):
        gradient = filled(torch.empty(3, 3, 3, 4)).permute(3, 0, 1, 2)
        grad, mask = channels_last(shape[0], 4, *shape[2:]), torch.ones(3, 3, dtype=torch.bool)
        tensors = torch.ones(4, 3, 3, 3), mask, grad, channels_last(*shape), None, None, None, gradient, None
        problem = *tensors, [0, 4], 1, "none", False
        module.masked_conv2d_backward(*problem, aligned(module.masked_conv2d_backward_workspace(*problem)))
        assert not gradient.any()


# --- Memory ---


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def test_a_tensor_whose_memory_was_freed_is_a_type_error():
    whole = torch.zeros(100)
    later = whole[50:]
    turned = later.view(5, 10).t()
    freed(whole)
    for tensor in (whole, later, turned):
        with pytest.raises(TypeError, match="its storage was freed"):
            native.probe(tensor)
    native.probe(whole[:0])  # Nothing of it is read.


def arguments_of(images: Tensor, patches: Tensor) -> tuple:
    return images, patches, 4, 2, 8, 8, None, None, False, False, False, [1.0], [0.0]


def test_every_argument_is_looked_at():
    images, patches = torch.ones(1, 1, 8, 8), torch.empty(1, 3, 3, 1, 4, 4)
    with pytest.raises(TypeError, match="freed"):
        native.extract_patches(*arguments_of(freed(torch.ones(1, 1, 8, 8)), patches))
    with pytest.raises(TypeError, match="freed"):
        native.extract_patches(*arguments_of(images, freed(torch.empty(1, 3, 3, 1, 4, 4))))


class _Described(ctypes.Structure):
    """DLPack's DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint8 * 2),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class Producer:
    """A float32 tensor of any sizes and strides, which PyTorch and NumPy would refuse to make."""

    def __init__(self, shape, strides):
        count = len(shape)
        self.memory, self.lists = np.zeros(16, np.float32), [(ctypes.c_int64 * count)(*v) for v in (shape, strides)]
        shape, strides = (ctypes.cast(v, ctypes.POINTER(ctypes.c_int64)) for v in self.lists)
        float32, cpu = (ctypes.c_uint8 * 2)(2, 32), (ctypes.c_int32 * 2)(1, 0)
        self.described = _Described(self.memory.ctypes.data, cpu, count, float32, 1, shape, strides, 0, None, None)

    def __dlpack__(self, **options):
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.described), b"dltensor", None)


def test_the_producer_of_these_tests_is_understood():
    patches = torch.empty(1, 1, 1, 1, 4, 4)
    native.extract_patches(Producer([1, 1, 4, 4], [16, 16, 4, 1]), patches, 4, 2, 4, 4, *arguments_of(None, None)[6:])
    assert not patches.any()


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ([2**31, 2**31, 2], [0, 0, 0]),
        ([2**31, 2**31, 4], [0, 0, 0]),
        ([2**62], [1]),
        ([2**33, 2**33], [0, 0]),
        ([2, 2], [2**61, 1]),
        ([3], [2**62]),
        ([3, 3], [-(2**62), 2**62]),
        ([0, 2**33, 2**33], [0, 0, 0]),
        ([-1, 2], [2, 1]),
    ],
)
def test_sizes_that_no_memory_holds_are_refused(shape, strides):
    with pytest.raises(ValueError, match="reaches further than memory does"):
        native.probe(Producer(shape, strides))


def test_expanded_inputs_are_fine():
    native.probe(torch.zeros(1, 1).expand(2**20, 2**20))


def test_an_output_that_overlaps_itself_is_refused():
    images = torch.ones(1, 1, 8, 8)
    for patches in (
        torch.empty(1, 3, 3, 1, 4, 1).expand(1, 3, 3, 1, 4, 4),
        torch.empty(144).as_strided((1, 3, 3, 1, 4, 4), (144, 48, 16, 16, 3, 1)),
    ):
        with pytest.raises(ValueError, match="patches must not share memory with itself"):
            native.extract_patches(*arguments_of(images, patches))


def test_an_output_that_overlaps_an_input_is_refused_by_name():
    memory = torch.zeros(400)
    images, patches = memory[:64].view(1, 1, 8, 8), memory[60:204].view(1, 3, 3, 1, 4, 4)
    with pytest.raises(ValueError, match="patches must not share memory with images"):
        native.extract_patches(*arguments_of(images, patches))
    native.extract_patches(*arguments_of(images, memory[64:208].view(1, 3, 3, 1, 4, 4)))
    losses, ranks, tensors = torch.empty(1, 4), indices(1, 4), [torch.randn(1, 4, 8) for _ in range(4)]

    def info_nce(queries, keys, slopes, grad_queries, grad_keys):
        tensors = *(queries, keys), *[None] * 11, *(losses, ranks, slopes, None, grad_queries, grad_keys, None)
        problem = *tensors, 1.0, 1.0, "softmax", "all", False, False, False
        native.info_nce(*problem, aligned(native.info_nce_workspace(*problem)))

    with pytest.raises(ValueError, match="grad_keys must not share memory with queries"):
        info_nce(tensors[0], tensors[1], torch.empty(1, 4), tensors[2], tensors[0])
    with pytest.raises(ValueError, match=r"(losses|slopes) must not share memory with (losses|slopes)"):
        info_nce(*tensors[:2], losses, *tensors[2:])
    info_nce(tensors[0], tensors[0], torch.empty(1, 4), *tensors[2:])  # What is read may be one tensor twice.


def in_place(output: Tensor, condition: Tensor) -> None:
    """A convolution that only adds its condition."""
    batch, channels, height, width = output.shape
    weight = torch.ones(channels, 1, 1, 1)
    mask, input = torch.zeros(1, 1, dtype=torch.bool), channels_last(batch, 1, height, width)
    native.masked_conv2d(weight, mask, input, None, condition, output, None, [], 1, "none", False, aligned(0))


@pytest.mark.parametrize(
    "part",
    [
        lambda whole: (whole[:, :4], whole[:, 4:]),
        lambda whole: (whole[:, 3:7], whole[:, 7:11]),
        lambda whole: (whole[:2, :4], whole[2:, :4]),
        lambda whole: (whole[:, :4, :3], whole[:, :4, 3:]),
        lambda whole: (whole[:, :4, :, :2], whole[:, :4, :, 2:4]),
        lambda whole: (whole[:, :4, :, ::2], whole[:, :4, :, 1::2]),
        lambda whole: (whole[:, :4, ::2], whole[:, 4:8, ::2]),
    ],
)
def test_parts_of_one_tensor_are_apart(part):
    """Channels, images, rows or columns of one feature map: no element is shared though the ranges of memory meet."""
    torch.manual_seed(0)
    whole = torch.randn(4, 6, 6, 12).permute(0, 3, 1, 2)
    before = whole.clone()
    output, condition = part(whole)
    assert output.shape[2:] == condition.shape[2:]
    condition = condition[:, :4]
    expected = condition.clone()
    in_place(output, condition)
    assert torch.equal(output, expected)
    output.copy_(part(before)[0])
    assert torch.equal(whole, before)


@pytest.mark.parametrize(
    "part",
    [
        lambda whole: (whole[:, :4], whole[:, 3:7]),
        lambda whole: (whole[:, :4], whole[:, :4]),
        lambda whole: (whole[:, :4, :3], whole[:, :4, 2:5]),
        lambda whole: (whole[:, :4, :, 1:3], whole[:, 2:6, :, 2:4]),
        lambda whole: (whole[:, :4, ::2], whole[:, :4, 2:5]),
    ],
)
def test_parts_that_share_elements_are_not(part):
    whole = torch.randn(4, 6, 6, 12).permute(0, 3, 1, 2)
    with pytest.raises(ValueError, match="output must not share memory with condition"):
        in_place(*part(whole))


def test_every_pair_of_parts_is_judged_rightly():
    """Random windows of one map against their elements' own addresses."""
    rng = np.random.default_rng(0)
    base = torch.arange(3 * 4 * 5 * 6)
    whole = torch.zeros(3, 4, 5, 6)
    seen = set()
    for _ in range(600):
        windows = []
        for _ in range(2):
            slices = [sorted(rng.integers(0, size + 1, 2)) for size in whole.shape]
            steps = rng.integers(1, 3, 4)
            windows.append(tuple(slice(a, b, s) for (a, b), s in zip(slices, steps, strict=True)))
        places = [set(base.view(whole.shape)[window].flatten().tolist()) for window in windows]
        output = whole[windows[0]].permute(0, 3, 1, 2)
        if not all(places):
            continue
        # As the condition of a convolution, which may have any strides; its shape is refused only afterwards.
        try:
            in_place(output, whole[windows[1]].permute(0, 3, 1, 2))
            answer = ""
        except ValueError as error:
            answer = str(error)
        shares = "must not share memory with condition" in answer
        assert shares >= bool(places[0] & places[1]), (windows, answer)
        seen.add((shares, bool(places[0] & places[1])))
    assert {(True, True), (False, False)} <= seen


# --- A network of steps keeps tensors ---


def map_of(channels: int) -> Tensor:
    return torch.zeros(2, 6, 6, channels)


def network(source: Tensor, raw: Tensor):
    sources = [(source, 1, [(0, 0)])]
    step = (0, sources, torch.ones(3, 4), torch.ones(4), None, None, raw, None, 1, (0, 0))
    return native.PixelSteps([step], 2, 4, 4), sources


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.resize_(200, 6, 6, 3),
        lambda tensor: tensor.resize_(0),
        lambda tensor: tensor.set_(torch.zeros(2, 6, 6, 3)),
        lambda tensor: setattr(tensor, "data", torch.zeros(2, 6, 6, 3)),
        lambda tensor: tensor.untyped_storage().resize_(0),
        lambda tensor: tensor.untyped_storage().resize_(1 << 20),
        lambda tensor: tensor.share_memory_(),
        lambda tensor: tensor.transpose_(1, 2).transpose_(0, 1),
    ],
    ids=["larger", "empty", "set", "data", "freed", "storage", "shared", "strides"],
)
@pytest.mark.parametrize("which", ["source", "raw"])
def test_a_network_whose_tensors_have_moved_is_refused(change, which):
    tensors = {"source": map_of(3), "raw": map_of(4)}
    steps, _ = network(**tensors)
    steps.run_row(0)
    change(tensors[which])
    for run in (lambda: steps.run_row(0), lambda: steps.run_pixel(1, 1)):
        with pytest.raises((ValueError, TypeError), match=r"when the network was made|freed"):
            run()


def test_a_network_keeps_its_own_list_of_tensors():
    steps, sources = network(map_of(3), raw := map_of(4))
    sources.clear()
    torch.full((2, 6, 6, 3), float("nan"))  # What would take the memory of a map that is gone.
    steps.run_row(0)
    assert torch.equal(raw[:, 2, 1:-1], torch.ones(2, 4, 4))


def test_a_step_does_not_write_what_it_reads():
    shared = map_of(3)
    step = (0, [(shared, 1, [(-1, 0)])], torch.ones(3, 3), torch.ones(3), None, None, shared, None, 1, (0, 0))
    with pytest.raises(ValueError, match="raw must not share memory with a source's map"):
        native.PixelSteps([step], 2, 4, 4)


@pytest.mark.parametrize(("name", "value"), [("dilation", 2**62), ("dilation", 0), ("kh", 2**40), ("kh", -3)])
def test_numbers_that_no_image_has_are_refused(name, value):
    numbers = {"kh": 3, "kw": 3, "dilation": 1} | {name: value}
    output = channels_last(1, 4, 3, 3)
    with pytest.raises(ValueError, match=r"dilation must be in|the kernel's sides must be in"):
        native.masked_conv2d_packed(
            *(channels_last(1, 4, 3, 3), bytes_of(0), None, None, None, output, 4, [0]),
            *(numbers["kh"], numbers["kw"], numbers["dilation"], "none", False),
        )
