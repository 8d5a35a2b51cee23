// InfoNCE on the GPU with sampled negatives: a warp a query gathers rows; for the keys' gradient a warp a key sums over the
// queries that name it.
#pragma once

#include <stdexcept>

#include "core/cuda/device.h"
#include "core/workspace.h"
#include "info_nce/rows.cuh"

namespace cpc::info_nce::cuda {

// Pairs of a row are its positives, then its negatives.
template <class T, class Sum>
struct SampledArguments : Rows<Sum> {
  const T *queries, *keys;
  const int64_t *negatives, *order, *segments;
  T *grad_queries, *grad_keys;
  Sum* weights;  // [B * M, P + S]: dot products, then the gradients' weights.
  int64_t all_rows, all_keys, pairs;

  explicit SampledArguments(const Problem& p)
      : Rows<Sum>(p),
        queries(p.queries.as<const T>()),
        keys(p.keys.as<const T>()),
        negatives(p.negatives.as<const int64_t>()),
        order(p.order.as<const int64_t>()),
        segments(p.segments.as<const int64_t>()),
        grad_queries(p.grad_queries.as<T>()),
        grad_keys(p.grad_keys.as<T>()),
        weights(p.workspace.as<Sum>()),
        all_rows(p.batch() * p.rows()),
        all_keys(p.batch() * p.keys_count()),
        pairs(p.positives() + p.samples()) {}
};

// A query with its pairs, and its positives, as Outcome asks for them.
template <class T, class Sum>
struct SampledRow {
  const SampledArguments<T, Sum>& a;
  int64_t index, entry, in_entry, places;
  Sum scale;
  Sum* weights;

  __device__ SampledRow(const SampledArguments<T, Sum>& a, int64_t index)
      : a(a),
        index(index),
        entry(index / a.m),
        in_entry(index % a.m),
        places(a.places),
        scale(a.scale()),
        weights(a.weights + index * a.pairs) {}

  // The key of a pair, or -1.
  __device__ int64_t key(int64_t pair) const {
    if (pair < places) return a.target(index, in_entry, pair);
    return a.key(a.negatives[index * (a.pairs - places) + pair - places]);
  }
  __device__ const T* key_row(int64_t pair) const { return a.keys + (entry * a.n + key(pair)) * a.d; }
  __device__ bool present(int64_t j) const { return key(j) >= 0; }
  __device__ Sum dot(int64_t pair) const { return weights[pair]; }
  __device__ Sum score(int64_t pair) const { return a.score(scale, dot(pair), entry, key(pair)); }

  // Whether a negative is a rival.
  __device__ bool contrasted(int64_t pair) const {
    const int64_t named = key(pair);
    bool contrasted = named >= 0;
    if (a.key_range != nullptr)
      contrasted = contrasted && named >= a.key_range[2 * index] && named < a.key_range[2 * index + 1];
    each_of(a.excluded, [&](int64_t e) { contrasted = contrasted && named != a.left_out(index, e); });
    if (contrasted && a.query_groups != nullptr)
      contrasted = (a.key_groups[entry * a.n + named] == a.query_groups[index]) == a.same_groups;
    return contrasted;
  }
  // Whether a rival is a positive, too, which does not count in the rank.
  __device__ bool positive(int64_t pair) const {
    bool positive = false;
    each_of(places, [&](int64_t j) { positive = positive || key(j) == key(pair); });
    return positive;
  }
};

// Columns of a row that a lane sums at a time.
constexpr int kLaneColumns = 4;

// A warp's sum over i in [0, count) of weight * row, of row_of(i) = (weight, row), and of `sum`, 0 or NaN, all times
// `scale`. Rows of weight 0 may hold anything.
template <class T, class Sum>
struct WeightedRow {
  Sum weight;
  const T* row;
};
template <class T, class Sum, class RowOf>
__device__ void sum_rows(T* to, int64_t d, Sum scale, Sum sum, int64_t count, const RowOf& row_of) {
  for (int64_t first = threadIdx.x % kWarp; first < d; first += kWarp * kLaneColumns) {
    Sum sums[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) sums[i] = sum;
    for (int64_t n = 0; n < count; ++n) {
      const WeightedRow<T, Sum> from = row_of(n);
      if (from.weight == 0) continue;
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i)
        if (first + i * kWarp < d) sums[i] += from.weight * widen<Sum>(from.row[first + i * kWarp]);
    }
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
      if (first + i * kWarp < d) to[first + i * kWarp] = Narrow<T>::from(sums[i] * scale);
  }
}

// A warp multiplies a query with the keys of its pairs; the dot product of pair i comes from lane i % kWarp.
template <class T, class Sum>
__device__ void multiply_pairs(const SampledRow<T, Sum>& row) {
  const int lane = threadIdx.x % kWarp;
  const T* const query = row.a.queries + row.index * row.a.d;
  for (int64_t pair = 0; pair < row.a.pairs; ++pair) {
    Sum dot = 0;
    if (row.key(pair) >= 0) {
      const T* const key = row.key_row(pair);
      for (int64_t k = lane; k < row.a.d; k += kWarp) dot += widen<Sum>(query[k]) * widen<Sum>(key[k]);
    }
    dot = warp_sum(dot);
    if (lane == pair % kWarp) row.weights[pair] = dot;
  }
  __syncwarp();
}

