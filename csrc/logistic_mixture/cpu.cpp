// The discretized mixture of logistics on the CPU: nats per image, the gradient in the parameters, and samples. A task
// is a tile of an image's pixels. It loads their parameters into a buffer in the cache, one row per parameter, so that
// a register holds the same parameter of neighbouring pixels whatever the layout in memory. Gradients overwrite the
// parameters there and are stored the same way.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "core/huge_pages.h"
#include "core/parallel.h"
#include "core/shuffle.h"
#include "core/simd_math.h"
#include "logistic_mixture/component.h"
#include "logistic_mixture/logistic_mixture.h"
#include "logistic_mixture/sample.h"

namespace cpc::logistic_mixture::cpu::CPC_ISA {
namespace {

using namespace cpc::CPC_ISA;

using R = Register<float>;
constexpr int64_t kWidth = kRegisterLanes<float>;
// Pixels of a tile: whole cache lines of every parameter, and a buffer that stays in the first-level cache.
constexpr int64_t kTile = 32;
// Estimated nanoseconds per parameter: forward, backward, and when a pixel is sampled.
constexpr double kNanoseconds = 1.5, kGradNanoseconds = 2.5, kSampleNanoseconds = 5;

struct Lanes {
  using Real = R;
  static R abs(R x) { return CPC_ISA::abs(x); }
  static R exp(R x) { return CPC_ISA::exp(x); }
  static R exp_below_zero(R x) { return CPC_ISA::exp_below_zero(x); }
  static R divide(R a, R b) { return a / b; }
};

// --- Between the layouts of memory and of a buffer ---

template <class T>
R load_widened(const T* from) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, Half>)
    return (R)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, Half>)
    return (R)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
  float wide[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) wide[i] = widen(from[i]);
  return load_register(wide);
}

template <class T>
void store_narrow(T* to, R v) {
  float wide[kWidth];
  store_register(wide, v);
  narrow(to, wide, kWidth);
}

// `count` pixels of an image from pixel `first` on, and where they lie.
struct Tile {
  int64_t b, first, count;
  bool neighbours;         // Whether they lie one element apart.
  int64_t offsets[kTile];  // From the tensor's first element. Pixels past the last repeat it.

  Tile(const TensorView& view, int64_t b, int64_t first, int64_t pixels, int64_t width)
      : b(b), first(first), count(std::min(kTile, pixels - first)) {
    int64_t y = first / width, x = first % width;
    for (int64_t i = 0; i < count; ++i) {
      offsets[i] = b * view.strides[0] + y * view.strides[2] + x * view.strides[3];
      if (++x == width) {
        x = 0;
        ++y;
      }
    }
    std::fill(offsets + count, offsets + kTile, offsets[count - 1]);
    neighbours = true;
    for (int64_t i = 0; i < count; ++i) neighbours &= offsets[i] == offsets[0] + i;
  }
};

// Loads the parameters of a tile into rows of kTile pixels. Places after the last pixel, up to a whole register, repeat
// it.
template <class T>
void load_params(float* __restrict to, const TensorView& params, const Tile& tile) {
  const T* const from = params.as<T>();
  const int64_t count = params.shape[1], stride = params.strides[1];
  if (stride == 1 && count >= kWidth) {
    for (int64_t i = 0; i < tile.count; i += kWidth)
      for (int64_t block = 0; block < count; block += kWidth) {
        const int64_t p = std::min(block, count - kWidth);
        R rows[kWidth];
#pragma GCC unroll 16
        for (int64_t j = 0; j < kWidth; ++j) rows[j] = load_widened(from + tile.offsets[i + j] + p);
        transpose<float>(rows);
#pragma GCC unroll 16
        for (int64_t j = 0; j < kWidth; ++j) store_register(to + (p + j) * kTile + i, rows[j]);
      }
    return;
  }
  for (int64_t p = 0; p < count; ++p) {
    float* const row = to + p * kTile;
    const T* const parameter = from + p * stride;
    if (tile.neighbours && tile.count == kTile) {
      for (int64_t i = 0; i < kTile; i += kWidth)
        store_register(row + i, load_widened(parameter + tile.offsets[0] + i));
    } else {
      for (int64_t i = 0; i < kTile; ++i) row[i] = widen(parameter[tile.offsets[i]]);
    }
  }
}

// Cache lines of the next tile's parameters to prefetch, one with each parameter that is read of this tile. For each
// register of pixels, line p is `step` bytes after line p - 1; the lines of the next register are `next` bytes on.
// Lines may lie past the last pixel, as they are only prefetched. If there is no next tile, or it is scattered, all are
// the line at `here`.
struct Ahead {
  const char* first;
  int64_t step = 0, next = 0;

  explicit Ahead(const float* here) : first(reinterpret_cast<const char*>(here)) {}

