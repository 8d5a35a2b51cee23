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

#include "core/isa.h"
#include "core/tensor_view.h"

namespace cpc::info_nce {

struct Problem {
  TensorView queries, keys;            // [B, M, D] and [B, N, D], floating, of one type, dense.
  TensorView targets, exclude;         // [B, M] i64, dense, or absent.
  TensorView negatives;                // [B, M, S] i64, dense, or absent: all keys.
  TensorView row_weights;              // [B, M] of the computing type, dense, or absent: 1.
  TensorView losses, right;            // [B, M] of the computing type, dense; absent where only gradients are wanted.
  TensorView grad_queries, grad_keys;  // Like queries and keys, each absent where it is not wanted.
  // [workspace_bytes(...)] u8, aligned to 64 bytes.
  TensorView workspace;
  // CUDA only, sampled and with grad_keys: [B * M * (S + 1)] i64, what sorts the keys that the positives and negatives
  // name, b * N + index, in the order of [B, M, 1 + S]; and [B * N + 1] i64, where each key's begin in it.
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

// Throws std::invalid_argument naming the argument where a shape, type or layout is not as above.
void check(const Problem& problem, int64_t workspace_bytes);
// Looks at the indices: see above.
void check_indices(const Problem& problem);

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
