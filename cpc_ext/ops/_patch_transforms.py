"""The transforms of augment_patches in plain PyTorch, one function each, from pixels 0..255 to pixels 0..255.

All of them work in integers, or in float64 where its rounding cannot change a result, so that the kernels give the same
bytes. csrc/augment/transform.h has the same formulas; "as Pillow" means at most one level off its result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

__all__ = ["FACTOR_LIMIT", "NODES", "Patches", "Transform", "transform_patches"]

# Side of the grid of nodes whose displacements an elastic deformation interpolates.
NODES = 4
# Fractional bits of positions between pixels, of factors, of tone curves, and of displacements and their weights.
_PLACE, _FACTOR, _CURVE, _FINE = 16, 20, 22, 12
# Larger magnitudes are clamped to these, up to which arithmetic in 32 bits does not overflow.
_SHEAR_LIMIT, _SHIFT_LIMIT, _TURN_LIMIT, FACTOR_LIMIT, _DISPLACEMENT_LIMIT = 4.0, 4096.0, 360.0, 4.0, 64.0
# Half of the error that a factor's rounding can cause, so that truncation keeps integer results of decimal factors.
_FACTOR_SLACK = 128


class Transform(IntEnum):
    """A transform, by its code in an AugmentationPlan; csrc/augment/transform.h has the same codes.

    Parentheses hold the parameters in order. Patches have side p, pixels are 0..255.
    """

    NONE = 0
    SHEAR_X = 1  # (s): pixel (y, x) comes from (y, x + s * y), nearest, about the patch's corner.
    SHEAR_Y = 2  # (s): from (y + s * x, x).
    TRANSLATE_X = 3  # (d): from (y, x + d), in pixels, nearest.
    TRANSLATE_Y = 4  # (d): from (y + d, x).
    ROTATE = 5  # (degrees), counter-clockwise about the centre, nearest.
    AUTOCONTRAST = 6  # Each channel's least pixel becomes 0 and its largest 255.
    INVERT = 7
    EQUALIZE = 8  # Histogram equalization of each channel.
    SOLARIZE = 9  # (threshold): pixels at or above it are inverted.
    POSTERIZE = 10  # (bits): number of high bits of a pixel that are kept.
    CONTRAST = 11  # (factor) of the distance from the patch's mean luma; 0 gives a flat patch, 1 the patch itself.
    COLOR = 12  # (factor) of the distance from each pixel's luma.
    BRIGHTNESS = 13  # (factor) of the distance from black.
    SHARPNESS = 14  # (factor) of the distance from the smoothed patch.
    CUTOUT = 15  # (top, left, side): a square of fill, which may lie partly outside.
    SAMPLE_PAIRING = 16  # (share) in the mixture of the partner patch, taken before its own transforms.
    ELASTIC = 17  # By the patch's displacements, bilinear.
    TONE_CURVE = 18  # (red, green, blue): x becomes x + s * x * (1 - x), in 0..1, with the channel's s in -1..1.
    HUE = 19  # (turns) of the colour circle.
    GRAY = 20  # Luma in all channels.
    CROP = 21  # (top, left, side): that square moves to the middle of a patch of fill.


@dataclass(frozen=True)
class Patches:
    """N patches to which the same transform is applied.

    pixels: [N, C, p, p], integers 0..255 in int64. parameters: [N, 3] in float64. displacements: [N, 2, NODES, NODES],
    in pixels, y first. partners: [N, C, p, p], like pixels. fill: value of pixels outside of a patch.
    """

    pixels: Tensor
    parameters: Tensor
    displacements: Tensor | None
    partners: Tensor | None
    fill: int

    def parameter(self, index: int, low: float, high: float) -> Tensor:
        """Return a parameter [N, 1, 1, 1], clamped to ``low``..``high``; NaN becomes ``low``."""
        value = self.parameters[:, index].view(-1, 1, 1, 1)
        return torch.where(value > low, torch.where(value < high, value, high), low)

    def integer(self, index: int, low: int, high: int) -> Tensor:
        """Return :meth:`parameter`, rounded down."""
        return self.parameter(index, low, high).floor().long()

    def axes(self) -> tuple[Tensor, Tensor]:
        """Return the rows [p, 1] and columns [1, p] of a patch."""
        at = torch.arange(self.pixels.shape[-1], device=self.pixels.device)
        return at[:, None], at[None, :]


def transform_patches(transform: Transform, patches: Patches) -> Tensor:
    """Apply a transform: pixels [N, C, p, p]. Colour transforms leave patches of one channel unchanged."""
    return _TRANSFORMS[transform](patches)


def _fixed(value: Tensor, bits: int) -> Tensor:
    return (value * (1 << bits) + 0.5).floor().long()


def _luma(pixels: Tensor) -> Tensor:
    """Return the luma [N, 1, p, p] by ITU-R BT.601, as Pillow's convert("L")."""
    if pixels.shape[1] != 3:
        return pixels
    red, green, blue = pixels.chunk(3, dim=1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _blend(base: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """Return base + factor * (pixels - base), as Pillow's Image.blend and its ImageEnhance."""
    whole = (base << _FACTOR) + _fixed(factor, _FACTOR) * (pixels - base)
    return ((whole + _FACTOR_SLACK) >> _FACTOR).clamp(0, 255)


def _factor(patches: Patches) -> Tensor:
    return patches.parameter(0, 0.0, FACTOR_LIMIT)


# --- Transforms of positions ---


def _taken_from(patches: Patches, y: Tensor, x: Tensor) -> Tensor:
    """Return the pixels at positions [N or 1, 1, p, p], and the fill where these lie outside."""
    count, channels, side, _ = patches.pixels.shape
    inside = (y >= 0) & (y < side) & (x >= 0) & (x < side)
    at = (y.clamp(0, side - 1) * side + x.clamp(0, side - 1)).expand(count, channels, side, side)
    taken = patches.pixels.flatten(2).gather(2, at.flatten(2)).view_as(patches.pixels)
    return torch.where(inside, taken, patches.fill)


def _affine(patches: Patches, *matrix: Tensor | float) -> Tensor:
    """Sample nearest neighbours at (a x + b y + c, d x + e y + f), in fixed point as Pillow's transform."""
    a, b, c, d, e, f = (
        value if isinstance(value, Tensor) else patches.parameters.new_full((1, 1, 1, 1), value) for value in matrix
    )
    rows, columns = patches.axes()
    x = _fixed(a, _PLACE) * columns + _fixed(b, _PLACE) * rows + _fixed(c + a * 0.5 + b * 0.5, _PLACE)
    y = _fixed(d, _PLACE) * columns + _fixed(e, _PLACE) * rows + _fixed(f + d * 0.5 + e * 0.5, _PLACE)
    return _taken_from(patches, y >> _PLACE, x >> _PLACE)


def _shear_x(patches: Patches) -> Tensor:
    return _affine(patches, 1.0, patches.parameter(0, -_SHEAR_LIMIT, _SHEAR_LIMIT), 0.0, 0.0, 1.0, 0.0)


def _shear_y(patches: Patches) -> Tensor:
    return _affine(patches, 1.0, 0.0, 0.0, patches.parameter(0, -_SHEAR_LIMIT, _SHEAR_LIMIT), 1.0, 0.0)


def _translate_x(patches: Patches) -> Tensor:
    return _affine(patches, 1.0, 0.0, patches.parameter(0, -_SHIFT_LIMIT, _SHIFT_LIMIT), 0.0, 1.0, 0.0)


def _translate_y(patches: Patches) -> Tensor:
    return _affine(patches, 1.0, 0.0, 0.0, 0.0, 1.0, patches.parameter(0, -_SHIFT_LIMIT, _SHIFT_LIMIT))


def _rotate(patches: Patches) -> Tensor:
    angle = torch.deg2rad(patches.parameter(0, -_TURN_LIMIT, _TURN_LIMIT))
    cos, sin = angle.cos(), angle.sin()
    middle = patches.pixels.shape[-1] / 2
    return _affine(patches, cos, -sin, middle - cos * middle + sin * middle, sin, cos, middle - (sin + cos) * middle)


def _crop(patches: Patches) -> Tensor:
    p = patches.pixels.shape[-1]
    side = patches.integer(2, 1, p)
    top, left = (torch.minimum(patches.integer(i, 0, p), p - side) for i in (0, 1))
    rows, columns = (axis - (p - side) // 2 for axis in patches.axes())
    inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
    return _taken_from(patches, torch.where(inside, top + rows, -1), left + columns)


def _elastic(patches: Patches) -> Tensor:
    if patches.displacements is None:
        return patches.pixels
    side = patches.pixels.shape[-1]
    one = 1 << _FINE
    limit = _DISPLACEMENT_LIMIT
    nodes = patches.displacements
    nodes = _fixed(torch.where(nodes > -limit, torch.where(nodes < limit, nodes, limit), -limit), _FINE)
    # The nodes span the patch from edge to edge; a pixel is its centre.
    place = (2 * torch.arange(side, device=nodes.device) + 1) * (NODES - 1)
    cell = place // (2 * side)
    weight = (place % (2 * side) * one + side) // (2 * side)

    def between(low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
        return (low * (one - weight) + high * weight + one // 2) >> _FINE

    rows = between(nodes[:, :, cell], nodes[:, :, cell + 1], weight[:, None])
    shifts = between(rows[..., cell], rows[..., cell + 1], weight)
    y, x = ((axis << _FINE) + shift.unsqueeze(1) for axis, shift in zip(patches.axes(), shifts.unbind(1), strict=True))
    in_y, in_x = y & (one - 1), x & (one - 1)
    y0, x0 = y >> _FINE, x >> _FINE

    def corner(down: int, right: int) -> Tensor:
        return _taken_from(patches, (y0 + down).clamp(0, side - 1), (x0 + right).clamp(0, side - 1))

    upper, lower = (corner(down, 0) * (one - in_x) + corner(down, 1) * in_x for down in (0, 1))
    return (upper * (one - in_y) + lower * in_y + (1 << (2 * _FINE - 1))) >> (2 * _FINE)


def _cutout(patches: Patches) -> Tensor:
    limit = int(_SHIFT_LIMIT)
    top, left, side = (patches.integer(i, -limit, limit) for i in range(3))
    rows, columns = patches.axes()
    cut = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
    return torch.where(cut, patches.fill, patches.pixels)


# --- Transforms of values ---


def _autocontrast(patches: Patches) -> Tensor:
    low = patches.pixels.amin((2, 3), keepdim=True)
    span = patches.pixels.amax((2, 3), keepdim=True) - low
    return torch.where(span > 0, (patches.pixels - low) * 255 // span.clamp(min=1), patches.pixels)


def _invert(patches: Patches) -> Tensor:
    return 255 - patches.pixels


def _equalize(patches: Patches) -> Tensor:
    flat = patches.pixels.flatten(2)
    count = flat.shape[2]
    histogram = flat.new_zeros(*flat.shape[:2], 256).scatter_add_(2, flat, torch.ones_like(flat))
    last = histogram.gather(2, flat.amax(2, keepdim=True))
    step = (count - last) // 255
    before = histogram.cumsum(2) - histogram
    table = ((step // 2 + before) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(2, flat), flat).view_as(patches.pixels)


def _solarize(patches: Patches) -> Tensor:
    return torch.where(patches.pixels < patches.parameter(0, 0.0, 256.0), patches.pixels, 255 - patches.pixels)


def _posterize(patches: Patches) -> Tensor:
    dropped = 8 - patches.integer(0, 0, 8)
    return patches.pixels >> dropped << dropped


def _contrast(patches: Patches) -> Tensor:
    count = patches.pixels[0, 0].numel()
    mean = (2 * _luma(patches.pixels).sum((1, 2, 3), keepdim=True) + count) // (2 * count)
    return _blend(mean, patches.pixels, _factor(patches))


def _color(patches: Patches) -> Tensor:
    return _blend(_luma(patches.pixels), patches.pixels, _factor(patches))


def _brightness(patches: Patches) -> Tensor:
    return _blend(torch.zeros_like(patches.pixels), patches.pixels, _factor(patches))


def _sharpness(patches: Patches) -> Tensor:
    smooth = patches.pixels.clone()
    if patches.pixels.shape[-1] > 2:
        windows = patches.pixels.unfold(2, 3, 1).unfold(3, 3, 1)
        # Thirteenths are never halfway between two levels.
        smooth[..., 1:-1, 1:-1] = (windows.sum((4, 5)) + 4 * windows[..., 1, 1] + 6) // 13
    return _blend(smooth, patches.pixels, _factor(patches))


def _sample_pairing(patches: Patches) -> Tensor:
    if patches.partners is None:
        return patches.pixels
    return _blend(patches.pixels, patches.partners, patches.parameter(0, 0.0, 1.0))


def _tone_curve(patches: Patches) -> Tensor:
    bends = torch.cat([patches.parameter(channel, -1.0, 1.0) for channel in range(patches.pixels.shape[1])], dim=1)
    bends = (bends * ((1 << _CURVE) / 255) + 0.5).floor().long()
    x = patches.pixels
    return ((x << _CURVE) + bends * x * (255 - x) + (1 << (_CURVE - 1))) >> _CURVE


def _gray(patches: Patches) -> Tensor:
    return _luma(patches.pixels).expand_as(patches.pixels)


def _hue(patches: Patches) -> Tensor:
    """Turn the hue, with hue, saturation and value as integers up to 255, as in Pillow's "HSV"."""
    if patches.pixels.shape[1] != 3:
        return patches.pixels
    red, green, blue = patches.pixels.unbind(1)
    value = patches.pixels.amax(1)
    chroma = value - patches.pixels.amin(1)
    span = chroma.clamp(min=1)
    is_red, is_green = red == value, green == value
    sixths = torch.where(is_red, green - blue, torch.where(is_green, 2 * chroma + blue - red, 4 * chroma + red - green))
    sixths = torch.where(sixths < 0, sixths + 6 * chroma, sixths)
    hue = torch.where(chroma > 0, sixths * 255 // (6 * span), 0)
    # Where the hue is a whole number, Pillow's arithmetic in single precision may end up just below it.
    short_red, short_green, short_blue = ((value - c).float() / span.float() for c in (red, green, blue))
    turned = torch.where(
        is_red,
        (short_blue - short_green).double(),
        torch.where(is_green, 2 + short_red.double() - short_blue, 4 + short_green.double() - short_red),
    ).float()
    rounded = ((turned.double() / 6 + 1).fmod(1).float().double() * 255).long()
    hue = torch.where((chroma > 0) & (sixths * 255 % (6 * span) == 0), rounded, hue)
    saturation = chroma * 255 // value.clamp(min=1)

    shift = (patches.parameter(0, -1.0, 1.0) * 255).trunc().long().view(-1, 1, 1)
    hue = (hue + shift) & 255
    sector, part = hue * 6 // 255, hue * 6 % 255
    whole = 255 * 255

    def level(gone: Tensor) -> Tensor:
        """Return value * (1 - gone / 255^2), rounded; odd denominators have no ties."""
        return (2 * value * (whole - gone) + whole) // (2 * whole)

    least, falling, rising = level(255 * saturation), level(saturation * part), level(saturation * (255 - part))
    sector = (sector % 6).unsqueeze(0)
    levels = torch.stack([value, falling, rising, least])
    # For each channel and sector, which of these levels it takes.
    order = torch.tensor([[0, 1, 3, 3, 2, 0], [2, 0, 0, 1, 3, 3], [3, 3, 2, 0, 0, 1]], device=levels.device)
    return torch.stack([levels.gather(0, channel[sector]).squeeze(0) for channel in order], dim=1)


_TRANSFORMS: dict[Transform, Callable[[Patches], Tensor]] = {
    Transform.NONE: lambda patches: patches.pixels,
    Transform.SHEAR_X: _shear_x,
    Transform.SHEAR_Y: _shear_y,
    Transform.TRANSLATE_X: _translate_x,
    Transform.TRANSLATE_Y: _translate_y,
    Transform.ROTATE: _rotate,
    Transform.AUTOCONTRAST: _autocontrast,
    Transform.INVERT: _invert,
    Transform.EQUALIZE: _equalize,
    Transform.SOLARIZE: _solarize,
    Transform.POSTERIZE: _posterize,
    Transform.CONTRAST: _contrast,
    Transform.COLOR: _color,
    Transform.BRIGHTNESS: _brightness,
    Transform.SHARPNESS: _sharpness,
    Transform.CUTOUT: _cutout,
    Transform.SAMPLE_PAIRING: _sample_pairing,
    Transform.ELASTIC: _elastic,
    Transform.TONE_CURVE: _tone_curve,
    Transform.HUE: _hue,
    Transform.GRAY: _gray,
    Transform.CROP: _crop,
}
