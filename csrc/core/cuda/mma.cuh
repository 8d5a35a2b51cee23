// Matrix products on tensor cores, D += A B for tiles of 16 x 8, and loads of their operands from shared memory.
// A warp holds each tile in fragments. With g = lane / 4 and t = lane % 4 (PTX ISA, "Matrix fragments for mma"):
//   D, 16 x 8 float:
//     d[0], d[1] = D[g][2t], D[g][2t + 1],
//     d[2], d[3] = D[g + 8][2t], D[g + 8][2t + 1].
//   A, 16 x 16 of 16 bits, the lower column in the lower half of the register:
//     a[0] = A[g][2t .. 2t + 1],
//     a[1] = A[g + 8][2t .. 2t + 1],
//     a[2] = A[g][2t + 8 .. 2t + 9],
//     a[3] = A[g + 8][2t + 8 .. 2t + 9].
//   B, 16 x 8 of 16 bits, the lower row in the lower half:
//     b[0] = B[2t .. 2t + 1][g],
//     b[1] = B[2t + 8 .. 2t + 9][g].
//   A, 16 x 8 of tf32:
//     a[0] = A[g][t],
//     a[1] = A[g + 8][t],
//     a[2] = A[g][t + 4],
//     a[3] = A[g + 8][t + 4].
//   B, 8 x 8 of tf32:
//     b[0] = B[t][g],
//     b[1] = B[t + 4][g].
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "core/cuda/shared.cuh"
#include "core/tensor_view.h"

#if defined(CPC_CUDA_EMULATION)
#include "core/half.h"
#endif

namespace cpc::cuda {

#if defined(CPC_CUDA_EMULATION)

namespace emulation {

inline float tensor_core_operand(uint32_t bits, int half, BFloat16) {
  return std::bit_cast<float>((bits >> (16 * half) & 0xffff) << 16);
}
inline float tensor_core_operand(uint32_t bits, int half, Half) {
  return static_cast<float>(std::bit_cast<HostHalf>(static_cast<uint16_t>(bits >> (16 * half))));
}
// Tensor cores ignore the lower 13 bits of a float.
inline float tensor_core_operand(uint32_t bits, int, float) { return std::bit_cast<float>(bits & 0xffffe000u); }

// `sum` plus the products a[i] * b[i * b_pitch], truncated as in one step of a tensor core: all terms are aligned to
// the largest exponent among them with one bit more than a float has, and neither they nor the result are rounded
// (Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores", 2021).
inline float cut_off_sum(float sum, const float* a, const float* b, int b_pitch, int count) {
  double terms[9] = {sum};
  double largest = std::fabs(sum), plain = sum;
  for (int i = 0; i < count; ++i) {
    terms[i + 1] = double{a[i]} * b[i * b_pitch];
    largest = std::max(largest, std::fabs(terms[i + 1]));
    plain += terms[i + 1];
  }
  if (!std::isfinite(plain) || largest == 0) return static_cast<float>(plain);
  const int last_digit = std::max(std::ilogb(largest), -126) - 24;
  const double units = std::ldexp(1.0, -last_digit);
  int64_t total = 0;  // Terms are at most 2^25 units.
  for (int i = 0; i <= count; ++i) total += static_cast<int64_t>(terms[i] * units);
  const double exact = static_cast<double>(total) / units;
  const float nearest = static_cast<float>(exact);
  return std::fabs(nearest) > std::fabs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

struct MmaLane {
  float* d;
  const uint32_t *a, *b;
};

template <class T>
void multiply_tiles(void* const (&lanes)[kWarp]) {
  constexpr int kPerRegister = 4 / sizeof(T), kDepth = 8 * kPerRegister;
  if constexpr (kTraced)
    tell_of_product(std::is_same_v<T, BFloat16> ? "bf16" : std::is_same_v<T, Half> ? "f16" : "tf32", kDepth);
  float a[16][kDepth], b[kDepth][8];
  for (unsigned l = 0; l < kWarp; ++l) {
    const auto& lane = *static_cast<const MmaLane*>(lanes[l]);
    const unsigned g = l / 4, t = l % 4;
    for (unsigned h = 0; h < kPerRegister; ++h) {
      for (unsigned r = 0; r < 4; ++r)
        a[g + r % 2 * 8][t * kPerRegister + h + r / 2 * (kDepth / 2)] = tensor_core_operand(lane.a[r], h, T{});
      for (unsigned r = 0; r < 2; ++r)
        b[t * kPerRegister + h + r * (kDepth / 2)][g] = tensor_core_operand(lane.b[r], h, T{});
    }
  }
  for (unsigned l = 0; l < kWarp; ++l) {
    auto& lane = *static_cast<MmaLane*>(lanes[l]);
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
      if (freedom().gpu_math) {
        constexpr int kStep = kDepth / 2;  // As on an A100.
        for (int k = 0; k < kDepth; k += kStep) lane.d[i] = cut_off_sum(lane.d[i], a[row] + k, &b[k][column], 8, kStep);
        continue;
      }
      double sum = lane.d[i];
      for (int k = 0; k < kDepth; ++k) sum += double{a[row][k]} * b[k][column];
      lane.d[i] = static_cast<float>(sum);
    }
  }
}

struct LoadLane {
  const void* row;
  uint32_t* r;
};

template <bool kTransposed>
void load_tiles(void* const (&lanes)[kWarp]) {
  if constexpr (kTraced) {
    const void* rows[kWarp];
    for (unsigned l = 0; l < kWarp; ++l) rows[l] = static_cast<const LoadLane*>(lanes[l])->row;
    tell_of_matrices(rows, kTransposed);
  }
  for (unsigned l = 0; l < kWarp; ++l)
    for (unsigned m = 0; m < 4; ++m) {
      const auto element = [&](unsigned row, unsigned column) {
        uint16_t v;
        std::memcpy(&v, static_cast<const char*>(static_cast<const LoadLane*>(lanes[m * 8 + row])->row) + 2 * column,
                    2);
        return uint32_t{v};
      };
      const unsigned g = l / 4, t = l % 4;
      static_cast<LoadLane*>(lanes[l])->r[m] = kTransposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                                                           : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
    }
}

}  // namespace emulation

template <bool kTransposed = false>
void load_matrices(uint32_t (&r)[4], const void* row, emulation::Where where = emulation::Where::current()) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) emulation::fail("ldmatrix from a misaligned address", where);
  emulation::LoadLane lane{row, r};
  emulation::collective("ldmatrix", emulation::kFullMask, &lane, emulation::load_tiles<kTransposed>, where);
}
template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  emulation::Where where = emulation::Where::current()) {
  emulation::MmaLane lane{d, a, b};
  emulation::collective("mma", emulation::kFullMask, &lane, emulation::multiply_tiles<T>, where);
}
inline uint32_t to_tf32(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  return std::isfinite(v) ? (bits + 0x1000) & 0xffffe000u : bits;
}

#else

// Loads four 8 x 8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 of matrix
// l / 8 (16 bytes, aligned); r[m] becomes elements [g][2t .. 2t + 1] of matrix m, or [2t .. 2t + 1][g] where
// kTransposed.
template <bool kTransposed = false>
__device__ inline void load_matrices(uint32_t (&r)[4], const void* row) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

// D += A B, with a depth of 16 for T = Half and BFloat16, 8 for float (as tf32, see to_tf32).
template <class T>
__device__ inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, BFloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else if constexpr (std::is_same_v<T, Half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds a float to nearest, to the 10 bits of mantissa that tensor cores use.
__device__ inline uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}

#endif

}  // namespace cpc::cuda
