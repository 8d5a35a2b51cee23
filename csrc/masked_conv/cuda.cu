// Masked convolution on the GPU: from pixels and packed weights to activated outputs, and the gradients back.
// A convolution is a matrix product of pixels and outputs whose depth is the visible taps times the channels; the
// matrix of what each pixel sees is never written, its tiles are copied from the input to shared memory tap by tap,
// several ahead of the tensor cores that multiply them. Rows of a tile are neighbouring pixels, or one pixel of many
// images, so that a tap which leads all of them out of the image is left out. The weight's gradient is the product of
// the same two matrices the other way round, split over the pixels into parts that a second kernel sums in order.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/device.h"
#include "core/cuda/kernel.cuh"
#include "core/cuda/warp_product.cuh"
#include "masked_conv/masked_conv.h"

namespace cpc::masked_conv::cuda {
namespace {

using namespace cpc::cuda;

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// --- Taps as kernels take them, by value ---

// What fits a kernel's parameters, of 4 KiB, beside everything else: all taps of a kernel of 27 x 27.
constexpr int64_t kMaxTaps = 768;
// Counts that kernels keep in 32 bits, sums of two of them included.
constexpr int64_t kMaxCount = 1 << 30;

struct Taps {
  struct Offset {
    int16_t dy, dx;
  };
  int count;
  Offset at[kMaxTaps];
};

// Indices i * kw + j of the taps.
struct TapIndices {
  int32_t at[kMaxTaps];
};

void require_few_taps(const std::vector<Tap>& taps) {
  if (static_cast<int64_t>(taps.size()) > kMaxTaps)
    throw std::invalid_argument("the CUDA kernels take at most " + std::to_string(kMaxTaps) + " visible taps, got " +
                                std::to_string(taps.size()));
}

Taps offsets_of(const std::vector<Tap>& taps) {
  require_few_taps(taps);
  Taps offsets;
  offsets.count = static_cast<int>(taps.size());
  constexpr int64_t kFarthest = std::numeric_limits<int16_t>::max();
  for (size_t i = 0; i < taps.size(); ++i) {
    if (std::max(std::abs(taps[i].dy), std::abs(taps[i].dx)) > kFarthest)
      throw std::invalid_argument("the CUDA kernels take taps at most " + std::to_string(kFarthest) + " pixels away");
    offsets.at[i] = {static_cast<int16_t>(taps[i].dy), static_cast<int16_t>(taps[i].dx)};
  }
  return offsets;
}

TapIndices indices_of(const std::vector<Tap>& taps) {
  require_few_taps(taps);
  TapIndices indices;
  for (size_t i = 0; i < taps.size(); ++i) indices.at[i] = static_cast<int32_t>(taps[i].index);
  return indices;
}

// The depth of the product: taps times channels.
int depth_of(int64_t taps, int64_t channels) {
  if (std::max(taps, int64_t{1}) * channels > kMaxCount)
    throw std::invalid_argument("the CUDA kernels take at most 2^30 visible taps times channels, got " +
                                std::to_string(taps * channels));
  return static_cast<int>(taps * channels);
}

void require_image_size(int64_t height, int64_t width) {
  if (height * width > kMaxCount)
    throw std::invalid_argument("the CUDA kernels take images of at most 2^30 pixels, got " + std::to_string(height) +
                                "x" + std::to_string(width));
}

// --- Packed weights ---
//
// [panel][slice][kWarpColumns][kSliceBytes]: the outputs of a warp, a panel, by a slice of the depth at a time, zeros
// where there are no more outputs, taps or channels. A panel is two runs of 16 outputs. They follow each other, or
// where gated are 16 features and their gates, N / 2 apart. Within a run the outputs are permuted so that the sums that
// a lane is left with, columns 8 j + 2 t + e, are 4 neighbouring outputs t * 4 + j % 2 * 2 + e of run j / 2: a gate
// meets its feature in one lane, and lanes load and store neighbours together.

constexpr int kRun = 16;
constexpr int kPanelSliceBytes = kWarpColumns * kSliceBytes;

int64_t panels_of(int64_t outputs, bool gated) {
  return gated ? ceil_div(outputs / 2, kRun) : ceil_div(outputs, kWarpColumns);
}

// Output number `i` of a panel's run, or what is at least the number of outputs for one that there is not.
__device__ inline int64_t output_of(int64_t panel, int run, int i, int64_t outputs, bool gated) {
  if (!gated) return panel * kWarpColumns + run * kRun + i;
  const int64_t in_half = panel * kRun + i;
  return in_half < outputs / 2 ? run * (outputs / 2) + in_half : outputs;
}

constexpr int kThreads = 256;

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
      const int column = e / kDepth<T>, j = column / 8;
      const int64_t output = output_of(panel, j / 2, column % 8 / 2 * 4 + j % 2 * 2 + column % 2, a.outputs, a.gated);
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

// A block's tile of rows x outputs, by warps of kRowTiles * 16 rows x one panel, with kStages slices on their way.
template <int kRowTiles_, int kWarpRows_, int kPanels_, int kStages_, int kBlocks_, bool kWholeChunks_>
struct Tile {
  static constexpr int kRowTiles = kRowTiles_, kWarpRows = kWarpRows_, kPanels = kPanels_, kStages = kStages_;
  static constexpr int kRows = 16 * kRowTiles * kWarpRows, kColumns = kWarpColumns * kPanels;
  static constexpr int kThreads = kWarp * kWarpRows * kPanels;
  static constexpr int kBlocks = kBlocks_;  // On a multiprocessor, at least: bounds the registers.
  static constexpr int kABytes = kRows * kSliceBytes, kStageBytes = kABytes + kColumns * kSliceBytes;
  // Whether it only takes pixels of whole chunks of 16 bytes, aligned. Others are copied value by value, which no tile
  // makes fast.
  static constexpr bool kWholeChunks = kWholeChunks_;
};
using LargeTile = Tile<4, 2, 4, 4, 2, true>;   // 128 x 128: the fewest bytes a product.
using SmallTile = Tile<2, 2, 2, 4, 4, false>;  // 64 x 64: for problems that do not fill the GPU with large ones.
// 32 x 32, with many slices on their way: one pixel of a batch, where all that matters is how fast weights arrive.
using PixelTile = Tile<1, 2, 1, 8, 8, true>;

template <class T>
struct ConvolveArguments {
  const T* input;
  const unsigned char* packed;
  const T* bias;
  const int64_t* position;
  TensorView condition, output, preactivation;
  int64_t rows;  // Of the product: the pixels to compute.
  int64_t batch, outputs, panels, panel_tiles;
  int height, width, channels, slices;
  Activation activation;
  // Row m is image m % B of pixel m / B, or else pixel m % (H * W) of image m / (H * W).
  bool images_innermost;
  bool whole_chunks;  // A chunk of a row is 16 aligned bytes of one pixel.
  Taps taps;
};

struct Pixel {
  int64_t image;
  int y, x;
};

template <class T>
__device__ Pixel pixel_of(const ConvolveArguments<T>& a, int64_t row) {
  if (a.position != nullptr) {
    const auto clamped = [](int64_t at, int size) { return static_cast<int>(at < 0 ? 0 : at < size ? at : size - 1); };
    return {row, clamped(a.position[0], a.height), clamped(a.position[1], a.width)};
  }
  const int64_t inner = a.images_innermost ? a.batch : int64_t{a.height} * a.width;
  const int64_t image = a.images_innermost ? row % inner : row / inner;
  const auto pixel = static_cast<int>(a.images_innermost ? row / inner : row % inner);
  return {image, pixel / a.width, pixel % a.width};
}

// Where the pixels of a tile lie, to know the taps that see nothing but padding.
class Box {
 public:
  template <class T>
  __device__ Box(const ConvolveArguments<T>& a, int64_t first_row, int64_t last_row) {
    const Pixel first = pixel_of(a, first_row), last = pixel_of(a, last_row);
    const bool in_order = a.position != nullptr || a.images_innermost || first.image == last.image;
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

// One value to shared memory; before the next barrier but one it may be under way.
template <class T>
__device__ void copy_value(T* to, const T* from, bool exists) {
  if constexpr (sizeof(T) >= 4)
    copy_async<sizeof(T)>(to, from, exists);
  else
    *to = exists ? *from : T{};
}

// A thread's share of copying a tile: in each of kCopies rows of A and of B, the same chunk.
template <class T, class Tile>
class TileCopies {
 public:
  __device__ TileCopies(const ConvolveArguments<T>& a, int64_t first_row, int64_t first_panel)
      : a_(a), chunk_(threadIdx.x % kChunksOfSlice), row_(threadIdx.x / kChunksOfSlice) {
#pragma unroll
    for (int i = 0; i < kACopies; ++i) {
      const int64_t row = first_row + row_ + i * kRowStep;
      if (row < a.rows) {
        const Pixel pixel = pixel_of(a, row);
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

template <class Real>
__device__ Real sigmoid(Real v) {
  return 1 / (1 + exp(-v));
}

// What remains once a lane has its sums: of each row, 4 outputs of both runs of its warp's panel.
template <class Math, int kRowTiles>
__device__ void finish_outputs(const ConvolveArguments<typename Math::Value>& a, const WarpSums<Math, kRowTiles>& sums,
                               int64_t first_row, int64_t panel) {
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
      const int64_t row = first_row + 16 * i + 8 * h + g;
      if (row >= a.rows) continue;
      const Pixel pixel = pixel_of(a, row);
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
  const int64_t last_row = (first_row + Tile::kRows < a.rows ? first_row + Tile::kRows : a.rows) - 1;
  const Box box(a, first_row, last_row);
  TileCopies<T, Tile> copies(a, first_row, first_panel);
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
        add_product_of_rows<Math, Tile::kRowTiles>(sums, tiles, warp_row, tiles + Tile::kABytes,
                                                   warp_panel * kWarpColumns);
      });
  finish_outputs<Math, Tile::kRowTiles>(a, sums, first_row + warp_row, first_panel + warp_panel);
}

template <class Math, class Tile>
void launch_convolve(ConvolveArguments<typename Math::Value>& a, void* stream) {
  a.panel_tiles = ceil_div(a.panels, Tile::kPanels);
  launch("convolve_tile", &convolve_tile<Math, Tile>,
         {ceil_div(a.rows, Tile::kRows) * a.panel_tiles, dim3(Tile::kThreads), Tile::kStages * Tile::kStageBytes},
         stream, a);
}

// Whether large tiles compute at most a third more columns than small ones: what they are faster by.
bool waste_little(int64_t columns) {
  const int64_t large = ceil_div(columns, LargeTile::kColumns) * LargeTile::kColumns;
  const int64_t small = ceil_div(columns, SmallTile::kColumns) * SmallTile::kColumns;
  return 3 * large <= 4 * small;
}

template <class Math>
void choose_convolve(ConvolveArguments<typename Math::Value>& a, void* stream) {
  // In double, a large tile's sums would not fit the registers.
  if constexpr (!std::is_same_v<Math, MultiplyAdds<double>>) {
    if (a.whole_chunks && a.position != nullptr) return launch_convolve<Math, PixelTile>(a, stream);
    if (a.whole_chunks && waste_little(a.panels * kWarpColumns) &&
        ceil_div(a.rows, LargeTile::kRows) * ceil_div(a.panels, LargeTile::kPanels) >= multiprocessors())
      return launch_convolve<Math, LargeTile>(a, stream);
  }
  launch_convolve<Math, SmallTile>(a, stream);
}

bool has_whole_chunks(const TensorView& view, int64_t channels) {
  return channels * size_of(view.dtype) % kChunkBytes == 0 && reinterpret_cast<uintptr_t>(view.data) % kChunkBytes == 0;
}

template <class T>
void launch_convolve_of(const Convolution& problem, void* stream) {
  require_image_size(problem.height(), problem.width());
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
                         .slices = static_cast<int>(ceil_div(depth, kDepth<T>)),
                         .activation = problem.activation,
                         .images_innermost = false,
                         .whole_chunks = has_whole_chunks(problem.input, problem.inputs()),
                         .taps = offsets_of(problem.taps)};
  // One pixel of all images first, so that a tile at a border leaves out what its taps miss: on a grid of 7 x 7, one
  // part in six. Not where a pixel is less than the memory hands out at a time.
  constexpr int64_t kSector = 32;
  a.images_innermost = std::min(problem.inputs(), problem.output.shape[1]) * int64_t{sizeof(T)} >= kSector;
  if constexpr (std::is_same_v<T, double>)
    choose_convolve<MultiplyAdds<double>>(a, stream);
  else if constexpr (std::is_same_v<T, float>)
    problem.tf32 ? choose_convolve<TensorCores<float>>(a, stream) : choose_convolve<MultiplyAdds<float>>(a, stream);
  else
    choose_convolve<TensorCores<T>>(a, stream);
}

// --- Gradient of the activation, and of the bias ---

constexpr int kActivationThreads = 512;

template <class T>
struct ActivationGradArguments {
  const T *grad, *saved;
  T* result;       // Null where it would be grad.
  SumOf<T>* sums;  // [parts, N], or null.
  int64_t rows, parts, rows_of_part;
  int64_t channels;  // Of grad.
  int64_t column_blocks;
  Activation activation;
};

// Block (part, column block): a thread takes kValues neighbouring channels of every blockDim.y-th row.
template <class T>
__global__ void __launch_bounds__(kActivationThreads, 2)
    differentiate_activation(const __grid_constant__ ActivationGradArguments<T> a) {
  using Sum = SumOf<T>;
  constexpr int kValues = kChunk<T>;
  const bool gated = a.activation == Activation::gated;
  const int64_t outputs = gated ? 2 * a.channels : a.channels;
  auto* const shared = reinterpret_cast<Sum*>(dynamic_shared());
  for (int64_t block = blockIdx.x; block < a.parts * a.column_blocks; block += gridDim.x) {
    const int64_t part = block / a.column_blocks;
    const int64_t first_column = block % a.column_blocks * blockDim.x * kValues;
    const int64_t column = first_column + threadIdx.x * kValues;
    const int64_t left = a.channels - column;
    const int count = static_cast<int>(left < 0 ? 0 : left < kValues ? left : kValues);
    const int64_t first = part * a.rows_of_part;
    const int64_t last = first + a.rows_of_part < a.rows ? first + a.rows_of_part : a.rows;
    Sum sums[2][kValues] = {};
    for (int64_t row = first + threadIdx.y; row < last && count > 0; row += blockDim.y) {
      Sum features[kValues] = {}, gates[kValues] = {};  // The gradient in them; without a gate, only the first.
      load_run(features, a.grad + row * a.channels + column, 1, count);
      if (a.activation == Activation::relu) {
        Sum output[kValues] = {};
        load_run(output, a.saved + row * outputs + column, 1, count);
#pragma unroll
        for (int k = 0; k < kValues; ++k)
          if (!(output[k] > 0)) features[k] = 0;
      } else if (gated) {
        Sum feature[kValues] = {}, gate[kValues] = {};
        load_run(feature, a.saved + row * outputs + column, 1, count);
        load_run(gate, a.saved + row * outputs + a.channels + column, 1, count);
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
          const Sum f = tanh(feature[k]), s = sigmoid(gate[k]);
          gates[k] = features[k] * f * s * (1 - s);
          features[k] *= s * (1 - f * f);
        }
      }
      if (a.result != nullptr) {
        store_run(a.result + row * outputs + column, features, count);
        if (gated) store_run(a.result + row * outputs + a.channels + column, gates, count);
      }
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        sums[0][k] += features[k];
        sums[1][k] += gates[k];
      }
    }
    if (a.sums == nullptr) continue;
    const int columns = static_cast<int>(blockDim.x) * kValues;
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int k = 0; k < kValues; ++k)
        shared[(threadIdx.y * 2 + u) * columns + k * blockDim.x + threadIdx.x] = sums[u][k];
    __syncthreads();
    const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    for (int e = thread; e < (gated ? 2 : 1) * columns; e += kActivationThreads) {
      const int u = e / columns, c = e % columns;
      Sum total = 0;
      for (unsigned y = 0; y < blockDim.y; ++y) total += shared[(y * 2 + u) * columns + c];
      const int64_t channel = first_column + c % blockDim.x * kValues + c / blockDim.x;
      if (channel < a.channels) a.sums[part * outputs + u * a.channels + channel] = total;
    }
    __syncthreads();  // The next block of the problem overwrites shared memory.
  }
}

constexpr int kBiasRows = kThreads / kWarp;

// The parts' sums to the bias's gradient: lane l of each warp takes a column, warp w the parts w, w + kBiasRows, ….
template <class T>
__global__ void __launch_bounds__(kThreads) sum_bias_parts(const SumOf<T>* parts, int64_t outputs, T* bias_grad) {
  using Sum = SumOf<T>;
  auto& of_warp = static_shared<Sum[kBiasRows][kWarp], struct BiasParts>();
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t first = int64_t{blockIdx.x} * kWarp; first < outputs; first += int64_t{gridDim.x} * kWarp) {
    const int64_t column = first + lane;
    Sum total = 0;
    if (column < outputs) {
#pragma unroll 8
      for (int64_t part = warp; part < kBiasParts; part += kBiasRows) total += parts[part * outputs + column];
    }
    of_warp[warp][lane] = total;
    __syncthreads();
    if (warp == 0 && column < outputs) {
      for (int w = 1; w < kBiasRows; ++w) total += of_warp[w][lane];
      bias_grad[column] = Narrow<T>::from(total);
    }
    __syncthreads();
  }
}

template <class T>
void launch_activation_grad(const ActivationGrad& problem, void* stream) {
  const TensorView& grad = problem.grad;
  const bool summed = problem.bias_grad.data != nullptr;
  ActivationGradArguments<T> a{.grad = grad.as<T>(),
                               .saved = problem.saved.as<T>(),
                               .result = problem.activation == Activation::none ? nullptr : problem.result.as<T>(),
                               .sums = summed ? problem.workspace.as<SumOf<T>>() : nullptr,
                               .rows = grad.shape[0] * grad.shape[2] * grad.shape[3],
                               .parts = kBiasParts,
                               .rows_of_part = 0,
                               .channels = grad.shape[1],
                               .column_blocks = 0,
                               .activation = problem.activation};
  if (a.rows == 0) {
    fill_with_zeros(problem.bias_grad.data, summed ? problem.outputs() * int64_t{sizeof(T)} : 0, stream);
    return;
  }
  const int64_t chunks = ceil_div(a.channels, kChunk<T>);
  unsigned across = 1;
  while (across < kWarp && across < chunks) across *= 2;
  const dim3 threads(across, kActivationThreads / across);
  constexpr int64_t kRowsOfThread = 4;  // Enough to be worth a block's start.
  if (!summed) a.parts = ceil_div(a.rows, threads.y * kRowsOfThread);
  a.rows_of_part = ceil_div(a.rows, a.parts);
  a.column_blocks = ceil_div(chunks, across);
  launch(
      "differentiate_activation", &differentiate_activation<T>,
      {a.parts * a.column_blocks, threads, summed ? 2 * kActivationThreads * kChunk<T> * int64_t{sizeof(SumOf<T>)} : 0},
      stream, a);
  if (summed)
    launch("sum_bias_parts", &sum_bias_parts<T>, {ceil_div(problem.outputs(), kWarp), dim3(kThreads)}, stream, a.sums,
           problem.outputs(), problem.bias_grad.as<T>());
}

// --- Gradient of the weight ---

// How a weight's gradient is split: over tiles of outputs x (taps x channels), and over parts of the pixels, so that
// there are blocks for a large GPU. It does not depend on the GPU, and so neither do results.
struct GradPlan {
  bool whole_input_chunks, whole_grad_chunks, large;
  int depth;  // Taps x channels.
  int64_t pixels, output_tiles, depth_tiles, parts, pixels_of_part;

