// Plans a call and runs its kernels: which taps are summed, whether in pairs, how much workspace is needed, and in what
// order the kernels run; see plan.h.
#include "masked_conv/plan.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/require.h"
#include "masked_conv/terms.h"

namespace cpc::masked_conv {
namespace {

// With fewer pixels, pairs do not make up for the extra additions of packing the weights.
constexpr int64_t kPairsPixels = 256;
// With fewer channels, they do not make up for the additions of pixels.
constexpr int64_t kPairsChannels = 32;

// Whether to compute neighbouring pixels in pairs. Only where floats are multiplied, so that double sums are exactly as
// documented and sums of pixels are not rounded to bfloat16; only if one mask serves all channels, so that a hidden
// weight does not come back as a rounding error; and only if it is faster.
bool in_pairs(const TensorView& weight, const TensorView& mask, const TensorView& images, int64_t dilation,
              Where where) {
  return where == Where::host && mask.ndim == 2 && pairs_pay(weight, images, dilation);
}

// ORs the filters of a dense mask together, eight at a time: eight filters are `taps` words of 8 bytes.
void see_dense(const char* filters, int64_t count, std::vector<char>& seen) {
  const auto taps = static_cast<int64_t>(seen.size());
  std::vector<uint64_t> words(taps);
  for (; count >= 8; count -= 8, filters += 8 * taps)
    for (int64_t w = 0; w < taps; ++w) {
      uint64_t word;
      std::memcpy(&word, filters + 8 * w, sizeof(word));
      words[w] |= word;
    }
  const auto* const bytes = reinterpret_cast<const char*>(words.data());
  for (int64_t i = 0; i < 8 * taps; ++i) seen[i % taps] |= bytes[i];
  for (int64_t i = 0; i < count * taps; ++i) seen[i % taps] |= filters[i];
}

// For each tap, whether some channel sees it.
std::vector<char> seen_taps(const TensorView& mask) {
  const int outer = mask.ndim - 2;
  const int64_t kh = mask.shape[outer], kw = mask.shape[outer + 1];
  const int64_t row = mask.strides[outer], col = mask.strides[outer + 1];
  std::vector<char> seen(kh * kw);
  if (outer == 2 && is_dense(mask, {0, 1, 2, 3})) {
    see_dense(mask.as<const char>(), mask.shape[0] * mask.shape[1], seen);
    return seen;
  }
  const int64_t outputs = outer ? mask.shape[0] : 1, inputs = outer ? mask.shape[1] : 1;
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t c = 0; c < inputs; ++c) {
      const auto* const filter = mask.as<const char>() + (outer ? o * mask.strides[0] + c * mask.strides[1] : 0);
      for (int64_t i = 0; i < kh; ++i)
        for (int64_t j = 0; j < kw; ++j) seen[i * kw + j] |= filter[i * row + j * col];
    }
  return seen;
}

std::vector<int64_t> all_taps(const TensorView& mask) {
  std::vector<int64_t> taps(mask.shape[mask.ndim - 2] * mask.shape[mask.ndim - 1]);
  std::iota(taps.begin(), taps.end(), int64_t{0});
  return taps;
}

template <class Problem>
Plan plan_of(const Problem& problem, const TensorView& images, Where where, bool negated) {
  const int64_t* const kernel = problem.weight.shape;
  const auto taps = [&](const std::vector<int64_t>& visible) {
    return taps_of(visible, kernel[2], kernel[3], problem.dilation, negated, images.shape[2], images.shape[3]);
  };
  // If the host cannot read the mask, all taps are summed; the device then zeroes the weights that the mask hides.
  const auto seen = [&] { return readable(where) ? visible_taps(problem.mask) : all_taps(problem.mask); };
  return {.taps = taps(problem.visible ? *problem.visible : seen()),
          .pairs = in_pairs(problem.weight, problem.mask, images, problem.dilation, where)};
}

PackedWeight packed_weight(const TensorView& weight, bool transposed, bool gated) {
  return {weight.shape[transposed ? 1 : 0], weight.shape[transposed ? 0 : 1], weight.dtype, gated};
}

WeightGrad weight_grad_of(const LayerGrad& problem, const TensorView& grad, const TensorView& workspace,
                          const Plan& plan) {
  return {.input = problem.input,
          .grad = grad,
          .mask = problem.mask,
          .weight_grad = problem.grad_weight,
          .workspace = workspace,
          .bias_grad = {},
          .bias_parts = {},
          .taps = plan.taps,
          .tf32 = problem.tf32,
          .pairs = plan.pairs};
}

// The gradient of the convolution's sums, before the activation.
const TensorView& grad_before_activation(const LayerGrad& problem) {
  return problem.activation == Activation::none ? problem.grad : problem.grad_preactivation;
}

// Bytes that the partial sums of the bias gradient take at the beginning of the workspace.
int64_t bias_parts_bytes([[maybe_unused]] const LayerGrad& problem, [[maybe_unused]] Where where) {
#if defined(CPC_WITH_CUDA)
  if (where == Where::cuda && problem.grad_bias.ndim != 0) {
    constexpr int64_t kAligned = 64;
    const DType sums = problem.weight.dtype == DType::f64 ? DType::f64 : DType::f32;
    const int64_t bytes = cuda::kBiasParts * problem.weight.shape[0] * size_of(sums);
    return (bytes + kAligned - 1) / kAligned * kAligned;
  }
#endif
  return 0;
}

// The kernels of a device.
struct OnHost {
  static constexpr Where kWhere = Where::host;
  static bool reads_in_place(const Layer&) { return false; }
  static bool reads_transposed(const LayerGrad&, const TensorView&) { return false; }
  static constexpr auto pack = [](const Packing& problem) { cpu::pack(problem); };
  static constexpr auto convolve = [](const Convolution& problem) { cpu::convolve(problem); };
  static constexpr auto activation_grad = [](const ActivationGrad& problem) { cpu::activation_grad(problem); };
  static constexpr auto weight_grad = [](const WeightGrad& problem) { cpu::weight_grad(problem); };
};
#if defined(CPC_WITH_CUDA)
struct OnCuda {
  static constexpr Where kWhere = Where::cuda;
  void* stream;
  static bool reads_in_place(const Layer& problem) {
    return cuda::reads_in_place(problem.weight, problem.mask, problem.dilation);
  }
  static bool reads_transposed(const LayerGrad& problem, const TensorView& grad) {
    return cuda::reads_transposed(problem.weight, problem.mask, problem.dilation, grad);
  }
  void pack(const Packing& problem) const { cuda::pack(problem, stream); }
  void convolve(const Convolution& problem) const { cuda::convolve(problem, stream); }
  void activation_grad(const ActivationGrad& problem) const { cuda::activation_grad(problem, stream); }
  void weight_grad(const WeightGrad& problem) const { cuda::weight_grad(problem, stream); }
};
#endif

template <class Device>
void run(const Layer& problem, const Device& on) {
  const Plan plan = masked_conv::plan(problem, Device::kWhere);
  const bool in_place = Device::reads_in_place(problem);
  if (!in_place)
    on.pack({.weight = problem.weight,
             .mask = problem.mask,
             .packed = problem.workspace,
             .taps = plan.taps,
             .gated = problem.activation == Activation::gated,
             .pairs = plan.pairs});
  on.convolve({.input = problem.input,
               .packed = in_place ? TensorView{} : problem.workspace,
               .weight = problem.weight,
               .mask = problem.mask,
               .bias = problem.bias,
               .condition = problem.condition,
               .position = {},
               .positive = {},
               .output = problem.output,
               .preactivation = problem.preactivation,
               .taps = plan.taps,
               .activation = problem.activation,
               .outputs = problem.weight.shape[0],
               .tf32 = problem.tf32,
               .pairs = plan.pairs});
}

// The kernels run one after another on one stream, so each may use all of the workspace after the partial sums of the
// bias gradient. The last kernel adds these up.
template <class Device>
void run(const LayerGrad& problem, const Device& on) {
  TensorView workspace = problem.workspace;
  workspace.data = static_cast<char*>(workspace.data) + bias_parts_bytes(problem, Device::kWhere);
  if (problem.activation != Activation::none || problem.grad_bias.ndim != 0)
    on.activation_grad({.grad = problem.grad,
                        .saved = problem.saved,
                        .result = problem.grad_preactivation,
                        .bias_grad = problem.grad_bias,
                        .workspace = problem.workspace,
                        .parts_only = problem.grad_weight.ndim != 0,
                        .activation = problem.activation});
  const TensorView& grad = grad_before_activation(problem);
  if (problem.grad_input.ndim != 0) {
    const Plan plan = masked_conv::plan(problem, Device::kWhere, /*negated=*/true);
    const bool in_place = Device::reads_transposed(problem, grad);
    if (!in_place)
      on.pack({.weight = problem.weight,
               .mask = problem.mask,
               .packed = workspace,
               .taps = plan.taps,
               .transposed = true,
               .pairs = plan.pairs});
    on.convolve({.input = grad,
                 .packed = in_place ? TensorView{} : workspace,
                 .weight = problem.weight,
                 .mask = problem.mask,
                 .bias = {},
                 .condition = {},
                 .position = {},
                 .positive = {},
                 .output = problem.grad_input,
                 .preactivation = {},
                 .taps = plan.taps,
                 .outputs = problem.weight.shape[1],
                 .transposed = in_place,
                 .tf32 = problem.tf32,
                 .pairs = plan.pairs});
  }
  if (problem.grad_weight.ndim != 0) {
    WeightGrad last = weight_grad_of(problem, grad, workspace, masked_conv::plan(problem, Device::kWhere));
    last.bias_grad = problem.grad_bias;
    last.bias_parts = problem.workspace;
    on.weight_grad(last);
  }
}

}  // namespace

