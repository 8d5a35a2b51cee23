// The Python module cpc_ext._C: argument conversion, device dispatch and errors. C++ exceptions become Python's:
// invalid_argument ValueError, out_of_range IndexError, bad_alloc MemoryError.
#include "bindings/dispatch.h"
#include "bindings/ops.h"
#include "core/isa.h"
#include "core/parallel.h"

namespace cpc::bindings {
namespace {

py::dict build_info() {
  py::dict info;
  info["version"] = CPC_VERSION;
  info["compiler"] = CPC_COMPILER;
  info["simd"] = isa_name();
#if defined(CPC_WITH_CUDA) && !defined(CPC_CUDA_EMULATION)
  info["cuda"] = CPC_CUDA_VERSION;
  info["cuda_architectures"] = CPC_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  info["openmp_threads"] = workers();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("__version__") = CPC_VERSION;
  module.def("build_info", &build_info);

#if defined(CPC_CUDA_EMULATION)
  module.def("emulate_cuda", [](bool on) { emulate_cuda = on; }, py::arg("on"));
#endif

  bind_augment(module);
  bind_info_nce(module);
  bind_logistic_mixture(module);
  bind_masked_conv(module);
  bind_patches(module);
  bind_pixel_steps(module);
  module.def(
      "probe", [](const TensorArg&) {}, py::arg("tensor"),
      "Only reads a tensor's description: the cost of a crossing.");
}

}  // namespace cpc::bindings
