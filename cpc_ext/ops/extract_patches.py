"""Overlapping patches of a batch of images: crop, flip, grey, normalise, cut and cast in one pass.

From images [B, C, H, W] (uint8 or floating, any strides) to patches [B, rows, cols, C', p, p]. Every pixel is read and
transformed once, then written straight to each patch that contains it, so none of the steps leaves an intermediate in
memory. The backward pass sums the overlapping patch gradients of every pixel in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpc_ext._native import native
from cpc_ext.ops._library import refuse_forward_mode, register, workspace_of

__all__ = ["extract_patches", "extract_patches_reference"]

# ITU-R BT.601 luma, as Pillow's convert("L") uses it.
LUMA = (0.299, 0.587, 0.114)
# Added to a patch's standard deviation, so that flat patches stay flat instead of becoming amplified noise.
CONTRAST_FLOOR = 0.1

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        std: one positive value per output channel, divided by. Default: ones.
        patch_norm: bring every patch, over its channels and pixels together, to zero mean and unit contrast:
            ``(x - mu) / (sigma + 0.1)`` with the population sigma.
        dtype: floating type of the patches. Default: that of floating images, ``torch.get_default_dtype()`` for uint8.
        channels_last: lay each patch out as (p, p, C') in memory; the shape stays the same.

    Returns:
        Patches [B, rows, cols, C', p, p] with rows = (h - p) // stride + 1, cols likewise, C' = 1 if ``gray`` else C.
        Differentiable in floating images, backwards, any number of times.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range. Offsets that leave the image are an error
            on the CPU; elsewhere, where looking would stall the stream, they are clamped to the image.
        NotImplementedError: forward-mode derivatives.
    """
    return _extract_patches(
        *checked_arguments(
            images,
            patch_size,
            stride,
            crop=crop,
            offsets=offsets,
            flip=flip,
            gray=gray,
            mean=mean,
            std=std,
            patch_norm=patch_norm,
            dtype=dtype,
            channels_last=channels_last,
        )
    )


