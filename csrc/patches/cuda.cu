// Patch extraction on the GPU: from images to normalised overlapping patches, and the gradient back.
// A block takes patches that are neighbours in one row of one image. Its threads transform the image rows those patches
// share into shared memory, each pixel once; the patches, which lie one after another in memory, are then written from
// there as a single stream of 16-byte stores. A patch too large for shared memory is read from the image instead.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "core/cuda/device.h"
#include "core/cuda/kernel.cuh"
#include "patches/patches.h"
#include "patches/window.h"

namespace cpc::patches::cuda {
namespace {

using namespace cpc::cuda;

constexpr int kThreads = 256;
// Pixels that a thread reads at a time: 4 bytes of uint8, 16 of float.
constexpr int kGroup = 4;
// A block's share that leaves room for several blocks on a multiprocessor, whose loads and stores then overlap.
constexpr int64_t kPreferredSharedBytes = 32 << 10;

// What both kernels know of the problem, by value.
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
  __device__ bool to_gray() const { return geometry.gray && images.shape[1] == 3; }
  __device__ Window window(int64_t b) const { return window_of(geometry, images, offsets, flip, b); }

  // Where the window's pixel (y, x) of a channel of image b lies in the image, in elements.
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

// --- Forward ---

// Pixels x .. x + kGroup - 1 of a window row, of which `count` exist: in one access where they lie together and
// aligned.
template <class In, class Real>
__device__ void load_group(Real (&out)[kGroup], const In* row, int64_t step, int64_t x, int count) {
  const In* first = row + (step < 0 ? -(x + kGroup - 1) : x);
  if (count == kGroup && (step == 1 || step == -1) && reinterpret_cast<uintptr_t>(first) % (kGroup * sizeof(In)) == 0) {
    const auto group = pack_at<kGroup>(first);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) out[i] = widen<Real>(step < 0 ? group.v[kGroup - 1 - i] : group.v[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kGroup; ++i)
    if (i < count) out[i] = widen<Real>(row[(x + i) * step]);
}

template <class Real>
struct ForwardArguments {
  Common<Real> common;
  void* patches;
  int64_t tiles_per_row;  // Tiles of a patch row.
  int tile;               // Patches of a tile; the last of a row may have fewer.
  // How a tile lies in shared memory: planes of `patch` rows of `row` values, one pixel's values `step` apart. A patch
  // is planes of `patch` runs of `run` values.
  int planes, row, step, run;
  FastDivide by_values, by_plane, by_run;  // From a position in the tile's patches to (patch, plane, y, x).
  FastDivide by_groups, by_patch;          // From a group to (channel, y, group of the row), for a full tile.
  int64_t shared_values;
};

template <class Real>
struct Moments {
  Real mean, inverse;
};

// Visits the values of patch j of a tile in shared memory: lane l takes values l, l + 32, ….
template <class Real, class Visit>
__device__ void for_each_value(const ForwardArguments<Real>& a, int lane, const Visit& visit) {
  for (uint32_t e = lane; e < a.common.values; e += kWarp) {
    uint32_t in_plane, x;
    const uint32_t plane = a.by_plane(e, in_plane);
    const uint32_t y = a.by_run(in_plane, x);
    visit((plane * a.common.geometry.patch + y) * a.row + x);
  }
}

// N neighbouring values of shared memory, 16 bytes at a time where they are aligned.
template <int N, class Real>
__device__ void load_shared(Real (&out)[N], const Real* from) {
  constexpr int kWide = 16 / sizeof(Real);
  if (N % kWide == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += kWide) {
      const auto wide = pack_at<kWide>(from + i);
#pragma unroll
      for (int s = 0; s < kWide; ++s)
        if (i + s < N) out[i + s] = wide.v[s];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = from[i];
  }
}

template <class Real, class Out>
__global__ void __launch_bounds__(kThreads, 4) extract_staged(const __grid_constant__ ForwardArguments<Real> a) {
  constexpr int kVector = 16 / sizeof(Out);
  const Common<Real>& p = a.common;
  const int patch = static_cast<int>(p.geometry.patch), stride = static_cast<int>(p.geometry.stride);
  Real* const pixels = reinterpret_cast<Real*>(dynamic_shared());
  auto* const moments = reinterpret_cast<Moments<Real>*>(pixels + a.shared_values);
  const int64_t tiles = p.batch * p.rows * a.tiles_per_row;

  for (int64_t t = blockIdx.x; t < tiles; t += gridDim.x) {
    const int64_t patch_row = t / a.tiles_per_row;  // The patch row among those of all images.
    const int64_t b = patch_row / p.rows, r = patch_row % p.rows;
    const int64_t first_col = t % a.tiles_per_row * a.tile;
    const int cols = static_cast<int>(p.cols - first_col < a.tile ? p.cols - first_col : a.tile);
    const int width = (cols - 1) * stride + patch;
    const Window window = p.window(b);

    // Image to shared memory.
    const uint32_t groups_per_row = ((a.tile - 1) * stride + patch + kGroup - 1) / kGroup;
    const uint32_t groups = static_cast<uint32_t>(p.channels) * patch * groups_per_row;
    for (uint32_t i = threadIdx.x; i < groups; i += kThreads) {
      uint32_t group, y;
      const uint32_t k = a.by_patch(a.by_groups(i, group), y);
      const int x = static_cast<int>(group) * kGroup;
      const int count = width - x < kGroup ? width - x : kGroup;
      if (count <= 0) continue;
      Real v[kGroup] = {};
      const auto load = [&](auto type, int64_t channel, Real(&out)[kGroup]) {
        using In = decltype(type);
        const In* row = p.images.template as<In>() + p.source(b, window, channel, r * stride + y, first_col * stride);
        load_group(out, row, window.flip ? -p.images.strides[3] : p.images.strides[3], x, count);
      };
      const auto load_any = [&](int64_t channel, Real(&out)[kGroup]) {
        switch (p.images.dtype) {
          case DType::u8: return load(uint8_t{}, channel, out);
          case DType::f16: return load(Half{}, channel, out);
          case DType::bf16: return load(BFloat16{}, channel, out);
          case DType::f32: return load(float{}, channel, out);
          default: return load(double{}, channel, out);
        }
      };
      if (p.to_gray()) {
        for (int c = 0; c < 3; ++c) {
          Real colour[kGroup] = {};
          load_any(c, colour);
#pragma unroll
          for (int j = 0; j < kGroup; ++j) v[j] += Real(luma(c)) * colour[j];
        }
      } else {
        load_any(k, v);
      }
      const int plane = a.planes == 1 ? 0 : static_cast<int>(k), within = a.planes == 1 ? static_cast<int>(k) : 0;
      Real* out = pixels + (plane * patch + static_cast<int>(y)) * a.row + x * a.step + within;
#pragma unroll
      for (int j = 0; j < kGroup; ++j)
        if (j < count) out[j * a.step] = p.scale[k] * v[j] + p.shift[k];
    }
    __syncthreads();

    // Each patch's own mean and contrast: a warp a patch.
    if (p.geometry.patch_norm) {
      const int lane = threadIdx.x % kWarp;
      for (int j = threadIdx.x / kWarp; j < cols; j += kThreads / kWarp) {
        const Real* const first = pixels + j * stride * a.step;
        Real total = 0, squares = 0;
        for_each_value(a, lane, [&](int at) { total += first[at]; });
        const Real mean = warp_sum(total) / static_cast<Real>(p.values);
        for_each_value(a, lane, [&](int at) { squares += (first[at] - mean) * (first[at] - mean); });
        const Real deviation = sqrt(warp_sum(squares) / static_cast<Real>(p.values));
        if (lane == 0) moments[j] = {mean, 1 / (deviation + Real(kContrastFloor))};
      }
      __syncthreads();
    }

    // Shared memory to the patches: chunks of kVector values that start at 16-byte boundaries. Those that stick out of
    // the tile at either end are stored value by value.
    Out* const out = static_cast<Out*>(a.patches) + (patch_row * p.cols + first_col) * p.values;
    const int before = static_cast<int>(reinterpret_cast<uintptr_t>(out) / sizeof(Out) % kVector);
    const int count = cols * static_cast<int>(p.values);
    for (int e = static_cast<int>(threadIdx.x) * kVector - before; e < count; e += kThreads * kVector) {
      const int begin = e < 0 ? 0 : e, end = e + kVector < count ? e + kVector : count;
      uint32_t in_patch, in_plane, x, y;
      uint32_t j = a.by_values(begin, in_patch);
      uint32_t plane = a.by_plane(in_patch, in_plane);
      y = a.by_run(in_plane, x);
      const auto normalised = [&](Real v) {
        return p.geometry.patch_norm ? (v - moments[j].mean) * moments[j].inverse : v;
      };
      const auto position = [&] {
        return static_cast<int>((plane * patch + y) * a.row + x) + static_cast<int>(j) * stride * a.step;
      };
      Pack<Out, kVector> chunk;
      if (end - begin == kVector && static_cast<int>(x) + kVector <= a.run) {  // All within one run.
        Real v[kVector];
        load_shared(v, pixels + position());
#pragma unroll
        for (int i = 0; i < kVector; ++i) chunk.v[i] = Narrow<Out>::from(normalised(v[i]));
      } else {
        for (int i = begin; i < end; ++i) {
          const Out v = Narrow<Out>::from(normalised(pixels[position()]));
#pragma unroll
          for (int s = 0; s < kVector; ++s)  // A register is indexed by constants only.
            if (s == i - e) chunk.v[s] = v;
          if (++x == static_cast<uint32_t>(a.run)) {
            x = 0;
            if (++y == static_cast<uint32_t>(patch)) {
              y = 0;
              if (++plane == static_cast<uint32_t>(a.planes)) {
                plane = 0;
                ++j;
              }
            }
          }
        }
      }
      if (end - begin == kVector) {
        pack_at<kVector>(out + e) = chunk;
      } else {
#pragma unroll
        for (int s = 0; s < kVector; ++s)
          if (e + s >= begin && e + s < end) out[e + s] = chunk.v[s];
      }
    }
    __syncthreads();  // The next tile overwrites shared memory.
  }
}

// The patch that block-wide work is on, where a block takes whole patches.
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

// A patch's mean and deviation, found by a whole block.
template <class Real>
__device__ void block_moments(const Common<Real>& p, const PatchIndex& at, const Window& window, Real& mean,
                              Real& deviation) {
  const Real n = static_cast<Real>(p.values);
  Real total = 0, squares = 0;
  for (int64_t e = threadIdx.x; e < p.values; e += kThreads) total += patch_value(p, at, window, e);
  mean = block_sum<kThreads>(total) / n;
  for (int64_t e = threadIdx.x; e < p.values; e += kThreads) {
    const Real d = patch_value(p, at, window, e) - mean;
    squares += d * d;
  }
  deviation = sqrt(block_sum<kThreads>(squares) / n);
}

// Patches that do not fit shared memory: a block a patch, each value read from the image.
template <class Real, class Out>
__global__ void __launch_bounds__(kThreads) extract_direct(const __grid_constant__ Common<Real> p, void* patches) {
  for (int64_t i = blockIdx.x; i < p.batch * p.rows * p.cols; i += gridDim.x) {
    const PatchIndex at = patch_at(p, i);
    const Window window = p.window(at.b);
    Real mean = 0, inverse = 1;
    if (p.geometry.patch_norm) {
      Real deviation;
      block_moments(p, at, window, mean, deviation);
      inverse = 1 / (deviation + Real(kContrastFloor));
    }
    Out* const out = static_cast<Out*>(patches) + i * p.values;
    for (int64_t e = threadIdx.x; e < p.values; e += kThreads)
      out[e] = Narrow<Out>::from((patch_value(p, at, window, e) - mean) * inverse);
  }
}

template <class Real, class Out>
void launch_extract(const Problem& problem, void* stream) {
  const Common<Real> common(problem);
  const Geometry& g = problem.geometry;
  const int64_t channels = problem.channels(), planes = g.channels_last ? 1 : channels;
  const int64_t step = g.channels_last ? channels : 1, run = g.patch * step;
  // Rows one run further in shared memory, modulo its 32 banks, so that the runs of a patch do not share banks.
  const auto row_of = [&](int64_t tile) {
    const int64_t row = ((tile - 1) * g.stride + g.patch) * step;
    return row + ((run - row) % 32 + 32) % 32;
  };
  const auto shared_values = [&](int64_t tile) { return (planes * g.patch * row_of(tile) + 3) / 4 * 4; };
  const auto shared_bytes = [&](int64_t tile) {
    return shared_values(tile) * int64_t{sizeof(Real)} + (g.patch_norm ? tile * int64_t{sizeof(Moments<Real>)} : 0);
  };

  // Float64 images cast to a narrower type are not worth a staged kernel of their own.
  constexpr bool staged = sizeof(Real) == 4 || std::is_same_v<Real, Out>;
  const auto fits = [&] {
    if constexpr (staged) return shared_bytes(1) <= dynamic_shared_limit(&extract_staged<Real, Out>);
    return false;
  };
  if (!fits())
    return launch("extract_direct", &extract_direct<Real, Out>,
                  {problem.batch() * problem.rows() * problem.cols(), dim3(kThreads)}, stream, common,
                  problem.patches.data);
  int64_t tile = 1;  // As many neighbours as the preferred share holds.
  while (tile < problem.cols() && shared_bytes(tile + 1) <= kPreferredSharedBytes) ++tile;
  ForwardArguments<Real> a{common};
  a.patches = problem.patches.data;
  a.tile = static_cast<int>(tile);
  a.tiles_per_row = (problem.cols() + tile - 1) / tile;
  a.planes = static_cast<int>(planes);
  a.row = static_cast<int>(row_of(tile));
  a.step = static_cast<int>(step);
  a.run = static_cast<int>(run);
  a.by_values = FastDivide(static_cast<uint32_t>(common.values));
  a.by_plane = FastDivide(static_cast<uint32_t>(g.patch * run));
  a.by_run = FastDivide(static_cast<uint32_t>(run));
  a.by_groups = FastDivide(static_cast<uint32_t>(((tile - 1) * g.stride + g.patch + kGroup - 1) / kGroup));
  a.by_patch = FastDivide(static_cast<uint32_t>(g.patch));
  a.shared_values = shared_values(tile);
  if constexpr (staged)
    launch("extract_staged", &extract_staged<Real, Out>,
           {problem.batch() * problem.rows() * a.tiles_per_row, dim3(kThreads), shared_bytes(tile)}, stream, a);
}

// --- Backward ---

// The gradient of a patch's pixel before patch_norm as a * g + b * v + c, of the patch's gradient g and the pixel v:
// see norm_slopes in cpu.cpp.
template <class Real>
struct NormSlopes {
  Real a, b, c;
};

template <class Real>
__global__ void __launch_bounds__(kThreads) find_norm_slopes(const __grid_constant__ Common<Real> p, const void* grads,
                                                             DType grad_type, NormSlopes<Real>* slopes) {
  for (int64_t i = blockIdx.x; i < p.batch * p.rows * p.cols; i += gridDim.x) {
    const PatchIndex at = patch_at(p, i);
    const Window window = p.window(at.b);
    Real mean, deviation;
    block_moments(p, at, window, mean, deviation);
    Real sum = 0, dot = 0;
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
      slopes[i] = {inverse, b, -inverse * grad_mean - b * mean};
    }
  }
}

// A thread sums the patches of one pixel; the threads of a warp lie along an image row, so that they read neighbouring
// gradients.
constexpr int kRowThreads = 64, kRowsOfBlock = 4;

template <class Real>
__global__ void __launch_bounds__(kRowThreads* kRowsOfBlock)
    sum_patches(const __grid_constant__ Common<Real> p, const void* grads, DType grad_type,
                const NormSlopes<Real>* slopes, void* images_grad, DType image_type) {
  const int64_t height = p.images.shape[2], width = p.images.shape[3];
  const int64_t patch = p.geometry.patch, stride = p.geometry.stride;
  const int64_t image_rows = p.batch * p.channels * height;
  for (int64_t i = int64_t{blockIdx.x} * kRowsOfBlock + threadIdx.y; i < image_rows;
       i += int64_t{gridDim.x} * kRowsOfBlock) {
    const int64_t image_y = i % height, k = i / height % p.channels, b = i / height / p.channels;
    const Window window = p.window(b);
    const int64_t y = image_y - window.y;
    const bool inside = y >= 0 && y < p.geometry.height;
    const Covering rows = covering(inside ? y : 0, patch, stride, p.rows);
    for (int64_t image_x = threadIdx.x; image_x < width; image_x += kRowThreads) {
      Real total = 0;
      int64_t x = image_x - window.x;
      if (inside && x >= 0 && x < p.geometry.width) {
        if (window.flip) x = p.geometry.width - 1 - x;
        const Covering cols = covering(x, patch, stride, p.cols);
        const Real value = slopes != nullptr ? p.pixel(b, window, k, y, x) : Real(0);
        for (int64_t r = rows.first; r <= rows.last; ++r)
          for (int64_t c = cols.first; c <= cols.last; ++c) {
            const int64_t at = (b * p.rows + r) * p.cols + c, area = (y - r * stride) * patch + (x - c * stride);
            const int64_t e = p.geometry.channels_last ? area * p.channels + k : k * patch * patch + area;
            const Real g = load_as<Real>(grads, grad_type, at * p.values + e);
            if (slopes != nullptr) {
              const NormSlopes<Real> s = slopes[at];
              total += s.a * g + s.b * value + s.c;
            } else {
              total += g;
            }
          }
      }
      const int channels = p.to_gray() ? 3 : 1;
      for (int c = 0; c < channels; ++c) {
        const int64_t channel = p.to_gray() ? c : k;
        const Real scale = p.to_gray() ? p.scale[0] * Real(luma(c)) : p.scale[k];
        store_as(images_grad, image_type, ((b * p.images.shape[1] + channel) * height + image_y) * width + image_x,
                 scale * total);
      }
    }
  }
}

template <class Real>
void launch_backward(const Problem& problem, void* stream) {
  const Common<Real> common(problem);
  const void* const grads = problem.patches.data;
  NormSlopes<Real>* slopes = nullptr;
  if (problem.geometry.patch_norm) {
    const int64_t patches = problem.batch() * problem.rows() * problem.cols();
    slopes = problem.workspace.as<NormSlopes<Real>>();
    launch("find_norm_slopes", &find_norm_slopes<Real>, {patches, dim3(kThreads)}, stream, common, grads,
           problem.patches.dtype, slopes);
  }
  const int64_t image_rows = problem.batch() * problem.channels() * problem.images.shape[2];
  launch("sum_patches", &sum_patches<Real>,
         {(image_rows + kRowsOfBlock - 1) / kRowsOfBlock, dim3(kRowThreads, kRowsOfBlock)}, stream, common, grads,
         problem.patches.dtype, slopes, problem.images_grad.data, problem.images_grad.dtype);
}

}  // namespace

void extract(const Problem& problem, void* stream) {
  if (problem.patches.numel() == 0) return;
  with_floating(problem.patches.dtype, [&](auto out) {
    using Out = decltype(out);
    if (problem.in_double())
      launch_extract<double, Out>(problem, stream);
    else if constexpr (!std::is_same_v<Out, double>)
      launch_extract<float, Out>(problem, stream);
  });
}

void extract_backward(const Gradient& problem, void* stream) {
  if (problem.images_grad.numel() == 0) return;
  problem.in_double() ? launch_backward<double>(problem, stream) : launch_backward<float>(problem, stream);
}

}  // namespace cpc::patches::cuda
