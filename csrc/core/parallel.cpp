// The scratch memory of parallel loops: one buffer a calling thread, grown when a loop asks for more.
#include "core/parallel.h"

#include <memory>
#include <new>

namespace cpc {
namespace {

constexpr int64_t kAlignment = 64;  // A cache line, and the widest vector.

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t{kAlignment}); }
};

struct Buffer {
  std::unique_ptr<char[], AlignedDelete> memory;
  int64_t size = 0;
};

}  // namespace

Scratch::Scratch(int64_t bytes) : pitch_((bytes + kAlignment - 1) / kAlignment * kAlignment) {
  thread_local Buffer buffer;
  const int64_t size = pitch_ * workers();
  if (size > buffer.size) {
    buffer.size = 0;
    buffer.memory.reset();
    buffer.memory.reset(new (std::align_val_t{kAlignment}) char[size]);
    buffer.size = size;
  }
  base_ = buffer.memory.get();
}

}  // namespace cpc
