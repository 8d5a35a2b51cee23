// A network's steps on the CPU. Each step is a matrix product whose rows, pixels of several images, are read in place
// from the maps; its result goes through the activation while it is in the cache. Images do not depend on each other,
// so each thread takes some of them through all steps without waiting for the others.
#include <algorithm>
#include <cstring>

#include "core/gemm.h"
#include "core/learned_threads.h"
#include "core/parallel.h"
#include "core/simd_math.h"
#include "core/workspace.h"
#include "pixel_steps/pixel_steps.h"

namespace cpc::pixel_steps::cpu::CPC_ISA {
namespace {

using namespace cpc::CPC_ISA;

// Rows of the product that are finished together: their sums stay in the cache.
constexpr int64_t kBlockRows = 8 * kTileRows;
// The share of kFlopsPerNanosecond that products with so few rows reach, as they wait for their weights.
constexpr double kFewRows = 0.5;

// Columns of a product, padded to whole registers.
template <class E>
int64_t padded(int64_t outputs) {
  return divide_up(outputs, kLaneColumns<E>) * kLaneColumns<E>;
}

// Packs the weight in panels of up to kTileColumns columns, one after the other, and then the bias. Both are padded
// with zeros.
template <class E>
void pack_step(Step& step) {
  const int64_t outputs = step.outputs(), depth = step.depth(), columns = padded<E>(outputs);
  step.packed = aligned_memory((depth + 1) * columns * static_cast<int64_t>(sizeof(E)));
  E* out = reinterpret_cast<E*>(step.packed.get());
  const E* const weight = step.weight.as<E>();
  for (int64_t first = 0; first < columns; first += kTileColumns<E>)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t n = first; n < std::min(columns, first + kTileColumns<E>); ++n)
        *out++ = n < outputs ? weight[k * outputs + n] : E{};
  for (int64_t n = 0; n < columns; ++n) *out++ = n < outputs ? step.bias.as<E>()[n] : E{};
}

template <class E>
E* at(const TensorView& map, int64_t image, int64_t row, int64_t col) {
  return map.as<E>() + image * map.strides[0] + (row + kAbove) * map.strides[1] + (col + kBeside) * map.strides[2];
}

template <class E>
Register<E> elu(Register<E> x) {
  const Register<E> below = exp_below_zero(x > E{0} ? Register<E>{} : x) - E{1};
  return x > E{0} ? x : below;
}

// A thread's memory.
template <class E>
struct Buffers {
  E* sums;            // [kBlockRows, the most columns]
  E* values;          // [4, the most columns]: a pixel's results, their two ELUs, and spare memory.
  const E** sources;  // [the most sources, kBlockRows]: where each row's own pixel lies in a source.

  Buffers(Parts& parts, const Network& network) {
    int64_t columns = 0, count = 0;
    for (const Step& step : network.steps) {
      columns = std::max(columns, padded<E>(step.outputs()) + kLaneColumns<E>);
      count = std::max(count, static_cast<int64_t>(step.sources.size()));
    }
    sums = parts.take<E>(kBlockRows * columns);
    values = parts.take<E>(4 * columns);
    sources = parts.take<const E*>(count * kBlockRows);
  }
};

template <class E>
class Runner {
 public:
  explicit Runner(const Place& place) : place_(place), network_(place.network) {}

  void run() const {
    double flops = 0;
    for (const Step& step : network_.steps)
      if (due(step))
        flops += 2. * static_cast<double>(network_.batch * columns(step)) *
                 static_cast<double>(step.depth() * step.outputs());
    Parts counted(nullptr);
    Buffers<E>(counted, network_);
    const Scratch scratch(counted.used());
    thread_local LearnedThreads<> learned;
    learned.run(flops / (kFewRows * kFlopsPerNanosecond), [&](int threads) {
      const int64_t groups = std::min<int64_t>(threads, network_.batch);
      parallel_for(groups, [&](int64_t group, int worker) {
        Parts parts(scratch.of<char>(worker));
        Buffers<E> buffers(parts, network_);
        const int64_t first = group * network_.batch / groups, end = (group + 1) * network_.batch / groups;
        for (const Step& step : network_.steps)
          if (due(step)) run_step(step, buffers, first, end - first);
      });
    });
  }

 private:
  bool due(const Step& step) const { return ((place_.row | place_.col) & ((int64_t{1} << step.level) - 1)) == 0; }
  int64_t columns(const Step& step) const { return place_.whole_row ? network_.width >> step.level : 1; }

