// The part of CUDA that our kernels use, on the host: see emulator.h. It is included in place of the toolkit's header
// of the same name.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "core/cuda/emulation/emulator.h"
#include "core/cuda/emulation/trace.h"

// --- Keywords ---
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
// Emits as many no-op instructions as threads, which emulation::launch_bounds counts. In a template, GCC 12 does not
// accept a named constant here, but it accepts sizeof.
#define __launch_bounds__(threads, ...) __attribute__((patchable_function_entry(sizeof(char[threads]))))

// --- Vector types ---
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};

// --- Barriers, shuffles and votes ---
inline void __syncthreads(cpc::cuda::emulation::Where where = cpc::cuda::emulation::Where::current()) {
  cpc::cuda::emulation::barrier(where);
}

namespace cpc::cuda::emulation {

// A lane's part in a shuffle: its value, the lane that it reads, and then that lane's value.
struct Shuffle {
  uint64_t value;
  unsigned source;
  uint64_t result;
  bool inactive;
};

template <class T>
T shuffle(const char* name, uint32_t mask, T value, unsigned source, Where where) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Shuffle mine{0, source, 0, false};
  std::memcpy(&mine.value, &value, sizeof value);
  collective(
      name, mask, &mine,
      [](void* const(&lanes)[kWarp]) {
        for (void* const l : lanes)
          if (auto* one = static_cast<Shuffle*>(l); one != nullptr) {
            const auto* from = static_cast<const Shuffle*>(lanes[one->source]);
            one->inactive = from == nullptr;
            if (from != nullptr) one->result = from->value;
          }
      },
      where);
  if (mine.inactive) fail(std::string(name) + " from the inactive lane " + std::to_string(source), where);
  T result;
  std::memcpy(&result, &mine.result, sizeof result);
  return result;
}

struct Vote {
  bool predicate;
  uint32_t result;
};

inline uint32_t ballot(const char* name, uint32_t mask, bool predicate, Where where) {
  Vote mine{predicate, 0};
  collective(
      name, mask, &mine,
      [](void* const(&lanes)[kWarp]) {
        uint32_t votes = 0;
        for (unsigned l = 0; l < kWarp; ++l)
          if (lanes[l] != nullptr && static_cast<const Vote*>(lanes[l])->predicate) votes |= 1u << l;
        for (void* const l : lanes)
          if (l != nullptr) static_cast<Vote*>(l)->result = votes;
      },
      where);
  return mine.result;
}

struct Match {
  uint32_t value, result;
};

}  // namespace cpc::cuda::emulation

