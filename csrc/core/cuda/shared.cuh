// Shared memory of a block, dynamic and static.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace cpc::cuda {

// The block's dynamic shared memory, which begins at a multiple of kAlignment bytes.
template <int kAlignment = 16>
__device__ inline unsigned char* dynamic_shared() {
#if defined(CPC_CUDA_EMULATION)
  return emulation::dynamic_shared();
#else
  static_assert(kAlignment == 16 || kAlignment == 1024);
  if constexpr (kAlignment == 16) {  // One variable per alignment; both begin at the same address.
    extern __shared__ __align__(16) unsigned char memory[];
    return memory;
  } else {
    extern __shared__ __align__(1024) unsigned char aligned_memory[];
    return aligned_memory;
  }
#endif
}

// A static shared variable of type T, one per Tag: static_shared<float[8], struct Sums>().
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
// An address in shared memory in the form that PTX instructions take.
__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

}  // namespace cpc::cuda
