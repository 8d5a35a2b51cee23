// Binds the kernels of reduction.h.
#include "bind/op.h"
#include "reduction/reduction.h"

namespace cpc::reduction {

const bind::Ops ops([](pybind11::module_& module) {
  bind::op(module, "info_nce_weights", "Fills row_weights.", kRowWeights, cpu::weigh, cuda::weigh,
           bind::Batch::optional);
  bind::op(module, "info_nce_reduced", "Fills loss and accuracy.", kReduction, cpu::reduce, cuda::reduce,
           bind::Batch::optional);
});

}  // namespace cpc::reduction
