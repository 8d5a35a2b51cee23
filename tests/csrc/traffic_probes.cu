// Kernels with known memory traffic, for test_traffic.py, which csrc/core/cuda/emulation/traffic.h counts.
// Runs in the emulation: traffic_probes NAME [BLOCKS_TO_RUN] prints the counts as JSON.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/device.h"
#include "core/cuda/emulation/trace.h"
#include "core/cuda/kernel.cuh"
#include "core/cuda/mma.cuh"
#include "print_value.h"

namespace cpc::cuda {
namespace {

constexpr int kValues = 1 << 14;

__device__ int thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// --- Device memory ---

__global__ void neighbours(float* values) { values[kValues / 2 + thread()] = values[thread()]; }
__global__ void every_other(float* values) { values[kValues / 2 + thread()] = values[2 * thread()]; }
__global__ void shifted(float* values) { values[kValues / 2 + thread()] = values[thread() + 1]; }
__global__ void one_for_all(float* values) { values[kValues / 2 + thread()] = values[0]; }
__global__ void vectors(float* values) {
  const float* const from = values;
  pack_at<4>(values + kValues / 2 + 4 * thread()) = pack_at<4>(from + 4 * thread());
}
__global__ void single_bytes(float* values) {
  auto* const bytes = reinterpret_cast<uint8_t*>(values);
  bytes[kValues + thread()] = bytes[thread()];
}
// Each lane reads as many values as its number.
__global__ void lanes_leave(float* values) {
  float sum = 0;
  for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) sum += values[i * kWarp + threadIdx.x];
  values[kValues / 2 + threadIdx.x] = sum;
}
__global__ void count(float* values) { atomicAdd(reinterpret_cast<int*>(values) + thread() / 2, 1); }
// All blocks read the first 256 values, twice, and each its own 256.
__global__ void blocks_share(float* values) {
  float sum = 0;
  for (int i = 0; i < 2; ++i) sum += values[threadIdx.x];
  values[kValues / 2 + thread()] = sum + values[256 + thread()];
}

// --- Shared memory ---

// Writes a column of 32 x 32 values whose rows are kPitch values apart.
template <int kPitch>
__global__ void column(float* values) {
  auto& tile = static_shared<float[kWarp * kPitch], std::integral_constant<int, kPitch>>();
  tile[threadIdx.x * kPitch] = values[threadIdx.x];
}
// Writes vectors of 8 or 16 bytes, kStride vectors apart.
template <int kWidth, int kStride>
__global__ void wide(float* values) {
  auto* const memory = reinterpret_cast<float*>(dynamic_shared());
  pack_at<kWidth>(memory + threadIdx.x * kWidth * kStride) = Pack<float, kWidth>{values[threadIdx.x]};
}
template <int kPitchBytes>
__global__ void matrices(float* values) {
  auto* const tile = dynamic_shared();
  uint32_t r[4];
  load_matrices(r, tile + threadIdx.x * kPitchBytes);
  float d[4] = {};
  const uint32_t b[2] = {r[0], r[1]};
  multiply_add<BFloat16>(d, r, b);
  multiply_add<float>(d, r, b);
  values[threadIdx.x] = d[0];
}
__global__ void arithmetic(float* values) {
  float sum = values[threadIdx.x];
  for (int i = 0; i < 3; ++i) sum = fma(sum, sum, 1.0f);
  values[threadIdx.x] = exp(sum) + __logf(sum) + static_cast<float>(fma(1.0, 2.0, 3.0));
}
// The source of the last eight lanes does not exist.
__global__ void copies(float* values) {
  auto* const memory = reinterpret_cast<float*>(dynamic_shared());
  copy_async<16>(memory + 4 * threadIdx.x, values + 4 * threadIdx.x, threadIdx.x % kWarp < 24);
  copy_async<4>(memory + 4 * blockDim.x + threadIdx.x, values + threadIdx.x);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  values[kValues / 2 + threadIdx.x] = memory[threadIdx.x] + warp_sum(1.f);
}

// --- The program ---

struct Probe {
  void (*kernel)(float*);
  unsigned blocks, threads;
};
const std::map<std::string, Probe> probes = {
    {"neighbours", {&neighbours, 2, 64}},
    {"every_other", {&every_other, 1, 64}},
    {"shifted", {&shifted, 1, 64}},
    {"one_for_all", {&one_for_all, 1, 64}},
    {"vectors", {&vectors, 1, 64}},
    {"single_bytes", {&single_bytes, 1, 64}},
    {"lanes_leave", {&lanes_leave, 1, 32}},
    {"count", {&count, 1, 64}},
    {"blocks_share", {&blocks_share, 16, 256}},
    {"column_of_32", {&column<32>, 1, 32}},
    {"column_of_33", {&column<33>, 1, 32}},
    {"column_of_34", {&column<34>, 1, 32}},
    {"wide_8", {&wide<2, 1>, 1, 32}},
    {"wide_8_apart", {&wide<2, 2>, 1, 32}},
    {"wide_16", {&wide<4, 1>, 1, 32}},
    {"wide_16_apart", {&wide<4, 2>, 1, 32}},
    {"matrices_80", {&matrices<80>, 1, 32}},
    {"matrices_64", {&matrices<64>, 1, 32}},
    {"arithmetic", {&arithmetic, 1, 64}},
    {"copies", {&copies, 1, 64}},
};

}  // namespace
}  // namespace cpc::cuda

int main(int argc, char** argv) {
  using namespace cpc::cuda;
  const auto found = probes.find(argc >= 2 ? argv[1] : "");
  if (found == probes.end()) {
    for (const auto& [name, probe] : probes) std::printf("%s\n", name.c_str());
    return 2;
  }
  const auto& [kernel, blocks, threads] = found->second;
  const auto values = std::make_unique<Pack<float, 32>[]>(kValues / 32);
  float* const data = values[0].v;
  emulation::begin_trace({{"traffic", {}}}, argc >= 3 ? std::strtoull(argv[2], nullptr, 10) : 0);
  launch(argv[1], kernel, {blocks, dim3(threads), 8 << 10}, nullptr, data);
  print(emulation::end_trace());
}
