// Products of a warpgroup (four warps) on the tensor cores of compute capability 9.0, D += A B with both operands in
// shared memory (PTX ISA, "Asynchronous warpgroup level matrix instructions"). The instructions are asynchronous and
// run in order: sums and operands must not be touched before wait_for_products returns. With lanes as in mma.cuh and
// `warp` the warp's index in the group,
//   d[j][r] = D[16 warp + 8 (r / 2) + g][8 j + 2 t + r % 2].
// Where there are no such instructions, and in the emulation, DescribedOperand reads the operands from shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/cuda/mma.cuh"
#include "core/cuda/shared.cuh"
#include "core/tensor_view.h"

// Only code for 9.0a, the part of 9.0 that other GPUs do not have, may contain these instructions.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CPC_WGMMA
#endif

namespace cpc::cuda {

// The matrix descriptor of an operand of 16-bit values: 64 bits with the address in shared memory, strides, and the
// swizzle of chunks of 16 bytes. Addresses and strides are in units of 16 bytes.
//   With the depth innermost, lines have 64 bytes; 8 of them form a group. Bits 7 and 8 of an address are XORed into
//   its bits 4 and 5.
//   With the depth outermost, lines have 128 bytes, 64 values of the side; 8 of them form a group. Bits 7 to 9 are
//   XORed into bits 4 to 6.
// This is the layout of chunk_of_row and LineBlocks (warp_product.cuh). Operands begin at multiples of 1024 bytes.
template <bool kOutermost>
struct Description {
  static constexpr int kSwizzle = kOutermost ? 1 : 2, kSwizzleAt = 62, kLeadingAt = 16, kStrideAt = 32;
  static constexpr int kStride = kOutermost ? 8 * 128 : 8 * 64;      // From one group of 8 lines to the next.
  static constexpr int kStepBytes = kOutermost ? 16 * 128 : 16 * 2;  // From one step of 16 of the depth to the next.

  // The descriptor of an operand that begins at `address` in shared memory. Where the side is innermost, its next 64
  // values are `leading` bytes further.
  __device__ static uint64_t of(uint32_t address, [[maybe_unused]] int leading) {
    return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(kOutermost ? leading >> 4 : 1) << kLeadingAt |
           static_cast<uint64_t>(kStride >> 4) << kStrideAt | static_cast<uint64_t>(kSwizzle) << kSwizzleAt;
  }
  // The descriptor of the operand `steps` steps of 16 further along the depth.
  __device__ static uint64_t after(uint64_t description, int steps) { return description + (steps * kStepBytes >> 4); }
};

// Reads a described operand as the instructions would, in the fragments of a warp's own products (warp_product.cuh).
// Addresses in the descriptor count from `shared`.
class DescribedOperand {
 public:
  __device__ DescribedOperand(const unsigned char* shared, uint64_t description)
      : shared_(shared), description_(description) {}

  // Reads 16 of the depth.
  template <bool kOfA>
  __device__ void load_fragments(uint32_t (&r)[4], int i) const {
    const int lane = static_cast<int>(threadIdx.x) % 32, matrix = lane / 8;
    const int side = 16 * i + 8 * (kOfA ? matrix % 2 : matrix / 2), depth = 8 * (kOfA ? matrix / 2 : matrix % 2);
    if (field(62, 2) == 1)
      load_matrices<true>(r, shared_ + swapped(side / 64 * field(16, 14) * 16 + side % 64 * 2 +
                                                   depth / 8 * field(32, 14) * 16 + lane % 8 * 128,
                                               7));
    else
      load_matrices(r, shared_ + swapped(side / 8 * field(32, 14) * 16 + lane % 8 * 64 + depth * 2, 3));
  }

 private:
  __device__ int field(int at, int bits) const { return static_cast<int>(description_ >> at) & ((1 << bits) - 1); }
  __device__ int swapped(int offset, int mask) const {
    const int address = field(0, 14) * 16 + offset;
    return address ^ (address >> 7 & mask) << 4;
  }

