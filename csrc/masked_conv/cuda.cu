// Masked convolution on the GPU: from pixels and packed weights to activated outputs, and the gradients back.
// A convolution is a matrix product of pixels and outputs whose depth is the visible taps times the channels; the
// matrix of what each pixel sees is never written, its tiles are copied from the input to shared memory tap by tap,
// several ahead of the tensor cores that multiply them. Rows of a tile are neighbouring pixels, or one pixel of many
// images, so that a tap which leads all of them out of the image is left out. The gradients of activation and weight
// are in headers of their own.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "masked_conv/activation_grad.cuh"
#include "masked_conv/masked_conv.h"
#include "masked_conv/tile.cuh"
#include "masked_conv/weight_grad.cuh"

namespace cpc::masked_conv::cuda {
namespace {

// --- Packed weights ---
//
// [panel][slice][kWarpColumns][kSliceBytes]: the outputs of a warp, a panel, by a slice of the depth at a time, zeros
// where there are no more outputs, taps or channels. A panel is two runs of 16 outputs. They follow each other, or
// where gated are 16 features and their gates, N / 2 apart. Within a run the outputs are permuted (output_in_run), so that
// the sums that a lane is left with are 4 neighbouring outputs: a gate meets its feature in one lane, and lanes load and
// store neighbours together.

constexpr int kRun = 16;
constexpr int kPanelSliceBytes = kWarpColumns * kSliceBytes;

// The output of a run that a column of a warp's product holds. Lane t is left with columns 8 j + 2 t and 8 j + 2 t + 1
// of every tile j of 8 columns (core/cuda/mma.cuh), and has outputs 4 t to 4 t + 3 of both runs:
//
//   column   0  1 |  2  3 |  4  5 |  6  7 ||  8  9 | 10 11 | 12 13 | 14 15 || 16 17 ...
//   lane t     0  |   1   |   2   |   3   ||   0   |   1   |   2   |   3   ||   0   ...
//   output   0  1 |  4  5 |  8  9 | 12 13 ||  2  3 |  6  7 | 10 11 | 14 15 ||  0  1 ... of the second run
constexpr int output_in_run(int column) {
  const int j = column / 8, t = column % 8 / 2, e = column % 2;
  return 4 * t + 2 * (j % 2) + e;
}
static_assert(output_in_run(2) == 4 && output_in_run(8) == 2 && output_in_run(15) == 15 && output_in_run(16) == 0);

int64_t panels_of(int64_t outputs, bool gated) {
  return gated ? divide_up(outputs / 2, kRun) : divide_up(outputs, kWarpColumns);
}

// Output number `i` of a panel's run, or what is at least the number of outputs for one that there is not.
__device__ inline int64_t output_of(int64_t panel, int run, int i, int64_t outputs, bool gated) {
  if (!gated) return panel * kWarpColumns + run * kRun + i;
  const int64_t in_half = panel * kRun + i;
  return in_half < outputs / 2 ? run * (outputs / 2) + in_half : outputs;
}

template <class T>
struct PackArguments {
  const T* weight;
  const bool* mask;
  T* packed;
  struct Strides {
    int64_t output, input, row, column;
  } weight_strides, mask_strides;
  int64_t outputs, panels;
  int inputs, taps, slices, kernel_width;
  bool gated;
  FastDivide by_inputs;
  TapIndices indices;
};

template <class T>
__global__ void __launch_bounds__(kThreads) pack_weights(const __grid_constant__ PackArguments<T> a) {
  constexpr int kValues = kWarpColumns * kDepth<T>;
  for (int64_t block = blockIdx.x; block < a.panels * a.slices; block += gridDim.x) {
    const int64_t panel = block / a.slices;
    const auto slice = static_cast<uint32_t>(block % a.slices);
    for (int e = threadIdx.x; e < kValues; e += kThreads) {
      const int column = e / kDepth<T>;
      const int64_t output = output_of(panel, column / kRun, output_in_run(column), a.outputs, a.gated);
      uint32_t channel;
      const auto tap = static_cast<int>(a.by_inputs(slice * kDepth<T> + e % kDepth<T>, channel));
      T value = {};
      if (output < a.outputs && tap < a.taps) {
        const int row = a.indices.at[tap] / a.kernel_width, col = a.indices.at[tap] % a.kernel_width;
        const auto at = [&](const auto& strides) {
          return output * strides.output + channel * strides.input + row * strides.row + col * strides.column;
        };
        if (a.mask[at(a.mask_strides)]) value = a.weight[at(a.weight_strides)];
      }
      a.packed[block * kValues + e] = value;
    }
  }
}

// --- Convolution ---

template <class T>
struct ConvolveArguments {
  const T* input;
  const unsigned char* packed;
  const T* bias;
  const int64_t* position;
  TensorView condition, output, preactivation;
  int64_t rows;  // Rows of the product: the pixels to compute.
  int64_t batch, outputs, panels, panel_tiles;
  int height, width, channels, slices;
  Activation activation;
  // Row m is image m % B of pixel m / B, or else pixel m % (H * W) of image m / (H * W); where there is a position,
  // image m of the pixel there.
  bool images_innermost;
  FastDivide by_inner, by_width;
  bool whole_chunks;  // A chunk of a row is 16 aligned bytes of one pixel.
  Taps taps;
};

struct Pixel {
  int64_t image;
  int y, x;
};

// The pixels of a tile's rows. One long division for all, short ones for each.
template <class T>
class TilePixels {
 public:
  __device__ TilePixels(const ConvolveArguments<T>& a, int64_t first_row) : a_(a) {
    if (a.position != nullptr) {
      const auto clamped = [](int64_t at, int size) { return at < 0 ? 0 : at < size ? at : size - 1; };
      outer_ = clamped(a.position[0], a.height) * a.width + clamped(a.position[1], a.width);
      inner_ = static_cast<uint32_t>(first_row);
    } else {
      const int64_t size = a.images_innermost ? a.batch : int64_t{a.height} * a.width;
      outer_ = first_row / size;
      inner_ = static_cast<uint32_t>(first_row - outer_ * size);
    }
  }
  __device__ Pixel operator[](int row) const {
    uint32_t inner, x;
    const int64_t outer = outer_ + a_.by_inner(inner_ + static_cast<uint32_t>(row), inner);
    const uint32_t y = a_.by_width(a_.images_innermost ? static_cast<uint32_t>(outer) : inner, x);
    return {a_.images_innermost ? inner : outer, static_cast<int>(y), static_cast<int>(x)};
  }

