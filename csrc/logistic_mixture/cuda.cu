// The discretized mixture of logistics on the GPU: nats per image, the gradient in the parameters, and samples. A
// thread takes a pixel. If the parameters of a pixel are contiguous, a block copies those of its pixels to shared
// memory as one stream of words, and threads read them there without bank conflicts; gradients overwrite them and are
// copied back the same way. Otherwise threads access memory directly, and neighbouring pixels of a row coalesce.
#include <algorithm>
#include <type_traits>

#include "core/cuda/device.h"
#include "core/cuda/kernel.cuh"
#include "logistic_mixture/component.h"
#include "logistic_mixture/logistic_mixture.h"
#include "logistic_mixture/sample.h"

namespace cpc::logistic_mixture::cuda {
namespace {

using namespace cpc::cuda;

struct Scalar {
  using Real = float;
  __device__ static float abs(float x) { return fabsf(x); }
  __device__ static float exp(float x) { return __expf(x); }
  __device__ static float exp_below_zero(float x) { return __expf(x); }
  __device__ static float divide(float a, float b) { return __fdividef(a, b); }
};

// Parameters in shared memory are moved in words, two of the 16-bit types.
using Word = uint32_t;

struct Arguments {
  TensorView images, params, params_grad;
  float *normalisers, *parts;  // normalisers may be null in the forward pass.
  const float* grad;
  int64_t batch, pixels, width, components, tiles;
  // Words of a pixel's parameters in memory, and between pixels in shared memory; 0 if the parameters are not copied to
  // shared memory.
  int words, pitch;
};

// One pixel's parameters, in shared memory or not.
template <class T>
struct Params {
  const T* first;
  int64_t stride;
  __device__ float operator()(int64_t p) const { return widen<float>(first[p * stride]); }
};
template <class T>
struct Gradients {
  T* first;
  int64_t stride;
  __device__ void operator()(int64_t p, float gradient) const { first[p * stride] = Narrow<T>::from(gradient); }
};

// Moves the words of `count` pixels between memory and shared memory.
template <class Move>
__device__ void for_each_word(const Arguments& a, int count, const Move& move) {
  const int total = count * a.words;
  int pixel = static_cast<int>(threadIdx.x) / a.words, word = static_cast<int>(threadIdx.x) % a.words;
  const int pixels_ahead = kTilePixels / a.words, words_ahead = kTilePixels % a.words;
#pragma unroll 8
  for (int i = threadIdx.x; i < total; i += kTilePixels) {
    move(i, pixel * a.pitch + word);
    pixel += pixels_ahead;
    word += words_ahead;
    if (word >= a.words) {
      word -= a.words;
      ++pixel;
    }
  }
}

template <int Channels>
__device__ Pixel<Scalar, Channels> pixel_of(const Arguments& a, int64_t b, int64_t i) {
  const TensorView& images = a.images;
  const uint8_t* const values = images.as<uint8_t>() + b * images.strides[0] + pixel_offset(images, a.width, i);
  Pixel<Scalar, Channels> pixel;
  unrolled<Channels>([&](int c) { pixel.values[c] = value_of(widen<float>(values[c * images.strides[1]])); });
  return pixel;
}

// A block takes a tile, kTilePixels pixels of an image.
template <class T, int Channels, Pass kPass>
__global__ void __launch_bounds__(kTilePixels) run_tiles(const __grid_constant__ Arguments a) {
  auto* const shared = reinterpret_cast<Word*>(dynamic_shared());
  for (int64_t block = blockIdx.x; block < a.batch * a.tiles; block += gridDim.x) {
    const int64_t b = block / a.tiles, first = block % a.tiles * kTilePixels, i = first + threadIdx.x;
    const int count = static_cast<int>(a.pixels - first < kTilePixels ? a.pixels - first : kTilePixels);
    const int64_t first_word = (b * a.pixels + first) * a.words;
    const bool staged = a.words != 0, inside = i < a.pixels;
    if (staged) {
      const Word* const from = a.params.as<Word>() + first_word;
      for_each_word(a, count, [&](int in_memory, int in_shared) { shared[in_shared] = from[in_memory]; });
      __syncthreads();
    }
    T* const own = reinterpret_cast<T*>(shared + threadIdx.x * a.pitch);
    const auto place = [&](const TensorView& view) {
      return view.as<T>() + b * view.strides[0] + pixel_offset(view, a.width, i);
    };
    float nats = 0;
    if (inside) {
      const Pixel<Scalar, Channels> pixel = pixel_of<Channels>(a, b, i);
      const Params<T> params{staged ? own : place(a.params), staged ? 1 : a.params.strides[1]};
      const int64_t peak = 2 * b * a.pixels + i, total = peak + a.pixels;
      if constexpr (kPass == Pass::forward) {
        const LogSum<Scalar> prior = pixel.logits(params, a.components);
        const LogSum<Scalar> joint = pixel.joint(params, a.components, prior.peak);
        nats = logf(prior.total / joint.total) - joint.peak;
        if (a.normalisers != nullptr) {
          a.normalisers[peak] = joint.peak;
          a.normalisers[total] = joint.total;
        }
      } else {
        const Gradients<T> gradients{staged ? own : place(a.params_grad), staged ? 1 : a.params_grad.strides[1]};
        pixel.differentiate(params, a.components, {a.normalisers[peak], a.normalisers[total]}, a.grad[b], gradients);
      }
    }
    if constexpr (kPass == Pass::forward) {
      nats = block_sum<kTilePixels>(nats);
      if (threadIdx.x == 0) a.parts[block] = nats;
    } else if (staged) {
      __syncthreads();
      Word* const to = a.params_grad.as<Word>() + first_word;
      for_each_word(a, count, [&](int in_memory, int in_shared) { to[in_memory] = shared[in_shared]; });
    }
    __syncthreads();  // The next tile overwrites shared memory.
  }
}

constexpr int kSumThreads = 128;

// Adds up the partial sums of each image; a block takes an image.
__global__ void __launch_bounds__(kSumThreads) sum_parts(const float* parts, float* nll, int64_t batch, int64_t tiles) {
  for (int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < tiles; i += kSumThreads) sum += parts[b * tiles + i];
    sum = block_sum<kSumThreads>(sum);
    if (threadIdx.x == 0) nll[b] = static_cast<float>(sum);
  }
}

// Dense with the channels last.
bool is_by_pixel(const TensorView& view) {
  int64_t dense = 1;
  for (const int dim : {1, 3, 2, 0}) {
    if (view.shape[dim] != 1 && view.strides[dim] != dense) return false;
    dense *= view.shape[dim];
  }
  return true;
}

template <class Problem>
void launch_tiles(const Problem& problem, void* stream) {
  constexpr Pass kPass = std::is_same_v<Problem, Gradient> ? Pass::backward : Pass::forward;
  Arguments a{.images = problem.images,
              .params = problem.params,
              .params_grad = {},
              .normalisers = problem.normalisers.template as<float>(),
              .parts = problem.workspace.template as<float>(),
              .grad = nullptr,
              .batch = problem.batch(),
              .pixels = problem.pixels(),
              .width = problem.width(),
              .components = problem.components(),
              .tiles = parts(problem.pixels()),
              .words = 0,
              .pitch = 0};
  if constexpr (kPass == Pass::backward) {
    a.params_grad = problem.params_grad;
    a.grad = problem.grad.template as<float>();
  }
  // An odd pitch avoids bank conflicts within a warp. The limit lets several blocks fit a multiprocessor.
  constexpr int64_t kMostSharedBytes = 64 << 10;
  const int64_t bytes = problem.params.shape[1] * size_of(problem.params.dtype);
  const int64_t words = bytes / int64_t{sizeof(Word)}, pitch = words | 1;
  const int64_t shared_bytes = kTilePixels * pitch * int64_t{sizeof(Word)};
  const auto may_stage = [](const TensorView& view) {
    return is_by_pixel(view) && reinterpret_cast<uintptr_t>(view.data) % sizeof(Word) == 0;
  };
  const bool by_words =
      bytes % sizeof(Word) == 0 && may_stage(a.params) && (kPass == Pass::forward || may_stage(a.params_grad));
  const char* const name = kPass == Pass::forward ? "mixture_nll" : "mixture_nll_backward";
  const auto launch_kernel = [&](auto* kernel) {
    const bool staged = by_words && shared_bytes <= std::min(kMostSharedBytes, dynamic_shared_limit(kernel));
    if (staged) {
      a.words = static_cast<int>(words);
      a.pitch = static_cast<int>(pitch);
    }
    launch(name, kernel, {a.batch * a.tiles, dim3(kTilePixels), staged ? shared_bytes : 0}, stream, a);
  };
  const auto with_channels = [&](auto value) {
    using T = decltype(value);
    problem.channels() == 3 ? launch_kernel(&run_tiles<T, 3, kPass>) : launch_kernel(&run_tiles<T, 1, kPass>);
  };
  switch (problem.params.dtype) {
    case DType::f16: return with_channels(Half{});
    case DType::bf16: return with_channels(BFloat16{});
    default: return with_channels(float{});
  }
}

struct LoadDouble {
  __device__ double operator()(const TensorView& view, int64_t at) const {
    return load_as<double>(view.data, view.dtype, at);
  }
};

constexpr int kSampleThreads = 128;

__global__ void __launch_bounds__(kSampleThreads) sample_pixels(const __grid_constant__ Sampling problem) {
  const int64_t pixels = problem.pixels(), total = problem.batch() * pixels;
  for (int64_t n = int64_t{blockIdx.x} * kSampleThreads + threadIdx.x; n < total;
       n += int64_t{gridDim.x} * kSampleThreads)
    sample_pixel(problem, n / pixels, n % pixels, LoadDouble{});
}

}  // namespace

void nll(const Likelihood& problem, void* stream) {
  launch_tiles(problem, stream);
  launch("sum_parts", &sum_parts, {problem.batch(), dim3(kSumThreads)}, stream, problem.workspace.as<float>(),
         problem.nll.as<float>(), problem.batch(), parts(problem.pixels()));
}

void nll_backward(const Gradient& problem, void* stream) { launch_tiles(problem, stream); }

void sample(const Sampling& problem, void* stream) {
  const int64_t pixels = problem.batch() * problem.pixels();
  launch("sample_pixels", &sample_pixels, {(pixels + kSampleThreads - 1) / kSampleThreads, dim3(kSampleThreads)},
         stream, problem);
}

}  // namespace cpc::logistic_mixture::cuda
