// The host side of every CUDA kernel: errors, the current device, launches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace cpc::cuda {

inline void check(cudaError_t status, const char* doing) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + doing + ": " + cudaGetErrorString(status));
}

// Makes a device current for the calling thread and the previous one again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&previous_), "asking for the current device");
    if (device != previous_) check(cudaSetDevice(device), "choosing a device");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
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

// Shared memory that every kernel may use without asking.
constexpr int64_t kDefaultSharedBytes = 48 << 10;

// What a block may use at most after asking.
inline int64_t shared_bytes_limit() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

inline int64_t multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }

inline void fill_with_zeros(void* data, int64_t bytes, void* stream) {
  if (bytes > 0)
    check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
          "filling with zeros");
}

struct LaunchShape {
  int64_t blocks;  // Kernels loop over more work than there are blocks, so this may be cut to what a grid allows.
  dim3 threads;
  int64_t shared_bytes = 0;
};

// Queues kernel(args...) on a stream, called `name` in errors. Nothing is launched for zero blocks.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), const LaunchShape& shape, void* stream, Args&&... args) {
  if (shape.blocks == 0) return;
  if (shape.shared_bytes > kDefaultSharedBytes)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shape.shared_bytes)),
          name);
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.blocks < kMaxBlocks ? shape.blocks : kMaxBlocks));
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = static_cast<size_t>(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
#if defined(CPC_CUDA_EMULATION)
  check(emulation::launch(name, config, kernel, args...), name);
#else
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...), name);
#endif
}

}  // namespace cpc::cuda
