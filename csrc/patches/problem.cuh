// Shared by the CUDA kernels of patch extraction: the problem as a kernel parameter, and its pixels.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/cuda/device.h"
#include "core/cuda/kernel.cuh"
#include "patches/patches.h"
#include "patches/window.h"

namespace cpc::patches::cuda {

using namespace cpc::cuda;

constexpr int kThreads = 256;
// The most tiles or rows of a launch, so that their numbers fit 32 bits. Larger problems take several launches.
constexpr int64_t kMaxItems = int64_t{1} << 30;

template <class Real>
struct Common {
  Geometry geometry;
  TensorView images, offsets, flip;
  int64_t batch, rows, cols, channels;
  int64_t values;  // Values of a patch.
  Real scale[kMaxChannels], shift[kMaxChannels];

  explicit Common(const Problem& problem)
      : geometry(problem.geometry),
        images(problem.images),
        offsets(problem.offsets),
        flip(problem.flip),
        batch(problem.batch()),
        rows(problem.rows()),
        cols(problem.cols()),
        channels(problem.channels()),
        values(channels * geometry.patch * geometry.patch) {
    if (channels > kMaxChannels)
      throw std::invalid_argument("the CUDA kernel takes at most " + std::to_string(kMaxChannels) + " channels, got " +
                                  std::to_string(channels));
    std::copy(problem.scale.begin(), problem.scale.end(), scale);
    std::copy(problem.shift.begin(), problem.shift.end(), shift);
  }
  CPC_HOST_DEVICE bool to_gray() const { return geometry.gray && images.shape[1] == 3; }
  __device__ Window window(int64_t b) const { return window_of(geometry, images, offsets, flip, b); }

  // The offset in values of the window's pixel (y, x) in a channel of image b.
  __device__ int64_t source(int64_t b, const Window& window, int64_t channel, int64_t y, int64_t x) const {
    const int64_t column = window.x + (window.flip ? geometry.width - 1 - x : x);
    return b * images.strides[0] + channel * images.strides[1] + (window.y + y) * images.strides[2] +
           column * images.strides[3];
  }

  // The transformed pixel (y, x) of output channel k.
  __device__ Real pixel(int64_t b, const Window& window, int64_t k, int64_t y, int64_t x) const {
    if (!to_gray()) return scale[k] * load_as<Real>(images.data, images.dtype, source(b, window, k, y, x)) + shift[k];
    Real v = 0;
    for (int c = 0; c < 3; ++c)
      v += Real(luma(c)) * load_as<Real>(images.data, images.dtype, source(b, window, c, y, x));
    return scale[0] * v + shift[0];
  }
};

// --- Patches that a whole block works on, each value read from the image ---

struct PatchIndex {
  int64_t b, r, c;
};
template <class Real>
__device__ PatchIndex patch_at(const Common<Real>& p, int64_t i) {
  return {i / p.cols / p.rows, i / p.cols % p.rows, i % p.cols};
}

// The transformed pixel that becomes value e of a patch, in the order of memory.
template <class Real>
__device__ Real patch_value(const Common<Real>& p, const PatchIndex& at, const Window& window, int64_t e) {
  const int64_t patch = p.geometry.patch, area = patch * patch;
  const int64_t k = p.geometry.channels_last ? e % p.channels : e / area;
  const int64_t i = p.geometry.channels_last ? e / p.channels : e % area;
  return p.pixel(at.b, window, k, at.r * p.geometry.stride + i / patch, at.c * p.geometry.stride + i % patch);
}

// A patch's mean and deviation.
template <class Real>
__device__ void block_moments(const Common<Real>& p, const PatchIndex& at, const Window& window, Real& mean,
                              Real& deviation) {
  const Real n = static_cast<Real>(p.values);
  Real total = 0, squares = 0;
#pragma unroll 1  // The body is long enough.
  for (int64_t e = threadIdx.x; e < p.values; e += kThreads) total += patch_value(p, at, window, e);
  mean = block_sum<kThreads>(total) / n;
#pragma unroll 1
  for (int64_t e = threadIdx.x; e < p.values; e += kThreads) {
    const Real d = patch_value(p, at, window, e) - mean;
    squares += d * d;
  }
  deviation = sqrt(block_sum<kThreads>(squares) / n);
}

}  // namespace cpc::patches::cuda
