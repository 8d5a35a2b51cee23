// Per-patch augmentation on the GPU: from uint8 images to normalised patches, each transformed in its own way.
// A block takes one patch: its threads cut it into shared memory as planes of bytes, carry out its transforms there one
// after another, and write the normalised values in 16-byte stores. Patches too large for shared memory are transformed
// in a workspace instead, which the caches hold in part.
#include <algorithm>
#include <type_traits>

#include "augment/augment.h"
#include "augment/transform.h"
#include "core/cuda/device.h"
#include "core/cuda/kernel.cuh"
#include "core/workspace.h"
#include "patches/window.h"

namespace cpc::augment::cuda {
namespace {

using namespace cpc::cuda;
using patches::Geometry;
using patches::Window;

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
// Blocks a multiprocessor that transform in the workspace.
constexpr int64_t kWorkspaceBlocks = 2;
constexpr int kLevels = 256;

// What all transforms share beside the pixels.
struct Tables {
  int32_t histogram[3][kLevels];
  int32_t nodes[2][kNodes][kNodes];
  int32_t extremes[2][kWarps];
  Affine affine;
};

struct Arguments {
  Geometry geometry;
  TensorView images, offsets, flip;
  const uint8_t* codes;
  const float* parameters;
  const int64_t* partners;     // Or null.
  const float* displacements;  // Or null.
  void* patches;
  DType patches_dtype;
  uint8_t* workspace;
  int64_t count, rows, cols, steps;
  int32_t channels, out_channels, side, area, plane;  // Planes of bytes begin `plane` apart.
  int32_t values;                                     // Values of a finished patch.
  uint8_t fill;
  double scale[3], shift[3];
  float float_scale[3], float_shift[3];  // The same: converting costs more than multiplying.
  FastDivide by_side, by_area, by_out_channels;

  template <class Real>
  __device__ Real normalised(Real v, uint32_t k) const {
    if constexpr (std::is_same_v<Real, float>) return float_scale[k] * v + float_shift[k];
    return scale[k] * v + shift[k];
  }
  __device__ bool to_gray() const { return geometry.gray && channels == 3; }
};

// --- Bytes of a patch ---

// The pixels and a second buffer for what cannot be done in place. All threads hold the same.
class Patch {
 public:
  __device__ Patch(const Arguments& a, Tables& tables, uint8_t* memory)
      : a_(a), tables_(tables), pixels_(memory), other_(memory + a.channels * a.plane) {}

  __device__ const uint8_t* pixels() const { return pixels_; }

  // Calls visit(i, y, x) for this thread's share of the places of a patch.
  template <class Visit>
  __device__ void each_place(const Visit& visit) const {
    for (int32_t i = threadIdx.x; i < a_.area; i += kThreads) {
      uint32_t x;
      const uint32_t y = a_.by_side(i, x);
      visit(i, static_cast<int32_t>(y), static_cast<int32_t>(x));
    }
  }

  // Calls use(pixel, i, k) with every pixel (y, x) of channel k of a patch of the batch, as it is in the image.
  template <class Use>
  __device__ void each_source(int64_t index, const Use& use) const {
    const TensorView& images = a_.images;
    const int64_t per_image = a_.rows * a_.cols, b = index / per_image;
    const int64_t r = index % per_image / a_.cols, c = index % a_.cols, stride = a_.geometry.stride;
    const Window window = patches::window_of(a_.geometry, images, a_.offsets, a_.flip, b);
    const int64_t column = window.flip ? a_.geometry.width - 1 - c * stride : c * stride;
    const int64_t step = window.flip ? -images.strides[3] : images.strides[3];
    const uint8_t* const first = images.as<uint8_t>() + b * images.strides[0] +
                                 (window.y + r * stride) * images.strides[2] + (window.x + column) * images.strides[3];
    each_place([&](int32_t i, int32_t y, int32_t x) {
      const uint8_t* const at = first + y * images.strides[2] + x * step;
      for (int k = 0; k < a_.channels; ++k) use(at[k * images.strides[1]], i, k);
    });
  }