  template <class T>
  void look_at(const TensorView& params, const Tile& tile) {
    const int64_t count = params.shape[1], size = sizeof(T);
    const bool by_pixel =
        params.strides[1] == 1 && tile.offsets[tile.count - 1] - tile.offsets[0] == (tile.count - 1) * count;
    if (!by_pixel && !tile.neighbours) return;
    first = reinterpret_cast<const char*>(params.as<T>() + tile.offsets[0]);
    step = (by_pixel ? kWidth : params.strides[1]) * size;
    next = (by_pixel ? count : 1) * kWidth * size;
  }
};

// Stores the gradients from such a buffer.
template <class T>
void store_gradients(const TensorView& gradients, const float* __restrict from, const Tile& tile) {
  T* const to = gradients.as<T>();
  const int64_t count = gradients.shape[1], stride = gradients.strides[1];
  if (stride == 1 && count >= kWidth) {
    for (int64_t i = 0; i < tile.count; i += kWidth)
      for (int64_t block = 0; block < count; block += kWidth) {
        const int64_t p = std::min(block, count - kWidth);
        R rows[kWidth];
#pragma GCC unroll 16
        for (int64_t j = 0; j < kWidth; ++j) rows[j] = load_register(from + (p + j) * kTile + i);
        transpose<float>(rows);
        const int64_t left = std::min(kWidth, tile.count - i);
        for (int64_t j = 0; j < left; ++j) store_narrow(to + tile.offsets[i + j] + p, rows[j]);
      }
    return;
  }
  for (int64_t p = 0; p < count; ++p) {
    const float* const row = from + p * kTile;
    T* const parameter = to + p * stride;
    if (tile.neighbours)
      narrow(parameter + tile.offsets[0], row, tile.count);
    else
      for (int64_t i = 0; i < tile.count; ++i) parameter[tile.offsets[i]] = narrow<T>(row[i]);
  }
}

// A worker's buffers for a tile.
struct Buffers {
  float *params, *levels;  // [P, kTile], [C, kTile].

  static int64_t bytes(const Likelihood& problem) {
    return (problem.params.shape[1] + problem.channels()) * kTile * int64_t{sizeof(float)};
  }
  Buffers(const Scratch& scratch, int worker, const Likelihood& problem)
      : params(scratch.of<float>(worker)), levels(params + problem.params.shape[1] * kTile) {}
};

void load_levels(float* to, const Likelihood& problem, int64_t b, int64_t first) {
  const TensorView& images = problem.images;
  const Tile tile(images, b, first, problem.pixels(), problem.width());
  for (int64_t c = 0; c < problem.channels(); ++c) {
    const uint8_t* const plane = images.as<uint8_t>() + c * images.strides[1];
    if (tile.neighbours && tile.count == kTile)
      for (int64_t i = 0; i < kTile; ++i) to[c * kTile + i] = widen(plane[tile.offsets[0] + i]);
    else
      for (int64_t i = 0; i < kTile; ++i) to[c * kTile + i] = widen(plane[tile.offsets[i]]);
  }
}

// The parameters of a register of pixels in a buffer. Each read also prefetches a line of the next tile: computation
// hides the latency of single lines, where many at once would stall.
struct Column {
  float* at;
  const char* ahead;
  int64_t step;

  Column(const Buffers& buffers, int64_t i, const Ahead& lines)
      : at(buffers.params + i), ahead(lines.first + i / kWidth * lines.next), step(lines.step) {}
  R operator()(int64_t p) const {
    __builtin_prefetch(ahead + p * step);
    return load_register(at + p * kTile);
  }
};

template <int Channels>
Pixel<Lanes, Channels> pixel_of(const float* levels) {
  Pixel<Lanes, Channels> pixel;
  for (int c = 0; c < Channels; ++c) pixel.values[c] = value_of(load_register(levels + c * kTile));
  return pixel;
}

// Calls body(tile of the parameters, buffers, the next tile's lines, index) for each tile, after loading its pixels'
// values and parameters.
template <class T, class Body>
void for_each_tile(const Likelihood& problem, double nanoseconds, const Body& body) {
  const int64_t pixels = problem.pixels(), tiles = (pixels + kTile - 1) / kTile;
  const Scratch scratch(Buffers::bytes(problem));
  const auto work = [&](int64_t i, int worker) {
    const Buffers buffers(scratch, worker, problem);
    const Tile tile(problem.params, i / tiles, i % tiles * kTile, pixels, problem.width());
    load_params<T>(buffers.params, problem.params, tile);
    load_levels(buffers.levels, problem, tile.b, tile.first);
    Ahead ahead(buffers.params);
    if (const int64_t next = i + 1; next < problem.batch() * tiles)
      ahead.look_at<T>(problem.params,
                       Tile(problem.params, next / tiles, next % tiles * kTile, pixels, problem.width()));
    body(tile, buffers, ahead, i);
  };
  parallel_for(problem.batch() * tiles, work, workers_for(nanoseconds * static_cast<double>(problem.params.numel())));
}

// --- The passes ---

