// InfoNCE: how well each query tells its positive key from others; the contract of the CPU and CUDA kernels.
//
// For query m of M of a batch entry, with key t = targets[m] (m itself without targets) and the others o it is
// contrasted with (all keys but t, or those that negatives[m] names, t counted once more where it is among them; never
// exclude[m]), scores s[n] = scale * queries[m] . keys[n] give
//   losses[m] = log(sum over o of exp(s[o]) + exp(s[t])) - s[t],
//   right[m] = 1 where s[t] is above the scores of all keys other than t, else 0,
// and with p = softmax of the scores and r = row_weights[m] * factor the gradients of the sum of r * losses:
//   grad_queries[m] = scale * r * (sum over o of p[o] keys[o] - (1 - p[t]) keys[t]),
//   grad_keys[n] = sum over m of the same weights times scale * queries[m].
// Sums are in float, in double where the tensors are, in an order that depends on the sizes only: results are the same
// for any number of threads. The matrix of scores is never in memory: tiles of it stay in the cache or in registers.
//
// A row of weight 0 is absent from both gradients, whatever its query and the keys it is contrasted with hold: it gives
// nothing to grad_keys, and its grad_queries[m] is 0.
//
// An index that names no key, or exclude[m] = t: std::out_of_range or std::invalid_argument on the CPU. On CUDA
// losses[m] is NaN, right[m] 0, grad_queries[m] NaN, and the row gives nothing to grad_keys.
//
// Who owns memory: the caller, all of it. Kernels allocate only bounded scratch memory.
#pragma once

#include "core/fields.h"
#include "core/isa.h"
#include "core/tensor_view.h"

namespace cpc::info_nce {

struct Problem {
  TensorView queries, keys;
  TensorView targets, exclude;
  TensorView negatives;                // Absent: all keys.
  TensorView row_weights;              // Absent: 1.
  TensorView losses, right;            // Absent where only gradients are wanted.
  TensorView grad_queries, grad_keys;  // Each absent where it is not wanted.
  TensorView workspace;
  // CUDA only, sampled and with grad_keys: [B * M * (S + 1)], what sorts the keys that the positives and negatives
  // name, b * N + index, in the order of [B, M, 1 + S]; and [B * N + 1], where each key's begin in it.
  TensorView order, segments;
  double scale = 1, factor = 1;
  bool tf32 = false;  // Whether CUDA may round float operands to TF32.

  int64_t batch() const { return queries.shape[0]; }
  int64_t rows() const { return queries.shape[1]; }
  int64_t keys_count() const { return keys.shape[1]; }
  int64_t dim() const { return queries.shape[2]; }
  bool sampled() const { return negatives.ndim != 0; }
  int64_t samples() const { return negatives.shape[2]; }
  bool wants_gradients() const { return grad_queries.ndim != 0 || grad_keys.ndim != 0; }
};

constexpr auto kContrast =
    fields_of<Problem>(reads<&Problem::queries>("queries", Type::floating, "B M D", Layout::dense),
                       reads<&Problem::keys>("keys", Type::same, "B N D", Layout::dense),
                       may_read<&Problem::targets>("targets", Type::i64, "B M", Layout::dense),
                       may_read<&Problem::negatives>("negatives", Type::i64, "B M S", Layout::dense),
                       may_read<&Problem::exclude>("exclude", Type::i64, "B M", Layout::dense),
                       may_read<&Problem::row_weights>("row_weights", Type::sums, "B M", Layout::dense),
                       may_write<&Problem::losses>("losses", Type::sums, "B M", Layout::dense),
                       may_write<&Problem::right>("right", Type::sums, "B M", Layout::dense),
                       may_write<&Problem::grad_queries>("grad_queries", Type::same, "B M D", Layout::dense),
                       may_write<&Problem::grad_keys>("grad_keys", Type::same, "B N D", Layout::dense),
                       value<&Problem::scale>("scale"), value<&Problem::factor>("factor"),
                       value<&Problem::tf32>("tf32"), workspace<&Problem::workspace>("workspace", "info_nce_workspace"),
                       may_read<&Problem::order>("order", Type::i64, "L", Layout::dense),
                       may_read<&Problem::segments>("segments", Type::i64, "G", Layout::dense));

// Throws std::invalid_argument where the fields do not fit each other, and, on the host, std::out_of_range or
// std::invalid_argument where an index is not as above.
void check(const Problem& problem, Where where);

int64_t workspace_bytes(const Problem& problem, Where where);

namespace cpu {
CPC_DECLARE_WITHOUT_BFLOAT16(int64_t workspace_bytes(const Problem& problem); void contrast(const Problem& problem))
inline int64_t workspace_bytes(const Problem& problem) { CPC_CALL_AT_ISA(workspace_bytes, problem) }
inline void contrast(const Problem& problem) { CPC_CALL_AT_ISA(contrast, problem) }
}  // namespace cpu

namespace cuda {
#if defined(CPC_WITH_CUDA)
int64_t workspace_bytes(const Problem& problem);
void contrast(const Problem& problem, void* stream);
#else
constexpr void (*contrast)(const Problem&, void*) = nullptr;
#endif
}  // namespace cuda

}  // namespace cpc::info_nce
