// Small kernels that use csrc/core/cuda, some correct and some with a planted fault, run by test_emulation.py:
//   emulation_check NAME    prints "right" or "wrong" and exits with 0;
//                           an error of the kernel is printed and exits with 1.
// Compiled for the emulation and, where there is a GPU, by nvcc. Correct kernels must be right on both.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/block_barrier.cuh"
#include "core/cuda/device.h"
#include "core/cuda/kernel.cuh"
#include "core/cuda/mma.cuh"

namespace cpc::cuda {
namespace {

constexpr int kThreads = 128;

// Memory that host and device share.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t n, const std::function<T(size_t)>& value = [](size_t) { return T{}; }) : n_(n) {
#if defined(CPC_CUDA_EMULATION)
    data_ = new (std::align_val_t{64}) T[n];
#else
    check(cudaMallocManaged(&data_, n * sizeof(T)), "allocating");
#endif
    for (size_t i = 0; i < n; ++i) data_[i] = value(i);
  }
  ~Buffer() {
#if defined(CPC_CUDA_EMULATION)
    ::operator delete[](data_, std::align_val_t{64});
#else
    cudaFree(data_);
#endif
  }
  Buffer(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  size_t size() const { return n_; }

 private:
  T* data_;
  size_t n_;
};

bool holds(size_t n, const std::function<bool(size_t)>& right) {
  check(cudaDeviceSynchronize(), "running a kernel");
  for (size_t i = 0; i < n; ++i)
    if (!right(i)) return false;
  return true;
}

// --- Barriers and shared memory ---

// Reverses each block's values, in two rounds. Each barrier can be left out, as a fault.
__global__ void reverse(const float* in, float* out, bool first_barrier, bool second_barrier) {
  auto* const values = reinterpret_cast<float*>(dynamic_shared());
  for (int round = 0; round < 2; ++round) {
    const int at = (static_cast<int>(blockIdx.x) * 2 + round) * kThreads, i = static_cast<int>(threadIdx.x);
    values[i] = in[at + i];
    if (first_barrier) __syncthreads();
    out[at + i] = values[kThreads - 1 - i];
    if (second_barrier) __syncthreads();
  }
}

bool run_reverse(bool first_barrier, bool second_barrier) {
  const Buffer<float> in(4 * kThreads, [](size_t i) { return static_cast<float>(i); }), out(4 * kThreads);
  launch("reverse", &reverse, {2, dim3(kThreads), kThreads * sizeof(float)}, nullptr, in.get(), out.get(),
         first_barrier, second_barrier);
  return holds(in.size(),
               [&](size_t i) { return out[i] == in[i / kThreads * kThreads + kThreads - 1 - i % kThreads]; });
}

__global__ void sum_of_blocks(const float* in, float* out) {
  const float total = block_sum<kThreads>(in[blockIdx.x * kThreads + threadIdx.x]);
  out[blockIdx.x * kThreads + threadIdx.x] = total;
}

bool run_sum() {
  const Buffer<float> in(3 * kThreads, [](size_t i) { return static_cast<float>(i % 7); }), out(3 * kThreads);
  launch("sum_of_blocks", &sum_of_blocks, {3, dim3(kThreads)}, nullptr, in.get(), out.get());
  return holds(out.size(), [&](size_t i) {
    float total = 0;
    for (int j = 0; j < kThreads; ++j) total += in[i / kThreads * kThreads + j];
    return out[i] == total;
  });
}

__global__ void barrier_in_a_branch(float* out) {
  if (threadIdx.x < 70)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void barrier_after_a_return(float* out) {
  if (threadIdx.x == 77) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void read_before_write(float* out) {
  const auto& value = static_shared<float, struct NeverWritten>();
  out[threadIdx.x] = value;
}

bool run_plain(const char* name, void (*kernel)(float*)) {
  const Buffer<float> out(kThreads);
  launch(name, kernel, {1, dim3(kThreads)}, nullptr, out.get());
  return holds(out.size(), [&](size_t i) { return out[i] == 1; });
}

// --- Addresses ---

__global__ void shift_left(const float* in, float* out, int n, int by) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < n) out[i] = in[i + by];
}

bool run_shift(int by) {
  const Buffer<float> in(100, [](size_t i) { return static_cast<float>(i); }), out(100);
  launch("shift_left", &shift_left, {1, dim3(kThreads)}, nullptr, in.get(), out.get(), 100, by);
  return holds(out.size(), [&](size_t i) { return out[i] == static_cast<float>(i) + static_cast<float>(by); });
}

__global__ void shared_write(float* out, int last) {
  auto* const values = reinterpret_cast<float*>(dynamic_shared());
  if (static_cast<int>(threadIdx.x) <= last) values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = 1;
}

bool run_shared_write(int last) {
  const Buffer<float> out(kThreads);
  launch("shared_write", &shared_write, {1, dim3(kThreads), 64 * sizeof(float)}, nullptr, out.get(), last);
  return holds(out.size(), [&](size_t i) { return out[i] == 1; });
}

__global__ void copy_packs(const float* in, float* out, int from) {
  const auto i = static_cast<int>(threadIdx.x);
  if (i < 8) pack_at<4>(out + 4 * i) = pack_at<4>(in + 4 * i + from);
}

bool run_copy_packs(int from) {
  const Buffer<float> in(40, [](size_t i) { return static_cast<float>(i); }), out(32);
  launch("copy_packs", &copy_packs, {1, dim3(kThreads)}, nullptr, in.get(), out.get(), from);
  return holds(out.size(), [&](size_t i) { return out[i] == in[i + from]; });
}

// --- Limits of a device ---

struct Large {
  unsigned char bytes[8 << 10];
};

// Each thread's number, through static and through dynamic shared memory.
__global__ void __launch_bounds__(kThreads / 2) static_and_dynamic(float* out, int dynamic_bytes) {
  auto& in_static = static_shared<Large, struct OfBlock>();
  unsigned char* const in_dynamic = dynamic_shared() + dynamic_bytes - kThreads;
  const unsigned i = threadIdx.x, other = blockDim.x - 1 - i;
  in_static.bytes[sizeof(Large) - kThreads + i] = in_dynamic[i] = static_cast<unsigned char>(i);
  __syncthreads();
  out[i] = in_static.bytes[sizeof(Large) - kThreads + other] == other && in_dynamic[other] == other ? 1 : 0;
}

bool run_static_and_dynamic(int64_t dynamic_bytes, unsigned threads = kThreads / 2) {
  const Buffer<float> out(threads);
  launch("static_and_dynamic", &static_and_dynamic, {1, dim3(threads), dynamic_bytes}, nullptr, out.get(),
         static_cast<int>(dynamic_bytes));
  return holds(out.size(), [&](size_t i) { return out[i] == 1; });
}

template <class T>
__global__ void __launch_bounds__(kThreads) write_ones(T* out) {
  out[threadIdx.x] = 1;
}

// Launches without the checks and the opt-in of launch().
template <class... Params, class... Args>
void launch_as_given(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, int64_t shared_bytes,
                     void* stream, Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
#if defined(CPC_CUDA_EMULATION)
  check(emulation::launch(name, config, Blocks::apart, kernel, args...), name);
#else
  check(cudaLaunchKernelEx(&config, kernel, args...), name);
#endif
}

bool run_as_given(dim3 grid, dim3 block, void* stream = nullptr) {
  const Buffer<float> out(kThreads);
  launch_as_given("write_ones", &write_ones<float>, grid, block, 0, stream, out.get());
  return holds(out.size(), [&](size_t i) { return out[i] == 1; });
}

bool run_without_asking(int64_t dynamic_bytes) {
  const Buffer<float> out(kThreads / 2);
  launch_as_given("static_and_dynamic", &static_and_dynamic, dim3(1), dim3(kThreads / 2), dynamic_bytes, nullptr,
                  out.get(), static_cast<int>(dynamic_bytes));
  return holds(out.size(), [&](size_t i) { return out[i] == 1; });
}

// Opts in to the whole limit, without subtracting the static variables.
bool run_asking_for_too_much() {
  const int limit = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(&static_and_dynamic),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, limit),
        "asking for shared memory");
  return run_without_asking(limit);
}