  explicit GradPlan(const WeightGrad& problem) {
    require_image_size(problem.height(), problem.width());
    const DType dtype = problem.input.dtype;
    depth = depth_of(static_cast<int64_t>(problem.taps.size()), problem.channels());
    whole_input_chunks = has_whole_chunks(problem.input, problem.channels());
    whole_grad_chunks = has_whole_chunks(problem.grad, problem.outputs());
    large = dtype != DType::f64 && whole_input_chunks && whole_grad_chunks && waste_little(problem.outputs()) &&
            waste_little(depth);
    output_tiles = ceil_div(problem.outputs(), large ? LargeTile::kRows : SmallTile::kRows);
    depth_tiles = ceil_div(depth, large ? LargeTile::kColumns : SmallTile::kColumns);
    constexpr int64_t kBlocks = 264, kLeastPixels = 128;
    pixels = problem.batch() * problem.height() * problem.width();
    const int64_t wanted = kBlocks / std::max<int64_t>(output_tiles * depth_tiles, 1);
    parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(pixels / kLeastPixels, 1));
    parts = std::max(parts, ceil_div(pixels, kMaxCount));
    pixels_of_part = ceil_div(pixels, parts);
  }
};

template <class Math>
struct WeightGradArguments {
  using T = typename Math::Value;
  const T *input, *grad;
  typename Math::Sum* sums;  // [parts, O, depth].
  int64_t pixels, pixels_of_part, outputs, output_tiles, depth_tiles;
  int height, width, channels, depth;
  FastDivide by_width, by_height;
  bool whole_input_chunks, whole_grad_chunks;
  Taps taps;
};

