// The scratch memory of parallel loops: one buffer a calling thread, grown when a loop asks for more; and what threads
// cost.
#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "core/aligned_buffer.h"

namespace cpc {

#if !defined(__SANITIZE_THREAD__)
namespace {

// Nanoseconds of a loop without work on all threads, the shortest of some.
double empty_loop_nanoseconds() {
  constexpr int kLoops = 16;
  double shortest = 1e9;
  for (int i = 0; i < kLoops; ++i) {
    const auto begin = std::chrono::steady_clock::now();
#pragma omp parallel
    {
    }
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - begin;
    shortest = std::min(shortest, took.count());
  }
  return shortest;
}

}  // namespace

double thread_nanoseconds() {
  struct Cost {
    std::atomic<int> threads = 0;
    std::atomic<double> nanoseconds = 0;
  };
  static Cost known;
  const int threads = workers();
  if (known.threads.load(std::memory_order_acquire) != threads) {
    // Two threads save at most half of a loop's time: with twice the cost for each, they gain as much as they cost.
    known.nanoseconds.store(std::max(kThreadNanoseconds, 2 * empty_loop_nanoseconds()), std::memory_order_relaxed);
    known.threads.store(threads, std::memory_order_release);
  }
  return known.nanoseconds.load(std::memory_order_relaxed);
}
#endif

Scratch::Scratch(int64_t bytes)
    : pitch_((bytes + AlignedBuffer::kAlignment - 1) / AlignedBuffer::kAlignment * AlignedBuffer::kAlignment) {
  thread_local AlignedBuffer buffer;
  base_ = buffer.reserve(pitch_ * workers());
}

}  // namespace cpc
