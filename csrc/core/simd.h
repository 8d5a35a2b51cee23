// The SIMD layer: vectors of one cache line through the compiler's vector extensions, and conversions between the
// storage types and the type that kernels compute in. Included only by sources that are compiled once per instruction
// set level, inside their CPC_ISA namespace, so that every level has its own copy.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "core/tensor_view.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace cpc::CPC_ISA {

// 64 bytes of T: one AVX-512 register, two AVX ones, four SSE or NEON ones.
template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(64)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
template <class T>
constexpr int64_t kLanes = 64 / sizeof(T);

template <class T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline T sum(Vector<T> v) {
  T total = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

// --- Storage types to the computing type ---

inline float widen(uint8_t v) { return v; }
inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(BFloat16 v) { return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16); }
inline float widen(Half v) { return static_cast<float>(std::bit_cast<_Float16>(v.bits)); }

// --- And back, rounding to nearest even ---

template <class Out, class Real>
inline Out narrow(Real v) {
  if constexpr (sizeof(Out) >= 4) {
    return static_cast<Out>(v);
  } else if constexpr (__is_same(Out, Half)) {
    return Half{std::bit_cast<uint16_t>(static_cast<_Float16>(v))};
  } else {
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(v));
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;  // Rounding could carry a NaN into infinity.
    return BFloat16{static_cast<uint16_t>(nan ? 0x7fc0 : rounded)};
  }
}

template <class Out, class Real>
inline void narrow(Out* out, const Real* in, int64_t n) {
#if defined(__AVX512F__)
  // The compiler converts to half element by element; the instruction takes sixteen.
  if constexpr (__is_same(Out, Half) && __is_same(Real, float)) {
    for (; n >= 16; n -= 16, in += 16, out += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                          _mm512_cvtps_ph(_mm512_loadu_ps(in), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<Out>(in[i]);
}

// --- Copies ---

// Copies `bytes` from memory in the cache. Short runs of a length known only at run time, where memcpy costs a call.
inline void copy_run(char* out, const char* in, int64_t bytes) {
  for (; bytes >= 64; bytes -= 64, in += 64, out += 64) {
    const Vector<char> v = load(in);
    std::memcpy(out, &v, sizeof v);
  }
  if (bytes & 32) {
    std::memcpy(out, in, 32);
    in += 32;
    out += 32;
  }
  if (bytes & 16) {
    std::memcpy(out, in, 16);
    in += 16;
    out += 16;
  }
  if (bytes & 8) {
    std::memcpy(out, in, 8);
    in += 8;
    out += 8;
  }
  if (bytes & 4) {
    std::memcpy(out, in, 4);
    in += 4;
    out += 4;
  }
  if (bytes & 2) {
    std::memcpy(out, in, 2);
    in += 2;
    out += 2;
  }
  if (bytes & 1) *out = *in;
}

// The same past the cache, for results that are too large to be found there later: memory is written without being read
// first. `out` must be 16-byte aligned and `bytes` a multiple of 16.
inline void stream_run(char* out, const char* in, int64_t bytes) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(out) % 64 == 0)
    for (; bytes >= 64; bytes -= 64, in += 64, out += 64)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
#endif
#if defined(__SSE2__)
  for (; bytes > 0; bytes -= 16, in += 16, out += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(out), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
#else
  copy_run(out, in, bytes);
#endif
}

// Makes streamed stores visible to other threads.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace cpc::CPC_ISA
