// The Python module cpc_ext._C: argument conversion, device dispatch and errors. C++ exceptions become Python's:
// invalid_argument ValueError, out_of_range IndexError, bad_alloc MemoryError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "bindings/tensor_arg.h"
#include "core/isa.h"
#include "core/parallel.h"
#include "patches/patches.h"
#if defined(CPC_WITH_CUDA)
#include "core/cuda/device.h"
#endif

namespace py = pybind11;

namespace cpc::bindings {
namespace {

#if defined(CPC_CUDA_EMULATION)
bool emulate_cuda = false;  // Whether tensors of the CPU go to the CUDA kernels.
#else
constexpr bool emulate_cuda = false;
#endif

// Whether the host may look at a tensor's values: asking a GPU would stall its stream, and the emulation is one.
bool readable(DLDevice device) { return device.device_type != kDLCUDA && !emulate_cuda; }

// All tensors of a call on one device; kernels write only to what may be written.
DLDevice common_device(std::initializer_list<const TensorArg*> read, std::initializer_list<const TensorArg*> written) {
  const DLDevice device = (*written.begin())->device;
  for (const auto* list : {&read, &written})
    for (const TensorArg* arg : *list)
      if (arg != nullptr &&
          (arg->device.device_type != device.device_type || arg->device.device_id != device.device_id))
        throw std::invalid_argument("all tensors must be on one device");
  for (const TensorArg* arg : written)
    if (arg->readonly) throw std::invalid_argument("the output is read-only");
  return device;
}

// Runs a problem's kernel for the device of its output, on the stream of the output's framework, without the GIL.
template <class Problem>
void run(const Problem& problem, const TensorArg& output, void (*cpu)(const Problem&),
         [[maybe_unused]] void (*cuda)(const Problem&, void* stream)) {
  switch (output.device.device_type) {
    case kDLCPU:
    case kDLCUDAHost: {
      const py::gil_scoped_release unlocked;
      return emulate_cuda ? cuda(problem, nullptr) : cpu(problem);
    }
#if defined(CPC_WITH_CUDA)
    case kDLCUDA: {
      void* const stream = current_stream(output);
      const py::gil_scoped_release unlocked;
      const cpc::cuda::DeviceGuard guard(output.device.device_id);
      return cuda(problem, stream);
    }
#endif
    default:
      throw std::invalid_argument("this build has no kernels for DLPack device type " +
                                  std::to_string(output.device.device_type));
  }
}

using OptionalTensor = std::optional<TensorArg>;

const TensorArg* pointer(const OptionalTensor& arg) { return arg ? &*arg : nullptr; }
TensorView view(const OptionalTensor& arg) { return arg ? arg->view : TensorView{}; }

void extract_patches(const TensorArg& images, const TensorArg& patches, int64_t patch_size, int64_t stride,
                     int64_t height, int64_t width, const OptionalTensor& offsets, const OptionalTensor& flip,
                     bool gray, bool patch_norm, bool channels_last, std::vector<double> scale,
                     std::vector<double> shift) {
  const DLDevice device = common_device({&images, pointer(offsets), pointer(flip)}, {&patches});
  const patches::Problem problem{.geometry = {patch_size, stride, height, width, gray, patch_norm, channels_last},
                                 .images = images.view,
                                 .offsets = view(offsets),
                                 .flip = view(flip),
                                 .patches = patches.view,
                                 .scale = std::move(scale),
                                 .shift = std::move(shift)};
  patches::check(problem, /*backward=*/false, readable(device));
  run(problem, patches, patches::cpu::extract, patches::cuda::extract);
}

void extract_patches_backward(const TensorArg& patches_grad, const TensorArg& images_grad, const OptionalTensor& images,
                              const OptionalTensor& norm_slopes, int64_t patch_size, int64_t stride, int64_t height,
                              int64_t width, const OptionalTensor& offsets, const OptionalTensor& flip, bool gray,
                              bool patch_norm, bool channels_last, std::vector<double> scale,
                              std::vector<double> shift) {
  const DLDevice device = common_device(
      {&patches_grad, pointer(images), pointer(norm_slopes), pointer(offsets), pointer(flip)}, {&images_grad});
  if (patch_norm && !images) throw std::invalid_argument("the backward of patch_norm needs the images");
  const patches::Problem problem{.geometry = {patch_size, stride, height, width, gray, patch_norm, channels_last},
                                 // Without patch_norm only their shape counts.
                                 .images = images ? images->view : images_grad.view,
                                 .offsets = view(offsets),
                                 .flip = view(flip),
                                 .patches = patches_grad.view,
                                 .images_grad = images_grad.view,
                                 .norm_slopes = view(norm_slopes),
                                 .scale = std::move(scale),
                                 .shift = std::move(shift)};
  patches::check(problem, /*backward=*/true, readable(device));
  run(problem, images_grad, patches::cpu::extract_backward, patches::cuda::extract_backward);
}

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

  module.def("extract_patches", &extract_patches, py::arg("images"), py::arg("patches"), py::arg("patch_size"),
             py::arg("stride"), py::arg("height"), py::arg("width"), py::arg("offsets"), py::arg("flip"),
             py::arg("gray"), py::arg("patch_norm"), py::arg("channels_last"), py::arg("scale"), py::arg("shift"),
             "Fills patches; see csrc/patches/patches.h.");
  module.def("extract_patches_backward", &extract_patches_backward, py::arg("patches_grad"), py::arg("images_grad"),
             py::arg("images"), py::arg("norm_slopes"), py::arg("patch_size"), py::arg("stride"), py::arg("height"),
             py::arg("width"), py::arg("offsets"), py::arg("flip"), py::arg("gray"), py::arg("patch_norm"),
             py::arg("channels_last"), py::arg("scale"), py::arg("shift"),
             "Fills images_grad; see csrc/patches/patches.h.");
  module.def(
      "probe", [](const TensorArg&) {}, py::arg("tensor"),
      "Only reads a tensor's description: the cost of a crossing.");
}

}  // namespace cpc::bindings
