// Binds the plain convolution; see conv2d.h.
#include "bind/op.h"
#include "conv2d/conv2d.h"

namespace cpc::conv2d {

// On CUDA the op is PyTorch's convolution, so that no call comes here.
const bind::Ops ops([](pybind11::module_& module) {
  bind::op(module, "conv2d", "Fills output.", kLayer, cpu::layer, nullptr);
  bind::op(module, "conv2d_backward", "Fills the gradients.", kLayerGrad, cpu::layer_grad, nullptr);
});

}  // namespace cpc::conv2d
