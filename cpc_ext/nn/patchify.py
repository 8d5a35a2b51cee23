"""Patch extraction as a module: images [B, C, H, W] to overlapping patches [B, rows, cols, C', p, p]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpc_ext.nn.typed import Module
from cpc_ext.ops.extract_patches import extract_patches

__all__ = ["Patchify"]


class Patchify(Module):
    """Cut images into a grid of overlapping square patches; see :func:`cpc_ext.ops.extract_patches`.

    Args:
        patch_size: side p of a patch in pixels.
        stride: distance of neighbouring patches in pixels. Default: ``patch_size // 2``, so that patches half overlap.
        gray: RGB to one channel.
        mean: one value per output channel, subtracted after scaling and grey.
        std: one positive value per output channel, divisor after subtracting the mean.
        patch_norm: bring every patch to zero mean and unit contrast.
        dtype: floating type of the patches. Default: that of floating images, the default dtype for uint8.
        channels_last: lay each patch out as (p, p, C') in memory.
    """

    def __init__(
        self,
        patch_size: int,
        stride: int | None = None,
        *,
        gray: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        patch_norm: bool = False,
        dtype: torch.dtype | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.stride = max(patch_size // 2, 1) if stride is None else stride
        self.gray = gray
        self.mean = mean
        self.std = std
        self.patch_norm = patch_norm
        self.dtype = dtype
        self.channels_last = channels_last

    def forward(
        self,
        images: Tensor,
        *,
        crop: tuple[int, int] | None = None,
        offsets: Tensor | None = None,
        flip: Tensor | None = None,
    ) -> Tensor:
        """Cut images [B, C, H, W] into patches [B, rows, cols, C', p, p].

        ``crop``, ``offsets`` and ``flip`` choose each image's window as in :func:`cpc_ext.ops.extract_patches`.
        """
        return extract_patches(
            images,
            self.patch_size,
            self.stride,
            crop=crop,
            offsets=offsets,
            flip=flip,
            gray=self.gray,
            mean=self.mean,
            std=self.std,
            patch_norm=self.patch_norm,
            dtype=self.dtype,
            channels_last=self.channels_last,
        )

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, stride={self.stride}, gray={self.gray}"
