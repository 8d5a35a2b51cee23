// Fibers, barriers and shared memory of emulated kernels, see emulator.h.
#include "core/cuda/emulation/emulator.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <stdexcept>
#include <vector>

#include "core/cuda/emulation/trace.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cpc::cuda::emulation {
namespace {

constexpr unsigned char kPoison = 0xff;
constexpr size_t kStackBytes = 64 << 10, kPage = 4 << 10;
constexpr size_t kSharedAlignment = 128;

// The most threads that run together, over all blocks of a launch.
constexpr unsigned kMostTogether = 16 << 10;

enum class State { ready, at_barrier, at_collective, at_blocks, done };

struct AsyncCopy {
  void* to;
  const void* from;
  size_t bytes, valid;
};

// The execution context of a fiber or of the scheduler. Once begun, it is switched with setjmp and longjmp, because
// swapcontext makes a system call for the signal mask each time. AddressSanitizer supports only swapcontext.
struct Context {
  ucontext_t begin;
  jmp_buf at;
  bool begun = false;
};

void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  swapcontext(&from.begin, &to.begin);
#else
  from.begun = true;
  if (_setjmp(from.at) != 0) return;
  if (to.begun) _longjmp(to.at, 1);
  setcontext(&to.begin);
#endif
}

struct Fiber {
  Context context;
  State state;
  uint3 index;
  const char* operation;  // The operation it waits at.
  Where where;
  Place place;
  std::vector<std::vector<AsyncCopy>> copies;  // Groups; the last is open.
  const void* barrier;                         // The barrier among blocks that it waits at,
  unsigned blocks;                             // and the number of blocks there.
};

// A collective operation that waits for the rest of its lanes.
struct Collective {
  uint32_t mask, arrived = 0;
  const char* name;
  Where where;
  void* lanes[kWarp] = {};
};

// Stacks of fibers, each with an inaccessible guard page below.
class Stacks {
 public:
  explicit Stacks(unsigned count) : count_(count) {
    memory_ = static_cast<char*>(
        mmap(nullptr, count * kPitch, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    for (unsigned i = 0; i < count; ++i) mprotect(memory_ + i * kPitch, kPage, PROT_NONE);
  }
  ~Stacks() {
#if defined(__SANITIZE_ADDRESS__)
    // Fibers that never end leave poisoned frames, which would cause false reports when these addresses are reused.
    ASAN_UNPOISON_MEMORY_REGION(memory_, count_ * kPitch);
#endif
    munmap(memory_, count_ * kPitch);
  }
  Stacks(const Stacks&) = delete;
  char* operator[](unsigned i) const { return memory_ + i * kPitch + kPage; }
  Range range() const {
    const auto begin = reinterpret_cast<uintptr_t>(memory_);
    return {begin, begin + count_ * kPitch};
  }

 private:
  static constexpr size_t kPitch = kStackBytes + kPage;
  char* memory_;
  size_t count_;
};

const Stacks& stacks_of_a_block() {
  static const Stacks stacks(kMaxThreads);
  return stacks;
}

// The static shared variables of all kernels, each followed by a gap that AddressSanitizer guards.
struct StaticMemory {
  static constexpr size_t kBytes = 1 << 20;
  struct Variable {
    size_t offset, bytes, alignment;
  };
  alignas(kSharedAlignment) unsigned char memory[kBytes];
  size_t used = 0;
  std::vector<Variable> variables;
  size_t total = 0;  // Bytes of a kernel that uses all of them.
};
StaticMemory& static_memory() {
  static StaticMemory* const memory = new StaticMemory;
  return *memory;
}
size_t with_variable(size_t bytes, const StaticMemory::Variable& variable) {
  return (bytes + variable.alignment - 1) / variable.alignment * variable.alignment + variable.bytes;
}

// The shared memory of a kernel, as far as it is known.
struct Kernel {
  std::vector<bool> reached;      // The static shared variables that it has used,
  size_t static_bytes = 0;        // and their bytes.
  std::map<int, size_t> allowed;  // The dynamic shared memory that it may have, by device.
};
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}
// Guards the kernels and the machine.
std::mutex& machine_lock() {
  static std::mutex lock;
  return lock;
}

struct Devices {
  struct Stream {
    int device;
  };
  std::vector<Device> all{Device{}};
  std::vector<char> contexts{0};
  std::deque<Stream> streams{{0}};  // A deque, so that their addresses stay valid.
};
Devices& devices() {
  static Devices there;
  return there;
}
thread_local int current = 0;

struct AlignedDelete {
  void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t{kSharedAlignment}); }
};

