// The first layer of encoders of waveforms on the CPU. A task is a tile of a waveform's frames, all channels of it: a
// register holds neighbouring frames of one channel, and the samples that they need lie side by side once the waveform
// is taken apart into `stride` phases, sample j of phase s being j * stride + s of the waveform.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "core/gemm.h"
#include "core/parallel.h"
#include "waveform_conv/waveform_conv.h"

namespace cpc::waveform_conv::cpu::CPC_ISA {
namespace {

using namespace cpc::CPC_ISA;

using R = Register<float>;
constexpr int64_t kWidth = kRegisterLanes<float>;
// As many chains of sums as keep the multipliers busy, in half of the registers.
constexpr int64_t kRegisters = 8;
constexpr int64_t kTile = kRegisters * kWidth;
// Parts of all tiles whose sums are formed by themselves, then in order: as many as threads have use for.
constexpr int64_t kParts = 32;
// Nanoseconds that a channel of a tile takes.
constexpr double kNanoseconds = 40, kGradNanoseconds = 150;

// --- Rows of a tile ---

template <class T>
void load_row(float* __restrict to, const T* __restrict from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
  std::fill(to + count, to + kTile, 0.f);
}

template <class T>
void load_row(float* to, const T* from, int64_t count, int64_t step) {
  if (step == 1) return load_row(to, from, count);
  for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i * step]);
  std::fill(to + count, to + kTile, 0.f);
}

// A vector of the problem's as floats.
template <class T>
float element(const TensorView& view, int64_t i) {
  return widen(view.as<T>()[i * view.strides[0]]);
}

inline R relu(R x) { return x > 0 ? x : R{}; }

// --- The convolution of a tile ---

// What stays the same for all tiles: weights [C, K] and the channels' numbers, in float.
struct Layer {
  int64_t channels, taps, stride;
  float* weight;
  float* bias;
  float* scale;
  float* shift;

  static int64_t floats(const Problem& p) { return p.channels() * (p.taps() + 3); }

  template <class T>
  Layer(const Problem& p, float* memory, T) : channels(p.channels()), taps(p.taps()), stride(p.stride) {
    weight = memory;
    bias = weight + channels * taps;
    scale = bias + channels;
    shift = scale + channels;
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t k = 0; k < taps; ++k)
        weight[c * taps + k] = widen(p.weight.as<T>()[c * p.weight.strides[0] + k * p.weight.strides[2]]);
      bias[c] = p.bias.ndim == 0 ? 0.f : element<T>(p.bias, c);
      scale[c] = p.normalised() ? element<float>(p.scale, c) : 1.f;
      shift[c] = p.normalised() ? element<float>(p.shift, c) : 0.f;
    }
  }
};

// Samples of a phase that a tile needs, with what the last register reads past its frames.
inline int64_t phase_length(const Problem& p) { return kTile + (p.taps() + p.stride - 1) / p.stride; }

struct Frames {
  int64_t b, first, count;

  Frames(const Problem& p, int64_t tile) {
    const int64_t tiles = (p.frames() + kTile - 1) / kTile;
    b = tile / tiles;
    first = tile % tiles * kTile;
    count = std::min(kTile, p.frames() - first);
  }
};

inline int64_t tile_count(const Problem& p) { return p.batch() * ((p.frames() + kTile - 1) / kTile); }

// The samples of a tile by phase, [stride, phase_length].
template <class T>
void load_phases(float* __restrict phases, const Problem& p, const Frames& frames) {
  const T* const waveform = p.waveforms.as<T>() + frames.b * p.waveforms.strides[0];
  const int64_t length = phase_length(p), step = p.waveforms.strides[2], samples = p.samples();
  const int64_t begin = frames.first * p.stride - p.padding;
  for (int64_t s = 0; s < p.stride; ++s) {
    float* const phase = phases + s * length;
    for (int64_t j = 0; j < length; ++j) {
      const int64_t at = begin + j * p.stride + s;
      phase[j] = at >= 0 && at < samples ? widen(waveform[at * step]) : 0.f;
    }
  }
}

// One channel of a tile before its normalisation.
inline void convolve_channel(R (&sums)[kRegisters], const Layer& layer, const float* phases, int64_t length,
                             int64_t channel) {
  for (R& sum : sums) sum = in_all_lanes(layer.bias[channel]);
  const float* const weight = layer.weight + channel * layer.taps;
  for (int64_t k = 0, s = 0, q = 0; k < layer.taps; ++k) {
    const R w = in_all_lanes(weight[k]);
    const float* const samples = phases + s * length + q;
#pragma GCC unroll 8
    for (int64_t v = 0; v < kRegisters; ++v) sums[v] += w * load_register(samples + v * kWidth);
    if (++s == layer.stride) {
      s = 0;
      ++q;
    }
  }
}

