// Kernels with one fault each, which test_machine_code.py must find in their machine code, and kernels without.
#include <cstdint>

#include "core/cuda/kernel.cuh"
#include "core/cuda/mma.cuh"

using namespace cpc;
using namespace cpc::cuda;

// Keeping 16 bytes by reference and using only their parts gives 8 narrow loads in place of one wide load.
__global__ void split_by_reference(const BFloat16* from, float* to, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const auto& values = pack_at<8>(from + 8 * i);
    for (int k = 0; k < 8; ++k) to[8 * i + k] = 2 * widen<float>(values.v[k]);
  }
}
__global__ void whole_by_value(const BFloat16* from, float* to, int n) {
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const auto values = pack_at<8>(from + 8 * i);
    for (int k = 0; k < 8; ++k) to[8 * i + k] = 2 * widen<float>(values.v[k]);
  }
}

// Single loads, each under a condition of its own, are not a split wide load.
__global__ void single_at_an_edge(const BFloat16* from, float* to, int n) {
  for (int i = threadIdx.x; 8 * i < n; i += blockDim.x)
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (8 * i + k < n) to[8 * i + k] = 2 * widen<float>(from[8 * i + k]);
}

// An array that is indexed by a variable is placed in local memory.
__global__ void local_array(const int* from, int* to, int n, int step) {
  int counts[16] = {};
  for (int i = 0; i < n; ++i) ++counts[from[i * step] & 15];
  for (int k = 0; k < 16; ++k) to[k] = counts[k];
}

// Accesses memory that is known to be shared or global only at run time.
__global__ void generic_access(int* memory, int* to, bool shared) {
  int* const at = shared ? reinterpret_cast<int*>(dynamic_shared()) : memory;
  at[threadIdx.x] = threadIdx.x;
  __syncthreads();
  to[threadIdx.x] = at[threadIdx.x ^ 1];
}

__global__ void long_division(const int64_t* from, int64_t* to, int64_t by) {
  to[threadIdx.x] = from[threadIdx.x] / by;
}

// The next operand is loaded while one is multiplied, unless kAtOnce uses it immediately.
template <bool kAtOnce>
__global__ void prefetch(const float* from, float* to, int n) {
  float d[4] = {}, next = from[threadIdx.x];
#pragma unroll 1
  for (int i = 1; i < n; ++i) {
    const uint32_t now = to_tf32(next), a[4] = {now, now, now, now}, b[2] = {now, now};
    next = from[i * 32 + threadIdx.x];
    if (kAtOnce)
      while (next > 1) next *= 0.5f;
    for (int k = 0; k < 4; ++k) multiply_add<float>(d, a, b);
  }
  to[threadIdx.x] = d[0] + d[1] + d[2] + d[3] + next;
}
template __global__ void prefetch<true>(const float*, float*, int);
template __global__ void prefetch<false>(const float*, float*, int);
