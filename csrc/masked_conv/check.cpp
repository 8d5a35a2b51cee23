// Checks beyond the field tables of masked_conv.h: of taps, channels of results, and positions.
#include <string>

#include "core/require.h"
#include "masked_conv/masked_conv.h"
#include "masked_conv/plan.h"

namespace cpc::masked_conv {
namespace {

// The largest kernel side and dilation: the product of two such numbers stays far below 64 bits.
constexpr int64_t kMostPixels = int64_t{1} << 28;

void set_results(Sizes& sizes, int64_t outputs, Activation activation) {
  const bool gated = activation == Activation::gated;
  require(!gated || outputs % 2 == 0, "gated outputs must be even in number");
  sizes.set("R", gated ? outputs / 2 : outputs);
}

void require_weights(const TensorView& weight) {
  require(weight.numel() > 0, "weight must not be empty, got " + shape_of(weight));
}

}  // namespace

std::vector<Tap> taps_of(const std::vector<int64_t>& indices, int64_t kh, int64_t kw, int64_t dilation, bool negated,
                         int64_t height, int64_t width) {
  require(dilation >= 1 && dilation <= kMostPixels,
          "dilation must be in 1.." + std::to_string(kMostPixels) + ", got " + std::to_string(dilation));
  require(kh >= 0 && kh <= kMostPixels && kw >= 0 && kw <= kMostPixels,
          "the kernel's sides must be in 0.." + std::to_string(kMostPixels) + ", got " + std::to_string(kh) + "x" +
              std::to_string(kw));
  std::vector<Tap> taps;
  taps.reserve(indices.size());
  for (const int64_t index : indices) {
    require(index >= 0 && index < kh * kw,
            "taps must be in 0.." + std::to_string(kh * kw - 1) + ", got " + std::to_string(index));
    const auto offset = [&](int64_t i, int64_t k) {
      const int64_t ahead = i * dilation - dilation * (k - 1) / 2;
      return negated ? -ahead : ahead;
    };
    const Tap tap{index, offset(index / kw, kh), offset(index % kw, kw)};
    if (std::abs(tap.dy) < height && std::abs(tap.dx) < width) taps.push_back(tap);
  }
  return taps;
}

void complete(Layer& problem, Sizes& sizes) { set_results(sizes, problem.weight.shape[0], problem.activation); }

void complete_grad(LayerGrad& problem, Sizes& sizes) {
  set_results(sizes, problem.weight.shape[0], problem.activation);
}

void complete_packing(PixelPacking& problem, Sizes&) {
  const int64_t* const shape = problem.weight.shape;
  problem.taps = taps_of(problem.visible, shape[2], shape[3], problem.dilation, false, problem.height, problem.width);
}

void complete_pixel(PixelConvolution& problem, Sizes& sizes) {
  require(problem.outputs > 0 && problem.outputs <= kMostPixels,
          "outputs must be in 1.." + std::to_string(kMostPixels) + ", got " + std::to_string(problem.outputs));
  require(problem.inputs() > 0, "input must have channels, got " + shape_of(problem.input));
  sizes.set("O", problem.outputs);
  set_results(sizes, problem.outputs, problem.activation);
  problem.taps = taps_of(problem.visible, problem.kernel_height, problem.kernel_width, problem.dilation, false,
                         problem.height(), problem.width());
}

void check(const Layer& problem, Where) {
  require_weights(problem.weight);
  if (problem.visible) plan(problem, Where::cuda);  // Throws for taps outside the kernel.
}

void check(const LayerGrad& problem, Where) {
  require_weights(problem.weight);
  require(problem.activation == Activation::none || (problem.saved.ndim != 0 && problem.grad_preactivation.ndim != 0),
          "the gradient of an activation needs saved and grad_preactivation");
  require(problem.grad_weight.ndim == 0 || problem.input.ndim != 0, "the gradient in the weight needs the input");
  if (problem.visible) plan(problem, Where::cuda, Wanted::weight_grad);
}

void check(const PixelPacking& problem, Where) {
  require_weights(problem.weight);
  require(!problem.gated || problem.outputs() % 2 == 0, "gated outputs must be even in number");
}

void check(const PixelConvolution& problem, Where where) {
  const TensorView& position = problem.position;
  FieldCheck::workspace(
      "packed", problem.packed,
      packed_bytes({problem.outputs, problem.inputs(), problem.input.dtype, problem.activation == Activation::gated},
                   problem.taps, Filtering::direct, where));
  if (position.ndim == 0 || where != Where::host) return;
  const auto* at = position.as<int64_t>();
  require(at[0] >= 0 && at[0] < problem.height() && at[1] >= 0 && at[1] < problem.width(),
          "position must lie in the input of " + std::to_string(problem.height()) + "x" +
              std::to_string(problem.width()) + ", got (" + std::to_string(at[0]) + ", " + std::to_string(at[1]) + ")");
}

}  // namespace cpc::masked_conv
