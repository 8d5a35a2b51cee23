// Device functions that kernels share: conversions of storage types, 16-byte vectors, division by a constant, sums over
// warps and blocks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "core/cuda/shared.cuh"
#include "core/tensor_view.h"

namespace cpc::cuda {

constexpr int kWarp = 32;

// The type in which values stored as T are summed.
template <class T>
using SumOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

// --- Storage types to the computing type or unchanged, and back with rounding to nearest even ---

template <class Real>
__device__ inline Real widen(uint8_t v) {
  return static_cast<Real>(v);
}
template <class Real>
__device__ inline Real widen(float v) {
  return static_cast<Real>(v);
}
template <class Real>
__device__ inline Real widen(double v) {
  return static_cast<Real>(v);
}
template <class Real>
__device__ inline Real widen(Half v) {
  if constexpr (std::is_same_v<Real, Half>)
    return v;
  else
    return static_cast<Real>(__half2float(__ushort_as_half(v.bits)));
}
template <class Real>
__device__ inline Real widen(BFloat16 v) {
  if constexpr (std::is_same_v<Real, BFloat16>)
    return v;
  else
    return static_cast<Real>(__bfloat162float(__ushort_as_bfloat16(v.bits)));
}

template <class Out>
struct Narrow {  // float and double
  template <class Real>
  __device__ static Out from(Real v) {
    return static_cast<Out>(v);
  }
};
template <>
struct Narrow<Half> {
  __device__ static Half from(float v) { return {__half_as_ushort(__float2half_rn(v))}; }
  __device__ static Half from(double v) { return {__half_as_ushort(__double2half(v))}; }
};
template <>
struct Narrow<BFloat16> {
  __device__ static BFloat16 from(float v) { return {__bfloat16_as_ushort(__float2bfloat16_rn(v))}; }
  __device__ static BFloat16 from(double v) { return {__bfloat16_as_ushort(__double2bfloat16(v))}; }
};

// Element i of an array whose type is known only at run time. The branch is uniform across threads.
template <class Real>
__device__ inline Real load_as(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::u8: return widen<Real>(static_cast<const uint8_t*>(data)[i]);
    case DType::f16: return widen<Real>(static_cast<const Half*>(data)[i]);
    case DType::bf16: return widen<Real>(static_cast<const BFloat16*>(data)[i]);
    case DType::f32: return widen<Real>(static_cast<const float*>(data)[i]);
    default: return widen<Real>(static_cast<const double*>(data)[i]);
  }
}

template <class Real>
__device__ inline void store_as(void* data, DType dtype, int64_t i, Real v) {
  switch (dtype) {
    case DType::f16: static_cast<Half*>(data)[i] = Narrow<Half>::from(v); return;
    case DType::bf16: static_cast<BFloat16*>(data)[i] = Narrow<BFloat16>::from(v); return;
    case DType::f32: static_cast<float*>(data)[i] = static_cast<float>(v); return;
    default: static_cast<double*>(data)[i] = v; return;
  }
}

// --- Vectors that a thread moves in one access ---

template <int kBytes>
__device__ inline void check_alignment([[maybe_unused]] const void* p) {
#if defined(CPC_CUDA_EMULATION)
  if (reinterpret_cast<uintptr_t>(p) % kBytes != 0)
    emulation::fail("access to " + std::to_string(kBytes) + " bytes at a misaligned address");
#endif
}

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// The N values at `p`, which must be aligned to as many bytes.
template <int N, class T>
__device__ inline const Pack<T, N>& pack_at(const T* p) {
  check_alignment<sizeof(T) * N>(p);
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <int N, class T>
__device__ inline Pack<T, N>& pack_at(T* p) {
  check_alignment<sizeof(T) * N>(p);
  return *reinterpret_cast<Pack<T, N>*>(p);
}

// N values loaded from `p`, which must be aligned as above. 16 bytes are held in a uint4, because otherwise the
// compiler would load the values one by one or unpack them as they arrive. std::bit_cast turns them into a Pack.
template <class T, int N>
using Arriving = std::conditional_t<sizeof(T) * N == sizeof(uint4), uint4, Pack<T, N>>;
template <int N, class T>
__device__ inline Arriving<T, N> arriving(const T* p) {
  check_alignment<sizeof(T) * N>(p);
  return *reinterpret_cast<const Arriving<T, N>*>(p);
}

// Loads N values `stride` apart, of which only the first `count` exist; the rest of `out` stays unchanged. Uses
// accesses of up to 16 bytes where the values are contiguous, all exist and are aligned.
template <int N, class T, class Real>
__device__ inline void load_run(Real (&out)[N], const T* from, int64_t stride, int count) {
  constexpr int kWide = N * sizeof(T) <= 16 ? N : 16 / sizeof(T);
  if (stride == 1 && count >= N && reinterpret_cast<uintptr_t>(from) % (kWide * sizeof(T)) == 0) {
#pragma unroll
    for (int i = 0; i < N; i += kWide) {
      const auto wide = pack_at<kWide>(from + i);
#pragma unroll
      for (int k = 0; k < kWide; ++k) out[i + k] = widen<Real>(wide.v[k]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) out[i] = widen<Real>(from[i * stride]);
  }
}

// Stores the first `count` of N values contiguously, with wide accesses under the same conditions.
template <int N, class T, class Real>
__device__ inline void store_run(T* to, const Real (&values)[N], int count) {
  constexpr int kWide = N * sizeof(T) <= 16 ? N : 16 / sizeof(T);
  if (count >= N && reinterpret_cast<uintptr_t>(to) % (kWide * sizeof(T)) == 0) {
#pragma unroll
    for (int i = 0; i < N; i += kWide) {
      Pack<T, kWide> wide;
#pragma unroll
      for (int k = 0; k < kWide; ++k) wide.v[k] = Narrow<T>::from(values[i + k]);
      pack_at<kWide>(to + i) = wide;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) to[i] = Narrow<T>::from(values[i]);
  }
}

// --- Division of 0 <= n < 2^31 by a divisor known at launch: a multiplication, an addition and a shift ---

class FastDivide {
 public:
  FastDivide() = default;
  explicit FastDivide(uint32_t divisor) : divisor_(divisor) {
    while ((uint64_t{1} << shift_) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift_) - divisor)) / divisor + 1);
  }
  __device__ uint32_t operator()(uint32_t n, uint32_t& remainder) const {
    const uint32_t quotient = (__umulhi(n, multiplier_) + n) >> shift_;
    remainder = n - quotient * divisor_;
    return quotient;
  }

 private:
  uint32_t divisor_ = 1, multiplier_ = 1, shift_ = 0;
};

// --- Warp and block ---

// The sum over the lanes of a warp, in every lane, in the same order on every run. All lanes must take part.
template <class Real>
__device__ inline Real warp_sum(Real v) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

// The sum over the threads of a one-dimensional block of `threads`, in every thread, in the same order on every run.
// All threads must take part.
template <int threads, class Real>
__device__ inline Real block_sum(Real v) {
  auto& of_warp = static_shared<Real[threads / kWarp], struct OfWarp>();
  v = warp_sum(v);
  __syncthreads();  // All threads have finished with of_warp from the call before.
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = v;
  __syncthreads();
  Real total = 0;
  for (int w = 0; w < threads / kWarp; ++w) total += of_warp[w];
  return total;
}

}  // namespace cpc::cuda
