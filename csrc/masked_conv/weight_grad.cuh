// The gradient in the weight: for each tap, the product of what it sees and the gradient in the outputs, summed over
// all pixels. One matrix product, outputs x (taps x channels), whose depth is the pixels; it is split over them into
// parts that a second kernel sums in order, so that results do not vary.
#pragma once

#include "masked_conv/tile.cuh"

namespace cpc::masked_conv::cuda {

// How a weight's gradient is split: over tiles of outputs x (taps x channels), and over parts of the pixels, so that
// there are blocks for a large GPU. It does not depend on the GPU, and so neither do results.
struct GradPlan {
  bool whole_input_chunks, whole_grad_chunks, large;
  int depth;  // Taps x channels.
  int64_t pixels, output_tiles, depth_tiles, parts, pixels_of_part;

  explicit GradPlan(const WeightGrad& problem) {
    require_image_size(problem.batch(), problem.height(), problem.width());
    const DType dtype = problem.input.dtype;
    depth = depth_of(static_cast<int64_t>(problem.taps.size()), problem.channels());
    whole_input_chunks = has_whole_chunks(problem.input, problem.channels());
    whole_grad_chunks = has_whole_chunks(problem.grad, problem.outputs());
    large = dtype != DType::f64 && whole_input_chunks && whole_grad_chunks && waste_little(problem.outputs()) &&
            waste_little(depth);
    output_tiles = divide_up(problem.outputs(), large ? LargeTile::kRows : SmallTile::kRows);
    depth_tiles = divide_up(depth, large ? LargeTile::kColumns : SmallTile::kColumns);
    constexpr int64_t kBlocks = 264, kLeastPixels = 128;
    pixels = problem.batch() * problem.height() * problem.width();
    const int64_t wanted = kBlocks / std::max<int64_t>(output_tiles * depth_tiles, 1);
    parts = std::clamp<int64_t>(wanted, 1, std::max<int64_t>(pixels / kLeastPixels, 1));
    parts = std::max(parts, divide_up(pixels, kMaxCount));
    pixels_of_part = divide_up(pixels, parts);
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
        using Operand = DepthOutermost<T, kWidth>;
        add_product<Math, Tile::kRowTiles>(sums, Operand(tiles, warp_row), Operand(tiles + Tile::kABytes, warp_column));
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
  const int64_t blocks = blocks_of(plan.parts * plan.output_tiles * plan.depth_tiles);
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
                            .kernel_width = kernel_width_of(problem.weight_grad),
                            .indices = indices_of(problem.taps)};
  strides_of_mask(problem.mask, finish.mask_strides);
  launch("finish_weight_grad", &finish_weight_grad<T>, {divide_up(outputs * plan.depth, kThreads), dim3(kThreads)},
         stream, finish);
}

}  // namespace cpc::masked_conv::cuda