struct Machine {
  const Launch* launch = nullptr;
  Kernel* kernel = nullptr;
  const std::function<void()>* thread = nullptr;
  Context scheduler;
  std::vector<Fiber> fibers;
  std::vector<std::vector<std::unique_ptr<Collective>>> collectives;  // By warp.
  Fiber* running = nullptr;
  std::string error;
  const Stacks* stacks = nullptr;
  std::unique_ptr<unsigned char[], AlignedDelete> shared;  // One part for each block that runs together with others,
  unsigned turn = 0;                                       // and the index of the running one.
};
Machine* machine = nullptr;

std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}
std::string text(Where where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}
std::string at_thread(const Fiber& fiber) {
  return std::string("kernel ") + machine->launch->name + ", block " + text(blockIdx) + ", thread " + text(fiber.index);
}
std::string waits(const Fiber& fiber) {
  if (fiber.state == State::done) return "thread " + text(fiber.index) + " has left the kernel";
  return "thread " + text(fiber.index) + " waits at " + fiber.operation + " in " + text(fiber.where);
}

void finish(const AsyncCopy& copy) {
  std::memcpy(copy.to, copy.from, copy.valid);
  std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
}

// Finishes the oldest groups of the running thread's copies until at most `pending_groups` closed ones are left.
void finish_copies(size_t pending_groups) {
  auto& groups = machine->running->copies;
  while (groups.size() > pending_groups + 1) {
    for (const AsyncCopy& copy : groups.front()) finish(copy);
    groups.erase(groups.begin());
  }
}

void back_to_scheduler() { switch_context(machine->running->context, machine->scheduler); }

unsigned running_thread() { return static_cast<unsigned>(machine->running - machine->fibers.data()); }

void wait(State state, const char* operation, Where where) {
  Fiber& fiber = *machine->running;
  fiber.state = state;
  fiber.operation = operation;
  fiber.where = where;
  back_to_scheduler();
}

// Runs a thread of one block after another.
void fiber_main() {
  for (;;) {
    (*machine->thread)();
    const Untraced own;
    finish_copies(0);
    for (const AsyncCopy& copy : machine->running->copies.back()) finish(copy);
    machine->running->state = State::done;
    back_to_scheduler();
  }
}

void resume(Fiber& fiber) {
  machine->running = &fiber;
  threadIdx = fiber.index;
  trace_thread(static_cast<unsigned>(machine->turn * machine->fibers.size()) + running_thread());
  switch_context(machine->scheduler, fiber.context);
  trace_no_thread();
  machine->running = nullptr;
  if (!machine->error.empty()) throw std::runtime_error(machine->error);
}

// Called when no thread can continue: either all are at the same barrier, which this opens, or the kernel has an error.
void open_barrier() {
  std::vector<Fiber>& fibers = machine->fibers;
  for (Fiber& fiber : fibers)
    if (fiber.state == State::at_collective)
      for (Fiber& other : fibers)
        if (&other != &fiber && other.state != State::at_collective &&
            (&other - fibers.data()) / kWarp == (&fiber - fibers.data()) / kWarp)
          throw std::runtime_error(at_thread(fiber) + ": " + fiber.operation + " in " + text(fiber.where) +
                                   " names an inactive lane: " + waits(other));
  const auto first =
      std::find_if(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == State::at_barrier; });
  const Fiber& waiting = first == fibers.end() ? fibers.front() : *first;
  for (const Fiber& fiber : fibers) {
    const bool same = fiber.state == State::at_barrier && fiber.where.line() == waiting.where.line() &&
                      fiber.where.column() == waiting.where.column() &&
                      std::strcmp(fiber.where.file_name(), waiting.where.file_name()) == 0;
    if (!same)
      throw std::runtime_error(at_thread(waiting) + ": " + waiting.operation + " in " + text(waiting.where) +
                               " is not reached by all: " + waits(fiber));
  }
  for (Fiber& fiber : fibers) fiber.state = State::ready;
  tell([&](Observer& o) { o.barrier(waiting.place); });
}

