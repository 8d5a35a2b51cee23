// Asynchronous copies whose last bytes may not exist: see async_copy.cuh.
#pragma once

#include "core/cuda/async_copy.cuh"

namespace cpc::cuda {

// Copies the first `valid` of kBytes bytes (4 or 16, with both addresses aligned to as many) and fills the rest with
// zeros. Nothing is read beyond the valid bytes.
#if defined(CPC_CUDA_EMULATION)
template <int kBytes>
void copy_part_async(void* to, const void* from, int valid, emulation::Where where = emulation::Where::current()) {
  static_assert(kBytes == 4 || kBytes == 16);
  emulation::copy_async(to, from, kBytes, static_cast<size_t>(valid), where);
}
#else
template <int kBytes>
__device__ inline void copy_part_async(void* to, const void* from, int valid) {
  static_assert(kBytes == 4 || kBytes == 16);
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
}
#endif

}  // namespace cpc::cuda
