"""augment_patches against a loop over patches in Pillow, as CPC v2's augmentation is run today, and its own reference.

Turns uint8 colour images into normalised patches, with two transforms of AutoAugment's list for each patch, or with all
of CPC v2's augmentation; drawing the plan is not included. "eager" is the reference, on batches of patches in plain
PyTorch. Pillow's loop, which returns normalised patches, too, takes one core, and so does "ours, one core", so that
their ratio is that of one core. The bytes are those of images, plan and patches, each read or written once, and the
ceiling is a copy of the patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from benchmark import Case, Op, Problem
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torch import Tensor

from cpc_ext.data import PatchAugmentation
from cpc_ext.ops import AugmentationPlan, Transform, augment_patches
from cpc_ext.ops._patch_options import PatchOptions
from cpc_ext.ops.augment_patches import augment_patches_reference

MEAN, STD = (0.4313, 0.4156, 0.3663), (0.2683, 0.2610, 0.2687)

AUGMENTATIONS = {
    "two transforms": PatchAugmentation(
        elastic_probability=0, histogram_probability=0, jitter_probability=0, gray_probability=0, crop=1
    ),
    "CPC v2": PatchAugmentation(),
}


@dataclass(frozen=True)
class AugmentCase(Case):
    """A batch of square colour images; sides and stride in pixels. augmentation: a name of AUGMENTATIONS."""

    batch: int
    side: int
    patch: int
    stride: int
    augmentation: str

    @property
    def label(self) -> str:
        return f"[{self.batch},3,{self.side},{self.side}] {self.patch}/{self.stride} {self.augmentation}"

    @property
    def size(self) -> int:
        return self.batch


def smooth_images(batch: int, side: int) -> Tensor:
    """Return random uint8 [batch, 3, side, side] whose neighbouring pixels are similar, as in photographs."""
    coarse = torch.rand(batch, 3, side // 4 + 1, side // 4 + 1)
    fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic")
    return ((fine + 0.05 * torch.randn_like(fine)).clamp(0, 1) * 255).to(torch.uint8)


def prepare(case: AugmentCase, device: torch.device) -> Problem:
    dtype = getattr(torch, case.dtype)
    cells = (case.side - case.patch) // case.stride + 1
    host_plan = AUGMENTATIONS[case.augmentation].plan(case.batch, cells, cells, case.patch, channels=3)
    host_images = smooth_images(case.batch, case.side)
    images, plan = host_images.to(device), host_plan.to(device)

    def ours() -> Tensor:
        return augment_patches(images, case.patch, case.stride, plan, mean=MEAN, std=STD, dtype=dtype)

    def one_core() -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return ours()
        finally:
            torch.set_num_threads(threads)

    def reference() -> Tensor:
        options = PatchOptions(case.patch, case.stride, case.side, case.side, mean=[*MEAN], std=[*STD], dtype=dtype)
        return augment_patches_reference(images, options, plan)

    def pillow() -> None:
        # Not compared, since a difference of one level after a transform may grow with the next. Tests compare each.
        pillow_patches(host_images, host_plan, case.patch, case.stride, dtype)

    alternatives = {"eager": reference, "ours": ours}
    left_out = {}
    if case.augmentation == "two transforms":
        alternatives["Pillow, patch by patch"] = pillow
    else:
        left_out["Pillow, patch by patch"] = "no such loop has elastic deformation"
    if device.type == "cpu":
        alternatives["ours, one core"] = one_core
    patches_bytes = ours().nbytes
    plan_bytes = sum(tensor.nbytes for tensor in plan if isinstance(tensor, Tensor))
    return Problem(
        alternatives, images.nbytes + plan_bytes + patches_bytes, copied_bytes=patches_bytes, left_out=left_out
    )


# --- The loop in Pillow ---


def _affine(matrix: Callable) -> Callable:
    def transform(image, parameters, fill):
        return image.transform(image.size, Image.Transform.AFFINE, matrix(parameters[0]), fillcolor=fill)

    return transform


def _enhance(kind: Callable) -> Callable:
    return lambda image, parameters, fill: kind(image).enhance(parameters[0])


def _cutout(image, parameters, fill):
    top, left, side = parameters
    if side > 0:
        ImageDraw.Draw(image).rectangle((left, top, left + side - 1, top + side - 1), fill=fill)
    return image


PILLOW = {
    Transform.SHEAR_X: _affine(lambda s: (1, s, 0, 0, 1, 0)),
    Transform.SHEAR_Y: _affine(lambda s: (1, 0, 0, s, 1, 0)),
    Transform.TRANSLATE_X: _affine(lambda d: (1, 0, d, 0, 1, 0)),
    Transform.TRANSLATE_Y: _affine(lambda d: (1, 0, 0, 0, 1, d)),
    Transform.ROTATE: lambda image, parameters, fill: image.rotate(parameters[0], fillcolor=fill),
    Transform.AUTOCONTRAST: lambda image, parameters, fill: ImageOps.autocontrast(image),
    Transform.INVERT: lambda image, parameters, fill: ImageOps.invert(image),
    Transform.EQUALIZE: lambda image, parameters, fill: ImageOps.equalize(image),
    Transform.SOLARIZE: lambda image, parameters, fill: ImageOps.solarize(image, parameters[0]),
    Transform.POSTERIZE: lambda image, parameters, fill: ImageOps.posterize(image, int(parameters[0])),
    Transform.CONTRAST: _enhance(ImageEnhance.Contrast),
    Transform.COLOR: _enhance(ImageEnhance.Color),
    Transform.BRIGHTNESS: _enhance(ImageEnhance.Brightness),
    Transform.SHARPNESS: _enhance(ImageEnhance.Sharpness),
    Transform.CUTOUT: _cutout,
}


def pillow_patches(images: Tensor, plan: AugmentationPlan, patch: int, stride: int, dtype: torch.dtype) -> Tensor:
    """Return patches [B, rows, cols, 3, p, p], made image by image and patch by patch, like a data set's transform."""
    batch, rows, cols, _ = plan.codes.shape
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    codes, parameters, partners = plan.codes.tolist(), plan.parameters.tolist(), plan.partners.flatten().tolist()
    fill = (plan.fill,) * 3

    def cut(index: int) -> Image.Image:
        image, cell = divmod(index, rows * cols)
        top, left = cell // cols * stride, cell % cols * stride
        return pictures[image].crop((left, top, left + patch, top + patch))

    finished = []
    for index in range(batch * rows * cols):
        b, cell = divmod(index, rows * cols)
        row, col = divmod(cell, cols)
        picture = cut(index)
        for code, values in zip(codes[b][row][col], parameters[b][row][col], strict=True):
            if code == Transform.SAMPLE_PAIRING:
                picture = Image.blend(picture, cut(partners[index]), values[0])
            elif code != Transform.NONE:
                picture = PILLOW[Transform(code)](picture, values, fill)
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        finished.append((pixels.float() / 255 - mean) / std)
    return torch.stack(finished).unflatten(0, (batch, rows, cols)).to(dtype)


CASES = (
    *(
        AugmentCase(batch, 64, 16, 8, "two transforms", sweep=True, quick=batch in (4, 16))
        for batch in (4, 16, 64, 256)
    ),
    AugmentCase(64, 64, 16, 8, "two transforms", dtype="bfloat16"),
    AugmentCase(64, 64, 16, 8, "CPC v2"),
    # CPC v1's ImageNet patches and CPC v2's.
    AugmentCase(16, 256, 64, 32, "two transforms"),
    AugmentCase(8, 260, 80, 36, "two transforms"),
    AugmentCase(8, 260, 80, 36, "CPC v2"),
)

OPS = (Op("augment_patches", "memory", "images of 64x64, patches 16 / 8", CASES, prepare),)
