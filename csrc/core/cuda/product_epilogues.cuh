// Epilogues of a product (product.cuh). An epilogue is a small struct that a kernel takes by value. All lanes of a warp
// call its take<Tile>(sums, entry, row, column) with the warp's sums and their first row and column. Rows and columns
// may lie beyond the end of D.
#pragma once

#include <cstdint>

#include "core/cuda/kernel.cuh"
#include "core/cuda/product.cuh"

namespace cpc::cuda {

// Exchanges a 4 x 4 matrix of values among the four lanes that share rows of a warp's tiles: value j of lane t becomes
// value t of lane j.
__device__ inline void transpose_quad(uint32_t (&v)[4]) {
  constexpr unsigned kAll = 0xffffffffu;
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(kAll, odd ? v[i] : v[i + 1], 1);
    v[i] = odd ? got : v[i];
    v[i + 1] = odd ? v[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(kAll, upper ? v[i] : v[i + 2], 2);
    v[i] = upper ? got : v[i];
    v[i + 2] = upper ? v[i + 2] : got;
  }
}

// Stores 16 bytes to an aligned address in global memory. It is written in assembly because nvcc 13.0 splits the C++
// form into stores of 4 bytes for compute capabilities 8.0 and 9.0.
__device__ inline void store_chunk(void* to, const uint32_t (&v)[4]) {
#if defined(CPC_CUDA_EMULATION)
  const Pack<uint32_t, 4> chunk = {{v[0], v[1], v[2], v[3]}};
  pack_at<4>(static_cast<uint32_t*>(to)) = chunk;
#else
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v[0]), "r"(v[1]),
               "r"(v[2]), "r"(v[3])
               : "memory");
#endif
}

// Stores the first `count` of 8 values, which come two per register.
template <class T>
__device__ void store_pairs(T* to, const uint32_t (&pairs)[4], int count) {
  if (count == 8 && reinterpret_cast<uintptr_t>(to) % kChunkBytes == 0) {
    store_chunk(to, pairs);
    return;
  }
#pragma unroll
  for (int k = 0; k < 8; ++k)
    if (k < count) to[k] = {static_cast<uint16_t>(pairs[k / 2] >> (16 * (k % 2)))};
}

// Two values in a register.
template <class T>
__device__ uint32_t pair_of(const float (&values)[2]) {
  return Narrow<T>::from(values[0]).bits | static_cast<uint32_t>(Narrow<T>::from(values[1]).bits) << 16;
}

// Copies a lane's sums of the n-th row and group of kTiles tiles of its warp's tile. Registers cannot be indexed, so
// there is one branch for each n known at compile time. The empty asm statement keeps the compiler from turning the
// branches into a chain of selects, which took longer than all of a convolution's products.
template <class Tile, int kTiles, int known = 0, class Sum>
__device__ void copy_group(const WarpTileSums<Tile, Sum>& sums, int n, Sum (&to)[kTiles][2]) {
  constexpr int kGroups = (Tile::kColumnTiles + kTiles - 1) / kTiles, kCount = 2 * Tile::kRowTiles * kGroups;
  if constexpr (known < kCount) {
    if (n != known) return copy_group<Tile, kTiles, known + 1>(sums, n, to);
    constexpr int kRow = known / kGroups, kFirst = known % kGroups * kTiles;
#pragma unroll
    for (int j = 0; j < kTiles && kFirst + j < Tile::kColumnTiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) to[j][e] = sums[kRow / 2][kFirst + j][kRow % 2 * 2 + e];
    asm volatile("");
  }
}

// Calls use(row, column, sums) for each of the lane's rows of the warp's tile and each group of kTiles tiles of 8
// columns, of which `column` is the first, with the lane's two sums in each tile; 0 for tiles beyond the last. The loop
// is not unrolled, because the compiler would take minutes to save little time.
template <class Tile, int kTiles, class Sum, class Use>
__device__ void each_row(const WarpTileSums<Tile, Sum>& sums, const Use& use) {
  constexpr int kGroups = (Tile::kColumnTiles + kTiles - 1) / kTiles;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll 1
  for (int n = 0; n < 2 * Tile::kRowTiles * kGroups; ++n) {
    Sum of_row[kTiles][2] = {};
    copy_group<Tile, kTiles>(sums, n, of_row);
    use(8 * (n / kGroups) + lane / 4, n % kGroups * kTiles * 8, of_row);
  }
}

// Stores rows of D, each contiguous, rounded to T.
template <class T>
struct StoreRows {
  using Sum = SumOf<T>;

  T* values;
  int64_t stride, rows, columns, entry_stride = 0;

  template <class Tile>
  __device__ void take(const WarpTileSums<Tile, Sum>& sums, int entry, int64_t row, int64_t column) const {
    static_assert(Tile::kColumnTiles % 4 == 0);
    const int in_quad = static_cast<int>(threadIdx.x) % 4;
    each_row<Tile, 4>(sums, [&](int in_tile, int of_group, const Sum(&v)[4][2]) {
      const int64_t at = row + in_tile;
      T* const to = values + entry * entry_stride + at * stride;
      // A lane stores 8 neighbouring columns of the four tiles, or 2 in each tile.
      if constexpr (sizeof(T) == 2) {
        uint32_t pairs[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) pairs[k] = pair_of<T>(v[k]);
        transpose_quad(pairs);
        const int64_t first = column + of_group + 8 * in_quad;
        if (at < rows && first < columns) store_pairs(to + first, pairs, how_many(columns - first, 8));
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int64_t first = column + of_group + 8 * k + 2 * in_quad;
          if (at < rows && first < columns) store_run(to + first, v[k], how_many(columns - first, 2));
        }
      }
    });
  }
};

// Stores the transpose: column j of D begins at values + j * stride. Eight rows of a column fill a sector of memory.
template <class T>
struct StoreColumns {
  static_assert(sizeof(T) == 4);
  using Sum = SumOf<T>;

  T* values;
  int64_t stride, rows, columns, entry_stride = 0;

  template <class Tile>
  __device__ void take(const WarpTileSums<Tile, Sum>& sums, int entry, int64_t row, int64_t column) const {
    constexpr int kTiles = Tile::kColumnTiles % 4 == 0 ? 4 : 2;
    const int in_quad = static_cast<int>(threadIdx.x) % 4;
    each_row<Tile, kTiles>(sums, [&](int in_tile, int of_group, const Sum(&v)[kTiles][2]) {
      const int64_t at = row + in_tile, first = column + of_group + 2 * in_quad;
      T* const to = values + entry * entry_stride + first * stride + at;
#pragma unroll
      for (int k = 0; k < kTiles; ++k)
#pragma unroll
        for (int e = 0; e < 2; ++e)
          if (at < rows && first + 8 * k + e < columns) to[(8 * k + e) * stride] = v[k][e];
    });
  }
};

}  // namespace cpc::cuda
