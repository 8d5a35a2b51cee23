// Size arithmetic, and the division of a workspace that a caller owns.
#pragma once

#include <cstdint>

namespace cpc {

constexpr int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Hands out parts of a workspace, each aligned to a cache line. With null for memory, it only counts bytes.
class Parts {
 public:
  explicit Parts(char* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t n) {
    T* const part = reinterpret_cast<T*>(memory_ + used_);
    used_ += divide_up(n * static_cast<int64_t>(sizeof(T)), 64) * 64;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

}  // namespace cpc