  __device__ void cut(int64_t index) {
    each_source(index, [&](uint8_t v, int32_t i, int k) { pixels_[k * a_.plane + i] = v; });
    __syncthreads();
  }

  // Each pixel v of channel k becomes become(v, k).
  template <class Become>
  __device__ void each(const Become& become) {
    for (int32_t i = threadIdx.x; i < a_.area; i += kThreads)
      for (int k = 0; k < a_.channels; ++k) {
        uint8_t& v = pixels_[k * a_.plane + i];
        v = static_cast<uint8_t>(become(int32_t{v}, k));
      }
    __syncthreads();
  }

  // Each pixel comes from place from(y, x) of the patch, the fill where that is negative.
  template <class From>
  __device__ void take(const From& from) {
    each_place([&](int32_t i, int32_t y, int32_t x) {
      const int32_t at = from(y, x);
      for (int k = 0; k < a_.channels; ++k) other_[k * a_.plane + i] = at < 0 ? a_.fill : pixels_[k * a_.plane + at];
    });
    swap();
  }

  __device__ void move(Transform transform, float parameter) {
    if (threadIdx.x == 0) tables_.affine = affine_of(transform, parameter, a_.side);
    __syncthreads();
    const Affine m = tables_.affine;
    take([&](int32_t y, int32_t x) {
      const int32_t from_x = (m.a * x + m.b * y + m.c) >> kPlaceBits, from_y = (m.d * x + m.e * y + m.f) >> kPlaceBits;
      const bool inside = static_cast<uint32_t>(from_x) < static_cast<uint32_t>(a_.side) &&
                          static_cast<uint32_t>(from_y) < static_cast<uint32_t>(a_.side);
      return inside ? from_y * a_.side + from_x : -1;
    });
  }

  __device__ void crop(const Crop& crop) {
    take([&](int32_t y, int32_t x) {
      const int32_t row = y - crop.at, column = x - crop.at;
      const bool inside = static_cast<uint32_t>(row) < static_cast<uint32_t>(crop.side) &&
                          static_cast<uint32_t>(column) < static_cast<uint32_t>(crop.side);
      return inside ? (crop.top + row) * a_.side + crop.left + column : -1;
    });
  }

  __device__ void cut_out(const Cutout& cut) {
    each_place([&](int32_t i, int32_t y, int32_t x) {
      if (y >= cut.top && y < cut.bottom && x >= cut.left && x < cut.right)
        for (int k = 0; k < a_.channels; ++k) pixels_[k * a_.plane + i] = a_.fill;
    });
    __syncthreads();
  }

  __device__ void deform(const float* displacements) {
    if (threadIdx.x < 2 * kNodes * kNodes)
      (&tables_.nodes[0][0][0])[threadIdx.x] = displacement_of(displacements[threadIdx.x]);
    __syncthreads();
    each_place([&](int32_t i, int32_t y, int32_t x) {
      const Between down = between_nodes(y, a_.side), right = between_nodes(x, a_.side);
      const auto displacement = [&](int axis) {
        const auto& nodes = tables_.nodes[axis];
        const auto in_row = [&](int32_t column) {
          return mix(nodes[down.node][column], nodes[down.node + 1][column], down.weight);
        };
        return mix(in_row(right.node), in_row(right.node + 1), right.weight);
      };
      const Sample sample_y = sample_at(y, displacement(0), a_.side), sample_x = sample_at(x, displacement(1), a_.side);
      for (int k = 0; k < a_.channels; ++k) {
        const uint8_t* const upper = pixels_ + k * a_.plane + sample_y.low * a_.side;
        const uint8_t* const lower = pixels_ + k * a_.plane + sample_y.high * a_.side;
        other_[k * a_.plane + i] =
            static_cast<uint8_t>(mix_pixels(upper[sample_x.low], upper[sample_x.high], lower[sample_x.low],
                                            lower[sample_x.high], sample_x.weight, sample_y.weight));
      }
    });
    swap();
  }

