// Functions of whole registers, exact to the last few bits of the type. Doubles go through the C library lane by lane.
// Included only by sources that are compiled once per instruction set level.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "core/gemm.h"

namespace cpc::CPC_ISA {

using Ints = int32_t __attribute__((vector_size(kRegisterBytes)));
using Bits = uint32_t __attribute__((vector_size(kRegisterBytes)));  // The bits of any number: their sums may wrap.

// Below this, e^x is subnormal and treated as zero.
constexpr float kLowestExponent = -87.3f;

inline Register<float> abs(Register<float> x) { return (Register<float>)((Ints)x & 0x7fffffff); }

// e^x as mantissa * 2^exponent, for x whose result is a normal number. exponent_bits are the bits of exponent + kRound,
// whose low bits are the exponent as an integer.
struct Power {
  Register<float> mantissa;
  Ints exponent_bits;
  Register<float> exponent;
};
constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to integers.

inline Power power_of_e(Register<float> x) {
  using R = Register<float>;
  const R shifted = x * 1.44269504088896341f + kRound;
  const R n = shifted - kRound;
  const R r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts.
  R p = R{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * (r * r) + (r + 1.f), (Ints)shifted, n};
}

#if defined(__AVX512F__)
inline Register<float> scaled_unless_lowest(const Power& power, Register<float> x) {
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(kLowestExponent), _CMP_NLT_UQ);
  return (Register<float>)_mm512_maskz_scalef_ps(kept, (__m512)power.mantissa, (__m512)power.exponent);
}
#endif

// e^x. Zero below kLowestExponent, infinity above 88.7; NaN stays.
inline Register<float> exp(Register<float> x) {
  using R = Register<float>;
#if defined(__AVX512F__)
  // Scaling overflows to infinity by itself, and results below kLowestExponent are discarded.
  const Power power = power_of_e((R)_mm512_min_ps(_mm512_set1_ps(90.f), (__m512)x));
  return scaled_unless_lowest(power, x);
#else
  constexpr float kHighest = 88.7f;
  const Power power = power_of_e(x > kHighest ? R{} + kHighest : x < kLowestExponent ? R{} + kLowestExponent : x);
  // 2^n in two factors, because 2^128 is not a float.
  const Ints exponent = power.exponent_bits - std::bit_cast<int32_t>(kRound), half = exponent >> 1;
  const R scaled = power.mantissa * (R)((half + 127) << 23) * (R)((exponent - half + 127) << 23);
  return x < kLowestExponent ? R{} : x > kHighest ? R{} + INFINITY : scaled;
#endif
}

// e^x for x that is at most 0 or infinite, in fewer instructions than exp. Zero below kLowestExponent; infinity and NaN
// stay.
inline Register<float> exp_below_zero(Register<float> x) {
#if defined(__AVX512F__)
  return scaled_unless_lowest(power_of_e(x), x);
#else
  using R = Register<float>;
  const Power power = power_of_e(x < kLowestExponent ? R{} + kLowestExponent : x);
  // The integer is added to the mantissa's exponent; the shift drops the bits above it.
  const R scaled = (R)((Bits)power.mantissa + (Bits)(power.exponent_bits << 23));
  return x < kLowestExponent ? R{} : x < INFINITY ? scaled : x;
#endif
}

inline Register<float> sigmoid(Register<float> x) { return 1.f / (1.f + exp(-x)); }

inline Register<float> tanh(Register<float> x) {
  using R = Register<float>;
  const R size = x < 0.f ? -x : x, z = x * x;
  R p = R{} - 5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const R large = 1.f - 2.f / (exp(size + size) + 1.f);
  return size < 0.625f ? x + x * z * p : x < 0.f ? -large : large;
}

// The natural logarithm of positive normal numbers and infinity. NaN stays.
inline Register<float> log(Register<float> x) {
  using R = Register<float>;
  // x = m * 2^n with m between the square roots of 1/2 and 2.
  constexpr int32_t kRootOfHalf = 0x3f3504f3, kOne = 0x3f800000;
  const Ints bits = (Ints)((Bits)x + (kOne - kRootOfHalf));
  const R n = __builtin_convertvector((bits >> 23) - 127, R), f = (R)((bits & 0x7fffff) + kRootOfHalf) - 1.f;
  // log(1 + f) = f - f^2 / 2 + s * (f^2 / 2 + r(s^2)), s = f / (2 + f).
  const R s = f / (2.f + f), z = s * s, w = z * z, half_square = 0.5f * f * f;
  const R r = w * (0.40000972152f + w * 0.24279078841f) + z * (0.66666662693f + w * 0.28498786688f);
  const R result = s * (half_square + r) + n * 9.0580006145e-6f - half_square + f + n * 0.69313812256f;
  return x < INFINITY ? result : x;
}

template <class Function>
inline Register<double> by_lane(Register<double> x, const Function& function) {
  for (int64_t i = 0; i < kRegisterLanes<double>; ++i) x[i] = function(x[i]);
  return x;
}
inline Register<double> exp(Register<double> x) {
  return by_lane(x, [](double v) { return std::exp(v); });
}
inline Register<double> exp_below_zero(Register<double> x) { return exp(x); }
inline Register<double> sigmoid(Register<double> x) { return 1. / (1. + exp(-x)); }
inline Register<double> tanh(Register<double> x) {
  return by_lane(x, [](double v) { return std::tanh(v); });
}

}  // namespace cpc::CPC_ISA
