// The steps before and after a contrast: the weights of its queries, and the mean or sum of its losses with the
// accuracy. For a few rows, each single PyTorch operation for this takes as long as all of it here.
//
// The weight w of a query is 1 without `weights`, and 0 where all of its targets are -1: such a query has no positive
// and is absent. row_weights is w, or with `mean` w / t, where t is the sum of w, or 1 if that is not positive.
//
// loss is the sum of w * losses, with `mean` divided by t; accuracy is the sum of w over the rows of rank 0, divided by
// t. A row of weight 0 whose loss is not finite is left out.
//
// Sums are in double, in an order that depends on the number of rows only.
#pragma once

#include <algorithm>

#include "core/fields.h"
#include "core/tensor_view.h"
#include "core/workspace.h"

namespace cpc::reduction {

struct RowWeights {
  TensorView row_weights;
  TensorView targets;  // Absent: all queries are present.
  TensorView weights;  // Absent: 1.
  TensorView workspace;
  bool mean = false;
};

constexpr auto kRowWeights = fields_of<RowWeights>(
    writes<&RowWeights::row_weights>("row_weights", Type::floating, "B M", Layout::dense),
    may_read<&RowWeights::targets>("targets", Type::i64, "B M P", Layout::dense),
    may_read<&RowWeights::weights>("weights", Type::same, "B M", Layout::dense), value<&RowWeights::mean>("mean"),
    workspace<&RowWeights::workspace>("workspace", "info_nce_weights_workspace"));

struct Reduction {
  TensorView losses, ranks;
  TensorView weights;  // Absent: 1.
  TensorView loss, accuracy;
  TensorView workspace;
  bool mean = true;
};

constexpr auto kReduction = fields_of<Reduction>(
    reads<&Reduction::losses>("losses", Type::floating, "B M", Layout::dense),
    reads<&Reduction::ranks>("ranks", Type::i64, "B M", Layout::dense),
    may_read<&Reduction::weights>("weights", Type::same, "B M", Layout::dense),
    writes<&Reduction::loss>("loss", Type::same, ""), writes<&Reduction::accuracy>("accuracy", Type::same, ""),
    value<&Reduction::mean>("mean"), workspace<&Reduction::workspace>("workspace", "info_nce_reduced_workspace"));

// Throw std::invalid_argument unless weights and losses are float or double.
void check(const RowWeights& problem, Where where);
void check(const Reduction& problem, Where where);

// Sums over rows.
struct Sums {
  double loss = 0, right = 0, weight = 0;

  // The divisor of the weighted mean: the sum of weights, or 1 if it is not positive. A sum that is NaN stays NaN.
  constexpr double divisor() const { return weight > 0 || weight != weight ? weight : 1; }
};

// CUDA sums up to kRowsOfPart rows with one block. More rows are summed in parts, one per block, with the parts' sums
// in the workspace.
constexpr int64_t kRowsOfPart = 8192, kMostParts = 256;
constexpr int64_t parts_of(int64_t rows) { return std::clamp<int64_t>(divide_up(rows, kRowsOfPart), 1, kMostParts); }

int64_t workspace_bytes(const RowWeights& problem, Where where);
int64_t workspace_bytes(const Reduction& problem, Where where);

namespace cpu {
void weigh(const RowWeights& problem);
void reduce(const Reduction& problem);
}  // namespace cpu

namespace cuda {
#if defined(CPC_WITH_CUDA)
void weigh(const RowWeights& problem, void* stream);
void reduce(const Reduction& problem, void* stream);
#else
constexpr void (*weigh)(const RowWeights&, void*) = nullptr;
constexpr void (*reduce)(const Reduction&, void*) = nullptr;
#endif
}  // namespace cuda

}  // namespace cpc::reduction
