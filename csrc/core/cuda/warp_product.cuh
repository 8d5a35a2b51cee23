// A warp's product of two tiles in shared memory, D += A B with D of 16 * kRowTiles x 32, by tensor cores or by
// ordinary multiply-adds. A tile has kSliceBytes of depth. Its depth is either innermost (rows of kSliceBytes) or
// outermost, for A and B independently. Its chunks of 16 bytes are permuted so that neither copies into shared memory
// nor reads from it have bank conflicts. Both ways of multiplying leave D in the lanes as in mma.cuh: with
//   g = lane / 4,
//   t = lane % 4,
//   d[i][j][r] = D[16 i + 8 (r / 2) + g][8 j + 2 t + r % 2].
// Depth is summed in order, one chain of additions per element.
#pragma once

#include "core/cuda/kernel.cuh"
#include "core/cuda/mma.cuh"

namespace cpc::cuda {

constexpr int kChunkBytes = 16;
constexpr int kSliceBytes = 64;
constexpr int kChunksOfSlice = kSliceBytes / kChunkBytes;
constexpr int kWarpColumns = 32;

// The elements of type T in a chunk, and in a slice (the depth of a tile).
template <class T>
constexpr int kChunk = kChunkBytes / int{sizeof(T)};
template <class T>
constexpr int kDepth = kSliceBytes / int{sizeof(T)};

// Kinds of multiplication. Value is the type in shared memory, Sum that of D. TensorCores<float> rounds its operands to
// TF32.
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

// --- The byte offset of a chunk in a tile ---

// With the depth innermost, 8 successive rows of one chunk column, or the 4 chunks of 2 rows, cover all banks.
__device__ inline int chunk_of_row(int row, int chunk) {
  return row * kSliceBytes + (chunk ^ (row / 2 % kChunksOfSlice)) * kChunkBytes;
}

// With the depth outermost, a line is kWidth values and at least 8 chunks wide. For 16-bit values, ldmatrix reads one
// chunk at 8 successive depths; for wider values, the lanes of a warp read 2 chunks at 4 depths. Where a line is an odd
// multiple of 4 chunks, every other line begins in the other half of the banks, so that only 4 depths need different
// positions.
template <class T, int kWidth>
__device__ int chunk_of_depth(int depth, int chunk) {
  constexpr int kAcross = kWidth / kChunk<T>;
  constexpr bool kFours = kAcross % 8 == 4;
  static_assert(kAcross >= 8 && (kAcross % 8 == 0 || (kFours && sizeof(T) == 2)));
  const int permuted = chunk ^ (kFours ? depth / 2 % 4 : sizeof(T) == 2 ? depth % 8 : depth % 4 * 2);
  return depth * kWidth * int{sizeof(T)} + permuted * kChunkBytes;
}

// Layouts of lines whose depth is outermost. at(depth, chunk) is the byte offset of a chunk; its permutation repeats
// every 8 depths, which are kPitch bytes apart each. Half lines are copied in the order nth(0), nth(1), ...
template <class T, int kWidth>
struct WholeLines {
  static constexpr int kPitch = kWidth * int{sizeof(T)};
  __device__ static int at(int depth, int chunk) { return chunk_of_depth<T, kWidth>(depth, chunk); }
  __device__ static int nth(int line) { return line; }
};
// The layout in which wgmma reads 16-bit values: lines are cut into blocks of 128 bytes, the last of which is padded.
// All lines of the first block come first.
template <class T, int kWidth>
struct LineBlocks {
  static constexpr int kPitch = 128, kBlockBytes = kDepth<T> * kPitch;
  __device__ static int at(int depth, int chunk) {
    return chunk / 8 * kBlockBytes + depth * kPitch + (chunk % 8 ^ depth % 8) * kChunkBytes;
  }
  // Orders lines so that two successive ones have the first half of a block in different halves of the banks.
  __device__ static int nth(int line) { return (line & ~5) | (line & 1) << 2 | (line >> 2 & 1); }
};

// --- Operands ---
//
// An operand is what a lane reads of a tile from `first` on, a multiple of 8, along its side (A's rows or B's columns):
//   load_fragments<kOfA>, for tensor cores: one fragment of A or two neighbouring ones of B, from 16 i of the side on;
//   load_row and load_pair, for multiply-adds: N successive depths at 8 i + g, or 8 j + 2 t and the next, of the side.
// kStep is the number of successive depths that are contiguous.

// Whether matrix m of a fragment holds the upper 8 of its 16 rows or columns, and the upper half of its depth.
template <bool kOfA>
__device__ constexpr int upper_side(int m) {
  return kOfA ? m % 2 : m / 2;
}
template <bool kOfA>
__device__ constexpr int upper_depth(int m) {
  return kOfA ? m / 2 : m % 2;
}

// The first element of a chunk along side and depth, and the chunk's byte offset in the tile.
struct ChunkPlace {
  int side, depth, at;
};

template <class T>
class DepthInnermost {
 public:
  static constexpr bool kOutermost = false;
  static constexpr int kStep = kChunk<T>;

  __device__ static ChunkPlace chunk(int n) {
    const int side = n / kChunksOfSlice, of_row = n % kChunksOfSlice;
    return {side, of_row * kChunk<T>, chunk_of_row(side, of_row)};
  }

  // The permutation of chunks repeats every 8 rows, so that a lane's addresses differ by constants.
  __device__ DepthInnermost(const unsigned char* tile, int first)
      : tile_(tile + first * kSliceBytes), lane_(threadIdx.x % kWarp) {}

