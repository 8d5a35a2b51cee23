// What the table of info_nce.h leaves open: fields that must fit each other, and on the host the indices.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/require.h"
#include "info_nce/info_nce.h"

namespace cpc::info_nce {
namespace {

void require_keys(const char* name, const TensorView& indices, int64_t keys) {
  const int64_t count = indices.numel();
  if (indices.ndim == 0 || count == 0) return;
  const auto* const values = indices.as<int64_t>();
  int64_t low = values[0], high = values[0];
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, values[i]);
    high = std::max(high, values[i]);
  }
  if (low < 0 || high >= keys)
    throw std::out_of_range(std::string(name) + " must be in 0.." + std::to_string(keys - 1) + " for " +
                            std::to_string(keys) + " keys, got " + std::to_string(low) + ".." + std::to_string(high));
}

void check_indices(const Problem& problem) {
  const int64_t keys = problem.keys_count(), rows = problem.rows();
  require_keys("targets", problem.targets, keys);
  require_keys("negatives", problem.negatives, keys);
  require_keys("exclude", problem.exclude, keys);
  if (problem.exclude.ndim == 0) return;
  const auto* const exclude = problem.exclude.as<int64_t>();
  const auto* const targets = problem.targets.ndim != 0 ? problem.targets.as<int64_t>() : nullptr;
  for (int64_t i = 0; i < problem.batch() * rows; ++i)
    if (exclude[i] == (targets != nullptr ? targets[i] : i % rows))
      require(false, "exclude must not name the positive key of a query");
}

}  // namespace

void check(const Problem& problem, Where where) {
  const int64_t batch = problem.batch(), rows = problem.rows(), keys = problem.keys_count();
  require((problem.losses.ndim != 0) == (problem.right.ndim != 0), "losses and right are wanted together");
  require(problem.targets.ndim != 0 || rows <= keys, "targets are needed where there are more queries than keys");
  if (problem.order.ndim != 0) {
    require_shape("order", problem.order, {batch * rows * (problem.samples() + 1)});
    require_shape("segments", problem.segments, {batch * keys + 1});
  }
  if (where == Where::host) check_indices(problem);
}

int64_t workspace_bytes(const Problem& problem, [[maybe_unused]] Where where) {
#if defined(CPC_WITH_CUDA)
  if (where == Where::cuda) return cuda::workspace_bytes(problem);
#endif
  return cpu::workspace_bytes(problem);
}

}  // namespace cpc::info_nce