 private:
  const ConvolveArguments<T>& a_;
  int64_t outer_;
  uint32_t inner_;
};

// Where the pixels of a tile lie, to know the taps that see nothing but padding.
class Box {
 public:
  template <class T>
  __device__ Box(const ConvolveArguments<T>& a, const Pixel& first, const Pixel& last) {
    const bool in_order = a.images_innermost || first.image == last.image;
    const bool in_one_row = in_order && first.y == last.y;
    first_y_ = in_order ? first.y : 0;
    last_y_ = in_order ? last.y : a.height - 1;
    first_x_ = in_one_row ? first.x : 0;
    last_x_ = in_one_row ? last.x : a.width - 1;
  }
  template <class T>
  __device__ bool sees(const ConvolveArguments<T>& a, int tap) const {
    const Taps::Offset by = a.taps.at[tap];
    return last_y_ + by.dy >= 0 && first_y_ + by.dy < a.height && last_x_ + by.dx >= 0 && first_x_ + by.dx < a.width;
  }

 private:
  int first_y_, last_y_, first_x_, last_x_;
};

// A place in the depth of the product.
struct DepthPlace {
  int tap, channel;
  __device__ DepthPlace after(int values, int channels) const {
    DepthPlace place{tap, channel + values};
    while (place.channel >= channels) {
      place.channel -= channels;
      ++place.tap;
    }
    return place;
  }
};

// The slices of the depth that a tile needs, one after another.
template <class T>
class Slices {
 public:
  __device__ Slices(const ConvolveArguments<T>& a, const Box& box) : a_(a), box_(box) { skip(); }
  __device__ bool any() const { return index_ < a_.slices; }
  __device__ int index() const { return index_; }
  __device__ const DepthPlace& place() const { return place_; }
  __device__ void next() {
    step();
    skip();
  }

