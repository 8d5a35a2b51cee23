"""Patches of a batch of uint8 images for a model: of random crops for training, of central ones for evaluation.

One call of an op does everything, from crop to cast, on the device that holds the images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cpc_ext.data.batch_share import BatchShare
from cpc_ext.data.images.dataset import Dataset
from cpc_ext.data.images.patch_augmentation import PatchAugmentation
from cpc_ext.data.on_device import send
from cpc_ext.ops import AugmentationPlan, augment_patches, extract_patches

_WHOLE = BatchShare()


@dataclass(frozen=True)
class PatchView:
    """Window, patch grid and normalisation of a dataset's images.

    patch_size, stride: side of a patch, and distance between patches, in pixels.
    crop: (h, w) of the window that is cut into patches, or one number for both; None takes whole images.
    pad: width in pixels of a black border that is added before the window is taken.
    flip: mirror half of the training windows left to right.
    gray: convert to one channel by ITU-R BT.601.
    mean, std: one value for each channel, after conversion to grey, with pixels in 0..1; None skips normalisation.
    patch_norm: normalise each patch to zero mean and unit contrast.
    augmentation: augmentation of training patches, drawn for each independently; None leaves them unchanged.
    dtype, channels_last: dtype and memory format of the patches, see extract_patches.
    """

    patch_size: int
    stride: int
    crop: int | tuple[int, int] | None = None
    pad: int = 0
    flip: bool = True
    gray: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    patch_norm: bool = False
    augmentation: PatchAugmentation | None = None
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        patch_size: int,
        stride: int,
        *,
        crop: int | tuple[int, int] | None = None,
        pad: int = 0,
        flip: bool = True,
        gray: bool = False,
        patch_norm: bool = False,
        augmentation: PatchAugmentation | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> PatchView:
        """Return a view that normalises by the dataset's statistics, of its channels or of the grey image."""
        return cls(
            patch_size=patch_size,
            stride=stride,
            crop=crop,
            pad=pad,
            flip=flip,
            gray=gray,
            mean=(dataset.gray_mean,) if gray else dataset.mean,
            std=(dataset.gray_std,) if gray else dataset.std,
            patch_norm=patch_norm,
            augmentation=augmentation,
            dtype=dtype,
            channels_last=channels_last,
        )

    def random(self, images: Tensor, generator: torch.Generator | None = None, *, share: BatchShare = _WHOLE) -> Tensor:
        """Return training patches [B, rows, cols, C', p, p] of uint8 images [B, C, H, W], from random windows.

        generator: a CPU generator, so that a seed gives the same windows on every device; None takes PyTorch's default.
        share: the part of the batch that the images are; windows and augmentations are drawn for the whole batch. Only
            sample pairing depends on the number of parts, as it mixes in patches of the same part.

        Raises ValueError if the window is larger than the padded images.
        """
        images = self._padded(images)
        image_height, image_width = images.shape[2:]
        batch = share.whole(len(images))
        height, width = self._window(image_height, image_width)
        if height > image_height or width > image_width:
            raise ValueError(f"crop: expected at most {image_height}x{image_width}, the images, got {height}x{width}")
        offsets = torch.stack(
            [
                torch.randint(image_height - height + 1, (batch,), generator=generator),
                torch.randint(image_width - width + 1, (batch,), generator=generator),
            ],
            dim=1,
        )
        flip = torch.rand(batch, generator=generator) < 0.5 if self.flip else None
        return self._extract(
            images,
            crop=(height, width),
            offsets=send(share.part(offsets), images.device),
            flip=None if flip is None else send(share.part(flip), images.device),
            plan=self._plan(images, generator, share),
        )

    def center(self, images: Tensor) -> Tensor:
        """Return evaluation patches [B, rows, cols, C', p, p] of uint8 images [B, C, H, W], from central windows.

        They are neither flipped nor augmented. Raises ValueError if the window is larger than the padded images.
        """
        images = self._padded(images)
        return self._extract(images, crop=self._window(*images.shape[2:]))

    def augmented(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return patches of the central window, augmented as for training, to be looked at."""
        images = self._padded(images)
        return self._extract(
            images, crop=self._window(*images.shape[2:]), plan=self._plan(images, generator, BatchShare())
        )

    def grid(self, image_height: int, image_width: int) -> tuple[int, int]:
        """Return the (rows, cols) of patches in an image of this size."""
        return self._grid(*self._window(image_height + 2 * self.pad, image_width + 2 * self.pad))

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    def _padded(self, images: Tensor) -> Tensor:
        return F.pad(images, (self.pad,) * 4) if self.pad else images

    def _window(self, image_height: int, image_width: int) -> tuple[int, int]:
        if self.crop is None:
            return image_height, image_width
        return (self.crop, self.crop) if isinstance(self.crop, int) else self.crop

    def _plan(self, images: Tensor, generator: torch.Generator | None, share: BatchShare) -> AugmentationPlan | None:
        """Draw the augmentation plan of padded images that are part of a batch; None without augmentation."""
        if self.augmentation is None:
            return None
        count, channels, *size = images.shape
        plan = self.augmentation.plan(
            share.whole(count),
            *self._grid(*self._window(*size)),
            self.patch_size,
            channels=channels,
            generator=generator,
        ).narrow(share.rank * count, count)
        if images.device.type == "cuda":
            plan = plan.pin_memory()
        return plan.to(images.device)

    def _extract(
        self,
        images: Tensor,
        *,
        crop: tuple[int, int],
        offsets: Tensor | None = None,
        flip: Tensor | None = None,
        plan: AugmentationPlan | None = None,
    ) -> Tensor:
        extract = extract_patches if plan is None else partial(augment_patches, plan=plan)
        return extract(
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
