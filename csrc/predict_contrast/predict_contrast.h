// The contract of the CPU kernel that predicts several steps and contrasts the predictions as they are computed.
//
// In step k of K, row m of M has the prediction weights[k] contexts[m]. It is contrasted with the keys as info_nce.h
// defines for softmax and `scale`: with all keys, or with those that negatives[k][m] names (negatives[0][m] where all
// steps share them), and with the positive targets[k][m]. A target of -1 means that the step does not use the context.
// Such a row is absent: its losses[k][m] is 0 and its ranks[k][m] is -1, and its context and negatives are not read.
// The gradients are those of the sum of row_weights * losses.
//
// Predictions and their gradients exist for a block of contexts at a time, for one step, or for all steps where many
// share their negatives. The gradients of predictions are rounded to bfloat16 for tensors of that type where the
// processor multiplies it. Sums are in float, or in double for tensors of double, in an order that depends on the sizes
// only.
//
// An index that names no key raises std::out_of_range. The caller owns all memory.
#pragma once

#include "core/fields.h"
#include "core/isa.h"
#include "core/tensor_view.h"

namespace cpc::predict_contrast {

struct Problem {
  TensorView contexts, weights, keys;
  TensorView targets;
  TensorView negatives;  // Absent: all keys are contrasted.
  TensorView row_weights;
  TensorView losses, ranks;
  TensorView grad_contexts, grad_weights, grad_keys;  // Each absent where it is not wanted.
  TensorView workspace;
  double scale = 1;

  int64_t rows() const { return contexts.shape[0]; }
  int64_t channels() const { return contexts.shape[1]; }
  int64_t steps() const { return weights.shape[0]; }
  int64_t dim() const { return weights.shape[1]; }
  int64_t keys_count() const { return keys.shape[0]; }
  bool sampled() const { return negatives.ndim != 0; }
  int64_t samples() const { return sampled() ? negatives.shape[2] : 0; }
  // The negatives of a step's row.
  const int64_t* negatives_of(int64_t step, int64_t row) const {
    const int64_t at = (negatives.shape[0] == 1 ? 0 : step) * rows() + row;
    return negatives.as<const int64_t>() + at * samples();
  }
};

constexpr auto kPredictAndContrast = fields_of<Problem>(
    reads<&Problem::contexts>("contexts", Type::floating, "M E", Layout::dense),
    reads<&Problem::weights>("weights", Type::same, "K D E", Layout::dense),
    reads<&Problem::keys>("keys", Type::same, "N D", Layout::dense),
    reads<&Problem::targets>("targets", Type::i64, "K M", Layout::dense),
    may_read<&Problem::negatives>("negatives", Type::i64, "L M S", Layout::dense),
    reads<&Problem::row_weights>("row_weights", Type::sums, "K M", Layout::dense),
    writes<&Problem::losses>("losses", Type::sums, "K M", Layout::dense),
    writes<&Problem::ranks>("ranks", Type::i64, "K M", Layout::dense),
    may_write<&Problem::grad_contexts>("grad_contexts", Type::same, "M E", Layout::dense),
    may_write<&Problem::grad_weights>("grad_weights", Type::same, "K D E", Layout::dense),
    may_write<&Problem::grad_keys>("grad_keys", Type::same, "N D", Layout::dense), value<&Problem::scale>("scale"),
    workspace<&Problem::workspace>("workspace", "predict_and_contrast_workspace"));

// Throws std::invalid_argument where the fields do not fit each other, std::out_of_range where an index names no key.
void check(const Problem& problem, Where where);

int64_t workspace_bytes(const Problem& problem, Where where);

namespace cpu {
CPC_DECLARE_AT_EACH_ISA(int64_t workspace_bytes(const Problem& problem);
                        void predict_and_contrast(const Problem& problem))
inline int64_t workspace_bytes(const Problem& problem) {
  CPC_CALL_AT_ISA_OF(problem.contexts.dtype, workspace_bytes, problem)
}
inline void predict_and_contrast(const Problem& problem) {
  CPC_CALL_AT_ISA_OF(problem.contexts.dtype, predict_and_contrast, problem)
}
}  // namespace cpu

}  // namespace cpc::predict_contrast
