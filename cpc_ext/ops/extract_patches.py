"""Overlapping patches of a batch of images: crop, flip, grey, normalise, cut and cast in one pass.

Images [B, C, H, W] (uint8 or floating, any strides) give patches [B, rows, cols, C', p, p]. Every pixel is read and
transformed once, then written directly to each patch that contains it, so no step leaves an intermediate in memory. The
backward pass sums the overlapping patch gradients of every pixel in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.ops._library import register, with_workspace
from cpc_ext.ops._patch_options import PatchOptions, check_images, checked_options

__all__ = ["extract_patches", "extract_patches_reference"]

# ITU-R BT.601 luma, as Pillow's convert("L") uses it.
LUMA = (0.299, 0.587, 0.114)
# Added to a patch's standard deviation, so that flat patches stay flat instead of becoming amplified noise.
CONTRAST_FLOOR = 0.1


def extract_patches(
    images: Tensor,
    patch_size: int,
    stride: int,
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
    """Cut images into a grid of overlapping square patches, transforming the pixels on the way.

    The steps, in this order: crop, horizontal flip, scaling of uint8 by 1/255, grey, ``(x - mean) / std``, cutting,
    normalising of each patch, cast. Arithmetic is in float32, in float64 where images or patches are float64.

    Args:
        images: [B, C, H, W], uint8 (0..255) or floating, with any strides.
        patch_size: side p of a patch in pixels.
        stride: distance of neighbouring patches in pixels; patches overlap where it is less than ``patch_size``.
        crop: (h, w), the window of every image that is cut into patches. Default: the whole image.
        offsets: [B, 2] integers, the (y, x) of each image's window. Default: the centre.
        flip: [B] bool, which windows are mirrored left to right. Default: none.
        gray: RGB to one channel by ITU-R BT.601 luma; images of one channel stay as they are.
        mean: one value per output channel, subtracted after scaling and grey. Default: zeros.
        std: one positive value per output channel, divisor after subtracting the mean. Default: ones.
        patch_norm: bring every patch, over its channels and pixels together, to zero mean and unit contrast:
            ``(x - mu) / (sigma + 0.1)`` with the population sigma.
        dtype: floating type of the patches. Default: that of floating images, ``torch.get_default_dtype()`` for uint8.
        channels_last: lay each patch out as (p, p, C') in memory; the shape stays the same.

    Returns:
        Patches [B, rows, cols, C', p, p] with rows = (h - p) // stride + 1, cols likewise, C' = 1 if ``gray`` else C.
        Differentiable in floating images, in reverse mode, any number of times.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range. Offsets that leave the image are an error
            on the CPU; elsewhere, where reading them would stall the stream, they are clamped to the image.
        NotImplementedError: forward-mode derivatives.
    """
    check_images(images)
    options = checked_options(
        images, patch_size, stride, crop, offsets, flip, gray, mean, std, patch_norm, dtype, channels_last
    )
    return _extract_patches(images, *options, whole=_Extraction(images, options))


def extract_patches_reference(images: Tensor, options: PatchOptions) -> Tensor:
    """The op in plain PyTorch: the tests' reference, and the implementation for devices without a kernel."""
    compute = torch.float64 if torch.float64 in (images.dtype, options.dtype) else torch.float32
    x = crop_and_flip(images, options).to(compute)
    if images.dtype == torch.uint8:
        x = x / 255
    if options.gray and images.shape[1] == 3:
        x = torch.einsum("bchw,c->bhw", x, x.new_tensor(LUMA)).unsqueeze(1)
    if options.mean is not None:
        x = x - x.new_tensor(options.mean).view(1, -1, 1, 1)
    if options.std is not None:
        x = x / x.new_tensor(options.std).view(1, -1, 1, 1)
    size, stride = options.patch_size, options.stride
    patches = x.unfold(2, size, stride).unfold(3, size, stride).permute(0, 2, 3, 1, 4, 5)
    if options.patch_norm:
        centred = patches - patches.mean((3, 4, 5), keepdim=True)
        variance = centred.square().mean((3, 4, 5), keepdim=True)
        # The square root has no finite slope at zero: a flat patch gets no gradient through its contrast.
        flat = variance == 0
        contrast = torch.where(flat, 0.0, torch.where(flat, 1.0, variance).sqrt())
        patches = centred / (contrast + CONTRAST_FLOOR)
    patches = patches.to(options.dtype)
    return _channels_last(patches) if options.channels_last else patches.contiguous()


def _channels_last(patches: Tensor) -> Tensor:
    """Return patches in the layout with the channels of each patch innermost in memory."""
    return patches.permute(0, 1, 2, 4, 5, 3).contiguous().permute(0, 1, 2, 5, 3, 4)


def crop_and_flip(images: Tensor, options: PatchOptions) -> Tensor:
    """Return the images' windows, [B, C, height, width], flipped where requested."""
    height, width, offsets, flip = options.height, options.width, options.offsets, options.flip
    limit_y, limit_x = images.shape[2] - height, images.shape[3] - width
    if offsets is None and flip is None:
        y, x = limit_y // 2, limit_x // 2
        return images[:, :, y : y + height, x : x + width]
    if offsets is None:
        offsets = images.new_tensor([[limit_y // 2, limit_x // 2]], dtype=torch.int64).expand(images.shape[0], 2)
    offsets = torch.minimum(offsets.clamp(min=0), offsets.new_tensor([limit_y, limit_x]))
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(images.shape[0], width)
    if flip is not None:
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
    columns = offsets[:, 1:] + columns
    batch = torch.arange(images.shape[0], device=images.device)
    # Advanced indices on both sides of a slice put the channels last.
    return images[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def empty_patches(images: Tensor, options: PatchOptions) -> Tensor:
    """Allocate the result of the op."""
    size, (rows, cols) = options.patch_size, options.grid()
    channels = 1 if options.gray else images.shape[1]
    shape = (images.shape[0], rows, cols, channels, size, size)
    if not options.channels_last:
        return images.new_empty(shape, dtype=options.dtype)
    patch = channels * size * size
    strides = (rows * cols * patch, cols * patch, patch, 1, size * channels, channels)
    return images.new_empty_strided(shape, strides, dtype=options.dtype)


class _Extraction(NamedTuple):
    """The op's arguments."""

    images: Tensor
    options: PatchOptions


class _Gradient(NamedTuple):
    """Arguments of the gradient in the images."""

    grad: Tensor
    images: Tensor | None  # Only for patch_norm, the one step that is not linear.
    size: list[int]
    images_dtype: torch.dtype
    options: PatchOptions


def _kernel(extraction: _Extraction) -> Tensor:
    images, options = extraction
    patches = empty_patches(images, options)
    native.extract_patches(images, patches, *options.for_kernels(images.dtype, patches.shape[3]))
    return patches


def _backward_reference(gradient: _Gradient) -> Tensor:
    """Return the gradient; it is differentiable if gradients are enabled, also by transforms of ``torch.func``."""
    grad, images, options = gradient.grad, gradient.images, gradient.options
    pixels = grad.new_zeros(gradient.size, dtype=gradient.images_dtype) if images is None else images
    if torch.is_grad_enabled():
        pull = torch.func.vjp(lambda pixels: extract_patches_reference(pixels, options), pixels)[1]
        of_images: Tensor = pull(grad)[0]
        return of_images.contiguous()
    with torch.enable_grad():
        pixels = pixels.detach().requires_grad_()
        patches = extract_patches_reference(pixels, options)
    return torch.autograd.grad(patches, pixels, grad)[0].contiguous()


def _empty_images_grad(gradient: _Gradient) -> Tensor:
    return gradient.grad.new_empty(gradient.size, dtype=gradient.images_dtype)


def _backward_kernel(gradient: _Gradient) -> Tensor:
    grad, options = gradient.grad, gradient.options
    grad = _channels_last(grad) if options.channels_last else grad.contiguous()
    images_grad = _empty_images_grad(gradient)
    for_kernels = options.for_kernels(gradient.images_dtype, grad.shape[3])
    problem = images_grad, grad, gradient.images, *for_kernels
    with_workspace(native.extract_patches_backward, grad, *problem)
    return images_grad


def _setup_context(ctx: Any, extraction: _Extraction, result: Tensor) -> None:
    images, options = extraction
    ctx.save_for_backward(images if options.patch_norm else None, options.offsets, options.flip)
    ctx.size, ctx.images_dtype = images.shape, images.dtype
    # Tensors must be saved by save_for_backward alone.
    placed = options.offsets is not None or options.flip is not None
    ctx.options = options._replace(offsets=None, flip=None) if placed else options


def _backward(ctx: Any, saved: Sequence[Tensor | None], grad: Tensor) -> dict[str, Tensor | None]:
    if not ctx.needs_input_grad[0]:
        return {}
    images, offsets, flip = saved
    options: PatchOptions = ctx.options
    if offsets is not None or flip is not None:
        options = options._replace(offsets=offsets, flip=flip)
    gradient = _Gradient(grad, images, ctx.size, ctx.images_dtype, options)
    # The op of the gradient is not differentiable.
    if torch.is_grad_enabled():
        return {"images": _backward_reference(gradient)}
    return {"images": _extract_patches_backward(*gradient[:4], *options)}


_extract_patches = register(
    "extract_patches",
    _Extraction,
    Tensor,
    reference=lambda extraction: extract_patches_reference(*extraction),
    kernel=_kernel,
    fake=lambda extraction: empty_patches(*extraction),
    setup_context=_setup_context,
    backward=_backward,
)
_extract_patches_backward = register(
    "extract_patches_backward",
    _Gradient,
    Tensor,
    reference=_backward_reference,
    kernel=_backward_kernel,
    fake=_empty_images_grad,
)
