// Plans a call and runs its kernels: which taps are summed, with which filtering, how much workspace is needed, and in
// what order the kernels run; see plan.h.
#include "masked_conv/plan.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "core/require.h"
#include "masked_conv/terms.h"

namespace cpc::masked_conv {
namespace {

// With fewer pixels, pairs and quads do not make up for the extra additions of packing the weights.
constexpr int64_t kPairsPixels = 256, kQuadsPixels = 1024;
// With fewer channels, they do not make up for the additions of pixels.
constexpr int64_t kPairsChannels = 32;
// With more channels, the values of quads and the weights of their sums exceed the caches.
constexpr int64_t kQuadsChannels = 384;
// Quads must take at most this part of the products of pairs to make up for their additions: of pixels, and of the
// gradient of the weight, for which the output's gradient is filtered, too.
constexpr double kQuadsProducts = 0.85, kQuadsGradProducts = 0.75;

// The products that one channel of an image takes. A pixel's products are skipped where all that they read lies outside
// of the image.
int64_t count_products(const std::vector<Term>& terms, Filtering filtering, int64_t height, int64_t width) {
  const int64_t down = filtering == Filtering::quads ? 2 : 1, across = 2;
  const auto reached = [](const Reading& reading, int64_t step, bool last_only, int64_t size) {
    int64_t count = 0;
    for (int64_t at = 0; at < size; at += step) {
      const auto inside = [&](int64_t offset) { return at + offset >= 0 && at + offset < size; };
      if (last_only && at + 1 == size) continue;
      count += inside(reading.at) || (reading.sign != 0 && inside(reading.other));
    }
    return count;
  };
  int64_t count = 0;
  for (const Term& term : terms)
    count += reached(term.rows, down, term.sum / kSums == kSums - 1, height) *
             reached(term.columns, across, term.sum % kSums == kSums - 1, width);
  return count;
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
Plan plan_of(const Problem& problem, const TensorView& images, Where where, Wanted wanted, bool negated) {
  const int64_t* const kernel = problem.weight.shape;
  const auto taps = [&](const std::vector<int64_t>& visible) {
    return taps_of(visible, kernel[2], kernel[3], problem.dilation, negated, images.shape[2], images.shape[3]);
  };
  // If the host cannot read the mask, all taps are summed; the device then zeroes the weights that the mask hides.
  const auto seen = [&] { return readable(where) ? visible_taps(problem.mask) : all_taps(problem.mask); };
  Plan plan{.taps = taps(problem.visible ? *problem.visible : seen())};
  // A hidden weight must not come back as a rounding error of others, as it could where masks differ between channels.
  if (where == Where::host && problem.mask.ndim == 2)
    plan.filtering = filtering_of(problem.weight, images, plan.taps, problem.dilation, wanted);
  return plan;
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
          .filtering = plan.filtering};
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
             .filtering = plan.filtering});
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
               .filtering = plan.filtering});
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
    const Plan plan = masked_conv::plan(problem, Device::kWhere, Wanted::pixels);
    const bool in_place = Device::reads_transposed(problem, grad);
    if (!in_place)
      on.pack({.weight = problem.weight,
               .mask = problem.mask,
               .packed = workspace,
               .taps = plan.taps,
               .transposed = true,
               .filtering = plan.filtering});
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
                 .filtering = plan.filtering});
  }
  if (problem.grad_weight.ndim != 0) {
    WeightGrad last =
        weight_grad_of(problem, grad, workspace, masked_conv::plan(problem, Device::kWhere, Wanted::weight_grad));
    last.bias_grad = problem.grad_bias;
    last.bias_parts = problem.workspace;
    on.weight_grad(last);
  }
}

}  // namespace

