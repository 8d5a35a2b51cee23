// The functions that the compiler calls before accesses, with the places and the kind of memory of these: see trace.h.
#include "core/cuda/emulation/trace.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <sstream>
#include <stdexcept>
#include <unordered_map>

#include "core/cuda/emulation/emulator.h"

namespace cpc::cuda::emulation {
namespace {

// --- Places ---

// The call stack of a thread, outermost call first. Each entry has the return address, and a hash of all up to it.
struct CallStack {
  static constexpr size_t kDeepest = 64;
  struct Call {
    const void* from;
    uint64_t hash;
  };
  std::array<Call, kDeepest> calls;
  size_t depth = 0;  // May exceed kDeepest; deeper calls are not distinguished.

  static uint64_t mix(uint64_t hash, const void* address) {
    hash = (hash ^ reinterpret_cast<uintptr_t>(address)) * 0x9e3779b97f4a7c15u;
    return hash ^ hash >> 32;
  }
  uint64_t hash() const { return depth == 0 ? 0 : calls[std::min(depth, kDeepest) - 1].hash; }
  void enter(const void* from) {
    if (depth < kDeepest) calls[depth] = {from, mix(hash(), from)};
    ++depth;
  }
  void leave() {
    if (depth > 0) --depth;
  }
};

struct Places {
  std::unordered_map<uint64_t, Place> numbers;
  std::vector<std::vector<const void*>> chains;  // For each place, its address and its callers', innermost first.

  Place number(const void* address, const CallStack& stack) {
    const auto [found, is_new] = numbers.try_emplace(CallStack::mix(stack.hash(), address), Place(chains.size()));
    if (is_new) {
      std::vector<const void*> chain{address};
      for (size_t i = std::min(stack.depth, CallStack::kDeepest); i > 0; --i) chain.push_back(stack.calls[i - 1].from);
      chains.push_back(std::move(chain));
    }
    return found->second;
  }
};
Places& places() {
  static Places all;
  return all;
}

// --- Kinds of memory ---

std::vector<Range> image_ranges() {
  std::vector<Range> ranges;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* to) {
        for (int i = 0; i < info->dlpi_phnum; ++i)
          if (const auto& segment = info->dlpi_phdr[i]; segment.p_type == PT_LOAD) {
            const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
            static_cast<std::vector<Range>*>(to)->push_back({begin, begin + segment.p_memsz});
          }
        return 0;
      },
      &ranges);
  std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
  return ranges;
}

// The stack of the launching thread, which holds the kernel's arguments until they are copied.
Range own_stack() {
  pthread_attr_t attributes;
  void* begin = nullptr;
  size_t bytes = 0;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &begin, &bytes);
    pthread_attr_destroy(&attributes);
  }
  const auto address = reinterpret_cast<uintptr_t>(begin);
  return {address, address + bytes};
}

// --- The trace ---

struct Thread {
  unsigned index;
  CallStack stack;
};

struct Trace {
  std::vector<std::unique_ptr<Observer>> observers;
  std::vector<std::string> names;
  uint64_t most_blocks = 0;
  Memory memory;
  Range launching_stack;
  std::vector<Range> images;
  std::vector<Thread> threads;
  uint64_t block = 0;

  bool is_private(uintptr_t address) const {
    if (memory.stacks.contains(address) || launching_stack.contains(address)) return true;
    const auto after = std::upper_bound(images.begin(), images.end(), address,
                                        [](uintptr_t a, const Range& range) { return a < range.begin; });
    return after != images.begin() && std::prev(after)->contains(address);
  }
  bool is_shared(uintptr_t address) const {
    return memory.dynamic_shared.contains(address) || memory.static_shared.contains(address);
  }
  void access(const Thread& thread, const void* address, size_t bytes, bool write, bool atomic, const void* from) {
    const auto at = reinterpret_cast<uintptr_t>(address);
    const bool shared = is_shared(at);
    if (bytes == 0 || (!shared && is_private(at))) return;
    const Untraced own;  // Observers may call instrumented functions of the standard library.
    const Access access{
        address,      bytes, write, atomic, shared ? Space::shared : Space::global, places().number(from, thread.stack),
        thread.index, block};
    for (const auto& observer : observers) observer->access(access);
  }
};
Trace trace;
// The emulated thread that this thread runs, or null where there are no observers.
thread_local Thread* running = nullptr;

}  // namespace