bool run_on_a_stream_of_another_device() {
#if defined(CPC_CUDA_EMULATION)
  emulation::set_devices({{}, {}});
  return run_as_given(dim3(1), dim3(kThreads), emulation::stream_of(1));
#else
  return false;
#endif
}

// --- Blocks that run together ---

// Each block sums what all blocks have written, round after round, in shared memory that it keeps.
__global__ void sum_of_all_blocks(int* data, unsigned* arrived, unsigned waited_for, unsigned absent) {
  int* const sum = reinterpret_cast<int*>(dynamic_shared()) + threadIdx.x;
  if (blockIdx.x == absent) return;
  *sum = 0;
  for (int round = 0; round < 3; ++round) {
    data[blockIdx.x * kThreads + threadIdx.x] = static_cast<int>(blockIdx.x + 1) + round;
    wait_for_blocks(arrived, waited_for, blockIdx.x == 0);
    for (unsigned block = 0; block < gridDim.x; ++block) *sum += data[block * kThreads + threadIdx.x];
    wait_for_blocks(arrived, waited_for, blockIdx.x == 0);
  }
  data[blockIdx.x * kThreads + threadIdx.x] = *sum;
}

bool run_blocks(Blocks depend, unsigned blocks = 2, unsigned absent = 9) {
  const Buffer<int> data(kThreads * blocks);
  const Buffer<unsigned> arrived(1);
  arrived[0] = 0;
  launch("sum_of_all_blocks", &sum_of_all_blocks, {blocks, dim3(kThreads), kThreads * sizeof(int), depend}, nullptr,
         data.get(), arrived.get(), blocks, absent);
  return holds(data.size(), [&](size_t i) { return data[i] == 3 + 5 + 7; });
}

