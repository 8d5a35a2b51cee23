// The first layer of waveform encoders on the CPU. A task is a block of a waveform's frames, with all channels. It is a
// matrix product whose left operand, the frames' samples, is read without unfolding: in a buffer of the block's
// samples, each frame begins `stride` samples after the one before. The weight gradient is the product of those
// samples, transposed, with the block's gradients.
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "core/gemm.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "waveform_conv/waveform_conv.h"

namespace cpc::waveform_conv::cpu::CPC_ISA {
namespace {

using namespace cpc::CPC_ISA;

using R = Register<float>;
constexpr int64_t kWidth = kRegisterLanes<float>;
constexpr int64_t kColumns = kTileColumns<float>;
// Frames of a block: with 512 channels, they fill half of a second-level cache of 256 KiB.
constexpr int64_t kFrames = 10 * kTileRows;
// Parts of the blocks whose gradients are summed separately and then added in order: as many as threads can use.
constexpr int64_t kParts = 32;
// Estimated nanoseconds per value of the output: forward and backward.
constexpr double kNanoseconds = 1, kGradNanoseconds = 2;

inline R relu(R x) { return x < 0 ? R{} : x; }  // NaN stays.

inline float total(R values) {
  float sum = 0;
  for (int64_t lane = 0; lane < kWidth; ++lane) sum += values[lane];
  return sum;
}

// The layer's parameters in float, which all blocks share: weights in panels, [panels, K, kColumns], then bias, scale,
// shift and validity with a number per channel, zero for columns of the last panel beyond C.
class Layer {
 public:
  const int64_t channels, taps, stride, panels;
  const bool normalised, relus;
  const float eps;

  template <class T>
  Layer(const Problem& p, T)
      : channels(p.channels()),
        taps(p.taps()),
        stride(p.stride),
        panels(divide_up(channels, kColumns)),
        normalised(p.normalised()),
        relus(p.relu),
        eps(static_cast<float>(p.eps)),
        memory_((taps + 4) * padded_channels()) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t k = 0; k < taps; ++k)
        memory_[(c / kColumns * taps + k) * kColumns + c % kColumns] =
            widen(p.weight.as<T>()[c * p.weight.strides[0] + k * p.weight.strides[2]]);
      numbers(0)[c] = p.bias.ndim == 0 ? 0.f : element<T>(p.bias, c);
      numbers(1)[c] = normalised ? element<float>(p.scale, c) : 1.f;
      numbers(2)[c] = normalised ? element<float>(p.shift, c) : 0.f;
      numbers(3)[c] = 1.f;
    }
  }

  int64_t padded_channels() const { return panels * kColumns; }
  const float* weight(int64_t panel) const { return memory_.data() + panel * taps * kColumns; }
  const float* bias() const { return numbers(0); }
  const float* scale() const { return numbers(1); }
  const float* shift() const { return numbers(2); }
  const float* valid() const { return numbers(3); }  // 1 for each channel.

 private:
  template <class T>
  static float element(const TensorView& view, int64_t i) {
    return widen(view.as<T>()[i * view.strides[0]]);
  }
  float* numbers(int64_t i) { return memory_.data() + (taps + i) * padded_channels(); }
  const float* numbers(int64_t i) const { return memory_.data() + (taps + i) * padded_channels(); }

  std::vector<float> memory_;
};

struct Block {
  int64_t b, first, count;

  Block(const Problem& p, int64_t index) {
    const int64_t blocks = divide_up(p.frames(), kFrames);
    b = index / blocks;
    first = index % blocks * kFrames;
    count = std::min(kFrames, p.frames() - first);
  }
  static int64_t count_of(const Problem& p) { return p.batch() * divide_up(p.frames(), kFrames); }
};

// A worker's memory: the samples of a block, and its frames' channels in panels.
class Rows {
 public:
  static int64_t floats(const Problem& p) {
    return sample_count(p) + divide_up(p.channels(), kColumns) * kFrames * kColumns;
  }
  Rows(const Problem& p, const Layer& layer, float* memory)
      : layer_(layer), samples_(memory), rows_(memory + sample_count(p)) {}

  template <class T>
  void load(const Problem& p, const Block& block) {
    const T* const waveform = p.waveforms.as<T>() + block.b * p.waveforms.strides[0];
    const int64_t begin = block.first * p.stride - p.padding, step = p.waveforms.strides[2], all = p.samples();
    const int64_t needed = (block.count - 1) * p.stride + p.taps();
    for (int64_t i = 0; i < needed; ++i)
      samples_[i] = begin + i >= 0 && begin + i < all ? widen(waveform[(begin + i) * step]) : 0.f;
  }

