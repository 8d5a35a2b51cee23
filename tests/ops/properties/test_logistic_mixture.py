"""logistic_mixture_nll and sample_logistic_mixture on arguments that Hypothesis makes up; conftest.py tells how."""

import math
from dataclasses import dataclass

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from cpc_ext.ops import (
    logistic_mixture_nll,
    sample_logistic_mixture,
)
from cpc_ext.ops.logistic_mixture import logistic_mixture_nll_reference, sample_logistic_mixture_reference
from tests.ops.properties.conftest import *


@dataclass(frozen=True)
class Mixture:
    """Arguments of both, tensors as layouts."""

    images: Layout
    params: Layout
    dtype: torch.dtype
    scales: tuple[float, float, float]
    grad: Layout
    noise: Layout
    noise_dtype: torch.dtype
    temperature: float

    def make_params(self, n: int, generator: torch.Generator) -> Tensor:
        """Parameters of three sizes, so that log-scales lie above -6."""
        sizes = torch.tensor(self.scales, dtype=torch.float64)[torch.randint(3, (n,), generator=generator)]
        return normal(n, generator).clamp(-3, 3) * sizes


@st.composite
def mixtures(draw) -> Mixture:
    channels, components = draw(st.sampled_from([1, 3])), draw(st.integers(1, 6))
    batch = draw(st.sampled_from([1, 2, 3, 0]))
    size = draw(st.tuples(st.integers(1, 8), st.integers(1, 9)))
    count = components * (10 if channels == 3 else 3)
    return Mixture(
        images=draw(layouts((batch, channels, *size))),
        params=draw(layouts((batch, count, *size))),
        dtype=draw(st.sampled_from(FLOATING)),
        scales=draw(st.tuples(*3 * [st.sampled_from([0.1, 0.5, 1.0, 2.0])])),
        grad=draw(layouts((batch,))),
        noise=draw(layouts((batch, components + channels, *size))),
        noise_dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        temperature=draw(st.sampled_from([0, 1]) | st.floats(0, 2)),
    )


def values_with_edges(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(-128, 384, (n,), generator=generator).clamp(0, 255)


def test_mixture_likelihoods_and_their_gradients_are_the_references(device, for_examples):
    @for_examples(case=mixtures())
    def holds(case: Mixture):
        images, dense_images = case.images.place(device, torch.uint8, values_with_edges)
        params, dense = case.params.place(device, case.dtype, case.make_params)
        params, dense = params.detach().requires_grad_(), dense.double().requires_grad_()
        actual = logistic_mixture_nll(images, params)
        expected = logistic_mixture_nll_reference(dense_images, dense)
        compute = torch.float64 if case.dtype == torch.float64 else torch.float32
        assert actual.dtype == compute
        assert_within(actual, expected, TOLERANCE[compute] * 20 * (1 + expected.detach().abs()))

        grad, dense_grad = case.grad.place(device, compute, normal)
        (actual,) = torch.autograd.grad(actual, params, grad)
        (expected,) = torch.autograd.grad(expected, dense, dense_grad.double())
        assert actual.dtype == case.dtype
        # A value's distance from the mean is exact to float32, and multiplied by up to e^6 twice.
        sharpest = math.exp(3 * max(case.scales))
        bound = TOLERANCE[case.dtype] * (1 + expected.abs()) + TOLERANCE[compute] * (1 + sharpest) ** 2
        assert_within(actual, expected, bound * (1 + dense_grad.abs().max() if len(dense_grad) else 1))


def test_mixture_samples_are_the_references(device, for_examples):
    @for_examples(case=mixtures())
    def holds(case: Mixture):
        channels = case.images.shape[1]
        params, dense = case.params.place(device, case.dtype, case.make_params)
        noise, dense_noise = case.noise.place(
            device, case.noise_dtype, lambda n, generator: torch.rand(n, generator=generator)
        )
        actual = sample_logistic_mixture(params, channels=channels, noise=noise, temperature=case.temperature)
        expected = sample_logistic_mixture_reference(dense, dense_noise, channels, case.temperature)
        assert torch.equal(actual.cpu(), expected)


WRONG_MIXTURE_ARGUMENTS = {
    "images": st.none()
    | NOT_TENSORS
    | other_layouts((2, 3, 4, 5), torch.uint8)
    # Without a device of their own: what params are measured by.
    | tensors((2, 3, 4, 5), torch.uint8, [torch.float32, torch.int64, torch.bool], leads=True),
    "params": st.none()
    | NOT_TENSORS
    | other_layouts((2, 10, 4, 5), torch.float32)
    | tensors((2, 10, 4, 5), torch.float32, [*NOT_FLOATING, torch.float8_e4m3fn]),
}


def test_wrong_arguments_of_logistic_mixture_nll(device, for_examples):
    @for_examples(wrong=some_wrong(WRONG_MIXTURE_ARGUMENTS))
    def holds(wrong):
        arguments = {"images": torch.zeros(2, 3, 4, 5, dtype=torch.uint8), "params": torch.zeros(2, 10, 4, 5)} | wrong
        # Images and params that are both of another size may fit each other.
        shapes = [tuple(value.shape) if isinstance(value, Tensor) else None for value in arguments.values()]
        assume(len(wrong) == 1 or None in shapes or shapes[0][:1] + shapes[0][2:] != shapes[1][:1] + shapes[1][2:])
        with refused("params", *wrong):  # Which the others are measured by.
            logistic_mixture_nll(**{name: on(device, value) for name, value in arguments.items()})


WRONG_SAMPLING_ARGUMENTS = {
    "params": WRONG_MIXTURE_ARGUMENTS["params"].filter(lambda value: not isinstance(value, Tensor) or value.ndim != 4),
    "channels": st.none() | NOT_NUMBERS | st.sampled_from([True, 0, 1, 2, 4, -3, 3.0, ENORMOUS]),
    "noise": NOT_TENSORS
    | other_layouts((2, 4, 4, 5), torch.float32)
    | tensors((2, 4, 4, 5), torch.float32, [*NOT_FLOATING, torch.float16, torch.bfloat16]),
    "temperature": st.none() | NOT_NUMBERS | st.sampled_from([True, -1, -1e-9, math.inf, math.nan, ENORMOUS]),
}


def test_wrong_arguments_of_sample_logistic_mixture(device, for_examples):
    @for_examples(wrong=some_wrong(WRONG_SAMPLING_ARGUMENTS))
    def holds(wrong):
        arguments = {"params": torch.zeros(2, 10, 4, 5), "noise": torch.zeros(2, 4, 4, 5)} | wrong
        with refused("params", *wrong):  # Which the others are measured by.
            sample_logistic_mixture(**{name: on(device, value) for name, value in arguments.items()})