bool pairs_pay(const TensorView& weight, const TensorView& images, int64_t dilation) {
  return cpu::multiplies_floats(weight.dtype) && dilation == 1 && weight.shape[3] > 1 && images.shape[3] > 1 &&
         std::min(weight.shape[0], weight.shape[1]) >= kPairsChannels &&
         images.shape[0] * images.shape[2] * images.shape[3] >= kPairsPixels;
}

std::vector<int64_t> visible_taps(const TensorView& mask) {
  const std::vector<char> seen = seen_taps(mask);
  std::vector<int64_t> taps;
  for (size_t t = 0; t < seen.size(); ++t)
    if (seen[t]) taps.push_back(static_cast<int64_t>(t));
  return taps;
}

Plan plan(const Layer& problem, Where where) { return plan_of(problem, problem.input, where, false); }
Plan plan(const LayerGrad& problem, Where where, bool negated) {
  return plan_of(problem, problem.grad, where, negated);
}

int64_t packed_bytes(const PackedWeight& weight, const std::vector<Tap>& taps, bool pairs,
                     [[maybe_unused]] Where where) {
#if defined(CPC_WITH_CUDA)
  if (where == Where::cuda)
    return cuda::packed_bytes(weight.outputs, weight.inputs, static_cast<int64_t>(taps.size()), weight.dtype);
#endif
  const auto terms = static_cast<int64_t>(terms_of(taps, pairs).size());
  return cpu::packed_bytes(weight.outputs, weight.inputs, terms, weight.dtype, weight.gated);
}

