// Products of a group of four warps on the tensor cores of compute capability 9.0, D += A B with both operands in shared
// memory (PTX ISA, "Asynchronous warpgroup level matrix instructions"). Instructions are only started, in order; sums and
// operands are theirs until wait_for_products says that they are done. With the warp's lanes as in mma.cuh, and its place
// in the group,
//   d[j][r] = D[16 warp + 8 (r / 2) + g][8 j + 2 t + r % 2].
// Where there are no such instructions, and in the emulation, DescribedOperand reads what they would of shared memory.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/cuda/mma.cuh"
#include "core/cuda/shared.cuh"
#include "core/tensor_view.h"

// Whether code that is compiled now may contain them: for 9.0a, the part of 9.0 that other GPUs do not have.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define CPC_WGMMA
#endif

namespace cpc::cuda {

// What instructions are told of an operand whose values are of 16 bits: 64 bits with a place in shared memory, strides, and
// how chunks of 16 bytes are permuted. Addresses are in units of 16 bytes.
//   The depth innermost: lines of 64 bytes, 8 of them together. Bits 7 and 8 of an address are added to its bits 4 and 5.
//   The depth outermost: lines of 128 bytes, 8 of them together, which have 64 of the side. Bits 7 to 9 are added to bits 4
//   to 6.
// Added is without carry. What lies so, chunk_of_row and LineBlocks (warp_product.cuh) say, begins at multiples of 1024 bytes.
template <bool kOutermost>
struct Description {
  static constexpr int kSwizzle = kOutermost ? 1 : 2, kSwizzleAt = 62, kLeadingAt = 16, kStrideAt = 32;
  static constexpr int kStride = kOutermost ? 8 * 128 : 8 * 64;      // From 8 lines to the next.
  static constexpr int kStepBytes = kOutermost ? 16 * 128 : 16 * 2;  // From 16 of the depth to the next.

  // The description of what begins at `address` of shared memory. 64 more of the side, where it is innermost, lie `leading`
  // bytes further.
  __device__ static uint64_t of(uint32_t address, [[maybe_unused]] int leading) {
    return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(kOutermost ? leading >> 4 : 1) << kLeadingAt |
           static_cast<uint64_t>(kStride >> 4) << kStrideAt | static_cast<uint64_t>(kSwizzle) << kSwizzleAt;
  }
  // The same, 16 of the depth further.
  __device__ static uint64_t after(uint64_t description, int steps) { return description + (steps * kStepBytes >> 4); }
};

// What instructions read of an operand so described, with addresses from the beginning of shared memory, as warps read it
// that multiply on their own (warp_product.cuh).
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

// What precedes the first instruction, or any after others have touched the sums.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Closes a group of instructions.
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// What was copied to shared memory by threads may be read by tensor cores once a barrier has been passed.
__device__ inline void show_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// The compiler is not to move what it does with sums across this.
template <int kTiles>
__device__ inline void hold(float (&d)[kTiles][4]) {
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int r = 0; r < 4; ++r) asm volatile("" : "+f"(d[j][r])::"memory");
}
// Waits until at most kGroups groups of the instructions that add to `d` are under way.
template <int kGroups, int kTiles>
__device__ void wait_for_products(float (&d)[kTiles][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
  if constexpr (kGroups == 0) hold(d);
}

// An instruction takes as many operands as it has sums.
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
// D of 64 rows += 16 of the depth.
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