  template <bool kOfA>
  __device__ void load_fragments(uint32_t (&r)[4], int i, int depth) const {
    const int row = upper_side<kOfA>(lane_ / 8) * 8 + lane_ % 8;
    load_matrices(r, at(2 * i, row, depth / kStep + upper_depth<kOfA>(lane_ / 8)));
  }
  __device__ void load_row(Pack<T, kStep>& v, int i, int depth) const { v = values(i, lane_ / 4, depth); }
  __device__ void load_pair(Pack<T, kStep> (&v)[2], int j, int depth) const {
    v[0] = values(j, lane_ % 4 * 2, depth);
    v[1] = values(j, lane_ % 4 * 2 + 1, depth);
  }

 private:
  __device__ const unsigned char* at(int eighth, int row, int chunk) const {
    return tile_ + 8 * eighth * kSliceBytes + chunk_of_row(row, chunk);
  }
  __device__ Pack<T, kStep> values(int eighth, int row, int depth) const {
    return pack_at<kStep>(reinterpret_cast<const T*>(at(eighth, row, depth / kStep)));
  }

  const unsigned char* tile_;
  int lane_;
};

template <class T, int kWidth, template <class, int> class Lines = WholeLines>
class DepthOutermost {
 public:
  static constexpr bool kOutermost = true;
  static constexpr int kStep = 1;

  __device__ static ChunkPlace chunk(int n) {
    constexpr int kAcross = kWidth / kChunk<T>;
    const int depth = n / kAcross, of_row = n % kAcross;
    return {of_row * kChunk<T>, depth, Lines<T, kWidth>::at(depth, of_row)};
  }

  __device__ DepthOutermost(const unsigned char* tile, int first)
      : tile_(sizeof(T) == 4 ? tile + first * 4 : tile),
        first_(sizeof(T) == 4 ? 0 : first),
        lane_(threadIdx.x % kWarp) {}

  template <bool kOfA>
  __device__ void load_fragments(uint32_t (&r)[4], int i, int depth) const {
    if constexpr (kNarrow) {
      const int row = depth + upper_depth<kOfA>(lane_ / 8) * 8 + lane_ % 8;
      load_matrices<true>(r,
                          tile_ + Lines<T, kWidth>::at(row, first_ / kChunk<T> + 2 * i + upper_side<kOfA>(lane_ / 8)));
    } else {  // ldmatrix cannot transpose wider values.
#pragma unroll
      for (int m = 0; m < 4; ++m)
        r[m] = static_cast<uint32_t>(__float_as_int(
            *value(depth + upper_depth<kOfA>(m) * 4 + lane_ % 4, 16 * i + upper_side<kOfA>(m) * 8 + lane_ / 4)));
    }
  }
  template <int N>
  __device__ void load_row(Pack<T, N>& v, int i, int depth) const {
#pragma unroll
    for (int k = 0; k < N; ++k) v.v[k] = *value(depth + k, 8 * i + lane_ / 4);
  }
  template <int N>
  __device__ void load_pair(Pack<T, N> (&v)[2], int j, int depth) const {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const auto pair = pack_at<2>(value(depth + k, 8 * j + lane_ % 4 * 2));
      v[0].v[k] = pair.v[0];
      v[1].v[k] = pair.v[1];
    }
  }

 private:
  __device__ const T* value(int depth, int i) const {
    const int at = first_ + i;
    return reinterpret_cast<const T*>(tile_ + Lines<T, kWidth>::at(depth, at / kChunk<T>)) + at % kChunk<T>;
  }

  static constexpr bool kNarrow = sizeof(T) == 2;
  const unsigned char* tile_;
  int first_, lane_;
};

// --- The product ---

// Loads fragments, rounded to the type that tensor cores take.
template <class T, class Operand, bool kOfA>
__device__ void load_rounded(uint32_t (&r)[4], const Operand& operand, int i, int depth) {
  operand.template load_fragments<kOfA>(r, i, depth);
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int m = 0; m < 4; ++m) r[m] = to_tf32(__int_as_float(static_cast<int>(r[m])));
  }
}

// D += A B over a tile's depth.
template <class Math, int kRowTiles, class A, class B>
__device__ void add_product(WarpSums<Math, kRowTiles>& d, const A& a, const B& b) {
  using T = typename Math::Value;
  if constexpr (Math::kTensorCores) {
#pragma unroll
    for (int depth = 0; depth < kDepth<T>; depth += 2 * kChunk<T>) {
      uint32_t of_b[2][4];
#pragma unroll
      for (int j = 0; j < 2; ++j) load_rounded<T, B, false>(of_b[j], b, j, depth);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        uint32_t of_a[4];
        load_rounded<T, A, true>(of_a, a, i, depth);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t of_tile[2] = {of_b[j / 2][j % 2 * 2], of_b[j / 2][j % 2 * 2 + 1]};
          multiply_add<T>(d[i][j], of_a, of_tile);
        }
      }
    }
  } else {
    constexpr int kStep = A::kStep > B::kStep ? A::kStep : B::kStep;
    [[maybe_unused]] constexpr int kUnroll = kStep == 1 ? 2 : 1;
#pragma unroll kUnroll
    for (int depth = 0; depth < kDepth<T>; depth += kStep) {
      Pack<T, kStep> of_a[2 * kRowTiles];
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) a.load_row(of_a[i], i, depth);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Pack<T, kStep> of_b[2];
        b.load_pair(of_b, j, depth);
#pragma unroll
        for (int k = 0; k < kStep; ++k)
#pragma unroll
          for (int i = 0; i < 2 * kRowTiles; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              T& sum = d[i / 2][j][i % 2 * 2 + r];
              sum = fma(of_a[i].v[k], of_b[r].v[k], sum);
            }
      }
    }
  }
}

}  // namespace cpc::cuda
