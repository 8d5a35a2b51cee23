// The transforms of a patch as arithmetic on single pixels and places, shared by the CPU and the CUDA kernel. It uses
// integers, or floating point where neither rounding nor contraction can change a result, so that both kernels give the
// same bytes as cpc_ext/ops/_patch_transforms.py, which says what each transform means.
#pragma once

#include <cmath>
#include <cstdint>

#include "augment/augment.h"

namespace cpc::augment {

enum class Transform : uint8_t {
  none,
  shear_x,
  shear_y,
  translate_x,
  translate_y,
  rotate,
  autocontrast,
  invert,
  equalize,
  solarize,
  posterize,
  contrast,
  color,
  brightness,
  sharpness,
  cutout,
  sample_pairing,
  elastic,
  tone_curve,
  hue,
  gray,
  crop,
  count
};

// Fractional bits: of places between pixels, of factors, of tone curves, and of displacements and their weights.
constexpr int kPlaceBits = 16, kFactorBits = 20, kCurveBits = 22, kFineBits = 12;
constexpr int32_t kFine = 1 << kFineBits;
// Not less than the error from rounding a factor, half a unit times 255, so that results which are whole for a decimal
// factor stay whole when truncated.
constexpr int32_t kFactorSlack = 128;
// Magnitudes beyond these are clamped to them.
constexpr float kShearLimit = 4, kShiftLimit = 4096, kTurnLimit = 360, kFactorLimit = 4, kDisplacementLimit = 64;

// NaN becomes `low`.
template <class Real>
CPC_HOST_DEVICE inline Real clamp(Real v, Real low, Real high) {
  return v > low ? (v < high ? v : high) : low;
}

// Rounds v to fixed point. In float, v must be below 2^22 units of the last bit, so that adding the half is exact.
template <class Real>
CPC_HOST_DEVICE inline int32_t fixed(Real v, int bits) {
  return static_cast<int32_t>(std::floor(v * static_cast<Real>(1 << bits) + Real(0.5)));
}

CPC_HOST_DEVICE inline int32_t whole(float v, float low, float high) {
  return static_cast<int32_t>(std::floor(clamp(v, low, high)));
}

CPC_HOST_DEVICE inline int32_t to_level(int32_t v) { return v < 0 ? 0 : v > 255 ? 255 : v; }

// --- Pixels ---

// ITU-R BT.601, as Pillow's convert("L").
CPC_HOST_DEVICE inline int32_t luma(int32_t red, int32_t green, int32_t blue) {
  return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16;
}

CPC_HOST_DEVICE inline int32_t factor_of(float v, float most = kFactorLimit) {
  return fixed(clamp(v, 0.0f, most), kFactorBits);
}

// base + factor * (v - base)
CPC_HOST_DEVICE inline int32_t blend(int32_t base, int32_t v, int32_t factor) {
  return to_level(((base << kFactorBits) + factor * (v - base) + kFactorSlack) >> kFactorBits);
}

// The rounded mean luma of `count` pixels, given their sum.
CPC_HOST_DEVICE inline int32_t mean_level(int32_t sum, int32_t count) { return (2 * sum + count) / (2 * count); }

// A pixel of the smoothed patch, given the sum over 3x3 pixels and the middle one, which counts five times.
CPC_HOST_DEVICE inline int32_t smooth(int32_t sum, int32_t middle) { return (sum + 4 * middle + 6) / 13; }

// (v - low) * 255 / span, truncated, where inverse is 1 / span. With the half added, rounding errors cannot cross a
// whole number.
CPC_HOST_DEVICE inline int32_t stretch(int32_t v, int32_t low, float inverse) {
  return static_cast<int32_t>((static_cast<float>((v - low) * 255) + 0.5f) * inverse);
}

// Histogram equalisation: the new level of pixels for which `before` other pixels are darker.
CPC_HOST_DEVICE inline int32_t even_level(int32_t before, int32_t step) {
  const int32_t level = (step / 2 + before) / step;
  return level > 255 ? 255 : level;
}

CPC_HOST_DEVICE inline int32_t solarize_threshold(float v) {
  return static_cast<int32_t>(std::ceil(clamp(v, 0.0f, 256.0f)));
}

CPC_HOST_DEVICE inline int32_t posterize_mask(float bits) { return 0x100 - (1 << (8 - whole(bits, 0, 8))); }

CPC_HOST_DEVICE inline int32_t bend_of(float v) {
  return static_cast<int32_t>(std::floor(clamp(v, -1.0f, 1.0f) * ((1 << kCurveBits) / 255.0) + 0.5));
}

CPC_HOST_DEVICE inline int32_t bend(int32_t v, int32_t bend) {
  return ((v << kCurveBits) + bend * v * (255 - v) + (1 << (kCurveBits - 1))) >> kCurveBits;
}

// --- Hue ---

CPC_HOST_DEVICE inline int32_t hue_shift(float turns) {
  return static_cast<int32_t>(clamp(turns, -1.0f, 1.0f) * 255.0) & 255;
}

// Hue and saturation in 0..255, as Pillow's "HSV" holds them; value is the largest of the three.
struct Color {
  int32_t hue, saturation, value;
  int32_t unsure;  // Not 0 if the hue is whole: Pillow's may be one less, see hue_as_pillow().
};

CPC_HOST_DEVICE inline Color color_of(int32_t red, int32_t green, int32_t blue) {
  const int32_t high = green > blue ? green : blue, low = green < blue ? green : blue;
  const int32_t value = red > high ? red : high, chroma = value - (red < low ? red : low);
  // Selections in place of branches, so that the compiler can vectorise them.
  int32_t sixths = 4 * chroma + red - green;
  sixths = green == value ? 2 * chroma + blue - red : sixths;
  sixths = red == value ? green - blue : sixths;
  sixths += sixths < 0 ? 6 * chroma : 0;
  const int32_t circle = 6 * chroma + static_cast<int32_t>(chroma == 0);
  // Truncated quotients of integers. With the halves added, rounding errors cannot cross a whole number.
  const int32_t hue = static_cast<int32_t>((static_cast<float>(sixths * 255) + 0.5f) / static_cast<float>(circle));
  const int32_t saturation =
      static_cast<int32_t>((static_cast<float>(chroma * 255) + 0.5f) / static_cast<float>(value > 0 ? value : 1));
  const int32_t unsure = static_cast<int32_t>(sixths > 0) & static_cast<int32_t>(hue * circle == sixths * 255);
  return {hue, saturation, value, unsure};
}

// The hue of a pixel that is not grey, by Pillow's arithmetic in single and double precision. It has no product that
// the compiler could contract with a sum.
CPC_HOST_DEVICE inline int32_t hue_as_pillow(int32_t red, int32_t green, int32_t blue) {
  const int32_t high = green > blue ? green : blue, low = green < blue ? green : blue;
  const int32_t value = red > high ? red : high;
  const float chroma = static_cast<float>(value - (red < low ? red : low));
  const float short_red = static_cast<float>(value - red) / chroma;
  const float short_green = static_cast<float>(value - green) / chroma;
  const float short_blue = static_cast<float>(value - blue) / chroma;
  const float sixths = red == value     ? short_blue - short_green
                       : green == value ? static_cast<float>(2.0 + static_cast<double>(short_red) - short_blue)
                                        : static_cast<float>(4.0 + static_cast<double>(short_green) - short_red);
  const double turned = static_cast<double>(sixths) / 6.0 + 1.0;
  const float turns = static_cast<float>(turned - std::floor(turned));
  return static_cast<int32_t>(static_cast<double>(turns) * 255.0);
}

// value * (1 - gone / 255^2), rounded; there are no ties.
CPC_HOST_DEVICE inline int32_t level_without(int32_t value, int32_t gone) {
  constexpr int32_t kWhole = 255 * 255;
  return (value * (kWhole - gone) + kWhole / 2) / kWhole;
}

// Red (0), green (1) or blue (2) of a colour. Uses selections, which the compiler can vectorise.
CPC_HOST_DEVICE inline int32_t channel_of(int channel, int32_t hue, int32_t saturation, int32_t value) {
  const int32_t sixths = hue * 6 / 255, part = hue * 6 - sixths * 255;
  const int32_t falling = level_without(value, saturation * part);
  const int32_t rising = level_without(value, saturation * (255 - part));
  // The sector of the colour circle relative to this channel, counted from a sixth before the channel's own hue: the
  // channel is `value` in sectors 0 and 1, falls in 2, is least in 3 and 4, and rises in 5. A hue of a full turn has
  // `sixths` = 6.
  int32_t sector = sixths + (7 - 2 * channel);
  sector -= sector >= 6 ? 6 : 0;
  sector -= sector >= 6 ? 6 : 0;
  int32_t level = sector == 2 ? falling : level_without(value, saturation * 255);
  level = sector == 5 ? rising : level;
  return sector < 2 ? value : level;
}

// --- Places ---

// (x, y) -> (a x + b y + c, d x + e y + f) of pixel centres, in fixed point: the nearest pixel is the whole part.
struct Affine {
  int32_t a, b, c, d, e, f;
};

CPC_HOST_DEVICE inline Affine affine_of(double a, double b, double c, double d, double e, double f) {
  return {fixed(a, kPlaceBits), fixed(b, kPlaceBits), fixed(c + a * 0.5 + b * 0.5, kPlaceBits),
          fixed(d, kPlaceBits), fixed(e, kPlaceBits), fixed(f + d * 0.5 + e * 0.5, kPlaceBits)};
}

// For the transforms from shear_x to rotate.
CPC_HOST_DEVICE inline Affine affine_of(Transform transform, float parameter, int32_t side) {
  const double shear = clamp(parameter, -kShearLimit, kShearLimit);
  const double shift = clamp(parameter, -kShiftLimit, kShiftLimit);
  switch (transform) {
    case Transform::shear_x: return affine_of(1, shear, 0, 0, 1, 0);
    case Transform::shear_y: return affine_of(1, 0, 0, shear, 1, 0);
    case Transform::translate_x: return affine_of(1, 0, shift, 0, 1, 0);
    case Transform::translate_y: return affine_of(1, 0, 0, 0, 1, shift);
    default: break;
  }
  const double degrees = clamp(parameter, -kTurnLimit, kTurnLimit), middle = side / 2.0;
#if defined(__CUDA_ARCH__)
  // CUDA's cos and sin accept any argument and reduce large ones in local memory; cospi and sinpi do not need to.
  const double c = cospi(degrees / 180), s = sinpi(degrees / 180);
#else
  const double angle = degrees * (3.14159265358979323846 / 180), c = cos(angle), s = sin(angle);
#endif
  return affine_of(c, -s, middle - c * middle + s * middle, s, c, middle - (s + c) * middle);
}

// The square that a crop keeps, and the row and column to which it moves.
struct Crop {
  int32_t top, left, side, at;
};

CPC_HOST_DEVICE inline Crop crop_of(const float* parameters, int32_t side) {
  Crop crop;
  crop.side = whole(parameters[2], 1, side);
  crop.top = whole(parameters[0], 0, side - crop.side);
  crop.left = whole(parameters[1], 0, side - crop.side);
  crop.at = (side - crop.side) / 2;
  return crop;
}

// Rows and columns [top, bottom) x [left, right) that are cut out, within the patch.
struct Cutout {
  int32_t top, left, bottom, right;
};

CPC_HOST_DEVICE inline Cutout cutout_of(const float* parameters, int32_t side) {
  const int32_t top = whole(parameters[0], -kShiftLimit, kShiftLimit);
  const int32_t left = whole(parameters[1], -kShiftLimit, kShiftLimit);
  const int32_t cut = whole(parameters[2], -kShiftLimit, kShiftLimit);
  const auto inside = [side](int32_t v) { return v < 0 ? 0 : v > side ? side : v; };
  return {inside(top), inside(left), inside(top + cut), inside(left + cut)};
}

// --- Elastic deformation ---

CPC_HOST_DEVICE inline int32_t displacement_of(float v) {
  return fixed(clamp(v, -kDisplacementLimit, kDisplacementLimit), kFineBits);
}

// Along one axis: between which nodes a pixel's centre lies, and the weight of the second.
struct Between {
  int32_t node, weight;
};

CPC_HOST_DEVICE inline Between between_nodes(int32_t at, int32_t side) {
  const int32_t place = (2 * at + 1) * static_cast<int32_t>(kNodes - 1), node = place / (2 * side);
  return {node, ((place - node * 2 * side) * kFine + side) / (2 * side)};
}

CPC_HOST_DEVICE inline int32_t mix(int32_t low, int32_t high, int32_t weight) {
  return (low * (kFine - weight) + high * weight + kFine / 2) >> kFineBits;
}

// Along one axis: the two pixels that a sample lies between, repeated beyond the edge, and the weight of the second.
struct Sample {
  int32_t low, high, weight;
};

CPC_HOST_DEVICE inline Sample sample_at(int32_t at, int32_t displacement, int32_t side) {
  const int32_t place = at * kFine + displacement, low = place >> kFineBits;
  const auto inside = [side](int32_t v) { return v < 0 ? 0 : v >= side ? side - 1 : v; };
  return {inside(low), inside(low + 1), place & (kFine - 1)};
}

// The bilinear mix of four pixels, of an upper and a lower row. 255 with 24 fractional bits, and a half, just fits 32
// bits.
CPC_HOST_DEVICE inline int32_t mix_pixels(uint32_t upper_left, uint32_t upper_right, uint32_t lower_left,
                                          uint32_t lower_right, uint32_t right, uint32_t down) {
  const uint32_t upper = upper_left * (kFine - right) + upper_right * right;
  const uint32_t lower = lower_left * (kFine - right) + lower_right * right;
  return static_cast<int32_t>((upper * (kFine - down) + lower * down + (1u << (2 * kFineBits - 1))) >> (2 * kFineBits));
}

}  // namespace cpc::augment
