// The Python module cpc_ext._C: argument conversion, device dispatch and errors. C++ exceptions become Python's:
// invalid_argument ValueError, out_of_range IndexError, bad_alloc MemoryError.
#include "bind/op.h"
#include "core/isa.h"
#include "core/parallel.h"
#if defined(CPC_CUDA_TRACE)
#include "core/cuda/emulation/trace.h"
#endif

namespace cpc::bind {
namespace {

py::dict build_info() {
  prepare_thread();
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

#if defined(CPC_CUDA_TRACE)
py::object to_python(const cuda::emulation::Value& value) {
  using cuda::emulation::Dict, cuda::emulation::List;
  if (const auto* list = std::get_if<List>(&value)) {
    py::list out;
    for (const auto& item : *list) out.append(to_python(item));
    return out;
  }
  if (const auto* dict = std::get_if<Dict>(&value)) {
    py::dict out;
    for (const auto& [key, item] : *dict) out[py::str(key)] = to_python(item);
    return out;
  }
  if (const auto* text = std::get_if<std::string>(&value)) return py::str(*text);
  if (const auto* number = std::get_if<int64_t>(&value)) return py::int_(*number);
  if (const auto* number = std::get_if<double>(&value)) return py::float_(*number);
  return py::none();
}

void bind_trace(py::module_& module) {
  module.def(
      "begin_trace", &cuda::emulation::begin_trace, py::arg("observers"), py::arg("blocks") = 0,
      "From now on launches are observed; `observers` has the options of each by its name. A launch runs at most\n"
      "so many of its blocks, evenly spread, where that is not 0: its results are then incomplete.");
  module.def(
      "end_trace", [] { return to_python(cuda::emulation::end_trace()); },
      "What each observer saw, by name; none observes any more.");
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.attr("__version__") = CPC_VERSION;
  module.def("build_info", &build_info);

#if defined(CPC_CUDA_EMULATION)
  using Devices = std::optional<std::vector<std::pair<size_t, int>>>;
  module.def(
      "emulate_cuda",
      [](bool on, const Devices& devices, int device) {
        std::vector<cuda::emulation::Device> there(devices ? 0 : 1);
        for (const auto& [shared_bytes, multiprocessors] : devices.value_or(Devices::value_type{}))
          there.push_back({shared_bytes, multiprocessors});
        if (device < 0 || device >= static_cast<int>(there.size())) throw std::out_of_range("there is no such device");
        cuda::emulation::set_devices(there);
        emulate_cuda = on;
        emulated_device = device;
      },
      py::arg("on"), py::arg("devices") = py::none(), py::arg("device") = 0,
      "Whether tensors of the CPU go to the CUDA kernels, as those of one of some devices. Of each: the bytes of\n"
      "shared memory that a block may have, and the multiprocessors. The first is current, none has a context.");
  module.def(
      "emulated_contexts",
      [] {
        std::vector<int> found;
        for (int i = 0; i < cuda::emulation::device_count(); ++i)
          if (cuda::emulation::has_context(i)) found.push_back(i);
        return found;
      },
      "The emulated devices that have been used.");
  module.def("emulated_device", &cuda::emulation::current_device, "The emulated device that is current.");
  module.def("emulated_set_device", &cuda::emulation::set_current_device, py::arg("device"), "Makes a device current.");
#endif
#if defined(CPC_CUDA_TRACE)
  bind_trace(module);
#endif

  for (const Ops::Bind bind : Ops::all()) bind(module);
  module.def(
      "probe", [](const TensorArg&) {}, py::arg("tensor"),
      "Only reads a tensor's description: the cost of a crossing.");
}

}  // namespace cpc::bind
