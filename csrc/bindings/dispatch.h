// What the bindings of all ops share: one device a call, and the kernel for it.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/tensor_arg.h"
#if defined(CPC_WITH_CUDA)
#include "core/cuda/device.h"
#endif

namespace cpc::bindings {

namespace py = pybind11;

#if defined(CPC_CUDA_EMULATION)
inline bool emulate_cuda = false;  // Whether tensors of the CPU go to the CUDA kernels,
inline int emulated_device = 0;    // as those of this device.
#else
constexpr bool emulate_cuda = false;
constexpr int emulated_device = 0;
#endif

// Whether the CUDA kernels serve tensors of this device.
inline bool on_cuda(DLDevice device) { return device.device_type == kDLCUDA || emulate_cuda; }

#if defined(CPC_WITH_CUDA)
// Calls work() with the CUDA device of a call's tensors current, which whatever asks or uses a device depends on: how
// much workspace a kernel needs as well as its launch.
template <class Work>
auto on_device_of(DLDevice device, const Work& work) {
  const cpc::cuda::DeviceGuard guard(emulate_cuda ? emulated_device : device.device_id);
  return work();
}

// The CUDA stream that a tensor's framework is working on.
inline void* cuda_stream(const TensorArg& tensor) {
#if defined(CPC_CUDA_EMULATION)
  if (emulate_cuda) return cpc::cuda::emulation::stream_of(emulated_device);
#endif
  return current_stream(tensor);
}
#endif

// Whether the host may look at a tensor's values: asking a GPU would stall its stream, and the emulation is one.
inline bool readable(DLDevice device) { return !on_cuda(device); }

// All tensors of a call (null: absent) on one device; kernels write only to what may be written.
inline DLDevice common_device(const std::vector<const TensorArg*>& read, const std::vector<const TensorArg*>& written) {
  const DLDevice device = written.front()->device;
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
#if defined(CPC_WITH_CUDA)
  if (on_cuda(output.device)) {
    void* const stream = cuda_stream(output);
    const py::gil_scoped_release unlocked;
    return on_device_of(output.device, [&] { cuda(problem, stream); });
  }
#endif
  switch (output.device.device_type) {
    case kDLCPU:
    case kDLCUDAHost: {
      const py::gil_scoped_release unlocked;
      return cpu(problem);
    }
    default:
      throw std::invalid_argument("this build has no kernels for DLPack device type " +
                                  std::to_string(output.device.device_type));
  }
}

using OptionalTensor = std::optional<TensorArg>;

inline const TensorArg* pointer(const OptionalTensor& arg) { return arg ? &*arg : nullptr; }
inline TensorView view(const OptionalTensor& arg) { return arg ? arg->view : TensorView{}; }

}  // namespace cpc::bindings
