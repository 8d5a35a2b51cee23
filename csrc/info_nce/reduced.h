// From the losses and ranks of queries to their mean or sum and the share that is right. The host only: of a few rows, as
// PyTorch's own operations, this takes longer than the contrast itself.
//
// With weights w, 1 where there are none: loss = sum of w * losses, accuracy = (sum of w over the rows of rank 0) / t with
// t the sum of w, 1 where that is not positive; `mean` divides the loss by t, too. A row of weight 0 whose loss is no
// finite number is absent. Sums are in double, in an order that depends on the number of rows only.
#pragma once

#include "core/fields.h"
#include "core/tensor_view.h"

namespace cpc::info_nce {

struct Reduction {
  TensorView losses, ranks;
  TensorView weights;  // Absent: 1.
  TensorView loss, accuracy;
  bool mean = true;
};

constexpr auto kReduction =
    fields_of<Reduction>(reads<&Reduction::losses>("losses", Type::floating, "B M", Layout::dense),
                         reads<&Reduction::ranks>("ranks", Type::i64, "B M", Layout::dense),
                         may_read<&Reduction::weights>("weights", Type::same, "B M", Layout::dense),
                         writes<&Reduction::loss>("loss", Type::same, ""),
                         writes<&Reduction::accuracy>("accuracy", Type::same, ""), value<&Reduction::mean>("mean"));

// Throws std::invalid_argument unless losses are float or double.
void check(const Reduction& problem, Where where);

namespace cpu {
void reduce(const Reduction& problem);
}

}  // namespace cpc::info_nce
