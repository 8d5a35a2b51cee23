// Runs parts of csrc/core that have no Python binding. "buddyinfo" prints the number of large pages of the text in its
// input. "threads" prints how often a loop got one thread of two: where one was slower, after it had become faster,
// after it had become slower again, and for a loop that is too small for two. "powers" prints powers of e as the lowest
// instruction set level computes them.
#include <chrono>
#include <cstdio>
#include <cstring>

#define CPC_ISA baseline
#include "core/buddyinfo.h"
#include "core/learned_threads.h"
#include "core/simd_math.h"

namespace cpc {

// The number without any measurement, by which loops of 0.1 ms or more get both threads.
double thread_nanoseconds() { return kThreadNanoseconds; }

}  // namespace cpc

namespace {

// A clock that only loops advance.
struct FakeClock {
  using duration = std::chrono::duration<double, std::nano>;
  using time_point = std::chrono::time_point<FakeClock, duration>;
  static inline double nanoseconds = 0;
  static time_point now() { return time_point(duration(nanoseconds)); }
};

// The number of runs that got one thread, for a loop that takes `alone` ns with one thread and `together` ns with two.
int runs_alone(cpc::LearnedThreads<FakeClock>& threads, int runs, double alone, double together) {
  int found = 0;
  for (int run = 0; run < runs; ++run)
    threads.run(2e5, [&](int number) {
      found += number == 1;
      FakeClock::nanoseconds += number == 1 ? alone : together;
    });
  return found;
}

}  // namespace

int main(int, char** arguments) {
  if (std::strcmp(arguments[1], "buddyinfo") == 0) {
    static char text[1 << 16];
    text[std::fread(text, 1, sizeof text - 1, stdin)] = 0;
    std::printf("%lld\n", static_cast<long long>(cpc::free_huge_pages_of(text)));
  }
  if (std::strcmp(arguments[1], "threads") == 0) {
    omp_set_num_threads(2);
    cpc::LearnedThreads<FakeClock> threads;
    constexpr double kShort = 2e4, kLong = 3e5;
    const int slower = runs_alone(threads, 1000, kLong, kShort);
    const int faster = runs_alone(threads, 2000, kShort, kLong);
    const int slower_again = runs_alone(threads, 2000, kLong, kShort);
    cpc::LearnedThreads<FakeClock> small;
    int one = 0;
    for (int run = 0; run < 10; ++run) small.run(1e4, [&](int number) { one += number == 1; });
    std::printf("%d %d %d %d\n", slower, faster, slower_again, one);
  }
  if (std::strcmp(arguments[1], "powers") == 0)
    for (const float x : {-INFINITY, -100.f, -1.f, 0.f, INFINITY, NAN})
      std::printf("%g\n", cpc::baseline::exp_below_zero(cpc::baseline::in_all_lanes(x))[0]);
}
