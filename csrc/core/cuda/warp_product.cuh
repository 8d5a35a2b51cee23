// A warp's product of two tiles in shared memory, D += A B with D of 16 * kRowTiles x 32, by tensor cores or by
// multiply-adds on the ordinary units. A tile has kSliceBytes of depth; it lies in shared memory with its depth either
// innermost (rows of kSliceBytes) or outermost, in chunks of 16 bytes that are permuted so that neither the copies into
// it nor the reads out of it meet in a bank. Both ways of multiplying leave D in the lanes as in mma.cuh: with
//   g = lane / 4,
//   t = lane % 4,
//   d[i][j][r] = D[16 i + 8 (r / 2) + g][8 j + 2 t + r % 2].
// Depth is summed in order, one chain of additions an element.
#pragma once

#include "core/cuda/kernel.cuh"
#include "core/cuda/mma.cuh"

namespace cpc::cuda {

constexpr int kChunkBytes = 16;
constexpr int kSliceBytes = 64;
constexpr int kChunksOfSlice = kSliceBytes / kChunkBytes;
constexpr int kWarpColumns = 32;

// Elements of type T in a chunk, and in a slice: the depth of a tile.
template <class T>
constexpr int kChunk = kChunkBytes / int{sizeof(T)};
template <class T>
constexpr int kDepth = kSliceBytes / int{sizeof(T)};

// How to multiply. Value is the type in shared memory, Sum that of D. TensorCores<float> rounds its operands to TF32.
template <class T>
struct TensorCores {
  using Value = T;
  using Sum = float;
  static constexpr bool kTensorCores = true;
};
template <class T>
struct MultiplyAdds {
  using Value = T;
  using Sum = T;
  static constexpr bool kTensorCores = false;
};

template <class Math, int kRowTiles>
using WarpSums = typename Math::Sum[kRowTiles][4][4];

// --- Where a chunk lies in a tile, in bytes ---

// Depth innermost: 8 successive rows of one chunk column, or the 4 chunks of 2 rows, cover all banks.
__device__ inline int chunk_of_row(int row, int chunk) {
  return row * kSliceBytes + (chunk ^ (row / 2 % kChunksOfSlice)) * kChunkBytes;
}

// Depth outermost, kWidth values wide, at least 8 chunks. Of 16-bit values, ldmatrix reads one chunk at 8 successive
// depths; of wider ones, the lanes of a warp read 2 chunks at 4.
template <class T, int kWidth>
__device__ int chunk_of_depth(int depth, int chunk) {
  static_assert(kWidth / kChunk<T> >= 8);
  const int permuted = chunk ^ (sizeof(T) == 2 ? depth % 8 : depth % 4 * 2);
  return depth * kWidth * int{sizeof(T)} + permuted * kChunkBytes;
}
template <class T, int kWidth>
__device__ const T* value_of_depth(const unsigned char* tile, int depth, int i) {
  return reinterpret_cast<const T*>(tile + chunk_of_depth<T, kWidth>(depth, i / kChunk<T>)) + i % kChunk<T>;
}

// --- Products ---

// Operands as tensor cores take them.
template <class T, int N>
__device__ void round_operands([[maybe_unused]] uint32_t (&r)[N]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < N; ++i) r[i] = to_tf32(__int_as_float(static_cast<int>(r[i])));
  }
}

