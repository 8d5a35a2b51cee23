// What surrounds a contrast: the weights of its queries, and from losses and ranks their mean or sum and the share that is
// right. Of a few rows, each of PyTorch's own operations for this takes as long as all of it here.
//
// The weight of a query is w, 1 where there are none, and 0 where it has targets all of which are -1: it has no positive
// and is absent. row_weights are these, and with `mean` these by t, their sum, 1 where that is not positive.
//
// loss = sum of w * losses, accuracy = (sum of w over the rows of rank 0) / t; `mean` divides the loss by t, too. A row of
// weight 0 whose loss is no finite number is absent.
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
  TensorView targets;  // Absent: no query is.
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

  // What weights are divided by. A sum that is no number remains one.
  constexpr double divisor() const { return weight > 0 || weight != weight ? weight : 1; }
};

// CUDA sums so many rows with one block, and of more rows parts, by a block each, whose sums lie in the workspace.
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
