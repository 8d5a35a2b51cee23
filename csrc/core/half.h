// Half precision on the host: the compiler's type, or else our own conversions.
#pragma once

#include <bit>
#include <cstdint>

namespace cpc {

// Rounds to nearest even, bit for bit as processors do. Always inlined: of out-of-line copies the linker would keep
// one, compiled for any instruction set level.
#define CPC_INLINE __attribute__((always_inline)) inline

class SoftHalf {
 public:
  CPC_INLINE explicit SoftHalf(float v) {
    const uint32_t sign = std::bit_cast<uint32_t>(v) >> 16 & 0x8000,
                   magnitude = std::bit_cast<uint32_t>(v) & 0x7fffffff;
    // Adding 0.5 rounds magnitudes below the smallest normal number to a multiple of 2^-24. The others are rounded by
    // adding half a step, less one where the last bit that is kept is even.
    uint32_t rounded = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
    if (magnitude >= 0x38800000) rounded = (magnitude - 0x37fff001 + (magnitude >> 13 & 1)) >> 13;
    if (magnitude >= 0x477ff000) rounded = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    bits_ = static_cast<uint16_t>(sign | rounded);
  }
  CPC_INLINE explicit SoftHalf(double v) : SoftHalf(odd(v)) {}
  CPC_INLINE explicit operator float() const {
    const uint32_t magnitude = (bits_ & 0x7fff) << 13, sign = (bits_ & 0x8000) << 16;
    const bool infinite = magnitude >= 0x0f800000;  // Or not a number.
    const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
    return std::bit_cast<float>(sign | (infinite ? magnitude | 0x7f800000 : scaled));
  }

 private:
  // Rounds to odd, so that rounding the float gives the same as rounding the double: its last bit is set where any bits
  // were cut off.
  CPC_INLINE static float odd(double v) {
    const float near = static_cast<float>(v);
    const uint32_t bits = std::bit_cast<uint32_t>(near);
    if (static_cast<double>(near) == v || near != near || (bits & 0x7fffffff) == 0x7f800000) return near;
    const bool beyond = (near < 0 ? -near : near) > (v < 0 ? -v : v);
    return std::bit_cast<float>((beyond ? bits - 1 : bits) | 1);
  }

  uint16_t bits_;
};
#undef CPC_INLINE

// GCC before 13 names the type differently on ARM; GCC before 12 lacks it on some x86 processors.
#if defined(__aarch64__)
using HostHalf = __fp16;
#elif defined(__FLT16_MAX__)
using HostHalf = _Float16;
#else
using HostHalf = SoftHalf;
#endif

}  // namespace cpc