// Block (part, output tile, depth tile), the last fastest: sums over the part's pixels of gradient times what the taps
// see. Pixels are the depth of this product, in shared memory outermost, as they lie in memory.
template <class Math, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    sum_weight_grad(const __grid_constant__ WeightGradArguments<Math> a) {
  using T = typename Math::Value;
  static_assert(Tile::kRows == Tile::kColumns);  // So that copies of both operands are shared out alike.
  constexpr int kWidth = Tile::kRows, kChunksAcross = kWidth / kChunk<T>;
  constexpr int kDepthStep = Tile::kThreads / kChunksAcross, kCopies = kDepth<T> / kDepthStep;
  static_assert(kCopies * kDepthStep == kDepth<T>);
  unsigned char* const stages = dynamic_shared();
  const int64_t first_column = blockIdx.x % a.depth_tiles * kWidth;
  const int64_t first_output = blockIdx.x / a.depth_tiles % a.output_tiles * kWidth;
  const int64_t part = blockIdx.x / a.depth_tiles / a.output_tiles;
  const int64_t first_pixel = part * a.pixels_of_part;
  const int64_t left = a.pixels - first_pixel;
  const int pixels = static_cast<int>(left < 0 ? 0 : left < a.pixels_of_part ? left : a.pixels_of_part);
  const auto in_image = static_cast<uint32_t>(first_pixel % (int64_t{a.height} * a.width));

  const int chunk = threadIdx.x % kChunksAcross, depth_row = threadIdx.x / kChunksAcross;
  const int64_t output = first_output + chunk * kChunk<T>, chunk_column = first_column + chunk * kChunk<T>;
  // Column tap * C + channel of the input's matrix: where that tap leads from a pixel, out of the image where there is
  // no such column, and what it adds to the pixel's address.
  struct Column {
    int dy, dx;
    int64_t offset;
  };
  const auto column_at = [&](int64_t column) {
    if (column >= a.depth) return Column{std::numeric_limits<int>::min() / 2, 0, 0};
    const int tap = static_cast<int>(column) / a.channels, channel = static_cast<int>(column) - tap * a.channels;
    const Taps::Offset by = a.taps.at[tap];
    return Column{by.dy, by.dx, (int64_t{by.dy} * a.width + by.dx) * a.channels + channel};
  };
  const Column first = column_at(chunk_column);
  const T* const grads = a.grad + first_pixel * a.outputs + output;
  const T* const inputs = a.input + first_pixel * a.channels;

  const auto start = [&](unsigned char* stage, int slice) {
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = depth_row + i * kDepthStep, pixel = slice * kDepth<T> + row;
      const bool exists = pixel < pixels;
      uint32_t x, y;
      a.by_height(a.by_width(in_image + static_cast<uint32_t>(pixel), x), y);
      const auto inside = [&](const Column& column) {
        return exists && y + column.dy < static_cast<uint32_t>(a.height) &&
               x + column.dx < static_cast<uint32_t>(a.width);
      };
      const int at = chunk_of_depth<T, kWidth>(row, chunk);
      unsigned char *const to_a = stage + at, *const to_b = stage + Tile::kABytes + at;
      const T* const grad = grads + pixel * a.outputs;
      const T* const input = inputs + int64_t{pixel} * a.channels;
      if (Tile::kWholeChunks || a.whole_grad_chunks) {
        const bool there = exists && output < a.outputs;
        copy_async<kChunkBytes>(to_a, there ? grad : a.grad, there);
      } else {
        for (int e = 0; e < kChunk<T>; ++e) {
          const bool there = exists && output + e < a.outputs;
          copy_value(reinterpret_cast<T*>(to_a) + e, there ? grad + e : a.grad, there);
        }
      }
      if (Tile::kWholeChunks || a.whole_input_chunks) {
        const bool there = inside(first);
        copy_async<kChunkBytes>(to_b, there ? input + first.offset : a.input, there);
      } else {
        for (int e = 0; e < kChunk<T>; ++e) {
          const Column column = column_at(chunk_column + e);
          const bool there = inside(column);
          copy_value(reinterpret_cast<T*>(to_b) + e, there ? input + column.offset : a.input, there);
        }
      }
    }
  };

  const int warp = threadIdx.x / kWarp;
  const int warp_row = warp / Tile::kPanels * (16 * Tile::kRowTiles), warp_column = warp % Tile::kPanels * kWarpColumns;
  WarpSums<Math, Tile::kRowTiles> sums = {};
  int slice = 0;
  pipeline<Tile::kStages>(
      [&](int stage) {
        if (slice * kDepth<T> >= pixels) return false;
        start(stages + stage * Tile::kStageBytes, slice++);
        return true;
      },
      [&](int stage) {
        const unsigned char* const tiles = stages + stage * Tile::kStageBytes;
        add_product_of_columns<Math, Tile::kRowTiles, kWidth, kWidth>(sums, tiles, warp_row, tiles + Tile::kABytes,
                                                                      warp_column);
      });

  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 2 * Tile::kRowTiles; ++i) {
    const int64_t row = first_output + warp_row + 8 * i + g;
    if (row >= a.outputs) continue;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int64_t column = first_column + warp_column + 8 * j + 2 * t, exist = a.depth - column;
      const typename Math::Sum pair[2] = {sums[i / 2][j][i % 2 * 2], sums[i / 2][j][i % 2 * 2 + 1]};
      store_run(a.sums + (part * a.outputs + row) * a.depth + column, pair,
                static_cast<int>(exist < 0   ? 0
                                 : exist < 2 ? exist
                                             : 2));
    }
  }
}

