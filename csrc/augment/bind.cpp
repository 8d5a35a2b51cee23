// Binds the augmentation kernels; see augment.h.
#include "augment/augment.h"
#include "bind/op.h"

namespace cpc::augment {

const bind::Ops ops([](pybind11::module_& module) {
  bind::op(module, "augment_patches", "Fills patches.", kAugmentation, cpu::augment, cuda::augment);
});

}  // namespace cpc::augment
