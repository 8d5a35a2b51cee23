// Binds the kernel of predict_contrast.h.
#include "bind/op.h"
#include "predict_contrast/predict_contrast.h"

namespace cpc::predict_contrast {

// There is no CUDA kernel; check() rejects problems on CUDA.
const bind::Ops ops([](pybind11::module_& module) {
  bind::op(module, "predict_and_contrast", "Fills losses, ranks and the gradients.", kPredictAndContrast,
           cpu::predict_and_contrast, nullptr);
});

}  // namespace cpc::predict_contrast
