// The contract of the CPU and CUDA kernels of InfoNCE and related losses, which compare each query with its positive
// and negative keys.
//
// Query m of M of a batch entry has scores s[n] = scale * queries[m] . keys[n] + key_bias[n]. Its positives P are the
// keys that targets[m] names (key m without targets; -1 names none, and no key is named twice). Its rivals C, the
// negatives, are all keys but those in P, or the keys that negatives[m] names, as often as it does. Only those rivals
// count that lie in key_range[m] = [begin, end), that exclude[m] does not name (-1 names none), and whose group is, or
// is not, that of the query, as `contrast` says. Sampled keys that are among the positives count as rivals, though not
// in ranks[m]. With D for C and P together, the measures are
//   softmax: losses[m] = log(sum over D of exp(s)) - (mean over P of s);
//   log_sum: losses[m] = log(sum over C of exp(s)), without positives; -inf where C is empty;
//   sigmoid: losses[m] = sum over C of log(1 + exp(s)) + sum over P of log(1 + exp(-s)).
// bests[m] is the best of the positives' scores. ranks[m] is the number of keys in C (but not in P) that do not score
// below the threshold: bests[m], or thresholds[m] where there are no positives. slopes[m] is the derivative of
// losses[m] with respect to the scale. With w[n] the derivative of losses[m] with respect to s[n], and
// r = row_weights[m] * factor, the gradients of the sum of r * losses are
//   grad_queries[m] = scale * r * sum of w[n] keys[n],
//   grad_keys[n] = scale * sum over m of r * w[n] * queries[m],
//   grad_bias[n] = sum over m of r * w[n].
//
// With `symmetric`, which takes softmax of all keys, the positives on the diagonal, and M = N, losses[m] is the mean of
// the above loss and of the same loss of the transposed scores, where key m is compared with the queries instead.
//
// With `self_contrast`, the keys are the queries, and grad_queries gets the sum of both gradients in place of
// grad_keys. The matrix of scores is then symmetric. The CPU computes each pair once, unless something distinguishes
// the pair (m, n) from (n, m): a key_range, biases, groups that differ, or an index that names m for n but not n for m.
// A row of weight 0 remains a key.
//
// Scores of all keys are sums over the features in an order that only the number of features decides, so equal keys
// have equal scores. Sums are in float, or in double for tensors of double, in an order that depends on the sizes only:
// results are the same for any number of threads. The matrix of scores is not stored: tiles of it stay in the cache or
// in registers. Only `symmetric` and `self_contrast` keep a part of bounded size, to avoid computing it again; CUDA
// keeps the scores of a group of queries, 128 MiB, or twice that where there are many keys.
//
// On the CPU, a block of keys contributes no gradient to a tile of rows where its share of each row's sum is below the
// precision of that sum. A key that is far from many rows may thus have a gradient of exactly 0.
//
// A row of weight 0 is absent from all gradients, whatever values its query and its keys have: it adds nothing to
// grad_keys and grad_bias, and its grad_queries[m] is 0. A symmetric contrast also leaves it out of all columns, unless
// `present` is given, which then decides which rows are in the columns, whatever their weight.
// A row without positives has a loss of 0 and no gradient, except for log_sum.
//
// An invalid index or range, or a positive in exclude[m], raises std::out_of_range or std::invalid_argument on the CPU.
// On CUDA, losses[m], slopes[m], bests[m] and grad_queries[m] are then NaN, ranks[m] is -1, and the row adds nothing to
// the gradients of keys. On CUDA, gradients of sampled keys need fewer than 2^31 positives and negatives, and fewer
// than 2^31 keys; otherwise std::invalid_argument is thrown.
//
// The caller owns all memory. Kernels allocate only bounded scratch memory.
#pragma once

#include <array>
#include <limits>

#include "core/fields.h"
#include "core/isa.h"
#include "core/tensor_view.h"

namespace cpc::info_nce {

// The most bytes of scores that are kept. For a symmetric contrast they hold the scores of 4096 queries and keys in
// float. Those of a self-contrast cost half as much to compute again; they hold each pair of 1800 queries once, in
// float.
constexpr int64_t kKeptBytes = int64_t{64} << 20, kKeptOfSelfBytes = int64_t{8} << 20;

enum class Measure : uint8_t { softmax, log_sum, sigmoid };
constexpr auto names_of(Measure) { return std::array{"softmax", "log_sum", "sigmoid"}; }

// The keys that a query is contrasted with, by their groups.
enum class Groups : uint8_t { all, same, other };
constexpr auto names_of(Groups) { return std::array{"all", "same", "other"}; }

struct Problem {
  TensorView queries, keys;
  TensorView targets;    // Absent: the positives are on the diagonal.
  TensorView negatives;  // Absent: all keys are contrasted.
  TensorView exclude, key_range;
  TensorView query_groups, key_groups;  // Absent where contrast is Groups::all.
  TensorView key_bias;                  // Absent: 0.
  TensorView scales;                    // A factor of `scale` that only the device knows. Absent: 1.
  TensorView row_weights;               // Absent: 1.
  TensorView thresholds;
  TensorView present;        // Symmetric only: 0 for absent rows. Without it, rows of weight 0 are absent.
  TensorView losses, ranks;  // Absent where only gradients are wanted.
  TensorView slopes, bests;  // Each absent where it is not wanted, or where there are no losses.
  TensorView grad_queries, grad_keys, grad_bias;  // Each absent where it is not wanted.
  TensorView workspace;
  double scale = 1, factor = 1;
  Measure measure = Measure::softmax;
  Groups contrast = Groups::all;
  bool symmetric = false;
  bool self_contrast = false;  // The CPU only.
  bool adds_to_keys = false;   // Adds to what grad_keys holds: the CPU only, in the type of the sums.
  // Whether CUDA may round float operands to TF32. Otherwise it splits each into two TF32 values: products are then
  // exact to 2^-20 of each, and those of infinite values are NaN.
  bool tf32 = false;