template <class T, int Channels>
void forward(const Likelihood& problem) {
  const int64_t pixels = problem.pixels(), tiles = (pixels + kTile - 1) / kTile, components = problem.components();
  std::vector<double> nats_of_tile(problem.batch() * tiles);
  const auto sum_tile = [&](const Tile& tile, const Buffers& buffers, const Ahead& ahead, int64_t index) {
    float nats[kTile], peaks[kTile], totals[kTile];
    for (int64_t i = 0; i < tile.count; i += kWidth) {
      const Column params(buffers, i, ahead);
      const Pixel<Lanes, Channels> pixel = pixel_of<Channels>(buffers.levels + i);
      const LogSum<Lanes> prior = pixel.logits(params, components);
      const LogSum<Lanes> joint = pixel.joint(params, components, prior.peak);
      store_register(nats + i, log(prior.total / joint.total) - joint.peak);
      store_register(peaks + i, joint.peak);
      store_register(totals + i, joint.total);
    }
    double sum = 0;
    for (int64_t i = 0; i < tile.count; ++i) sum += nats[i];
    nats_of_tile[index] = sum;
    if (problem.normalisers.ndim == 0) return;
    float* const normalisers = problem.normalisers.as<float>() + 2 * tile.b * pixels + tile.first;
    std::copy_n(peaks, tile.count, normalisers);
    std::copy_n(totals, tile.count, normalisers + pixels);
  };
  for_each_tile<T>(problem, kNanoseconds, sum_tile);
  for (int64_t b = 0; b < problem.batch(); ++b) {
    double sum = 0;
    for (int64_t i = 0; i < tiles; ++i) sum += nats_of_tile[b * tiles + i];
    problem.nll.as<float>()[b] = static_cast<float>(sum);
  }
}

template <class T, int Channels>
void backward(const Gradient& problem) {
  const TensorView& gradients = problem.params_grad;
  const int64_t pixels = problem.pixels(), components = problem.components();
  advise_huge_pages(gradients.data, gradients.numel() * int64_t{sizeof(T)});
  const auto differentiate = [&](const Tile& tile, const Buffers& buffers, const Ahead& ahead, int64_t) {
    const float* const normalisers = problem.normalisers.as<float>() + 2 * tile.b * pixels + tile.first;
    float peaks[kTile] = {}, totals[kTile];
    std::fill_n(totals, kTile, 1.f);
    std::copy_n(normalisers, tile.count, peaks);
    std::copy_n(normalisers + pixels, tile.count, totals);
    const R scale = R{} + problem.grad.as<float>()[tile.b];
    for (int64_t i = 0; i < tile.count; i += kWidth) {
      const Column params(buffers, i, ahead);
      pixel_of<Channels>(buffers.levels + i)
          .differentiate(params, components, {load_register(peaks + i), load_register(totals + i)}, scale,
                         [&](int64_t p, R gradient) { store_register(params.at + p * kTile, gradient); });
    }
    store_gradients<T>(gradients, buffers.params, Tile(gradients, tile.b, tile.first, pixels, problem.width()));
  };
  for_each_tile<T>(problem, kGradNanoseconds, differentiate);
}

template <class Work>
void with_type(const Likelihood& problem, const Work& work) {
  const auto with_channels = [&](auto value) {
    problem.channels() == 3 ? work(value, std::integral_constant<int, 3>{})
                            : work(value, std::integral_constant<int, 1>{});
  };
  switch (problem.params.dtype) {
    case DType::f16: return with_channels(Half{});
    case DType::bf16: return with_channels(BFloat16{});
    default: return with_channels(float{});
  }
}

double load_as_double(const TensorView& view, int64_t at) {
  switch (view.dtype) {
    case DType::f16: return widen(view.as<Half>()[at]);
    case DType::bf16: return widen(view.as<BFloat16>()[at]);
    case DType::f32: return view.as<float>()[at];
    default: return view.as<double>()[at];
  }
}

}  // namespace

void nll(const Likelihood& problem) {
  with_type(problem, [&](auto value, auto channels) { forward<decltype(value), decltype(channels)::value>(problem); });
}

void nll_backward(const Gradient& problem) {
  with_type(problem, [&](auto value, auto channels) { backward<decltype(value), decltype(channels)::value>(problem); });
}

void sample(const Sampling& problem) {
  const int64_t pixels = problem.pixels(), tiles = (pixels + kTile - 1) / kTile;
  const auto sample_tile = [&](int64_t tile, int) {
    const int64_t first = tile % tiles * kTile;
    for (int64_t i = first; i < std::min(first + kTile, pixels); ++i)
      sample_pixel(problem, tile / tiles, i, load_as_double);
  };
  parallel_for(problem.batch() * tiles, sample_tile,
               workers_for(kSampleNanoseconds * static_cast<double>(problem.params.numel())));
}

}  // namespace cpc::logistic_mixture::cpu::CPC_ISA
