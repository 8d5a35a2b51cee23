// The part of CUDA's half precision that our kernels use, on the host.
#pragma once

#include <bit>
#include <cstdint>

#include "core/half.h"

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half v) { return v.bits; }
inline float __half2float(__half v) { return static_cast<float>(std::bit_cast<cpc::HostHalf>(v.bits)); }
inline __half __float2half_rn(float v) { return {std::bit_cast<uint16_t>(static_cast<cpc::HostHalf>(v))}; }
inline __half __double2half(double v) { return {std::bit_cast<uint16_t>(static_cast<cpc::HostHalf>(v))}; }
