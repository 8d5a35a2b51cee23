// Checks an augmentation problem against the contract in augment.h before a kernel touches memory.
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
    require(codes[i] < static_cast<uint8_t>(Transform::count),
            "plan.codes must be below " + std::to_string(static_cast<int>(Transform::count)) + ", got " +
                std::to_string(codes[i]) + " for patch " + std::to_string(i / steps));
    pairs |= codes[i] == static_cast<uint8_t>(Transform::sample_pairing);
    deforms |= codes[i] == static_cast<uint8_t>(Transform::elastic);
  }
  require(!pairs || problem.partners.ndim != 0, "plan.partners must be given for sample pairing");
  require(!deforms || problem.displacements.ndim != 0, "plan.displacements must be given for elastic deformation");
  for (int64_t i = 0; problem.partners.ndim != 0 && i < count; ++i) {
    const int64_t partner = problem.partners.as<int64_t>()[i];
    require(partner >= 0 && partner < count, "plan.partners must be in [0, " + std::to_string(count) + "), got " +
                                                 std::to_string(partner) + " for patch " + std::to_string(i));
  }
}

}  // namespace

void check(const Problem& problem, bool on_host) {
  const patches::Problem& extraction = problem.extraction;
  patches::check(extraction, /*backward=*/false, on_host);
  const int64_t channels = extraction.images.shape[1], side = extraction.geometry.patch;
  require(extraction.images.dtype == DType::u8, "images must be uint8");
  require(channels == 1 || channels == 3, "images must have 1 or 3 channels, got " + std::to_string(channels));
  require(side <= kMaxPatch,
          "patch_size must be at most " + std::to_string(kMaxPatch) + ", got " + std::to_string(side));
  require(problem.fill >= 0 && problem.fill <= 255,
          "plan.fill must be in [0, 255], got " + std::to_string(problem.fill));

  const int64_t batch = extraction.batch(), rows = extraction.rows(), cols = extraction.cols();
  require(problem.codes.ndim == 4 && problem.codes.dtype == DType::u8, "plan.codes must be uint8 of 4 dimensions");
  require_shape("plan.codes", problem.codes, {batch, rows, cols, problem.steps()});
  require_shape("plan.parameters", problem.parameters, {batch, rows, cols, problem.steps(), kParameters});
  require(problem.parameters.dtype == DType::f32, "plan.parameters must be float32");
  const auto dense = [](const TensorView& view, std::initializer_list<int> order) {
    return view.numel() == 0 || is_dense(view, order);
  };
  require(dense(problem.codes, {0, 1, 2, 3}), "plan.codes must be dense");
  require(dense(problem.parameters, {0, 1, 2, 3, 4}), "plan.parameters must be dense");
  if (problem.partners.ndim != 0) {
    require_shape("plan.partners", problem.partners, {batch, rows, cols});
    require(problem.partners.dtype == DType::i64, "plan.partners must be int64");
    require(dense(problem.partners, {0, 1, 2}), "plan.partners must be dense");
  }
  if (problem.displacements.ndim != 0) {
    require_shape("plan.displacements", problem.displacements, {batch, rows, cols, 2, kNodes, kNodes});
    require(problem.displacements.dtype == DType::f32, "plan.displacements must be float32");
    require(dense(problem.displacements, {0, 1, 2, 3, 4, 5}), "plan.displacements must be dense");
  }
  if (on_host) check_plan(problem);
}

}  // namespace cpc::augment
