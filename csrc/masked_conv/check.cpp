// Checks masked convolutions against the contract in masked_conv.h before a kernel touches memory, and places taps.
#include <string>

#include "core/require.h"
#include "masked_conv/masked_conv.h"

namespace cpc::masked_conv {
namespace {

void require_type(const char* name, const TensorView& view, DType dtype) {
  require(view.dtype == dtype, std::string(name) + " must have the type of the other tensors");
}

// The longest side of a kernel and distance of its taps: products of two stay far from 64 bits.
constexpr int64_t kMostPixels = int64_t{1} << 28;

// [B, C, H, W] with the channels innermost and nothing between.
void require_channels_last(const char* name, const TensorView& view) {
  require(view.ndim == 4, std::string(name) + " must be [B, C, H, W], got " + shape_of(view));
  require(is_floating(view.dtype), std::string(name) + " must be floating");
  require(is_dense(view, {0, 2, 3, 1}) || view.numel() == 0, std::string(name) + " must be dense, channels innermost");
}

void require_mask(const TensorView& mask, const TensorView& weight) {
  require(mask.dtype == DType::boolean, "mask must be bool");
  if (mask.ndim == 2)
    require_shape("mask", mask, {weight.shape[2], weight.shape[3]});
  else
    require_shape("mask", mask, {weight.shape[0], weight.shape[1], weight.shape[2], weight.shape[3]});
}

void require_packed(const TensorView& packed, int64_t bytes) {
  require(packed.dtype == DType::u8 && is_dense(packed, {0}) && reinterpret_cast<uintptr_t>(packed.data) % 64 == 0,
          "packed must be dense uint8, aligned to 64 bytes");
  require_shape("packed", packed, {bytes});
}

}  // namespace

std::vector<Tap> taps_of(const std::vector<int64_t>& indices, int64_t kh, int64_t kw, int64_t dilation, bool negated) {
  require(dilation >= 1 && dilation <= kMostPixels,
          "dilation must be in 1.." + std::to_string(kMostPixels) + ", got " + std::to_string(dilation));
  require(kh >= 0 && kh <= kMostPixels && kw >= 0 && kw <= kMostPixels,
          "the kernel's sides must be in 0.." + std::to_string(kMostPixels) + ", got " + std::to_string(kh) + "x" +
              std::to_string(kw));
  std::vector<Tap> taps;
  for (const int64_t index : indices) {
    require(index >= 0 && index < kh * kw,
            "taps must be in 0.." + std::to_string(kh * kw - 1) + ", got " + std::to_string(index));
    const auto offset = [&](int64_t i, int64_t k) {
      const int64_t ahead = i * dilation - dilation * (k - 1) / 2;
      return negated ? -ahead : ahead;
    };
    taps.push_back({index, offset(index / kw, kh), offset(index % kw, kw)});
  }
  return taps;
}

void check(const Packing& problem, int64_t packed_bytes) {
  const TensorView& weight = problem.weight;
  require(weight.ndim == 4 && weight.numel() > 0, "weight must be [O, C, kh, kw], got " + shape_of(weight));
  require(is_floating(weight.dtype), "weight must be floating");
  require_mask(problem.mask, weight);
  require(!problem.gated || problem.outputs() % 2 == 0, "gated outputs must be even in number");
  require(!problem.pairs || (weight.dtype == DType::f32 && problem.mask.ndim == 2),
          "pairs of pixels are computed in float, with one mask for all channels");
  require_packed(problem.packed, packed_bytes);
}

void check(const Convolution& problem, int64_t packed_bytes, bool position_on_host) {
  const TensorView& input = problem.input;
  require_channels_last("input", input);
  require(problem.outputs > 0 && problem.outputs <= kMostPixels,
          "outputs must be in 1.." + std::to_string(kMostPixels) + ", got " + std::to_string(problem.outputs));
  require_packed(problem.packed, packed_bytes);
  const int64_t batch = problem.batch(), height = problem.height(), width = problem.width(), n = problem.outputs;
  const bool gated = problem.activation == Activation::gated;
  require(!problem.pairs || (input.dtype == DType::f32 && problem.position.ndim == 0),
          "pairs of pixels are computed in float, of whole images");
  require(!gated || n % 2 == 0, "gated outputs must be even in number");
  if (problem.bias.ndim != 0) {
    require_shape("bias", problem.bias, {n});
    require_type("bias", problem.bias, input.dtype);
    require(is_dense(problem.bias, {0}), "bias must be dense");
  }
  if (problem.condition.ndim != 0) {
    require_shape("condition", problem.condition, {batch, n, height, width});
    require_type("condition", problem.condition, input.dtype);
  }
  if (problem.position.ndim != 0) {
    const TensorView& position = problem.position;
    require_shape("position", position, {2});
    require(position.dtype == DType::i64 && is_dense(position, {0}), "position must be dense int64");
    if (position_on_host) {
      const auto* at = position.as<int64_t>();
      require(at[0] >= 0 && at[0] < height && at[1] >= 0 && at[1] < width,
              "position must lie in the input of " + std::to_string(height) + "x" + std::to_string(width) + ", got (" +
                  std::to_string(at[0]) + ", " + std::to_string(at[1]) + ")");
    }
  }
  const auto require_result = [&](const char* name, const TensorView& view, int64_t channels) {
    require_shape(name, view, {batch, channels, height, width});
    require_type(name, view, input.dtype);
    require(view.strides[1] == 1 || channels == 1 || view.numel() == 0,
            std::string(name) + " must have its channels innermost");
  };
  require_result("output", problem.output, gated ? n / 2 : n);
  if (problem.preactivation.ndim != 0) require_result("preactivation", problem.preactivation, n);
}

void check(const ActivationGrad& problem) {
  require_channels_last("grad", problem.grad);
  const TensorView& grad = problem.grad;
  const int64_t n = problem.outputs();
  if (problem.activation != Activation::none) {
    require_channels_last("saved", problem.saved);
    require_shape("saved", problem.saved, {grad.shape[0], n, grad.shape[2], grad.shape[3]});
    require_type("saved", problem.saved, grad.dtype);
    require_channels_last("result", problem.result);
    require_shape("result", problem.result, {grad.shape[0], n, grad.shape[2], grad.shape[3]});
    require_type("result", problem.result, grad.dtype);
  }
  if (problem.bias_grad.ndim != 0) {
    require_shape("bias_grad", problem.bias_grad, {n});
    require_type("bias_grad", problem.bias_grad, grad.dtype);
    require(is_dense(problem.bias_grad, {0}), "bias_grad must be dense");
  }
  if (problem.bias_grad.ndim != 0 && problem.workspace.ndim != 0) {
    require_shape("workspace", problem.workspace, {cuda::kBiasParts, n});
    require(problem.workspace.dtype == (grad.dtype == DType::f64 ? DType::f64 : DType::f32),
            "workspace must have the computing type");
    require(is_dense(problem.workspace, {0, 1}) || n == 0, "workspace must be dense");
  }
}

void check(const WeightGrad& problem) {
  require_channels_last("input", problem.input);
  require_channels_last("grad", problem.grad);
  require_type("grad", problem.grad, problem.input.dtype);
  require_shape("grad", problem.grad, {problem.batch(), problem.outputs(), problem.height(), problem.width()});
  const TensorView& weight_grad = problem.weight_grad;
  require(weight_grad.ndim == 4, "weight_grad must be [O, C, kh, kw], got " + shape_of(weight_grad));
  require_shape("weight_grad", weight_grad,
                {problem.outputs(), problem.channels(), weight_grad.shape[2], weight_grad.shape[3]});
  require_type("weight_grad", weight_grad, problem.input.dtype);
  require_mask(problem.mask, weight_grad);
  require(!problem.pairs || (weight_grad.dtype == DType::f32 && problem.mask.ndim == 2),
          "pairs of pixels are computed in float, with one mask for all channels");
}

}  // namespace cpc::masked_conv
