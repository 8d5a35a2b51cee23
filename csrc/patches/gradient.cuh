// The gradient of images from that of patches. A thread takes neighbouring pixels and sums the gradients of the patches
// that contain them, in the order of the patches.
#pragma once

#include <type_traits>

#include "patches/problem.cuh"

namespace cpc::patches::cuda {

// The gradient of a pixel v before patch_norm is a * g + b * v + c, where g is the gradient after it: see norm_slopes
// in cpu.cpp. The coefficients are read in one access.
enum Slope { kSlopeA, kSlopeB, kSlopeC, kSlopes = 4 };
template <class Real>
using NormSlopes = Pack<Real, kSlopes>;

template <class Real>
__global__ void __launch_bounds__(kThreads)
    find_norm_slopes(const __grid_constant__ Common<Real> p, const void* grads, DType grad_type, Real* slopes) {
  for (int64_t i = blockIdx.x; i < p.batch * p.rows * p.cols; i += gridDim.x) {
    const PatchIndex at = patch_at(p, i);
    const Window window = p.window(at.b);
    Real mean, deviation;
    block_moments(p, at, window, mean, deviation);
    Real sum = 0, dot = 0;
#pragma unroll 1
    for (int64_t e = threadIdx.x; e < p.values; e += kThreads) {
      const Real g = load_as<Real>(grads, grad_type, i * p.values + e);
      sum += g;
      dot += g * (patch_value(p, at, window, e) - mean);
    }
    const Real n = static_cast<Real>(p.values), grad_mean = block_sum<kThreads>(sum) / n;
    dot = block_sum<kThreads>(dot);
    if (threadIdx.x == 0) {
      const Real inverse = 1 / (deviation + Real(kContrastFloor));
      const Real b = deviation == 0 ? 0 : -dot * inverse * inverse / (n * deviation);
      pack_at<kSlopes>(slopes + i * kSlopes) = {inverse, b, -inverse * grad_mean - b * mean, 0};
    }
  }
}

template <class Real>
struct SumArguments {
  Common<Real> common;
  const void* grads;
  DType grad_type, image_type;
  const Real* slopes;  // Null without patch_norm.
  void* images_grad;
  int64_t first_image;  // Of this launch.
  int32_t rows;         // Of all planes of the windows of this launch.
  int32_t rows_of_block;
  // A plane has the pixels of one channel, or those of all channels; pixels are `step` values apart. `width`, `run` and
  // `distance` are the values of a row of a plane, of a patch's row, and between the rows of neighbouring patches.
  int32_t planes, step, width, run, distance;
  int32_t patch, stride, grid_rows, grid_cols;
  FastDivide by_groups, by_height, by_planes;  // From a group of values to (image, plane, y, x).
  FastDivide by_stride, by_distance, by_step;