  // The rows of the product go pixel by pixel, and for each pixel over the images.
  void run_step(const Step& step, Buffers<E>& buffers, int64_t first_image, int64_t images) const {
    const int64_t rows = images * columns(step), row = place_.row >> step.level, col = place_.col >> step.level;
    for (int64_t first = 0; first < rows; first += kBlockRows) {
      const int64_t count = std::min(kBlockRows, rows - first);
      const auto image = [&](int64_t r) { return first_image + (first + r) % images; };
      const auto column = [&](int64_t r) { return col + (first + r) / images; };
      for (size_t s = 0; s < step.sources.size(); ++s) {
        const Source& source = step.sources[s];
        for (int64_t r = 0; r < count; ++r)
          buffers.sources[s * kBlockRows + r] =
              at<E>(source.map, image(r), row * source.scale, column(r) * source.scale);
      }
      multiply(step, buffers, count);
      for (int64_t r = 0; r < count; ++r)
        finish(step, buffers, buffers.sums + r * padded<E>(step.outputs()), image(r), row, column(r));
    }
  }

  void multiply(const Step& step, Buffers<E>& buffers, int64_t count) const {
    const int64_t pitch = padded<E>(step.outputs());
    const E* const packed = reinterpret_cast<const E*>(step.packed.get());
    for (int64_t column = 0; column < pitch; column += kTileColumns<E>) {
      const int64_t width = std::min(kTileColumns<E>, pitch - column);
      for (int64_t r = 0; r < count; r += kTileRows)
        with_tile(std::min<int64_t>(kTileRows, count - r), width / kLaneColumns<E>, [&](auto rows, auto vectors) {
          Tile<E, rows, vectors> tile;
          tile.clear();
          const E* panel = packed + column * step.depth();
          for (size_t s = 0; s < step.sources.size(); ++s) {
            const Source& source = step.sources[s];
            const E* const* const pixels = buffers.sources + s * kBlockRows + r;
            for (const Tap& tap : source.taps) {
              const int64_t offset = tap.dy * source.map.strides[1] + tap.dx * source.map.strides[2];
              const E* left[rows];
              for (int j = 0; j < rows; ++j) left[j] = pixels[j] + offset;
              tile.multiply([&left](int j, int64_t k) { return left[j] + k; }, panel, source.channels());
              panel += source.channels() * width;
            }
          }
          tile.store(buffers.sums + r * pitch + column, pitch);
        });
    }
  }

  // Adds the biases to a pixel's sums, applies the activation and writes the maps.
  void finish(const Step& step, Buffers<E>& buffers, E* sums, int64_t image, int64_t row, int64_t col) const {
    using R = Register<E>;
    const int64_t outputs = step.outputs(), features = step.features(), pitch = padded<E>(outputs);
    const E* const bias = reinterpret_cast<const E*>(step.packed.get()) + step.depth() * pitch;
    E *const values = buffers.values, *const positive = values + pitch, *const negative = positive + pitch;
    const auto each = [](int64_t n, const auto& work) {
      for (int64_t i = 0; i < n; i += kLaneColumns<E>) work(i);
    };
    each(outputs, [&](int64_t i) { store_register(values + i, load_register(sums + i) + load_register(bias + i)); });
    if (step.image_bias.ndim != 0) {
      const E* const added = step.image_bias.as<E>() + image * outputs;
      for (int64_t n = 0; n < outputs; ++n) values[n] += added[n];
    }
    if (step.residual.ndim != 0) {
      const E* const residual = at<E>(step.residual, image, row, col);
      std::copy_n(residual, features, positive);
      each(features, [&](int64_t i) {
        // The second half may begin within a register, so the last register may read past it, into spare memory.
        const R gate = sigmoid(load_register(values + features + i));
        store_register(sums + i, load_register(positive + i) + load_register(values + i) * gate);
      });
      std::copy_n(sums, features, values);
    }
    const int64_t scale = step.output_scale, out_row = row * scale + step.row_offset,
                  out_col = col * scale + step.col_offset;
    if (step.raw.ndim != 0) std::copy_n(values, features, at<E>(step.raw, image, out_row, out_col));
    if (step.elu.ndim != 0) {
      each(features, [&](int64_t i) {
        const R v = load_register(values + i);
        store_register(positive + i, elu<E>(v));
        store_register(negative + i, elu<E>(-v));
      });
      E* const out = at<E>(step.elu, image, out_row, out_col);
      std::copy_n(positive, features, out);
      std::copy_n(negative, features, out + features);
    }
  }

  const Place& place_;
  const Network& network_;
};

}  // namespace

void pack(Network& network) {
  for (Step& step : network.steps) network.dtype == DType::f64 ? pack_step<double>(step) : pack_step<float>(step);
}

void run(const Place& place) {
  if (place.network.batch == 0) return;
  place.network.dtype == DType::f64 ? Runner<double>(place).run() : Runner<float>(place).run();
}

}  // namespace cpc::pixel_steps::cpu::CPC_ISA
