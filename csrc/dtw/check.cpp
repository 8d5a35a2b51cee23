// Checks beyond the field table of dtw.h: items must lie within the frames, and pairs must name items.
#include <string>

#include "core/require.h"
#include "dtw/dtw.h"

namespace cpc::dtw {

void check(const Problem& problem, Where where) {
  if (!readable(where)) return;
  const int64_t frames = problem.frames.shape[0], items = problem.first.shape[0];
  for (int64_t k = 0; k < items; ++k) {
    const int64_t first = problem.first.as<int64_t>()[k], count = problem.count.as<int64_t>()[k];
    if (count < 1 || first < 0 || count > frames || first > frames - count)
      require(false, "first and count must name at least one of " + std::to_string(frames) + " frames, got " +
                         std::to_string(first) + " and " + std::to_string(count) + " for item " + std::to_string(k));
  }
  for (int64_t i = 0; i < problem.pairs.numel(); ++i) {
    const int64_t item = problem.pairs.as<int64_t>()[i];
    if (item < 0 || item >= items)
      require(false, "pairs must name items, 0 to " + std::to_string(items - 1) + ", got " + std::to_string(item));
  }
}

}  // namespace cpc::dtw