  // Mixes in the partner as it is in its image.
  __device__ void pair(int64_t index, int32_t share) {
    if (a_.partners == nullptr) return;
    const int64_t partner = patches::clamp(a_.partners[index], a_.count - 1);
    each_source(partner, [&](uint8_t other, int32_t i, int k) {
      uint8_t& v = pixels_[k * a_.plane + i];
      v = static_cast<uint8_t>(blend(v, other, share));
    });
    __syncthreads();
  }

  __device__ void sharpness(int32_t factor) {
    const int32_t side = a_.side;
    each_place([&](int32_t i, int32_t y, int32_t x) {
      const bool inside = x > 0 && x < side - 1 && y > 0 && y < side - 1;
      for (int k = 0; k < a_.channels; ++k) {
        const uint8_t* const at = pixels_ + k * a_.plane + i;
        int32_t v = *at;
        if (inside) {
          int32_t sum = 0;
          for (int row = -1; row <= 1; ++row)
            for (int column = -1; column <= 1; ++column) sum += at[row * side + column];
          v = blend(smooth(sum, v), v, factor);
        }
        other_[k * a_.plane + i] = static_cast<uint8_t>(v);
      }
    });
    swap();
  }

  __device__ void autocontrast() {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    for (int k = 0; k < a_.channels; ++k) {
      uint8_t* const plane = pixels_ + k * a_.plane;
      int32_t low = 255, high = 0;
      for (int32_t i = threadIdx.x; i < a_.area; i += kThreads) {
        low = plane[i] < low ? plane[i] : low;
        high = plane[i] > high ? plane[i] : high;
      }
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const int32_t other_low = __shfl_xor_sync(0xffffffffu, low, mask);
        const int32_t other_high = __shfl_xor_sync(0xffffffffu, high, mask);
        low = other_low < low ? other_low : low;
        high = other_high > high ? other_high : high;
      }
      if (lane == 0) {
        tables_.extremes[0][warp] = low;
        tables_.extremes[1][warp] = high;
      }
      __syncthreads();
      for (int w = 0; w < kWarps; ++w) {
        low = tables_.extremes[0][w] < low ? tables_.extremes[0][w] : low;
        high = tables_.extremes[1][w] > high ? tables_.extremes[1][w] : high;
      }
      if (high > low) {
        const float inverse = 1.0f / static_cast<float>(high - low);
        for (int32_t i = threadIdx.x; i < a_.area; i += kThreads)
          plane[i] = static_cast<uint8_t>(stretch(plane[i], low, inverse));
      }
      __syncthreads();  // The next channel overwrites the extremes.
    }
  }

  // A warp turns each channel's histogram into the table that makes it even.
  __device__ void equalize() {
    static_assert(kWarps >= 3 && kLevels % kWarp == 0);
    constexpr int kShare = kLevels / kWarp;
    for (int i = threadIdx.x; i < 3 * kLevels; i += kThreads) (&tables_.histogram[0][0])[i] = 0;
    __syncthreads();
    for (int32_t i = threadIdx.x; i < a_.area; i += kThreads)
      for (int k = 0; k < a_.channels; ++k) atomicAdd(&tables_.histogram[k][pixels_[k * a_.plane + i]], 1);
    __syncthreads();
    const int lane = threadIdx.x % kWarp, channel = threadIdx.x / kWarp;
    if (channel < a_.channels) {
      int32_t* const mine = tables_.histogram[channel] + lane * kShare;
      int32_t total = 0, last = 0;  // Pixels of this lane's levels, and of the largest level that has any.
      for (int j = 0; j < kShare; ++j) {
        total += mine[j];
        last = mine[j] > 0 ? mine[j] : last;
      }
      int32_t before = total;
      for (int distance = 1; distance < kWarp; distance *= 2) {
        const int32_t lower = __shfl_up_sync(0xffffffffu, before, distance);
        before += lane >= distance ? lower : 0;
      }
      before -= total;
      const unsigned present = __ballot_sync(0xffffffffu, total > 0);
      last = __shfl_sync(0xffffffffu, last, kWarp - 1 - __clz(static_cast<int>(present)));
      const int32_t step = (a_.area - last) / 255;
      for (int j = 0; j < kShare; ++j) {
        const int32_t here = mine[j];
        mine[j] = step > 0 ? even_level(before, step) : lane * kShare + j;
        before += here;
      }
    }
    __syncthreads();
    each([&](int32_t v, int k) { return tables_.histogram[k][v]; });
  }