Filtering filtering_of(const TensorView& weight, const TensorView& images, const std::vector<Tap>& taps,
                       int64_t dilation, Wanted wanted) {
  // Double sums are exactly as documented, and sums of pixels are not rounded to bfloat16.
  const int64_t height = images.shape[2], width = images.shape[3], pixels = images.shape[0] * height * width;
  if (!cpu::multiplies_floats(weight.dtype) || dilation != 1 || weight.shape[3] == 1 || width == 1 ||
      std::min(weight.shape[0], weight.shape[1]) < kPairsChannels || pixels < kPairsPixels)
    return Filtering::direct;
  if (weight.shape[2] == 1 || height == 1 || pixels < kQuadsPixels ||
      std::max(weight.shape[0], weight.shape[1]) > kQuadsChannels)
    return Filtering::pairs;
  const auto products = [&](Filtering filtering) {
    return static_cast<double>(count_products(terms_of(taps, filtering).all, filtering, height, width));
  };
  const double most = (wanted == Wanted::pixels ? kQuadsProducts : kQuadsGradProducts) * products(Filtering::pairs);
  return products(Filtering::quads) <= most ? Filtering::quads : Filtering::pairs;
}

std::vector<int64_t> visible_taps(const TensorView& mask) {
  const std::vector<char> seen = seen_taps(mask);
  std::vector<int64_t> taps;
  for (size_t t = 0; t < seen.size(); ++t)
    if (seen[t]) taps.push_back(static_cast<int64_t>(t));
  return taps;
}

Plan plan(const Layer& problem, Where where) { return plan_of(problem, problem.input, where, Wanted::pixels, false); }
Plan plan(const LayerGrad& problem, Where where, Wanted wanted) {
  return plan_of(problem, problem.grad, where, wanted, /*negated=*/wanted == Wanted::pixels);
}

int64_t packed_bytes(const PackedWeight& weight, const std::vector<Tap>& taps, Filtering filtering,
                     [[maybe_unused]] Where where) {
#if defined(CPC_WITH_CUDA)
  if (where == Where::cuda)
    return cuda::packed_bytes(weight.outputs, weight.inputs, static_cast<int64_t>(taps.size()), weight.dtype);
#endif
  const auto terms = static_cast<int64_t>(terms_of(taps, filtering).all.size());
  return cpu::packed_bytes(weight.outputs, weight.inputs, terms, weight.dtype, weight.gated);
}

int64_t workspace_bytes(const Layer& problem, Where where) {
#if defined(CPC_WITH_CUDA)
  if (where == Where::cuda && OnCuda::reads_in_place(problem)) return 0;
#endif
  const Plan plan = masked_conv::plan(problem, where);
  return packed_bytes(packed_weight(problem.weight, false, problem.activation == Activation::gated), plan.taps,
                      plan.filtering, where);
}

int64_t workspace_bytes(const LayerGrad& problem, Where where) {
  int64_t bytes = 0;
  if (problem.grad_input.ndim != 0) {
    const Plan plan = masked_conv::plan(problem, where, Wanted::pixels);
    bytes = packed_bytes(packed_weight(problem.weight, true, false), plan.taps, plan.filtering, where);
  }
#if defined(CPC_WITH_CUDA)
  if (where == Where::cuda && problem.grad_weight.ndim != 0) {
    const Plan plan = masked_conv::plan(problem, where, Wanted::weight_grad);
    const WeightGrad weight_grad = weight_grad_of(problem, grad_before_activation(problem), problem.workspace, plan);
    bytes = std::max(bytes, cuda::weight_grad_workspace(weight_grad));
  }
#endif
  return bias_parts_bytes(problem, where) + bytes;
}

int64_t workspace_bytes(const PixelPacking& problem, Where where) {
  return packed_bytes(packed_weight(problem.weight, false, problem.gated), problem.taps, Filtering::direct, where);
}

void cpu::layer(const Layer& problem) { run(problem, OnHost{}); }
void cpu::layer_grad(const LayerGrad& problem) { run(problem, OnHost{}); }
#if defined(CPC_WITH_CUDA)
void cuda::layer(const Layer& problem, void* stream) { run(problem, OnCuda{stream}); }
void cuda::layer_grad(const LayerGrad& problem, void* stream) { run(problem, OnCuda{stream}); }
#endif

}  // namespace cpc::masked_conv