 private:
  __device__ void step() {
    place_ = place_.after(kDepth<T>, a_.channels);
    ++index_;
  }
  __device__ void skip() {
    while (any() && !seen()) step();
  }
  // Whether a tap of this slice sees something. Most slices begin with the tap of the one before.
  __device__ bool seen() {
    if (place_.tap != known_tap_) {
      known_tap_ = place_.tap;
      known_ = box_.sees(a_, known_tap_);
    }
    if (known_) return true;
    const DepthPlace end = place_.after(kDepth<T> - 1, a_.channels);
    for (int tap = place_.tap + 1; tap <= end.tap && tap < a_.taps.count; ++tap)
      if (box_.sees(a_, tap)) return true;
    return false;
  }

  const ConvolveArguments<T>& a_;
  const Box& box_;
  int index_ = 0;
  DepthPlace place_ = {0, 0};
  int known_tap_ = -1;
  bool known_ = false;
};

// A thread's share of copying a tile: in each of kCopies rows of A and of B, the same chunk.
template <class T, class Tile>
class TileCopies {
 public:
  __device__ TileCopies(const ConvolveArguments<T>& a, const TilePixels<T>& pixels, int rows, int64_t first_panel)
      : a_(a), chunk_(threadIdx.x % kChunksOfSlice), row_(threadIdx.x / kChunksOfSlice) {
#pragma unroll
    for (int i = 0; i < kACopies; ++i) {
      const int row = row_ + i * kRowStep;
      if (row < rows) {
        const Pixel pixel = pixels[row];
        from_[i] = a.input + ((pixel.image * a.height + pixel.y) * a.width + pixel.x) * a.channels;
        y_[i] = pixel.y;
        x_[i] = pixel.x;
      } else {  // Outside the image wherever a tap leads.
        from_[i] = a.input;
        y_[i] = x_[i] = std::numeric_limits<int>::min() / 2;
      }
    }
#pragma unroll
    for (int i = 0; i < kBCopies; ++i) {
      const int column = row_ + i * kRowStep;
      const int64_t panel = first_panel + column / kWarpColumns;
      panel_exists_[i] = panel < a.panels;
      weights_[i] = a.packed + (panel_exists_[i] ? panel : 0) * a.slices * kPanelSliceBytes +
                    column % kWarpColumns * kSliceBytes + chunk_ * kChunkBytes;
    }
  }

  __device__ void start(unsigned char* stage, const Slices<T>& slices) {
    unsigned char* const to = stage + chunk_of_row(row_, chunk_);
#pragma unroll
    for (int i = 0; i < kBCopies; ++i)
      copy_async<kChunkBytes>(to + Tile::kABytes + i * kStepBytes,
                              weights_[i] + int64_t{slices.index()} * kPanelSliceBytes, panel_exists_[i]);
    DepthPlace place = slices.place().after(chunk_ * kChunk<T>, a_.channels);
    if (Tile::kWholeChunks || a_.whole_chunks) {
      look_through(place.tap);
#pragma unroll
      for (int i = 0; i < kACopies; ++i)
        copy_async<kChunkBytes>(to + i * kStepBytes, seen_[i] + place.channel, inside_[i]);
    } else {
      for (int e = 0; e < kChunk<T>; ++e, place = place.after(1, a_.channels)) {
        look_through(place.tap);
#pragma unroll
        for (int i = 0; i < kACopies; ++i)
          copy_value(reinterpret_cast<T*>(to + i * kStepBytes) + e, seen_[i] + place.channel, inside_[i]);
      }
    }
  }

 private:
  static constexpr int kRowStep = Tile::kThreads / kChunksOfSlice, kStepBytes = kRowStep * kSliceBytes;
  static constexpr int kACopies = Tile::kRows / kRowStep, kBCopies = Tile::kColumns / kRowStep;
  static_assert(kACopies * kRowStep == Tile::kRows && kBCopies * kRowStep == Tile::kColumns);
  static_assert(kRowStep % 8 == 0);  // So that a thread's chunks lie alike in their rows.

