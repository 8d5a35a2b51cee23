// See parallel.h. Each calling thread has one scratch buffer, which grows on demand.
#include "core/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "core/aligned_buffer.h"

namespace cpc {

#if !defined(__SANITIZE_THREAD__)
namespace {

// The shortest time of a few parallel loops without work, on all threads.
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
    // Twice the cost per thread, because two threads save at most half of a loop's time.
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