  int64_t batch() const { return queries.shape[0]; }
  int64_t rows() const { return queries.shape[1]; }
  int64_t keys_count() const { return keys.shape[1]; }
  int64_t dim() const { return queries.shape[2]; }
  bool sampled() const { return negatives.ndim != 0; }
  int64_t samples() const { return negatives.shape[2]; }
  // The number of places for positives in each row.
  int64_t positives() const { return targets.ndim != 0 ? targets.shape[2] : measure == Measure::log_sum ? 0 : 1; }
  int64_t excluded() const { return exclude.ndim != 0 ? exclude.shape[2] : 0; }
  bool wants_gradients() const { return grad_queries.ndim != 0 || grad_keys.ndim != 0 || grad_bias.ndim != 0; }
};

constexpr auto kContrast = fields_of<Problem>(
    reads<&Problem::queries>("queries", Type::floating, "B M D", Layout::dense),
    reads<&Problem::keys>("keys", Type::same, "B N D", Layout::dense),
    may_read<&Problem::targets>("targets", Type::i64, "B M P", Layout::dense),
    may_read<&Problem::negatives>("negatives", Type::i64, "B M S", Layout::dense),
    may_read<&Problem::exclude>("exclude", Type::i64, "B M E", Layout::dense),
    may_read<&Problem::key_range>("key_range", Type::i64, "B M 2", Layout::dense),
    may_read<&Problem::query_groups>("query_groups", Type::i64, "B M", Layout::dense),
    may_read<&Problem::key_groups>("key_groups", Type::i64, "B N", Layout::dense),
    may_read<&Problem::key_bias>("key_bias", Type::sums, "B N", Layout::dense),
    may_read<&Problem::scales>("scales", Type::sums, "1", Layout::dense),
    may_read<&Problem::row_weights>("row_weights", Type::sums, "B M", Layout::dense),
    may_read<&Problem::thresholds>("thresholds", Type::sums, "B M", Layout::dense),
    may_read<&Problem::present>("present", Type::sums, "B M", Layout::dense),
    may_write<&Problem::losses>("losses", Type::sums, "B M", Layout::dense),
    may_write<&Problem::ranks>("ranks", Type::i64, "B M", Layout::dense),
    may_write<&Problem::slopes>("slopes", Type::sums, "B M", Layout::dense),
    may_write<&Problem::bests>("bests", Type::sums, "B M", Layout::dense),
    may_write<&Problem::grad_queries>("grad_queries", Type::same, "B M D", Layout::dense),
    may_write<&Problem::grad_keys>("grad_keys", Type::same, "B N D", Layout::dense),
    may_write<&Problem::grad_bias>("grad_bias", Type::sums, "B N", Layout::dense), value<&Problem::scale>("scale"),
    value<&Problem::factor>("factor"), value<&Problem::measure>("measure"), value<&Problem::contrast>("contrast"),
    value<&Problem::symmetric>("symmetric"), value<&Problem::self_contrast>("self_contrast"),
    value<&Problem::tf32>("tf32"), workspace<&Problem::workspace>("workspace", "info_nce_workspace"));

// The range of a set of key indices.
struct KeysNamed {
  int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();

  void add(const int64_t* indices, int64_t count);
  // Throws std::out_of_range unless all are in [lowest, keys - 1]. `lowest` is 0, or -1 where that stands for no key.
  void require(const char* name, int64_t keys, int64_t lowest) const;
};

// Throws std::invalid_argument where the fields do not fit each other, and, on the host, std::out_of_range or
// std::invalid_argument where an index violates the contract above.
void check(const Problem& problem, Where where);

int64_t workspace_bytes(const Problem& problem, Where where);

namespace cpu {
CPC_DECLARE_AT_EACH_ISA(int64_t workspace_bytes(const Problem& problem); void contrast(const Problem& problem))
inline int64_t workspace_bytes(const Problem& problem) {
  CPC_CALL_AT_ISA_OF(problem.queries.dtype, workspace_bytes, problem)
}
inline void contrast(const Problem& problem) { CPC_CALL_AT_ISA_OF(problem.queries.dtype, contrast, problem) }
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
