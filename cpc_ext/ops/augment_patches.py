"""Overlapping patches of a batch of images, each patch with transforms of its own: CPC v2's augmentation.

uint8 images [B, C, H, W] and a plan of the transforms of each patch give normalised patches [B, rows, cols, C', p, p].
A patch is cut, transformed as bytes and normalised while it lies in the cache or in shared memory, so that only the
finished patches are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.ops._checks import check_dense, check_integer, dtype_name
from cpc_ext.ops._library import register, with_workspace
from cpc_ext.ops._patch_options import PatchOptions, check_images, checked_options
from cpc_ext.ops._patch_transforms import NODES, Patches, Transform, transform_patches
from cpc_ext.ops.extract_patches import crop_and_flip, empty_patches, extract_patches_reference

__all__ = ["PARAMETERS", "AugmentationPlan", "augment_patches", "augment_patches_reference"]

# Parameters of a transform; those that take fewer use the first ones.
PARAMETERS = 3
# The side of a patch up to which the transforms' arithmetic in 32 bits holds.
MAX_PATCH_SIZE = 1024


class AugmentationPlan(NamedTuple):
    """The transforms of every patch: a sequence of T, most of which may be ``Transform.NONE``.

    codes: [B, rows, cols, T] uint8, ``Transform`` codes in the order in which they are applied.
    parameters: [B, rows, cols, T, 3] float32, each transform's as ``Transform`` lists them, clamped to its range.
    partners: [B, rows, cols] int64, the patch that sample pairing mixes in, as its index among the batch's
        B * rows * cols; None where no patch is paired.
    displacements: [B, rows, cols, 2, 4, 4] float32, y and x in pixels at a grid of nodes from edge to edge of the
        patch: pixel (y, x) of an elastic deformation comes from (y, x) + displacement. None where no patch is deformed.
    fill: value (0..255), in all channels, of pixels that a transform takes from outside of the patch.
    """

    codes: Tensor
    parameters: Tensor
    partners: Tensor | None = None
    displacements: Tensor | None = None
    fill: int = 128

    @classmethod
    def empty(cls, batch: int, rows: int, cols: int, *, device: torch.device | None = None) -> AugmentationPlan:
        """Return a plan without transforms."""
        codes = torch.zeros(batch, rows, cols, 0, dtype=torch.uint8, device=device)
        return cls(codes, torch.zeros(batch, rows, cols, 0, PARAMETERS, dtype=torch.float32, device=device))

    def to(self, device: torch.device | str) -> AugmentationPlan:
        """Copy the plan to a device; copies from page-locked memory are asynchronous."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> AugmentationPlan:
        """Copy the plan to page-locked memory."""
        return self._each(Tensor.pin_memory)

    def narrow(self, start: int, length: int) -> AugmentationPlan:
        """Return the plan of images [start, start + length); partners in other images are replaced by ones in these."""
        part = self._each(lambda tensor: tensor[start : start + length])
        if part.partners is None or part.partners.numel() == 0:
            return part
        first = start * part.partners[0].numel()
        return part._replace(partners=(part.partners - first) % part.partners.numel())

    def _each(self, function: Callable[[Tensor], Tensor]) -> AugmentationPlan:
        return AugmentationPlan(
            function(self.codes),
            function(self.parameters),
            None if self.partners is None else function(self.partners),
            None if self.displacements is None else function(self.displacements),
            self.fill,
        )


