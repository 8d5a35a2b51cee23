// Small kernels for csrc/core/cuda/emulation/races.h, run by test_races.py. Each has two forms: one with a race, and
// one in which something orders the accesses. The racing lines are marked.
//   race_probes NAME            runs the form with a race
//   race_probes NAME ordered    runs the other form
// Prints "no race" and exits with 0, or prints the races and exits with 1.
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/block_barrier.cuh"
#include "core/cuda/device.h"
#include "core/cuda/kernel.cuh"
#include "core/cuda/mma.cuh"

namespace cpc::cuda {
namespace {

constexpr int kThreads = 128, kValues = 4096;

__device__ int own_lane() { return static_cast<int>(threadIdx.x) % kWarp; }

// --- Threads of a block ---

template <bool kOrdered>
__global__ void lost_update(int* data) {
  auto& count = static_shared<int, struct Count>();
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  if (kOrdered)
    atomicAdd(&count, 1);
  else
    count = count + 1;  // RACE
  __syncthreads();
  if (threadIdx.x == 0) data[0] = count;
}

template <bool kOrdered>
__global__ void same_value(int* data) {
  auto& value = static_shared<int, struct Value>();
  if (!kOrdered || threadIdx.x == 0) value = 7;  // RACE
  __syncthreads();
  data[threadIdx.x] = value;
}

template <bool kOrdered>
__global__ void write_then_read(int* data) {
  auto& values = static_shared<int[kThreads], struct Values>();
  const unsigned i = threadIdx.x;
  values[i] = data[i];  // RACE
  if (kOrdered) __syncthreads();
  data[i] = values[kThreads - 1 - i];  // RACE
}

template <bool kOrdered>
__global__ void read_then_write(int* data) {
  auto& values = static_shared<int[kThreads], struct Values>();
  const unsigned i = threadIdx.x;
  values[i] = data[i];
  __syncthreads();
  const int other = values[kThreads - 1 - i];  // RACE
  if (kOrdered) __syncthreads();
  values[i] = other;  // RACE
}

// All threads read, then one writes: the detector must not forget a reader in favour of another.
template <bool kOrdered>
__global__ void many_readers(int* data) {
  auto& value = static_shared<int, struct Value>();
  if (threadIdx.x == 70) value = data[0];
  __syncthreads();
  data[threadIdx.x] = value;  // RACE
  if (kOrdered) __syncthreads();
  if (threadIdx.x == 70) value = 3;  // RACE
}

// Each thread writes one of neighbouring bytes; then some threads write vectors of them.
template <bool kOrdered>
__global__ void neighbours(int* data) {
  auto& bytes = static_shared<Pack<uint8_t, 16>[kThreads / 16], struct Bytes>();
  auto* const all = reinterpret_cast<uint8_t*>(&bytes);
  all[threadIdx.x] = static_cast<uint8_t>(threadIdx.x);  // RACE
  if (kOrdered) __syncthreads();
  if (threadIdx.x < kThreads / 16) bytes[threadIdx.x] = pack_at<16>(reinterpret_cast<uint8_t*>(data));  // RACE
}

template <bool kOrdered>
__global__ void atomic_and_plain(int* data) {
  auto& count = static_shared<int, struct Count>();
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);  // RACE
  if (kOrdered) __syncthreads();
  if (threadIdx.x == 5) data[0] = count;  // RACE
}

// --- Lanes of a warp ---

enum class Between { shuffle, vote, product, half_masks, other_warp };

// The operation of a warp between a write and the read by another lane.
template <bool kOrdered, Between between>
__device__ int after(int lane) {
  int given = 0;
  if (between == Between::shuffle) given = __shfl_xor_sync(0xffffffffu, lane, 16);
  if (between == Between::vote) given = __any_sync(0xffffffffu, lane == 3);
  if (between == Between::product) {
    float sums[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    multiply_add<BFloat16>(sums, a, b);
    given = static_cast<int>(sums[0]);
  }
  if (between == Between::half_masks) __syncwarp(lane < 16 ? 0xffffu : 0xffff0000u);
  if (between == Between::other_warp) __syncwarp();
  if (kOrdered && between == Between::other_warp) __syncthreads();
  if (kOrdered) __syncwarp();
  return given;
}

template <bool kOrdered, Between between>
__global__ void no_fence(int* data) {
  auto& values = static_shared<int[kThreads], struct Values>();
  const int i = static_cast<int>(threadIdx.x), lane = own_lane();
  values[i] = data[i];  // RACE
  const int given = after<kOrdered, between>(lane);
  const int other = between == Between::other_warp ? kThreads - 1 - i : i ^ 16;
  data[i] = given + values[other];  // RACE
}

// Each lane writes the row whose address it gives, but other lanes receive it.
template <bool kOrdered>
__global__ void rows_before_load(int* data) {
  auto& rows = static_shared<Pack<int, 4>[kWarp], struct Rows>();
  const int lane = own_lane();
  for (int i = 0; i < 4; ++i) rows[lane].v[i] = data[lane];  // RACE
  if (kOrdered) __syncwarp();
  uint32_t r[4];
  load_matrices(r, &rows[lane]);  // RACE
  data[lane] = static_cast<int>(r[0]);
}

template <bool kOrdered>
__global__ void rows_after_load(int* data) {
  auto& rows = static_shared<Pack<int, 4>[kWarp], struct Rows>();
  const int lane = own_lane();
  for (int i = 0; i < 4; ++i) rows[lane].v[i] = data[lane];
  __syncwarp();
  uint32_t r[4];
  load_matrices<true>(r, &rows[lane]);  // RACE
  if (kOrdered) __syncwarp();
  rows[lane].v[0] = static_cast<int>(r[3]);  // RACE
}

// Lane 0 is ordered before lane 2 through lane 1.
template <bool kOrdered>
__global__ void chain_of_masks(int* data) {
  auto& value = static_shared<int, struct Value>();
  const int lane = own_lane();
  if (lane == 0) value = data[0];  // RACE
  if (kOrdered && lane < 2) __syncwarp(3);
  if (lane == 1 || lane == 2) __syncwarp(6);
  if (lane == 2) data[1] = value;  // RACE
}

// --- Asynchronous copies ---

template <bool kOrdered>
__global__ void read_before_wait(int* data) {
  auto& values = static_shared<Pack<int, 4>[kThreads], struct Packs>();
  copy_async<16>(&values[threadIdx.x], data + 4 * threadIdx.x);  // RACE
  commit_copies();
  if (kOrdered) wait_for_copies<0>();
  data[4 * kThreads + threadIdx.x] = values[threadIdx.x].v[1];  // RACE
  wait_for_copies<0>();
}

template <bool kOrdered>
__global__ void read_of_later_group(int* data) {
  auto& values = static_shared<Pack<int, 4>[2][kThreads], struct Stages>();
  for (int s = 0; s < 2; ++s) {
    copy_async<16>(&values[s][threadIdx.x], data + 4 * (s * kThreads + threadIdx.x));  // RACE
    commit_copies();
  }
  if (kOrdered)
    wait_for_copies<0>();
  else
    wait_for_copies<1>();
  __syncthreads();
  const int value = values[1][threadIdx.x].v[0];  // RACE
  wait_for_copies<0>();
  data[4 * threadIdx.x] = value;
}

template <bool kOrdered>
__global__ void read_of_others_copy(int* data) {
  auto& values = static_shared<Pack<int, 4>[kThreads], struct Packs>();
  copy_async<16>(&values[threadIdx.x], data + 4 * threadIdx.x);  // RACE
  commit_copies();
  wait_for_copies<0>();
  if (kOrdered) __syncthreads();
  data[4 * kThreads + threadIdx.x] = values[kThreads - 1 - threadIdx.x].v[2];  // RACE
}

// A barrier orders nothing if the copying thread has not waited for its copy.
template <bool kOrdered>
__global__ void barrier_without_wait(int* data) {
  auto& values = static_shared<Pack<int, 4>[kThreads], struct Packs>();
  copy_async<16>(&values[threadIdx.x], data + 4 * threadIdx.x);  // RACE
  commit_copies();
  if (kOrdered) wait_for_copies<0>();
  __syncthreads();
  data[4 * kThreads + threadIdx.x] = values[kThreads - 1 - threadIdx.x].v[2];  // RACE
  wait_for_copies<0>();
}

template <bool kOrdered>
__global__ void source_overwritten(int* data) {
  auto& values = static_shared<Pack<int, 4>[kThreads], struct Packs>();
  copy_async<16>(&values[threadIdx.x], data + 4 * threadIdx.x);  // RACE
  commit_copies();
  if (kOrdered) wait_for_copies<0>();
  data[4 * threadIdx.x + 3] = 1;  // RACE
  wait_for_copies<0>();
}

template <bool kOrdered>
__global__ void destination_overwritten(int* data) {
  auto& values = static_shared<Pack<int, 4>[kThreads], struct Packs>();
  copy_async<16>(&values[threadIdx.x], data + 4 * threadIdx.x);  // RACE
  commit_copies();
  if (kOrdered) wait_for_copies<0>();
  values[threadIdx.x].v[3] = 1;  // RACE
  wait_for_copies<0>();
}

template <bool kOrdered>
__global__ void two_copies_to_one_place(int* data) {
  auto& values = static_shared<Pack<int, 4>[kThreads], struct Packs>();
  for (int s = 0; s < 2; ++s) {
    copy_async<16>(&values[threadIdx.x], data + 4 * (s * kThreads + threadIdx.x));  // RACE
    commit_copies();
    if (kOrdered) wait_for_copies<0>();
  }
  wait_for_copies<0>();
}

// Slices pass through two stages of shared memory, each read by other threads than those that wrote it.
template <bool kOrdered>
__global__ void pipeline_of_two(int* data) {
  auto& values = static_shared<Pack<int, 4>[2][kThreads], struct Stages>();
  constexpr int kSlices = kValues / 4 / kThreads;
  int sum = 0;
  const auto start = [&](int slice) {
    if (slice < kSlices) {
      const int* const from = data + 4 * (slice * kThreads + static_cast<int>(threadIdx.x));
      copy_async<16>(&values[slice % 2][threadIdx.x], from);  // RACE
    }
    commit_copies();
  };
  start(0);
  for (int slice = 0; slice < kSlices; ++slice) {
    start(slice + 1);
    wait_for_copies<1>();
    __syncthreads();
    sum += values[slice % 2][kThreads - 1 - threadIdx.x].v[0];  // RACE
    if (kOrdered) __syncthreads();                              // The stage is free.
  }
  __syncthreads();
  data[threadIdx.x] = sum;
}

// --- Blocks ---

template <bool kOrdered>
__global__ void update_by_blocks(int* data) {
  if (kOrdered)
    atomicAdd(data, 1);
  else
    data[0] = data[0] + 1;  // RACE
}

template <bool kOrdered>
__global__ void read_by_blocks(int* data) {
  const unsigned own = blockIdx.x * kThreads + threadIdx.x;
  const int other = data[kOrdered ? own : kValues / 2 - 1 - own];  // RACE
  data[own] = other;                                               // RACE
}

template <bool kOrdered>
__global__ void copied_by_blocks(int* data) {
  auto& values = static_shared<Pack<int, 4>[kThreads], struct Packs>();
  if (kOrdered || blockIdx.x % 2 == 0) copy_async<16>(&values[threadIdx.x], data + 4 * threadIdx.x);  // RACE
  commit_copies();
  wait_for_copies<0>();
  if (!kOrdered && blockIdx.x % 2 == 1) data[4 * threadIdx.x + 2] = 1;  // RACE
}

// --- Blocks that run together ---

// Four blocks in two pairs, each pair with a word for its barrier.
__device__ unsigned* barrier_of(int* data, unsigned pair) {
  return reinterpret_cast<unsigned*>(data) + kValues - 1 - pair;
}

template <bool kOrdered>
__global__ void no_wait_for_blocks(int* data) {
  const unsigned own = blockIdx.x * kThreads + threadIdx.x, other = (blockIdx.x ^ 1) * kThreads + threadIdx.x;
  for (int round = 0; round < 2; ++round) {
    data[own] = round;  // RACE
    if (kOrdered) wait_for_blocks(barrier_of(data, blockIdx.x / 2), 2, blockIdx.x % 2 == 0);
    data[kValues / 2 + own] = data[other];  // RACE
    wait_for_blocks(barrier_of(data, blockIdx.x / 2), 2, blockIdx.x % 2 == 0);
  }
}

template <bool kOrdered>
__global__ void wait_for_other_blocks(int* data) {
  const unsigned first = kOrdered ? blockIdx.x / 2 * 2 : 0;
  if (blockIdx.x % 2 == 0) data[blockIdx.x * kThreads + threadIdx.x] = 1;  // RACE
  wait_for_blocks(barrier_of(data, blockIdx.x / 2), 2, blockIdx.x % 2 == 0);
  data[kValues / 2 + blockIdx.x * kThreads + threadIdx.x] = data[first * kThreads + threadIdx.x];  // RACE
}

// --- The program ---

using Kernel = void (*)(int*);

struct Probe {
  Kernel racing, ordered;
  unsigned blocks = 1, threads = kThreads;
  Blocks depend = Blocks::apart;
};

#define CPC_PROBE(kernel, ...)                                \
  {                                                           \
    #kernel, { &kernel<false>, &kernel<true>, ##__VA_ARGS__ } \
  }
#define CPC_NO_FENCE(between, ...)                                                                                 \
  {                                                                                                                \
    "no_fence_" #between, { &no_fence<false, Between::between>, &no_fence<true, Between::between>, ##__VA_ARGS__ } \
  }

const std::map<std::string, Probe> probes = {
    CPC_PROBE(lost_update),
    CPC_PROBE(same_value),
    CPC_PROBE(write_then_read),
    CPC_PROBE(read_then_write),
    CPC_PROBE(many_readers),
    CPC_PROBE(neighbours),
    CPC_PROBE(atomic_and_plain),
    CPC_NO_FENCE(shuffle),
    CPC_NO_FENCE(vote),
    CPC_NO_FENCE(product),
    CPC_NO_FENCE(half_masks),
    CPC_NO_FENCE(other_warp),
    CPC_PROBE(rows_before_load, 1, kWarp),
    CPC_PROBE(rows_after_load, 1, kWarp),
    CPC_PROBE(chain_of_masks, 1, kWarp),
    CPC_PROBE(read_before_wait),
    CPC_PROBE(read_of_later_group),
    CPC_PROBE(read_of_others_copy),
    CPC_PROBE(barrier_without_wait),
    CPC_PROBE(source_overwritten),
    CPC_PROBE(destination_overwritten),
    CPC_PROBE(two_copies_to_one_place),
    CPC_PROBE(pipeline_of_two),
    CPC_PROBE(update_by_blocks, 5),
    CPC_PROBE(read_by_blocks, kValues / 2 / kThreads),
    CPC_PROBE(copied_by_blocks, 4),
    CPC_PROBE(no_wait_for_blocks, 4, kThreads, Blocks::together),
    CPC_PROBE(wait_for_other_blocks, 4, kThreads, Blocks::together),
};

// Launches twice, because successive launches are ordered and must not race.
void run(const std::string& name, const Probe& probe, bool ordered) {
  const auto data = std::make_unique<Pack<int, 4>[]>(kValues / 4);
  int* const values = data[0].v;
  std::iota(values, values + kValues, 0);
  emulation::set_devices({{emulation::kSharedBytes, 4}});
  emulation::begin_trace({{"races", {}}}, 0);
  for (int i = 0; i < 2; ++i)
    launch(name.c_str(), ordered ? probe.ordered : probe.racing, {probe.blocks, dim3(probe.threads), 0, probe.depend},
           nullptr, values);
}

}  // namespace
}  // namespace cpc::cuda

int main(int argc, char** argv) {
  const auto found = cpc::cuda::probes.find(argc >= 2 ? argv[1] : "");
  if (found == cpc::cuda::probes.end()) {
    for (const auto& [name, probe] : cpc::cuda::probes) std::printf("%s\n", name.c_str());
    return 2;
  }
  try {
    cpc::cuda::run(found->first, found->second, argc == 3 && std::strcmp(argv[2], "ordered") == 0);
    std::printf("no race\n");
    return 0;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
