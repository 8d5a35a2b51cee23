// The weight gradient: for each tap, the product of what pixels see through it and the output gradient, summed over all
// pixels. It is one matrix product, outputs x (taps x channels), whose depth is the pixels. The depth is split into
// parts, which are entries of a batched product; a second kernel adds up their sums in order, so that results do not
// vary.
#pragma once

#include <algorithm>

#include "core/cuda/product_epilogues.cuh"
#include "masked_conv/activation_grad.cuh"
#include "masked_conv/visible_taps.cuh"

namespace cpc::masked_conv::cuda {

// How the weight gradient is split into tiles of outputs x (taps x channels) and parts of the pixels, so that there are
// enough blocks for a large GPU. The plan does not depend on the GPU, and so neither do results.
struct GradPlan {
  enum class Tile : uint8_t { low, square, fifth };

  bool whole_chunks;
  Tile tile;
  int depth;  // Taps x channels.
  int64_t pixels, parts, pixels_of_part;

  explicit GradPlan(const WeightGrad& problem) {
    require_image_size(problem.batch(), problem.height(), problem.width());
    depth = depth_of(static_cast<int64_t>(problem.taps.size()), problem.channels());
    whole_chunks = problem.input.dtype != DType::f64 && has_whole_chunks(problem.input, problem.channels()) &&
                   has_whole_chunks(problem.grad, problem.outputs());
    pixels = problem.batch() * problem.height() * problem.width();
    const bool is_double = problem.input.dtype == DType::f64;
    const int64_t outputs = problem.outputs();
    const auto rounded = [](int64_t n, int64_t to) { return static_cast<double>(divide_up(n, to) * to); };
    const double low = rounded(outputs, LowTile::kRows) * rounded(depth, LowTile::kColumns) * kLowCost;
    const double square = rounded(outputs, SquareTile::kRows) * rounded(depth, SquareTile::kColumns);
    const double fifth = rounded(outputs, FifthTile::kColumns) * rounded(depth, FifthTile::kRows);
    tile = !whole_chunks || square >= low ? Tile::low : Tile::square;
    // FifthTile, which has outputs as columns, is only for 16-bit values.
    if (whole_chunks && size_of(problem.input.dtype) == 2 && pixels <= kMaxCount && fifth < std::min(low, square))
      tile = Tile::fifth;
    static_assert(DoubleTile::kRows == LowTile::kRows && LowTile::kColumns == SquareTile::kColumns);
    const int64_t columns = is_double ? DoubleTile::kColumns : SquareTile::kColumns;
    const int64_t tiles =
        tile == Tile::fifth
            ? divide_up(outputs, FifthTile::kColumns) * divide_up(depth, FifthTile::kRows)
            : divide_up(outputs, tile == Tile::low ? LowTile::kRows : SquareTile::kRows) * divide_up(depth, columns);
    constexpr int64_t kBlocks = 264, kLeastPixels = 128;
    parts = std::clamp<int64_t>(kBlocks / std::max<int64_t>(tiles, 1), 1, std::max<int64_t>(pixels / kLeastPixels, 1));
    parts = std::max(parts, divide_up(pixels, kMaxCount));
    // Whole slices, so that no part but the last begins or ends with zeros.
    pixels_of_part = std::max<int64_t>(divide_up(divide_up(pixels, parts), kLeastPixels), 1) * kLeastPixels;
    parts = std::max<int64_t>(divide_up(pixels, pixels_of_part), 1);
  }
};

template <class T>
BiasSums<T> bias_sums_of(const WeightGrad& problem) {
  const bool wanted = problem.bias_grad.data != nullptr;
  return {wanted ? problem.bias_parts.as<SumOf<T>>() : nullptr, problem.outputs(), problem.bias_grad.as<T>()};
}

// The neighbouring channels of a tap that a thread takes if their number is a multiple of four: 16 bytes of float sums.
// Otherwise it takes one.
constexpr int kRun = 4;

template <class T>
struct FinishArguments {
  const SumOf<T>* sums;
  TensorView weight_grad;
  const bool* mask;
  int64_t mask_strides[4];
  int64_t parts, outputs;
  int channels, depth, kernel_width;
  // If true, all taps of the kernel are written, and indices.at[] has each one's place among those that were summed, or
  // -1. If false, because there are too many, indices.at[] has the indices of the summed taps, and the others have been
  // zeroed before.
  bool all_taps;
  int taps;
  int run;  // Channels that a thread takes.
  FastDivide by_runs;
  BiasSums<T> bias;
  TapIndices indices;

