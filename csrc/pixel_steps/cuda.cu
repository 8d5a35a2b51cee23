// A network's steps on the GPU: one launch runs all that are due at a pixel or in a row. Images do not depend on each
// other. A group of blocks shares a few images, divides the features of each step among its blocks, and waits for all
// of them before a step that reads what they have written. Weights are small enough to stay in the second-level cache.
#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>
#include <vector>

#include "core/cuda/block_barrier.cuh"
#include "core/cuda/device.h"
#include "core/cuda/kernel.cuh"
#include "core/workspace.h"
#include "pixel_steps/pixel_steps.h"

namespace cpc::pixel_steps::cuda {
namespace {

using namespace cpc::cuda;

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
// A block computes kFeatures features of kRows rows of the product at a time, with kDepth values of each row in shared
// memory.
constexpr int kFeatures = 8, kRows = 4, kDepth = 1024;
// The most blocks of a group. Most networks have no more features to divide, and fewer blocks wait less for each other.
constexpr int64_t kMostBlocks = 16;
constexpr int64_t kBarrierBytes = 128;  // Each barrier has a cache line of its own.

// Tells the compiler that a pointer, which was read from memory, points to global memory.
template <class E>
__device__ E* global(const void* p) {
#if !defined(CPC_CUDA_EMULATION)
  __builtin_assume(__isGlobal(p));
#endif
  return static_cast<E*>(const_cast<void*>(p));
}

// Where a map's pixels lie; `data` is at the pixel in row 0 and column 0 of the first image.
struct Map {
  void* data = nullptr;
  int64_t image = 0, row = 0, col = 0;

  Map() = default;
  template <class E>
  static Map of(const TensorView& view) {
    if (view.ndim == 0) return {};
    Map map;
    map.image = view.strides[0];
    map.row = view.strides[1];
    map.col = view.strides[2];
    map.data = view.as<E>() + kAbove * map.row + kBeside * map.col;
    return map;
  }
  template <class E>
  __device__ E* at(int64_t i, int64_t y, int64_t x) const {
    return global<E>(data) + i * image + y * row + x * col;
  }
};

// A tap of a source: `channels` values of a row of the product, from `first` on.
struct Read {
  Map map;
  int64_t offset;
  int scale, first, channels;
};

struct PlannedStep {
  Map residual, raw, elu;
  const void *weight, *bias, *image_bias;
  int level, depth, outputs, features, first_read, reads, output_scale, row_offset, col_offset;
  bool gated;
  bool waits;  // Whether blocks must first wait for each other.
  bool wide;   // Whether 16 bytes of neighbouring weights can be read at a time.
};

struct Arguments {
  const PlannedStep* steps;
  const Read* reads;
  unsigned* barriers;
  const int64_t* position;
  int64_t batch, width;
  int count;
  unsigned blocks, groups;  // Blocks of a group, and the number of groups.
  bool whole_row;
};

// The offsets of a plan's parts in its memory.
struct Layout {
  int64_t steps, reads, bytes;
  explicit Layout(const Network& network) {
    int64_t count = 0;
    for (const Step& step : network.steps)
      for (const Source& source : step.sources) count += static_cast<int64_t>(source.taps.size());
    Parts parts(nullptr);
    parts.take<char>(std::max<int64_t>(network.batch, 1) * kBarrierBytes);
    steps = parts.used();
    parts.take<PlannedStep>(static_cast<int64_t>(network.steps.size()));
    reads = parts.used();
    parts.take<Read>(count);
    bytes = parts.used();
  }
};

// A row of the product: a pixel of an image.
struct Row {
  int64_t image, y, x;
};

// Shared memory of a block.
template <class E>
struct Shared {
  E values[kRows][kDepth];
  E sums[kWarps][kRows][2 * kFeatures];
};

// Copies values [first, first + count) of the rows to shared memory; each warp takes one tap at a time.
template <class E, class RowOf>
__device__ void stage(const Arguments& a, const PlannedStep& step, Shared<E>& shared, int first, int count, int rows,
                      const RowOf& row_of) {
  const int lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x / kWarp; i < step.reads; i += kWarps) {
    const Read read = a.reads[step.first_read + i];
    const int begin = std::max(first - read.first, 0), end = std::min(first + count - read.first, read.channels);
    for (int r = 0; r < rows; ++r) {
      const Row row = row_of(r);
      const E* const from = read.map.template at<E>(row.image, row.y * read.scale, row.x * read.scale) + read.offset;
#pragma unroll 4
      for (int c = begin + lane; c < end; c += kWarp) shared.values[r][read.first - first + c] = from[c];
    }
  }
}

// Sums kFeatures features, and their gates if there are any. Threads divide neighbouring columns and slices of the
// depth among themselves, in an order that depends only on the step.
template <class E>
__device__ void multiply(const PlannedStep& step, Shared<E>& shared, int first, int count, int rows, int feature,
                         E (&sums)[kRows][16 / sizeof(E)]) {
  constexpr int kWide = 16 / sizeof(E), kVectors = kFeatures / kWide;
  const int lanes = step.gated ? 2 * kVectors : kVectors, slices = kWarps * kWarp / lanes;
  const int vector = threadIdx.x % lanes, slice = threadIdx.x / lanes;
  const int own = feature + vector % kVectors * kWide, left = step.features - own;
  const E* const weight =
      global<const E>(step.weight) + int64_t{first} * step.outputs + own + (vector >= kVectors ? step.features : 0);
  const auto add = [&](int k, const Pack<E, kWide>& w) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      const E value = shared.values[r][k];
#pragma unroll
      for (int i = 0; i < kWide; ++i) sums[r][i] += value * w.v[i];
    }
  };
  if (step.wide && left >= kWide) {
#pragma unroll 8
    for (int k = slice; k < count; k += slices)
      add(k, std::bit_cast<Pack<E, kWide>>(arriving<kWide>(weight + int64_t{k} * step.outputs)));
    return;
  }
  for (int k = slice; k < count; k += slices) {
    Pack<E, kWide> w = {};
    for (int i = 0; i < kWide; ++i)
      if (i < left) w.v[i] = weight[int64_t{k} * step.outputs + i];
    add(k, w);
  }
}

