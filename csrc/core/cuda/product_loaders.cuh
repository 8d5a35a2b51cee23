// Loaders of the operands of a product (product.cuh). A loader is a small struct that a kernel takes by value, with
//
//   Value            the type of its values
//   count            the number of rows of A, or of columns of B; a tile has kSide of them
//   Operand<kSide, Lines>   the layout of a tile's slice in shared memory, and how warps read it (warp_product.cuh)
//   Copies<kSide, kThreads, Lines>   a thread's part in copying the slices of one tile after another.
//                    begin(entry, first) sets the first row or column of the tile, start(tile, walk) starts copies of
//                    its next slice, which the Walk describes, and after end() all slices are zeros. Values beyond the
//                    depth are zeros, and those beyond the side are undefined. kThreads is the size of a team.
//
//   fits()           on the host: true if the operand can be copied in chunks of 16 bytes and offsets in a tile fit
//                    into 32 bits
//
// The memory between the end of a matrix's row and the next multiple of 16 bytes must be readable, and zero where the
// row goes along the depth.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/cuda/product.cuh"

namespace cpc::cuda {

template <class T>
bool fits_chunks(const T* values, int64_t stride) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() / WideTile::kColumns;
  return reinterpret_cast<uintptr_t>(values) % kChunkBytes == 0 && stride % kChunk<T> == 0 && stride <= kMost;
}

// A depth that is cut into `count` parts of `depth` each, of which the last may be shorter. Each part becomes an entry
// of its own; those of the first entry come first.
struct DepthParts {
  int count = 1, depth = 0;

  // Returns which part `entry` is, and sets `entry` to the entry that was cut.
  __device__ int part_of(int& entry) const {
    if (count == 1) return 0;
    const int whole = entry / count, part = entry - whole * count;
    entry = whole;
    return part;
  }
  // The depth of a part, where `whole` is that of all parts together.
  __device__ int depth_of(int part, int whole) const {
    return count == 1 ? whole : how_many(int64_t{whole} - int64_t{part} * depth, depth);
  }
};

// The kCount chunks that a thread copies of a slice whose depth is outermost. Lines whose number of chunks is no power
// of two, such as those of 160 values, are cut into two bands that are. In a band, all of a thread's chunks are in one
// column of chunks, a constant number of lines apart; of the second band a thread has at most one.
template <class T, int kSide, int kThreads, template <class, int> class Lines>
class ChunksOfLines {
 public:
  __device__ explicit ChunksOfLines(int thread)
      : line_{thread / kFirst, Lines<T, kSide>::nth(thread / kSecond)},
        chunk_{thread % kFirst, kFirst + thread % kSecond} {}
  // The band of chunk i, and its distance in lines from the thread's first chunk of that band.
  __device__ static constexpr int band(int i) { return i < kOfFirst ? 0 : 1; }
  __device__ static constexpr int after(int i) { return i < kOfFirst ? i * kStep : 0; }
  __device__ int line(int band) const { return line_[band]; }
  __device__ int chunk(int band) const { return chunk_[band]; }
  // Bytes from the beginning of the tile.
  __device__ int at(int i) const {
    return Lines<T, kSide>::at(line_[band(i)], chunk_[band(i)]) + after(i) * Lines<T, kSide>::kPitch;
  }
  // Whether this thread has a chunk i: the second band may have fewer chunks than there are threads.
  __device__ bool exists(int i) const { return kThreads == kOfSecond || band(i) == 0 || line_[1] < kDepth<T>; }

 private:
  static constexpr int kAcross = kSide / kChunk<T>;
  static constexpr int kRest = kAcross & (kAcross - 1);  // Without the lowest power of two.
  static constexpr int kFirst = kRest == 0 ? kAcross : kRest, kSecond = kRest == 0 ? 1 : kAcross - kRest;
  static constexpr int kStep = kThreads / kFirst, kOfFirst = kDepth<T> / kStep;
  static constexpr int kOfSecond = kRest == 0 ? kThreads : kSecond * kDepth<T>;  // Chunks.
  static_assert((kFirst & (kFirst - 1)) == 0 && kThreads % kFirst == 0 && kDepth<T> % kStep == 0);
  static_assert(kThreads >= kOfSecond);
  // The permutation of chunks repeats every 8 steps of depth, or every 4 for wider values.
  static_assert(kStep % (sizeof(T) == 2 ? 8 : 4) == 0);

  int line_[2], chunk_[2];

 public:
  static constexpr int kBands = kRest == 0 ? 1 : 2, kCount = kOfFirst + kBands - 1;
};

// A matrix whose depth is innermost: row i of A, or column i of B, is `depth` values from values + i * stride.
template <class T>
struct Rows {
  using Value = T;
  template <int kSide, template <class, int> class Lines>
  using Operand = DepthInnermost<T>;

  const T* values;
  int64_t stride, count;
  int depth;
  int64_t entry_stride = 0;
  DepthParts parts = {};

  bool fits() const { return fits_chunks(values, stride) && entry_stride % kChunk<T> == 0; }

  template <int kSide, int kThreads, template <class, int> class Lines>
  class Copies {
   public:
    __device__ explicit Copies(const Rows& rows)
        : rows_(rows), row_(threadIdx.x / kChunksOfSlice), chunk_(threadIdx.x % kChunksOfSlice) {}

