// The SIMD layer: vectors of one cache line through the compiler's vector extensions, and conversions between the
// storage types and the type that kernels compute in. Included only by sources that are compiled once per instruction
// set level, inside their CPC_ISA namespace, so that every level has its own copy.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/half.h"
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
inline float widen(Half v) { return static_cast<float>(std::bit_cast<HostHalf>(v.bits)); }

// --- And back, rounding to nearest even ---

template <class Out, class Real>
inline Out narrow(Real v) {
  if constexpr (sizeof(Out) >= 4) {
    return static_cast<Out>(v);
  } else if constexpr (__is_same(Out, Half)) {
    return Half{std::bit_cast<uint16_t>(static_cast<HostHalf>(v))};
  } else {
    const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(v));
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;  // Rounding could carry a NaN into infinity.
    return BFloat16{static_cast<uint16_t>(nan ? 0x7fc0 : rounded)};
  }
}

// Written by hand, because the compiler converts to half element by element, and to bfloat16 in too many steps.
#if defined(__AVX2__)
template <class Out>
inline __m128i narrow_vector(__m256 v) {
  if constexpr (__is_same(Out, Half)) {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  } else {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i wide = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
  }
}
#endif
#if defined(__AVX512F__)
template <class Out>
inline __m256i narrow_vector(__m512 v) {
  if constexpr (__is_same(Out, Half)) {
    return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
  } else {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(rounded, 16), _mm512_set1_epi32(0x7fc0)));
  }
}
#endif

template <class Out, class Real>
inline void narrow(Out* out, const Real* in, int64_t n) {
  if constexpr (sizeof(Out) == 2 && __is_same(Real, float)) {
#if defined(__AVX512F__)
    for (; n >= 16; n -= 16, in += 16, out += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow_vector<Out>(_mm512_loadu_ps(in)));
#endif
#if defined(__AVX2__)
    for (; n >= 8; n -= 8, in += 8, out += 8)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out), narrow_vector<Out>(_mm256_loadu_ps(in)));
#endif
  }
  for (int64_t i = 0; i < n; ++i) out[i] = narrow<Out>(in[i]);
}

// --- Bytes, scaled ---

#if defined(__AVX2__)
// Floats per register.
#if defined(__AVX512F__)
constexpr int64_t kFloatLanes = 16;
#else
constexpr int64_t kFloatLanes = 8;
#endif

// out[i] = scale * in[i] + shift for Width bytes from `in` on, or, mirrored, in[-i]. Width is 8 or kFloatLanes. The
// compiler would widen in two steps, through 16 bits, in parts of a register.
template <int64_t Width, bool kMirrored>
inline void scale_bytes(float* __restrict out, const uint8_t* __restrict in, float scale, float shift) {
  __m128i bytes = _mm_setzero_si128();
  std::memcpy(&bytes, kMirrored ? in - (Width - 1) : in, Width);
  if constexpr (kMirrored)
    bytes = _mm_shuffle_epi8(bytes, _mm_sub_epi8(_mm_set1_epi8(Width - 1),
                                                 _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)));
#if defined(__AVX512F__)
  if constexpr (Width == 16) {
    const __m512 v = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
    return _mm512_storeu_ps(out, _mm512_fmadd_ps(v, _mm512_set1_ps(scale), _mm512_set1_ps(shift)));
  }
#endif
  const __m256 v = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes));
  _mm256_storeu_ps(out, _mm256_fmadd_ps(v, _mm256_set1_ps(scale), _mm256_set1_ps(shift)));
}
#endif

// --- Copies ---

// Copies `bytes` bytes of cached memory in vectors of Width bytes, of which the last two may overlap. `bytes` must be
// at least Width.
template <int64_t Width>
inline void copy_vectors(char* __restrict out, const char* __restrict in, int64_t bytes) {
  typedef char V __attribute__((vector_size(Width)));
  const auto copy = [&](int64_t at) {
    V v;
    std::memcpy(&v, in + at, Width);
    std::memcpy(out + at, &v, Width);
  };
  for (int64_t at = 0; at < bytes - Width; at += Width) copy(at);
  copy(bytes - Width);
}

// Calls use(copy) with a function copy(out, in) that copies `bytes` bytes of cached memory. It is for many short runs
// of one length, where memcpy would cost a call and a dispatch by length for each. The most common lengths are
// compile-time constants.
template <class Use>
void with_copy(int64_t bytes, const Use& use) {
  const auto fixed = [&](auto n) {
    use([](char* out, const char* in) { copy_vectors<64>(out, in, decltype(n)::value); });
  };
  const auto at_least = [&](auto width) {
    use([bytes](char* out, const char* in) { copy_vectors<decltype(width)::value>(out, in, bytes); });
  };
  switch (bytes) {
    case 64: return fixed(std::integral_constant<int64_t, 64>{});
    case 128: return fixed(std::integral_constant<int64_t, 128>{});
    case 256: return fixed(std::integral_constant<int64_t, 256>{});
    default: break;
  }
  if (bytes >= 64) return at_least(std::integral_constant<int64_t, 64>{});
  if (bytes >= 32) return at_least(std::integral_constant<int64_t, 32>{});
  if (bytes >= 16) return at_least(std::integral_constant<int64_t, 16>{});
  if (bytes >= 8) return at_least(std::integral_constant<int64_t, 8>{});
  if (bytes >= 4) return at_least(std::integral_constant<int64_t, 4>{});
  at_least(std::integral_constant<int64_t, 2>{});
}

// Copies with non-temporal stores, for results that are too large to stay in the cache: memory is written without being
// read first. `out` must be 16-byte aligned and `bytes` a multiple of 16.
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
  std::memcpy(out, in, bytes);
#endif
}

// Makes non-temporal stores visible to other threads.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace cpc::CPC_ISA
