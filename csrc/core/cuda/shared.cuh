// Shared memory of a block, dynamic and static.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cpc::cuda {

// The block's dynamic shared memory, 16-byte aligned.
__device__ inline unsigned char* dynamic_shared() {
#if defined(CPC_CUDA_EMULATION)
  return emulation::dynamic_shared();
#else
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
#endif
}

// A static shared variable of type T, one for each Tag: static_shared<float[8], struct Sums>().
template <class T, class Tag>
__device__ inline T& static_shared() {
#if defined(CPC_CUDA_EMULATION)
  return *reinterpret_cast<T*>(emulation::static_shared(emulation::StaticShared<T, Tag>::variable));
#else
  __shared__ T memory;
  return memory;
#endif
}

#if !defined(CPC_CUDA_EMULATION)
// An address in shared memory as PTX instructions take it.
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

}  // namespace cpc::cuda
