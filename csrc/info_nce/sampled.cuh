// InfoNCE of sampled negatives on the GPU: one warp per query gathers its keys; for the keys' gradient, one warp per
// key sums over the queries that name it.
#pragma once

#include <bit>
#include <type_traits>

#include "core/cuda/device.h"
#include "core/workspace.h"
#include "info_nce/rows.cuh"
#include "info_nce/sort_pairs.cuh"

namespace cpc::info_nce::cuda {

// Bytes of a vector that a lane reads at a time, where rows are aligned to it.
constexpr int kVectorBytes = 16;

template <class T, class Sum>
struct SampledArguments : Rows<Sum> {
  NamedKeys named;
  const T *queries, *keys;
  T *grad_queries, *grad_keys;
  Sum* weights;                      // [B * M, P + S]: dot products, then the gradients' weights.
  const uint32_t *order, *segments;  // See PairOrder.
  FastDivide by_pairs;
  int64_t all_rows, all_keys, pairs;
  bool wide;  // Whether all rows consist of whole aligned vectors.

  SampledArguments(const Problem& p, Sum* weights, const PairOrder& sorted)
      : Rows<Sum>(p),
        named(p),
        queries(p.queries.as<const T>()),
        keys(p.keys.as<const T>()),
        grad_queries(p.grad_queries.as<T>()),
        grad_keys(p.grad_keys.as<T>()),
        weights(weights),
        order(sorted.order),
        segments(sorted.segments),
        by_pairs(sorted.by_pairs),
        all_rows(p.batch() * p.rows()),
        all_keys(p.batch() * p.keys_count()),
        pairs(p.positives() + p.samples()),
        wide(this->d * sizeof(T) % kVectorBytes == 0 && aligned(queries) && aligned(keys) && aligned(grad_queries) &&
             aligned(grad_keys)) {}

 private:
  static bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }
};

// A query with its pairs, and its positives, as Outcome takes them.
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
  __device__ int64_t key(int64_t pair) const { return a.named.key(index, in_entry, pair); }
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
  // Whether a rival is also a positive, and thus does not count in the rank.
  __device__ bool positive(int64_t pair) const {
    bool positive = false;
    each_of(places, [&](int64_t j) { positive = positive || key(j) == key(pair); });
    return positive;
  }
};

// Columns of a row that a lane sums at a time.
template <class T>
constexpr int kLaneColumns = sizeof(T) == 8 ? 4 : 8;
template <class T, int kWide>
constexpr int kRowsAhead = kWide == 1       ? 1
                           : sizeof(T) == 2 ? 8
                                            : 4;