// What a warp finds of a query's negatives, whose dot products become powers.
template <class Sum>
struct SampledRivals {
  Rivals<Sum> rivals;
  int64_t rank = 0;
  bool valid = true;  // Whether all negatives are keys.
};
template <class T, class Sum>
__device__ SampledRivals<Sum> measure_pairs(const SampledRow<T, Sum>& row) {
  const auto& a = row.a;
  const int64_t first = row.places + threadIdx.x % kWarp;  // The lane's negatives begin here.
  const Sum threshold = a.losses != nullptr ? a.threshold(row.index, row) : Sum(0);
  SampledRivals<Sum> found;
  Sum largest = -kInfinity<Sum>;
  int rank = 0, invalid = 0;
  for (int64_t pair = first; pair < a.pairs; pair += kWarp) {
    if (row.key(pair) < 0) ++invalid;
    if (!row.contrasted(pair)) continue;
    const Sum score = row.score(pair);
    largest = score > largest ? score : largest;
    if (!(score < threshold) && !row.positive(pair)) ++rank;
  }
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const Sum other = __shfl_xor_sync(0xffffffffu, largest, mask);
    largest = other > largest ? other : largest;
  }
  found.rank = warp_sum(rank);
  found.valid = warp_sum(invalid) == 0;
  found.rivals.largest = a.bounded(largest);
  for (int64_t pair = first; pair < a.pairs; pair += kWarp)
    row.weights[pair] = row.contrasted(pair) ? a.add(found.rivals, row.score(pair), row.dot(pair)) : Sum(0);
  found.rivals.sum = warp_sum(found.rivals.sum);
  found.rivals.moment = warp_sum(found.rivals.moment);
  return found;
}

// A warp a query.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) contrast_sampled(const __grid_constant__ SampledArguments<T, Sum> a) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t index = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; index < a.all_rows;
       index += int64_t{gridDim.x} * (kThreads / kWarp)) {
    const SampledRow<T, Sum> row(a, index);
    multiply_pairs(row);
    const SampledRivals<Sum> found = measure_pairs(row);
    const bool valid = found.valid && a.valid(index, row.in_entry);
    const Outcome<Sum, SampledRow<T, Sum>> outcome(a.measure, found.rivals, row);
    if (lane == 0) a.store_results(index, valid, found.rank, outcome);
    if (!a.gradients) continue;
    const Sum given = a.weight(index), weight = valid && !outcome.lacks_positives() ? given : Sum(0);
    const Sum factor = outcome.factor_of_rivals(weight);
    __syncwarp();  // All lanes have read the positives' dot products.
    for (int64_t pair = lane; pair < a.pairs; pair += kWarp) {
      Sum& v = row.weights[pair];
      if (pair < a.places)
        v = row.present(pair) ? outcome.weight_of_positive(pair, weight) : Sum(0);
      else
        v = factor == 0 ? Sum(0) : v * factor;
    }
    __syncwarp();
    if (a.grad_queries == nullptr) continue;
    sum_rows(a.grad_queries + index * a.d, a.d, row.scale, valid || given == 0 ? Sum(0) : kNan<Sum>,
             weight == 0 ? 0 : a.pairs,
             [&](int64_t pair) { return WeightedRow<T, Sum>{row.weights[pair], row.key_row(pair)}; });
  }
}

// A warp a key: the queries of its pairs, in order.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) sum_sampled_keys(const __grid_constant__ SampledArguments<T, Sum> a) {
  for (int64_t key = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; key < a.all_keys;
       key += int64_t{gridDim.x} * (kThreads / kWarp)) {
    const int64_t begin = a.segments[key], count = a.segments[key + 1] - begin;
    if (a.grad_keys != nullptr)
      sum_rows(a.grad_keys + key * a.d, a.d, a.scale(), Sum(0), count, [&](int64_t i) {
        const int64_t pair = a.order[begin + i];
        return WeightedRow<T, Sum>{a.weights[pair], a.queries + pair / a.pairs * a.d};
      });
    if (a.grad_bias == nullptr) continue;
    Sum sum = 0;
    for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += a.weights[a.order[begin + i]];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) a.grad_bias[key] = sum;
  }
}

template <class T, class Sum>
void launch_sampled(const Problem& p, void* stream) {
  const SampledArguments<T, Sum> a(p);
  constexpr int64_t kWarps = kThreads / kWarp;
  launch("contrast_sampled", &contrast_sampled<T, Sum>, {divide_up(a.all_rows, kWarps), dim3(kThreads)}, stream, a);
  if (a.grad_keys == nullptr && a.grad_bias == nullptr) return;
  if (p.order.ndim == 0) throw std::invalid_argument("order and segments are needed for gradients of keys and biases");
  launch("sum_sampled_keys", &sum_sampled_keys<T, Sum>, {divide_up(a.all_keys, kWarps), dim3(kThreads)}, stream, a);
}

}  // namespace cpc::info_nce::cuda