  // Finds what each row sees through a tap, unless it is known from the slice before.
  __device__ void look_through(int tap) {
    if (tap == tap_) return;
    tap_ = tap;
    const bool exists = tap < a_.taps.count;
    const Taps::Offset by = a_.taps.at[exists ? tap : 0];
    const int64_t offset = (int64_t{by.dy} * a_.width + by.dx) * a_.channels;
#pragma unroll
    for (int i = 0; i < kACopies; ++i) {
      inside_[i] = exists && static_cast<unsigned>(y_[i] + by.dy) < static_cast<unsigned>(a_.height) &&
                   static_cast<unsigned>(x_[i] + by.dx) < static_cast<unsigned>(a_.width);
      seen_[i] = inside_[i] ? from_[i] + offset : a_.input;
    }
  }

  const ConvolveArguments<T>& a_;
  int chunk_, row_;
  const T* from_[kACopies];
  int y_[kACopies], x_[kACopies];
  const unsigned char* weights_[kBCopies];
  bool panel_exists_[kBCopies];
  int tap_ = -1;
  const T* seen_[kACopies];  // The pixel there, or where there is none, some address.
  bool inside_[kACopies];
};

// What remains once a lane has its sums: of each row, 4 outputs of both runs of its warp's panel.
template <class Math, int kRowTiles>
__device__ void finish_outputs(const ConvolveArguments<typename Math::Value>& a, const WarpSums<Math, kRowTiles>& sums,
                               const TilePixels<typename Math::Value>& pixels, int first_row, int rows, int64_t panel) {
  using T = typename Math::Value;
  using Sum = typename Math::Sum;
  constexpr int kLaneRun = 4, kRuns = 2;
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const bool gated = a.activation == Activation::gated;
  const int64_t in_run = gated ? a.outputs / 2 - panel * kRun : a.outputs - panel * kWarpColumns;
  int64_t first[kRuns];
  int count[kRuns];
  Sum bias[kRuns][kLaneRun] = {};
#pragma unroll
  for (int u = 0; u < kRuns; ++u) {
    first[u] = output_of(panel, u, t * kLaneRun, a.outputs, gated);
    const int64_t left = in_run - t * kLaneRun - (gated ? 0 : u * kRun);
    count[u] = static_cast<int>(left < 0 ? 0 : left < kLaneRun ? left : kLaneRun);
    if (a.bias != nullptr) load_run(bias[u], a.bias + first[u], 1, count[u]);
  }
  if (count[0] == 0) return;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + 16 * i + 8 * h + g;
      if (row >= rows) continue;
      const Pixel pixel = pixels[row];
      const auto at = [&](const TensorView& view) {
        return view.as<T>() + pixel.image * view.strides[0] + pixel.y * view.strides[2] + pixel.x * view.strides[3];
      };
      Sum v[kRuns][kLaneRun];
#pragma unroll
      for (int u = 0; u < kRuns; ++u) {
        Sum added[kLaneRun] = {};
        if (a.condition.data != nullptr)
          load_run(added, at(a.condition) + first[u] * a.condition.strides[1], a.condition.strides[1], count[u]);
#pragma unroll
        for (int k = 0; k < kLaneRun; ++k) v[u][k] = sums[i][2 * u + k / 2][2 * h + k % 2] + (bias[u][k] + added[k]);
        if (a.preactivation.data != nullptr) store_run(at(a.preactivation) + first[u], v[u], count[u]);
      }
      if (gated) {
#pragma unroll
        for (int k = 0; k < kLaneRun; ++k) v[0][k] = tanh(v[0][k]) * sigmoid(v[1][k]);
        store_run(at(a.output) + first[0], v[0], count[0]);
      } else {
#pragma unroll
        for (int u = 0; u < kRuns; ++u) {
#pragma unroll
          for (int k = 0; k < kLaneRun; ++k)
            if (a.activation == Activation::relu && v[u][k] < 0) v[u][k] = 0;  // NaN stays.
          store_run(at(a.output) + first[u], v[u], count[u]);
        }
      }
    }
}

// A block a tile; the tiles of all outputs of some rows follow each other, so that rows are read from memory once.
template <class Math, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    convolve_tile(const __grid_constant__ ConvolveArguments<typename Math::Value> a) {
  using T = typename Math::Value;
  unsigned char* const stages = dynamic_shared();
  const int64_t first_row = blockIdx.x / a.panel_tiles * Tile::kRows;
  const int64_t first_panel = blockIdx.x % a.panel_tiles * Tile::kPanels;
  const int rows = static_cast<int>(a.rows - first_row < Tile::kRows ? a.rows - first_row : Tile::kRows);
  const TilePixels<T> pixels(a, first_row);
  const Box box(a, pixels[0], pixels[rows - 1]);
  TileCopies<T, Tile> copies(a, pixels, rows, first_panel);
  Slices<T> slices(a, box);
  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp / Tile::kPanels * (16 * Tile::kRowTiles), warp_panel = warp % Tile::kPanels;
  WarpSums<Math, Tile::kRowTiles> sums = {};
  pipeline<Tile::kStages>(
      [&](int stage) {
        if (!slices.any()) return false;
        copies.start(stages + stage * Tile::kStageBytes, slices);
        slices.next();
        return true;
      },
      [&](int stage) {
        const unsigned char* const tiles = stages + stage * Tile::kStageBytes;
        add_product<Math, Tile::kRowTiles>(sums, DepthInnermost<T>(tiles, warp_row),
                                           DepthInnermost<T>(tiles + Tile::kABytes, warp_panel * kWarpColumns));
      });
  finish_outputs<Math, Tile::kRowTiles>(a, sums, pixels, warp_row, rows, first_panel + warp_panel);
}

template <class Math, class Tile>
void launch_convolve(ConvolveArguments<typename Math::Value>& a, void* stream) {
  a.panel_tiles = divide_up(a.panels, Tile::kPanels);
  launch("convolve_tile", &convolve_tile<Math, Tile>,
         {blocks_of(divide_up(a.rows, Tile::kRows) * a.panel_tiles), dim3(Tile::kThreads),
          Tile::kStages * Tile::kStageBytes},
         stream, a);
}

template <class Math>
void choose_convolve(ConvolveArguments<typename Math::Value>& a, void* stream) {
  // In double, a large tile's sums would not fit the registers.
  if constexpr (!std::is_same_v<Math, MultiplyAdds<double>>) {
    if (a.whole_chunks && a.position != nullptr) return launch_convolve<Math, PixelTile>(a, stream);
    if (a.whole_chunks && waste_little(a.panels * kWarpColumns) &&
        divide_up(a.rows, LargeTile::kRows) * divide_up(a.panels, LargeTile::kPanels) >= multiprocessors())
      return launch_convolve<Math, LargeTile>(a, stream);
  }
  launch_convolve<Math, SmallTile>(a, stream);
}

template <class T>
void launch_convolve_of(const Convolution& problem, void* stream) {
  require_image_size(problem.batch(), problem.height(), problem.width());
  const int depth = depth_of(static_cast<int64_t>(problem.taps.size()), problem.inputs());
  ConvolveArguments<T> a{.input = problem.input.as<T>(),
                         .packed = problem.packed.as<unsigned char>(),
                         .bias = problem.bias.as<T>(),
                         .position = problem.position.as<int64_t>(),
                         .condition = problem.condition,
                         .output = problem.output,
                         .preactivation = problem.preactivation,
                         .rows = problem.batch() * (problem.position.data ? 1 : problem.height() * problem.width()),
                         .batch = problem.batch(),
                         .outputs = problem.outputs,
                         .panels = panels_of(problem.outputs, problem.activation == Activation::gated),
                         .panel_tiles = 0,
                         .height = static_cast<int>(problem.height()),
                         .width = static_cast<int>(problem.width()),
                         .channels = static_cast<int>(problem.inputs()),
                         .slices = static_cast<int>(divide_up(depth, kDepth<T>)),
                         .activation = problem.activation,
                         .images_innermost = false,
                         .by_inner = {},
                         .by_width = FastDivide(static_cast<uint32_t>(problem.width())),
                         .whole_chunks = has_whole_chunks(problem.input, problem.inputs()),
                         .taps = offsets_of(problem.taps)};
  // One pixel of all images first, so that a tile at a border leaves out what its taps miss: on a grid of 7 x 7, one
  // part in six. Not where a pixel is less than the memory hands out at a time.
  constexpr int64_t kSector = 32;
  a.images_innermost =
      a.position != nullptr || std::min(problem.inputs(), problem.output.shape[1]) * int64_t{sizeof(T)} >= kSector;
  a.by_inner =
      FastDivide(static_cast<uint32_t>(a.images_innermost ? problem.batch() : problem.height() * problem.width()));
  if constexpr (std::is_same_v<T, double>)
    choose_convolve<MultiplyAdds<double>>(a, stream);
  else if constexpr (std::is_same_v<T, float>)
    problem.tf32 ? choose_convolve<TensorCores<float>>(a, stream) : choose_convolve<MultiplyAdds<float>>(a, stream);
  else
    choose_convolve<TensorCores<T>>(a, stream);
}

}  // namespace

