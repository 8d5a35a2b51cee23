// Loaders of what pixels see, as operands of a product (core/cuda/product_loaders.cuh says what a loader is). Row m of
// VisibleTaps has the channels of all visible taps around pixel m, one tap after another; TapColumns is its transpose.
// Neither matrix is materialised: slices are copied from the input, with zeros where a tap leads out of the image.
#pragma once

#include <cstdint>

#include "core/cuda/product_loaders.cuh"
#include "masked_conv/pixels.cuh"

namespace cpc::masked_conv::cuda {

// kWholeChunks: whether each chunk of 16 bytes of a row is aligned and of one tap. If not, as with few channels or an
// odd number of them, chunks are copied value by value, which is slow.
template <class T, bool kWholeChunks>
struct VisibleTaps {
  using Value = T;
  template <int kSide, template <class, int> class Lines>
  using Operand = DepthInnermost<T>;

  const T* input;  // [images, height, width, channels].
  int64_t count;   // Rows.
  int channels;
  Pixels pixels;
  Taps taps;

  bool fits() const { return count <= kMaxCount && count * channels <= std::numeric_limits<int32_t>::max(); }
  __device__ int64_t last_row(int64_t row, int rows) const { return row + rows < count ? row + rows - 1 : count - 1; }

  template <int kSide, int kThreads, template <class, int> class Lines>
  class Copies {
   public:
    __device__ explicit Copies(const VisibleTaps& a)
        : a_(a), row_(threadIdx.x % kThreads / kChunksOfSlice), chunk_(threadIdx.x % kChunksOfSlice), from_(a.input) {}

    __device__ void begin(int, int64_t first) {
      tap_ = -1;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int64_t row = first + row_ + i * kStep;
        const Pixel pixel = a_.pixels[row < a_.count ? row : a_.count - 1];
        in_image_[i] = static_cast<uint32_t>(pixel.y * a_.pixels.width + pixel.x);
        const int image = static_cast<int>(pixel.image) * a_.pixels.height * a_.pixels.width;
        offset_[i] = (image + static_cast<int>(in_image_[i])) * a_.channels;
      }
    }
    __device__ void end() {}

    template <class Walk>
    __device__ void start(unsigned char* tile, const Walk& walk) {
      unsigned char* const to = tile + chunk_of_row(row_, chunk_);
      DepthPlace place = walk.place().after(chunk_ * kChunk<T>, a_.channels);
      if constexpr (kWholeChunks) {
        look_through(place.tap);
        const T* const from = from_ + place.channel;
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          copy_async<kChunkBytes>(to + i * kStep * kSliceBytes, from + offset_[i], seen_ >> i & 1);
      } else {
        for (int e = 0; e < kChunk<T>; ++e, place = place.after(1, a_.channels)) {
          look_through(place.tap);
#pragma unroll
          for (int i = 0; i < kCount; ++i)
            copy_value(reinterpret_cast<T*>(to + i * kStep * kSliceBytes) + e, from_ + place.channel + offset_[i],
                       seen_ >> i & 1);
        }
      }
    }

   private:
    static constexpr int kStep = kThreads / kChunksOfSlice, kCount = kSide / kStep;
    static_assert(kStep % 8 == 0 && kSide % kStep == 0);  // The layout of chunks repeats every 8 rows.

    // Finds which rows see the image through a tap, unless the slice before had the same tap.
    __device__ void look_through(int tap) {
      if (tap == tap_) return;
      tap_ = tap;
      seen_ = 0;
      if (tap >= a_.taps.count) return;
      const Taps::Offset by = a_.taps.at[tap];
      from_ = a_.input + (int64_t{by.dy} * a_.pixels.width + by.dx) * a_.channels;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        uint32_t x;
        const uint32_t y = a_.pixels.by_width(in_image_[i], x);
        const bool inside =
            y + by.dy < static_cast<uint32_t>(a_.pixels.height) && x + by.dx < static_cast<uint32_t>(a_.pixels.width);
        seen_ |= static_cast<unsigned>(inside) << i;
      }
    }

    const VisibleTaps& a_;
    int row_, chunk_;
    int tap_ = -1;
    unsigned seen_ = 0;  // Which rows see the image through the tap, as bits.
    const T* from_;      // The input, shifted by the tap.
    int offset_[kCount];
    uint32_t in_image_[kCount];
  };
};