// Computes, with a warp, scale * (sum + sum over i in [0, count) of weight * rows[index]), in this order, where
// (weight, index) = row_of(i). `sum` is 0 or NaN. Rows of weight 0 are not read, and need not exist.
template <class Sum>
struct WeightedRow {
  Sum weight;
  uint32_t index;
};
template <int kWide, class T, class Sum, class RowOf>
__device__ void sum_vectors(T* to, const T* rows, int64_t d, Sum scale, Sum sum, int64_t count, const RowOf& row_of) {
  constexpr int kVectors = kLaneColumns<T> / kWide, kAhead = kWide;
  const int lane = threadIdx.x % kWarp;
  for (int64_t first = 0; first < d; first += kWarp * kLaneColumns<T>) {
    Sum sums[kVectors][kWide];
#pragma unroll
    for (auto& vector : sums)
#pragma unroll
      for (Sum& v : vector) v = sum;
    const auto column = [&](int vector) { return first + (vector * kWarp + lane) * kWide; };
    for (int64_t begin = 0; begin < count; begin += kWarp) {
      const WeightedRow<Sum> own = begin + lane < count ? row_of(begin + lane) : WeightedRow<Sum>{0, 0};
      for (unsigned left = __ballot_sync(0xffffffffu, own.weight != 0); left != 0;) {
        Sum weights[kAhead];
        Arriving<T, kWide> values[kAhead][kVectors];
        const unsigned due = left;
#pragma unroll
        for (int r = 0; r < kAhead; ++r) {
          if (left == 0) break;
          const int from = __ffs(static_cast<int>(left)) - 1;
          left &= left - 1;
          weights[r] = __shfl_sync(0xffffffffu, own.weight, from);
          const T* const row = rows + __shfl_sync(0xffffffffu, own.index, from) * d;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) values[r][v] = arriving<kWide>(row + (column(v) < d ? column(v) : 0));
        }
#pragma unroll
        for (int r = 0; r < kAhead; ++r) {
          if (r >= __popc(due)) break;
#pragma unroll
          for (int v = 0; v < kVectors; ++v) {
            const auto arrived = std::bit_cast<Pack<T, kWide>>(values[r][v]);
#pragma unroll
            for (int i = 0; i < kWide; ++i) sums[v][i] += weights[r] * widen<Sum>(arrived.v[i]);
          }
        }
      }
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (column(v) >= d) break;
      Pack<T, kWide> narrowed;
#pragma unroll
      for (int i = 0; i < kWide; ++i) narrowed.v[i] = Narrow<T>::from(sums[v][i] * scale);
      pack_at<kWide>(to + column(v)) = narrowed;
    }
  }
}
template <class T, class Sum, class RowOf>
__device__ void sum_rows(bool wide, T* to, const T* rows, int64_t d, Sum scale, Sum sum, int64_t count,
                         const RowOf& row_of) {
  if (wide)
    sum_vectors<kVectorBytes / sizeof(T)>(to, rows, d, scale, sum, count, row_of);
  else
    sum_vectors<1>(to, rows, d, scale, sum, count, row_of);
}

// Multiplies a query with the keys of its pairs, with a warp.
template <int kWide, class T, class Sum>
__device__ void multiply_pairs(const SampledRow<T, Sum>& row) {
  constexpr int kAhead = kWide < 4 ? kWide : 4;
  const auto& a = row.a;
  const int lane = threadIdx.x % kWarp;
  const T *const query = a.queries + row.index * a.d, *const keys = a.keys + row.entry * a.n * a.d;
  for (int64_t begin = 0; begin < a.pairs; begin += kWarp) {
    const int64_t own = begin + lane < a.pairs ? row.key(begin + lane) : -1;
    Sum dot_of_own = 0;
    for (int first = 0; first < kWarp && begin + first < a.pairs; first += kAhead) {
      Sum dots[kAhead] = {};
      int64_t key[kAhead];
#pragma unroll
      for (int r = 0; r < kAhead; ++r) key[r] = __shfl_sync(0xffffffffu, own, first + r);
#pragma unroll(kWide == 1 ? 4 : 1)
      for (int64_t column = lane * kWide; column < a.d; column += kWarp * kWide) {
        const Pack<T, kWide> with = pack_at<kWide>(query + column);
        Arriving<T, kWide> values[kAhead];
#pragma unroll
        for (int r = 0; r < kAhead; ++r)
          if (key[r] >= 0) values[r] = arriving<kWide>(keys + key[r] * a.d + column);
#pragma unroll
        for (int r = 0; r < kAhead; ++r) {
          if (key[r] < 0) continue;
          const auto arrived = std::bit_cast<Pack<T, kWide>>(values[r]);
#pragma unroll
          for (int i = 0; i < kWide; ++i) dots[r] += widen<Sum>(with.v[i]) * widen<Sum>(arrived.v[i]);
        }
      }
#pragma unroll
      for (int r = 0; r < kAhead; ++r) {
        const Sum dot = warp_sum(dots[r]);
        if (lane == first + r) dot_of_own = dot;
      }
    }
    if (begin + lane < a.pairs) row.weights[begin + lane] = dot_of_own;
  }
  __syncwarp();
}

