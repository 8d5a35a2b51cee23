// Checks InfoNCE problems against the contract in info_nce.h before a kernel touches memory; on the CPU also the
// indices.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/require.h"
#include "info_nce/info_nce.h"

namespace cpc::info_nce {
namespace {

bool dense(const TensorView& view) {
  if (view.numel() == 0) return true;
  switch (view.ndim) {
    case 1: return is_dense(view, {0});
    case 2: return is_dense(view, {0, 1});
    default: return is_dense(view, {0, 1, 2});
  }
}

void require_like(const char* name, const TensorView& view, std::initializer_list<int64_t> shape, DType dtype) {
  require_shape(name, view, shape);
  require(view.dtype == dtype, std::string(name) + " has the wrong type");
  require(dense(view), std::string(name) + " must be dense");
}

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

}  // namespace

void check(const Problem& problem, int64_t workspace_bytes) {
  const TensorView& queries = problem.queries;
  require(queries.ndim == 3, "queries must be [B, M, D], got " + shape_of(queries));
  require(problem.keys.ndim == 3, "keys must be [B, N, D], got " + shape_of(problem.keys));
  require(is_floating(queries.dtype), "queries must be floating");
  const int64_t batch = problem.batch(), rows = problem.rows(), keys = problem.keys_count(), dim = problem.dim();
  require(dense(queries), "queries must be dense");
  require_like("keys", problem.keys, {batch, keys, dim}, queries.dtype);
  const DType sums = queries.dtype == DType::f64 ? DType::f64 : DType::f32;
  const auto per_row = [&](const char* name, const TensorView& view, DType dtype) {
    if (view.ndim != 0) require_like(name, view, {batch, rows}, dtype);
  };
  per_row("targets", problem.targets, DType::i64);
  per_row("exclude", problem.exclude, DType::i64);
  per_row("row_weights", problem.row_weights, sums);
  per_row("losses", problem.losses, sums);
  per_row("right", problem.right, sums);
  require((problem.losses.ndim != 0) == (problem.right.ndim != 0), "losses and right are wanted together");
  require(problem.targets.ndim != 0 || rows <= keys, "targets are needed where there are more queries than keys");
  if (problem.sampled()) {
    require(problem.negatives.ndim == 3, "negatives must be [B, M, S], got " + shape_of(problem.negatives));
    require_like("negatives", problem.negatives, {batch, rows, problem.samples()}, DType::i64);
  }
  if (problem.grad_queries.ndim != 0)
    require_like("grad_queries", problem.grad_queries, {batch, rows, dim}, queries.dtype);
  if (problem.grad_keys.ndim != 0) require_like("grad_keys", problem.grad_keys, {batch, keys, dim}, queries.dtype);
  if (problem.order.ndim != 0) {
    require_like("order", problem.order, {batch * rows * (problem.samples() + 1)}, DType::i64);
    require_like("segments", problem.segments, {batch * keys + 1}, DType::i64);
  }
  if (workspace_bytes > 0) {
    const TensorView& workspace = problem.workspace;
    require(workspace.ndim == 1 && workspace.dtype == DType::u8 && is_dense(workspace, {0}) &&
                workspace.numel() >= workspace_bytes && reinterpret_cast<uintptr_t>(workspace.data) % 64 == 0,
            "workspace must be " + std::to_string(workspace_bytes) + " bytes of dense uint8, aligned to 64 bytes");
  }
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
    require(exclude[i] != (targets != nullptr ? targets[i] : i % rows),
            "exclude must not name the positive key of a query");
}

}  // namespace cpc::info_nce
