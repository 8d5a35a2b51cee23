// Checks that the table of predict_contrast.h does not make: that fields fit each other, and that indices are valid.
#include <algorithm>

#include "core/require.h"
#include "info_nce/info_nce.h"
#include "predict_contrast/predict_contrast.h"

namespace cpc::predict_contrast {
namespace {

void check_indices(const Problem& problem) {
  const int64_t keys = problem.keys_count(), rows = problem.rows(), samples = problem.samples();
  const auto* const targets = problem.targets.as<const int64_t>();
  info_nce::KeysNamed positives, negatives;
  for (int64_t i = 0; i < problem.steps() * rows; ++i) {
    positives.add(targets + i, 1);
    if (targets[i] >= 0 && samples > 0) negatives.add(problem.negatives_of(i / rows, i % rows), samples);
  }
  positives.require("targets", keys, -1);
  negatives.require("negatives", keys, 0);
}

}  // namespace

void check(const Problem& problem, Where where) {
  require(where == Where::host, "predict_and_contrast has a kernel for the CPU only");
  require(!problem.sampled() || problem.negatives.shape[0] == 1 || problem.negatives.shape[0] == problem.steps(),
          "negatives must be those of every step, or one step's for all");
  check_indices(problem);
}

int64_t workspace_bytes(const Problem& problem, Where) { return cpu::workspace_bytes(problem); }

}  // namespace cpc::predict_contrast
