// The gradient in the weight: for each tap, the product of what it sees and the gradient in the outputs, summed over
// all pixels. One matrix product, outputs x (taps x channels), whose depth is the pixels; it is split over them into
// parts, entries of a batch to the product, that a second kernel sums in order, so that results do not vary.
#pragma once

#include "core/cuda/product_epilogues.cuh"
#include "masked_conv/visible_taps.cuh"

namespace cpc::masked_conv::cuda {

// How a weight's gradient is split: over tiles of outputs x (taps x channels), and over parts of the pixels, so that
// there are blocks for a large GPU. It does not depend on the GPU, and so neither do results.
struct GradPlan {
  bool whole_chunks, low;
  int depth;  // Taps x channels.
  int64_t pixels, parts, pixels_of_part;

  explicit GradPlan(const WeightGrad& problem) {
    require_image_size(problem.batch(), problem.height(), problem.width());
    depth = depth_of(static_cast<int64_t>(problem.taps.size()), problem.channels());
    whole_chunks = problem.input.dtype != DType::f64 && has_whole_chunks(problem.input, problem.channels()) &&
                   has_whole_chunks(problem.grad, problem.outputs());
    const bool is_double = problem.input.dtype == DType::f64;
    low = !whole_chunks ||
          divide_up(problem.outputs(), SquareTile::kRows) * SquareTile::kRows >=
              kLowCost * static_cast<double>(divide_up(problem.outputs(), LowTile::kRows) * LowTile::kRows);
    static_assert(DoubleTile::kRows == LowTile::kRows);
    const int64_t rows = low ? LowTile::kRows : SquareTile::kRows;
    const int64_t columns = is_double ? DoubleTile::kColumns : SquareTile::kColumns;
    const int64_t tiles = divide_up(problem.outputs(), rows) * divide_up(depth, columns);
    constexpr int64_t kBlocks = 264, kLeastPixels = 128;
    pixels = problem.batch() * problem.height() * problem.width();
    parts = std::clamp<int64_t>(kBlocks / std::max<int64_t>(tiles, 1), 1, std::max<int64_t>(pixels / kLeastPixels, 1));
    parts = std::max(parts, divide_up(pixels, kMaxCount));
    // Whole slices, so that no part but the last begins or ends with zeros.
    pixels_of_part = std::max<int64_t>(divide_up(divide_up(pixels, parts), kLeastPixels), 1) * kLeastPixels;
    parts = std::max<int64_t>(divide_up(pixels, pixels_of_part), 1);
  }
};

template <class T>
struct FinishArguments {
  const SumOf<T>* sums;
  TensorView weight_grad;
  const bool* mask;
  int64_t mask_strides[4];
  int64_t parts, outputs;
  int depth, kernel_width;
  FastDivide by_channels;
  TapIndices indices;
};

// The parts' sums, in order, to the weight's gradient where the mask lets it through. The rest is zero already.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_weight_grad(const __grid_constant__ FinishArguments<T> a) {
  const int64_t values = a.outputs * a.depth, blocks_across = divide_up(a.depth, kThreads);
  for (int64_t block = blockIdx.x; block < a.outputs * blocks_across; block += gridDim.x) {
    const int64_t output = block / blocks_across;
    const int column = static_cast<int>(block - output * blocks_across) * kThreads + static_cast<int>(threadIdx.x);
    if (column >= a.depth) continue;
    uint32_t channel;
    const uint32_t tap = a.by_channels(static_cast<uint32_t>(column), channel);
    const int index = a.indices.at[tap], row = index / a.kernel_width, col = index % a.kernel_width;
    const auto at = [&](const int64_t* strides) {
      return output * strides[0] + channel * strides[1] + row * strides[2] + col * strides[3];
    };
    if (!a.mask[at(a.mask_strides)]) continue;
    const SumOf<T>* const sums = a.sums + output * a.depth + column;
    SumOf<T> total = 0;
#pragma unroll 4
    for (int64_t part = 0; part < a.parts; ++part) total += sums[part * values];
    a.weight_grad.template as<T>()[at(a.weight_grad.strides)] = Narrow<T>::from(total);
  }
}

template <class Math, class Tile, bool kWholeChunks>
void launch_sums(const WeightGrad& problem, const GradPlan& plan, void* stream) {
  using T = typename Math::Value;
  using Sum = typename Math::Sum;
  const FastDivide by_width(static_cast<uint32_t>(problem.width())), by_height(static_cast<uint32_t>(problem.height()));
  const auto columns = [&]<class TapsOf>(const TensorView& view, int64_t channels, int64_t count, const TapsOf& taps) {
    return TapColumns<T, kWholeChunks, TapsOf>{view.as<T>(),
                                               count,
                                               plan.pixels,
                                               plan.pixels_of_part,
                                               static_cast<int>(problem.height()),
                                               static_cast<int>(problem.width()),
                                               static_cast<int>(channels),
                                               by_width,
                                               by_height,
                                               taps};
  };
  const int64_t outputs = problem.outputs();
  launch_product<Math, Tile>(
      "sum_weight_grad", columns(problem.grad, outputs, outputs, PixelItself{}),
      columns(problem.input, problem.channels(), plan.depth, offsets_of(problem.taps)),
      WholeDepth(slices_of<T>(std::min(plan.pixels, plan.pixels_of_part))),
      StoreRows<Sum>{problem.workspace.as<Sum>(), plan.depth, outputs, plan.depth, outputs * plan.depth}, plan.parts,
      stream);
}

template <class Math>
void launch_weight_grad(const WeightGrad& problem, const GradPlan& plan, void* stream) {
  using T = typename Math::Value;
  const int64_t channels = problem.channels(), outputs = problem.outputs();
  if constexpr (std::is_same_v<T, double>)
    launch_sums<Math, DoubleTile, false>(problem, plan, stream);
  else if (!plan.whole_chunks)
    launch_sums<Math, LowTile, false>(problem, plan, stream);
  else
    plan.low ? launch_sums<Math, LowTile, true>(problem, plan, stream)
             : launch_sums<Math, SquareTile, true>(problem, plan, stream);

  FinishArguments<T> finish{.sums = problem.workspace.as<typename Math::Sum>(),
                            .weight_grad = problem.weight_grad,
                            .mask = problem.mask.as<bool>(),
                            .mask_strides = {},
                            .parts = plan.parts,
                            .outputs = outputs,
                            .depth = plan.depth,
                            .kernel_width = kernel_width_of(problem.weight_grad),
                            .by_channels = FastDivide(static_cast<uint32_t>(channels)),
                            .indices = indices_of(problem.taps)};
  strides_of_mask(problem.mask, finish.mask_strides);
  launch("finish_weight_grad", &finish_weight_grad<T>, {outputs * divide_up(plan.depth, kThreads), dim3(kThreads)},
         stream, finish);
}

}  // namespace cpc::masked_conv::cuda
