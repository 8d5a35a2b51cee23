"""Which transforms the patches of a batch get, drawn at random for every patch: CPC v2's patch augmentation.

What is drawn is a plan, small tensors of codes and magnitudes; ``augment_patches`` carries it out while it cuts the
patches, on any device with the same result.
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
# Transforms of colour, which have nothing to do in images of one channel.
_COLORFUL = {"color"}
# The field that holds the range of a transform's magnitude.
_RANGES = {
    **{f"{name}_{axis}": name for name in ("shear", "translate") for axis in "xy"},
    **{name: name for name in (*AUTO_AUGMENT[8:], "rotate")},
}
_JITTERS = (Transform.BRIGHTNESS, Transform.CONTRAST, Transform.COLOR, Transform.HUE)


@dataclass(frozen=True)
class PatchAugmentation:
    """What CPC v2 does to a patch (Hénaff et al. 2019, arXiv 1905.09272), each patch by draws of its own.

    In this order: some of AutoAugment's transforms, each at most once; elastic deformation and shearing; a change of
    the colour histogram; brightness, contrast, saturation and hue in random order; grey; a crop padded back. The paper
    gives the probabilities; AutoAugment's paper its ranges, here as shares of a patch where they were pixels; strengths
    that the papers leave open are marked so. Ranges are (low, high), drawn from evenly.

    transforms: names from AUTO_AUGMENT; () switches all of them off.
    num_transforms: how many of them each patch gets, at random.
    shear: pixels sideways a pixel down. translate: share of the side. rotate: degrees. solarize: threshold, 0..256.
    posterize: bits kept, whole numbers. contrast, color, brightness, sharpness: factors, 1 leaves a patch as it is, at
        most 4. cutout: side of the square as a share of the patch's. sample_pairing: share of the other patch, which is
        any of the batch.
    elastic_probability: of elastic deformation, with a shear along x or y; 0 switches both off.
    elastic_displacement: by how much of the side a node moves at most, each way (open in the paper).
    elastic_shear: range of that shear (open); (0, 0) leaves it out.
    histogram_probability: of bending each channel's tone curve; 0 switches it off.
    histogram_strength: the bend is within ± this, at most 1 (open).
    jitter_probability: of colour jitter; 0 switches it off.
    jitter: factors of brightness, contrast and saturation are within 1 ± these, at least 0; hue turns by up to ± the
        last, in turns of the colour circle, at most 0.5 (open).
    gray_probability: of going grey; 0 switches it off.
    crop: side of the crop that is padded back as a share of the patch's (CPC v1: 60 of 64); 1 switches it off.
    fill: the pixel, 0..255, that comes from outside of a patch.

    Raises ValueError for what is out of these ranges, a name that is none of the list or more transforms than names.
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

        channels: of the images, 1 or 3; what works on colours is left out for 1.
        generator: the plan is drawn on its device and does not depend on ``device``; None takes the CPU's own.
        device: where the plan is to be; by default where it was drawn.
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
            # Without making the CPU wait for what the device is doing.
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
            # The cut square's centre may be anywhere in the patch.
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
        """The range of a transform's first parameter, in what it is measured in there."""
        if name not in _RANGES:
            return 0.0, 0.0
        low, high = getattr(self, _RANGES[name])
        if name == "posterize":
            return low, math.nextafter(high + 1, low)  # Cut off to whole bits, each as likely.
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
    """Random numbers for ``count`` patches, a row of a tensor each."""

    def __init__(self, count: int, side: int, generator: torch.Generator | None) -> None:
        self.count, self.side, self.generator = count, side, generator
        self.device = torch.device("cpu") if generator is None else generator.device

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        """[count, *shape] float32, even in [low, high)."""
        unit = torch.rand(self.count, *shape, generator=self.generator, device=self.device)
        return low + (high - low) * unit

    def happens(self, probability: float) -> Tensor:
        """[count] bool."""
        return self.between(0, 1) < probability

    def whole(self, end: int) -> Tensor:
        """[count] int64 in [0, end)."""
        return torch.randint(end, (self.count,), generator=self.generator, device=self.device)

    def distinct(self, choices: int, number: int) -> Tensor:
        """[count, number] int64, different ones of ``choices`` in random order."""
        return self.between(0, 1, choices).topk(number, dim=1).indices

    def step(self, code: Tensor | int, *parameters: Tensor, happens: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One transform of every patch: codes [count] and parameters [count, 3]; none where it does not happen."""
        codes = torch.as_tensor(code, device=self.device).expand(self.count)
        if happens is not None:
            codes = torch.where(happens, codes, int(Transform.NONE))
        given = torch.zeros(self.count, PARAMETERS, device=self.device)
        for index, parameter in enumerate(parameters):
            given[:, index] = parameter
        return codes.to(torch.uint8), given