  const unsigned char* shared_;
  uint64_t description_;
};

#if defined(CPC_WGMMA)

// Must precede the first product, and any product after other instructions have touched the sums.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of products.
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Makes the calling thread's writes to shared memory visible to tensor cores after the next barrier.
__device__ inline void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Keeps the compiler from moving accesses to the sums across this point.
template <int kTiles>
__device__ inline void hold(float (&d)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int r = 0; r < 4; ++r) asm volatile("" : "+f"(d[j][r])::"memory");
}
// Waits until at most kGroups groups of products that add to `d` are pending.
template <int kGroups, int kTiles>
__device__ void wait_for_products(float (&d)[kTiles][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
  if constexpr (kGroups == 0) hold(d);
}

// An instruction has one operand per sum.
#define CPC_SUMS_8(j)                                                                                                  \
  "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3]), "+f"(d[j + 1][0]), "+f"(d[j + 1][1]), "+f"(d[j + 1][2]), \
      "+f"(d[j + 1][3])
#define CPC_SUMS_32(j) CPC_SUMS_8(j), CPC_SUMS_8(j + 2), CPC_SUMS_8(j + 4), CPC_SUMS_8(j + 6)
#define CPC_NAMES_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"
#define CPC_NAMES_27 "%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,"
#define CPC_NAMES_51 "%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define CPC_NAMES_64 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define CPC_NAMES_80 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,"
#define CPC_NAMES_103                                                                                              \
  "%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124," \
  "%125,%126,%127"
#define CPC_64_NAMES CPC_NAMES_0 CPC_NAMES_27 CPC_NAMES_51
#define CPC_MULTIPLY(shape, type, names, operands, ...)                                                     \
  asm volatile("wgmma.mma_async.sync.aligned." shape "k16.f32." type "." type " {" names "}, " operands ";" \
               : __VA_ARGS__                                                                                \
               : "l"(a), "l"(b), "n"(int{kOutermostA}), "n"(int{kOutermostB})                               \
               : "memory")
// Adds the product of 64 rows over 16 of the depth to D.
template <class T, bool kOutermostA, bool kOutermostB, int kTiles>
__device__ void multiply_group(float (&d)[kTiles][4], uint64_t a, uint64_t b) {
  constexpr bool kBFloat16 = std::is_same_v<T, BFloat16>;
  static_assert(kBFloat16 || std::is_same_v<T, Half>);
  static_assert(kTiles == 16 || kTiles == 20 || kTiles == 32);
  if constexpr (kTiles == 16 && kBFloat16)
    CPC_MULTIPLY("m64n128", "bf16", CPC_64_NAMES, "%64, %65, 1, 1, 1, %66, %67", CPC_SUMS_32(0), CPC_SUMS_32(8));
  else if constexpr (kTiles == 16)
    CPC_MULTIPLY("m64n128", "f16", CPC_64_NAMES, "%64, %65, 1, 1, 1, %66, %67", CPC_SUMS_32(0), CPC_SUMS_32(8));
  else if constexpr (kTiles == 20 && kBFloat16)
    CPC_MULTIPLY("m64n160", "bf16", CPC_64_NAMES "," CPC_NAMES_64, "%80, %81, 1, 1, 1, %82, %83", CPC_SUMS_32(0),
                 CPC_SUMS_32(8), CPC_SUMS_8(16), CPC_SUMS_8(18));
  else if constexpr (kTiles == 20)
    CPC_MULTIPLY("m64n160", "f16", CPC_64_NAMES "," CPC_NAMES_64, "%80, %81, 1, 1, 1, %82, %83", CPC_SUMS_32(0),
                 CPC_SUMS_32(8), CPC_SUMS_8(16), CPC_SUMS_8(18));
  else if constexpr (kBFloat16)
    CPC_MULTIPLY("m64n256", "bf16", CPC_64_NAMES "," CPC_NAMES_64 "," CPC_NAMES_80 CPC_NAMES_103,
                 "%128, %129, 1, 1, 1, %130, %131", CPC_SUMS_32(0), CPC_SUMS_32(8), CPC_SUMS_32(16), CPC_SUMS_32(24));
  else
    CPC_MULTIPLY("m64n256", "f16", CPC_64_NAMES "," CPC_NAMES_64 "," CPC_NAMES_80 CPC_NAMES_103,
                 "%128, %129, 1, 1, 1, %130, %131", CPC_SUMS_32(0), CPC_SUMS_32(8), CPC_SUMS_32(16), CPC_SUMS_32(24));
}
#undef CPC_SUMS_8
#undef CPC_SUMS_32
#undef CPC_NAMES_0
#undef CPC_NAMES_27
#undef CPC_NAMES_51
#undef CPC_NAMES_64
#undef CPC_NAMES_80
#undef CPC_NAMES_103
#undef CPC_64_NAMES
#undef CPC_MULTIPLY

#endif

}  // namespace cpc::cuda