template <class T>
struct FinishArguments {
  const SumOf<T>* sums;
  TensorView weight_grad;
  const bool* mask;
  int64_t mask_strides[4];
  int64_t parts, outputs;
  int channels, depth, kernel_width;
  TapIndices indices;
};

// The parts' sums, in order, to the weight's gradient where the mask lets it through. The rest is zero already.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_weight_grad(const __grid_constant__ FinishArguments<T> a) {
  const int64_t values = a.outputs * a.depth;
  for (int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x; e < values; e += int64_t{gridDim.x} * kThreads) {
    const int64_t output = e / a.depth;
    const int column = static_cast<int>(e - output * a.depth), tap = column / a.channels;
    const int index = a.indices.at[tap], row = index / a.kernel_width, col = index % a.kernel_width;
    const auto at = [&](const int64_t* strides) {
      return output * strides[0] + (column - tap * a.channels) * strides[1] + row * strides[2] + col * strides[3];
    };
    if (!a.mask[at(a.mask_strides)]) continue;
    SumOf<T> total = 0;
#pragma unroll 4
    for (int64_t part = 0; part < a.parts; ++part) total += a.sums[part * values + e];
    a.weight_grad.template as<T>()[at(a.weight_grad.strides)] = Narrow<T>::from(total);
  }
}