// --- Warps ---

__global__ void shuffles(int* out) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  int total = __shfl_xor_sync(0xffffffffu, lane, 5) == (lane ^ 5);
  total += __shfl_sync(0xffffffffu, lane, 3) == 3;
  total += __shfl_sync(0xffffffffu, lane, 3, 8) == lane / 8 * 8 + 3;
  total += __shfl_down_sync(0xffffffffu, lane, 2) == (lane < 30 ? lane + 2 : lane);
  total += __shfl_up_sync(0xffffffffu, lane, 2) == (lane < 2 ? lane : lane - 2);
  total += __ballot_sync(0xffffffffu, lane % 3 == 0) == 0x49249249u;
  total += __any_sync(0xffffffffu, lane == 9) && !__any_sync(0xffffffffu, lane == 32);
  total += __all_sync(0xffffffffu, lane < 32) && !__all_sync(0xffffffffu, lane < 31);
  total += __match_any_sync(0xffffffffu, static_cast<unsigned>(lane % 3)) == 0x49249249u << lane % 3;
  if (lane < 16) total += __shfl_xor_sync(0xffffu, lane, 1) == (lane ^ 1);
  __syncwarp();
  atomicAdd(out + threadIdx.x / kWarp, total);
  atomicMax(out + 4, lane);
}

bool run_shuffles() {
  const Buffer<int> out(5);
  launch("shuffles", &shuffles, {1, dim3(kThreads)}, nullptr, out.get());
  return holds(5, [&](size_t i) { return out[i] == (i == 4 ? 31 : 32 * 9 + 16); });
}

__global__ void shuffle_in_a_branch(float* out) {
  float v = 1;
  if (threadIdx.x % kWarp < 20) v = __shfl_xor_sync(0xffffffffu, v, 1);
  out[threadIdx.x] = v;
}

// --- Asynchronous copies ---

__global__ void staged_copy(const float* in, float* out, bool waits) {
  auto* const stages = reinterpret_cast<float*>(dynamic_shared());
  const int i = static_cast<int>(threadIdx.x);
  for (int s = 0; s < 2; ++s) {
    copy_async<16>(stages + (s * kThreads + i) * 4, in + (s * kThreads + i) * 4, i != 5);
    commit_copies();
  }
  if (waits)
    wait_for_copies<0>();
  else
    wait_for_copies<1>();
  __syncthreads();
  const int other = kThreads - 1 - i;
  for (int s = 0; s < 2; ++s)
    for (int k = 0; k < 4; ++k) out[(s * kThreads + other) * 4 + k] = stages[(s * kThreads + other) * 4 + k];
}