  explicit SumArguments(const Common<Real>& all) : common(all) {}
};

// The patches along an axis that contain a position, see window.h.
__device__ inline void cover(int32_t at, int32_t patch, const FastDivide& by_stride, int32_t patches, int32_t& first,
                             int32_t& last) {
  uint32_t rest;
  const auto newest = static_cast<int32_t>(by_stride(at, rest));
  first = at < patch ? 0 : static_cast<int32_t>(by_stride(at - patch, rest)) + 1;
  last = newest < patches ? newest : patches - 1;
}

// N neighbouring values of a row of the window, and where they are.
struct RowGroup {
  int64_t b;
  int32_t plane, y, e, count;
};

// Sums over the patches that contain all of the group. Grad: void where types are known only at run time.
template <class Grad, int N, class Real>
__device__ void sum_group(const SumArguments<Real>& a, const RowGroup& at, const Window& window, Real (&total)[N]) {
  const Common<Real>& p = a.common;
  int32_t first_row, last_row, first_col, last_col;
  cover(at.y, a.patch, a.by_stride, a.grid_rows, first_row, last_row);
  cover(at.e, a.run, a.by_distance, a.grid_cols, first_col, last_col);
  Real value = 0;
  if constexpr (std::is_void_v<Grad>) {
    static_assert(N == 1);
    if (a.slopes != nullptr) {
      uint32_t k = at.plane, x = at.e;
      if (a.step > 1) x = a.by_step(at.e, k);
      value = p.pixel(at.b, window, k, at.y, x);
    }
  }
#pragma unroll 1
  for (int32_t r = first_row; r <= last_row; ++r) {
    int64_t patch = (at.b * a.grid_rows + r) * a.grid_cols + first_col;
    int64_t from =
        patch * p.values + (at.plane * a.patch + at.y - r * a.stride) * a.run + at.e - first_col * a.distance;
#pragma unroll 2  // Rarely do more than two contain a pixel.
    for (int32_t c = first_col; c <= last_col; ++c, ++patch, from += p.values - a.distance) {
      if constexpr (std::is_void_v<Grad>) {
        const Real g = load_as<Real>(a.grads, a.grad_type, from);
        if (a.slopes != nullptr) {
          const NormSlopes<Real> s = pack_at<kSlopes>(a.slopes + patch * kSlopes);
          total[0] += s.v[kSlopeA] * g + s.v[kSlopeB] * value + s.v[kSlopeC];
        } else {
          total[0] += g;
        }
      } else {
        const auto group = pack_at<N>(static_cast<const Grad*>(a.grads) + from);
#pragma unroll
        for (int i = 0; i < N; ++i) total[i] += widen<Real>(group.v[i]);
      }
    }
  }
}

// The offset in images_grad of pixel x of a row of the window, in a channel of the image.
template <class Real>
__device__ int64_t place_of(const SumArguments<Real>& a, const RowGroup& at, const Window& window, int32_t channel,
                            int32_t x) {
  const TensorView& images = a.common.images;
  const int64_t column = window.x + (window.flip ? a.common.geometry.width - 1 - x : x);
  return ((at.b * images.shape[1] + channel) * images.shape[2] + window.y + at.y) * images.shape[3] + column;
}

// Stores the gradients of neighbouring pixels of a channel of the image, in one access if they are aligned.
template <class T, int N, class Real>
__device__ void store_pixels(const SumArguments<Real>& a, const RowGroup& at, const Window& window, int32_t channel,
                             Real scale, const Real (&total)[N]) {
  const bool flip = window.flip, whole = at.count == N;
  T* const first = static_cast<T*>(a.images_grad) + place_of(a, at, window, channel, at.e);
  Real v[N];
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = scale * (whole && flip ? total[N - 1 - i] : total[i]);
  if (whole) return store_run(flip ? first - (N - 1) : first, v, N);
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < at.count) first[flip ? -i : i] = Narrow<T>::from(v[i]);
}

template <int N, class Real>
__device__ void store_group(const SumArguments<Real>& a, const RowGroup& at, const Window& window,
                            const Real (&total)[N]) {
  const Common<Real>& p = a.common;
  if (a.step > 1) {  // Values of different channels.
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= at.count) continue;
      uint32_t k;
      const auto x = static_cast<int32_t>(a.by_step(at.e + i, k));
      const auto channel = static_cast<int32_t>(k);
      store_as(a.images_grad, a.image_type, place_of(a, at, window, channel, x), p.scale[channel] * total[i]);
    }
    return;
  }
  const bool gray = p.to_gray();
#pragma unroll 1
  for (int32_t c = 0; c < (gray ? 3 : 1); ++c) {
    const int32_t channel = gray ? c : at.plane;
    const Real scale = gray ? p.scale[0] * Real(luma(c)) : p.scale[at.plane];
    switch (a.image_type) {
      case DType::f16: store_pixels<Half>(a, at, window, channel, scale, total); break;
      case DType::bf16: store_pixels<BFloat16>(a, at, window, channel, scale, total); break;
      case DType::f32: store_pixels<float>(a, at, window, channel, scale, total); break;
      default:
        if constexpr (std::is_same_v<Real, double>) store_pixels<double>(a, at, window, channel, scale, total);
    }
  }
}

// N: values that one access reads, all contained in the same patches; 1 works for any geometry.
template <class Real, class Grad, int N>
__global__ void __launch_bounds__(kThreads) sum_patches(const __grid_constant__ SumArguments<Real> a) {
  const uint32_t groups = static_cast<uint32_t>(a.width + N - 1) / N;
  for (int64_t block = int64_t{blockIdx.x} * a.rows_of_block; block < a.rows;
       block += int64_t{gridDim.x} * a.rows_of_block) {
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < a.rows_of_block * groups; i += kThreads) {
      uint32_t group, y, plane;
      const uint32_t row = static_cast<uint32_t>(block) + a.by_groups(i, group);
      if (row >= static_cast<uint32_t>(a.rows)) continue;
      const uint32_t image = a.by_planes(a.by_height(row, y), plane);
      const auto e = static_cast<int32_t>(group) * N;
      const RowGroup at{a.first_image + image, static_cast<int32_t>(plane), static_cast<int32_t>(y), e,
                        a.width - e < N ? a.width - e : N};
      const Window window = a.common.window(at.b);
      Real total[N] = {};
      sum_group<Grad>(a, at, window, total);
      store_group(a, at, window, total);
    }
  }
}

}  // namespace cpc::patches::cuda
