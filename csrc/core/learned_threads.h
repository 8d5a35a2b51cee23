// Chooses the threads of a loop that runs again and again, such as once a pixel: one or several, whichever has been
// faster so far. Waking threads and waiting for the last of them costs between a microsecond and milliseconds. It
// depends on whether threads sleep while they wait (OMP_WAIT_POLICY), on the virtual machine, and on what else keeps
// the cores busy.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>

#include "core/parallel.h"

namespace cpc {

// The measurements of one loop. The thread that starts the loop owns them, so no locks are needed. Tests pass their own
// clock.
template <class Clock = std::chrono::steady_clock>
class LearnedThreads {
 public:
  // Calls loop(threads), whose results must not depend on that number. `nanoseconds` estimates the time of one thread.
  template <class Loop>
  void run(double nanoseconds, const Loop& loop) {
    const int threads = workers_for(nanoseconds);
    // One bucket per power of two of work. Beyond the last one, the work is worth several threads whatever they cost.
    const int bucket = std::max(0, std::ilogb(nanoseconds / kThreadNanoseconds));
    if (threads == 1 || bucket >= static_cast<int>(tried_.size())) return loop(threads);
    Tried& tried = tried_[bucket];
    if (tried.threads != threads) tried = {.threads = threads};
    const bool alone = tried.alone_next();
    const auto begin = Clock::now();
    loop(alone ? 1 : threads);
    const std::chrono::duration<double, std::nano> took = Clock::now() - begin;
    tried.add(alone, took.count() / nanoseconds);
  }

 private:
  struct Tried {
    static constexpr int64_t kFirst = 8, kAgain = 64, kMostAgain = 4096;

    int threads = 0;
    int64_t runs = 0, again = kAgain, next_try = kFirst + kAgain;
    double alone = 0, together = 0;  // Running means of the time over the estimated time; the latest weigh most.

    bool better_alone() const { return alone <= together; }
    // Alternates between the two at first, then takes the better one, and at growing intervals tries the other again.
    bool alone_next() const {
      if (runs < kFirst) return runs % 2 != 0;
      return runs == next_try ? !better_alone() : better_alone();
    }
    void add(bool was_alone, double rate) {
      const bool before = better_alone();
      double& mean = was_alone ? alone : together;
      mean = runs < 2 || runs == next_try ? rate : mean + (rate - mean) / 4;
      if (runs++ != next_try) return;
      again = better_alone() == before ? std::min(2 * again, kMostAgain) : kAgain;
      next_try = runs + again;
    }
  };
  std::array<Tried, 7> tried_;
};

}  // namespace cpc