void poison_shared(size_t shared_bytes) {
  std::memset(dynamic_shared(), kPoison, shared_bytes);
  StaticMemory& memory = static_memory();
  for (const auto& variable : memory.variables) std::memset(memory.memory + variable.offset, kPoison, variable.bytes);
}

// Returns an error message where a block takes too much shared memory, or an empty string.
std::string too_much_shared(const Launch& launch, const Kernel& kernel) {
  const size_t dynamic = launch.shared_bytes, total = kernel.static_bytes + dynamic;
  const auto text = [&](size_t most, const char* why) {
    return std::to_string(kernel.static_bytes) + " bytes of static and " + std::to_string(dynamic) +
           " of dynamic shared memory are more than the " + std::to_string(most) + why;
  };
  const size_t limit = device(current).shared_bytes;
  if (total > limit) return text(limit, " that a block of this device may have");
  const auto allowed = kernel.allowed.find(current);
  if (total > kSharedBytes && (allowed == kernel.allowed.end() || dynamic > allowed->second))
    return text(kSharedBytes, " that a block has unless cudaFuncSetAttribute allows for more");
  return "";
}

// Throws std::runtime_error for a launch that no device accepts.
void require_launchable(const Launch& launch, const Kernel& kernel) {
  const auto require = [&](bool holds, const std::string& otherwise) {
    if (!holds) throw std::runtime_error(std::string("kernel ") + launch.name + ": " + otherwise);
  };
  const dim3 grid = launch.grid, block = launch.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  const std::string of_grid = text(uint3{grid.x, grid.y, grid.z}), of_block = text(uint3{block.x, block.y, block.z});
  require(grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x < 1u << 31 && grid.y < 1u << 16 && grid.z < 1u << 16,
          "a grid of " + of_grid + " blocks; it has 1 to (2147483647, 65535, 65535)");
  require(threads > 0 && threads <= kMaxThreads && block.z <= 64,
          "a block of " + of_block + " threads; it has 1 to 1024, at most 64 of them along z");
  require(threads <= launch_bounds(launch.kernel), "a block of " + std::to_string(threads) +
                                                       " threads; its launch bounds allow " +
                                                       std::to_string(launch_bounds(launch.kernel)));
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  require(launch.depend != Blocks::together ||
              (blocks <= static_cast<uint64_t>(device(current).multiprocessors) && blocks * threads <= kMostTogether),
          std::to_string(blocks) + " blocks are more than run together");
  const std::string wrong = too_much_shared(launch, kernel);
  require(wrong.empty(), wrong);
}

std::vector<Fiber> make_fibers(const dim3& block, const Stacks& stacks, unsigned first) {
  std::vector<Fiber> fibers(size_t{block.x} * block.y * block.z);
  for (unsigned i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    ucontext_t& begin = fiber.context.begin;
    getcontext(&begin);
    begin.uc_stack.ss_sp = stacks[first + i];
    begin.uc_stack.ss_size = kStackBytes;
    begin.uc_link = nullptr;
    makecontext(&begin, fiber_main, 0);
  }
  return fibers;
}

Freedom freedom_of_launch;

