// Checks that the table of info_nce.h does not make: that fields fit each other, and on the host that indices are
// valid.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "core/require.h"
#include "info_nce/info_nce.h"

namespace cpc::info_nce {

void KeysNamed::add(const int64_t* indices, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    low = std::min(low, indices[i]);
    high = std::max(high, indices[i]);
  }
}

void KeysNamed::require(const char* name, int64_t keys, int64_t lowest) const {
  if (low > high) return;  // There were none.
  if (low < lowest || high >= keys)
    throw std::out_of_range(std::string(name) + " must be in 0.." + std::to_string(keys - 1) + " for " +
                            std::to_string(keys) + " keys" + (lowest < 0 ? ", or -1 for none" : "") + ", got " +
                            std::to_string(low) + ".." + std::to_string(high));
}

namespace {

// `lowest` is 0, or -1 where that stands for no key.
void require_keys(const char* name, const TensorView& indices, int64_t keys, int64_t lowest) {
  KeysNamed named;
  if (indices.ndim != 0) named.add(indices.as<const int64_t>(), indices.numel());
  named.require(name, keys, lowest);
}

void require_ranges(const TensorView& ranges, int64_t keys) {
  if (ranges.ndim == 0) return;
  const auto* const values = ranges.as<int64_t>();
  for (int64_t i = 0; i < ranges.numel(); i += 2) {
    const int64_t begin = values[i], end = values[i + 1];
    if (begin < 0 || begin > end || end > keys)
      throw std::out_of_range("key_range must be [begin, end] with 0 <= begin <= end <= " + std::to_string(keys) +
                              " for " + std::to_string(keys) + " keys, got [" + std::to_string(begin) + ", " +
                              std::to_string(end) + "]");
  }
}

void require_no_positive_excluded(const Problem& problem) {
  if (problem.exclude.ndim == 0) return;
  const int64_t rows = problem.rows(), places = problem.positives(), excluded = problem.excluded();
  const auto* const exclude = problem.exclude.as<int64_t>();
  const auto* const targets = problem.targets.ndim != 0 ? problem.targets.as<int64_t>() : nullptr;
  for (int64_t row = 0; row < problem.batch() * rows; ++row)
    for (int64_t i = 0; i < excluded; ++i) {
      const int64_t key = exclude[row * excluded + i];
      for (int64_t j = 0; key >= 0 && j < places; ++j)
        if (key == (targets != nullptr ? targets[row * places + j] : row % rows))
          require(false, "exclude must not name a positive key of its query");
    }
}

void check_values(const Problem& problem) {
  const int64_t keys = problem.keys_count();
  require_keys("targets", problem.targets, keys, -1);
  require_keys("negatives", problem.negatives, keys, 0);
  require_keys("exclude", problem.exclude, keys, -1);
  require_ranges(problem.key_range, keys);
  require_no_positive_excluded(problem);
  if (problem.scales.ndim == 0) return;
  const double scale = problem.scales.dtype == DType::f64 ? *problem.scales.as<double>() : *problem.scales.as<float>();
  require(std::isfinite(scale), "scale must be finite");
}

}  // namespace

void check(const Problem& problem, Where where) {
  const int64_t rows = problem.rows(), keys = problem.keys_count();
  const bool results = problem.losses.ndim != 0, log_sums = problem.measure == Measure::log_sum;
  require(results == (problem.ranks.ndim != 0), "losses and ranks are wanted together");
  require(results || (problem.slopes.ndim == 0 && problem.bests.ndim == 0), "slopes and bests come with losses");
  require(problem.targets.ndim != 0 || log_sums || rows <= keys,
          "targets are needed where there are more queries than keys");
  require(!log_sums || problem.targets.ndim == 0, "log_sum measures no positives");
  require((problem.contrast == Groups::all) == (problem.query_groups.ndim == 0), "groups and contrast go together");
  require((problem.query_groups.ndim == 0) == (problem.key_groups.ndim == 0), "queries and keys need groups together");
  require(!problem.symmetric ||
              (problem.measure == Measure::softmax && !problem.sampled() && problem.targets.ndim == 0 && rows == keys),
          "symmetric is softmax of all keys, as many as queries, with the positives on the diagonal");
  require(problem.symmetric || problem.present.ndim == 0, "present is for symmetric contrasts");
  require(!problem.self_contrast ||
              (problem.keys.data == problem.queries.data && rows == keys && problem.grad_keys.ndim == 0),
          "the keys of a self-contrast are its queries, and it has no grad_keys");
  require(!problem.self_contrast || where == Where::host, "self_contrast is for the CPU");
  if (where == Where::host) check_values(problem);
}

int64_t workspace_bytes(const Problem& problem, [[maybe_unused]] Where where) {
#if defined(CPC_WITH_CUDA)
  if (where == Where::cuda) return cuda::workspace_bytes(problem);
#endif
  return cpu::workspace_bytes(problem);
}

}  // namespace cpc::info_nce
