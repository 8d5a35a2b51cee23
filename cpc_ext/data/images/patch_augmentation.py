"""CPC v2's patch augmentation: transforms drawn at random for every patch of a batch.

The draws are a plan, small tensors of codes and magnitudes, which ``augment_patches`` carries out while it cuts the
patches, with the same result on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cpc_ext.ops import AugmentationPlan, Transform
from cpc_ext.ops._patch_transforms import FACTOR_LIMIT, NODES
from cpc_ext.ops.augment_patches import PARAMETERS

__all__ = ["AUTO_AUGMENT", "PatchAugmentation"]

Range = tuple[float, float]

# AutoAugment's list (Cubuk et al. 2018, arXiv 1805.09501, table 6).
AUTO_AUGMENT = (
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
    "rotate",
    "autocontrast",
    "invert",
    "equalize",
    "solarize",
    "posterize",
    "contrast",
    "color",
    "brightness",
    "sharpness",
    "cutout",
    "sample_pairing",
)
# Transforms of colour, which do not apply to images of one channel.
_COLORFUL = {"color"}
# The field that holds the range of each transform's magnitude.
_RANGES = {
    **{f"{name}_{axis}": name for name in ("shear", "translate") for axis in "xy"},
    **{name: name for name in (*AUTO_AUGMENT[8:], "rotate")},
}
_JITTERS = (Transform.BRIGHTNESS, Transform.CONTRAST, Transform.COLOR, Transform.HUE)


@dataclass(frozen=True)
class PatchAugmentation:
    """CPC v2's augmentation of patches (Hénaff et al. 2019, arXiv 1905.09272), drawn for each patch independently.

    Applied in this order: some of AutoAugment's transforms, each at most once; elastic deformation and shearing; a
    change of the colour histogram; brightness, contrast, saturation and hue in random order; grey; a crop that is
    padded back. Probabilities are those of the paper. Ranges are those of AutoAugment's paper, as shares of a patch
    where they are in pixels there. Strengths that neither paper states are marked as open. Ranges are (low, high), and
    values are drawn from them uniformly.

    transforms: names from AUTO_AUGMENT; () switches all of them off.
    num_transforms: how many of them each patch gets, at random.
    shear: shift in pixels for each pixel along the other axis. translate: share of the side. rotate: degrees.
    solarize: threshold, 0..256. posterize: bits kept, whole numbers.
    contrast, color, brightness, sharpness: factors, at most 4; 1 leaves a patch unchanged.
    cutout: side of the square as a share of the patch's. sample_pairing: weight of another patch, drawn from the batch.
    elastic_probability: probability of elastic deformation, with a shear along x or y; 0 switches both off.
    elastic_displacement: largest displacement of a node in each direction, as a share of the side (open).
    elastic_shear: range of that shear (open); (0, 0) leaves it out.
    histogram_probability: probability of bending each channel's tone curve; 0 switches it off.
    histogram_strength: the bend is within ± this, at most 1 (open).
    jitter_probability: probability of colour jitter; 0 switches it off.
    jitter: factors of brightness, contrast and saturation are within 1 ± these, at least 0; hue turns by up to ± the
        last, in turns of the colour circle, at most 0.5 (open).
    gray_probability: probability of conversion to grey; 0 switches it off.
    crop: side of the crop that is padded back, as a share of the patch's (CPC v1: 60 of 64); 1 switches it off.
    fill: value, 0..255, of pixels from outside of a patch.

    Raises ValueError for values out of these ranges, a name that is not in AUTO_AUGMENT, or more transforms than names.
    """

    transforms: tuple[str, ...] = AUTO_AUGMENT
    num_transforms: int = 2
    shear: Range = (-0.3, 0.3)
    translate: Range = (-150 / 331, 150 / 331)
    rotate: Range = (-30.0, 30.0)
    solarize: Range = (0.0, 256.0)
    posterize: Range = (4, 8)
    contrast: Range = (0.1, 1.9)
    color: Range = (0.1, 1.9)
    brightness: Range = (0.1, 1.9)
    sharpness: Range = (0.1, 1.9)
    cutout: Range = (0.0, 60 / 331)
    sample_pairing: Range = (0.0, 0.4)
    elastic_probability: float = 0.2
    elastic_displacement: float = 0.1
    elastic_shear: Range = (-0.3, 0.3)
    histogram_probability: float = 0.2
    histogram_strength: float = 0.5
    jitter_probability: float = 0.8
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
    gray_probability: float = 0.25
    crop: float = 60 / 64
    fill: int = 128

    def __post_init__(self) -> None:
        unknown = [name for name in self.transforms if name not in AUTO_AUGMENT]
        if unknown:
            raise ValueError(f"transforms: expected names of {', '.join(AUTO_AUGMENT)}, got {', '.join(unknown)}")
        if len(set(self.transforms)) != len(self.transforms):
            raise ValueError(f"transforms: expected each name once, got {', '.join(self.transforms)}")
        if self.num_transforms < 0 or (self.transforms and self.num_transforms > len(self.transforms)):
            raise ValueError(
                f"num_transforms: expected 0 to {len(self.transforms)}, the transforms, got {self.num_transforms}"
            )
        for field in fields(self):
            if field.name.endswith("_probability"):
                self._require(field.name, getattr(self, field.name), 0, 1)
        limits: dict[str, float] = {"shear": 4, "elastic_shear": 4, "translate": 1, "rotate": 360}
        limits |= {"solarize": 256, "posterize": 8}
        limits |= dict.fromkeys(("contrast", "color", "brightness", "sharpness"), FACTOR_LIMIT)
        limits |= dict.fromkeys(("cutout", "sample_pairing"), 1)
        for name, most in limits.items():
            low, high = getattr(self, name)
            least = -most if name in ("shear", "elastic_shear", "translate", "rotate") else 0
            self._require(name, low, least, most)
            self._require(name, high, low, most)
        self._require("elastic_displacement", self.elastic_displacement, 0, 0.5)
        self._require("histogram_strength", self.histogram_strength, 0, 1)
        for strength, most in zip(self.jitter, (3, 3, 3, 0.5), strict=True):
            self._require("jitter", strength, 0, most)
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop: expected above 0 and at most 1, got {self.crop}")
        self._require("fill", self.fill, 0, 255)

    @staticmethod
    def _require(name: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high:
            raise ValueError(f"{name}: expected {low:g} to {high:g}, got {value}")

    def plan(
        self,
        batch: int,
        rows: int,
        cols: int,
        patch_size: int,
        *,
        channels: int,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> AugmentationPlan:
        """Draw the transforms of batch * rows * cols patches of ``patch_size`` pixels a side.

        channels: channels of the images, 1 or 3; transforms of colour are left out for 1.
        generator: the plan is drawn on its device and does not depend on ``device``; None takes the CPU's default.
        device: device of the plan; by default that on which it was drawn.
        """
        draw = _Draw(batch * rows * cols, patch_size, generator)
        steps = [
            *self._auto_augment(draw, channels),
            *self._elastic(draw),
            *self._histogram(draw, channels),
            *self._jitter(draw, channels),
        ]
        if channels == 3 and self.gray_probability > 0:
            steps.append(draw.step(Transform.GRAY, happens=draw.happens(self.gray_probability)))
        side = math.floor(self.crop * patch_size)
        if 0 < side < patch_size:
            corner = [draw.whole(patch_size - side + 1) for _ in range(2)]
            steps.append(draw.step(Transform.CROP, *corner, torch.full_like(corner[0], side)))
        if not steps:
            empty = AugmentationPlan.empty(batch, rows, cols, device=torch.device(device or draw.device))
            return empty._replace(fill=self.fill)

        grid = batch, rows, cols
        codes, parameters = (
            torch.unflatten(torch.stack(values, dim=1), 0, grid) for values in zip(*steps, strict=True)
        )
        partners = displacements = None
        if "sample_pairing" in self.transforms and self.num_transforms > 0:
            partners = draw.whole(max(draw.count, 1)).view(grid)
        if self.elastic_probability > 0:
            reach = self.elastic_displacement * patch_size
            displacements = torch.unflatten(draw.between(-reach, reach, 2, NODES, NODES), 0, grid)
        plan = AugmentationPlan(codes, parameters, partners, displacements, self.fill)
        if device is None or torch.device(device).type == draw.device.type == "cpu":
            return plan
        if draw.device.type == "cpu" and torch.device(device).type == "cuda":
            # Pinned memory, so that the CPU does not wait for the device.
            plan = plan.pin_memory()
        return plan.to(device)

    def _auto_augment(self, draw: _Draw, channels: int) -> list[tuple[Tensor, Tensor]]:
        names = [name for name in self.transforms if channels == 3 or name not in _COLORFUL]
        number = min(self.num_transforms, len(names))
        if number == 0:
            return []
        ranges = [self._magnitudes(name, draw.side) for name in names]
        low, high = torch.tensor(ranges, device=draw.device).unbind(1)
        codes = torch.tensor([Transform[name.upper()] for name in names], dtype=torch.uint8, device=draw.device)
        steps = []
        for chosen in draw.distinct(len(names), number).unbind(1):
            parameters = draw.between(0, 1, PARAMETERS)
            magnitude = low[chosen] + (high[chosen] - low[chosen]) * parameters[:, 0]
            code = codes[chosen]
            # The centre of the cutout may be anywhere in the patch.
            cut = code == Transform.CUTOUT
            side = magnitude.round()
            places = (parameters[:, 1:] * draw.side).floor() - (side / 2).floor()[:, None]
            magnitude = torch.where(code == Transform.POSTERIZE, magnitude.floor(), magnitude)
            parameters = torch.where(
                cut[:, None],
                torch.cat([places, side[:, None]], dim=1),
                torch.nn.functional.pad(magnitude[:, None], (0, PARAMETERS - 1)),
            )
            steps.append((code, parameters))
        return steps

    def _magnitudes(self, name: str, side: int) -> Range:
        """Return the range of a transform's first parameter, in the plan's unit for it."""
        if name not in _RANGES:
            return 0.0, 0.0
        low, high = getattr(self, _RANGES[name])
        if name == "posterize":
            return low, math.nextafter(high + 1, low)  # Rounded down to whole bits, all equally likely.
        scale = side if name in ("translate_x", "translate_y", "cutout") else 1
        return low * scale, high * scale

    def _elastic(self, draw: _Draw) -> list[tuple[Tensor, Tensor]]:
        if self.elastic_probability == 0:
            return []
        happens = draw.happens(self.elastic_probability)
        steps = [draw.step(Transform.ELASTIC, happens=happens)]
        if self.elastic_shear != (0, 0):
            shear = draw.between(*self.elastic_shear)
            along = torch.where(draw.happens(0.5), int(Transform.SHEAR_X), int(Transform.SHEAR_Y))
            steps.append(draw.step(along, shear, happens=happens))
        return steps

    def _histogram(self, draw: _Draw, channels: int) -> list[tuple[Tensor, Tensor]]:
        if self.histogram_probability == 0:
            return []
        happens = draw.happens(self.histogram_probability)
        bends = draw.between(-self.histogram_strength, self.histogram_strength, channels)
        return [draw.step(Transform.TONE_CURVE, *bends.unbind(1), happens=happens)]

    def _jitter(self, draw: _Draw, channels: int) -> list[tuple[Tensor, Tensor]]:
        changes = [0, 1] if channels == 1 else [0, 1, 2, 3]
        changes = [change for change in changes if self.jitter[change] > 0]
        if self.jitter_probability == 0 or not changes:
            return []
        happens = draw.happens(self.jitter_probability)
        strength = torch.tensor([self.jitter[change] for change in changes], device=draw.device)
        middle = torch.tensor([0.0 if change == 3 else 1.0 for change in changes], device=draw.device)
        least = torch.tensor([-0.5 if change == 3 else 0.0 for change in changes], device=draw.device)
        amounts = torch.maximum(middle + strength * draw.between(-1, 1, len(changes)), least)
        codes = torch.tensor([_JITTERS[change] for change in changes], device=draw.device)
        order = draw.distinct(len(changes), len(changes))
        return [
            draw.step(codes[change], amounts.gather(1, change[:, None])[:, 0], happens=happens)
            for change in order.unbind(1)
        ]


class _Draw:
    """Random numbers for ``count`` patches, with one row of a tensor for each."""

    def __init__(self, count: int, side: int, generator: torch.Generator | None) -> None:
        self.count, self.side, self.generator = count, side, generator
        self.device = torch.device("cpu") if generator is None else generator.device

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """Draw [count, *shape] float32, uniform in [low, high)."""
        unit = torch.rand(self.count, *shape, generator=self.generator, device=self.device)
        return low + (high - low) * unit

    def happens(self, probability: float) -> Tensor:
        """Draw [count] bool."""
        return self.between(0, 1) < probability

    def whole(self, end: int) -> Tensor:
        """Draw [count] int64, uniform in [0, end)."""
        return torch.randint(end, (self.count,), generator=self.generator, device=self.device)

    def distinct(self, choices: int, number: int) -> Tensor:
        """Draw [count, number] int64, distinct in [0, choices), in random order."""
        return self.between(0, 1, choices).topk(number, dim=1).indices

    def step(self, code: Tensor | int, *parameters: Tensor, happens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return one transform of each patch: codes [count], NONE unless it happens, and parameters [count, 3]."""
        codes = torch.as_tensor(code, device=self.device).expand(self.count)
        if happens is not None:
            codes = torch.where(happens, codes, int(Transform.NONE))
        given = torch.zeros(self.count, PARAMETERS, device=self.device)
        for index, parameter in enumerate(parameters):
            given[:, index] = parameter
        return codes.to(torch.uint8), given
