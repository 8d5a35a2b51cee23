// The pixels that are the rows of a convolution's product, and the taps through which they see the image.
#pragma once

#include <cstdint>

#include "core/cuda/product.cuh"
#include "masked_conv/tile.cuh"

namespace cpc::masked_conv::cuda {

struct Pixel {
  int64_t image;
  int y, x;
};

// Row m is pixel m / B of image m % B if images are innermost, else pixel m % (H * W) of image m / (H * W). With a
// position, it is the pixel there of image m.
struct Pixels {
  const int64_t* position;
  int height, width;
  bool images_innermost;  // Always with a position.
  FastDivide by_inner, by_width;

  __device__ Pixel operator[](int64_t row) const {
    uint32_t inner, x;
    const uint32_t outer = by_inner(static_cast<uint32_t>(row), inner);
    uint32_t in_image = images_innermost ? outer : inner;
    if (position != nullptr)
      in_image = static_cast<uint32_t>(inside(position[0], height) * width + inside(position[1], width));
    const uint32_t y = by_width(in_image, x);
    return {static_cast<int64_t>(images_innermost ? inner : outer), static_cast<int>(y), static_cast<int>(x)};
  }

 private:
  __device__ static int inside(int64_t at, int size) {
    return static_cast<int>(at < 0 ? 0 : at < size ? at : size - 1);
  }
};

// The box that some successive rows lie in. It shows which taps see nothing but padding from all of them.
class Box {
 public:
  Box() = default;
  __device__ Box(const Pixels& pixels, int64_t first_row, int64_t last_row) {
    const Pixel first = pixels[first_row], last = pixels[last_row];
    const bool in_order = pixels.images_innermost || first.image == last.image;
    const bool in_one_row = in_order && first.y == last.y;
    first_y_ = in_order ? first.y : 0;
    last_y_ = in_order ? last.y : pixels.height - 1;
    first_x_ = in_one_row ? first.x : 0;
    last_x_ = in_one_row ? last.x : pixels.width - 1;
  }
  __device__ bool sees(const Pixels& pixels, const Taps::Offset& by) const {
    return last_y_ + by.dy >= 0 && first_y_ + by.dy < pixels.height && last_x_ + by.dx >= 0 &&
           first_x_ + by.dx < pixels.width;
  }

 private:
  int first_y_, last_y_, first_x_, last_x_;
};

// A place in the depth of the product, which consists of the channels of one tap after another.
struct DepthPlace {
  int tap, channel;
  __device__ DepthPlace after(int values, int channels) const {
    DepthPlace place{tap, channel + values};
    while (place.channel >= channels) {
      place.channel -= channels;
      ++place.tap;
    }
    return place;
  }
};

// A mask of few taps that the kernel reads itself, as the host did not.
struct TapMask {
  static constexpr int kMost = 64;
  const bool* centre;  // The centre tap, with offset (0, 0). Null where all taps are visible.
  int by_row, by_column;

  // All lanes of a warp must take part.
  __device__ uint64_t bits(const Taps& taps) const {
    if (centre == nullptr) return ~uint64_t{0};
    uint64_t bits = 0;
#pragma unroll
    for (int first = 0; first < kMost; first += kWarp) {
      const int tap = first + static_cast<int>(threadIdx.x) % kWarp;
      const bool seen = tap < taps.count && centre[taps.at[tap].dy * by_row + taps.at[tap].dx * by_column];
      bits |= uint64_t{__ballot_sync(0xffffffffu, seen)} << first;
    }
    return bits;
  }
};

// The slices of a convolution's depth (core/cuda/product.cuh says what a Depth is), for the loader A, a VisibleTaps. If
// `looks`, slices are skipped whose taps lead all of a tile's pixels out of the image.
template <class A>
struct SeenSlices {
  int slices;  // In all.
  bool looks;
  TapMask mask;

  __device__ int count(const A& a, int64_t row, int rows) const {
    int count = looks ? 0 : slices;
    if (looks && a.channels % kDepthOfA == 0) {
      const Box box(a.pixels, row, a.last_row(row, rows));
      for (int tap = 0; tap < a.taps.count; ++tap) count += box.sees(a.pixels, a.taps.at[tap]);
      count *= a.channels / kDepthOfA;
    } else if (looks) {
      const SeenSlices all_shown{slices, looks, {}};
      Walk<1> walk(all_shown, a, 0);
      for (walk.begin(row, rows); walk.index() < slices; walk.next()) ++count;
    }
    return count > 0 ? count : 1;
  }

  // Where there are two teams, each tap must have an even number of slices.
  template <int kTeams>
  class Walk {
   public:
    __device__ Walk(const SeenSlices& depth, const A& a, int team)
        : depth_(depth), a_(a), visible_(depth.mask.bits(a.taps)), team_(team) {}
    __device__ void begin(int64_t row, int rows) {
      index_ = kTeams == 1 ? 0 : team_;
      place_ = {0, index_ * kDepthOfA};
      if (!depth_.looks) return;
      box_ = Box(a_.pixels, row, a_.last_row(row, rows));
      skip();
    }
    __device__ void next() {
      const int tap = place_.tap;
      step();
      // A slice that begins with the same tap as the one before is needed, too.
      if (depth_.looks && place_.tap != tap) skip();
    }
    __device__ void end() {
      index_ = depth_.slices;
      place_ = {a_.taps.count, 0};
    }
    __device__ int index() const { return index_; }
    __device__ const DepthPlace& place() const { return place_; }
    // Whether the slice exists and the mask shows its first tap.
    __device__ bool visible() const {
      return index_ < depth_.slices && (depth_.mask.centre == nullptr || (visible_ >> place_.tap & 1));
    }
    // The offset of the slice's first tap.
    __device__ Taps::Offset offset() const {
      return place_.tap < a_.taps.count ? a_.taps.at[place_.tap] : Taps::Offset{0, 0};
    }

   private:
    __device__ void step() {
      place_ = place_.after(kTeams * kDepthOfA, a_.channels);
      index_ += kTeams;
    }
    __device__ void skip() {
      while (index_ < depth_.slices && !seen()) step();
    }
    // Whether some tap of this slice sees a pixel of the image.
    __device__ bool seen() const {
      const int end = place_.after(kDepthOfA - 1, a_.channels).tap;
      for (int tap = place_.tap; tap <= end && tap < a_.taps.count; ++tap)
        if (box_.sees(a_.pixels, a_.taps.at[tap])) return true;
      return false;
    }

    const SeenSlices& depth_;
    const A& a_;
    Box box_;
    uint64_t visible_;  // Taps that the mask shows.
    int team_;
    int index_ = 0;
    DepthPlace place_ = {0, 0};
  };

 private:
  static constexpr int kDepthOfA = kDepth<typename A::Value>;
};

}  // namespace cpc::masked_conv::cuda
