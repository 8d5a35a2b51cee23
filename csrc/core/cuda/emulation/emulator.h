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
#include <vector>

#include "core/cuda/blocks.h"

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
constexpr size_t kSharedBytes = 48 << 10;  // What a block has without asking.

// --- Devices ---

struct Device {
  // What a block has at most. KiB in the environment variable CPC_EMULATION_SHARED_KIB; else 99, of compute
  // capability 8.6, 8.9 and 12.0. It is 163 of 8.0, and 227 of 9.0 and 10.0.
  size_t shared_bytes = default_shared_bytes();
  int multiprocessors = default_multiprocessors();

  static size_t default_shared_bytes();
  static int default_multiprocessors();  // CPC_EMULATION_MULTIPROCESSORS; else 2, which small problems fill.
};

// Puts these devices in place of those before, none of them with a context. The first is the calling thread's current.
// At the beginning there is one.
void set_devices(std::vector<Device> devices);
int device_count();
const Device& device(int index);  // Throws std::out_of_range for one that there is not.

// From here on launches draw blocks and orders as the first ones of a process do, whatever ran before.
void begin_draws();

// As of the runtime: of the calling thread, and what makes a device current, or works on it, creates its context.
int current_device();
void set_current_device(int index);
bool has_context(int index);

// A stream of a device. The null stream is that of the current device.
void* stream_of(int device);
// Throws std::runtime_error unless a stream is the current device's, whose context this creates.
void use_stream(const char* doing, void* stream);

// --- Kernels ---

struct Launch {
  const char* name;
  const void* kernel;
  dim3 grid, block;
  size_t shared_bytes;  // Dynamic.
  void* stream;
  Blocks depend;
};

// What a GPU may do one way or the other, from environment variables. Right kernels are right whatever it does.
struct Freedom {
  // CPC_EMULATION_ORDER: in which order threads run.
  //   rounds    (where it is not set) each round of all threads in another order
  //   forward   the first of the block first, in each round
  //   backward  the last first
  //   greedy    a warp as far as it comes before the next may begin, and of its lanes one as far as it comes
  enum class Order { rounds, forward, backward, greedy } order = Order::rounds;
  // CPC_EMULATION_COPIES: "late" (where it is not set), asynchronous copies take place when they are waited for; "early",
  // at once.
  bool early_copies = false;
  // CPC_EMULATION_MATH: "exact" (where it is not set) computes as the host does. "gpu" moves results of functions that
  // CUDA rounds worse by as much as its programming guide allows, and sums on tensor cores cut digits off, as they do.
  bool gpu_math = false;
};
const Freedom& freedom();  // Of the launch that runs.

// How many blocks a grid has at most, from the environment variable CPC_EMULATION_GRID. Few let the loops of kernels over
// more work than there are blocks go round more than once on small problems.
int64_t largest_grid();

// Runs thread() for every thread of every block. Throws std::runtime_error for what a launch asks that a device does
// not have, or a kernel does wrong. The order of blocks and threads follows from the environment variable
// CPC_EMULATION_SEED (0), the number of launches before, and Freedom.
void run(const Launch& launch, const std::function<void()>& thread);

// Threads that a kernel's launch bounds allow, kMaxThreads where it has none: __launch_bounds__ puts as many
// instructions that do nothing before a kernel's first.
constexpr unsigned kMaxThreads = 1024;
unsigned launch_bounds(const void* kernel);

// At least what a kernel takes of static shared memory: what all variables of the program do, because which of them a
// kernel reaches shows only when it runs. Launches count those that it has reached so far.
size_t static_shared_bytes();
// Lets a kernel have as much dynamic shared memory on the current device. False where a block cannot have it.
bool allow_dynamic_shared(const void* kernel, size_t bytes);

// "kernel NAME, block (x, y, z), thread (x, y, z)" of the running thread.
std::string position();

// Ends the launch with an error of the running thread.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail(const std::string& what, Where where);

// __syncthreads().
void barrier(Where where);
// All threads of so many blocks, which run together, wait for each other; those that name the same barrier.
void wait_for_blocks(const void* barrier, unsigned blocks, Where where = Where::current());

// What the lanes of a warp do together. The last lane of `mask` to come calls combine with the arguments of all of them
// (null for lanes outside the mask), which exchanges what there is to exchange; then all go on.
using Combine = void (*)(void* const (&lanes)[kWarp]);
void collective(const char* name, uint32_t mask, void* arguments, Combine combine, Where where);

unsigned lane();

// Shared memory, full of 0xff (NaN, -1) when a block starts.
unsigned char* dynamic_shared();
size_t add_static_shared(size_t bytes, size_t alignment);  // Once for each variable, before any launch: its number.
unsigned char* static_shared(size_t variable);
// A variable is known when the program starts, if a function that uses it is in the program.
template <class T, class Tag>
struct StaticShared {
  static inline const size_t variable = add_static_shared(sizeof(T), alignof(T));
};

// Asynchronous copies of the running thread. The bytes arrive when their group is waited for, which is the latest that
// they may, and until then the destination holds 0xff; or at once, see Freedom.
void copy_async(void* to, const void* from, size_t bytes, size_t valid, Where where);
void commit_copies();
void wait_for_copies(size_t pending_groups);

}  // namespace cpc::cuda::emulation
