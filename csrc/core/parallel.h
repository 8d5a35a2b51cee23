// Parallel loops on the CPU and memory for their intermediate results. They use OpenMP, so that torch.set_num_threads
// holds for them too.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#else
#include <omp.h>
#endif

namespace cpc {

// The least work, in nanoseconds, that is worth waking a thread for. A sleeping thread needs 5 to 10 us to begin, and
// where other processes keep the cores busy the loop ends only when the last thread has had its turn.
constexpr double kThreadNanoseconds = 50'000;

#if defined(__SANITIZE_THREAD__)

// ThreadSanitizer does not see OpenMP's own synchronisation, so tests/csrc/race_check.cpp runs loops on std::thread.
inline int workers() { return 4; }
inline int workers_for(double) { return workers(); }

template <class Body>
void parallel_for(int64_t n, const Body& body, int = workers()) {
  std::vector<std::thread> threads;
  for (int worker = 0; worker < workers(); ++worker)
    threads.emplace_back([&body, n, worker] {
      for (int64_t i = worker; i < n; i += workers()) body(i, worker);
    });
  for (std::thread& thread : threads) thread.join();
}

template <class Body>
void parallel_tasks(int64_t n, const Body& body, int = workers()) {
  parallel_for(n, body);
}

#else

// The number of workers that a parallel loop started here may run on.
inline int workers() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// kThreadNanoseconds, or more where the measured cost of threads is higher: starting and ending a loop takes several
// times as long in virtual machines and where threads sleep while they wait (OMP_WAIT_POLICY=passive). Measured for
// workers() threads, and again only when that number changes.
double thread_nanoseconds();

// The number of workers for a loop that takes one thread about `nanoseconds`.
inline int workers_for(double nanoseconds) {
  const int most = workers();
  if (most == 1 || nanoseconds < 2 * kThreadNanoseconds) return 1;
  return static_cast<int>(std::clamp(nanoseconds / thread_nanoseconds(), 1., static_cast<double>(most)));
}

// A loop outside of any parallel region. Even a region of one thread costs most of a microsecond, as much as a pixel of
// a small network.
template <class Body>
void in_turn(int64_t n, const Body& body) {
  for (int64_t i = 0; i < n; ++i) body(i, 0);
}

// Calls body(i, worker) for every i in [0, n), in any order, on up to `threads` workers; worker is in [0, workers()).
// The body must not throw.
template <class Body>
void parallel_for(int64_t n, const Body& body, int threads = workers()) {
  if (n <= 1 || threads <= 1) return in_turn(n, body);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) body(i, omp_in_parallel() ? omp_get_thread_num() : 0);
}

// The same for large bodies of unequal work: a worker that is done takes the next one.
template <class Body>
void parallel_tasks(int64_t n, const Body& body, int threads = workers()) {
  if (n <= 1 || threads <= 1) return in_turn(n, body);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) body(i, omp_in_parallel() ? omp_get_thread_num() : 0);
}

#endif

// 64-byte aligned memory for the next loop: `bytes` for each worker, with undefined contents. Worker w's memory begins
// at w * `bytes` rounded up. The calling thread owns the memory and reuses it: it is valid until that thread makes its
// next Scratch. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  // `bytes` of memory that all workers share; it begins at of(0).
  static Scratch shared(int64_t bytes) { return Scratch((bytes + workers() - 1) / workers()); }
  template <class T>
  T* of(int worker) const {
    return reinterpret_cast<T*>(base_ + worker * pitch_);
  }

 private:
  char* base_;
  int64_t pitch_;
};

}  // namespace cpc