  __device__ int32_t luma_at(int32_t i) const {
    return luma(pixels_[i], pixels_[(a_.channels / 2) * a_.plane + i], pixels_[(a_.channels - 1) * a_.plane + i]);
  }

  __device__ void contrast(int32_t factor) {
    int32_t sum = 0;
    for (int32_t i = threadIdx.x; i < a_.area; i += kThreads) sum += luma_at(i);
    const int32_t mean = mean_level(block_sum<kThreads>(sum), a_.area);
    each([&](int32_t v, int) { return blend(mean, v, factor); });
  }

  // Blends each pixel with its luma; a factor of 0 leaves only that.
  __device__ void color(int32_t factor) {
    each_colour([&](int32_t i, uint8_t* const(&rgb)[3]) {
      const int32_t gray = luma_at(i);
      for (uint8_t* const v : rgb) *v = static_cast<uint8_t>(blend(gray, *v, factor));
    });
  }

  __device__ void hue(int32_t shift) {
    each_colour([&](int32_t, uint8_t* const(&rgb)[3]) {
      const int32_t red = *rgb[0], green = *rgb[1], blue = *rgb[2];
      Color color = color_of(red, green, blue);
      if (color.unsure) color.hue = hue_as_pillow(red, green, blue);
      for (int k = 0; k < 3; ++k)
        *rgb[k] = static_cast<uint8_t>(channel_of(k, (color.hue + shift) & 255, color.saturation, color.value));
    });
  }

 private:
  __device__ void swap() {
    uint8_t* const taken = other_;
    other_ = pixels_;
    pixels_ = taken;
    __syncthreads();
  }

  // Calls change(i, rgb) with the three pixels at a place; nothing for one channel.
  template <class Change>
  __device__ void each_colour(const Change& change) {
    if (a_.channels != 3) return;
    for (int32_t i = threadIdx.x; i < a_.area; i += kThreads) {
      uint8_t* const rgb[3] = {pixels_ + i, pixels_ + a_.plane + i, pixels_ + 2 * a_.plane + i};
      change(i, rgb);
    }
    __syncthreads();
  }

