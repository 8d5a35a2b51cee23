// Reduces the losses of queries; see reduced.h.
#include "info_nce/reduced.h"

#include <cmath>

#include "core/require.h"

namespace cpc::info_nce {
namespace {

// Sums that do not wait for each other.
constexpr int kChains = 8;

struct Sums {
  double loss[kChains] = {}, right[kChains] = {}, weight[kChains] = {};

  static double total(const double (&chains)[kChains]) {
    double sum = 0;
    for (const double chain : chains) sum += chain;
    return sum;
  }
};

template <class Real>
void reduce_as(const Reduction& problem) {
  const int64_t rows = problem.losses.numel();
  const auto* const losses = problem.losses.as<const Real>();
  const auto* const ranks = problem.ranks.as<const int64_t>();
  const auto* const weights = problem.weights.ndim != 0 ? problem.weights.as<const Real>() : nullptr;
  Sums sums;
  for (int64_t i = 0; i < rows; ++i) {
    const int chain = static_cast<int>(i % kChains);
    const double weight = weights != nullptr ? weights[i] : 1, loss = losses[i];
    if (weight != 0 || std::isfinite(loss)) sums.loss[chain] += weight * loss;
    if (ranks[i] == 0) sums.right[chain] += weight;
    sums.weight[chain] += weight;
  }
  const double total = Sums::total(sums.weight), divisor = total > 0 ? total : std::isnan(total) ? total : 1;
  *problem.loss.as<Real>() = static_cast<Real>(Sums::total(sums.loss) / (problem.mean ? divisor : 1));
  *problem.accuracy.as<Real>() = static_cast<Real>(Sums::total(sums.right) / divisor);
}

}  // namespace

void check(const Reduction& problem, Where where) {
  require(problem.losses.dtype == DType::f32 || problem.losses.dtype == DType::f64,
          "losses must be float32 or float64");
  require(where == Where::host, "the host alone reduces losses");
}

void cpu::reduce(const Reduction& problem) {
  if (problem.losses.dtype == DType::f64)
    reduce_as<double>(problem);
  else
    reduce_as<float>(problem);
}

}  // namespace cpc::info_nce
