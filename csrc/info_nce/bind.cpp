// Binds InfoNCE's kernels; see info_nce.h.
#include "bind/op.h"
#include "info_nce/info_nce.h"

namespace cpc::info_nce {

const bind::Ops ops([](pybind11::module_& module) {
  bind::op(module, "info_nce", "Fills losses, ranks, slopes, bests and the gradients.", kContrast, cpu::contrast,
           cuda::contrast, bind::Batch::optional);
  module.def(
      "info_nce_on_cpu", [](const bind::TensorArg& queries) { return !bind::on_cuda(queries.device); },
      pybind11::arg("queries"), "Whether the CPU's kernel runs, which takes self-contrasts.");
});

}  // namespace cpc::info_nce