bool run_staged_copy(bool waits) {
  const Buffer<float> in(8 * kThreads, [](size_t i) { return static_cast<float>(i); }), out(8 * kThreads);
  launch("staged_copy", &staged_copy, {1, dim3(kThreads), 8 * kThreads * sizeof(float)}, nullptr, in.get(), out.get(),
         waits);
  return holds(out.size(), [&](size_t i) { return out[i] == (i / 4 % kThreads == 5 ? 0 : in[i]); });
}

// --- Tensor cores: D[16][8] = A[16][K] B[K][8], small integers, which all types hold exactly ---

__global__ void product_of_halves(const uint16_t* a, const uint16_t* b, float* d, DType dtype, int fault) {
  auto* const tiles = reinterpret_cast<uint16_t*>(dynamic_shared());
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 256; i += kWarp) tiles[i] = a[i];        // [16][16]
  for (unsigned i = lane; i < 128; i += kWarp) tiles[256 + i] = b[i];  // [16][8]
  __syncwarp();
  uint32_t of_a[4], of_b[4];
  // Matrices of A: rows 0..7 and 8..15 of columns 0..7, then of columns 8..15.
  load_matrices(of_a, tiles + (lane % 16 + (fault == 1)) % 16 * 16 + lane / 16 * 8);
  // Matrices of B, row by row in memory: transposed. The last two are not used.
  load_matrices<true>(of_b, tiles + 256 + lane % 16 * 8);
  const uint32_t half_of_b[2] = {of_b[fault == 2], of_b[fault != 2]};
  float sums[4] = {};
  if (dtype == DType::f16)
    multiply_add<Half>(sums, of_a, half_of_b);
  else
    multiply_add<BFloat16>(sums, of_a, half_of_b);
  for (unsigned i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

int value_a(size_t row, size_t k) { return static_cast<int>((row * 5 + k * 3) % 11) - 5; }
int value_b(size_t k, size_t column) { return static_cast<int>((k * 7 + column * 2) % 13) - 6; }

bool right_product(const Buffer<float>& d, size_t depth) {
  return holds(d.size(), [&](size_t i) {
    int sum = 0;
    for (size_t k = 0; k < depth; ++k) sum += value_a(i / 8, k) * value_b(k, i % 8);
    return d[i] == static_cast<float>(sum);
  });
}

bool run_product_of_halves(DType dtype, int fault) {
  const auto bits = [&](int v) -> uint16_t {
    return dtype == DType::f16 ? __half_as_ushort(__float2half_rn(static_cast<float>(v)))
                               : __bfloat16_as_ushort(__float2bfloat16_rn(static_cast<float>(v)));
  };
  const Buffer<uint16_t> a(256, [&](size_t i) { return bits(value_a(i / 16, i % 16)); });
  const Buffer<uint16_t> b(128, [&](size_t i) { return bits(value_b(i / 8, i % 8)); });
  const Buffer<float> d(128);
  launch("product_of_halves", &product_of_halves, {1, dim3(kWarp), 384 * sizeof(uint16_t)}, nullptr, a.get(), b.get(),
         d.get(), dtype, fault);
  return right_product(d, 16);
}

__global__ void product_of_floats(const float* a, const float* b, float* d) {
  const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t of_a[4], of_b[2];
  for (unsigned i = 0; i < 4; ++i) of_a[i] = to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (unsigned i = 0; i < 2; ++i) of_b[i] = to_tf32(b[(t + i * 4) * 8 + g]);
  float sums[4] = {};
  multiply_add<float>(sums, of_a, of_b);
  for (unsigned i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sums[i];
}

bool run_product_of_floats() {
  const Buffer<float> a(128, [](size_t i) { return static_cast<float>(value_a(i / 8, i % 8)); });
  const Buffer<float> b(64, [](size_t i) { return static_cast<float>(value_b(i / 8, i % 8)); });
  const Buffer<float> d(128);
  launch("product_of_floats", &product_of_floats, {1, dim3(kWarp)}, nullptr, a.get(), b.get(), d.get());
  return right_product(d, 8);
}

// --- Choices that a GPU is free to make, see Freedom ---

// The position of each thread in the order of arrival, before and after two barriers of its warp.
__global__ void count_threads(int* out) {
  out[threadIdx.x] = atomicAdd(out + 2 * kThreads, 1);
  __syncwarp();
  __syncwarp();
  out[kThreads + threadIdx.x] = atomicAdd(out + 2 * kThreads, 1);
}

bool run_count_threads(const std::function<bool(const int* out, size_t thread)>& right) {
  const Buffer<int> out(2 * kThreads + 1);
  launch("count_threads", &count_threads, {1, dim3(kThreads)}, nullptr, out.get());
  return holds(kThreads, [&](size_t i) { return right(out.get(), i); });
}

bool first_lane_first(const int* out, size_t thread) { return thread % kWarp == 0 || out[thread] > out[thread - 1]; }
// The positions of a warp's threads are contiguous.
bool warps_one_by_one(const int* out, size_t thread) {
  int first = out[thread], last = first;
  for (size_t i = thread / kWarp * kWarp; i < (thread / kWarp + 1) * kWarp; ++i) {
    first = std::min({first, out[i], out[kThreads + i]});
    last = std::max({last, out[i], out[kThreads + i]});
  }
  return last - first == 2 * kWarp - 1;
}

// Writes the source, or the destination, between a copy's start and its end. Otherwise the copy must deliver the values
// that the source had at the start.
__global__ void copy_between(float* data, float* out, bool write_source, bool write_destination) {
  auto* const values = reinterpret_cast<float*>(dynamic_shared());
  const unsigned i = 4 * threadIdx.x;
  copy_async<16>(values + i, data + i);
  commit_copies();
  if (write_source) data[i] = -1;
  if (write_destination) values[i] = -1;
  wait_for_copies<0>();
  out[threadIdx.x] = values[i];
}

bool run_copy_between(bool write_source, bool write_destination) {
  const Buffer<float> in(4 * kThreads, [](size_t i) { return static_cast<float>(i); }), out(kThreads);
  launch("copy_between", &copy_between, {1, dim3(kThreads), 4 * kThreads * sizeof(float)}, nullptr, in.get(), out.get(),
         write_source, write_destination);
  return holds(out.size(), [&](size_t i) { return out[i] == static_cast<float>(4 * i); });
}

__global__ void small_products(float* out) {
  // 1 plus eight products of 2^-25, all in one step of a tensor core.
  const uint32_t halves = 0x39003900, a[4] = {halves, halves, 0, 0};  // bfloat16: 2^-13.
  const uint32_t b[2] = {0x39803980, 0};                              // 2^-12.
  float sums[4] = {1, 1, 1, 1};
  multiply_add<BFloat16>(sums, a, b);
  out[threadIdx.x] = sums[0];
}

bool run_small_products() {
  const Buffer<float> out(kWarp);
  launch("small_products", &small_products, {1, dim3(kWarp)}, nullptr, out.get());
  return holds(out.size(), [&](size_t i) { return out[i] == 1 + 0x1p-22f; });
}

__global__ void exponentials(float* out) {
  const float v = static_cast<float>(threadIdx.x) / 8 - 8;
  out[threadIdx.x] = __expf(v);
  out[kThreads + threadIdx.x] = exp(v);
}

// True if the largest errors of __expf and exp, in units in the last place, are between `least` and `most`, and that of
// exp is at most 2.5.
bool run_exponentials(double least, double most) {
  const Buffer<float> out(2 * kThreads);
  launch("exponentials", &exponentials, {1, dim3(kThreads)}, nullptr, out.get());
  check(cudaDeviceSynchronize(), "running a kernel");
  double worst[2] = {};
  for (size_t i = 0; i < 2 * kThreads; ++i) {
    const double exact = std::exp(static_cast<double>(i % kThreads) / 8 - 8);
    const double unit = std::ldexp(1, std::ilogb(exact) - 23);
    worst[i / kThreads] = std::max(worst[i / kThreads], std::fabs(static_cast<double>(out[i]) - exact) / unit);
  }
  return worst[0] >= least && worst[0] <= most && worst[1] >= least && worst[1] <= 2.5;
}

const std::map<std::string, std::function<bool()>> checks = {
    {"first_lane_first", [] { return run_count_threads(first_lane_first); }},
    {"warps_one_by_one", [] { return run_count_threads(warps_one_by_one); }},
    {"source_of_a_copy_written", [] { return run_copy_between(true, false); }},
    {"destination_of_a_copy_written", [] { return run_copy_between(false, true); }},
    {"small_products", run_small_products},
    {"exact_exponentials", [] { return run_exponentials(0, 0.6); }},
    {"inexact_exponentials", [] { return run_exponentials(1, 12); }},
    {"reverse", [] { return run_reverse(true, true); }},
    {"dropped_barrier", [] { return run_reverse(false, true); }},
    {"dropped_second_barrier", [] { return run_reverse(true, false); }},
    {"block_sum", run_sum},
    {"divergent_barrier", [] { return run_plain("barrier_in_a_branch", &barrier_in_a_branch); }},
    {"barrier_not_reached", [] { return run_plain("barrier_after_a_return", &barrier_after_a_return); }},
    {"shared_memory_not_written", [] { return run_plain("read_before_write", &read_before_write); }},
    {"shift_by_none", [] { return run_shift(0); }},
    {"read_past_the_end", [] { return run_shift(1); }},
    {"shared_write", [] { return run_shared_write(63); }},
    {"shared_write_past_the_end", [] { return run_shared_write(64); }},
    {"packs", [] { return run_copy_packs(4); }},
    {"misaligned_pack", [] { return run_copy_packs(1); }},
    {"static_and_dynamic", [] { return run_static_and_dynamic(kDefaultSharedBytes); }},
    {"static_and_dynamic_within_the_default",
     [] { return run_without_asking(kDefaultSharedBytes - int64_t{sizeof(Large)}); }},
    {"all_shared_memory", [] { return run_static_and_dynamic(dynamic_shared_limit(&static_and_dynamic)); }},
    {"shared_memory_refused", [] { return run_static_and_dynamic(dynamic_shared_limit(&static_and_dynamic) + 1); }},
    {"shared_memory_not_asked_for",
     [] { return run_without_asking(kDefaultSharedBytes - int64_t{sizeof(Large)} + 1); }},
    {"shared_memory_over_the_limit", run_asking_for_too_much},
    {"more_threads_than_the_launch_bounds", [] { return run_static_and_dynamic(1024, kThreads); }},
    {"more_threads_than_a_templates_launch_bounds", [] { return run_as_given(dim3(1), dim3(kThreads + 1)); }},
    {"grid_too_high", [] { return run_as_given(dim3(1, 1 << 16), dim3(kThreads)); }},
    {"block_too_large", [] { return run_as_given(dim3(1), dim3(1024, 2)); }},
    {"block_too_deep", [] { return run_as_given(dim3(1), dim3(1, 1, kThreads)); }},
    {"stream_of_another_device", run_on_a_stream_of_another_device},
    {"blocks_together", [] { return run_blocks(Blocks::together); }},
    {"barrier_of_blocks_apart", [] { return run_blocks(Blocks::apart); }},
    {"block_that_does_not_come", [] { return run_blocks(Blocks::together, 2, 0); }},
    {"more_blocks_than_run_together", [] { return run_blocks(Blocks::together, 3); }},
    {"shuffles", run_shuffles},
    {"shuffle_from_inactive_lanes", [] { return run_plain("shuffle_in_a_branch", &shuffle_in_a_branch); }},
    {"async_copy", [] { return run_staged_copy(true); }},
    {"async_copy_not_waited_for", [] { return run_staged_copy(false); }},
    {"mma_bf16", [] { return run_product_of_halves(DType::bf16, 0); }},
    {"mma_f16", [] { return run_product_of_halves(DType::f16, 0); }},
    {"mma_tf32", run_product_of_floats},
    {"wrong_row_of_a_fragment", [] { return run_product_of_halves(DType::bf16, 1); }},
    {"wrong_half_of_a_fragment", [] { return run_product_of_halves(DType::f16, 2); }},
};

}  // namespace
}  // namespace cpc::cuda

int main(int argc, char** argv) {
  const auto found = cpc::cuda::checks.find(argc == 2 ? argv[1] : "");
  if (found == cpc::cuda::checks.end()) {
    for (const auto& [name, run] : cpc::cuda::checks) std::printf("%s\n", name.c_str());
    return 2;
  }
  try {
    std::printf("%s\n", found->second() ? "right" : "wrong");
    return 0;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
}
