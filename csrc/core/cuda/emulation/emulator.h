// Runs CUDA kernels on the host, to test them where there is no GPU. The threads of a block are fibers; they run one at
// a time, each until it waits for others, in an order that changes from round to round. So a kernel that leaves
// something to chance on a GPU (no barrier between a write and a read, a warp thought to be in step) goes wrong here at
// once, and what would hang or be undefined there is an error that names the kernel, the block and the thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// The running thread's, kept up to date by the emulator.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cpc::cuda::emulation {

using Where = std::source_location;

constexpr unsigned kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
// Of the smallest current GPUs (compute capability 8.6, 8.9, 12.0): what a block has without asking, and at most.
constexpr size_t kSharedBytes = 48 << 10, kSharedBytesLimit = 99 << 10;
constexpr int kMultiprocessors = 2;  // So few that small problems fill them.

// Runs thread() for every thread of every block. Throws std::runtime_error for what a kernel does wrong. The order of
// blocks and threads follows from the environment variable CPC_EMULATION_SEED (0) and the number of launches before.
void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

// "kernel NAME, block (x, y, z), thread (x, y, z)" of the running thread.
std::string position();

// Ends the launch with an error of the running thread.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail(const std::string& what, Where where);

// __syncthreads().
void barrier(Where where);

// What the lanes of a warp do together. The last lane of `mask` to come calls combine with the arguments of all of them
// (null for lanes outside the mask), which exchanges what there is to exchange; then all go on.
using Combine = void (*)(void* const (&lanes)[kWarp]);
void collective(const char* name, uint32_t mask, void* arguments, Combine combine, Where where);

unsigned lane();

// Shared memory, full of 0xff (NaN, -1) when a block starts.
unsigned char* dynamic_shared();
size_t reserve_static_shared(size_t bytes, size_t alignment);  // Once for each variable: its offset.
unsigned char* static_shared(size_t offset);

// Asynchronous copies of the running thread. The bytes arrive when their group is waited for, and until then the
// destination holds 0xff.
void copy_async(void* to, const void* from, size_t bytes, size_t valid, Where where);
void commit_copies();
void wait_for_copies(size_t pending_groups);

}  // namespace cpc::cuda::emulation