// All channels of a tile, [C, kTile], and where they are to be normalised what a frame's are: normalised.
inline void convolve_tile(float* __restrict rows, const Problem& p, const Layer& layer, const float* phases,
                          R (&inverse_deviations)[kRegisters]) {
  const int64_t length = phase_length(p);
  R sums[kRegisters], means[kRegisters] = {}, squares[kRegisters] = {};
  for (int64_t c = 0; c < layer.channels; ++c) {
    convolve_channel(sums, layer, phases, length, c);
    for (int64_t v = 0; v < kRegisters; ++v) {
      store_register(rows + c * kTile + v * kWidth, sums[v]);
      means[v] += sums[v];
    }
  }
  for (R& mean : means) mean /= static_cast<float>(layer.channels);
  for (int64_t c = 0; c < layer.channels; ++c)
    for (int64_t v = 0; v < kRegisters; ++v) {
      const R centred = load_register(rows + c * kTile + v * kWidth) - means[v];
      squares[v] += centred * centred;
    }
  for (int64_t v = 0; v < kRegisters; ++v)
    for (int64_t i = 0; i < kWidth; ++i)
      inverse_deviations[v][i] =
          1.f / std::sqrt(squares[v][i] / static_cast<float>(layer.channels - 1) + static_cast<float>(p.eps));
  for (int64_t c = 0; c < layer.channels; ++c)
    for (int64_t v = 0; v < kRegisters; ++v) {
      float* const row = rows + c * kTile + v * kWidth;
      store_register(row, (load_register(row) - means[v]) * inverse_deviations[v]);
    }
}

template <class T>
void store_row(T* out, const R (&values)[kRegisters], int64_t count) {
  float wide[kTile];
  for (int64_t v = 0; v < kRegisters; ++v) store_register(wide + v * kWidth, values[v]);
  narrow(out, wide, count);
}

template <class T>
void convolve_all(const Problem& p) {
  const int64_t rows_floats = p.normalised() ? p.channels() * kTile : 0, phase_floats = p.stride * phase_length(p);
  const int64_t tiles = tile_count(p);
  const Scratch scratch((rows_floats + phase_floats) * sizeof(float));
  std::vector<float> memory(Layer::floats(p));
  const Layer layer(p, memory.data(), T{});
  parallel_tasks(
      tiles,
      [&](int64_t tile, int worker) {
        float *const phases = scratch.of<float>(worker), *const rows = phases + phase_floats;
        const Frames frames(p, tile);
        load_phases<T>(phases, p, frames);
        T* const out = p.out.as<T>() + frames.b * p.out.strides[0] + frames.first;
        R values[kRegisters], inverse_deviations[kRegisters];
        if (p.normalised()) convolve_tile(rows, p, layer, phases, inverse_deviations);
        for (int64_t c = 0; c < layer.channels; ++c) {
          if (p.normalised()) {
            for (int64_t v = 0; v < kRegisters; ++v)
              values[v] = load_register(rows + c * kTile + v * kWidth) * layer.scale[c] + layer.shift[c];
          } else {
            convolve_channel(values, layer, phases, phase_length(p), c);
          }
          if (p.relu)
            for (R& value : values) value = relu(value);
          store_row(out + c * p.out.strides[1], values, frames.count);
        }
      },
      workers_for(static_cast<double>(tiles * p.channels()) * kNanoseconds));
}

// --- The gradient ---

// Sums over the frames of a part of all tiles, a register of them a number: of channel c those of its K weights, its
// bias, scale and shift.
class Sums {
 public:
  Sums(float* memory, int64_t taps) : memory_(memory), pitch_((taps + 3) * kWidth) {}
  void add(int64_t channel, int64_t number, R value) const {
    float* const at = memory_ + channel * pitch_ + number * kWidth;
    store_register(at, load_register(at) + value);
  }

 private:
  float* memory_;
  int64_t pitch_;
};

inline R total(const R (&values)[kRegisters]) {
  R sum = values[0];
  for (int64_t v = 1; v < kRegisters; ++v) sum += values[v];
  return sum;
}

// Adds the sums of a channel's weights and bias, from the gradient of what the convolution gives.
inline void add_channel(const Sums& sums, const Layer& layer, const float* phases, int64_t length, int64_t channel,
                        const R (&grads)[kRegisters]) {
  for (int64_t k = 0, s = 0, q = 0; k < layer.taps; ++k) {
    const float* const samples = phases + s * length + q;
    R sum = {};
#pragma GCC unroll 8
    for (int64_t v = 0; v < kRegisters; ++v) sum += grads[v] * load_register(samples + v * kWidth);
    sums.add(channel, k, sum);
    if (++s == layer.stride) {
      s = 0;
      ++q;
    }
  }
  sums.add(channel, layer.taps, total(grads));
}

