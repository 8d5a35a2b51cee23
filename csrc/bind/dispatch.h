// What the bindings of all ops share: the kernel for the device of a call.
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
inline bool emulate_cuda = false;  // Whether tensors of the CPU go to the CUDA kernels,
inline int emulated_device = 0;    // as those of this device.
#else
constexpr bool emulate_cuda = false;
constexpr int emulated_device = 0;
#endif

// To be called before a thread's first loop. OpenMP keeps a number of threads for each, which PyTorch, when first asked
// in one, sets to what torch.set_num_threads was told in another.
inline void prepare_thread() {
  thread_local bool prepared = false;
  if (prepared) return;
  const py::dict modules = py::module_::import("sys").attr("modules");
  if (modules.contains("torch")) modules["torch"].attr("get_num_threads")();
  prepared = true;
}

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

// Where a call's tensors are. The host may look at values that a GPU does not hold: asking that would stall its stream,
// and the emulation is one.
inline Where where_is(DLDevice device) { return on_cuda(device) ? Where::cuda : Where::host; }

// Runs a problem's kernel for the device of its tensors, on the stream of one's framework, without the GIL. `cuda` is
// null where there is none.
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