  // Computes the convolution of the block.
  void convolve(int64_t count) {
    for (int64_t p = 0; p < layer_.panels; ++p)
      for (int64_t f = 0; f < count; f += kTileRows)
        with_tile(std::min<int64_t>(kTileRows, count - f), kTileVectors, [&](auto tile_rows, auto tile_vectors) {
          Tile<float, tile_rows, tile_vectors> tile;
          tile.load(layer_.bias() + p * kColumns, 0);
          const float* const left = samples_ + f * layer_.stride;
          tile.multiply([&](int j, int64_t k) { return left + j * layer_.stride + k; }, layer_.weight(p), layer_.taps);
          tile.store(row(p, f), kColumns);
        });
  }

  // Normalises a frame's channels to mean 0 and variance 1. Returns the factor that scaled them.
  float normalise(int64_t f) {
    R sums = {}, squares = {};
    each_register(f, [&](float* at, int64_t) { sums += load_register(at); });
    const float mean = total(sums) / static_cast<float>(layer_.channels);
    each_register(f, [&](float* at, int64_t c) {
      const R centred = (load_register(at) - mean) * load_register(layer_.valid() + c);
      squares += centred * centred;
      store_register(at, centred);
    });
    const float factor = 1.f / std::sqrt(total(squares) / static_cast<float>(layer_.channels - 1) + layer_.eps);
    each_register(f, [&](float* at, int64_t) { store_register(at, load_register(at) * factor); });
    return factor;
  }

  // Calls work(at, c) for each register of a frame, whose first channel is c.
  template <class Work>
  void each_register(int64_t f, const Work& work) {
    for (int64_t p = 0; p < layer_.panels; ++p)
      for (int64_t i = 0; i < kColumns; i += kWidth) work(row(p, f) + i, p * kColumns + i);
  }

  // Adds the product of samples and rows to the weight gradient, which is in panels like the weights.
  void add_products(float* weight_grad, int64_t count) {
    for (int64_t p = 0; p < layer_.panels; ++p)
      for (int64_t k = 0; k < layer_.taps; k += kTileRows)
        with_tile(std::min<int64_t>(kTileRows, layer_.taps - k), kTileVectors, [&](auto tile_rows, auto tile_vectors) {
          Tile<float, tile_rows, tile_vectors> tile;
          float* const sums = weight_grad + (p * layer_.taps + k) * kColumns;
          tile.load(sums, kColumns);
          tile.multiply([&](int j, int64_t f) { return samples_ + f * layer_.stride + k + j; }, row(p, 0), count);
          tile.store(sums, kColumns);
        });
  }

  float* row(int64_t panel, int64_t f) { return rows_ + (panel * kFrames + f) * kColumns; }

 private:
  // Samples that a block needs. Counting only frames that exist keeps this within the padded waveform, however large
  // the stride.
  static int64_t sample_count(const Problem& p) {
    const int64_t frames = std::clamp<int64_t>(p.frames(), 1, kFrames);
    return divide_up((frames - 1) * p.stride + p.taps(), kWidth) * kWidth;
  }

  const Layer& layer_;
  float *samples_, *rows_;
};

template <class T>
void convolve_all(const Problem& p) {
  const int64_t blocks = Block::count_of(p);
  const Layer layer(p, T{});
  const Scratch scratch(Rows::floats(p) * static_cast<int64_t>(sizeof(float)));
  parallel_tasks(
      blocks,
      [&](int64_t index, int worker) {
        const Block block(p, index);
        Rows rows(p, layer, scratch.of<float>(worker));
        rows.load<T>(p, block);
        rows.convolve(block.count);
        for (int64_t f = 0; f < block.count; ++f) {
          if (layer.normalised) rows.normalise(f);
          rows.each_register(f, [&](float* at, int64_t c) {
            R value = load_register(at);
            if (layer.normalised) value = value * load_register(layer.scale() + c) + load_register(layer.shift() + c);
            store_register(at, layer.relus ? relu(value) : value);
          });
          T* const out = p.out.as<T>() + block.b * p.out.strides[0] + (block.first + f) * p.out.strides[1];
          for (int64_t q = 0; q < layer.panels; ++q)
            narrow(out + q * kColumns, rows.row(q, f), std::min(kColumns, layer.channels - q * kColumns));
        }
      },
      workers_for(static_cast<double>(p.out.numel()) * kNanoseconds));
}