  const Arguments& a_;
  Tables& tables_;
  uint8_t *pixels_, *other_;
};

// All threads of the block take the same branch.
__device__ void apply(Patch& patch, const Arguments& a, int64_t index, Transform transform, const float* parameters) {
  switch (transform) {
    case Transform::shear_x:
    case Transform::shear_y:
    case Transform::translate_x:
    case Transform::translate_y:
    case Transform::rotate: return patch.move(transform, parameters[0]);
    case Transform::autocontrast: return patch.autocontrast();
    case Transform::invert: return patch.each([](int32_t v, int) { return 255 - v; });
    case Transform::equalize: return patch.equalize();
    case Transform::solarize: {
      const int32_t threshold = solarize_threshold(parameters[0]);
      return patch.each([=](int32_t v, int) { return v < threshold ? v : 255 - v; });
    }
    case Transform::posterize: {
      const int32_t mask = posterize_mask(parameters[0]);
      return patch.each([=](int32_t v, int) { return v & mask; });
    }
    case Transform::contrast: return patch.contrast(factor_of(parameters[0]));
    case Transform::color: return patch.color(factor_of(parameters[0]));
    case Transform::brightness: {
      const int32_t factor = factor_of(parameters[0]);
      return patch.each([=](int32_t v, int) { return blend(0, v, factor); });
    }
    case Transform::sharpness: return patch.sharpness(factor_of(parameters[0]));
    case Transform::cutout: return patch.cut_out(cutout_of(parameters, a.side));
    case Transform::sample_pairing: return patch.pair(index, factor_of(parameters[0], 1));
    case Transform::elastic:
      if (a.displacements != nullptr) patch.deform(a.displacements + index * 2 * kNodes * kNodes);
      return;
    case Transform::tone_curve: {
      const int32_t red = bend_of(parameters[0]), green = bend_of(parameters[1]), blue = bend_of(parameters[2]);
      return patch.each([=](int32_t v, int k) { return bend(v, k == 0 ? red : k == 1 ? green : blue); });
    }
    case Transform::hue: return patch.hue(hue_shift(parameters[0]));
    case Transform::gray: return patch.color(0);
    case Transform::crop: return patch.crop(crop_of(parameters, a.side));
    default: return;
  }
}

// --- Bytes to values ---

// Value e of a patch in the order of memory, as extraction computes it.
template <class Real>
__device__ Real value_at(const Arguments& a, const uint8_t* pixels, uint32_t e) {
  uint32_t i, k;
  if (a.geometry.channels_last)
    i = a.by_out_channels(e, k);
  else
    k = a.by_area(e, i);
  if (!a.to_gray()) return a.normalised(static_cast<Real>(pixels[k * a.plane + i]), k);
  Real v = 0;
  for (int c = 0; c < 3; ++c) v += Real(patches::luma(c)) * static_cast<Real>(pixels[c * a.plane + i]);
  return a.normalised(v, 0);
}

template <class Out>
__device__ void finish(const Arguments& a, const uint8_t* pixels, int64_t index) {
  using Real = std::conditional_t<std::is_same_v<Out, double>, double, float>;
  constexpr int kVector = 16 / sizeof(Out);
  const uint32_t values = static_cast<uint32_t>(a.values);
  Real mean = 0, inverse = 1;
  if (a.geometry.patch_norm) {
    Real total = 0, squares = 0;
    for (uint32_t e = threadIdx.x; e < values; e += kThreads) total += value_at<Real>(a, pixels, e);
    mean = block_sum<kThreads>(total) / static_cast<Real>(values);
    for (uint32_t e = threadIdx.x; e < values; e += kThreads) {
      const Real d = value_at<Real>(a, pixels, e) - mean;
      squares += d * d;
    }
    inverse = 1 / (sqrt(block_sum<kThreads>(squares) / static_cast<Real>(values)) +
                   static_cast<Real>(patches::kContrastFloor));
  }
  Out* const out = static_cast<Out*>(a.patches) + index * a.values;
  for (uint32_t e = threadIdx.x * kVector; e < values; e += kThreads * kVector) {
    const int count = values - e < kVector ? static_cast<int>(values - e) : kVector;
    Real v[kVector] = {};
#pragma unroll
    for (int s = 0; s < kVector; ++s)
      if (s < count) {
        v[s] = value_at<Real>(a, pixels, e + s);
        if (a.geometry.patch_norm) v[s] = (v[s] - mean) * inverse;
      }
    store_run(out + e, v, count);
  }
}

__global__ void __launch_bounds__(kThreads) augment_patches(const __grid_constant__ Arguments a) {
  auto& tables = static_shared<Tables, struct OfPatch>();
  // One kernel for both kinds of memory, which compiles in half of the time of two.
  uint8_t* const memory =
      a.workspace == nullptr ? dynamic_shared() : a.workspace + int64_t{blockIdx.x} * 2 * a.channels * a.plane;
  for (int64_t index = blockIdx.x; index < a.count; index += gridDim.x) {
    Patch patch(a, tables, memory);
    patch.cut(index);
    for (int64_t t = index * a.steps; t < (index + 1) * a.steps; ++t)
      apply(patch, a, index, static_cast<Transform>(a.codes[t]), a.parameters + t * kParameters);
    switch (a.patches_dtype) {
      case DType::f16: finish<Half>(a, patch.pixels(), index); break;
      case DType::bf16: finish<BFloat16>(a, patch.pixels(), index); break;
      case DType::f64: finish<double>(a, patch.pixels(), index); break;
      default: finish<float>(a, patch.pixels(), index); break;
    }
    __syncthreads();  // The next patch overwrites the memory.
  }
}

// Bytes of the two buffers of a patch, and from one plane to the next.
int64_t plane_bytes(int64_t side) { return divide_up(side * side, 16) * 16; }
int64_t patch_bytes(const patches::Problem& extraction) {
  return 2 * extraction.images.shape[1] * plane_bytes(extraction.geometry.patch);
}

bool fits_shared(const patches::Problem& extraction) {
  return patch_bytes(extraction) <= dynamic_shared_limit(&augment_patches);
}

int64_t workspace_blocks(int64_t count) { return std::min(count, kWorkspaceBlocks * multiprocessors()); }

int64_t count_of(const patches::Problem& extraction) {
  return extraction.batch() * extraction.rows() * extraction.cols();
}

}  // namespace