  __host__ __device__ int64_t blocks_of_output() const { return divide_up(taps * (channels / run), kThreads); }
};

// Adds up the parts in order to the weight gradient, which is zero where the mask hides the weight. The first blocks
// add up the parts of the bias gradient.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_weight_grad(const __grid_constant__ FinishArguments<T> a) {
  const int64_t across = a.blocks_of_output(), of_bias = a.bias.blocks();
  for (int64_t block = blockIdx.x; block < of_bias + a.outputs * across; block += gridDim.x) {
    if (block < of_bias) {
      a.bias.sum(block);
      continue;
    }
    const int64_t output = (block - of_bias) / across;
    const auto item = static_cast<uint32_t>(block - of_bias - output * across) * kThreads + threadIdx.x;
    uint32_t run;
    const auto slot = static_cast<int>(a.by_runs(item, run));
    if (slot >= a.taps) continue;
    const int index = a.all_taps ? slot : a.indices.at[slot], tap = a.all_taps ? a.indices.at[slot] : slot;
    const int row = index / a.kernel_width, col = index - row * a.kernel_width;
    const int channel = static_cast<int>(run) * a.run;
    const auto at = [&](const int64_t* strides) {
      return output * strides[0] + channel * strides[1] + row * strides[2] + col * strides[3];
    };
    SumOf<T> total[kRun] = {};
    if (tap >= 0) {
      const bool* const mask = a.mask + at(a.mask_strides);
      bool visible[kRun] = {*mask};
#pragma unroll
      for (int k = 1; k < kRun; ++k)
        visible[k] = a.mask_strides[1] == 0 || k >= a.run ? visible[0] : mask[k * a.mask_strides[1]];
      const SumOf<T>* const sums = a.sums + output * a.depth + tap * a.channels + channel;
      const int64_t values = a.outputs * a.depth;
      if (a.run == 1) {
        if (visible[0])
#pragma unroll 4
          for (int64_t part = 0; part < a.parts; ++part) total[0] += sums[part * values];
      } else if (visible[0] || visible[1] || visible[2] || visible[3]) {
#pragma unroll 4
        for (int64_t part = 0; part < a.parts; ++part) {
          const auto of_part = pack_at<kRun>(sums + part * values);
#pragma unroll
          for (int k = 0; k < kRun; ++k) total[k] += of_part.v[k];
        }
      }
#pragma unroll
      for (int k = 0; k < kRun; ++k)
        if (!visible[k]) total[k] = 0;
    }
    T* const to = a.weight_grad.template as<T>() + at(a.weight_grad.strides);
    const int64_t stride = a.weight_grad.strides[1];
    if (stride == 1) {
      store_run(to, total, a.run);
    } else {
#pragma unroll
      for (int k = 0; k < kRun; ++k)
        if (k < a.run) to[k * stride] = Narrow<T>::from(total[k]);
    }
  }
}

// Launches finish_weight_grad, and zeroes the taps that it does not write.
template <class T>
void launch_finish(const WeightGrad& problem, const GradPlan& plan, const BiasSums<T>& bias, void* stream) {
  const TensorView& result = problem.weight_grad;
  const int width = kernel_width_of(result);
  const int64_t in_kernel = result.shape[2] * width, channels = problem.channels();
  const int run = channels % kRun == 0 ? kRun : 1;
  const bool all_taps = in_kernel <= std::min(kMaxTaps, kMaxCount / channels);
  TapIndices indices = indices_of(problem.taps);
  if (all_taps) {
    std::fill_n(indices.at, in_kernel, -1);
    for (size_t i = 0; i < problem.taps.size(); ++i) indices.at[problem.taps[i].index] = static_cast<int32_t>(i);
  } else {
    fill_with_zeros(result.data, result.numel() * size_of(result.dtype), stream);  // Dense memory needs no order.
  }
  FinishArguments<T> finish{.sums = problem.workspace.as<SumOf<T>>(),
                            .weight_grad = result,
                            .mask = problem.mask.as<bool>(),
                            .mask_strides = {},
                            .parts = plan.parts,
                            .outputs = problem.outputs(),
                            .channels = static_cast<int>(channels),
                            .depth = plan.depth,
                            .kernel_width = width,
                            .all_taps = all_taps,
                            .taps = static_cast<int>(all_taps ? in_kernel : problem.taps.size()),
                            .run = run,
                            .by_runs = FastDivide(static_cast<uint32_t>(channels / run)),
                            .bias = bias,
                            .indices = indices};
  strides_of_mask(problem.mask, finish.mask_strides);
  launch("finish_weight_grad", &finish_weight_grad<T>,
         {bias.blocks() + finish.outputs * finish.blocks_of_output(), dim3(kThreads)}, stream, finish);
}