// Stands in for Taps where each pixel sees only itself.
struct PixelItself {};

// The depth is pixels, `of_entry` of them in each entry of the product's batch. Side tap * channels + channel is what
// they see of that channel through that tap.
template <class T, bool kWholeChunks, class TapsOf>
struct TapColumns {
  using Value = T;
  static constexpr bool kItself = std::is_same_v<TapsOf, PixelItself>;
  template <int kSide, template <class, int> class Lines>
  using Operand =
      std::conditional_t<sizeof(T) == 4 && kWholeChunks, FragmentsOfColumns<T, kSide>, DepthOutermost<T, kSide, Lines>>;

  const T* input;
  int64_t count, pixels, of_entry;
  int height, width, channels;
  FastDivide by_width, by_height;
  TapsOf taps;

  bool fits() const { return count <= kMaxCount && of_entry <= kMaxCount; }

  template <int kSide, int kThreads, template <class, int> class Lines>
  class Copies {
   public:
    __device__ explicit Copies(const TapColumns& a)
        : a_(a), line_(threadIdx.x / kAcross), chunk_(threadIdx.x % kAcross) {}

    __device__ void begin(int entry, int64_t first) {
      const int64_t first_pixel = entry * a_.of_entry, left = a_.pixels - first_pixel;
      left_ = static_cast<int>(left < a_.of_entry ? left : a_.of_entry) - line_;
      in_image_ = static_cast<uint32_t>(first_pixel % (int64_t{a_.height} * a_.width)) + line_;
      side_ = static_cast<int>(first) + chunk_ * kChunk<T>;
      column_ = column(side_);
      from_ = a_.input + (first_pixel + line_) * a_.channels;
    }
    __device__ void end() { left_ = 0; }

    template <class Walk>
    __device__ void start(unsigned char* tile, const Walk&) {
      unsigned char* const to = tile + Lines<T, kSide>::at(line_, chunk_);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const bool exists = i * kStep < left_;
        uint32_t y = 0, x = 0;
        if constexpr (!kItself) a_.by_height(a_.by_width(in_image_ + i * kStep, x), y);
        const auto inside = [&](const Column& by) {
          if constexpr (kItself) return exists && by.exists;
          return exists && by.exists && y + by.dy < static_cast<uint32_t>(a_.height) &&
                 x + by.dx < static_cast<uint32_t>(a_.width);
        };
        const T* const pixel = from_ + int64_t{i * kStep} * a_.channels;
        unsigned char* const at = to + i * kStep * Lines<T, kSide>::kPitch;
        if constexpr (kWholeChunks) {
          copy_async<kChunkBytes>(at, pixel + column_.offset, inside(column_));
        } else {
          for (int e = 0; e < kChunk<T>; ++e) {
            const Column by = column(side_ + e);
            copy_value(reinterpret_cast<T*>(at) + e, pixel + by.offset, inside(by));
          }
        }
      }
      from_ += int64_t{kDepth<T>} * a_.channels;
      in_image_ += kDepth<T>;
      left_ -= kDepth<T>;
    }

   private:
    static constexpr int kAcross = kSide / kChunk<T>;
    static constexpr int kStep = kThreads / kAcross, kCount = kDepth<T> / kStep;
    // The layout of chunks repeats every 8 steps of the depth, or every 4 for wider values.
    static_assert(kStep % (sizeof(T) == 2 ? 8 : 4) == 0 && kDepth<T> % kStep == 0);

    // The offset of a column's tap, in pixels and in values.
    struct Column {
      bool exists;
      int dy, dx;
      int64_t offset;
    };
    __device__ Column column(int side) const {
      if (side >= a_.count) return {false, 0, 0, 0};
      if constexpr (kItself) {
        return {true, 0, 0, side};
      } else {
        const int tap = side / a_.channels, channel = side - tap * a_.channels;
        const Taps::Offset by = a_.taps.at[tap];
        return {true, by.dy, by.dx, (int64_t{by.dy} * a_.width + by.dx) * a_.channels + channel};
      }
    }

    const TapColumns& a_;
    int line_, chunk_, side_;
    const T* from_;  // The first of the thread's pixels.
    int left_;       // Pixels of the entry from that one on.
    uint32_t in_image_;
    Column column_;
  };
};

}  // namespace cpc::masked_conv::cuda