int64_t workspace_bytes(const patches::Problem& extraction) {
  return fits_shared(extraction) ? 0 : workspace_blocks(count_of(extraction)) * patch_bytes(extraction);
}

void augment(const Problem& problem, void* stream) {
  const patches::Problem& extraction = problem.extraction;
  if (extraction.patches.numel() == 0) return;
  Arguments a;
  a.geometry = extraction.geometry;
  a.images = extraction.images;
  a.offsets = extraction.offsets;
  a.flip = extraction.flip;
  a.codes = problem.codes.as<uint8_t>();
  a.parameters = problem.parameters.as<float>();
  a.partners = problem.partners.ndim != 0 ? problem.partners.as<int64_t>() : nullptr;
  a.displacements = problem.displacements.ndim != 0 ? problem.displacements.as<float>() : nullptr;
  a.patches = extraction.patches.data;
  a.patches_dtype = extraction.patches.dtype;
  a.count = problem.count();
  a.rows = extraction.rows();
  a.cols = extraction.cols();
  a.steps = problem.steps();
  a.channels = static_cast<int32_t>(extraction.images.shape[1]);
  a.out_channels = static_cast<int32_t>(extraction.channels());
  a.side = static_cast<int32_t>(extraction.geometry.patch);
  a.area = a.side * a.side;
  a.plane = static_cast<int32_t>(plane_bytes(a.side));
  a.values = a.out_channels * a.area;
  a.fill = static_cast<uint8_t>(problem.fill);
  std::copy(extraction.scale.begin(), extraction.scale.end(), a.scale);
  std::copy(extraction.shift.begin(), extraction.shift.end(), a.shift);
  for (int32_t k = 0; k < a.out_channels; ++k) {
    a.float_scale[k] = static_cast<float>(a.scale[k]);
    a.float_shift[k] = static_cast<float>(a.shift[k]);
  }
  a.by_side = FastDivide(a.side);
  a.by_area = FastDivide(a.area);
  a.by_out_channels = FastDivide(a.out_channels);
  const bool shared = fits_shared(extraction);
  a.workspace = shared ? nullptr : problem.workspace.as<uint8_t>();
  launch("augment_patches", &augment_patches,
         {shared ? a.count : workspace_blocks(a.count), kThreads, shared ? patch_bytes(extraction) : 0}, stream, a);
}

}  // namespace cpc::augment::cuda
