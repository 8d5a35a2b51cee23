"""The base class of patch encoders, which run each patch through a network and average its feature map over space.

They map patches [B, rows, cols, C, p, p], or images that are cut into patches first, to encodings [B, D, rows, cols].
All patches of a batch run through the network as one batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from cpc_ext.nn.patchify import Patchify
from cpc_ext.nn.typed import Module

__all__ = ["PatchEncoder"]


class PatchEncoder(Module, ABC):
    """An encoder of patches; subclasses define its network, :meth:`feature_maps`.

    Args:
        in_channels: channels C of a patch, 3 for colour and 1 for grey.
        patch_size: side of the patches cut from images, in pixels; not needed where patches are given.
        stride: distance of those patches in pixels. Default: ``patch_size // 2``.

    Attributes:
        out_channels: D, the features per patch; subclasses set it.

    Raises:
        ValueError: an argument out of range.
    """

    out_channels: int

    def __init__(self, in_channels: int, *, patch_size: int | None, stride: int | None) -> None:
        super().__init__()
        if in_channels < 1:
            raise ValueError(f"in_channels must be at least 1, got {in_channels}")
        if patch_size is None and stride is not None:
            raise ValueError(f"stride needs patch_size, got stride={stride} alone")
        self.in_channels = in_channels
        self.patchify = None if patch_size is None else Patchify(patch_size, stride)

    @abstractmethod
    def feature_maps(self, patches: Tensor) -> Tensor:
        """Return the feature maps [N, D, h, w] of patches [N, C, p, p], before they are averaged over space."""

    def forward(self, patches_or_images: Tensor) -> Tensor:
        """Encode every patch.

        Args:
            patches_or_images: patches [B, rows, cols, C, p, p], or images [B, C, H, W] (floating, or uint8 to be
                scaled by 1/255), which need ``patch_size``. Patches with channels last in memory stay so inside.

        Returns:
            Encodings [B, D, rows, cols], with D last in memory.

        Raises:
            TypeError: patches that are not floating.
            ValueError: an input of another shape, or images for an encoder without ``patch_size``.
        """
        patches = self.to_patches(patches_or_images)
        batch, rows, cols = patches.shape[:3]
        encodings = self.feature_maps(patches.flatten(0, 2)).mean((2, 3))
        return encodings.view(batch, rows, cols, self.out_channels).permute(0, 3, 1, 2)

    def features(self, patches_or_images: Tensor) -> Tensor:
        """The same as calling the encoder: [B, D, rows, cols]."""
        return self(patches_or_images)

    def to_patches(self, patches_or_images: Tensor) -> Tensor:
        """Return the input of :meth:`forward` as patches [B, rows, cols, C, p, p], with the same errors."""
        patches = patches_or_images
        if patches.ndim == 4:
            if self.patchify is None:
                raise ValueError(
                    "images need an encoder with patch_size; this one takes patches [B, rows, cols, C, p, p]"
                )
            patches = self.patchify(patches)
            if patches_or_images.dtype == torch.uint8:
                patches = patches.to(next(self.parameters()).dtype)
        if patches.ndim != 6 or patches.shape[3] != self.in_channels:
            raise ValueError(
                f"patches_or_images must be [B, rows, cols, C, p, p] or [B, C, H, W] with C = {self.in_channels}, "
                f"got shape {tuple(patches_or_images.shape)}"
            )
        if not patches.is_floating_point():
            raise TypeError(f"patches_or_images must be floating patches, got {patches.dtype}")
        return patches
