// Binds the patch kernels; see patches.h.
#include "bind/op.h"
#include "patches/patches.h"

namespace cpc::patches {

const bind::Ops ops([](pybind11::module_& module) {
  bind::op(module, "extract_patches", "Fills patches.", kExtraction, cpu::extract, cuda::extract);
  bind::op(module, "extract_patches_backward", "Fills images_grad.", kGradient, cpu::extract_backward,
           cuda::extract_backward);
});

}  // namespace cpc::patches