// The index of an environment variable's value among `values`; 0 where the variable is not set.
size_t choice(const char* variable, std::initializer_list<const char*> values) {
  const char* const text = std::getenv(variable);
  if (text == nullptr) return 0;
  const auto found =
      std::find_if(values.begin(), values.end(), [&](const char* v) { return std::strcmp(text, v) == 0; });
  if (found == values.end()) throw std::runtime_error(std::string(variable) + " has no value " + text);
  return static_cast<size_t>(found - values.begin());
}

Freedom read_freedom() {
  return {static_cast<Freedom::Order>(choice("CPC_EMULATION_ORDER", {"rounds", "forward", "backward", "greedy"})),
          choice("CPC_EMULATION_COPIES", {"late", "early"}) == 1, choice("CPC_EMULATION_MATH", {"exact", "gpu"}) == 1};
}

// Threads warp by warp, with warps and the lanes of each in random order.
std::vector<unsigned> warp_by_warp(unsigned threads, std::mt19937& random) {
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0);
  std::vector<unsigned> warps((threads + kWarp - 1) / kWarp);
  std::iota(warps.begin(), warps.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  std::shuffle(warps.begin(), warps.end(), random);
  std::stable_sort(order.begin(), order.end(),
                   [&](unsigned a, unsigned b) { return warps[a / kWarp] < warps[b / kWarp]; });
  return order;
}

void begin_block() {
  machine->collectives.clear();
  machine->collectives.resize((machine->fibers.size() + kWarp - 1) / kWarp);
  for (Fiber& fiber : machine->fibers) {
    fiber.state = State::ready;
    fiber.copies.assign(1, {});
  }
}

// Whether all threads of the block wait at the same barrier among blocks.
bool waits_for_blocks() {
  const Fiber& any = machine->fibers.front();
  return std::all_of(machine->fibers.begin(), machine->fibers.end(), [&](const Fiber& fiber) {
    return fiber.state == State::at_blocks && fiber.barrier == any.barrier && fiber.blocks == any.blocks;
  });
}

// Runs the block to its end, or until it waits for other blocks. Returns whether it has ended.
bool run_block(std::mt19937& random) {
  const auto threads = static_cast<unsigned>(machine->fibers.size());
  const bool greedy = freedom().order == Freedom::Order::greedy;
  std::vector<unsigned> order = warp_by_warp(threads, random);
  if (!greedy) std::sort(order.begin(), order.end());
  if (freedom().order == Freedom::Order::backward) std::reverse(order.begin(), order.end());
  for (;;) {
    if (freedom().order == Freedom::Order::rounds) std::shuffle(order.begin(), order.end(), random);
    bool ran = false, done = true;
    for (size_t i = 0; i < order.size();) {
      Fiber& fiber = machine->fibers[order[i]];
      const bool runs = fiber.state == State::ready;
      if (runs) resume(fiber);
      ran |= runs;
      done &= fiber.state == State::done;
      if (greedy && runs)  // Other lanes of the warp may be able to go on now, before any thread of the next warp.
        while (i > 0 && order[i - 1] / kWarp == order[i] / kWarp) --i;
      else
        ++i;
    }
    if (done) return true;
    if (ran) continue;
    if (waits_for_blocks()) return false;
    open_barrier();
  }
}

Range range_of(const void* memory, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  return {begin, begin + bytes};
}

// The blocks to run, in the order to run them in. A sample has one block from each of as many equal parts of the grid,
// at a random position in each part, as otherwise all might be in one column.
std::vector<uint64_t> choose_blocks(uint64_t in_grid, Blocks depend, std::mt19937& random) {
  const uint64_t count = depend != Blocks::apart || most_blocks() == 0 ? in_grid : std::min(in_grid, most_blocks());
  std::vector<uint64_t> blocks(count);
  for (uint64_t i = 0; i < count; ++i) {
    const uint64_t first = in_grid * i / count, end = in_grid * (i + 1) / count;
    blocks[i] = end - first == 1 ? first : first + random() % (end - first);
  }
  std::shuffle(blocks.begin(), blocks.end(), random);
  return blocks;
}

