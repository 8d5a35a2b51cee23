// The microkernel of every matrix product on the CPU: a tile of the result, held in registers, over a run of its inner
// dimension ("depth"). Each value of the left operand is broadcast to a register and multiplied with registers of the
// right operand, which is packed in panels: for each step of depth the tile's columns, one after another.
// Included only by sources that are compiled once per instruction set level.
//
// The type that a tile multiplies is an Element: float, double, or, where the processor can multiply it, BFloat16 in
// pairs of depth steps, summed in float.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "core/simd.h"

namespace cpc::CPC_ISA {

#if defined(__AVX512F__)
constexpr int64_t kRegisterBytes = 64;
constexpr int kTileVectors = 4;  // 24 of 32 registers hold the tile.
#elif defined(__AVX2__)
constexpr int64_t kRegisterBytes = 32;
constexpr int kTileVectors = 2;  // 12 of 16 registers.
#else
constexpr int64_t kRegisterBytes = 16;
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;
// Multiplications and additions that one thread does in a nanosecond, roughly; used to estimate how many threads a loop
// is worth.
constexpr double kFlopsPerNanosecond = 32;

#if defined(__AVX512BF16__)
constexpr bool kMultipliesBFloat16 = true;
#else
constexpr bool kMultipliesBFloat16 = false;
#endif

// Calls work with a value of the floating type that `dtype` names. At the bfloat16 level there are kernels of that type
// only, see isa.h.
template <class Work>
void with_floating_of_level(DType dtype, const Work& work) {
#if defined(__AVX512BF16__) && !defined(CPC_ONE_ISA)
  static_cast<void>(dtype);
  work(BFloat16{});
#else
  with_floating(dtype, work);
#endif
}

template <class T>
struct RegisterOf {
  typedef T type __attribute__((vector_size(kRegisterBytes)));
};
template <class T>
using Register = typename RegisterOf<T>::type;
template <class T>
constexpr int64_t kRegisterLanes = kRegisterBytes / sizeof(T);

template <class T>
inline Register<T> load_register(const T* from) {
  Register<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
inline void store_register(T* to, Register<T> v) {
  std::memcpy(to, &v, sizeof v);
}

// The type as which values of a storage type are multiplied; below, the type of their sums and the number of depth
// steps per multiplication.
template <class Storage>
struct ElementOf {
  using type = std::conditional_t<std::is_same_v<Storage, BFloat16> && kMultipliesBFloat16, BFloat16, float>;
};
template <>
struct ElementOf<double> {
  using type = double;
};
template <class Storage>
using Element = typename ElementOf<Storage>::type;
template <class E, class Storage>
inline E to_element(Storage v) {
  if constexpr (std::is_same_v<E, Storage>)
    return v;
  else
    return widen(v);
}
template <class E>
using Sum = std::conditional_t<std::is_same_v<E, double>, double, float>;
template <class E>
constexpr int64_t kDepthStep = std::is_same_v<E, BFloat16> ? 2 : 1;
// Columns of a register, and of a full tile.
template <class E>
constexpr int64_t kLaneColumns = kRegisterLanes<Sum<E>>;
template <class E>
constexpr int64_t kTileColumns = kTileVectors * kLaneColumns<E>;

template <class E>
constexpr int64_t padded_depth(int64_t depth) {
  return (depth + kDepthStep<E> - 1) / kDepthStep<E> * kDepthStep<E>;
}

// sum + left * right, with one step of depth (a pair where E is BFloat16) of the left operand at `left` in all lanes.
// Every lane is one chain of fused multiply-adds over the depth, whatever the tile.
template <class E>
inline Register<Sum<E>> multiply_add(Register<Sum<E>> sum, Register<Sum<E>> left, Register<Sum<E>> right) {
#if defined(__AVX512BF16__)
  if constexpr (std::is_same_v<E, BFloat16>)
    return (Register<Sum<E>>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
#endif
  return sum + left * right;  // Contracted to one instruction where there is one.
}

// A value in all lanes. Subtracting zero is optimised away; adding it would be carried out, because it changes -0.
template <class T>
inline Register<T> in_all_lanes(T v) {
  return v - Register<T>{};
}
template <class E>
inline Register<Sum<E>> broadcast(const E* left) {
  Sum<E> v;
  std::memcpy(&v, left, sizeof v);
  return in_all_lanes(v);
}
#if defined(__AVX512F__)
template <>
inline Register<float> broadcast<BFloat16>(const BFloat16* left) {
  int32_t pair;
  std::memcpy(&pair, left, sizeof pair);
  return (Register<float>)_mm512_set1_epi32(pair);
}
template <>
inline Register<float> broadcast<float>(const float* left) {
  return (Register<float>)_mm512_set1_ps(*left);
}
#endif

// Interleaves the values of two rows.
template <class E>
void interleave(E* __restrict to, const E* __restrict first, const E* __restrict second, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    to[2 * i] = first[i];
    to[2 * i + 1] = second[i];
  }
}

#if defined(__AVX512BF16__)
// Rounds the first `count` lanes of two rows (the others become 0) and stores them twice: as rows `pitch` values apart,
// and interleaved in `pairs`.
inline void round_pair(Register<float> first, Register<float> second, int64_t count, BFloat16* rows, int64_t pitch,
                       BFloat16* pairs) {
  const __mmask16 there = count >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1u << count) - 1);
  const auto round = [there](Register<float> v) { return (__m256i)_mm512_maskz_cvtneps_pbh(there, (__m512)v); };
  const __m256i low = round(first), high = round(second);
  std::memcpy(rows, &low, sizeof low);
  std::memcpy(rows + pitch, &high, sizeof high);
  const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  std::memcpy(pairs, &both, sizeof both);
}
#endif