// D += A B, of tiles with depth innermost: A from its row `a_row` on, B, transposed, from `b_row` on, both multiples
// of 8.
template <class Math, int kRowTiles>
__device__ void add_product_of_rows(WarpSums<Math, kRowTiles>& d, const unsigned char* a, int a_row,
                                    const unsigned char* b, int b_row) {
  using T = typename Math::Value;
  const int lane = threadIdx.x % kWarp;
  // Chunks lie alike in every 8 rows, so that a lane's addresses differ by constants.
  a += a_row * kSliceBytes;
  b += b_row * kSliceBytes;
  if constexpr (Math::kTensorCores) {
    // An mma is two chunks deep, and a matrix of ldmatrix is 8 rows of one.
#pragma unroll
    for (int chunk = 0; chunk < kChunksOfSlice; chunk += 2) {
      uint32_t of_b[4][2];
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t r[4];
        load_matrices(r, b + 8 * j * kSliceBytes + chunk_of_row(lane / 16 * 8 + lane % 8, chunk + lane / 8 % 2));
        round_operands<T>(r);
        of_b[j][0] = r[0], of_b[j][1] = r[1], of_b[j + 1][0] = r[2], of_b[j + 1][1] = r[3];
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t of_a[4];
        load_matrices(of_a, a + 16 * i * kSliceBytes + chunk_of_row(lane % 16, chunk + lane / 16));
        round_operands<T>(of_a);
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add<T>(d[i][j], of_a, of_b[j]);
      }
    }
  } else {
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int chunk = 0; chunk < kChunksOfSlice; ++chunk) {
      Pack<T, kChunk<T>> of_a[2 * kRowTiles];
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i)
        of_a[i] = pack_at<kChunk<T>>(reinterpret_cast<const T*>(a + 8 * i * kSliceBytes + chunk_of_row(g, chunk)));
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const auto of_b = pack_at<kChunk<T>>(
            reinterpret_cast<const T*>(b + j / 2 * 8 * kSliceBytes + chunk_of_row(2 * t + j % 2, chunk)));
#pragma unroll
        for (int k = 0; k < kChunk<T>; ++k)
#pragma unroll
          for (int i = 0; i < 2 * kRowTiles; ++i) {
            T& sum = d[i / 2][j / 2][i % 2 * 2 + j % 2];
            sum = fma(of_a[i].v[k], of_b.v[k], sum);
          }
      }
    }
  }
}

// D += A^T B, of tiles with depth outermost, kAWidth and kBWidth wide: A from its column `a_column` on, B from
// `b_column` on.
template <class Math, int kRowTiles, int kAWidth, int kBWidth>
__device__ void add_product_of_columns(WarpSums<Math, kRowTiles>& d, const unsigned char* a, int a_column,
                                       const unsigned char* b, int b_column) {
  using T = typename Math::Value;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int depth = 0; depth < kDepth<T>; depth += 16) {
      uint32_t of_b[4][2];
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t r[4];
        load_matrices<true>(r, b + chunk_of_depth<T, kBWidth>(depth + lane % 16, b_column / kChunk<T> + j + lane / 16));
        of_b[j][0] = r[0], of_b[j][1] = r[1], of_b[j + 1][0] = r[2], of_b[j + 1][1] = r[3];
      }
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t of_a[4];
        load_matrices<true>(of_a, a + chunk_of_depth<T, kAWidth>(depth + lane / 16 * 8 + lane % 8,
                                                                 a_column / kChunk<T> + 2 * i + lane / 8 % 2));
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add<T>(d[i][j], of_a, of_b[j]);
      }
    }
  } else if constexpr (Math::kTensorCores) {
    const auto operand = [](const float* v) { return to_tf32(*v); };
#pragma unroll
    for (int depth = 0; depth < kDepth<T>; depth += 8) {
      uint32_t of_b[4][2];
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r)
          of_b[j][r] = operand(value_of_depth<T, kBWidth>(b, depth + 4 * r + t, b_column + 8 * j + g));
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t of_a[4];
#pragma unroll
        for (int r = 0; r < 4; ++r)
          of_a[r] = operand(value_of_depth<T, kAWidth>(a, depth + r / 2 * 4 + t, a_column + 16 * i + r % 2 * 8 + g));
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add<T>(d[i][j], of_a, of_b[j]);
      }
    }
  } else {
#pragma unroll 2
    for (int depth = 0; depth < kDepth<T>; ++depth) {
      T of_a[2 * kRowTiles];
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) of_a[i] = *value_of_depth<T, kAWidth>(a, depth, a_column + 8 * i + g);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const auto of_b = pack_at<2>(value_of_depth<T, kBWidth>(b, depth, b_column + 8 * j + 2 * t));
#pragma unroll
        for (int i = 0; i < 2 * kRowTiles; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            T& sum = d[i / 2][j][i % 2 * 2 + r];
            sum = fma(of_a[i], of_b.v[r], sum);
          }
      }
    }
  }
}

}  // namespace cpc::cuda
