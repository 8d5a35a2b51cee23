// Binds the masked convolution's kernels; see masked_conv.h.
#include "bind/op.h"
#include "masked_conv/masked_conv.h"
#include "masked_conv/plan.h"

namespace cpc::masked_conv {

const bind::Ops ops([](pybind11::module_& module) {
  bind::op(module, "masked_conv2d", "Fills output and preactivation.", kLayer, cpu::layer, cuda::layer);
  bind::op(module, "masked_conv2d_backward", "Fills the gradients.", kLayerGrad, cpu::layer_grad, cuda::layer_grad);
  module.def(
      "masked_conv2d_taps",
      [](const bind::TensorArg& mask) {
        FieldCheck().tensor({"mask", Access::read, false, Type::boolean, "kh kw | O C kh kw", Layout::any}, mask.view);
        if (!readable(bind::where_is(mask.device)))
          throw std::invalid_argument("the host must be able to look at the mask");
        return visible_taps(mask.view);
      },
      pybind11::arg("mask"), "The taps that some channel sees, in order.");
  bind::op(
      module, "masked_conv2d_pack", "Fills packed.", kPixelPacking,
      [](const PixelPacking& problem) { cpu::pack(problem); },
      [](const PixelPacking& problem, void* stream) { cuda::pack(problem, stream); });
  bind::op(
      module, "masked_conv2d_packed", "Fills a pixel of output, or all of it.", kPixelConvolution,
      [](const PixelConvolution& problem) { cpu::convolve(problem); },
      [](const PixelConvolution& problem, void* stream) { cuda::convolve(problem, stream); });
});

}  // namespace cpc::masked_conv