template <class T, bool kWholeChunks, class TapsOf>
TapColumns<T, kWholeChunks, TapsOf> tap_columns(const WeightGrad& problem, const GradPlan& plan, const TensorView& view,
                                                int64_t count, const TapsOf& taps) {
  return {view.as<T>(),
          count,
          plan.pixels,
          plan.pixels_of_part,
          static_cast<int>(problem.height()),
          static_cast<int>(problem.width()),
          static_cast<int>(view.shape[1]),
          FastDivide(static_cast<uint32_t>(problem.width())),
          FastDivide(static_cast<uint32_t>(problem.height())),
          taps};
}

template <class T>
WholeDepth depth_of_part(const GradPlan& plan) {
  return WholeDepth(slices_of<T>(std::min(plan.pixels, plan.pixels_of_part)));
}

template <class Math, class Tile, bool kWholeChunks>
void launch_sums(const WeightGrad& problem, const GradPlan& plan, void* stream) {
  using T = typename Math::Value;
  using Sum = typename Math::Sum;
  const int64_t outputs = problem.outputs();
  launch_product<Math, Tile>(
      "sum_weight_grad", tap_columns<T, kWholeChunks>(problem, plan, problem.grad, outputs, PixelItself{}),
      tap_columns<T, kWholeChunks>(problem, plan, problem.input, plan.depth, offsets_of(problem.taps)),
      depth_of_part<T>(plan),
      StoreRows<Sum>{problem.workspace.as<Sum>(), plan.depth, outputs, plan.depth, outputs * plan.depth}, plan.parts,
      stream);
}

// The same with FifthTile, which has outputs as columns.
template <class Math>
void launch_fifth_sums(const WeightGrad& problem, const GradPlan& plan, void* stream) {
  using T = typename Math::Value;
  using Sum = typename Math::Sum;
  const int64_t outputs = problem.outputs();
  const DepthParts parts{static_cast<int>(plan.parts), static_cast<int>(plan.pixels_of_part)};
  launch_product<Math, FifthTile>(
      "sum_weight_grad", tap_columns<T, true>(problem, plan, problem.input, plan.depth, offsets_of(problem.taps)),
      Columns<T>{problem.grad.as<T>(), outputs, outputs, static_cast<int>(plan.pixels), 0, parts},
      depth_of_part<T>(plan),
      StoreColumns<Sum>{problem.workspace.as<Sum>(), plan.depth, plan.depth, outputs, outputs * plan.depth}, plan.parts,
      stream);
}

template <class Math>
void launch_weight_grad(const WeightGrad& problem, const GradPlan& plan, void* stream) {
  using T = typename Math::Value;
  const BiasSums<T> bias = bias_sums_of<T>(problem);
  if (problem.taps.empty() || problem.channels() == 0) {
    fill_with_zeros(problem.weight_grad.data, problem.weight_grad.numel() * int64_t{sizeof(T)}, stream);
    return launch_bias_sums(bias, stream);
  }
  if constexpr (std::is_same_v<T, double>) {
    launch_sums<Math, DoubleTile, false>(problem, plan, stream);
  } else if (!plan.whole_chunks) {
    launch_sums<Math, LowTile, false>(problem, plan, stream);
  } else if (plan.tile == GradPlan::Tile::low) {
    launch_sums<Math, LowTile, true>(problem, plan, stream);
  } else if (plan.tile == GradPlan::Tile::square) {
    launch_sums<Math, SquareTile, true>(problem, plan, stream);
  } else {
    if constexpr (sizeof(T) == 2) launch_fifth_sums<Math>(problem, plan, stream);
  }
  launch_finish<T>(problem, plan, bias, stream);
}

}  // namespace cpc::masked_conv::cuda
