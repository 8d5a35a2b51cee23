// Checks beyond the field table of augment.h: bounds, and the plan's codes and partners.
#include <string>

#include "augment/augment.h"
#include "augment/transform.h"
#include "core/require.h"

namespace cpc::augment {
namespace {

void check_plan(const Problem& problem) {
  const int64_t steps = problem.steps(), count = problem.count();
  const auto* codes = problem.codes.as<uint8_t>();
  bool pairs = false, deforms = false;
  for (int64_t i = 0; i < count * steps; ++i) {
    // Messages are made only on failure, as there are many codes: one per patch and step.
    if (codes[i] >= static_cast<uint8_t>(Transform::count))
      require(false, "plan.codes must be below " + std::to_string(static_cast<int>(Transform::count)) + ", got " +
                         std::to_string(codes[i]) + " for patch " + std::to_string(i / steps));
    pairs |= codes[i] == static_cast<uint8_t>(Transform::sample_pairing);
    deforms |= codes[i] == static_cast<uint8_t>(Transform::elastic);
  }
  require(!pairs || problem.partners.ndim != 0, "plan.partners must be given for sample pairing");
  require(!deforms || problem.displacements.ndim != 0, "plan.displacements must be given for elastic deformation");
  for (int64_t i = 0; problem.partners.ndim != 0 && i < count; ++i) {
    const int64_t partner = problem.partners.as<int64_t>()[i];
    if (partner < 0 || partner >= count)
      require(false, "plan.partners must be in [0, " + std::to_string(count) + "), got " + std::to_string(partner) +
                         " for patch " + std::to_string(i));
  }
}

}  // namespace

void complete(Problem& problem, Sizes& sizes) {
  const int64_t side = problem.extraction.geometry.patch;
  require(side <= kMaxPatch,
          "patch_size must be at most " + std::to_string(kMaxPatch) + ", got " + std::to_string(side));
  patches::complete(problem.extraction, sizes);
}

void check(const Problem& problem, Where where) {
  const int64_t channels = problem.extraction.images.shape[1];
  require(channels == 1 || channels == 3, "images must have 1 or 3 channels, got " + std::to_string(channels));
  require(problem.fill >= 0 && problem.fill <= 255,
          "plan.fill must be in [0, 255], got " + std::to_string(problem.fill));
  patches::check(problem.extraction, where);
  if (where == Where::host) check_plan(problem);
}

int64_t workspace_bytes([[maybe_unused]] const Problem& problem, [[maybe_unused]] Where where) {
#if defined(CPC_WITH_CUDA)
  if (where == Where::cuda) return cuda::workspace_bytes(problem.extraction);
#endif
  return 0;
}

}  // namespace cpc::augment