const std::vector<std::unique_ptr<Observer>>& observers() { return trace.observers; }
uint64_t most_blocks() { return trace.most_blocks; }

std::vector<ObserverKind>& ObserverKind::all() {
  static std::vector<ObserverKind> kinds;
  return kinds;
}

void begin_trace(const std::map<std::string, Options>& observers, uint64_t blocks) {
  std::vector<std::unique_ptr<Observer>> made;
  std::vector<std::string> names;
  for (const auto& [name, options] : observers) {
    const auto& kinds = ObserverKind::all();
    const auto kind = std::find_if(kinds.begin(), kinds.end(), [&](const ObserverKind& k) { return name == k.name; });
    if (kind == kinds.end()) throw std::invalid_argument("there is no observer " + name);
    made.push_back(kind->make(options));
    names.push_back(name);
  }
  trace.observers = std::move(made);
  trace.names = std::move(names);
  trace.most_blocks = blocks;
  begin_draws();
}

Dict end_trace() {
  Dict results;
  for (size_t i = 0; i < trace.observers.size(); ++i)
    results.emplace_back(trace.names[i], trace.observers[i]->results());
  trace.observers.clear();
  trace.names.clear();
  trace.most_blocks = 0;
  return results;
}

void trace_launch(const Memory& memory, unsigned threads, unsigned blocks_together) {
  trace.memory = memory;
  trace.launching_stack = own_stack();
  trace.images = image_ranges();
  trace.threads.resize(size_t{threads} * blocks_together);
  for (unsigned i = 0; i < trace.threads.size(); ++i) trace.threads[i] = {i % threads, {}};
}
void trace_block(uint64_t block) {
  trace.block = block;
  for (Thread& thread : trace.threads) thread.stack.depth = 0;
}
void trace_turn(uint64_t block) { trace.block = block; }
void trace_thread(unsigned thread) { running = trace.observers.empty() ? nullptr : &trace.threads[thread]; }
void trace_no_thread() { running = nullptr; }

Place place_of(const void* address) { return running == nullptr ? 0 : places().number(address, running->stack); }

Untraced::Untraced() : thread_(running) { running = nullptr; }
Untraced::~Untraced() { running = static_cast<Thread*>(thread_); }

void trace_atomic(const void* address, size_t bytes, const void* from) {
  if (running != nullptr) trace.access(*running, address, bytes, true, true, from);
}

void trace_arithmetic(Arithmetic what) {
  if (running == nullptr) return;
  for (const auto& observer : trace.observers) observer->arithmetic(what);
}

// --- Names ---

std::string name_of_address(const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  const auto byte = [&](const Range& range) { return "byte " + std::to_string(at - range.begin); };
  if (trace.memory.dynamic_shared.contains(at)) return byte(trace.memory.dynamic_shared) + " of dynamic shared memory";
  if (trace.memory.static_shared.contains(at)) return byte(trace.memory.static_shared) + " of static shared memory";
  std::ostringstream text;
  text << "global memory at " << address;
  return text.str();
}

namespace {

struct Module {
  std::string path;
  uintptr_t base;
};

// Function and position.
using Name = std::pair<std::string, std::string>;

// The names of return addresses in one module: for each, the function that makes the call, then those it is inlined
// into.
std::map<const void*, std::vector<Name>> names_in(const Module& module, const std::vector<const void*>& addresses) {
  std::map<const void*, std::vector<Name>> names;
  constexpr size_t kAtOnce = 1000;
  for (size_t first = 0; first < addresses.size(); first += kAtOnce) {
    const size_t end = std::min(first + kAtOnce, addresses.size());
    std::ostringstream command;
    command << "addr2line -afCi -e '" << module.path << "'" << std::hex;
    // A return address is behind its call.
    for (size_t i = first; i < end; ++i)
      command << " 0x" << reinterpret_cast<uintptr_t>(addresses[i]) - module.base - 1;
    FILE* const output = popen(command.str().c_str(), "r");
    if (output == nullptr) return names;
    const auto line = [&] {
      std::string text;
      for (int c; (c = std::fgetc(output)) != EOF && c != '\n';) text += static_cast<char>(c);
      return text;
    };
    // The address as "0x...", then a function and a position for each level.
    size_t next = first;
    for (std::string text = line(); !text.empty(); text = line()) {
      if (text.compare(0, 2, "0x") == 0) {
        ++next;
      } else if (next > first) {
        const std::string position = line(), file = position.substr(position.rfind('/') + 1);
        names[addresses[next - 1]].emplace_back(text, file.substr(0, file.find(' ')));
      }
    }
    pclose(output);
  }
  return names;
}

// Whether a position is unknown or in the code that calls a kernel.
bool is_of_emulation(const std::string& position) {
  const std::string file = position.substr(0, position.find(':'));
  for (const char* const other : {"??", "cuda_runtime.h", "emulator.h", "emulator.cpp", "std_function.h", "invoke.h"})
    if (file == other) return true;
  return false;
}

}  // namespace

