"""How a batch of uint8 images becomes the patches a model sees, at random for training and fixed for evaluation.

All of it, from crop to cast, is one call of an op on the device that holds the images.
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

    patch_size, stride: in pixels.
    crop: (h, w) of the window that is cut into patches, or one side for both; None takes whole images.
    pad: black pixels put around an image before the window is taken.
    flip: mirror half of the training windows left to right.
    gray: one channel by ITU-R BT.601.
    mean, std: one value a channel after grey, with pixels in 0..1; None leaves them so.
    patch_norm: bring each patch to its own zero mean and unit contrast.
    augmentation: what training patches go through, each by draws of its own; None leaves them as they are.
    dtype, channels_last: of the patches, as extract_patches takes them.
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
        """A view that normalises by the dataset's statistics, of its colours or of grey."""
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
        """Training patches [B, rows, cols, C', p, p] of uint8 images [B, C, H, W]: a random window of each image.

        generator: on the CPU, so that a seed gives the same windows on every device; None takes PyTorch's own.
        share: the part of the batch that the images are; windows and augmentations are drawn for all of it. Only
            sample pairing depends on how many parts there are: it mixes in patches of the same part.
        Raises ValueError where the window is larger than the padded images.
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
        """Evaluation patches [B, rows, cols, C', p, p] of uint8 images [B, C, H, W]: the central window, as it is.

        Raises ValueError where the window is larger than the padded images.
        """
        images = self._padded(images)
        return self._extract(images, crop=self._window(*images.shape[2:]))

    def augmented(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The central window as :meth:`center` has it, its patches augmented as for training, to look at them."""
        images = self._padded(images)
        return self._extract(
            images, crop=self._window(*images.shape[2:]), plan=self._plan(images, generator, BatchShare())
        )

    def grid(self, image_height: int, image_width: int) -> tuple[int, int]:
        """(rows, cols) of patches in an image of that many pixels."""
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
        """What happens to the patches of images that are padded and part of a batch; None if nothing does."""
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
