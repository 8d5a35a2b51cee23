// Barriers among blocks of a launch that run at the same time.
#pragma once

#include <cuda_runtime.h>

namespace cpc::cuda {

// Waits until all threads of `blocks` blocks have arrived; then each sees what the others have written. `arrived` is a
// word in global memory that is zero before its first use and that only these blocks use. Exactly one of them must pass
// `first`. The launch must be one with Blocks::together.
__device__ inline void wait_for_blocks(unsigned* arrived, unsigned blocks, bool first) {
#if defined(CPC_CUDA_EMULATION)
  static_cast<void>(first);
  emulation::wait_for_blocks(arrived, blocks);
#else
  __syncthreads();
  if (threadIdx.x == 0 && blocks > 1) {
    // What all blocks add sums up to flipping the highest bit, and leaves the other bits zero for the next barrier.
    constexpr unsigned kFlips = 1u << 31;
    __threadfence();
    const unsigned before = atomicAdd(arrived, first ? kFlips - (blocks - 1) : 1u);
    while (((*static_cast<volatile unsigned*>(arrived) ^ before) & kFlips) == 0) {
    }
    __threadfence();
  }
  __syncthreads();
#endif
}

}  // namespace cpc::cuda
