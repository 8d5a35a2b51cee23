"""CUDA kernels on emulated devices of several sizes: tiles fit, and calls work on the device of their tensors."""

import math

import pytest
import torch

from cpc_ext.ops import (
    AugmentationPlan,
    Transform,
    augment_patches,
    extract_patches,
    info_nce,
    logistic_mixture_nll,
    masked_conv2d,
    sample_logistic_mixture,
)
from cpc_ext.ops._patch_options import PatchOptions
from cpc_ext.ops.augment_patches import augment_patches_reference
from cpc_ext.ops.extract_patches import extract_patches_reference
from cpc_ext.ops.logistic_mixture import logistic_mixture_nll_reference

pytestmark = pytest.mark.parametrize("device", ["emulated"], indirect=True)

# The shared memory of a block and the number of multiprocessors: of compute capability 9.0, and of 8.6 in miniature.
LARGE, SMALL = (227 << 10, 132), (99 << 10, 2)
# The most shared memory of a block in KiB: for compute capability 8.6, 8.9 and 12.0; for 8.0; for 9.0 and 10.0.
LIMITS = [99, 163, 227]


def images(channels: int, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(side)
    return torch.randint(0, 256, (2, channels, side, side), dtype=torch.uint8, generator=generator)


def plan_of(*transforms: Transform) -> AugmentationPlan:
    """Return a plan for two patches that applies the transforms, each with the parameter 1.5."""
    codes = torch.tensor([int(transform) for transform in transforms], dtype=torch.uint8).expand(2, 1, 1, -1)
    return AugmentationPlan(codes, torch.full((*codes.shape, 3), 1.5))


def augment(pixels: torch.Tensor, plan: AugmentationPlan) -> torch.Tensor:
    return augment_patches(pixels, pixels.shape[2], 1, plan)


def right_augment(pixels: torch.Tensor, plan: AugmentationPlan) -> torch.Tensor:
    side = pixels.shape[2]
    return augment_patches_reference(pixels, PatchOptions(side, 1, side, side), plan)


def workspace_bytes(native, pixels: torch.Tensor) -> int:
    side = pixels.shape[2]
    codes, parameters = torch.zeros(2, 1, 1, 1, dtype=torch.uint8), torch.zeros(2, 1, 1, 1, 3)
    options = side, 1, side, side, None, None, False, False, False, [1.0] * 3, [0.0] * 3
    patches = torch.empty(2, 1, 1, 3, side, side)
    return native.augment_patches_workspace(pixels, patches, *options, codes, parameters, None, None, 0)


# --- Sizes that just fit, or just do not ---


@pytest.mark.parametrize("kib", LIMITS)
@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_patches_around_all_that_a_block_may_have(device, emulated_native, kib, channels):
    emulated_native.emulate_cuda(True, [(kib << 10, 2)])
    # A block has two buffers of bytes, and up to 8 KiB of static variables.
    first, last = (math.isqrt(size // (2 * channels)) for size in ((kib << 10) - (8 << 10), kib << 10))
    plan = plan_of(Transform.EQUALIZE, Transform.CONTRAST, Transform.AUTOCONTRAST)
    for side in range(first, last + 2, 1 + (last - first) // 4):
        pixels = images(channels, side)
        assert (augment(pixels, plan) - right_augment(pixels, plan)).abs().max() < 1e-6, side


@pytest.mark.parametrize("kib", LIMITS)
@pytest.mark.parametrize("patch_norm", [False, True])
def test_extracted_patches_around_all_that_a_block_may_have(device, emulated_native, kib, patch_norm):
    emulated_native.emulate_cuda(True, [(kib << 10, 2)])
    last = math.isqrt((kib << 10) // 12)  # Three channels of floats.
    for side in range(last - 6, last + 2):
        pixels = images(3, side)
        options = PatchOptions(side, 1, side, side, patch_norm=patch_norm, dtype=torch.float64)
        right = extract_patches_reference(pixels, options)
        assert (extract_patches(pixels, side, 1, patch_norm=patch_norm) - right).abs().max() < 4e-6, side


@pytest.mark.parametrize("kib", LIMITS)
@pytest.mark.parametrize("components", [9, 10, 12, 13])
def test_mixtures_around_what_a_block_has_without_asking(device, emulated_native, kib, components):
    emulated_native.emulate_cuda(True, [(kib << 10, 2)])
    generator = torch.Generator().manual_seed(0)
    params = torch.randn(2, 10 * components, 5, 30, generator=generator).to(memory_format=torch.channels_last)
    params.requires_grad_()
    pixels = torch.randint(0, 256, (2, 3, 5, 30), dtype=torch.uint8, generator=generator)
    nll = logistic_mixture_nll(pixels, params)
    (grad,) = torch.autograd.grad(nll.sum(), params)
    right = logistic_mixture_nll_reference(pixels, params.double())
    (right_grad,) = torch.autograd.grad(right.sum(), params)
    assert torch.allclose(nll.double(), right, rtol=1e-5)
    assert torch.allclose(grad, right_grad, rtol=1e-3, atol=1e-5)


# --- Two devices ---


@pytest.mark.parametrize(("others", "own"), [(LARGE, SMALL), (SMALL, LARGE)], ids=["small", "large"])
def test_the_workspace_is_what_the_tensors_device_needs(device, emulated_native, others, own):
    pixels = images(3, 150)  # 132 KiB a patch.
    emulated_native.emulate_cuda(True, [own])
    alone = workspace_bytes(emulated_native, pixels)
    assert (alone == 0) == (own == LARGE)
    emulated_native.emulate_cuda(True, [others, own], 1)
    assert workspace_bytes(emulated_native, pixels) == alone
    plan = plan_of(Transform.EQUALIZE, Transform.SHARPNESS)
    assert (augment(pixels, plan) - right_augment(pixels, plan)).abs().max() < 1e-6


def call_every_op() -> list[torch.Tensor]:
    """Return results and gradients of every op, with each kind of its kernels."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, **options):
        return torch.randn(shape, generator=generator, **options).requires_grad_()

    pixels = torch.randint(0, 256, (2, 3, 12, 12), dtype=torch.uint8, generator=generator)
    floats, queries, keys = random(2, 3, 12, 12), random(2, 5, 8), random(2, 7, 8)
    weight, bias, condition, params = random(8, 4, 3, 3), random(8), random(2, 8, 5, 5), random(2, 20, 12, 12)
    features = random(2, 4, 5, 5)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)
    negatives = torch.randint(7, (2, 5, 3), generator=generator)
    plan = AugmentationPlan(
        torch.full((2, 4, 4, 1), int(Transform.EQUALIZE), dtype=torch.uint8), torch.zeros(2, 4, 4, 1, 3)
    )
    plain = [
        augment_patches(pixels, 6, 2, plan),
        extract_patches(pixels, 6, 2),
        sample_logistic_mixture(params.detach(), noise=torch.rand(2, 5, 12, 12, generator=generator)),
    ]
    differentiable = [
        (extract_patches(floats, 6, 2, patch_norm=True), [floats]),
        (info_nce(queries, keys).loss, [queries, keys]),
        (info_nce(queries, keys, negatives=negatives).loss, [queries, keys]),
        (
            masked_conv2d(features, weight, bias, mask=mask, activation="gated", condition=condition),
            [features, weight, bias, condition],
        ),
        (logistic_mixture_nll(pixels, params), [params]),
    ]
    return plain + [
        tensor.detach()
        for result, inputs in differentiable
        for tensor in (result, *torch.autograd.grad(result.square().sum(), inputs))
    ]


def test_every_op_works_on_the_device_of_its_tensors(device, emulated_native):
    """The emulation rejects launches on another device's stream, or with more shared memory than the device has."""
    emulated_native.emulate_cuda(True, [SMALL])
    alone = call_every_op()
    emulated_native.emulate_cuda(True, [LARGE, SMALL], 1)
    emulated_native.emulated_set_device(0)
    there = call_every_op()
    assert emulated_native.emulated_device() == 0
    for one, other in zip(alone, there, strict=True):
        assert torch.equal(one, other)


def test_a_device_that_the_process_never_used_gets_no_context(device, emulated_native):
    emulated_native.emulate_cuda(True, [SMALL] * 3, 1)
    call_every_op()
    assert emulated_native.emulated_contexts() == [1]


def test_a_device_that_was_chosen_is_current_again(device, emulated_native):
    emulated_native.emulate_cuda(True, [SMALL] * 3, 1)
    emulated_native.emulated_set_device(2)
    extract_patches(images(3, 8), 4, 2)
    assert emulated_native.emulated_device() == 2
    assert emulated_native.emulated_contexts() == [1, 2]
