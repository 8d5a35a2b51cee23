// Parallel loops on the CPU and memory for their intermediate results. OpenMP, so that torch.set_num_threads holds for
// these loops too.
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

// Work that a thread must get of a loop to be worth waking, in nanoseconds, at least. A thread that sleeps needs 5 to
// 10 us to begin, and where other processes keep the cores busy the loop ends when the last thread has had its turn.
constexpr double kThreadNanoseconds = 50'000;

#if defined(__SANITIZE_THREAD__)

// ThreadSanitizer does not see OpenMP's own synchronisation; of these threads it sees all. For
// tests/csrc/race_check.cpp.
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

// Workers that a parallel loop started here runs on.
inline int workers() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

// The same as measured: where threads are told to sleep while they wait (OMP_WAIT_POLICY=passive), and in virtual
// machines, to begin and to end a loop takes several times as long. For as many threads as there are; measured once.
double thread_nanoseconds();

// Workers for a loop that takes one thread about so long.
inline int workers_for(double nanoseconds) {
  const int most = workers();
  if (most == 1 || nanoseconds < 2 * kThreadNanoseconds) return 1;
  return static_cast<int>(std::clamp(nanoseconds / thread_nanoseconds(), 1., static_cast<double>(most)));
}

// A parallel region of one thread costs most of a microsecond, as much as a pixel of a small network.
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

// The same for large bodies of unequal work: whoever is done takes the next.
template <class Body>
void parallel_tasks(int64_t n, const Body& body, int threads = workers()) {
  if (n <= 1 || threads <= 1) return in_turn(n, body);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t i = 0; i < n; ++i) body(i, omp_in_parallel() ? omp_get_thread_num() : 0);
}

#endif

// `bytes` of 64-byte aligned memory for each worker of the next loop, contents undefined; worker w's begins at
// w * rounded-up bytes. Owned by the calling thread, kept for reuse, valid until its next call. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(int64_t bytes);
  // `bytes` that all workers share, from of(0) on.
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
