"""Problems of extract_patches and augment_patches: uint8 and floating images, windows, every transform."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cpc_ext.op_checks.agreement import KINDS, Problem
from cpc_ext.op_checks.draw import integers, normal, uniform
from cpc_ext.ops import AugmentationPlan, Transform
from cpc_ext.ops._patch_options import PatchOptions, checked_options
from cpc_ext.ops.augment_patches import augment_patches, augment_patches_reference
from cpc_ext.ops.extract_patches import extract_patches, extract_patches_reference

__all__ = ["PROBLEMS"]

# Neither op computes in TF32.
_TYPES = tuple(name for name in KINDS if name != "tf32")


def _options(images: Tensor, options: Mapping[str, Any]) -> PatchOptions:
    call = inspect.signature(extract_patches).bind(images, **options)
    call.apply_defaults()
    return checked_options(**call.arguments)


def _extract_reference(images: Tensor, **options: Any) -> Tensor:
    return extract_patches_reference(images, _options(images, options))


def _augment_reference(images: Tensor, plan: AugmentationPlan, **options: Any) -> Tensor:
    return augment_patches_reference(images, _options(images, options), plan)


def _numbers(label: str, shape: tuple[int, ...], **options: Any) -> Problem:
    return Problem(
        op="extract_patches",
        label=label,
        reference=partial(_extract_reference, **options),
        call=partial(extract_patches, **options),
        differentiable={"images": uniform(*shape, seed=1)},
        kinds=_TYPES,
    )


def _bytes(label: str, shape: tuple[int, ...], placed: Mapping[str, Any] | None = None, **options: Any) -> Problem:
    return Problem(
        op="extract_patches",
        label=label,
        reference=partial(_extract_reference, **options),
        call=partial(extract_patches, **options),
        others={"images": integers(256, *shape, seed=1).to(torch.uint8), **(placed or {})},
        gives="dtype",
        kinds=_TYPES,
    )


# The largest parameters of transforms in a problem, where the default of 1 would change little.
_LARGEST = {
    **dict.fromkeys((Transform.TRANSLATE_X, Transform.TRANSLATE_Y, Transform.CUTOUT, Transform.CROP), 6.0),
    Transform.ROTATE: 90.0,
    Transform.SOLARIZE: 255.0,
    Transform.POSTERIZE: 7.0,
    **dict.fromkeys((Transform.CONTRAST, Transform.COLOR, Transform.BRIGHTNESS, Transform.SHARPNESS), 2.0),
}


def _augmented(label: str, transforms: list[Transform], side: int, **options: Any) -> Problem:
    batch, grid = 2, 3
    shape = (batch, grid, grid)
    largest = torch.tensor([_LARGEST.get(one, 1.0) for one in transforms]).unsqueeze(1)
    plan = AugmentationPlan(
        codes=torch.tensor(transforms, dtype=torch.uint8).expand(*shape, -1).contiguous(),
        parameters=uniform(*shape, len(transforms), 3, seed=2).float() * largest,
        partners=integers(batch * grid * grid, *shape, seed=3),
        displacements=normal(*shape, 2, 4, 4, seed=4).float(),
    )
    images = integers(256, batch, 3, side * 2, side * 2, seed=1).to(torch.uint8)
    return Problem(
        op="augment_patches",
        label=label,
        reference=partial(_augment_reference, patch_size=side, stride=side // 2, **options),
        call=partial(augment_patches, patch_size=side, stride=side // 2, **options),
        others={"images": images, "plan": plan},
        gives="dtype",
        kinds=_TYPES,
    )


_PLACED = {"offsets": torch.tensor([[0, 3], [2, 0]]), "flip": torch.tensor([True, False])}
_STANDARD = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}

PROBLEMS = [
    _numbers("numbers, half overlap", (2, 3, 24, 24), patch_size=8, stride=4, **_STANDARD),
    _numbers("numbers, as they are", (2, 3, 24, 32), patch_size=16, stride=8),
    _numbers("numbers, normalised patches", (2, 3, 11, 9), patch_size=5, stride=2, patch_norm=True),
    _numbers("numbers, grey, gaps", (1, 3, 13, 17), patch_size=3, stride=5, gray=True, channels_last=True),
    _bytes("bytes, windows and flips", (2, 3, 15, 14), _PLACED, patch_size=6, stride=3, crop=(12, 11), **_STANDARD),
    _bytes("bytes, grey, normalised", (3, 3, 16, 16), patch_size=8, stride=8, gray=True, patch_norm=True),
    _bytes("no images", (0, 1, 8, 8), patch_size=4, stride=4),
    *(_augmented(f"{one.name.lower()}", [one], 10, **_STANDARD) for one in Transform if one != Transform.NONE),
    _augmented("all transforms, odd side", [one for one in Transform if one != Transform.NONE], 7, patch_norm=True),
]
