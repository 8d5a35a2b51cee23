// Loaders of a convolution's weights as an operand of its product (core/cuda/product_loaders.cuh says what a loader
// is), and the kernel that packs them to [outputs][taps * channels], each row padded with zeros to whole slices.
#pragma once

#include <cstdint>

#include "core/cuda/product_loaders.cuh"
#include "masked_conv/pixels.cuh"

namespace cpc::masked_conv::cuda {

// Outputs in neighbouring columns of the product, the 8 columns of a warp's tile.
constexpr int kTogether = 8;

// Maps columns of the product to outputs. If gated, every eight features are followed by their eight gates, which are
// the outputs N / 2 further, so that a lane holds both. A column without an output maps to at least `outputs`.
struct OutputOrder {
  int outputs;
  bool gated;

  __host__ __device__ int columns() const {
    return gated ? (outputs / 2 + kTogether - 1) / kTogether * 2 * kTogether : outputs;
  }
  __device__ int operator[](int column) const {
    if (!gated) return column;
    const int eighth = column / kTogether, feature = eighth / 2 * kTogether + column % kTogether;
    return feature < outputs / 2 ? eighth % 2 * (outputs / 2) + feature : outputs;
  }
};

// Weights that are read in place, [O, kh, kw, C] in memory, with one mask for all channels. If the host did not read
// the mask, the taps to sum include hidden ones; the product's Depth (SeenSlices in pixels.cuh) applies the mask.
template <class T>
struct WeightsInPlace {
  const T* centre;  // The first output's weights of the centre tap, with offset (0, 0).
  int by_row, by_column;

  __device__ const T* at(const Taps::Offset& by) const { return centre + by.dy * by_row + by.dx * by_column; }
};

// Packed weights, or weights that are read in place, whose channels must be whole slices.
template <class T>
struct Filters {
  using Value = T;
  template <int kSide, template <class, int> class Lines>
  using Operand = DepthInnermost<T>;

  const T* packed;        // Null where weights are read in place.
  int64_t count, stride;  // Columns, and values between outputs.
  OutputOrder outputs;
  WeightsInPlace<T> in_place = {};

  bool fits() const { return outputs.outputs * stride <= std::numeric_limits<int32_t>::max(); }

  template <int kSide, int kThreads, template <class, int> class Lines>
  class Copies {
   public:
    __device__ explicit Copies(const Filters& b)
        : b_(b), row_(threadIdx.x % kThreads / kChunksOfSlice), chunk_(threadIdx.x % kChunksOfSlice) {}

    __device__ void begin(int, int64_t first) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int output = b_.outputs[static_cast<int>(first) + row_ + i * kStep];
        offset_[i] = (output < b_.outputs.outputs ? output : 0) * static_cast<int>(b_.stride) + chunk_ * kChunk<T>;
      }
    }
    __device__ void end() {}

    template <class Walk>
    __device__ void start(unsigned char* tile, const Walk& walk) {
      unsigned char* const to = tile + chunk_of_row(row_, chunk_);
      const T* from = b_.packed + int64_t{walk.index()} * kDepth<T>;
      if (b_.packed == nullptr) from = b_.in_place.at(walk.offset()) + walk.place().channel;
      const bool visible = walk.visible();
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        if (kSide % kStep == 0 || row_ + i * kStep < kSide)
          copy_async<kChunkBytes>(to + i * kStep * kSliceBytes, from + offset_[i], visible);
    }

   private:
    static constexpr int kStep = kThreads / kChunksOfSlice, kCount = (kSide + kStep - 1) / kStep;
    static_assert(kStep % 8 == 0);  // The layout of chunks repeats every 8 rows.

    const Filters& b_;
    int row_, chunk_;
    int offset_[kCount];
  };
};

// Weights that are read in place for the input gradient. The depth is taps times outputs, which must be whole slices;
// columns are channels, which must be whole chunks. Taps are negated.
template <class T>
struct TransposedFilters {
  using Value = T;
  template <int kSide, template <class, int> class Lines>
  using Operand = DepthOutermost<T, kSide, Lines>;

  int64_t count, stride;  // Channels, and values between outputs.
  WeightsInPlace<T> in_place;

