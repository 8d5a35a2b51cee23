// Weighs queries and reduces their losses on the host, and checks both; see reduction.h.
#include <cmath>

#include "core/require.h"
#include "reduction/reduction.h"

namespace cpc::reduction {
namespace {

// Independent sums, so that additions do not wait for each other.
constexpr int kChains = 8;

struct Chains {
  double chains[kChains] = {};

  double& operator[](int64_t row) { return chains[row % kChains]; }
  double total() const {
    double sum = 0;
    for (const double chain : chains) sum += chain;
    return sum;
  }
};

template <class Real>
void weigh_as(const RowWeights& problem) {
  const int64_t rows = problem.row_weights.numel();
  const int64_t places = problem.targets.ndim != 0 ? problem.targets.shape[2] : 0;
  const auto* const targets = problem.targets.as<const int64_t>();
  const auto* const weights = problem.weights.ndim != 0 ? problem.weights.as<const Real>() : nullptr;
  auto* const row_weights = problem.row_weights.as<Real>();
  Chains weight;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* const first = targets + row * places;
    const bool present =
        problem.targets.ndim == 0 || std::any_of(first, first + places, [](int64_t target) { return target != -1; });
    row_weights[row] = !present ? Real(0) : weights != nullptr ? weights[row] : Real(1);
    weight[row] += row_weights[row];
  }
  if (!problem.mean) return;
  const auto divisor = static_cast<Real>(Sums{.weight = weight.total()}.divisor());
  for (int64_t row = 0; row < rows; ++row) row_weights[row] /= divisor;
}

template <class Real>
void reduce_as(const Reduction& problem) {
  const int64_t rows = problem.losses.numel();
  const auto* const losses = problem.losses.as<const Real>();
  const auto* const ranks = problem.ranks.as<const int64_t>();
  const auto* const weights = problem.weights.ndim != 0 ? problem.weights.as<const Real>() : nullptr;
  Chains losses_of, rights, weights_of;
  for (int64_t row = 0; row < rows; ++row) {
    const double weight = weights != nullptr ? weights[row] : 1, loss = losses[row];
    if (weight != 0 || std::isfinite(loss)) losses_of[row] += weight * loss;
    if (ranks[row] == 0) rights[row] += weight;
    weights_of[row] += weight;
  }
  const Sums sums{losses_of.total(), rights.total(), weights_of.total()};
  *problem.loss.as<Real>() = static_cast<Real>(sums.loss / (problem.mean ? sums.divisor() : 1));
  *problem.accuracy.as<Real>() = static_cast<Real>(sums.right / sums.divisor());
}

void require_sums_type(const char* name, const TensorView& view) {
  require(view.dtype == DType::f32 || view.dtype == DType::f64, std::string(name) + " must be float32 or float64");
}

int64_t bytes_of_parts(int64_t rows, Where where) {
  const int64_t parts = where == Where::cuda ? parts_of(rows) : 1;
  return parts > 1 ? parts * static_cast<int64_t>(sizeof(Sums)) : 0;
}

}  // namespace

void check(const RowWeights& problem, Where) { require_sums_type("row_weights", problem.row_weights); }
void check(const Reduction& problem, Where) { require_sums_type("losses", problem.losses); }

int64_t workspace_bytes(const RowWeights& problem, Where where) {
  return problem.mean ? bytes_of_parts(problem.row_weights.numel(), where) : 0;
}
int64_t workspace_bytes(const Reduction& problem, Where where) { return bytes_of_parts(problem.losses.numel(), where); }

void cpu::weigh(const RowWeights& problem) {
  problem.row_weights.dtype == DType::f64 ? weigh_as<double>(problem) : weigh_as<float>(problem);
}

void cpu::reduce(const Reduction& problem) {
  problem.losses.dtype == DType::f64 ? reduce_as<double>(problem) : reduce_as<float>(problem);
}

}  // namespace cpc::reduction