// A tile of the result in registers, where it stays only if all that uses it is inlined.
template <class E, int Rows, int Vectors>
struct Tile {
  using R = Register<Sum<E>>;
  R sums[Rows][Vectors];

  [[gnu::always_inline]] void clear() {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[r][v] = R{};
  }
  // Rows are `pitch` values apart in memory.
  [[gnu::always_inline]] void load(const Sum<E>* from, int64_t pitch) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) std::memcpy(&sums[r][v], from + r * pitch + v * kLaneColumns<E>, sizeof(R));
  }
  [[gnu::always_inline]] void add(const Sum<E>* from, int64_t pitch) {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[r][v] += load_register(from + r * pitch + v * kLaneColumns<E>);
  }
  [[gnu::always_inline]] void store(Sum<E>* to, int64_t pitch) const {
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) std::memcpy(to + r * pitch + v * kLaneColumns<E>, &sums[r][v], sizeof(R));
  }

  // sums[r] += left(r, k) * panel[k] for k in [0, depth). left(r, k) is the address of a value (of a pair of them);
  // panel rows are kDepthStep * Vectors * kLaneColumns elements, `pitch` apart. depth is a multiple of kDepthStep.
  template <class Left>
  [[gnu::always_inline]] void multiply(const Left& left, const E* __restrict panel, int64_t depth,
                                       int64_t pitch = kDepthStep<E> * Vectors * kLaneColumns<E>) {
    for (int64_t k = 0; k < depth; k += kDepthStep<E>, panel += pitch) {
      R right[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) std::memcpy(&right[v], panel + v * kRegisterLanes<E>, sizeof(R));
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const R value = broadcast<E>(left(r, k));
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sums[r][v] = multiply_add<E>(sums[r][v], value, right[v]);
      }
    }
  }
};

// Calls work(rows, vectors) with compile-time constants of these values, 1 to kTileRows and 1 to kTileVectors.
template <class Work>
inline void with_tile(int64_t rows, int64_t vectors, const Work& work) {
  const auto with_vectors = [&](auto r) {
    switch (vectors) {
      case 1: return work(r, std::integral_constant<int, 1>{});
#if defined(__AVX512F__)
      case 3: return work(r, std::integral_constant<int, 3>{});
      case 4: return work(r, std::integral_constant<int, 4>{});
#endif
      default: return work(r, std::integral_constant<int, 2>{});
    }
  };
  switch (rows) {
    case 1: return with_vectors(std::integral_constant<int, 1>{});
    case 2: return with_vectors(std::integral_constant<int, 2>{});
    case 3: return with_vectors(std::integral_constant<int, 3>{});
    case 4: return with_vectors(std::integral_constant<int, 4>{});
    case 5: return with_vectors(std::integral_constant<int, 5>{});
    default: return with_vectors(std::integral_constant<int, 6>{});
  }
}

}  // namespace cpc::CPC_ISA