// Adds up the slices of those lanes of a warp that have the same columns, and stores each warp's sums in shared memory.
template <class E>
__device__ void store_sums(const PlannedStep& step, Shared<E>& shared, int rows,
                           const E (&sums)[kRows][16 / sizeof(E)]) {
  constexpr int kWide = 16 / sizeof(E), kVectors = kFeatures / kWide;
  const int lanes = step.gated ? 2 * kVectors : kVectors, lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      E sum = sums[r][i];
      for (int mask = kWarp / 2; mask >= lanes; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
      if (lane < lanes) shared.sums[warp][r][lane * kWide + i] = sum;
    }
  }
}

template <class E>
__device__ E elu(E v) {
  return v > 0 ? v : exp(v) - 1;
}

// Adds up the warps' sums, applies the activation and writes the maps; each thread takes one feature of a row.
template <class E>
__device__ void finish(const PlannedStep& step, const Shared<E>& shared, int feature, int n, const Row& row) {
  const int f = feature + n % kFeatures, r = n / kFeatures;
  if (f >= step.features) return;
  const auto value = [&](int column, int output) {
    E sum = 0;
    for (const auto& warp : shared.sums) sum += warp[r][column];
    sum += global<const E>(step.bias)[output];
    if (step.image_bias != nullptr) sum += global<const E>(step.image_bias)[row.image * step.outputs + output];
    return sum;
  };
  E v = value(n % kFeatures, f);
  if (step.gated) {
    const E gate = value(kFeatures + n % kFeatures, step.features + f);
    v = step.residual.template at<E>(row.image, row.y, row.x)[f] + v * (1 / (1 + exp(-gate)));
  }
  const int64_t y = row.y * step.output_scale + step.row_offset, x = row.x * step.output_scale + step.col_offset;
  if (step.raw.data != nullptr) step.raw.template at<E>(row.image, y, x)[f] = v;
  if (step.elu.data == nullptr) return;
  E* const both = step.elu.template at<E>(row.image, y, x) + f;
  both[0] = elu(v);
  both[step.features] = elu(-v);
}

