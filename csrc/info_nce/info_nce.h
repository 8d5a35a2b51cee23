// InfoNCE and its kin: how well each query tells its positive keys from others; the contract of the CPU and CUDA kernels.
//
// Query m of M of a batch entry has scores s[n] = scale * queries[m] . keys[n] + key_bias[n], positives P, the keys that
// targets[m] names (key m without targets; -1 names none, and no key is named twice), and rivals C: all keys but those
// in P, or the keys that negatives[m] names, as often as it does. Of them only those count that lie in the
// key_range[m] = [begin, end), that exclude[m] does not name (-1 names none), and whose group is, or is not, that of the
// query, as `contrast` says. Sampled keys that are among the positives count as rivals, though not in ranks[m]. What is
// measured, with C and P together written D:
//   softmax: losses[m] = log(sum over D of exp(s)) - (mean over P of s);
//   log_sum: losses[m] = log(sum over C of exp(s)), of no positives; -inf where C is empty;
//   sigmoid: losses[m] = sum over C of log(1 + exp(s)) + sum over P of log(1 + exp(-s)).
// Further ranks[m], how many of C (but not of P) do not score below the threshold, which is the best of the positives'
// scores, or thresholds[m] where there are none; bests[m], that best score; slopes[m], the derivative of losses[m] in
// the scale. With w[n] the derivative of losses[m] in s[n], and r = row_weights[m] * factor, the gradients of the sum of
// r * losses are
//   grad_queries[m] = scale * r * sum of w[n] keys[n],
//   grad_keys[n] = scale * sum over m of r * w[n] * queries[m],
//   grad_bias[n] = sum over m of r * w[n].
//
// `symmetric`, with softmax of all keys and the positives on the diagonal, M = N: losses[m] is the mean of the above and
// of that of the transposed scores, in which key m is told the query m from the queries that are contrasted with it.
//
// `self_contrast`: the keys are the queries, and grad_queries gets what is due to both, in place of grad_keys. The scores
// are then those of the transposed matrix, too: where nothing tells a pair from the pair the other way round (a key_range,
// biases, groups that differ, an index that names m for n but not n for m) the CPU computes them once. A row of weight 0
// remains a key.
//
// Scores of all keys are sums over the features in an order that only the number of features decides, so equal keys have
// equal scores. Sums are in float, in double where the tensors are, in an order that depends on the sizes only: results
// are the same for any number of threads. The matrix of scores is not in memory: tiles of it stay in the cache or in
// registers. Only `symmetric` and `self_contrast` keep some, of bounded size, so as not to compute them again; CUDA keeps
// what a group of queries scores, 128 MiB, twice that where there are many keys.
//
// On the CPU a block of keys gives a tile of rows no gradient where its share of each row's sum is less than that sum
// resolves, so that many rows may give a key that is far from all of them exactly 0.
//
// A row of weight 0 is absent from all gradients, whatever its query and the keys it is contrasted with hold: it gives
// nothing to grad_keys and grad_bias, and its grad_queries[m] is 0. A symmetric contrast leaves it out of all columns; where
// `present` is given, that tells instead which rows there are, those of weight 0 among them.
// A row without positives, where such are measured, has a loss of 0 and no gradient.
//
// An index that names no key, a range that is none, or a positive in exclude[m]: std::out_of_range or
// std::invalid_argument on the CPU. On CUDA losses[m], slopes[m] and bests[m] are NaN, ranks[m] is -1, grad_queries[m] NaN, and the
// row gives nothing to the gradients of keys. There, sampled keys have gradients where less than 2^31 positives and
// negatives name less than 2^31 keys; else std::invalid_argument.
//
// Who owns memory: the caller, all of it. Kernels allocate only bounded scratch memory.
#pragma once

#include <array>
#include <limits>

#include "core/fields.h"
#include "core/isa.h"
#include "core/tensor_view.h"

namespace cpc::info_nce {

// Scores of a symmetric contrast that are kept at most: those of 4096 queries and keys in float. Those of a self-contrast
// cost half as much to compute again: each pair of 1800 queries once, in float.
constexpr int64_t kKeptBytes = int64_t{64} << 20, kKeptOfSelfBytes = int64_t{8} << 20;

enum class Measure : uint8_t { softmax, log_sum, sigmoid };
constexpr auto names_of(Measure) { return std::array{"softmax", "log_sum", "sigmoid"}; }

// Which keys are contrasted, by their groups.
enum class Groups : uint8_t { all, same, other };
constexpr auto names_of(Groups) { return std::array{"all", "same", "other"}; }

struct Problem {
  TensorView queries, keys;
  TensorView targets;    // Absent: the diagonal.
  TensorView negatives;  // Absent: all keys.
  TensorView exclude, key_range;
  TensorView query_groups, key_groups;  // Absent where contrast is Groups::all.
  TensorView key_bias;                  // Absent: 0.
  TensorView scales;                    // A factor of `scale` where it is known on the device only.
  TensorView row_weights;               // Absent: 1.
  TensorView thresholds;
  TensorView present;        // Symmetric only: 0 for rows that are absent. Absent: those of weight 0 are.
  TensorView losses, ranks;  // Absent where only gradients are wanted.
  TensorView slopes, bests;  // Each absent where it is not wanted, or where there are no losses.
  TensorView grad_queries, grad_keys, grad_bias;  // Each absent where it is not wanted.
  TensorView workspace;
  double scale = 1, factor = 1;
  Measure measure = Measure::softmax;
  Groups contrast = Groups::all;
  bool symmetric = false;
  bool self_contrast = false;  // The CPU only.
  bool adds_to_keys = false;   // Whether grad_keys holds a sum to add to: the CPU only, in the type of the sums.
  // Whether CUDA may round float operands to TF32. Else it splits them, each into two that are: products are then exact
  // to 2^-20 of each, and those of infinite values NaN.
  bool tf32 = false;

  int64_t batch() const { return queries.shape[0]; }
  int64_t rows() const { return queries.shape[1]; }
  int64_t keys_count() const { return keys.shape[1]; }
  int64_t dim() const { return queries.shape[2]; }
  bool sampled() const { return negatives.ndim != 0; }
  int64_t samples() const { return negatives.shape[2]; }
  // Places for positives of each row.
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

// Between which the indices of some keys lie.
struct KeysNamed {
  int64_t low = std::numeric_limits<int64_t>::max(), high = std::numeric_limits<int64_t>::min();

  void add(const int64_t* indices, int64_t count);
  // Throws std::out_of_range unless they are in `lowest` to keys - 1; `lowest`: 0, or -1 where that stands for no key.
  void require(const char* name, int64_t keys, int64_t lowest) const;
};

// Throws std::invalid_argument where the fields do not fit each other, and, on the host, std::out_of_range or
// std::invalid_argument where an index is not as above.
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