int64_t packed_bytes(int64_t outputs, int64_t inputs, int64_t taps, DType dtype, bool gated) {
  return panels_of(outputs, gated) * divide_up(taps * inputs * size_of(dtype), kSliceBytes) * kPanelSliceBytes;
}

int64_t weight_grad_workspace(const WeightGrad& problem) {
  const GradPlan plan(problem);
  const int64_t sum_bytes = problem.input.dtype == DType::f64 ? sizeof(double) : sizeof(float);
  return plan.parts * problem.outputs() * plan.depth * sum_bytes;
}

void pack(const Packing& problem, void* stream) {
  if (problem.taps.empty()) return;
  with_floating(problem.weight.dtype, [&](auto type) {
    using T = decltype(type);
    using Strides = typename PackArguments<T>::Strides;
    const auto strides = [&](const int64_t* s) {
      return problem.transposed ? Strides{s[1], s[0], s[2], s[3]} : Strides{s[0], s[1], s[2], s[3]};
    };
    int64_t mask_strides[4];
    strides_of_mask(problem.mask, mask_strides);
    const int depth = depth_of(problem.taps_count(), problem.inputs());
    const PackArguments<T> a{.weight = problem.weight.as<T>(),
                             .mask = problem.mask.as<bool>(),
                             .packed = problem.packed.as<T>(),
                             .weight_strides = strides(problem.weight.strides),
                             .mask_strides = strides(mask_strides),
                             .outputs = problem.outputs(),
                             .panels = panels_of(problem.outputs(), problem.gated),
                             .inputs = static_cast<int>(problem.inputs()),
                             .taps = static_cast<int>(problem.taps_count()),
                             .slices = static_cast<int>(divide_up(depth, kDepth<T>)),
                             .kernel_width = kernel_width_of(problem.weight),
                             .gated = problem.gated,
                             .by_inputs = FastDivide(static_cast<uint32_t>(problem.inputs())),
                             .indices = indices_of(problem.taps)};
    launch("pack_weights", &pack_weights<T>, {a.panels * a.slices, dim3(kThreads)}, stream, a);
  });
}