int64_t workspace_bytes(const Layer& problem, Where where) {
#if defined(CPC_WITH_CUDA)
  if (where == Where::cuda && OnCuda::reads_in_place(problem)) return 0;
#endif
  const Plan plan = masked_conv::plan(problem, where);
  return packed_bytes(packed_weight(problem.weight, false, problem.activation == Activation::gated), plan.taps,
                      plan.pairs, where);
}

int64_t workspace_bytes(const LayerGrad& problem, Where where) {
  const Plan plan = masked_conv::plan(problem, where);
  int64_t bytes = 0;
  if (problem.grad_input.ndim != 0)
    bytes = packed_bytes(packed_weight(problem.weight, true, false), plan.taps, plan.pairs, where);
#if defined(CPC_WITH_CUDA)
  if (where == Where::cuda && problem.grad_weight.ndim != 0) {
    const WeightGrad weight_grad = weight_grad_of(problem, grad_before_activation(problem), problem.workspace, plan);
    bytes = std::max(bytes, cuda::weight_grad_workspace(weight_grad));
  }
#endif
  return bias_parts_bytes(problem, where) + bytes;
}

int64_t workspace_bytes(const PixelPacking& problem, Where where) {
  return packed_bytes(packed_weight(problem.weight, false, problem.gated), problem.taps, false, where);
}

void cpu::layer(const Layer& problem) { run(problem, OnHost{}); }
void cpu::layer_grad(const LayerGrad& problem) { run(problem, OnHost{}); }
#if defined(CPC_WITH_CUDA)
void cuda::layer(const Layer& problem, void* stream) { run(problem, OnCuda{stream}); }
void cuda::layer_grad(const LayerGrad& problem, void* stream) { run(problem, OnCuda{stream}); }
#endif

}  // namespace cpc::masked_conv