void go_to_block(uint64_t b) {
  blockIdx = {static_cast<unsigned>(b % gridDim.x), static_cast<unsigned>(b / gridDim.x % gridDim.y),
              static_cast<unsigned>(b / gridDim.x / gridDim.y)};
}

void run_apart(const std::vector<uint64_t>& blocks, std::mt19937& random) {
  machine->fibers = make_fibers(machine->launch->block, *machine->stacks, 0);
  for (const uint64_t b : blocks) {
    go_to_block(b);
    poison_shared(machine->launch->shared_bytes);
    trace_block(b);
    tell([&](Observer& o) { o.block_begins(b); });
    begin_block();
    run_block(random);
    tell([](Observer& o) { o.block_ends(); });
  }
}

// The state of a block that runs together with others while it is not its turn.
struct Waiting {
  uint64_t block;
  unsigned turn;
  std::vector<Fiber> fibers;
  std::vector<std::vector<std::unique_ptr<Collective>>> collectives;
  bool done = false, begun = false, waits = false;
};

// Opens the barriers among blocks that all of their blocks have reached. Returns whether there were any.
bool open_barriers(std::vector<Waiting>& all) {
  bool any = false;
  for (const Waiting& one : all) {
    if (!one.waits) continue;
    const Fiber& at = one.fibers.front();
    std::vector<uint64_t> met;
    for (const Waiting& other : all)
      if (other.waits && other.fibers.front().barrier == at.barrier) met.push_back(other.block);
    if (met.size() != at.blocks) continue;
    for (Waiting& other : all) {
      if (!other.waits || other.fibers.front().barrier != at.barrier) continue;
      for (Fiber& fiber : other.fibers) fiber.state = State::ready;
      other.waits = false;
    }
    tell([&](Observer& o) { o.blocks_meet(met); });
    any = true;
  }
  return any;
}

// Runs blocks in turns, each as far as it gets, in a new order in every round.
void run_together(const std::vector<uint64_t>& blocks, std::mt19937& random) {
  std::vector<Waiting> all;
  const dim3 block = machine->launch->block;
  const unsigned threads = block.x * block.y * block.z;
  for (unsigned turn = 0; turn < blocks.size(); ++turn)
    all.push_back({blocks[turn], turn, make_fibers(block, *machine->stacks, turn * threads), {}});
  for (;;) {
    std::shuffle(all.begin(), all.end(), random);
    for (Waiting& one : all) {
      if (one.done || one.waits) continue;
      machine->turn = one.turn;
      std::swap(machine->fibers, one.fibers);
      std::swap(machine->collectives, one.collectives);
      go_to_block(one.block);
      trace_turn(one.block);
      tell([&](Observer& o) { o.block_begins(one.block); });
      if (!one.begun) {
        std::memset(dynamic_shared(), kPoison, machine->launch->shared_bytes);
        begin_block();
      }
      one.begun = true;
      one.done = run_block(random);
      one.waits = !one.done;
      tell([](Observer& o) { o.block_ends(); });
      std::swap(machine->fibers, one.fibers);
      std::swap(machine->collectives, one.collectives);
    }
    if (std::all_of(all.begin(), all.end(), [](const Waiting& one) { return one.done; })) return;
    if (open_barriers(all)) continue;
    const auto left = std::find_if(all.begin(), all.end(), [](const Waiting& one) { return one.waits; });
    go_to_block(left->block);
    throw std::runtime_error(at_thread(left->fibers.front()) + " waits for " +
                             std::to_string(left->fibers.front().blocks) + " blocks in " +
                             text(left->fibers.front().where) + ", which do not all come");
  }
}

unsigned seed() {
  const char* const text = std::getenv("CPC_EMULATION_SEED");
  return text != nullptr ? static_cast<unsigned>(std::strtoul(text, nullptr, 10)) : 0;
}

// The number of launches since draws began; together with the seed it seeds a launch.
unsigned launches = 0;

}  // namespace

size_t Device::default_shared_bytes() {
  const char* const kib = std::getenv("CPC_EMULATION_SHARED_KIB");
  return (kib != nullptr ? std::strtoul(kib, nullptr, 10) : 99) << 10;
}