void convolve(const Convolution& problem, void* stream) {
  if (problem.output.numel() == 0) return;
  with_floating(problem.input.dtype, [&](auto type) { launch_convolve_of<decltype(type)>(problem, stream); });
}

void activation_grad(const ActivationGrad& problem, void* stream) {
  with_floating(problem.grad.dtype, [&](auto type) { launch_activation_grad<decltype(type)>(problem, stream); });
}

void weight_grad(const WeightGrad& problem, void* stream) {
  const TensorView& result = problem.weight_grad;
  const GradPlan plan(problem);
  // Whatever the mask hides is zero, and dense memory needs no order.
  fill_with_zeros(result.data, result.numel() * size_of(result.dtype), stream);
  if (problem.input.numel() == 0 || problem.taps.empty()) return;
  with_floating(problem.input.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, double>)
      launch_weight_grad<MultiplyAdds<double>>(problem, plan, stream);
    else if constexpr (std::is_same_v<T, float>)
      problem.tf32 ? launch_weight_grad<TensorCores<float>>(problem, plan, stream)
                   : launch_weight_grad<MultiplyAdds<float>>(problem, plan, stream);
    else
      launch_weight_grad<TensorCores<T>>(problem, plan, stream);
  });
}

}  // namespace cpc::masked_conv::cuda