    __device__ void begin(int entry, int64_t first) {
      const int part = rows_.parts.part_of(entry);
      from_ = rows_.values + entry * rows_.entry_stride + first * rows_.stride + int64_t{part} * rows_.parts.depth +
              chunk_ * kChunk<T>;
      left_ = rows_.parts.depth_of(part, rows_.depth) - chunk_ * kChunk<T>;
      const int64_t last = rows_.count - 1 - first;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int row = row_ + i * kStep;
        offset_[i] = static_cast<int>(row < last ? row : last) * static_cast<int>(rows_.stride);
      }
    }
    __device__ void end() { left_ = 0; }
    template <class Walk>
    __device__ void start(unsigned char* tile, const Walk&) {
      unsigned char* const to = tile + chunk_of_row(row_, chunk_);
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (kSide % kStep == 0 || row_ + i * kStep < kSide)
          copy_async<kChunkBytes>(to + i * kStep * kSliceBytes, from_ + offset_[i], left_ > 0);
      from_ += kDepth<T>;
      left_ -= kDepth<T>;
    }

   private:
    // The permutation of chunks repeats every 8 rows.
    static constexpr int kStep = kThreads / kChunksOfSlice, kCount = (kSide + kStep - 1) / kStep;
    static_assert(kStep % 8 == 0);

    const Rows& rows_;
    int row_, chunk_;
    const T* from_;
    int left_;  // Remaining depth, from this thread's chunk of the next slice on.
    int offset_[kCount];
  };
};

// Operands of 32-bit values whose depth is outermost, in the layout of DepthOutermost, for load_fragments only.
// ldmatrix cannot transpose such values, so lanes load them one by one. Chunks are permuted within groups of 4 tiles of
// 8 along the side, so that each address of a lane is one of 4 pointers plus a constant.
template <class T, int kWidth>
class FragmentsOfColumns {
 public:
  static_assert(sizeof(T) == 4);
  __device__ FragmentsOfColumns(const unsigned char* tile, int first) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
#pragma unroll
    for (int i = 0; i < 4; ++i)
      of_tile_[i] =
          tile + chunk_of_depth<T, kWidth>(lane % 4, (first + 8 * i + lane / 4) / kChunk<T>) + lane / 4 % 4 * 4;
  }
  template <bool kOfA>
  __device__ void load_fragments(uint32_t (&r)[4], int i, int depth) const {
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int eighth = 2 * i + upper_side<kOfA>(m), step = depth + 4 * upper_depth<kOfA>(m);
      const auto* const at = of_tile_[eighth % 4] + step * kWidth * 4 + eighth / 4 * 4 * 8 * 4;
      r[m] = *reinterpret_cast<const uint32_t*>(at);
    }
  }

 private:
  const unsigned char* of_tile_[4];
};

// A matrix whose depth is outermost: step k of the depth is the values of all rows of A, or columns of B, from
// values + k * stride.
template <class T>
struct Columns {
  using Value = T;
  template <int kSide, template <class, int> class Lines>
  using Operand = std::conditional_t<sizeof(T) == 4, FragmentsOfColumns<T, kSide>, DepthOutermost<T, kSide, Lines>>;

  const T* values;
  int64_t stride, count;
  int depth;
  int64_t entry_stride = 0;
  DepthParts parts = {};

  bool fits() const { return fits_chunks(values, stride) && entry_stride % kChunk<T> == 0; }

  template <int kSide, int kThreads, template <class, int> class Lines>
  class Copies {
   public:
    __device__ explicit Copies(const Columns& columns) : columns_(columns), chunks_(static_cast<int>(threadIdx.x)) {}

    __device__ void begin(int entry, int64_t first) {
      const int part = columns_.parts.part_of(entry);
#pragma unroll
      for (int band = 0; band < Chunks::kBands; ++band) {
        const int64_t side = first + chunks_.chunk(band) * kChunk<T>;
        from_[band] = columns_.values + entry * columns_.entry_stride +
                      (int64_t{part} * columns_.parts.depth + chunks_.line(band)) * columns_.stride +
                      (side < columns_.count ? side : 0);
        left_[band] = columns_.parts.depth_of(part, columns_.depth) - chunks_.line(band);
      }
    }
    __device__ void end() {
#pragma unroll
      for (int& left : left_) left = 0;
    }
    template <class Walk>
    __device__ void start(unsigned char* tile, const Walk&) {
#pragma unroll
      for (int i = 0; i < Chunks::kCount; ++i) {
        const int band = Chunks::band(i), after = Chunks::after(i);
        if (chunks_.exists(i))
          copy_async<kChunkBytes>(tile + chunks_.at(i), from_[band] + after * static_cast<int>(columns_.stride),
                                  after < left_[band]);
      }
#pragma unroll
      for (int band = 0; band < Chunks::kBands; ++band) {
        from_[band] += kDepth<T> * columns_.stride;
        left_[band] -= kDepth<T>;
      }
    }

   private:
    using Chunks = ChunksOfLines<T, kSide, kThreads, Lines>;

    const Columns& columns_;
    Chunks chunks_;
    const T* from_[Chunks::kBands];
    int left_[Chunks::kBands];  // Remaining depth, from the band's first line of the next slice on.
  };
};

}  // namespace cpc::cuda