// The gradient of a tile whose channels are normalised. rows: the normalised ones; grads: those of the output, [C,
// kTile], both of which this changes.
inline void normalised_backward(const Problem& p, const Sums& sums, const Layer& layer, const float* phases,
                                float* __restrict rows, float* __restrict grads,
                                const R (&inverse_deviations)[kRegisters]) {
  R of_ones[kRegisters] = {}, of_rows[kRegisters] = {};
  for (int64_t c = 0; c < layer.channels; ++c) {
    R scaled = {}, shifted = {};
    for (int64_t v = 0; v < kRegisters; ++v) {
      const R row = load_register(rows + c * kTile + v * kWidth);
      R grad = load_register(grads + c * kTile + v * kWidth);
      if (p.relu) grad = row * layer.scale[c] + layer.shift[c] > 0 ? grad : R{};
      scaled += grad * row;
      shifted += grad;
      grad *= layer.scale[c];
      of_ones[v] += grad;
      of_rows[v] += grad * row;
      store_register(grads + c * kTile + v * kWidth, grad);
    }
    sums.add(c, layer.taps + 1, scaled);
    sums.add(c, layer.taps + 2, shifted);
  }
  for (int64_t v = 0; v < kRegisters; ++v) {
    of_ones[v] /= static_cast<float>(layer.channels);
    of_rows[v] /= static_cast<float>(layer.channels - 1);
  }
  for (int64_t c = 0; c < layer.channels; ++c) {
    R grad[kRegisters];
    for (int64_t v = 0; v < kRegisters; ++v) {
      const R row = load_register(rows + c * kTile + v * kWidth);
      grad[v] = inverse_deviations[v] * (load_register(grads + c * kTile + v * kWidth) - of_ones[v] - row * of_rows[v]);
    }
    add_channel(sums, layer, phases, phase_length(p), c, grad);
  }
}

template <class T>
void backward_of_tile(const Gradient& p, const Sums& sums, const Layer& layer, int64_t tile, float* phases,
                      float* rows) {
  const Frames frames(p, tile);
  const int64_t length = phase_length(p), channel_step = p.out.strides[1], step = p.out.strides[2];
  load_phases<T>(phases, p, frames);
  const T* const grad = p.out.as<T>() + frames.b * p.out.strides[0] + frames.first * step;
  if (p.normalised()) {
    R inverse_deviations[kRegisters];
    float* const grads = rows + layer.channels * kTile;
    convolve_tile(rows, p, layer, phases, inverse_deviations);
    for (int64_t c = 0; c < layer.channels; ++c)
      load_row(grads + c * kTile, grad + c * channel_step, frames.count, step);
    return normalised_backward(p, sums, layer, phases, rows, grads, inverse_deviations);
  }
  for (int64_t c = 0; c < layer.channels; ++c) {
    load_row(rows, grad + c * channel_step, frames.count, step);
    R values[kRegisters], grads[kRegisters];
    if (p.relu) convolve_channel(values, layer, phases, length, c);
    for (int64_t v = 0; v < kRegisters; ++v) {
      grads[v] = load_register(rows + v * kWidth);
      if (p.relu) grads[v] = values[v] > 0 ? grads[v] : R{};
    }
    add_channel(sums, layer, phases, length, c, grads);
  }
}

template <class T>
void backward_all(const Gradient& p) {
  const int64_t channels = p.channels(), numbers = p.taps() + 3, tiles = tile_count(p);
  const int64_t parts = std::min(kParts, std::max<int64_t>(tiles, 1));
  const int64_t phase_floats = (p.stride * phase_length(p) + kWidth - 1) / kWidth * kWidth;
  const int64_t rows_floats = p.normalised() ? 2 * channels * kTile : kTile;
  const int64_t sum_floats = channels * numbers * kWidth;
  std::vector<float> memory(Layer::floats(p)), by_part(parts * channels * numbers);
  const Layer layer(p, memory.data(), T{});
  const Scratch scratch((phase_floats + rows_floats + sum_floats) * sizeof(float));
  parallel_tasks(
      parts,
      [&](int64_t part, int worker) {
        float *const phases = scratch.of<float>(worker), *const rows = phases + phase_floats;
        float* const registers = rows + rows_floats;
        std::fill(registers, registers + sum_floats, 0.f);
        const Sums sums(registers, p.taps());
        for (int64_t tile = part * tiles / parts; tile < (part + 1) * tiles / parts; ++tile)
          backward_of_tile<T>(p, sums, layer, tile, phases, rows);
        for (int64_t i = 0; i < channels * numbers; ++i) {
          float sum = 0;
          for (int64_t lane = 0; lane < kWidth; ++lane) sum += registers[i * kWidth + lane];
          by_part[part * channels * numbers + i] = sum;
        }
      },
      workers_for(static_cast<double>(tiles * channels) * kGradNanoseconds));
  float* const out = p.sums.as<float>();
  for (int64_t i = 0; i < channels * numbers; ++i) {
    float sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += by_part[part * channels * numbers + i];
    out[i] = sum;
  }
}

}  // namespace

void convolve(const Problem& problem) {
  with_floating(problem.waveforms.dtype, [&](auto type) {
    if constexpr (!std::is_same_v<decltype(type), double>) convolve_all<decltype(type)>(problem);
  });
}

void convolve_backward(const Gradient& problem) {
  with_floating(problem.waveforms.dtype, [&](auto type) {
    if constexpr (!std::is_same_v<decltype(type), double>) backward_all<decltype(type)>(problem);
  });
}

}  // namespace cpc::waveform_conv::cpu::CPC_ISA
