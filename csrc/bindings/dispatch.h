// What the bindings of all ops share: the kernel for the device of a call.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/arguments.h"
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

// Whether a tensor is some bytes in a row, at least so many.
inline bool is_workspace(const TensorView& view, int64_t bytes) {
  return view.dtype == DType::u8 && view.ndim == 1 && view.shape[0] >= bytes &&
         (view.shape[0] <= 1 || view.strides[0] == 1);
}

inline TensorView view(const OptionalTensor& arg) { return arg ? arg->view : TensorView{}; }

}  // namespace cpc::bindings