inline void __syncwarp(unsigned mask = cpc::cuda::emulation::kFullMask,
                       cpc::cuda::emulation::Where where = cpc::cuda::emulation::Where::current()) {
  cpc::cuda::emulation::ballot("__syncwarp", mask, false, where);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              cpc::cuda::emulation::Where where = cpc::cuda::emulation::Where::current()) {
  const unsigned lane = cpc::cuda::emulation::lane(), first = lane / width * width;
  return cpc::cuda::emulation::shuffle("__shfl_sync", mask, value, first + static_cast<unsigned>(source) % width,
                                       where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  cpc::cuda::emulation::Where where = cpc::cuda::emulation::Where::current()) {
  const unsigned lane = cpc::cuda::emulation::lane(), source = lane ^ static_cast<unsigned>(lane_mask);
  const bool inside = source / width <= lane / width;  // A lane of a later segment is not read.
  return cpc::cuda::emulation::shuffle("__shfl_xor_sync", mask, value, inside ? source : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   cpc::cuda::emulation::Where where = cpc::cuda::emulation::Where::current()) {
  const unsigned lane = cpc::cuda::emulation::lane();
  const bool inside = lane % width + delta < static_cast<unsigned>(width);
  return cpc::cuda::emulation::shuffle("__shfl_down_sync", mask, value, inside ? lane + delta : lane, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 cpc::cuda::emulation::Where where = cpc::cuda::emulation::Where::current()) {
  const unsigned lane = cpc::cuda::emulation::lane();
  return cpc::cuda::emulation::shuffle("__shfl_up_sync", mask, value, lane % width >= delta ? lane - delta : lane,
                                       where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cpc::cuda::emulation::Where where = cpc::cuda::emulation::Where::current()) {
  return cpc::cuda::emulation::ballot("__ballot_sync", mask, predicate != 0, where);
}
inline int __any_sync(unsigned mask, int predicate,
                      cpc::cuda::emulation::Where where = cpc::cuda::emulation::Where::current()) {
  return cpc::cuda::emulation::ballot("__any_sync", mask, predicate != 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      cpc::cuda::emulation::Where where = cpc::cuda::emulation::Where::current()) {
  return cpc::cuda::emulation::ballot("__all_sync", mask, predicate == 0, where) == 0;
}
// The lanes with the same value.
inline unsigned __match_any_sync(unsigned mask, unsigned value,
                                 cpc::cuda::emulation::Where where = cpc::cuda::emulation::Where::current()) {
  using cpc::cuda::emulation::Match;
  Match mine{value, 0};
  cpc::cuda::emulation::collective(
      "__match_any_sync", mask, &mine,
      [](void* const(&lanes)[cpc::cuda::emulation::kWarp]) {
        for (void* const l : lanes)
          for (unsigned other = 0; l != nullptr && other < cpc::cuda::emulation::kWarp; ++other) {
            auto* const one = static_cast<Match*>(l);
            const auto* const to = static_cast<const Match*>(lanes[other]);
            if (to != nullptr && to->value == one->value) one->result |= 1u << other;
          }
      },
      where);
  return mine.result;
}

// --- Atomics on integers: threads run one at a time ---
namespace cpc::cuda::emulation {

// Replaces the value with update(old) and returns the old one.
template <class T, class Update>
CPC_UNTRACED T atomic(T* address, const Update& update) {
  trace_atomic(address, sizeof(T), __builtin_return_address(0));
  const Untraced own;
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace cpc::cuda::emulation

template <class T>
T atomicAdd(T* address, T value) {
  return cpc::cuda::emulation::atomic(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMax(T* address, T value) {
  return cpc::cuda::emulation::atomic(address, [=](T old) { return value > old ? value : old; });
}
template <class T>
T atomicMin(T* address, T value) {
  return cpc::cuda::emulation::atomic(address, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicExch(T* address, T value) {
  return cpc::cuda::emulation::atomic(address, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* address, T compare, T value) {
  return cpc::cuda::emulation::atomic(address, [=](T old) { return old == compare ? value : old; });
}

// --- Arithmetic ---
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
inline int __clz(int v) { return std::countl_zero(static_cast<unsigned>(v)); }
inline int __popc(unsigned v) { return std::popcount(v); }
inline int __ffs(int v) { return v == 0 ? 0 : std::countr_zero(static_cast<unsigned>(v)) + 1; }
inline float __int_as_float(int v) { return std::bit_cast<float>(v); }
inline int __float_as_int(float v) { return std::bit_cast<int>(v); }
using std::exp;
using std::sqrt;
using std::tanh;

namespace cpc::cuda {
namespace emulation {

// Perturbs a result by at most `ulps` units in the last place, as a GPU's may be; equal results are perturbed equally.
// Without Freedom::gpu_math, the result itself.
inline float off_by(unsigned ulps, float result) {
  trace_arithmetic(Arithmetic::special);
  const uint32_t bits = std::bit_cast<uint32_t>(result), magnitude = bits & 0x7fffffff;
  if (!freedom().gpu_math || !std::isfinite(result) || magnitude <= ulps) return result;
  const uint32_t chance = (bits ^ bits >> 15) * 0x9e3779b1u >> 8;
  return std::bit_cast<float>(bits - ulps + chance % (2 * ulps + 1));
}

// exp(0) stays exactly 1, as in CUDA, and no exponential of a negative number exceeds 1.
inline float exp_off_by(unsigned ulps, float v) {
  const float exact = std::exp(v), off = off_by(ulps, exact), near = v == 0 ? exact : off;
  return v < 0 && near > 1 ? 1 : near;
}

}  // namespace emulation

// In this namespace, kernels find these before the host's functions. Errors are those of the CUDA C++ Programming
// Guide, "Mathematical Functions".
inline float fma(float a, float b, float c) {
  emulation::trace_arithmetic(emulation::Arithmetic::multiply_add_32);
  return std::fma(a, b, c);
}
inline double fma(double a, double b, double c) {
  emulation::trace_arithmetic(emulation::Arithmetic::multiply_add_64);
  return std::fma(a, b, c);
}
inline float exp(float v) { return emulation::exp_off_by(2, v); }
inline double exp(double v) { return std::exp(v); }
inline float logf(float v) { return emulation::off_by(1, std::log(v)); }
inline float tanh(float v) {
  const float near = emulation::off_by(2, std::tanh(v));
  return std::fabs(near) > 1 ? std::copysign(1.0f, v) : near;
}
inline double tanh(double v) { return std::tanh(v); }

}  // namespace cpc::cuda

inline float rsqrtf(float v) { return cpc::cuda::emulation::off_by(2, 1 / std::sqrt(v)); }
inline float __expf(float v) {
  return cpc::cuda::emulation::exp_off_by(2 + static_cast<unsigned>(std::fmin(std::fabs(1.173f * v), 200.0f)), v);
}
inline float __fdividef(float a, float b) { return cpc::cuda::emulation::off_by(2, a / b); }
inline float __logf(float v) {
  // Near 1 the error is absolute, 2^-21.41.
  const float exact = std::log(v), above = 1 + std::fabs(exact);
  if (v < 0.5f || v > 2) return cpc::cuda::emulation::off_by(3, exact);
  return exact + (cpc::cuda::emulation::off_by(2, above) - above);
}

// --- The runtime ---
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidDevice };
using cudaStream_t = void*;
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : error == cudaErrorInvalidValue ? "invalid value" : "invalid device";
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = cpc::cuda::emulation::device_count();
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = cpc::cuda::emulation::current_device();
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cpc::cuda::emulation::device_count()) return cudaErrorInvalidDevice;
  cpc::cuda::emulation::set_current_device(device);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int device) {
  if (device < 0 || device >= cpc::cuda::emulation::device_count()) return cudaErrorInvalidDevice;
  const cpc::cuda::emulation::Device& of = cpc::cuda::emulation::device(device);
  *value = which == cudaDevAttrMultiProcessorCount ? of.multiprocessors : static_cast<int>(of.shared_bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  cpc::cuda::emulation::use_stream("filling memory", stream);
  cpc::cuda::emulation::tell([&](cpc::cuda::emulation::Observer& o) { o.fill(data, bytes); });
  std::memset(data, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {cpc::cuda::emulation::static_shared_bytes()};
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  const bool allowed = bytes >= 0 && cpc::cuda::emulation::allow_dynamic_shared(kernel, static_cast<size_t>(bytes));
  return allowed ? cudaSuccess : cudaErrorInvalidValue;
}

namespace cpc::cuda::emulation {

// Like cudaLaunchKernelEx, with the kernel's name for error messages.
template <class... Params, class... Args>
cudaError_t launch(const char* name, const cudaLaunchConfig_t& config, Blocks depend, void (*kernel)(Params...),
                   const Args&... args) {
  static_assert((sizeof(Params) + ... + 0) <= 4096, "more than the parameters of a kernel may take");
  run({name, reinterpret_cast<const void*>(kernel), config.gridDim, config.blockDim, config.dynamicSmemBytes,
       config.stream, depend},
      [&] { kernel(args...); });
  return cudaSuccess;
}

}  // namespace cpc::cuda::emulation
