"""The discretized mixture of logistics of PixelCNN++ (Salimans et al. 2017, arXiv 1701.05517): likelihood and samples.

Images [B, C, H, W] of values 0..255 and mixture parameters [B, P, H, W] give nats per image [B]; parameters and noise
give images. Each pass reads the parameters once; the forward pass keeps only two numbers per pixel, from which the
backward pass computes the components again.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.ops._checks import DTYPES, check_dense, check_integer, dtype_name
from cpc_ext.ops._library import (
    drawn_by,
    may_need_gradients,
    refuse_forward_mode,
    register,
    values_at_hand,
    with_workspace,
)

__all__ = [
    "logistic_mixture_nll",
    "logistic_mixture_nll_reference",
    "sample_logistic_mixture",
    "sample_logistic_mixture_reference",
]

# Half the distance of two neighbouring values, on the scale of -1..1.
HALF_BIN = 1 / 255
# Lower bound to which log-scales are clamped.
LEAST_LOG_SCALE = -7.0
# The mass of bins with less than this is approximated by the density at their centre times their width.
LEAST_MASS = 1e-5
# Uniform noise is kept this far from 0 and 1.
LEAST_NOISE = 1e-5

# Parameters of a component, by channels: a logit and, per colour, a mean, a log-scale and, of three, a coefficient.
_PARAMS_OF_COMPONENT = {1: 3, 3: 10}


def logistic_mixture_nll(images: Tensor, params: Tensor) -> Tensor:
    """Compute the negative log-likelihood of images under a discretized mixture of logistics at every pixel.

    A value v stands for v / 127.5 - 1 and has the mass of the bin of 1/255 to either side; the bins of 0 and 255 extend
    to infinity. Where a bin's mass is not above 1e-5, the density at its centre times 1/127.5 replaces it. Log-scales
    below -7 count as -7 and get no gradient. With three channels, the mean of green is shifted by tanh(coefficient 0)
    times red, that of blue by tanh(coefficient 1) times red and tanh(coefficient 2) times green. Arithmetic is in
    float32, or in float64 for float64 params; finite params below 1e30 in size give finite results. Rounding decides
    about a mass very near 1e-5; the two formulas may then differ by up to 2.2 nats.

    Args:
        images: [B, C, H, W] uint8, C = 1 or 3, with any strides.
        params: [B, P, H, W] floating, with any strides; dense ones, channels last or first, are read fastest. P is 10 K
            for three channels and K components: K logits, then for each colour K means, K log-scales and K
            coefficients. It is 3 K for one channel: K logits, K means and K log-scales.

    Returns:
        Nats per image, [B], float32, or float64 for float64 params. Differentiable once, in reverse mode, in
        params; the gradient has the memory layout of dense params.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or device.
        NotImplementedError, RuntimeError: forward-mode derivatives, second derivatives.
    """
    check_dense("images", images)
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {dtype_name(images.dtype)}")
    if images.ndim != 4 or images.shape[1] not in _PARAMS_OF_COMPONENT:
        raise ValueError(f"images must be [B, 1, H, W] or [B, 3, H, W], got shape {tuple(images.shape)}")
    batch, channels, height, width = images.shape
    _check_params(params, channels)
    if params.shape != (batch, params.shape[1], height, width):
        raise ValueError(
            f"params must be [{batch}, P, {height}, {width}] for images {tuple(images.shape)}, "
            f"got shape {tuple(params.shape)}"
        )
    if params.device != images.device:
        raise ValueError(f"params must be on {images.device} like the images, got {params.device}")
    refuse_forward_mode(params)
    return _logistic_mixture_nll(images, params, may_need_gradients(params))[0]


def sample_logistic_mixture(
    params: Tensor,
    generator: torch.Generator | None = None,
    *,
    channels: int = 3,
    noise: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Draw images from a mixture of logistics at every pixel.

    A component is chosen by the largest of logit + temperature * Gumbel noise. Then colour by colour: mean, shifted by
    the coefficients times the earlier colours' values, + temperature * scale * logistic noise, clamped to -1..1 and
    rounded to the nearest of the 256 values. Later colours see the rounded values, so that at temperature 1 the samples
    follow :func:`logistic_mixture_nll`. Arithmetic is in float64: the same noise gives the same sample on every device
    and for every layout of the same params.

    Args:
        params: [B, P, H, W] as of :func:`logistic_mixture_nll`, finite. uint8 has no NaN: a pixel whose params are not
            finite gets meaningless values, mostly 0. The CPU gives a RuntimeWarning then, unless compiled; elsewhere,
            reading the values would stall the stream. To sample such values from a model is an error.
        generator: generator of the noise, on the params' device. Default: PyTorch's own.
        channels: C, 1 or 3.
        noise: [B, K + C, H, W] float32 or float64, values u uniform in 0..1 and clamped to 1e-5..1 - 1e-5: for each of
            the K components that of its Gumbel noise -log(-log(u)), then for each colour that of its logistic noise
            log(u / (1 - u)). Default: drawn.
        temperature: multiplies both kinds of noise; at 0 the sample consists of the likeliest component's means.

    Returns:
        [B, C, H, W] uint8, dense.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, range or device.
    """
    check_integer("channels", channels)
    if channels not in _PARAMS_OF_COMPONENT:
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    _check_params(params, channels)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    # A finite integer may be larger than a float can hold.
    if not 0 <= temperature <= sys.float_info.max:
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    looks = values_at_hand(params)
    # A sum is cheaper to check first; as that of finite numbers may overflow, it is not enough.
    if looks and not math.isfinite(params.detach().sum().item()) and not bool(params.isfinite().all()):
        warnings.warn("params are not finite at some pixels, whose samples mean nothing", RuntimeWarning, stacklevel=2)
    batch, _, height, width = params.shape
    shape = (batch, _components(params, channels) + channels, height, width)
    if noise is None:
        noise = torch.rand(shape, **drawn_by(generator), dtype=torch.float32, device=params.device)
    elif generator is not None:
        raise ValueError("give either a generator or noise, not both")
    else:
        check_dense("noise", noise)
        if noise.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"noise must be float32 or float64, got {dtype_name(noise.dtype)}")
        if tuple(noise.shape) != shape:
            raise ValueError(f"noise must be {list(shape)} for these params, got shape {tuple(noise.shape)}")
        if noise.device != params.device:
            raise ValueError(f"noise must be on {params.device} like the params, got {noise.device}")
    return _sample_logistic_mixture(params.detach(), noise.detach(), channels, float(temperature))


