// The host side of every CUDA kernel: errors, the current device, launches.
#pragma once

#include <cuda_runtime.h>
#if !defined(CPC_CUDA_EMULATION)
#include <cuda.h>
#endif

#include <algorithm>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/cuda/blocks.h"

namespace cpc::cuda {

inline void check(cudaError_t status, const char* doing) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + doing + ": " + cudaGetErrorString(status));
}

// True if this process has a context on a device. The runtime creates one, which takes hundreds of megabytes, on every
// device that is made current.
inline bool has_context(int device) {
#if defined(CPC_CUDA_EMULATION)
  return emulation::has_context(device);
#else
  static const auto state_of = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
    constexpr const char* kName = "cuDevicePrimaryCtxGetState";
#if CUDART_VERSION >= 12050
    constexpr unsigned kSince = 7000;  // The version of CUDA that introduced this signature.
    const cudaError_t status = cudaGetDriverEntryPointByVersion(kName, &found, kSince, cudaEnableDefault, &result);
#else
    const cudaError_t status = cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result);
#endif
    const bool there = status == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return reinterpret_cast<decltype(&cuDevicePrimaryCtxGetState)>(there ? found : nullptr);
  }();
  unsigned flags = 0;
  int active = 0;
  return state_of == nullptr || (state_of(device, &flags, &active) == CUDA_SUCCESS && active != 0);
#endif
}

// Makes a device current for the calling thread, and at the end the previous one again. Like PyTorch's guard it does
// not go back to a device that this process has not used, as that would create a context there.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "asking for the current device");
    if (device != previous_) check(cudaSetDevice(device), "choosing a device");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_ && has_context(previous_)) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

inline int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  check(cudaDeviceGetAttribute(&value, which, device), "asking for a device attribute");
  return value;
}

// The shared memory, static and dynamic, that every kernel may use without opting in to more.
constexpr int64_t kDefaultSharedBytes = 48 << 10;

// The shared memory that a kernel's static variables take. Cached, because launches with dynamic shared memory need it.
template <class... Params>
int64_t static_shared_bytes(void (*kernel)(Params...)) {
  const auto* const address = reinterpret_cast<const void*>(kernel);
  int device = 0;
  check(cudaGetDevice(&device), "asking for the current device");
  thread_local std::map<std::pair<const void*, int>, int64_t> known;
  const auto [found, is_new] = known.try_emplace({address, device}, 0);
  if (is_new) {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, address);
    if (status != cudaSuccess) known.erase(found);
    check(status, "asking for a kernel's shared memory");
    found->second = static_cast<int64_t>(attributes.sharedSizeBytes);
  }
  return found->second;
}

// The most dynamic shared memory that a kernel may use; launch() opts in where a launch needs it.
template <class... Params>
int64_t dynamic_shared_limit(void (*kernel)(Params...)) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) - static_shared_bytes(kernel);
}

inline int64_t multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

inline void fill_with_zeros(void* data, int64_t bytes, void* stream) {
  if (bytes > 0)
    check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
          "filling with zeros");
}

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

struct LaunchShape {
  int64_t blocks;  // May be cut to kMaxBlocks: kernels loop where there is more work than blocks.
  dim3 threads;
  int64_t shared_bytes = 0;
  Blocks depend = Blocks::apart;
};

// Queues kernel(args...) on a stream; errors call it `name`. Zero blocks launch nothing. With Blocks::together, up to
// one block per multiprocessor always runs together.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), const LaunchShape& shape, void* stream, Args&&... args) {
  if (shape.blocks == 0) return;
  if (shape.shared_bytes > 0 && shape.shared_bytes + static_shared_bytes(kernel) > kDefaultSharedBytes) {
    // Opt in to the whole limit, so that launches of other sizes by other threads never lower it.
    const int64_t limit = dynamic_shared_limit(kernel);
    if (shape.shared_bytes > limit)
      throw std::runtime_error(std::string("CUDA: ") + name + ": a block needs " + std::to_string(shape.shared_bytes) +
                               " bytes of shared memory, beside static variables of " +
                               std::to_string(static_shared_bytes(kernel)) + "; this device has room for " +
                               std::to_string(std::max<int64_t>(limit, 0)));
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(limit)),
          name);
  }
  cudaLaunchConfig_t config = {};
#if defined(CPC_CUDA_EMULATION)
  const bool together = shape.depend == Blocks::together;  // Such blocks rely on their number.
  const int64_t most = together ? kMaxBlocks : std::min(emulation::largest_grid(), kMaxBlocks);
#else
  const int64_t most = kMaxBlocks;
#endif
  config.gridDim = dim3(static_cast<unsigned>(std::min(shape.blocks, most)));
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
#if defined(CPC_CUDA_EMULATION)
  check(emulation::launch(name, config, shape.depend, kernel, args...), name);
#else
  cudaLaunchAttribute cooperative = {};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  if (shape.depend == Blocks::together) {
    config.attrs = &cooperative;
    config.numAttrs = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
#endif
}

}  // namespace cpc::cuda
