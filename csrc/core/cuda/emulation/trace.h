// What emulated kernels do to memory, and what orders it, told to observers. With CPC_EXT_TRACE the compiler puts a call
// before every access in the .cu files, as for ThreadSanitizer; the functions that it calls are not that sanitizer's but
// those of trace.cpp. Without, nothing here costs anything.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "core/cuda/emulation/emulator.h"

namespace cpc::cuda::emulation {

#if defined(CPC_CUDA_TRACE)
constexpr bool kTraced = true;
#else
constexpr bool kTraced = false;
#endif

// --- What is told ---

// A place in the program, with the calls that led to it from the kernel on: equal numbers for equal ones.
using Place = uint32_t;

// Where a place is, as "function (file:line) < file:line < ..." with its callers. It asks addr2line of binutils, once for
// all places, because the program itself knows only addresses.
std::vector<std::string> describe(const std::vector<Place>& places);

// A function's name with its arguments' types, as the program knows it.
std::string name_of_function(const void* function);

// "byte 12 of dynamic shared memory", of the launch that runs.
std::string name_of_address(const void* address);

enum class Space : uint8_t { shared, global };

// A load, a store or an atomic operation of one thread. What a compiler would keep in registers is left out: the
// thread's own variables and the kernel's parameters; and so are constants of the program. Addresses in shared memory are
// as in the block's banks: bank (address / 4) % 32. Asynchronous copies and ldmatrix are told apart, see below.
struct Access {
  const void* address;
  size_t bytes;
  bool write;  // Also true of atomic operations.
  bool atomic;
  Space space;
  Place place;
  unsigned thread;  // In the block.
  uint64_t block;   // x first.
};

// What lanes of a warp do together: __syncwarp, shuffles and votes, ldmatrix and mma, by these names.
struct CollectiveEvent {
  const char* name;
  unsigned warp;
  uint32_t mask;
  Place place;
};

// ldmatrix: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes in shared memory; elements [g][2t], [g][2t +
// 1] of each go to lane 4 g + t, or [2t][g], [2t + 1][g] where it is transposed.
struct MatrixLoad {
  const void* rows[kWarp];
  bool transposed;
  unsigned warp;
  Place place;
};

struct MultiplyAdd {
  const char* type;  // Of the operands: "bf16", "f16" or "tf32".
  unsigned rows, columns, depth;
  unsigned warp;
  Place place;
};

// cp.async: `valid` bytes are read and `bytes` written, in the time from here to the end of the thread's wait.
struct CopyAsync {
  void* to;
  const void* from;
  size_t bytes, valid;
  unsigned thread;
  Place place;
};

// What a thread computes outside of the tensor cores, as far as kernels call a function for it: a fused multiply-add, or
// what the special function units do, such as exponentials, logarithms and reciprocals.
enum class Arithmetic : uint8_t { multiply_add_32, multiply_add_64, special };

// How much of a launch is run.
struct Sample {
  uint64_t blocks_of_grid, blocks_run;
};

// What goes back to Python.
struct Value;
using List = std::vector<Value>;
using Dict = std::vector<std::pair<std::string, Value>>;
struct Value : std::variant<std::monostate, int64_t, double, std::string, List, Dict> {
  using variant::variant;
};

// Events come in the order in which the emulation runs them: blocks one after another, the threads of a block each until
// it waits. An exception of launch_ends is the launch's; the others may not throw.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void launch_begins(const Launch&, const Sample&) {}
  virtual void block_begins(uint64_t /*block*/) {}
  virtual void access(const Access&) {}
  virtual void barrier(Place) {}  // All threads of the block have come to it, and none has left.
  // All lanes of the mask have come to it, and none has left. ldmatrix and mma are told here too, after their own event.
  virtual void collective(const CollectiveEvent&) {}
  virtual void load_matrices(const MatrixLoad&) {}
  virtual void multiply_add(const MultiplyAdd&) {}
  virtual void arithmetic(Arithmetic) {}
  virtual void copy_async(const CopyAsync&) {}  // Into the thread's open group.
  virtual void commit_copies(unsigned /*thread*/) {}
  // The thread goes on when at most so many of its closed groups are under way.
  virtual void wait_for_copies(unsigned /*thread*/, size_t /*pending_groups*/, Place) {}
  virtual void block_ends() {}
  // Blocks that run together begin again after each barrier among them, and end before. These have come to one.
  virtual void blocks_meet(const std::vector<uint64_t>& /*blocks*/) {}
  virtual void launch_ends() {}
  virtual void fill(const void* /*data*/, size_t /*bytes*/) {}  // cudaMemsetAsync.
  virtual Value results() = 0;
};

// --- Who observes ---

using Options = std::map<std::string, int64_t>;

// A kind of observer, which adds itself to the list when the program starts.
struct ObserverKind {
  const char* name;
  std::unique_ptr<Observer> (*make)(const Options& options);

  static std::vector<ObserverKind>& all();
  static bool add(const ObserverKind& kind) {
    all().push_back(kind);
    return true;
  }
};

// Observers of these names see all launches from now on, of which each runs at most `blocks` blocks, one from each of as
// many equal parts of its grid; 0 runs all. Throws std::invalid_argument for a name or an option that there is not. Not
// while a kernel runs.
void begin_trace(const std::map<std::string, Options>& observers, uint64_t blocks);
// What they saw, by name. They see nothing more.
Dict end_trace();

// --- For the emulator ---

// Where to find what threads reach: [begin, end).
struct Range {
  uintptr_t begin, end;
  bool contains(uintptr_t address) const { return address - begin < end - begin; }
};
struct Memory {
  Range stacks, dynamic_shared, static_shared;
};

#if defined(CPC_CUDA_TRACE)

const std::vector<std::unique_ptr<Observer>>& observers();
uint64_t most_blocks();
void trace_launch(const Memory& memory, unsigned threads, unsigned blocks_together);
void trace_block(uint64_t block);
void trace_turn(uint64_t block);  // Of a block that runs together with others, and may go on where it waited.
// The thread whose accesses are told from now on, or none.
void trace_thread(unsigned thread);
void trace_no_thread();
// The place of an emulated operation that was called from `address`.
Place place_of(const void* address);

// While one is there, accesses are the emulator's own.
class Untraced {
 public:
  Untraced();
  ~Untraced();
  Untraced(const Untraced&) = delete;

 private:
  void* thread_;
};

// Atomic operations tell of one access; what they consist of is not told.
void trace_atomic(const void* address, size_t bytes, const void* from);
void trace_arithmetic(Arithmetic what);
#define CPC_UNTRACED __attribute__((no_sanitize("thread"), noinline))

#else

inline uint64_t most_blocks() { return 0; }
inline void trace_launch(const Memory&, unsigned, unsigned) {}
inline void trace_block(uint64_t) {}
inline void trace_turn(uint64_t) {}
inline void trace_thread(unsigned) {}
inline void trace_no_thread() {}
inline Place place_of(const void*) { return 0; }
struct Untraced {
  Untraced() {}
};
inline void trace_atomic(const void*, size_t, const void*) {}
inline void trace_arithmetic(Arithmetic) {}
#define CPC_UNTRACED inline

#endif

// What lanes combine, told by the last of them.
void tell_of_matrices(const void* const (&rows)[kWarp], bool transposed);
void tell_of_product(const char* type, unsigned depth);

// Calls event(observer) for each observer.
template <class Event>
void tell([[maybe_unused]] const Event& event) {
#if defined(CPC_CUDA_TRACE)
  for (const auto& observer : observers()) event(*observer);
#endif
}

}  // namespace cpc::cuda::emulation