int Device::default_multiprocessors() {
  const char* const count = std::getenv("CPC_EMULATION_MULTIPROCESSORS");
  return count != nullptr ? std::atoi(count) : 2;
}

void set_devices(std::vector<Device> to) {
  Devices& there = devices();
  there.contexts.assign(to.size(), 0);
  while (there.streams.size() < to.size()) there.streams.push_back({static_cast<int>(there.streams.size())});
  there.all = std::move(to);
  for (auto& [address, kernel] : kernels()) kernel.allowed.clear();
  current = 0;
}

int device_count() { return static_cast<int>(devices().all.size()); }
const Device& device(int index) { return devices().all.at(static_cast<size_t>(index)); }
int current_device() { return current; }
bool has_context(int index) { return devices().contexts.at(static_cast<size_t>(index)) != 0; }
void set_current_device(int index) {
  devices().contexts.at(static_cast<size_t>(index)) = 1;
  current = index;
}

void begin_draws() { launches = 0; }

void* stream_of(int index) { return &devices().streams.at(static_cast<size_t>(index)); }

void use_stream(const char* doing, void* stream) {
  const int of = stream != nullptr ? static_cast<const Devices::Stream*>(stream)->device : current;
  if (of != current)
    throw std::runtime_error(std::string(doing) + ": a stream of device " + std::to_string(of) + ", but device " +
                             std::to_string(current) + " is current");
  set_current_device(current);
}

void run(const Launch& launch, const std::function<void()>& thread) {
  const std::lock_guard lock(machine_lock());
  freedom_of_launch = read_freedom();
  use_stream((std::string("kernel ") + launch.name).c_str(), launch.stream);
  Kernel& kernel = kernels()[launch.kernel];
  kernel.reached.resize(static_memory().variables.size());
  require_launchable(launch, kernel);
  const dim3 grid = launch.grid;
  Machine current_machine;
  current_machine.launch = &launch;
  current_machine.kernel = &kernel;
  current_machine.thread = &thread;
  const bool together = launch.depend == Blocks::together;
  // Allocated with the exact size, so that AddressSanitizer knows where it ends.
  const size_t shared_bytes = launch.shared_bytes * (together ? size_t{grid.x} * grid.y * grid.z : 1);
  current_machine.shared.reset(new (std::align_val_t{kSharedAlignment}) unsigned char[shared_bytes]);
  machine = &current_machine;
  gridDim = grid;
  blockDim = launch.block;
  std::mt19937 random(seed() * 1000003u + launches++);
  const uint64_t in_grid = uint64_t{grid.x} * grid.y * grid.z;
  const unsigned threads = launch.block.x * launch.block.y * launch.block.z;
  // The stacks of blocks that run together are freed after the launch: each takes two of a process's 65530 mappings.
  std::optional<Stacks> of_blocks;
  if (together) of_blocks.emplace(static_cast<unsigned>(in_grid) * threads);
  current_machine.stacks = together ? &*of_blocks : &stacks_of_a_block();
  const std::vector<uint64_t> blocks = choose_blocks(in_grid, launch.depend, random);
  trace_launch({current_machine.stacks->range(), range_of(current_machine.shared.get(), shared_bytes),
                range_of(static_memory().memory, StaticMemory::kBytes)},
               threads, static_cast<unsigned>(together ? in_grid : 1));
  tell([&](Observer& o) { o.launch_begins(launch, {in_grid, blocks.size()}); });
  try {
    together ? run_together(blocks, random) : run_apart(blocks, random);
  } catch (...) {
    machine = nullptr;
    throw;
  }
  machine = nullptr;
  tell([](Observer& o) { o.launch_ends(); });
}

const Freedom& freedom() { return freedom_of_launch; }

int64_t largest_grid() {
  const char* const text = std::getenv("CPC_EMULATION_GRID");
  return text != nullptr ? std::strtoll(text, nullptr, 10) : std::numeric_limits<int64_t>::max();
}

