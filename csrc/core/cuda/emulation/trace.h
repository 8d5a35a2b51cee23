// Reports the memory accesses of emulated kernels, and what orders them, to observers. With CPC_EXT_TRACE the compiler
// inserts a call before every access in the .cu files, as for ThreadSanitizer, but the functions that it calls are
// those of trace.cpp. Without CPC_EXT_TRACE, nothing here costs anything.
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

// --- Events ---

// The number of a place in the program together with the calls from the kernel that led to it. Equal places have equal
// numbers.
using Place = uint32_t;

// Describes places as "function (file:line) < file:line < ..." with their callers. Runs addr2line of binutils for all
// places together, because the program itself knows only addresses.
std::vector<std::string> describe(const std::vector<Place>& places);

// A function's name with its arguments' types, as the program knows it.
std::string name_of_function(const void* function);

// "byte 12 of dynamic shared memory", of the launch that runs.
std::string name_of_address(const void* address);

enum class Space : uint8_t { shared, global };

// A load, a store or an atomic operation of one thread. Left out are the thread's own variables and the kernel's
// parameters, which a compiler would keep in registers, and constants of the program. The bank of an address in shared
// memory is (address / 4) % 32. Asynchronous copies and ldmatrix have events of their own, see below.
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

// An operation that lanes of a warp do together: __syncwarp, shuffles and votes, ldmatrix and mma, by these names.
struct CollectiveEvent {
  const char* name;
  unsigned warp;
  uint32_t mask;
  Place place;
};

// ldmatrix. Lane l gives the address of row l % 8 of matrix l / 8, 16 bytes in shared memory. Lane 4 g + t receives
// elements [g][2t], [g][2t + 1] of each matrix, or [2t][g], [2t + 1][g] where it is transposed.
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

// cp.async. `valid` bytes are read and `bytes` written at any time from this event to the end of the thread's wait.
struct CopyAsync {
  void* to;
  const void* from;
  size_t bytes, valid;
  unsigned thread;
  Place place;
};

// Arithmetic of a thread outside of the tensor cores that kernels call a function for: a fused multiply-add, or work of
// the special function units, such as exponentials, logarithms and reciprocals.
enum class Arithmetic : uint8_t { multiply_add_32, multiply_add_64, special };

// The part of a launch that is run.
struct Sample {
  uint64_t blocks_of_grid, blocks_run;
};

// A result that is passed to Python.
struct Value;
using List = std::vector<Value>;
using Dict = std::vector<std::pair<std::string, Value>>;
struct Value : std::variant<std::monostate, int64_t, double, std::string, List, Dict> {
  using variant::variant;
};

// Events come in the order in which the emulation runs: one block after another, and each thread of a block until it
// waits. An exception that launch_ends throws is an error of the launch; the other functions must not throw.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void launch_begins(const Launch&, const Sample&) {}
  virtual void block_begins(uint64_t /*block*/) {}
  virtual void access(const Access&) {}
  virtual void barrier(Place) {}  // All threads of the block have arrived, and none has left.
  // All lanes of the mask have arrived, and none has left. ldmatrix and mma are reported here too, after their own
  // event.
  virtual void collective(const CollectiveEvent&) {}
  virtual void load_matrices(const MatrixLoad&) {}
  virtual void multiply_add(const MultiplyAdd&) {}
  virtual void arithmetic(Arithmetic) {}
  virtual void copy_async(const CopyAsync&) {}  // Into the thread's open group.
  virtual void commit_copies(unsigned /*thread*/) {}
  // The thread waits until at most `pending_groups` of its closed groups are pending.
  virtual void wait_for_copies(unsigned /*thread*/, size_t /*pending_groups*/, Place) {}
  virtual void block_ends() {}
  // These blocks have met at a barrier among blocks that run together. Each gets block_ends before the barrier, and
  // block_begins again after it.
  virtual void blocks_meet(const std::vector<uint64_t>& /*blocks*/) {}
  virtual void launch_ends() {}
  virtual void fill(const void* /*data*/, size_t /*bytes*/) {}  // cudaMemsetAsync.
  virtual Value results() = 0;
};

// --- Observers ---

using Options = std::map<std::string, int64_t>;

// A kind of observer. Each adds itself to the list when the program starts.
struct ObserverKind {
  const char* name;
  std::unique_ptr<Observer> (*make)(const Options& options);

  static std::vector<ObserverKind>& all();
  static bool add(const ObserverKind& kind) {
    all().push_back(kind);
    return true;
  }
};

// From now on, observers of these names see all launches. Each launch runs at most `blocks` blocks, one from each of as
// many equal parts of its grid; 0 runs all. Throws std::invalid_argument for an unknown name or option. Must not be
// called while a kernel runs.
void begin_trace(const std::map<std::string, Options>& observers, uint64_t blocks);
// Ends observation and returns the observers' results by name.
Dict end_trace();

// --- For the emulator ---

// A range of addresses, [begin, end).
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
void trace_turn(uint64_t block);  // For a block that runs together with others and may continue where it waited.
// Sets the thread whose accesses are reported from now on, or none.
void trace_thread(unsigned thread);
void trace_no_thread();
// The place of an emulated operation that was called from `address`.
Place place_of(const void* address);

// While an object of this class exists, accesses are the emulator's own and are not reported.
class Untraced {
 public:
  Untraced();
  ~Untraced();
  Untraced(const Untraced&) = delete;

 private:
  void* thread_;
};

// Reports an atomic operation as one access; the load and store that make it up are not reported.
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

// Report the collective operations of a warp; the last lane to arrive calls them.
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