std::string name_of_function(const void* function) {
  Dl_info info;
  if (dladdr(function, &info) == 0) return "";
  // names_in takes return addresses, which are behind a call.
  const void* const inside = static_cast<const char*>(function) + 1;
  const auto names = names_in({info.dli_fname, reinterpret_cast<uintptr_t>(info.dli_fbase)}, {inside});
  return names.empty() ? "" : names.begin()->second.back().first;
}

std::vector<std::string> describe(const std::vector<Place>& asked) {
  std::map<std::string, std::pair<Module, std::vector<const void*>>> modules;
  for (const Place place : asked)
    for (const void* const address : places().chains.at(place)) {
      Dl_info info;
      if (dladdr(address, &info) == 0) continue;
      auto& [module, addresses] = modules[info.dli_fname];
      module = {info.dli_fname, reinterpret_cast<uintptr_t>(info.dli_fbase)};
      addresses.push_back(address);
    }
  std::map<const void*, std::vector<Name>> names;
  for (auto& [path, module] : modules) {
    auto& addresses = module.second;
    std::sort(addresses.begin(), addresses.end());
    addresses.erase(std::unique(addresses.begin(), addresses.end()), addresses.end());
    names.merge(names_in(module.first, addresses));
  }
  std::vector<std::string> texts;
  for (const Place place : asked) {
    std::string text;
    for (const void* const address : places().chains[place])
      for (const auto& [function, position] : names[address])
        if (!is_of_emulation(position)) text += text.empty() ? function + " (" + position + ")" : " < " + position;
    texts.push_back(text.empty() ? "an unknown place" : text);
  }
  return texts;
}

}  // namespace cpc::cuda::emulation

// --- Functions that the compiler calls ---
// It calls none for memcpy and memset, so kernels must not use these on memory that threads share.

using cpc::cuda::emulation::running;
using cpc::cuda::emulation::trace;

#define CPC_TELL(address, bytes, write) \
  if (running != nullptr) trace.access(*running, address, bytes, write, false, __builtin_return_address(0))
#define CPC_ACCESSES(prefix, bytes)                                                             \
  void __tsan_##prefix##read##bytes(void* address) { CPC_TELL(address, size_t{bytes}, false); } \
  void __tsan_##prefix##write##bytes(void* address) { CPC_TELL(address, size_t{bytes}, true); }

extern "C" {
CPC_ACCESSES(, 1)
CPC_ACCESSES(, 2)
CPC_ACCESSES(, 4)
CPC_ACCESSES(, 8)
CPC_ACCESSES(, 16)
CPC_ACCESSES(unaligned_, 2)
CPC_ACCESSES(unaligned_, 4)
CPC_ACCESSES(unaligned_, 8)
CPC_ACCESSES(unaligned_, 16)
void __tsan_read_range(void* address, size_t bytes) { CPC_TELL(address, bytes, false); }
void __tsan_write_range(void* address, size_t bytes) { CPC_TELL(address, bytes, true); }
void __tsan_vptr_read(void** address) { CPC_TELL(address, sizeof(void*), false); }
void __tsan_vptr_update(void** address, void*) { CPC_TELL(address, sizeof(void*), true); }
void __tsan_func_entry(void* from) {
  if (running != nullptr) running->stack.enter(from);
}
void __tsan_func_exit() {
  if (running != nullptr) running->stack.leave();
}
void __tsan_init() {}
// The only C++ atomic operation that is needed: it guards the initialization of static variables. Kernels use CUDA's
// atomics; any other C++ atomic fails to link.
uint8_t __tsan_atomic8_load(const volatile uint8_t* at, int) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
}