// Marks a negative that is left out, in place of its power.
template <class Sum>
constexpr Sum kLeftOut = -1;

// The sums over a query's negatives. measure_pairs(), called by a warp, also turns their dot products into powers.
template <class Sum>
struct SampledRivals {
  Rivals<Sum> rivals;
  int64_t rank = 0;
  bool valid = true;  // Whether all negatives name keys.
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
    row.weights[pair] = row.contrasted(pair) ? a.add(found.rivals, row.score(pair), row.dot(pair)) : kLeftOut<Sum>;
  found.rivals.sum = warp_sum(found.rivals.sum);
  found.rivals.moment = warp_sum(found.rivals.moment);
  return found;
}

// Contrasts queries, with one warp for each.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) contrast_sampled(const __grid_constant__ SampledArguments<T, Sum> a) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t index = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; index < a.all_rows;
       index += int64_t{gridDim.x} * (kThreads / kWarp)) {
    const SampledRow<T, Sum> row(a, index);
    if (a.wide)
      multiply_pairs<kVectorBytes / sizeof(T)>(row);
    else
      multiply_pairs<1>(row);
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
      else  // The factor may be NaN, which must not reach those that are left out.
        v = factor == 0 || v == kLeftOut<Sum> ? Sum(0) : v * factor;
    }
    __syncwarp();
    if (a.grad_queries == nullptr) continue;
    sum_rows(a.wide, a.grad_queries + index * a.d, a.keys + row.entry * a.n * a.d, a.d, row.scale,
             valid || given == 0 ? Sum(0) : kNan<Sum>, weight == 0 ? 0 : a.pairs,
             [&](int64_t pair) { return WeightedRow<Sum>{row.weights[pair], static_cast<uint32_t>(row.key(pair))}; });
  }
}

// Sums the queries of each key's pairs in order, with one warp per key.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) sum_sampled_keys(const __grid_constant__ SampledArguments<T, Sum> a) {
  for (int64_t key = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; key < a.all_keys;
       key += int64_t{gridDim.x} * (kThreads / kWarp)) {
    const int64_t begin = a.segments[key], count = a.segments[key + 1] - begin;
    if (a.grad_keys != nullptr)
      sum_rows(a.wide, a.grad_keys + key * a.d, a.queries, a.d, a.scale(), Sum(0), count, [&](int64_t i) {
        const uint32_t pair = a.order[begin + i];
        uint32_t in_row;
        return WeightedRow<Sum>{a.weights[pair], a.by_pairs(pair, in_row)};
      });
    if (a.grad_bias == nullptr) continue;
    Sum sum = 0;
    for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += a.weights[a.order[begin + i]];
    sum = warp_sum(sum);
    if (threadIdx.x % kWarp == 0) a.grad_bias[key] = sum;
  }
}

// The workspace of a sampled contrast.
template <class Sum>
struct SampledWorkspace {
  Sum* weights;
  PairOrder order;

  SampledWorkspace(const Problem& p, Parts memory)
      : weights(memory.take<Sum>(p.batch() * p.rows() * (p.positives() + p.samples()))),
        order(p, memory),
        bytes_(memory.used()) {}
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
};

template <class T, class Sum>
void launch_sampled(const Problem& p, void* stream) {
  const SampledWorkspace<Sum> memory(p, Parts(p.workspace.as<char>()));
  const SampledArguments<T, Sum> a(p, memory.weights, memory.order);
  constexpr int64_t kWarps = kThreads / kWarp;
  launch("contrast_sampled", &contrast_sampled<T, Sum>, {divide_up(a.all_rows, kWarps), dim3(kThreads)}, stream, a);
  if (!memory.order.wanted) return;
  launch_sort(memory.order, a.named, stream);
  launch("sum_sampled_keys", &sum_sampled_keys<T, Sum>, {divide_up(a.all_keys, kWarps), dim3(kThreads)}, stream, a);
}

}  // namespace cpc::info_nce::cuda
