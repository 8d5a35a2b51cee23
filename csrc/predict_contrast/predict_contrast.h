// Predictions of several steps, contrasted as they are made: the contract of the CPU kernel.
//
// In step k of K, row m of M predicts weights[k] contexts[m], which contrasts the keys as info_nce.h says of softmax and
// `scale`: all of them, or those that negatives[k][m] names (negatives[0][m], where all steps share them), with the
// positive targets[k][m]. A target of -1: the step does not use the context. Such a row is absent, its losses[k][m] is 0
// and its ranks[k][m] -1, and neither its context nor its negatives are looked at. The gradients are of the sum of
// row_weights * losses.
//
// Predictions exist for a block of contexts at a time, of one step, or of all where many share their negatives, and so
// do their gradients, which are rounded to bfloat16 where the tensors are of that type and the processor multiplies it.
// Sums are in float, in double where the tensors are, in an order that depends on the sizes only.
//
// An index that names no key is std::out_of_range. Who owns memory: the caller, all of it.
#pragma once

#include "core/fields.h"
#include "core/isa.h"
#include "core/tensor_view.h"

namespace cpc::predict_contrast {

struct Problem {
  TensorView contexts, weights, keys;
  TensorView targets;
  TensorView negatives;  // Absent: all keys.
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
  // Where the negatives of a step's row begin.
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

// Throws std::invalid_argument where the fields do not fit each other, std::out_of_range where an index is not as above.
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
