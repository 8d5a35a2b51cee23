// Binds the masked convolution's kernels; see csrc/masked_conv/masked_conv.h.
#include "masked_conv/masked_conv.h"

#include "bindings/dispatch.h"
#include "bindings/ops.h"
#include "masked_conv/terms.h"

namespace cpc::bindings {
namespace {

using masked_conv::Activation;

Activation activation_of(const std::string& name) {
  if (name == "none") return Activation::none;
  if (name == "relu") return Activation::relu;
  if (name == "gated") return Activation::gated;
  throw std::invalid_argument("activation must be none, relu or gated, got " + name);
}

// Images with fewer pixels do not pay for the packing's additions.
constexpr int64_t kPairsPixels = 256;
// Nor do fewer channels for the pixels'.
constexpr int64_t kPairsChannels = 32;

// Whether to compute neighbouring pixels together (masked_conv/terms.h): of float, so that double stays what the sum
// says; where all channels see the same, so that what a mask hides does not come back as a rounding error; and where it
// is faster.
bool in_pairs(const TensorArg& weight, const TensorArg& mask, const TensorArg& output, int64_t dilation) {
  const TensorView &filter = weight.view, &images = output.view;
  if (filter.ndim != 4 || images.ndim != 4) throw std::invalid_argument("weight and output must have 4 dimensions");
  return !on_cuda(weight.device) && filter.dtype == DType::f32 && mask.view.ndim == 2 && dilation == 1 &&
         filter.shape[3] > 1 && images.shape[3] > 1 && std::min(filter.shape[0], filter.shape[1]) >= kPairsChannels &&
         images.shape[0] * images.shape[2] * images.shape[3] >= kPairsPixels;
}

void require_pairs(DLDevice device, int64_t dilation) {
  if (on_cuda(device)) throw std::invalid_argument("pairs of pixels are computed on the CPU");
  if (dilation != 1) throw std::invalid_argument("pairs of pixels need a dilation of 1");
}

int64_t packed_bytes(DLDevice device, int64_t outputs, int64_t inputs, const std::vector<masked_conv::Tap>& taps,
                     DType dtype, bool gated, bool pairs) {
  if (pairs) require_pairs(device, 1);
#if defined(CPC_WITH_CUDA)
  if (on_cuda(device))
    return on_device_of(device, [&] {
      return masked_conv::cuda::packed_bytes(outputs, inputs, static_cast<int64_t>(taps.size()), dtype, gated);
    });
#endif
  const auto terms = static_cast<int64_t>(masked_conv::terms_of(taps, pairs).size());
  return masked_conv::cpu::packed_bytes(outputs, inputs, terms, dtype, gated);
}

int64_t packed_bytes_of(const TensorArg& weight, const std::vector<int64_t>& taps, bool transposed, bool gated,
                        bool pairs) {
  if (weight.view.ndim != 4) throw std::invalid_argument("weight must be [O, C, kh, kw]");
  const int64_t* shape = weight.view.shape;
  return packed_bytes(weight.device, shape[transposed ? 1 : 0], shape[transposed ? 0 : 1],
                      masked_conv::taps_of(taps, shape[2], shape[3], 1, transposed), weight.view.dtype, gated, pairs);
}

void pack(const TensorArg& weight, const TensorArg& mask, const TensorArg& packed, const std::vector<int64_t>& taps,
          bool transposed, bool gated, bool pairs) {
  common_device({{"weight", weight}, {"mask", mask}}, {{"packed", packed}});
  if (weight.view.ndim != 4) throw std::invalid_argument("weight must be [O, C, kh, kw]");
  const int64_t* shape = weight.view.shape;
  // Pairs read pixels that lie side by side, and for all else it does not matter here where they read.
  const masked_conv::Packing problem{.weight = weight.view,
                                     .mask = mask.view,
                                     .packed = packed.view,
                                     .taps = masked_conv::taps_of(taps, shape[2], shape[3], 1, transposed),
                                     .transposed = transposed,
                                     .gated = gated,
                                     .pairs = pairs};
  masked_conv::check(problem, packed_bytes_of(weight, taps, transposed, gated, pairs));
  run(problem, packed, masked_conv::cpu::pack, masked_conv::cuda::pack);
}

void convolve(const TensorArg& input, const TensorArg& packed, const OptionalTensor& bias,
              const OptionalTensor& condition, const OptionalTensor& position, const TensorArg& output,
              const OptionalTensor& preactivation, int64_t outputs, const std::vector<int64_t>& taps, int64_t kh,
              int64_t kw, int64_t dilation, bool negated, const std::string& activation, bool tf32, bool pairs) {
  const DLDevice device = common_device(
      {{"input", input}, {"packed", packed}, {"bias", bias}, {"condition", condition}, {"position", position}},
      {{"output", output}, {"preactivation", preactivation}});
  const masked_conv::Convolution problem{.input = input.view,
                                         .packed = packed.view,
                                         .bias = view(bias),
                                         .condition = view(condition),
                                         .position = view(position),
                                         .output = output.view,
                                         .preactivation = view(preactivation),
                                         .taps = masked_conv::taps_of(taps, kh, kw, dilation, negated),
                                         .activation = activation_of(activation),
                                         .outputs = outputs,
                                         .tf32 = tf32,
                                         .pairs = pairs};
  if (input.view.ndim != 4) throw std::invalid_argument("input must be [B, C, H, W]");
  if (pairs) require_pairs(device, dilation);
  masked_conv::check(problem,
                     packed_bytes(device, outputs, problem.inputs(), problem.taps, input.view.dtype,
                                  problem.activation == Activation::gated, pairs),
                     readable(device));
  run(problem, output, masked_conv::cpu::convolve, masked_conv::cuda::convolve);
}

void activation_grad(const TensorArg& grad, const OptionalTensor& saved, const OptionalTensor& result,
                     const OptionalTensor& bias_grad, const OptionalTensor& workspace, const std::string& activation) {
  if (!result && !bias_grad) return;
  const DLDevice device = common_device({{"grad", grad}, {"saved", saved}},
                                        {{"result", result}, {"bias_grad", bias_grad}, {"workspace", workspace}});
  const masked_conv::ActivationGrad problem{.grad = grad.view,
                                            .saved = view(saved),
                                            .result = view(result),
                                            .bias_grad = view(bias_grad),
                                            .workspace = view(workspace),
                                            .activation = activation_of(activation)};
  masked_conv::check(problem);
  if (on_cuda(device) && bias_grad && !workspace) throw std::invalid_argument("bias_grad needs a workspace on CUDA");
  run(problem, grad, masked_conv::cpu::activation_grad, masked_conv::cuda::activation_grad);
}

masked_conv::WeightGrad weight_grad_problem(const TensorArg& input, const TensorArg& grad, const TensorArg& mask,
                                            const TensorArg& weight_grad, const std::vector<int64_t>& taps,
                                            int64_t dilation, bool tf32, bool pairs) {
  if (weight_grad.view.ndim != 4) throw std::invalid_argument("weight_grad must be [O, C, kh, kw]");
  masked_conv::WeightGrad problem{
      .input = input.view,
      .grad = grad.view,
      .mask = mask.view,
      .weight_grad = weight_grad.view,
      .workspace = {},
      .taps = masked_conv::taps_of(taps, weight_grad.view.shape[2], weight_grad.view.shape[3], dilation, false),
      .tf32 = tf32,
      .pairs = pairs};
  if (pairs) require_pairs(input.device, dilation);
  masked_conv::check(problem);
  return problem;
}

int64_t weight_grad_workspace([[maybe_unused]] const TensorArg& input, [[maybe_unused]] const TensorArg& grad,
                              [[maybe_unused]] const TensorArg& mask, [[maybe_unused]] const TensorArg& weight_grad,
                              [[maybe_unused]] const std::vector<int64_t>& taps, [[maybe_unused]] int64_t dilation,
                              [[maybe_unused]] bool tf32) {
#if defined(CPC_WITH_CUDA)
  if (on_cuda(input.device)) {
    const auto problem = weight_grad_problem(input, grad, mask, weight_grad, taps, dilation, tf32, /*pairs=*/false);
    return on_device_of(input.device, [&] { return masked_conv::cuda::weight_grad_workspace(problem); });
  }
#endif
  return 0;
}

void weight_grad(const TensorArg& input, const TensorArg& grad, const TensorArg& mask, const TensorArg& weight_grad,
                 const OptionalTensor& workspace, const std::vector<int64_t>& taps, int64_t dilation, bool tf32,
                 bool pairs) {
  common_device({{"input", input}, {"grad", grad}, {"mask", mask}},
                {{"weight_grad", weight_grad}, {"workspace", workspace}});
  masked_conv::WeightGrad problem = weight_grad_problem(input, grad, mask, weight_grad, taps, dilation, tf32, pairs);
  const int64_t needed = weight_grad_workspace(input, grad, mask, weight_grad, taps, dilation, tf32);
  problem.workspace = view(workspace);
  if (needed > 0 &&
      (!is_workspace(problem.workspace, needed) || reinterpret_cast<uintptr_t>(problem.workspace.data) % 64 != 0))
    throw std::invalid_argument("workspace must be " + std::to_string(needed) + " bytes of dense uint8");
  run(problem, weight_grad, masked_conv::cpu::weight_grad, masked_conv::cuda::weight_grad);
}

}  // namespace

void bind_masked_conv(py::module_& module) {
  module.def("masked_conv2d_in_pairs", &in_pairs, py::arg("weight"), py::arg("mask"), py::arg("output"),
             py::arg("dilation"), "Whether a convolution is to be computed in pairs of pixels.");
  module.def("masked_conv2d_packed_bytes", &packed_bytes_of, py::arg("weight"), py::arg("taps"), py::arg("transposed"),
             py::arg("gated"), py::arg("pairs"), "Size of a packing's result.");
  module.def("masked_conv2d_pack", &pack, py::arg("weight"), py::arg("mask"), py::arg("packed"), py::arg("taps"),
             py::arg("transposed"), py::arg("gated"), py::arg("pairs"), "Fills packed.");
  module.def("masked_conv2d", &convolve, py::arg("input"), py::arg("packed"), py::arg("bias"), py::arg("condition"),
             py::arg("position"), py::arg("output"), py::arg("preactivation"), py::arg("outputs"), py::arg("taps"),
             py::arg("kh"), py::arg("kw"), py::arg("dilation"), py::arg("negated"), py::arg("activation"),
             py::arg("tf32"), py::arg("pairs"), "Fills output and preactivation.");
  module.def("masked_conv2d_activation_grad", &activation_grad, py::arg("grad"), py::arg("saved"), py::arg("result"),
             py::arg("bias_grad"), py::arg("workspace"), py::arg("activation"), "Fills result and bias_grad.");
  module.def("masked_conv2d_weight_grad_workspace", &weight_grad_workspace, py::arg("input"), py::arg("grad"),
             py::arg("mask"), py::arg("weight_grad"), py::arg("taps"), py::arg("dilation"), py::arg("tf32"),
             "Size of the workspace that weight_grad needs.");
  module.def("masked_conv2d_weight_grad", &weight_grad, py::arg("input"), py::arg("grad"), py::arg("mask"),
             py::arg("weight_grad"), py::arg("workspace"), py::arg("taps"), py::arg("dilation"), py::arg("tf32"),
             py::arg("pairs"), "Fills weight_grad.");
}

}  // namespace cpc::bindings
