// A buffer that is kept for reuse and grows on demand.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace cpc {

class AlignedBuffer {
 public:
  // Returns at least `bytes` bytes, aligned to a cache line and to the widest vector. Their contents are undefined, and
  // they are valid until the next call. Throws std::bad_alloc.
  char* reserve(int64_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      memory_.reset();
      memory_.reset(new (std::align_val_t{kAlignment}) char[bytes]);
      size_ = bytes;
    }
    return memory_.get();
  }

  static constexpr int64_t kAlignment = 64;

 private:
  struct Delete {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t{kAlignment}); }
  };

  std::unique_ptr<char[], Delete> memory_;
  int64_t size_ = 0;
};

}  // namespace cpc
