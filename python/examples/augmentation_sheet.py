"""Draws the effect of every transform of the patch augmentation on a patch, at several magnitudes, as a PNG.

    python python/examples/augmentation_sheet.py --out sheet.png [--images FOLDER]

The patches are images of a folder, cropped to squares and resized, or the centres of generated textures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from cpc_ext import figures
from cpc_ext.data import AugmentationPlan, PatchAugmentation, make_textures
from cpc_ext.data.spread import spread
from cpc_ext.ops import Transform, augment_patches

# Rows with all of CPC v2's augmentation, and patches in each.
DRAWS, COLUMNS = 3, 7
# One row for each transform, with the parameters of the patches that follow the plain one; () means that they are drawn
# at random. In a row without parameters, plain and transformed patches alternate.
ROWS: list[tuple[Transform, str, list[tuple[float, ...]]]] = [
    (Transform.SHEAR_X, "shear x", [(v,) for v in (-0.3, -0.2, -0.1, 0.1, 0.2, 0.3)]),
    (Transform.SHEAR_Y, "shear y", [(v,) for v in (-0.3, -0.2, -0.1, 0.1, 0.2, 0.3)]),
    (Transform.TRANSLATE_X, "translate x (share)", [(v,) for v in (-0.45, -0.3, -0.15, 0.15, 0.3, 0.45)]),
    (Transform.TRANSLATE_Y, "translate y (share)", [(v,) for v in (-0.45, -0.3, -0.15, 0.15, 0.3, 0.45)]),
    (Transform.ROTATE, "rotate (degrees)", [(v,) for v in (-30, -20, -10, 10, 20, 30)]),
    (Transform.AUTOCONTRAST, "autocontrast", []),
    (Transform.INVERT, "invert", []),
    (Transform.EQUALIZE, "equalize", []),
    (Transform.SOLARIZE, "solarize (threshold)", [(v,) for v in (224, 192, 160, 128, 64, 0)]),
    (Transform.POSTERIZE, "posterize (bits)", [(v,) for v in (8, 7, 6, 5, 4)]),
    (Transform.CONTRAST, "contrast", [(v,) for v in (0.1, 0.4, 0.7, 1.3, 1.6, 1.9)]),
    (Transform.COLOR, "colour", [(v,) for v in (0.1, 0.4, 0.7, 1.3, 1.6, 1.9)]),
    (Transform.BRIGHTNESS, "brightness", [(v,) for v in (0.1, 0.4, 0.7, 1.3, 1.6, 1.9)]),
    (Transform.SHARPNESS, "sharpness", [(v,) for v in (0.1, 0.4, 0.7, 1.3, 1.6, 1.9)]),
    (Transform.CUTOUT, "cutout (share)", [(0.3, 0.5, v) for v in (0.06, 0.09, 0.12, 0.15, 0.18)]),
    (Transform.SAMPLE_PAIRING, "sample pairing", [(v,) for v in (0.06, 0.13, 0.2, 0.27, 0.34, 0.4)]),
    (Transform.ELASTIC, "elastic", [()] * 6),
    (Transform.TONE_CURVE, "colour histogram", [()] * 6),
    (Transform.HUE, "hue (turns)", [(v,) for v in (-0.1, -0.07, -0.03, 0.03, 0.07, 0.1)]),
    (Transform.GRAY, "grey", []),
    (Transform.CROP, "crop padded back", [()] * 6),
]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="PNG file to write")
    parser.add_argument("--images", type=Path, help="folder of images (default: generated textures)")
    parser.add_argument("--patch-size", type=int, default=48, help="side of the patches in pixels (default 48)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default 0)")
    arguments = parser.parse_args()
    if arguments.patch_size < 1:
        parser.error(f"--patch-size: at least 1, got {arguments.patch_size}")
    return arguments


def make_patches(folder: Path | None, count: int, side: int, seed: int) -> Tensor:
    """Return uint8 patches [count, 3, side, side]. Raises SystemExit if the folder has too few images."""
    if folder is None:
        size = max(side, 96)
        start = (size - side) // 2
        images = torch.from_numpy(make_textures(count, size=size, seed=seed).images)
        return images[:, :, start : start + side, start : start + side]
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(paths) < count:
        raise SystemExit(f"--images: expected a folder of at least {count} JPEGs or PNGs, found {len(paths)}")
    chosen = [paths[index] for index in spread(count, len(paths))]
    pixels = [np.array(ImageOps.fit(Image.open(path).convert("RGB"), (side, side))) for path in chosen]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def row_plan(
    transform: Transform, parameters: list[tuple[float, ...]], side: int, generator: torch.Generator
) -> tuple[AugmentationPlan, list[str]]:
    """Return a plan of one image's patches, [1, 1, 1 + M], a plain one and one for each parameter, and captions."""
    drawn = {
        Transform.ELASTIC: {"elastic_probability": 1, "elastic_shear": (0, 0)},
        Transform.TONE_CURVE: {"histogram_probability": 1},
        Transform.CROP: {"crop": PatchAugmentation.crop},
    }
    count = 1 + len(parameters)
    off = {"transforms": (), "crop": 1}
    off |= dict.fromkeys((f"{name}_probability" for name in ("elastic", "histogram", "jitter", "gray")), 0)
    if transform in drawn:
        plan = PatchAugmentation(**off | drawn[transform]).plan(1, 1, count, side, channels=3, generator=generator)
    else:
        codes = torch.full((1, 1, count, 1), int(transform), dtype=torch.uint8)
        values = torch.zeros(1, 1, count, 1, 3)
        # The op takes pixels in place of shares of the side.
        unit = side if transform in (Transform.TRANSLATE_X, Transform.TRANSLATE_Y, Transform.CUTOUT) else 1
        for column, given in enumerate(parameters):
            values[0, 0, column + 1, 0, : len(given)] = (torch.tensor(given) * unit).float()
        # The partner is the patch of the second image.
        plan = AugmentationPlan(codes, values, torch.full((1, 1, count), count))
    plan.codes[0, 0, 0] = Transform.NONE
    return plan, ["plain", *(f"{given[-1]:g}" if given else "" for given in parameters)]


