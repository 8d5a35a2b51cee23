// Shared by the CUDA kernels of the masked convolution: taps as kernel parameters, the tiles that thread blocks
// compute, and checks.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/device.h"
#include "core/cuda/product.cuh"
#include "core/workspace.h"
#include "masked_conv/masked_conv.h"

namespace cpc::masked_conv::cuda {

using namespace cpc::cuda;

constexpr int kThreads = 256;  // Threads of blocks that compute no tile of a product.

// --- Taps as kernel parameters ---

// The most taps that fit a kernel's 4 KiB of parameters beside everything else: enough for a kernel of 27 x 27.
constexpr int64_t kMaxTaps = 768;
// The largest count: kernels keep counts, and sums of two of them, in 32 bits.
constexpr int64_t kMaxCount = 1 << 30;

struct Taps {
  struct Offset {
    int16_t dy, dx;
  };
  int count;
  Offset at[kMaxTaps];
};

// Indices i * kw + j of the taps.
struct TapIndices {
  int32_t at[kMaxTaps];
};

inline void require_few_taps(const std::vector<Tap>& taps) {
  if (static_cast<int64_t>(taps.size()) > kMaxTaps)
    throw std::invalid_argument("the CUDA kernels take at most " + std::to_string(kMaxTaps) + " visible taps, got " +
                                std::to_string(taps.size()));
}

inline Taps offsets_of(const std::vector<Tap>& taps) {
  require_few_taps(taps);
  Taps offsets;
  offsets.count = static_cast<int>(taps.size());
  constexpr int64_t kFarthest = std::numeric_limits<int16_t>::max();
  for (size_t i = 0; i < taps.size(); ++i) {
    if (std::max(std::abs(taps[i].dy), std::abs(taps[i].dx)) > kFarthest)
      throw std::invalid_argument("the CUDA kernels take taps at most " + std::to_string(kFarthest) + " pixels away");
    offsets.at[i] = {static_cast<int16_t>(taps[i].dy), static_cast<int16_t>(taps[i].dx)};
  }
  return offsets;
}

inline TapIndices indices_of(const std::vector<Tap>& taps) {
  require_few_taps(taps);
  TapIndices indices;
  for (size_t i = 0; i < taps.size(); ++i) indices.at[i] = static_cast<int32_t>(taps[i].index);
  return indices;
}

// Returns the width of a filter, whose tap indices must fit 32 bits.
inline int kernel_width_of(const TensorView& filter) {
  if (filter.shape[2] * filter.shape[3] > kMaxCount)
    throw std::invalid_argument("the CUDA kernels take filters of at most 2^30 taps, got " +
                                std::to_string(filter.shape[2]) + "x" + std::to_string(filter.shape[3]));
  return static_cast<int>(filter.shape[3]);
}

// The depth of the product: taps times channels.
inline int depth_of(int64_t taps, int64_t channels) {
  if (std::max(taps, int64_t{1}) * channels > kMaxCount)
    throw std::invalid_argument("the CUDA kernels take at most 2^30 visible taps times channels, got " +
                                std::to_string(taps * channels));
  return static_cast<int>(taps * channels);
}

inline void require_image_size(int64_t batch, int64_t height, int64_t width) {
  if (std::max(batch, height * width) > kMaxCount)
    throw std::invalid_argument("the CUDA kernels take at most 2^30 images of at most 2^30 pixels, got " +
                                std::to_string(batch) + " of " + std::to_string(height) + "x" + std::to_string(width));
}

// Returns how many images one launch can take, whose values must have 32-bit offsets.
inline int64_t images_at_once(int64_t pixels, int64_t channels) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const int64_t images = std::min(kMaxCount / pixels, kMost / pixels / std::max<int64_t>(channels, 1));
  if (images == 0)
    throw std::invalid_argument("the CUDA kernels take images of at most 2^31 - 1 values, got " +
                                std::to_string(pixels) + " pixels of " + std::to_string(channels) + " channels");
  return images;
}

// Strides of a mask over [O, C, kh, kw]: 0 where it is the same for all channels.
inline void strides_of_mask(const TensorView& mask, int64_t (&strides)[4]) {
  for (int d = 0; d < 4; ++d) strides[d] = mask.ndim == 4 ? mask.strides[d] : d < 2 ? 0 : mask.strides[d - 2];
}

// --- Tiles ---

// 128 x 160, so that 160 and 320 outputs are whole tiles.
using FifthTile = ProductTile<128, 160, 64, 80, 3, 2>;
// For one pixel of a batch. Its time is that of loading the weights, so many slices are in flight.
using PixelTile = ProductTile<32, 32, 16, 32, 8, 8>;
// For double, computed by multiply-adds.
using DoubleTile = ProductTile<64, 64, 32, 32, 4, 2>;
// PixelTile and others for two teams, within the shared memory of the smallest GPUs.
using PixelTeams = TwoTeams<ProductTile<32, 32, 16, 32, 4, 4>>;
using LowTeams = TwoTeams<ProductTile<64, 128, 32, 64, 3, 1>>;
using MiddleTeams = TwoTeams<ProductTile<96, 128, 48, 64, 2, 1>>;  // A square tile spills registers on sm_120.
using FifthTeams = TwoTeams<ProductTile<128, 160, 64, 80, 2, 1>>;
// The cost of a result in low and middle tiles, relative to a square tile: they read more from shared memory.
constexpr double kLowCost = 1.3, kMiddleCost = 1.1;

// Whether the channels of every pixel are whole, aligned chunks of 16 bytes.
inline bool has_whole_chunks(const TensorView& view, int64_t channels) {
  return channels * size_of(view.dtype) % kChunkBytes == 0 && reinterpret_cast<uintptr_t>(view.data) % kChunkBytes == 0;
}

// Whether they are also whole pairs of slices, as two teams need them.
inline bool has_pairs_of_slices(const TensorView& view, int64_t channels) {
  return has_whole_chunks(view, channels) && channels * size_of(view.dtype) % (2 * kSliceBytes) == 0;
}

// Copies a value to shared memory. The copy may be in flight until the next barrier but one.
template <class T>
__device__ void copy_value(T* to, const T* from, bool exists) {
  if constexpr (sizeof(T) >= 4)
    copy_async<sizeof(T)>(to, from, exists);
  else
    *to = exists ? *from : T{};
}

}  // namespace cpc::masked_conv::cuda