  bool fits() const { return count % kChunk<T> == 0 && kDepth<T> * stride <= std::numeric_limits<int32_t>::max(); }

  template <int kSide, int kThreads, template <class, int> class Lines>
  class Copies {
   public:
    __device__ explicit Copies(const TransposedFilters& b) : b_(b), chunks_(threadIdx.x % kThreads) {}

    __device__ void begin(int, int64_t first) {
#pragma unroll
      for (int band = 0; band < Chunks::kBands; ++band) {
        const auto channel = static_cast<int>(first) + chunks_.chunk(band) * kChunk<T>;
        offset_[band] = chunks_.line(band) * static_cast<int>(b_.stride) + (channel < b_.count ? channel : 0);
      }
    }
    __device__ void end() {}

    template <class Walk>
    __device__ void start(unsigned char* tile, const Walk& walk) {
      const T* const from = b_.in_place.at(walk.offset()) + walk.place().channel * b_.stride;
      const bool visible = walk.visible();
#pragma unroll
      for (int i = 0; i < Chunks::kCount; ++i)
        if (chunks_.exists(i))
          copy_async<kChunkBytes>(tile + chunks_.at(i),
                                  from + offset_[Chunks::band(i)] + Chunks::after(i) * static_cast<int>(b_.stride),
                                  visible);
    }

   private:
    using Chunks = ChunksOfLines<T, kSide, kThreads, Lines>;

    const TransposedFilters& b_;
    Chunks chunks_;
    int offset_[Chunks::kBands];
  };
};

template <class T>
struct PackArguments {
  const T* weight;
  const bool* mask;
  T* packed;
  struct Strides {
    int64_t output, input, row, column;
  } weight_strides, mask_strides;
  int64_t outputs;
  int taps, stride, kernel_width;
  FastDivide by_inputs;
  TapIndices indices;

  // Value `e` of an output's packed weights.
  __device__ T value(int64_t output, int e) const {
    uint32_t channel;
    const auto tap = static_cast<int>(by_inputs(static_cast<uint32_t>(e), channel));
    if (output >= outputs || tap >= taps) return {};
    const int row = indices.at[tap] / kernel_width, col = indices.at[tap] % kernel_width;
    const auto at = [&](const Strides& strides) {
      return output * strides.output + channel * strides.input + row * strides.row + col * strides.column;
    };
    return mask[at(mask_strides)] ? weight[at(weight_strides)] : T{};
  }
};

// A block packs tiles of kPacked outputs by kPacked values. The threads of a warp read neighbouring outputs if these
// are closer together in memory than channels, and write neighbouring values.
constexpr int kPacked = 32;
template <class T>
using PackedTile =
    T[kPacked][kPacked + (sizeof(T) == 2 ? 2 : 1)];  // Rows of an odd number of words avoid bank conflicts.

template <class T>
__global__ void __launch_bounds__(kThreads) pack_weights(const __grid_constant__ PackArguments<T> a) {
  auto& tile = *reinterpret_cast<PackedTile<T>*>(dynamic_shared());
  const int x = static_cast<int>(threadIdx.x) % kPacked, first_y = static_cast<int>(threadIdx.x) / kPacked;
  const bool by_outputs = a.weight_strides.output < a.weight_strides.input;
  const int64_t across = divide_up(a.stride, kPacked), tiles = divide_up(a.outputs, kPacked) * across;
  for (int64_t block = blockIdx.x; block < tiles; block += gridDim.x) {
    const int64_t output = block / across * kPacked;
    const int e = static_cast<int>(block % across) * kPacked;
#pragma unroll
    for (int y = first_y; y < kPacked; y += kThreads / kPacked)
      if (by_outputs)
        tile[x][y] = a.value(output + x, e + y);
      else
        tile[y][x] = a.value(output + y, e + x);
    __syncthreads();  // The tile is complete.
#pragma unroll
    for (int y = first_y; y < kPacked; y += kThreads / kPacked)
      if (output + y < a.outputs && e + x < a.stride) a.packed[(output + y) * a.stride + e + x] = tile[y][x];
    __syncthreads();  // The next tile overwrites it.
  }
}

}  // namespace cpc::masked_conv::cuda