def _check_params(params: Tensor, channels: int) -> None:
    check_dense("params", params)
    if params.dtype not in DTYPES:
        raise TypeError(f"params must be one of {', '.join(map(dtype_name, DTYPES))}, got {dtype_name(params.dtype)}")
    if params.ndim != 4:
        raise ValueError(f"params must be [B, P, H, W], got shape {tuple(params.shape)}")
    of_component = _PARAMS_OF_COMPONENT[channels]
    if params.shape[1] == 0 or params.shape[1] % of_component:
        raise ValueError(
            f"params must be [B, {of_component} K, H, W] for K components and {channels} channel{'s'[: channels - 1]}, "
            f"got shape {tuple(params.shape)}"
        )


def _components(params: Tensor, channels: int) -> int:
    return params.shape[1] // _PARAMS_OF_COMPONENT[channels]


def _compute_dtype(params: Tensor) -> torch.dtype:
    return torch.float64 if params.dtype == torch.float64 else torch.float32


def _split(params: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return logits [B, K, H, W]; means, log-scales and, for C = 3, tanh of the coefficients, [B, C, K, H, W]."""
    components = _components(params, channels)
    logits, rest = params[:, :components], params[:, components:]
    means, log_scales, *coefficients = torch.unflatten(rest, 1, (channels, -1, components)).unbind(2)
    # Not clamp(), whose derivative at the bound itself was 1 up to PyTorch 2.13 and is 0 since.
    log_scales = torch.where(log_scales < LEAST_LOG_SCALE, LEAST_LOG_SCALE, log_scales)
    return logits, means, log_scales, coefficients[0].tanh() if coefficients else None


# --- In plain PyTorch ---


def logistic_mixture_nll_reference(images: Tensor, params: Tensor) -> Tensor:
    """The likelihood in plain PyTorch: the tests' reference, and the implementation for float64 or without a kernel."""
    params = params.to(_compute_dtype(params))
    logits, means, log_scales, coefficients = _split(params, images.shape[1])
    # Added to a large logit, small log-masses would be lost to rounding.
    logits = logits - logits.detach().amax(1, keepdim=True)
    levels = images.unsqueeze(2)
    x = levels.to(params.dtype) / 127.5 - 1
    if coefficients is not None:
        red, green = x[:, 0], x[:, 1]
        shifts = (torch.zeros_like(means[:, 0]), coefficients[:, 0] * red)
        means = means + torch.stack([*shifts, coefficients[:, 1] * red + coefficients[:, 2] * green], 1)
    inverse_scales = torch.exp(-log_scales)
    centre, half = inverse_scales * (x - means), inverse_scales * HALF_BIN
    # The difference of two sigmoids is computed as a product, as both may be close to one.
    sides = F.logsigmoid(centre + half) + F.logsigmoid(half - centre)
    is_bin = sides + torch.log(-torch.expm1(-2 * half)) > math.log(LEAST_MASS)
    # The logarithm has no finite slope at zero, to which the mass of a narrow bin may be rounded.
    log_mass = sides + torch.log(-torch.expm1(-2 * torch.where(is_bin, half, 1.0)))
    log_density = F.logsigmoid(centre) + F.logsigmoid(-centre) - log_scales - math.log(127.5)
    log_mass = torch.where(is_bin, log_mass, log_density)
    log_mass = torch.where(levels == 0, F.logsigmoid(centre + half), log_mass)
    log_mass = torch.where(levels == 255, F.logsigmoid(half - centre), log_mass)
    joint = logits + log_mass.sum(1)
    return (logits.logsumexp(1) - joint.logsumexp(1)).sum((1, 2))


def sample_logistic_mixture_reference(params: Tensor, noise: Tensor, channels: int, temperature: float) -> Tensor:
    """Sampling in plain PyTorch: the tests' reference, and the implementation for devices without a kernel."""
    # MPS has no float64; its samples may differ where a value lies halfway between two levels.
    compute = torch.float32 if params.device.type == "mps" else torch.float64
    logits, means, log_scales, coefficients = _split(params.to(compute), channels)
    noise = noise.to(compute).clamp(LEAST_NOISE, 1 - LEAST_NOISE)
    components = logits.shape[1]
    gumbel = -torch.log(-torch.log(noise[:, :components]))
    chosen = (logits + temperature * gumbel).argmax(1, keepdim=True)

    def of_chosen(values: Tensor) -> Tensor:
        return values.gather(1, chosen).squeeze(1)

    colors: list[Tensor] = []
    for c in range(channels):
        u = noise[:, components + c]
        x = of_chosen(means[:, c]) + temperature * of_chosen(log_scales[:, c]).exp() * torch.log(u / (1 - u))
        if coefficients is not None:
            first = c * (c - 1) // 2  # Green has coefficient 0, blue 1 and 2.
            for earlier in range(c):
                x = x + of_chosen(coefficients[:, first + earlier]) * (colors[earlier] / 127.5 - 1)
        colors.append(torch.round((x.clamp(-1, 1) + 1) * 127.5))
    return torch.stack(colors, 1).to(torch.uint8)


# --- The ops ---


class _Likelihood(NamedTuple):
    """The op's arguments."""

    images: Tensor
    params: Tensor
    keep: bool  # Whether to return the normalisers, for the gradient.


class _Nats(NamedTuple):
    """Nats per image, [B], and [B, 2, H, W]: each pixel's largest term, and the sum of all relative to it."""

    nll: Tensor
    normalisers: Tensor  # Empty where they are not kept.


class _Gradient(NamedTuple):
    """Arguments of the gradient in params."""

    grad: Tensor
    images: Tensor
    params: Tensor
    normalisers: Tensor


class _Sampling(NamedTuple):
    """Arguments of the op that samples."""

    params: Tensor
    noise: Tensor
    channels: int
    temperature: float


def _empty_nll(op: _Likelihood) -> _Nats:
    batch, _, height, width = op.params.shape
    nll = op.params.new_empty(batch, dtype=_compute_dtype(op.params))
    return _Nats(nll, nll.new_empty((batch, 2, height, width) if op.keep else 0))


def _nll_reference(op: _Likelihood) -> _Nats:
    # The gradient of the reference does not need the normalisers.
    return _Nats(logistic_mixture_nll_reference(op.images, op.params), _empty_nll(op).normalisers.zero_())


def _kernel(op: _Likelihood) -> _Nats:
    images, params, keep = op
    if params.dtype == torch.float64:
        return _nll_reference(op)
    nll, normalisers = _empty_nll(op)
    problem = images, params, nll, normalisers if keep else None
    with_workspace(native.logistic_mixture_nll, nll, *problem)
    return _Nats(nll, normalisers)


def _empty_gradient(op: _Gradient) -> Tensor:
    return torch.empty_like(op.params, memory_format=_memory_format(op.params))


def _memory_format(params: Tensor) -> torch.memory_format:
    channels_last = params.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _backward_reference(op: _Gradient) -> Tensor:
    with torch.enable_grad():
        leaf = op.params.detach().requires_grad_()
        nll = logistic_mixture_nll_reference(op.images, leaf)
    (gradient,) = torch.autograd.grad(nll, leaf, op.grad)
    return gradient.contiguous(memory_format=_memory_format(op.params))


def _backward_kernel(op: _Gradient) -> Tensor:
    grad, *rest = op
    if op.params.dtype == torch.float64:
        return _backward_reference(op)
    gradient = _empty_gradient(op)
    native.logistic_mixture_nll_backward(*rest, grad.contiguous(), gradient)
    return gradient


def _setup_context(ctx: Any, op: _Likelihood, output: _Nats) -> None:
    _, normalisers = output
    ctx.save_for_backward(op.images, op.params, normalisers)
    ctx.mark_non_differentiable(normalisers)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, saved: Sequence[Tensor], grad: Tensor | None, _: None) -> dict[str, Tensor | None]:
    return {} if grad is None else {"params": _logistic_mixture_nll_backward(grad, *saved)}


_logistic_mixture_nll = register(
    "logistic_mixture_nll",
    _Likelihood,
    _Nats,
    reference=_nll_reference,
    kernel=_kernel,
    fake=_empty_nll,
    setup_context=_setup_context,
    backward=_backward,
    once=True,
)
_logistic_mixture_nll_backward = register(
    "logistic_mixture_nll_backward",
    _Gradient,
    Tensor,
    reference=_backward_reference,
    kernel=_backward_kernel,
    fake=_empty_gradient,
)


def _empty_samples(op: _Sampling) -> Tensor:
    batch, _, height, width = op.params.shape
    return op.params.new_empty((batch, op.channels, height, width), dtype=torch.uint8)


def _sample_kernel(op: _Sampling) -> Tensor:
    images = _empty_samples(op)
    native.sample_logistic_mixture(op.params, op.noise, images, op.temperature)
    return images


_sample_logistic_mixture = register(
    "sample_logistic_mixture",
    _Sampling,
    Tensor,
    reference=lambda op: sample_logistic_mixture_reference(*op),
    kernel=_sample_kernel,
    fake=_empty_samples,
)
