// Runs the kernel for the device of a call; shared by the bindings of all ops.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "bind/arguments.h"
#include "core/fields.h"
#if defined(CPC_WITH_CUDA)
#include "core/cuda/device.h"
#endif

namespace cpc::bind {

namespace py = pybind11;

#if defined(CPC_CUDA_EMULATION)
inline bool emulate_cuda = false;  // CUDA kernels take tensors of the CPU,
inline int emulated_device = 0;    // as if they were on this device.
#else
constexpr bool emulate_cuda = false;
constexpr int emulated_device = 0;
#endif

// Must be called before a thread's first loop. OpenMP keeps the number of threads per calling thread. PyTorch sets it
// to the value of torch.set_num_threads, even if that was called in another thread, when get_num_threads is first
// called.
inline void prepare_thread() {
  thread_local bool prepared = false;
  if (prepared) return;
  const py::dict modules = py::module_::import("sys").attr("modules");
  if (modules.contains("torch")) modules["torch"].attr("get_num_threads")();
  prepared = true;
}

// True where the CUDA kernels take tensors of this device.
inline bool on_cuda(DLDevice device) { return device.device_type == kDLCUDA || emulate_cuda; }

#if defined(CPC_WITH_CUDA)
// Calls work() with the CUDA device of a call's tensors current. Both the launch of a kernel and the size of its
// workspace depend on the current device.
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

// The device that computes. The emulation counts as CUDA, so that checks do not read values that they could not read on
// a GPU.
inline Where where_is(DLDevice device) { return on_cuda(device) ? Where::cuda : Where::host; }

// Runs a problem's kernel for the device of its tensors, without the GIL, on the stream of the framework of `tensor`.
// `cuda` is null where there is no such kernel.
template <class Problem>
void run(const Problem& problem, const TensorArg& tensor, void (*cpu)(const Problem&),
         [[maybe_unused]] void (*cuda)(const Problem&, void* stream)) {
#if defined(CPC_WITH_CUDA)
  if (cuda != nullptr && on_cuda(tensor.device)) {
    void* const stream = cuda_stream(tensor);
    const py::gil_scoped_release unlocked;
    return on_device_of(tensor.device, [&] { cuda(problem, stream); });
  }
#endif
  switch (tensor.device.device_type) {
    case kDLCPU:
    case kDLCUDAHost: {
      const py::gil_scoped_release unlocked;
      return cpu(problem);
    }
    default:
      throw std::invalid_argument("this build has no kernels for DLPack device type " +
                                  std::to_string(tensor.device.device_type));
  }
}

}  // namespace cpc::bind