def checked_arguments(
    images: Tensor,
    patch_size: int,
    stride: int,
    *,
    crop: tuple[int, int] | None,
    offsets: Tensor | None,
    flip: Tensor | None,
    gray: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    patch_norm: bool,
    dtype: torch.dtype | None,
    channels_last: bool,
) -> tuple[Any, ...]:
    """extract_patches' arguments as its op's schema has them. TypeError or ValueError where one is wrong."""
    _check_tensor("images", images)
    refuse_forward_mode(images)
    if images.dtype != torch.uint8 and images.dtype not in _DTYPES:
        raise TypeError(f"images must be uint8, {', '.join(map(_name, _DTYPES))}, got {_name(images.dtype)}")
    if images.ndim != 4:
        raise ValueError(f"images must be [B, C, H, W], got shape {tuple(images.shape)}")
    if dtype is None:
        dtype = images.dtype if images.is_floating_point() else torch.get_default_dtype()
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(_name, _DTYPES))}, got {_name(dtype)}")
    for name, value in (("gray", gray), ("patch_norm", patch_norm), ("channels_last", channels_last)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    height, width = _window(images, patch_size, stride, crop)
    # Beyond the window all strides are alike; the op's schema knows 64 bits.
    stride = min(stride, max(height, width))
    channels = _output_channels(images, gray)
    mean = _per_channel("mean", mean, channels)
    std = _per_channel("std", std, channels)
    if std is not None and not all(value > 0 for value in std):
        raise ValueError(f"std must be positive, got {tuple(std)}")
    if offsets is not None:
        if crop is None:
            raise ValueError("offsets place a crop: give crop=(h, w) with them")
        _check_per_image("offsets", offsets, (images.shape[0], 2), images)
        if offsets.dtype == torch.bool or offsets.is_floating_point() or offsets.is_complex():
            raise TypeError(f"offsets must be integers, got {_name(offsets.dtype)}")
        offsets = offsets.to(torch.int64)
    if flip is not None:
        _check_per_image("flip", flip, (images.shape[0],), images)
        if flip.dtype != torch.bool:
            raise TypeError(f"flip must be bool, got {_name(flip.dtype)}")
    return (
        *(images, patch_size, stride, height, width, offsets, flip),
        *(gray, mean, std, patch_norm, dtype, channels_last),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _window(images: Tensor, patch_size: int, stride: int, crop: tuple[int, int] | None) -> tuple[int, int]:
    for name, value in (("patch_size", patch_size), ("stride", stride)):
        _check_integer(name, value)
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    size = tuple(images.shape[2:])
    if crop is None:
        height, width = size
    else:
        if len(crop) != 2:
            raise ValueError(f"crop must be (h, w), got {tuple(crop)}")
        for side in crop:
            _check_integer("crop", side)
        height, width = crop
        if height > size[0] or width > size[1]:
            raise ValueError(f"crop must lie within images of {size[0]}x{size[1]}, got {height}x{width}")
    if patch_size > min(height, width):
        raise ValueError(
            f"patch_size must be at most {min(height, width)} for a {height}x{width} window, got {patch_size}"
        )
    return height, width


def _output_channels(images: Tensor, gray: bool) -> int:
    channels = images.shape[1]
    if not gray:
        if channels == 0:
            raise ValueError("images must have at least one channel, got none")
        return channels
    if channels not in (1, 3):
        raise ValueError(f"gray needs images of 1 or 3 channels, got {channels}")
    return 1


def _per_channel(name: str, values: Sequence[float] | None, channels: int) -> list[float] | None:
    if values is None:
        return None
    if len(values) != channels:
        raise ValueError(f"{name} must have one value for each of {channels} output channels, got {len(values)}")
    try:
        return [float(value) for value in values]
    except OverflowError:
        raise ValueError(f"{name} must hold what a float can, got {values}") from None


def _check_tensor(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")


def _check_integer(name: str, value: int) -> None:
    # torch.compile traces sizes that vary as SymInt.
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")


def _check_per_image(name: str, value: Tensor, shape: tuple[int, ...], images: Tensor) -> None:
    _check_tensor(name, value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)} for {shape[0]} images, got shape {tuple(value.shape)}")
    if value.device != images.device:
        raise ValueError(f"{name} must be on {images.device} like the images, got {value.device}")


def extract_patches_reference(
    images: Tensor,
    patch_size: int,
    stride: int,
    height: int,
    width: int,
    offsets: Tensor | None,
    flip: Tensor | None,
    gray: bool,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    patch_norm: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """The op in plain PyTorch, step by step: oracle, baseline, and what runs where there is no kernel."""
    compute = torch.float64 if torch.float64 in (images.dtype, dtype) else torch.float32
    x = _crop_and_flip(images, height, width, offsets, flip).to(compute)
    if images.dtype == torch.uint8:
        x = x / 255
    if gray and images.shape[1] == 3:
        x = torch.einsum("bchw,c->bhw", x, x.new_tensor(LUMA)).unsqueeze(1)
    if mean is not None:
        x = x - x.new_tensor(mean).view(1, -1, 1, 1)
    if std is not None:
        x = x / x.new_tensor(std).view(1, -1, 1, 1)
    patches = x.unfold(2, patch_size, stride).unfold(3, patch_size, stride).permute(0, 2, 3, 1, 4, 5)
    if patch_norm:
        centred = patches - patches.mean((3, 4, 5), keepdim=True)
        variance = centred.square().mean((3, 4, 5), keepdim=True)
        # The square root has no slope at zero; a flat patch has no gradient through its contrast.
        flat = variance == 0
        contrast = torch.where(flat, 0.0, torch.where(flat, 1.0, variance).sqrt())
        patches = centred / (contrast + CONTRAST_FLOOR)
    patches = patches.to(dtype)
    if channels_last:
        return patches.permute(0, 1, 2, 4, 5, 3).contiguous().permute(0, 1, 2, 5, 3, 4)
    return patches.contiguous()


def _crop_and_flip(images: Tensor, height: int, width: int, offsets: Tensor | None, flip: Tensor | None) -> Tensor:
    limit_y, limit_x = images.shape[2] - height, images.shape[3] - width
    if offsets is None and flip is None:
        y, x = limit_y // 2, limit_x // 2
        return images[:, :, y : y + height, x : x + width]
    if offsets is None:
        offsets = images.new_tensor([[limit_y // 2, limit_x // 2]], dtype=torch.int64).expand(len(images), 2)
    offsets = torch.minimum(offsets.clamp(min=0), offsets.new_tensor([limit_y, limit_x]))
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(len(images), width)
    if flip is not None:
        columns = torch.where(flip[:, None], width - 1 - columns, columns)
    columns = offsets[:, 1:] + columns
    batch = torch.arange(len(images), device=images.device)
    # Advanced indices on both sides of a slice put the channels last.
    return images[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _empty_patches(
    images, patch_size, stride, height, width, offsets, flip, gray, mean, std, patch_norm, dtype, channels_last
) -> Tensor:
    rows, cols = (height - patch_size) // stride + 1, (width - patch_size) // stride + 1
    grid, channels = (images.shape[0], rows, cols), 1 if gray else images.shape[1]
    if not channels_last:
        return images.new_empty((*grid, channels, patch_size, patch_size), dtype=dtype)
    return images.new_empty((*grid, patch_size, patch_size, channels), dtype=dtype).permute(0, 1, 2, 5, 3, 4)


def _affine(
    images_dtype: torch.dtype, channels: int, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Scaling by 1/255 and normalising as ``scale * x + shift``."""
    unit = 1 / 255 if images_dtype == torch.uint8 else 1.0
    std = std or [1.0] * channels
    mean = mean or [0.0] * channels
    return [unit / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def _kernel(
    images, patch_size, stride, height, width, offsets, flip, gray, mean, std, patch_norm, dtype, channels_last
) -> Tensor:
    patches = _empty_patches(
        images, patch_size, stride, height, width, offsets, flip, gray, mean, std, patch_norm, dtype, channels_last
    )
    scale, shift = _affine(images.dtype, patches.shape[3], mean, std)
    native.extract_patches(
        images,
        patches,
        patch_size,
        stride,
        height,
        width,
        offsets,
        flip,
        gray,
        patch_norm,
        channels_last,
        scale,
        shift,
    )
    return patches


def _backward_reference(grad, images, size, images_dtype, *options) -> Tensor:
    """The gradient in the images. Only ``patch_norm`` is not linear and needs the images themselves.

    Differentiable where gradients are enabled.
    """
    *options, channels_last = options
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        if images is None:
            pixels = torch.zeros(size, dtype=images_dtype, device=grad.device, requires_grad=True)
        else:
            pixels = images.view_as(images) if differentiable else images.detach().requires_grad_()
        patches = extract_patches_reference(pixels, *options, grad.dtype, channels_last)
    return torch.autograd.grad(patches, pixels, grad, create_graph=differentiable)[0].contiguous()


def _empty_images_grad(grad, images, size, images_dtype, *_: object) -> Tensor:
    return grad.new_empty(size, dtype=images_dtype)


def _backward_kernel(
    grad,
    images,
    size,
    images_dtype,
    patch_size,
    stride,
    height,
    width,
    offsets,
    flip,
    gray,
    mean,
    std,
    patch_norm,
    channels_last,
) -> Tensor:
    grad = grad.permute(0, 1, 2, 4, 5, 3).contiguous().permute(0, 1, 2, 5, 3, 4) if channels_last else grad.contiguous()
    scale, shift = _affine(images_dtype, grad.shape[3], mean, std)
    images_grad = grad.new_empty(size, dtype=images_dtype)
    problem = (
        images_grad,
        grad,
        images,
        patch_size,
        stride,
        height,
        width,
        offsets,
        flip,
        gray,
        patch_norm,
        channels_last,
        scale,
        shift,
    )
    workspace = workspace_of(grad, native.extract_patches_backward_workspace(*problem))
    native.extract_patches_backward(*problem, workspace)
    return images_grad


def _setup_context(ctx, inputs, output) -> None:
    images, *window, offsets, flip, gray, mean, std, patch_norm, _, channels_last = inputs
    ctx.save_for_backward(images if patch_norm else None, offsets, flip)
    ctx.size, ctx.images_dtype = images.shape, images.dtype
    ctx.window = window
    ctx.transform = gray, mean, std, patch_norm, channels_last


def _backward(ctx, grad: Tensor):
    images, offsets, flip = ctx.saved_tensors
    images_grad = None
    if ctx.needs_input_grad[0]:
        # The op's gradient has none of its own.
        backward = _backward_reference if torch.is_grad_enabled() else _extract_patches_backward
        images_grad = backward(grad, images, ctx.size, ctx.images_dtype, *ctx.window, offsets, flip, *ctx.transform)
    return images_grad, *[None] * 12


_OPTIONS = (
    "SymInt patch_size, SymInt stride, SymInt height, SymInt width, Tensor? offsets, Tensor? flip, bool gray, "
    "float[]? mean, float[]? std, bool patch_norm"
)

_extract_patches = register(
    f"extract_patches(Tensor images, {_OPTIONS}, ScalarType dtype, bool channels_last) -> Tensor",
    reference=extract_patches_reference,
    kernel=_kernel,
    fake=_empty_patches,
    backward=_backward,
    setup_context=_setup_context,
)
_extract_patches_backward = register(
    "extract_patches_backward(Tensor grad, Tensor? images, SymInt[] size, ScalarType images_dtype, "
    f"{_OPTIONS}, bool channels_last) -> Tensor",
    reference=_backward_reference,
    kernel=_backward_kernel,
    fake=_empty_images_grad,
)
