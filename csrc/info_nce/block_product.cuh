// A thread block's product on the GPU: a tile of 64 x 64, in warps of 32 x 32.
#pragma once

#include "core/cuda/warp_product.cuh"
#include "info_nce/group.cuh"

namespace cpc::info_nce::cuda {

constexpr int kRowTiles = 2, kWarpsAcross = kTile / kWarpColumns;
// While one slice is multiplied, the next one is being loaded into registers. Two stages need only one barrier per
// slice.
constexpr int kStages = 2, kTileBytes = kTile * kSliceBytes, kStageBytes = 2 * kTileBytes;

template <class Value>
using Chunk = Pack<Value, kChunk<Value>>;
template <class Math>
using Sums = WarpSums<Math, kRowTiles>;
__device__ inline int warp_row() { return threadIdx.x / kWarp / kWarpsAcross * (16 * kRowTiles); }
__device__ inline int warp_column() { return threadIdx.x / kWarp % kWarpsAcross * kWarpColumns; }

// sums += A B over `depth`. load_a(i, k) and load_b(i, k) return the chunk, in the operand's layout, that begins at
// element i of the tile's side and depth k.
template <class Math, class A, class B, class LoadA, class LoadB>
__device__ void multiply(Sums<Math>& sums, int64_t depth, const LoadA& load_a, const LoadB& load_b) {
  using Value = typename Math::Value;
  constexpr int kChunks = kTileBytes / kChunkBytes / kThreads;
  Chunk<Value> of_a[kChunks], of_b[kChunks];  // Of the thread.
  const auto each_chunk = [&](const auto& work) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = static_cast<int>(threadIdx.x) + c * kThreads;
      work(of_a[c], A::chunk(chunk), of_b[c], B::chunk(chunk));
    }
  };
  const auto fetch = [&](int64_t begin) {
    if (begin >= depth) return;
    each_chunk([&](Chunk<Value>& a, const ChunkPlace& in_a, Chunk<Value>& b, const ChunkPlace& in_b) {
      a = load_a(in_a.side, begin + in_a.depth);
      b = load_b(in_b.side, begin + in_b.depth);
    });
  };
  fetch(0);
  unsigned char* tiles = dynamic_shared();
  for (int64_t begin = 0; begin < depth; begin += kDepth<Value>) {
    each_chunk([&](const Chunk<Value>& a, const ChunkPlace& in_a, const Chunk<Value>& b, const ChunkPlace& in_b) {
      *reinterpret_cast<Chunk<Value>*>(tiles + in_a.at) = a;
      *reinterpret_cast<Chunk<Value>*>(tiles + kTileBytes + in_b.at) = b;
    });
    fetch(begin + kDepth<Value>);
    __syncthreads();  // All threads see this stage, and have read the other, which is written next.
    add_product<Math, kRowTiles>(sums, A(tiles, warp_row()), B(tiles + kTileBytes, warp_column()));
    tiles = dynamic_shared() + (tiles == dynamic_shared() ? kStageBytes : 0);
  }
  __syncthreads();  // All threads have finished with shared memory.
}

// Calls use(row, column, value) for each sum of the lane.
template <class Math, class Use>
__device__ void each_sum(const Sums<Math>& sums, const Use& use) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        use(warp_row() + 16 * i + 8 * (r / 2) + g, warp_column() + 8 * j + 2 * t + r % 2, sums[i][j][r]);
}

// A chunk of a row of [rows, d], from `column` on, with zeros outside of the matrix.
template <class Value, class T>
__device__ Chunk<Value> load_chunk(const T* matrix, int64_t row, int64_t rows, int64_t column, int64_t d) {
  constexpr int kCount = kChunk<Value>;
  Chunk<Value> chunk = {};
  const int64_t left = d - column;
  if (row < rows) load_run(chunk.v, matrix + row * d + column, 1, static_cast<int>(left < kCount ? left : kCount));
  return chunk;
}

}  // namespace cpc::info_nce::cuda