unsigned launch_bounds(const void* kernel) {
#if defined(__x86_64__)
  constexpr unsigned char kBranchTarget[] = {0xf3, 0x0f, 0x1e, 0xfa};  // endbr64
  constexpr unsigned char kNothing[] = {0x90};                         // nop
#elif defined(__aarch64__)
  constexpr unsigned char kBranchTarget[] = {0x5f, 0x24, 0x03, 0xd5};  // bti c
  constexpr unsigned char kNothing[] = {0x1f, 0x20, 0x03, 0xd5};       // nop
#else
#error "The emulation must know what this processor's instructions that do nothing look like."
#endif
  const auto* at = static_cast<const unsigned char*>(kernel);
  if (std::memcmp(at, kBranchTarget, sizeof kBranchTarget) == 0) at += sizeof kBranchTarget;
  unsigned count = 0;
  while (count < kMaxThreads && std::memcmp(at + count * sizeof kNothing, kNothing, sizeof kNothing) == 0) ++count;
  return count == 0 ? kMaxThreads : count;
}

size_t static_shared_bytes() { return static_memory().total; }

bool allow_dynamic_shared(const void* kernel, size_t bytes) {
  const std::lock_guard lock(machine_lock());
  Kernel& asks = kernels()[kernel];
  if (asks.static_bytes + bytes > device(current).shared_bytes) return false;
  asks.allowed[current] = bytes;
  set_current_device(current);
  return true;
}

std::string position() {
  return machine != nullptr && machine->running != nullptr ? at_thread(*machine->running) : "no kernel";
}

void fail(const std::string& what, Where where) { fail(what + " in " + text(where)); }

void fail(const std::string& what) {
  machine->error = position() + ": " + what;
  back_to_scheduler();
  std::abort();  // A failed thread is not resumed.
}

void wait_for_blocks(const void* barrier, unsigned blocks, Where where) {
  if (machine->launch->depend != Blocks::together) fail("a barrier among blocks that do not run together", where);
  machine->running->place = place_of(__builtin_return_address(0));
  const Untraced own;
  machine->running->barrier = barrier;
  machine->running->blocks = blocks;
  wait(State::at_blocks, "a barrier among blocks", where);
}

void barrier(Where where) {
  machine->running->place = place_of(__builtin_return_address(0));
  const Untraced own;
  wait(State::at_barrier, "__syncthreads", where);
}

unsigned lane() { return running_thread() % kWarp; }

void collective(const char* name, uint32_t mask, void* arguments, Combine combine, Where where) {
  const Place place = place_of(__builtin_return_address(0));
  const Untraced own;
  const unsigned self = running_thread();
  const unsigned first = self / kWarp * kWarp;
  const auto threads = static_cast<unsigned>(machine->fibers.size());
  // The last warp may be incomplete; a mask may name lanes that it does not have.
  if (threads - first < kWarp) mask &= (1u << (threads - first)) - 1;
  if ((mask >> lane() & 1) == 0) fail(std::string(name) + " from a lane that its mask leaves out", where);
  auto& open = machine->collectives[self / kWarp];
  auto found = std::find_if(open.begin(), open.end(), [&](const auto& c) {
    return c->mask == mask && c->name == name && c->where.line() == where.line() &&
           c->where.column() == where.column() && (c->arrived >> lane() & 1) == 0;
  });
  if (found == open.end()) {
    open.push_back(std::make_unique<Collective>(Collective{mask, 0, name, where}));
    found = open.end() - 1;
  }
  Collective& joined = **found;
  joined.arrived |= 1u << lane();
  joined.lanes[lane()] = arguments;
  if (joined.arrived != mask) return wait(State::at_collective, name, where);
  const auto complete = std::move(*found);
  open.erase(found);
  machine->running->place = place;
  combine(complete->lanes);
  tell([&](Observer& o) { o.collective({name, self / kWarp, mask, place}); });
  for (unsigned l = 0; l < kWarp; ++l)
    if (mask >> l & 1) machine->fibers[first + l].state = State::ready;
}