// Strides of a mask over [O, C, kh, kw]: 0 where it is the same for all channels.
void strides_of_mask(const TensorView& mask, int64_t (&strides)[4]) {
  for (int d = 0; d < 4; ++d) strides[d] = mask.ndim == 4 ? mask.strides[d] : d < 2 ? 0 : mask.strides[d - 2];
}

template <class Math>
void launch_weight_grad(const WeightGrad& problem, const GradPlan& plan, void* stream) {
  using T = typename Math::Value;
  const int64_t channels = problem.channels(), outputs = problem.outputs();
  const WeightGradArguments<Math> a{.input = problem.input.as<T>(),
                                    .grad = problem.grad.as<T>(),
                                    .sums = problem.workspace.as<typename Math::Sum>(),
                                    .pixels = problem.batch() * problem.height() * problem.width(),
                                    .pixels_of_part = plan.pixels_of_part,
                                    .outputs = outputs,
                                    .output_tiles = plan.output_tiles,
                                    .depth_tiles = plan.depth_tiles,
                                    .height = static_cast<int>(problem.height()),
                                    .width = static_cast<int>(problem.width()),
                                    .channels = static_cast<int>(channels),
                                    .depth = plan.depth,
                                    .by_width = FastDivide(static_cast<uint32_t>(problem.width())),
                                    .by_height = FastDivide(static_cast<uint32_t>(problem.height())),
                                    .whole_input_chunks = plan.whole_input_chunks,
                                    .whole_grad_chunks = plan.whole_grad_chunks,
                                    .taps = offsets_of(problem.taps)};
  const int64_t blocks = plan.parts * plan.output_tiles * plan.depth_tiles;
  const auto launch_tiles = [&]<class Tile>(Tile) {
    launch("sum_weight_grad", &sum_weight_grad<Math, Tile>,
           {blocks, dim3(Tile::kThreads), Tile::kStages * Tile::kStageBytes}, stream, a);
  };
  if constexpr (std::is_same_v<T, double>)
    launch_tiles(SmallTile{});
  else
    plan.large ? launch_tiles(LargeTile{}) : launch_tiles(SmallTile{});

  FinishArguments<T> finish{.sums = a.sums,
                            .weight_grad = problem.weight_grad,
                            .mask = problem.mask.as<bool>(),
                            .mask_strides = {},
                            .parts = plan.parts,
                            .outputs = outputs,
                            .channels = a.channels,
                            .depth = plan.depth,
                            .kernel_width = static_cast<int>(problem.weight_grad.shape[3]),
                            .indices = indices_of(problem.taps)};
  strides_of_mask(problem.mask, finish.mask_strides);
  launch("finish_weight_grad", &finish_weight_grad<T>, {ceil_div(outputs * plan.depth, kThreads), dim3(kThreads)},
         stream, finish);
}

}  // namespace

int64_t packed_bytes(int64_t outputs, int64_t inputs, int64_t taps, DType dtype, bool gated) {
  return panels_of(outputs, gated) * ceil_div(taps * inputs * size_of(dtype), kSliceBytes) * kPanelSliceBytes;
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
                             .slices = static_cast<int>(ceil_div(depth, kDepth<T>)),
                             .kernel_width = static_cast<int>(problem.weight.shape[3]),
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