def pairs_plan(transform: Transform) -> AugmentationPlan:
    """Return a plan [1, 1, 6] that transforms every second patch."""
    codes = torch.tensor([Transform.NONE, transform] * 3, dtype=torch.uint8).view(1, 1, 6, 1)
    return AugmentationPlan(codes, torch.zeros(1, 1, 6, 1, 3))


def main(arguments: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(arguments.seed)
    side = arguments.patch_size
    patches = make_patches(arguments.images, len(ROWS) + DRAWS, side, arguments.seed)
    rows = []
    for number, (transform, title, parameters) in enumerate(ROWS):
        if parameters:
            plan, captions = row_plan(transform, parameters, side, generator)
            shown = patches[number].expand(len(captions), -1, -1, -1)
        else:
            # Three patches before and after.
            plan, captions = pairs_plan(transform), ["plain", ""] * 3
            shown = patches[[number, number, *(other % len(patches) for other in (-1, -1, -2, -2))]]
        rows.append((title, drawn(shown, patches[number + 1], plan), captions))
    for number in range(DRAWS):
        plan = PatchAugmentation().plan(1, 1, COLUMNS, side, channels=3, generator=generator)
        plan.codes[0, 0, 0] = Transform.NONE
        plan = plan._replace(partners=torch.full((1, 1, COLUMNS), COLUMNS))
        shown = patches[len(ROWS) + number].expand(COLUMNS, -1, -1, -1)
        rows.append(("all of CPC v2", drawn(shown, patches[number], plan), ["plain", *[""] * (COLUMNS - 1)]))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figures.save(arguments.out, figures.augmentation_sheet(rows))
    print(f"written: {arguments.out}")


def drawn(patches: Tensor, partner: Tensor, plan: AugmentationPlan) -> np.ndarray:
    """Apply a plan [1, 1, M] to patches [M, 3, p, p], with results in 0..1. Index M in its partners is ``partner``."""
    count, _, side, _ = patches.shape
    images = torch.stack([torch.cat([*patches], dim=2), partner.repeat(1, 1, count)])
    # The second image, which consists of partners, is not transformed.
    codes, parameters = (torch.cat([values, torch.zeros_like(values)]) for values in plan[:2])
    partners, displacements = (None if values is None else torch.cat([values, values]) for values in plan[2:4])
    both = AugmentationPlan(codes, parameters, partners, displacements, plan.fill)
    return augment_patches(images, side, side, both)[0, 0].numpy()


if __name__ == "__main__":
    main(parse_arguments())