unsigned char* dynamic_shared() { return machine->shared.get() + machine->turn * machine->launch->shared_bytes; }

size_t add_static_shared(size_t bytes, size_t alignment) {
  StaticMemory& memory = static_memory();
  const size_t step = std::max(alignment, kSharedAlignment), offset = (memory.used + step - 1) / step * step;
  memory.used = offset + bytes + kSharedAlignment;
  if (memory.used > StaticMemory::kBytes) throw std::runtime_error("emulation: too much static shared memory");
  memory.variables.push_back({offset, bytes, alignment});
  memory.total = with_variable(memory.total, memory.variables.back());
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(memory.memory + offset + bytes, kSharedAlignment);
#endif
  return memory.variables.size() - 1;
}

void tell_of_matrices(const void* const (&rows)[kWarp], bool transposed) {
  MatrixLoad load{{}, transposed, running_thread() / kWarp, machine->running->place};
  std::copy(std::begin(rows), std::end(rows), load.rows);
  tell([&](Observer& o) { o.load_matrices(load); });
}

void tell_of_product(const char* type, unsigned depth) {
  tell([&](Observer& o) { o.multiply_add({type, 16, 8, depth, running_thread() / kWarp, machine->running->place}); });
}

unsigned char* static_shared(size_t variable) {
  const Untraced own;
  if (machine->launch->depend == Blocks::together)
    fail("static shared memory, which the emulation does not keep for blocks that run together");
  const StaticMemory::Variable& reached = static_memory().variables[variable];
  Kernel& kernel = *machine->kernel;
  if (!kernel.reached[variable]) {
    kernel.reached[variable] = true;
    kernel.static_bytes = with_variable(kernel.static_bytes, reached);
    const std::string wrong = too_much_shared(*machine->launch, kernel);
    if (!wrong.empty()) fail(wrong);
  }
  return static_memory().memory + reached.offset;
}

void copy_async(void* to, const void* from, size_t bytes, size_t valid, Where where) {
  for (const void* p : {static_cast<const void*>(to), from})
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail("asynchronous copy at a misaligned address", where);
  const Place place = place_of(__builtin_return_address(0));
  const Untraced own;
  tell([&](Observer& o) { o.copy_async({to, from, bytes, valid, running_thread(), place}); });
  const AsyncCopy copy{to, from, bytes, valid};
  if (freedom().early_copies) return finish(copy);
  std::memset(to, kPoison, bytes);
  machine->running->copies.back().push_back(copy);
}

void commit_copies() {
  const Untraced own;
  tell([](Observer& o) { o.commit_copies(running_thread()); });
  machine->running->copies.emplace_back();
}

void wait_for_copies(size_t pending_groups) {
  const Place place = place_of(__builtin_return_address(0));
  const Untraced own;
  tell([&](Observer& o) { o.wait_for_copies(running_thread(), pending_groups, place); });
  finish_copies(pending_groups);
}

}  // namespace cpc::cuda::emulation

// The sanitizers call these when they report. For AddressSanitizer, which ends the program, this prints the position.
// Undefined behaviour, such as misaligned vectors, becomes an error of the launch.
extern "C" __attribute__((visibility("default"))) void __asan_on_error() {
  std::fprintf(stderr, "in %s\n", cpc::cuda::emulation::position().c_str());
}

#if !defined(CPC_CUDA_TRACE)
extern "C" void __ubsan_get_current_report_data(const char** kind, const char** message, const char** file,
                                                unsigned* line, unsigned* column, char** address);
extern "C" __attribute__((visibility("default"))) void __ubsan_on_report() {
  using cpc::cuda::emulation::machine;
  if (machine == nullptr || machine->running == nullptr) return;
  const char *kind, *message, *file;
  unsigned line, column;
  char* address;
  __ubsan_get_current_report_data(&kind, &message, &file, &line, &column, &address);
  machine->error = cpc::cuda::emulation::position() + ": " + message;
}
#endif