// --- The gradient ---

// Sums of gradients over the frames of one part of the blocks: of weights, in panels, then of bias, scale and shift.
struct Sums {
  float *weight, *bias, *scale, *shift;

  static int64_t floats(const Layer& layer) { return (layer.taps + 3) * layer.padded_channels(); }
  Sums(float* memory, const Layer& layer) : weight(memory) {
    bias = weight + layer.taps * layer.padded_channels();
    scale = bias + layer.padded_channels();
    shift = scale + layer.padded_channels();
  }
  static void add(float* to, R value) { store_register(to, load_register(to) + value); }
};

// Replaces a frame's channels by the gradient of the convolution's output, given `grad`, that of the layer's output.
inline void differentiate(Rows& rows, const Layer& layer, const Sums& sums, float* grad, int64_t f) {
  if (!layer.normalised) {
    return rows.each_register(f, [&](float* at, int64_t c) {
      R g = load_register(grad + c);
      if (layer.relus) g = load_register(at) <= 0 ? R{} : g;
      Sums::add(sums.bias + c, g);
      store_register(at, g);
    });
  }
  const float factor = rows.normalise(f);
  R of_ones = {}, of_rows = {};
  rows.each_register(f, [&](float* at, int64_t c) {
    const R value = load_register(at), scale = load_register(layer.scale() + c);
    R g = load_register(grad + c);
    if (layer.relus) g = value * scale + load_register(layer.shift() + c) <= 0 ? R{} : g;
    Sums::add(sums.scale + c, g * value);
    Sums::add(sums.shift + c, g);
    g *= scale;
    of_ones += g;
    of_rows += g * value;
    store_register(grad + c, g);
  });
  const float mean = total(of_ones) / static_cast<float>(layer.channels);
  const float slope = total(of_rows) / static_cast<float>(layer.channels - 1);
  rows.each_register(f, [&](float* at, int64_t c) {
    const R g =
        (load_register(grad + c) - mean - load_register(at) * slope) * factor * load_register(layer.valid() + c);
    Sums::add(sums.bias + c, g);
    store_register(at, g);
  });
}

template <class T>
void backward_all(const Gradient& p) {
  const Layer layer(p, T{});
  const int64_t blocks = Block::count_of(p), parts = std::min(kParts, std::max<int64_t>(blocks, 1));
  const int64_t of_rows = Rows::floats(p), of_sums = Sums::floats(layer);
  std::vector<float> by_part(parts * of_sums);
  const Scratch scratch((of_rows + layer.padded_channels()) * static_cast<int64_t>(sizeof(float)));
  parallel_tasks(
      parts,
      [&](int64_t part, int worker) {
        Rows rows(p, layer, scratch.of<float>(worker));
        float* const grad = scratch.of<float>(worker) + of_rows;
        std::fill_n(grad, layer.padded_channels(), 0.f);
        const Sums sums(by_part.data() + part * of_sums, layer);
        for (int64_t index = part * blocks / parts; index < (part + 1) * blocks / parts; ++index) {
          const Block block(p, index);
          rows.load<T>(p, block);
          if (layer.relus || layer.normalised) rows.convolve(block.count);
          for (int64_t f = 0; f < block.count; ++f) {
            const T* const given = p.out.as<T>() + block.b * p.out.strides[0] + (block.first + f) * p.out.strides[1];
            for (int64_t c = 0; c < layer.channels; ++c) grad[c] = widen(given[c]);
            differentiate(rows, layer, sums, grad, f);
          }
          rows.add_products(sums.weight, block.count);
        }
      },
      workers_for(static_cast<double>(p.out.numel()) * kGradNanoseconds));
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t i = 0; i < of_sums; ++i) by_part[i] += by_part[part * of_sums + i];
  const Sums sums(by_part.data(), layer);
  for (int64_t c = 0; c < layer.channels; ++c) {
    float* const out = p.sums.as<float>() + c * (layer.taps + 3);
    for (int64_t k = 0; k < layer.taps; ++k)
      out[k] = sums.weight[(c / kColumns * layer.taps + k) * kColumns + c % kColumns];
    out[layer.taps] = sums.bias[c];
    out[layer.taps + 1] = sums.scale[c];
    out[layer.taps + 2] = sums.shift[c];
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
