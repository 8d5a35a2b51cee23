// What pixels see, as an operand of a product (core/cuda/product_loaders.cuh says what a loader is): row m is the channels
// of all visible taps around pixel m, one tap after another. The matrix is never written; its slices are copied from the
// input, a tap's part of them with zeros where it leads out of the image.
#pragma once

#include <cstdint>

#include "core/cuda/product.cuh"
#include "masked_conv/tile.cuh"

namespace cpc::masked_conv::cuda {

template <class T>
struct VisibleTaps {
  using Value = T;
  template <int kSide>
  using Operand = DepthInnermost<T>;

  const T* input;  // [images, height, width, channels].
  int64_t count;   // Pixels of all images.
  int height, width, channels;
  FastDivide by_width, by_height;
  Taps taps;

  bool fits() const {
    constexpr int64_t kMostPixels = int64_t{1} << 31, kMostSide = 1 << 15;
    return reinterpret_cast<uintptr_t>(input) % kChunkBytes == 0 && channels % kChunk<T> == 0 && count < kMostPixels &&
           height < kMostSide && width < kMostSide && channels <= kMaxCount / WideTile::kColumns &&
           int64_t{height} * width * channels <= kMaxCount;
  }

  template <int kSide, int kThreads>
  class Copies {
   public:
    __device__ explicit Copies(const VisibleTaps& pixels)
        : pixels_(pixels), row_(threadIdx.x / kChunksOfSlice), chunk_(threadIdx.x % kChunksOfSlice) {}

    __device__ void begin(int, int64_t first) {
      first_ = pixels_.input + first * pixels_.channels;
      const int64_t last = pixels_.count - 1 - first;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int row = row_ + i * kStep < last ? row_ + i * kStep : static_cast<int>(last);
        uint32_t y, x;
        pixels_.by_height(pixels_.by_width(static_cast<uint32_t>(first) + static_cast<uint32_t>(row), x), y);
        place_[i] = static_cast<int>(y << 16 | x);
        offset_[i] = row * pixels_.channels;
      }
      tap_ = 0;
      channel_ = chunk_ * kChunk<T>;
      look();
    }
    __device__ void end() {
      tap_ = pixels_.taps.count;
      seen_ = 0;
    }
    template <class Walk>
    __device__ void start(unsigned char* tile, const Walk&) {
      unsigned char* const to = tile + chunk_of_row(row_, chunk_);
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        copy_async<kChunkBytes>(to + i * kStep * kSliceBytes, from_ + channel_ + offset_[i], seen_ >> i & 1);
      channel_ += kDepth<T>;
      if (channel_ >= pixels_.channels) look();
    }

   private:
    static constexpr int kStep = kThreads / kChunksOfSlice, kCount = kSide / kStep;
    static_assert(kStep % 8 == 0 && kSide % kStep == 0);  // Chunks lie alike in every 8 rows.

    // Goes on to the tap of the next chunk, and sees which pixels it leads to another pixel of.
    __device__ void look() {
      while (channel_ >= pixels_.channels) {
        channel_ -= pixels_.channels;
        ++tap_;
      }
      seen_ = 0;
      if (tap_ >= pixels_.taps.count) return;
      const Taps::Offset by = pixels_.taps.at[tap_];
      from_ = first_ + (by.dy * pixels_.width + by.dx) * pixels_.channels;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int y = (place_[i] >> 16) + by.dy, x = (place_[i] & 0xffff) + by.dx;
        const bool inside = y >= 0 && y < pixels_.height && x >= 0 && x < pixels_.width;
        seen_ |= static_cast<unsigned>(inside) << i;
      }
    }

    const VisibleTaps& pixels_;
    int row_, chunk_;
    const T *first_, *from_;  // Of the tile, and by the tap away from it.
    int tap_ = 0, channel_ = 0;
    unsigned seen_ = 0;
    int place_[kCount], offset_[kCount];
  };
};

}  // namespace cpc::masked_conv::cuda