// A step for the images [first_image, first_image + images); `member` says which of the blocks that share them this is.
template <class E>
__device__ void run_step(const Arguments& a, const PlannedStep& step, Shared<E>& shared, int64_t first_image,
                         int64_t images, unsigned member) {
  // A map of one pixel receives the last pixel of a row.
  const int64_t width = a.width >> step.level, columns = a.whole_row && step.output_scale != 0 ? width : 1;
  const int64_t y = a.position[0] >> step.level;
  const int64_t x = a.whole_row && step.output_scale == 0 ? width - 1 : a.position[1] >> step.level;
  const int64_t all = images * columns;
  for (int64_t from = 0; from < all; from += kRows) {
    const int rows = static_cast<int>(std::min(int64_t{kRows}, all - from));
    const auto row_of = [&](int r) { return Row{first_image + (from + r) % images, y, x + (from + r) / images}; };
    const int begin = static_cast<int>(member) * kFeatures, stride = static_cast<int>(a.blocks) * kFeatures;
    for (int feature = begin; feature < step.features; feature += stride) {
      E sums[kRows][16 / sizeof(E)] = {};
      for (int first = 0; first < step.depth; first += kDepth) {
        const int count = std::min(int{kDepth}, step.depth - first);
        __syncthreads();  // All threads are done with the last values and sums.
        if (step.depth > kDepth || feature == begin) {
          stage(a, step, shared, first, count, rows, row_of);
          __syncthreads();
        }
        multiply(step, shared, first, count, rows, feature, sums);
      }
      store_sums(step, shared, rows, sums);
      __syncthreads();
      const int n = threadIdx.x;
      if (n < rows * kFeatures) finish(step, shared, feature, n, row_of(n / kFeatures));
    }
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads, 1) run_steps(const __grid_constant__ Arguments a) {
  Shared<E>& shared = *reinterpret_cast<Shared<E>*>(dynamic_shared());
  const unsigned group = blockIdx.x / a.blocks, member = blockIdx.x % a.blocks;
  const int64_t first = group * a.batch / a.groups, end = (group + 1) * a.batch / a.groups;
  unsigned* const barrier = a.barriers + group * (kBarrierBytes / sizeof(unsigned));
  const int64_t place = a.position[0] | a.position[1];
  bool waits = false;  // If a step that waits is not due, the next one that is due waits instead.
  for (int i = 0; i < a.count; ++i) {
    const PlannedStep& step = a.steps[i];
    waits = waits || step.waits;
    if ((place & ((int64_t{1} << step.level) - 1)) != 0) continue;
    if (waits) wait_for_blocks(barrier, a.blocks, member == 0);
    waits = false;
    run_step(a, step, shared, first, end - first, member);
  }
}

// The memory that steps have read and written since the last one that waited.
class Order {
 public:
  // Whether a step must wait for those before it. Steps with different offsets write different pixels of a map of twice
  // the resolution, and need not wait for each other.
  bool waits(const Step& step) {
    std::vector<Access> own;
    const auto add = [&](const TensorView& map, bool writes) {
      if (map.ndim != 0) own.push_back({range_of(map), writes, step.output_scale, step.row_offset, step.col_offset});
    };
    for (const Source& source : step.sources) add(source.map, false);
    add(step.residual, false);
    add(step.raw, true);
    add(step.elu, true);
    const bool waits = std::any_of(own.begin(), own.end(), [&](const Access& one) {
      return std::any_of(before_.begin(), before_.end(), [&](const Access& other) { return one.needs(other); });
    });
    if (waits) before_.clear();
    before_.insert(before_.end(), own.begin(), own.end());
    return waits;
  }

 private:
  struct Access {
    std::pair<uintptr_t, uintptr_t> memory;
    bool writes;
    int64_t scale, row, col;

    bool needs(const Access& other) const {
      const bool apart = memory.first >= other.memory.second || other.memory.first >= memory.second;
      const bool other_part = scale == 2 && other.scale == 2 && (row != other.row || col != other.col);
      return !apart && (writes || other.writes) && !(writes && other.writes && other_part);
    }
  };
  static std::pair<uintptr_t, uintptr_t> range_of(const TensorView& map) {
    int64_t least = 0, most = 0;
    for (int d = 0; d < map.ndim; ++d) {
      const int64_t reach = std::max<int64_t>(map.shape[d] - 1, 0) * map.strides[d];
      (reach < 0 ? least : most) += reach;
    }
    const auto size = static_cast<int64_t>(size_of(map.dtype));
    const auto at = reinterpret_cast<uintptr_t>(map.data);
    return {at + static_cast<uintptr_t>(least * size), at + static_cast<uintptr_t>((most + 1) * size)};
  }

  std::vector<Access> before_;
};

template <class E>
PlannedStep planned(const Step& step, int first_read, bool waits) {
  PlannedStep to = {};
  to.residual = Map::of<E>(step.residual);
  to.raw = Map::of<E>(step.raw);
  to.elu = Map::of<E>(step.elu);
  to.weight = step.weight.data;
  to.bias = step.bias.data;
  to.image_bias = step.image_bias.ndim != 0 ? step.image_bias.data : nullptr;
  to.level = static_cast<int>(step.level);
  to.depth = static_cast<int>(step.depth());
  to.outputs = static_cast<int>(step.outputs());
  to.features = static_cast<int>(step.features());
  to.first_read = first_read;
  for (const Source& source : step.sources) to.reads += static_cast<int>(source.taps.size());
  to.output_scale = static_cast<int>(step.output_scale);
  to.row_offset = static_cast<int>(step.row_offset);
  to.col_offset = static_cast<int>(step.col_offset);
  to.gated = step.residual.ndim != 0;
  to.waits = waits;
  constexpr int64_t kWide = 16 / sizeof(E);
  to.wide = reinterpret_cast<uintptr_t>(step.weight.data) % 16 == 0 && step.outputs() % kWide == 0 &&
            step.features() % kWide == 0;
  return to;
}

template <class E>
void fill_plan(const Network& network, char* plan) {
  const Layout layout(network);
  auto* const steps = reinterpret_cast<PlannedStep*>(plan + layout.steps);
  auto* const reads = reinterpret_cast<Read*>(plan + layout.reads);
  Order order;
  int count = 0;
  for (size_t i = 0; i < network.steps.size(); ++i) {
    const Step& step = network.steps[i];
    steps[i] = planned<E>(step, count, order.waits(step));
    int first = 0;
    for (const Source& source : step.sources)
      for (const Tap& tap : source.taps) {
        Read& read = reads[count++];
        read.map = Map::of<E>(source.map);
        read.offset = tap.dy * source.map.strides[1] + tap.dx * source.map.strides[2];
        read.scale = static_cast<int>(source.scale);
        read.first = first;
        read.channels = static_cast<int>(source.channels());
        first += read.channels;
      }
  }
}

template <class E>
void launch_steps(const Network& network, const DevicePlace& place, void* stream) {
  const Layout layout(network);
  Arguments a = {};
  a.steps = reinterpret_cast<const PlannedStep*>(place.plan + layout.steps);
  a.reads = reinterpret_cast<const Read*>(place.plan + layout.reads);
  a.barriers = reinterpret_cast<unsigned*>(place.plan);
  a.position = place.position;
  a.batch = network.batch;
  a.width = network.width;
  a.count = static_cast<int>(network.steps.size());
  const int64_t groups = std::min(network.batch, multiprocessors());
  const int64_t blocks = std::min(kMostBlocks, multiprocessors() / groups);
  a.groups = static_cast<unsigned>(groups);
  a.blocks = static_cast<unsigned>(blocks);
  a.whole_row = place.whole_row;
  launch("run_steps", &run_steps<E>, {groups * blocks, dim3(kThreads), sizeof(Shared<E>), Blocks::together}, stream, a);
}

}  // namespace

int64_t plan_bytes(const Network& network) { return Layout(network).bytes; }

void fill_plan(const Network& network, char* plan) {
  std::memset(plan, 0, static_cast<size_t>(plan_bytes(network)));
  network.dtype == DType::f64 ? fill_plan<double>(network, plan) : fill_plan<float>(network, plan);
}

void run(const Network& network, const DevicePlace& place, void* stream) {
  if (network.batch == 0 || network.steps.empty()) return;
  network.dtype == DType::f64 ? launch_steps<double>(network, place, stream)
                              : launch_steps<float>(network, place, stream);
}

}  // namespace cpc::pixel_steps::cuda
