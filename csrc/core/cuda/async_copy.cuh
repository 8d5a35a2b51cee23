// Asynchronous copies from global to shared memory (cp.async, compute capability 8.0).
// A thread's copies form groups: commit_copies() closes one, wait_for_copies<N>() waits until at most N are pending.
// Other threads see the copied values after a barrier.
#pragma once

#include "core/cuda/shared.cuh"

namespace cpc::cuda {

#if defined(CPC_CUDA_EMULATION)

template <int kBytes>
void copy_async(void* to, const void* from, bool exists = true, emulation::Where where = emulation::Where::current()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  emulation::copy_async(to, from, kBytes, exists ? kBytes : 0, where);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kGroups>
void wait_for_copies() {
  emulation::wait_for_copies(kGroups);
}

#else

// Copies kBytes (4, 8 or 16, with both addresses aligned to as many), or writes zeros where the source does not exist;
// `from` is then not read but must still be a valid address.
template <int kBytes>
__device__ inline void copy_async(void* to, const void* from, bool exists = true) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  const int valid = exists ? kBytes : 0;
  if constexpr (kBytes == 16)  // Bypasses the L1 cache, where these bytes would not be used again.
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)), "l"(from), "n"(kBytes),
                 "r"(valid)
                 : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

#endif

// Works on slices of a problem that pass through kStages stages of shared memory. Copies start kStages - 1 slices
// ahead: start(stage) starts a thread's copies of the next slice, or returns false where there is none left, and
// use(stage) works on a slice. All threads of a block must have the same number of slices.
template <int kStages, class Start, class Use>
__device__ void pipeline(const Start& start, const Use& use) {
  int started = 0;
  const auto start_next = [&] {
    if (start(started % kStages)) ++started;
    commit_copies();  // The group is empty where no slice is left, so that wait_for_copies counts the same groups.
  };
  for (int i = 0; i < kStages - 1; ++i) start_next();
  for (int slice = 0; slice < started; ++slice) {
    wait_for_copies<kStages - 2>();
    __syncthreads();  // All threads see this slice, and have finished reading the one before.
    start_next();
    use(slice % kStages);
  }
}

}  // namespace cpc::cuda
