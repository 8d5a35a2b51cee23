// Runs CUDA kernels on the host, to test them where there is no GPU. The threads of a block are fibers. They run one at
// a time, each until it waits for others, in an order that changes from round to round. A kernel that depends on timing
// on a GPU (no barrier between a write and a read, or a warp assumed to run in lockstep) thus fails here at once. What
// would hang or be undefined on a GPU is an error that names the kernel, the block and the thread.
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

// The built-in variables of the running thread, which the emulator updates.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace cpc::cuda::emulation {

using Where = std::source_location;

constexpr unsigned kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr size_t kSharedBytes = 48 << 10;  // The shared memory of a block that has not opted in to more.

// --- Devices ---

struct Device {
  // The most shared memory of a block. The environment variable CPC_EMULATION_SHARED_KIB sets it in KiB; the default is
  // 99, as for compute capability 8.6, 8.9 and 12.0. For 8.0 it is 163, and for 9.0 and 10.0 it is 227.
  size_t shared_bytes = default_shared_bytes();
  int multiprocessors = default_multiprocessors();

  static size_t default_shared_bytes();
  static int default_multiprocessors();  // CPC_EMULATION_MULTIPROCESSORS, or 2, which small problems fill.
};

// Replaces all devices. None of the new ones has a context, and the first is current for the calling thread. A process
// begins with one device.
void set_devices(std::vector<Device> devices);
int device_count();
const Device& device(int index);  // Throws std::out_of_range where there is no such device.

// Restarts the random draws: from here on launches draw blocks and orders like the first ones of a process.
void begin_draws();

// As in the CUDA runtime, the current device is per thread, and making a device current or working on it creates its
// context.
int current_device();
void set_current_device(int index);
bool has_context(int index);

// A stream of a device. The null stream belongs to the current device.
void* stream_of(int device);
// Throws std::runtime_error unless the stream belongs to the current device, and creates that device's context.
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

// Choices that a GPU is free to make, from environment variables. A correct kernel is correct under all of them.
struct Freedom {
  // CPC_EMULATION_ORDER is the order in which threads run:
  //   rounds    (the default) all threads, in a new order in each round
  //   forward   from the first thread of the block to the last, in each round
  //   backward  from the last to the first
  //   greedy    one warp as far as it gets before the next begins, and within a warp one lane as far as it gets
  enum class Order { rounds, forward, backward, greedy } order = Order::rounds;
  // CPC_EMULATION_COPIES: with "late" (the default), asynchronous copies take place when they are waited for; with
  // "early", at once.
  bool early_copies = false;
  // CPC_EMULATION_MATH: "exact" (the default) computes as the host does. "gpu" perturbs the results of functions that
  // CUDA computes less precisely, by as much as its programming guide allows, and truncates sums on tensor cores as
  // they do.
  bool gpu_math = false;
};
const Freedom& freedom();  // Of the launch that runs.

// The largest number of blocks of a grid, from the environment variable CPC_EMULATION_GRID. With a small one, kernels
// that loop over work do more than one iteration even on small problems.
int64_t largest_grid();

// Runs thread() for every thread of every block. Throws std::runtime_error where a launch needs what the device does
// not have, or where the kernel has an error. The order of blocks and threads follows from the environment variable
// CPC_EMULATION_SEED (default 0), the number of launches before, and Freedom.
void run(const Launch& launch, const std::function<void()>& thread);

// The number of threads that a kernel's launch bounds allow; kMaxThreads where it has none. __launch_bounds__ puts as
// many no-op instructions before the kernel's first.
constexpr unsigned kMaxThreads = 1024;
unsigned launch_bounds(const void* kernel);

// An upper bound of a kernel's static shared memory: that of all variables of the program, because the variables that a
// kernel uses are known only once it has run. Launches count those that it has reached so far.
size_t static_shared_bytes();
// Allows a kernel this much dynamic shared memory on the current device. Returns false where a block cannot have it.
bool allow_dynamic_shared(const void* kernel, size_t bytes);

// Describes the running thread: "kernel NAME, block (x, y, z), thread (x, y, z)".
std::string position();

// Ends the launch with an error of the running thread.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail(const std::string& what, Where where);

// __syncthreads().
void barrier(Where where);
// Waits until all threads of `blocks` blocks, which must run together, have reached this barrier.
void wait_for_blocks(const void* barrier, unsigned blocks, Where where = Where::current());

// An operation that the lanes of a warp do together. The last lane of `mask` to arrive calls combine with the arguments
// of all lanes (null for lanes outside the mask), which exchanges their values; then all go on.
using Combine = void (*)(void* const (&lanes)[kWarp]);
void collective(const char* name, uint32_t mask, void* arguments, Combine combine, Where where);

unsigned lane();

// Shared memory, filled with 0xff (NaN, -1) when a block starts.
unsigned char* dynamic_shared();
size_t add_static_shared(size_t bytes, size_t alignment);  // Adds a variable, before any launch; returns its number.
unsigned char* static_shared(size_t variable);
// Registers a variable when the program starts, if the program contains a function that uses it.
template <class T, class Tag>
struct StaticShared {
  static inline const size_t variable = add_static_shared(sizeof(T), alignof(T));
};

// Asynchronous copies of the running thread. The bytes arrive as late as possible, when their group is waited for, and
// until then the destination holds 0xff; or they arrive at once, see Freedom::early_copies.
void copy_async(void* to, const void* from, size_t bytes, size_t valid, Where where);
void commit_copies();
void wait_for_copies(size_t pending_groups);

}  // namespace cpc::cuda::emulation