def augment_patches(
    images: Tensor,
    patch_size: int,
    stride: int,
    plan: AugmentationPlan,
    *,
    crop: tuple[int, int] | None = None,
    offsets: Tensor | None = None,
    flip: Tensor | None = None,
    gray: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    patch_norm: bool = False,
    dtype: torch.dtype | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Cut images into a grid of overlapping patches and apply a plan of transforms to each patch.

    The steps, in this order: crop and flip of whole images, cutting, each patch's transforms one after another on
    uint8 pixels, then what ``extract_patches`` does to pixels. Without transforms the result is that of
    ``extract_patches``. The bytes after the transforms are the same on every device; Pillow's differ from them by one
    level at most after a transform (``Transform`` lists them).

    Elastic deformation interpolates the displacements of the plan's nodes bilinearly, and then pixels bilinearly,
    repeating those at the edge. The tone curve maps a channel's values x to x + s * x * (1 - x). Images of one channel
    are left unchanged by colour, hue and grey; a tone curve takes its first parameter for them. Sample pairing mixes in
    the partner as it was cut, before its own transforms.

    Args:
        images: [B, C, H, W] uint8, C is 1 or 3, with any strides.
        patch_size: side p of a patch in pixels, at most 1024.
        stride: distance of neighbouring patches in pixels.
        plan: the transforms of each patch, on the images' device.
        crop, offsets, flip, gray, mean, std, patch_norm, dtype, channels_last: as of ``extract_patches``.

    Returns:
        Patches [B, rows, cols, C', p, p] with rows = (h - p) // stride + 1, cols likewise, C' = 1 if ``gray`` else C.
        Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range. On the CPU, also codes that stand for no
            transform, partners that are not the index of a patch, and transforms whose partners or displacements the
            plan lacks. On other devices, where reading the values would stall the stream, such transforms are skipped,
            and partners are clamped.
    """
    check_images(images, (torch.uint8,))
    options = checked_options(
        images, patch_size, stride, crop, offsets, flip, gray, mean, std, patch_norm, dtype, channels_last
    )
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got {images.shape[1]}")
    if patch_size > MAX_PATCH_SIZE:
        raise ValueError(f"patch_size must be at most {MAX_PATCH_SIZE}, got {patch_size}")
    _check_plan(plan, (images.shape[0], *options.grid()), images.device)
    return _augment_patches(images, *options, *plan)


def _check_plan(plan: AugmentationPlan, grid: tuple[int, int, int], device: torch.device) -> None:
    if not isinstance(plan, AugmentationPlan):
        raise TypeError(f"plan must be an AugmentationPlan, got {type(plan).__name__}")
    check_dense("plan.codes", plan.codes)
    if plan.codes.ndim != 4 or tuple(plan.codes.shape[:3]) != grid:
        raise ValueError(f"plan.codes must be {[*grid, 'T']} for these patches, got shape {tuple(plan.codes.shape)}")
    for name, value, shape, dtype in (
        ("codes", plan.codes, plan.codes.shape, torch.uint8),
        ("parameters", plan.parameters, (*plan.codes.shape, PARAMETERS), torch.float32),
        ("partners", plan.partners, grid, torch.int64),
        ("displacements", plan.displacements, (*grid, 2, NODES, NODES), torch.float32),
    ):
        if value is None and name in ("partners", "displacements"):
            continue
        tensor = check_dense(f"plan.{name}", value)
        if tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"plan.{name} must be {list(shape)}, got shape {tuple(tensor.shape)}")
        if tensor.dtype != dtype:
            raise TypeError(f"plan.{name} must be {dtype_name(dtype)}, got {dtype_name(tensor.dtype)}")
        if tensor.device != device:
            raise ValueError(f"plan.{name} must be on {device} like the images, got {tensor.device}")
    check_integer("plan.fill", plan.fill)
    if not 0 <= plan.fill <= 255:
        raise ValueError(f"plan.fill must be in [0, 255], got {plan.fill}")


def augment_patches_reference(images: Tensor, options: PatchOptions, plan: AugmentationPlan) -> Tensor:
    """The op in plain PyTorch: the tests' reference, and the implementation for devices without a kernel."""
    size, stride = options.patch_size, options.stride
    windows = crop_and_flip(images, options)
    cut = windows.unfold(2, size, stride).unfold(3, size, stride).permute(0, 2, 3, 1, 4, 5)
    grid, cut = cut.shape[:3], cut.flatten(0, 2)
    plan = plan._each(lambda tensor: tensor.flatten(0, 2))
    if images.device.type == "mps":  # MPS has no float64.
        pixels = _transformed(cut.cpu(), plan.to("cpu")).to(images.device)
    else:
        pixels = _transformed(cut, plan)
    of_pixels = options._replace(stride=size, height=size, width=size, offsets=None, flip=None)
    return torch.unflatten(extract_patches_reference(pixels, of_pixels)[:, 0, 0], 0, grid)


def _transformed(cut: Tensor, plan: AugmentationPlan) -> Tensor:
    """Apply a plan, whose tensors have N in place of [B, rows, cols], to uint8 patches [N, C, p, p]."""
    pixels = cut.long()
    for codes, parameters in zip(plan.codes.unbind(1), plan.parameters.unbind(1), strict=True):
        for transform in Transform:
            chosen = (codes == transform).nonzero().flatten()
            if transform == Transform.NONE or len(chosen) == 0:
                continue
            partners = None if plan.partners is None else cut[plan.partners[chosen].clamp(0, len(cut) - 1)].long()
            displacements = None if plan.displacements is None else plan.displacements[chosen].double()
            patches = Patches(pixels[chosen], parameters[chosen].double(), displacements, partners, plan.fill)
            pixels[chosen] = transform_patches(transform, patches)
    return pixels.to(torch.uint8)


class _Augmentation(NamedTuple):
    """The op's arguments."""

    images: Tensor
    options: PatchOptions
    plan: AugmentationPlan


def _kernel(augmentation: _Augmentation) -> Tensor:
    images, options, plan = augmentation
    patches = empty_patches(images, options)
    for_kernels = options.for_kernels(images.dtype, patches.shape[3])
    problem = images, patches, *for_kernels, *plan._each(Tensor.contiguous)
    with_workspace(native.augment_patches, images, *problem)
    return patches


_augment_patches = register(
    "augment_patches",
    _Augmentation,
    Tensor,
    reference=lambda augmentation: augment_patches_reference(*augmentation),
    kernel=_kernel,
    fake=lambda augmentation: empty_patches(augmentation.images, augmentation.options),
)
