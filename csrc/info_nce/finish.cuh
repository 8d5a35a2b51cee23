// Kernels before and after the products of a contrast of all keys. They pack operands into rows of whole 16-byte
// chunks, combine the results of tiles into those of rows and columns, and sum up the parts of gradients.
#pragma once

#include "info_nce/group.cuh"

namespace cpc::info_nce::cuda {

// Calls work(i) for the calling thread's share of [0, count), in a kernel launched with about one thread for each.
template <class Work>
__device__ void each_of_grid(int64_t count, const Work& work) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) work(i);
}

// --- Operands ---

// Copies rows of d values to rows of whole chunks, padded with zeros.
template <class T>
__global__ void __launch_bounds__(kThreads) pack_rows(const T* from, T* to, int64_t rows, int64_t d) {
  constexpr int kCount = kChunk<T>;
  const int64_t across = divide_up(d, kCount);
  each_of_grid(rows * across, [&](int64_t i) {
    const int64_t row = i / across, column = i % across * kCount, left = d - column;
    Pack<T, kCount> chunk = {};
    load_run(chunk.v, from + row * d + column, 1, static_cast<int>(left < kCount ? left : kCount));
    pack_at<kCount>(to + i * kCount) = chunk;
  });
}

// Copies the keys that a group's targets name.
template <class T>
__global__ void __launch_bounds__(kThreads) gather_positives(const __grid_constant__ Arguments<T> a, const T* keys) {
  constexpr int kCount = kChunk<T>;
  const int64_t across = a.pitch_d / kCount;
  each_of_grid(a.entries * a.places * a.rows * across, [&](int64_t i) {
    const int64_t chunk = i % across, row = i / across % a.rows, place = i / across / a.rows;
    const int64_t entry = place / a.places, target = a.target(entry, row, place % a.places);
    const T* const key = keys + (entry * a.n + (target < 0 ? 0 : target)) * a.pitch_d;  // Without one, any key serves.
    pack_at<kCount>(a.positive_keys + (place * a.pitch_rows + row) * a.pitch_d + chunk * kCount) =
        pack_at<kCount>(key + chunk * kCount);
  });
}

// Writes every sharers-th chunk, from `share` on, of a finished row of scaled_queries: the query times `factor`.
template <class T>
__device__ void scale_query(const Arguments<T>& a, int64_t entry, int64_t row, SumOf<T> factor, int share,
                            int sharers) {
  using Sum = SumOf<T>;
  constexpr int kCount = kChunk<T>;
  const T* const query = a.query_rows(entry) + row * a.d;
  T* const scaled = a.scaled_queries + (entry * a.pitch_rows + row) * a.pitch_d;
  const bool counts = a.has_gradients(entry, row) && (a.weighs || factor != 0);  // Else it may have infinities or NaN.
  for (int64_t column = int64_t{share} * kCount; column < a.d; column += int64_t{sharers} * kCount) {
    const int64_t left = a.d - column;
    Pack<T, kCount> chunk = {};
    if (counts) load_run(chunk.v, query + column, 1, static_cast<int>(left < kCount ? left : kCount));
    if (a.keeps_powers()) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) chunk.v[i] = Narrow<T>::from(factor * widen<Sum>(chunk.v[i]));
    }
    pack_at<kCount>(scaled + column) = chunk;
  }
}

// Fills scaled_queries in a symmetric contrast, where a row may have gradients from the columns, which come after rows.
constexpr int kScaleSharers = 32;
template <class T>
__global__ void __launch_bounds__(kThreads) scale_queries(const __grid_constant__ Arguments<T> a) {
  each_of_grid(a.entries * a.rows * kScaleSharers, [&](int64_t i) {
    const int64_t row = i / kScaleSharers;
    scale_query(a, row / a.rows, row % a.rows, SumOf<T>(1), static_cast<int>(i % kScaleSharers), kScaleSharers);
  });
}

// Finds the largest weight of all rows, in one block.
constexpr int kUnitThreads = 256;
template <class Sum>
__global__ void __launch_bounds__(kUnitThreads)
    find_largest_weight(const Sum* row_weights, int64_t count, Sum factor, Sum* largest) {
  auto& of_threads = static_shared<Sum[kUnitThreads], struct LargestOfThreads>();
  const int own = static_cast<int>(threadIdx.x);
  Sum found = row_weights == nullptr ? fabs(factor) : 0;
  for (int64_t i = own; row_weights != nullptr && i < count; i += kUnitThreads) {
    const Sum weight = fabs(weight_of(i, factor, row_weights));
    found = weight > found ? weight : found;
  }
  of_threads[own] = found;
  for (int half = kUnitThreads / 2; half > 0; half /= 2) {
    __syncthreads();  // All threads see the values of the step before.
    if (own < half && of_threads[own + half] > of_threads[own]) of_threads[own] = of_threads[own + half];
  }
  if (own == 0 && blockIdx.x == 0) *largest = of_threads[0];
}

// Computes the thresholds of the rows' ranks, once all of their positives are multiplied.
template <class Sum>
__global__ void __launch_bounds__(kThreads) find_limits(const __grid_constant__ Group<Sum> a) {
  each_of_grid(a.entries * a.rows, [&](int64_t i) {
    const int64_t entry = i / a.rows, row = i % a.rows;
    a.limits[a.kept(entry, row)] = a.threshold(a.index(entry, row), PositivesOfRow<Sum>(a, entry, row));
  });
}

// --- Rows ---

// The rows that a block finishes, and the threads that share the tiles of each row. Neighbouring threads have
// neighbouring rows, so that they read whole sectors together.
constexpr int kFinishedRows = 8, kSharers = 32, kFinishThreads = kFinishedRows * kSharers;

template <class Sum>
struct SharesOfRows {
  Sum largest[kSharers][kFinishedRows], sum[kSharers][kFinishedRows], moment[kSharers][kFinishedRows];
  int rank[kSharers][kFinishedRows];
};

// Merges the rivals of a row, and the number of those that count in the rank, from the row's tiles. Threads of the
// first share get the full result, the others only the largest score. The order of sums depends only on the number of
// tiles.
template <class Sum>
__device__ Rivals<Sum> merge_tiles(const Group<Sum>& a, bool exists, int64_t entry, int64_t row, int& rank) {
  auto& shared = static_shared<SharesOfRows<Sum>, struct OfFinishedRows>();
  const int at = threadIdx.x % kFinishedRows, share = threadIdx.x / kFinishedRows;
  const int64_t tiles = exists ? a.key_tiles : 0;
  Rivals<Sum> rivals;
  for (int64_t t = share; t < tiles; t += kSharers) {
    const Sum largest = a.tiles.largest[a.stat(entry, t, row)];
    rivals.largest = largest > rivals.largest ? largest : rivals.largest;
  }
  shared.largest[share][at] = rivals.largest;
  __syncthreads();  // All threads see the largest score of each share.
  for (int i = 0; i < kSharers; ++i) {
    const Sum largest = shared.largest[i][at];
    rivals.largest = largest > rivals.largest ? largest : rivals.largest;
  }
  rank = 0;
  for (int64_t t = share; t < tiles; t += kSharers) {
    const int64_t stat = a.stat(entry, t, row);
    const Rivals<Sum> part = a.tiles[stat];
    const Sum factor = exp(part.largest - rivals.largest);
    rivals.sum += part.sum * factor;
    rivals.moment += part.moment * factor;
    if (a.losses != nullptr) rank += a.counts[stat];
  }
  shared.sum[share][at] = rivals.sum;
  shared.moment[share][at] = rivals.moment;
  shared.rank[share][at] = rank;
  __syncthreads();  // All threads see the sums of each share.
  for (int i = 1; share == 0 && i < kSharers; ++i) {
    rivals.sum += shared.sum[i][at];
    rivals.moment += shared.moment[i][at];
    rank += shared.rank[i][at];
  }
  return rivals;
}

// Rounds a row's weights of positives as the products do, and returns the factor of its rivals' weights that makes all
// weights sum to zero again. Otherwise the component that all keys have in common, which may be far larger than their
// differences, would remain in the gradients, with the same sign in every row.
template <class T, class Sum>
__device__ Sum balance_weights(const Group<Sum>& a, int64_t entry, int64_t row) {
  Sum exact = 0, rounded = 0;
  const Sum unit = a.unit();
  each_of(a.places, [&](int64_t j) {
    Sum& weight = a.target_weights[a.kept(entry, row, j)];
    exact += weight;
    weight = widen<Sum>(Narrow<T>::from(unit * weight)) / unit;
    rounded += weight;
  });
  const Sum ratio = exact != 0 ? rounded / exact : Sum(1);
  // If the positives' weights nearly cancel, the rivals have hardly any weight, and the ratio means nothing.
  return fabs(ratio - 1) < Sum(1) / 64 ? ratio : Sum(1);
}

// Computes a row's results, and the factors of its gradients' weights, from its rivals. In a symmetric contrast these
// are of one direction only, with half the weight. Returns the factor from powers, relative to the largest score, to
// weights.
template <class T, class Sum = SumOf<T>>
__device__ Sum finish_row(const Group<Sum>& a, int64_t entry, int64_t row, const Rivals<Sum>& rivals, int64_t rank) {
  const int64_t index = a.index(entry, row), kept = a.kept(entry, row);
  const PositivesOfRow<Sum> positives(a, entry, row);
  const Outcome<Sum, PositivesOfRow<Sum>> outcome(a.measure, rivals, positives);
  const bool valid = a.valid(index, a.in_entry(row));
  a.store_results(index, valid, rank, outcome);
  if (!a.gradients) return 0;
  const Sum given = a.weight(index) * (a.symmetric ? Sum(0.5) : Sum(1));
  const Sum weight = valid && !outcome.lacks_positives() ? given : Sum(0), factor = outcome.factor_of_rivals(weight);
  a.weights[kept] = weight;
  const bool present = a.is_present(index), counts = valid && present && !outcome.lacks_positives();
  const Sum of_powers = a.keeps_powers() ? factor : 1 / a.unit();  // From the values in `powers` to weights.
  a.row_factors[kept] = counts ? a.scale() * of_powers : present && !valid ? kNan<Sum> : Sum(0);
  each_of(a.places, [&](int64_t j) {
    a.target_weights[a.kept(entry, row, j)] = positives.present(j) ? outcome.weight_of_positive(j, weight) : Sum(0);
  });
  if (a.weighs) {
    a.tops[kept] = rivals.largest;
    // In a symmetric contrast the columns add to the weights, and the gradient of a bias is a sum of unrounded weights.
    const bool balances = a.measure != Measure::sigmoid && !a.symmetric && a.grad_bias == nullptr;
    a.rival_factors[kept] = balances ? factor * balance_weights<T>(a, entry, row) : factor;
  }
  return factor;
}

// In a share of a finished row's tiles, makes powers relative to the row's largest score where they are relative to
// another score, and zero where the row has no gradients, as they may be infinite or NaN then.
template <class T, class Sum = SumOf<T>>
__device__ void align_powers(const Arguments<T>& a, int64_t entry, int64_t row, int share, Sum largest, Sum factor) {
  constexpr int kCount = kChunk<T>;
  for (int64_t t = share; t < a.key_tiles; t += kSharers) {
    const Sum reference = a.tiles.largest[a.stat(entry, t, row)];
    if (factor != 0 && reference == largest) continue;
    const Sum change = factor != 0 ? exp(reference - largest) : Sum(0);
    T* const powers = a.row_of_powers(entry, row) + t * kTile;
#pragma unroll 1
    for (int key = 0; key < kTile; key += kCount) {
      Pack<T, kCount> chunk = {};
      if (change != 0) chunk = pack_at<kCount>(powers + key);
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        chunk.v[i] = Narrow<T>::from(change != 0 ? change * widen<Sum>(chunk.v[i]) : Sum(0));
      pack_at<kCount>(powers + key) = chunk;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kFinishThreads, 2) finish_rows(const __grid_constant__ Arguments<T> a) {
  using Sum = SumOf<T>;
  auto& factors = static_shared<Sum[kFinishedRows], struct FactorsOfFinishedRows>();
  const int at = threadIdx.x % kFinishedRows, share = threadIdx.x / kFinishedRows;
  const auto blocks = static_cast<uint32_t>(divide_up(a.rows, kFinishedRows));  // Per entry.
  for (uint32_t block = blockIdx.x; block < a.entries * blocks; block += gridDim.x) {
    const int64_t entry = block / blocks, row = int64_t{block % blocks} * kFinishedRows + at;
    const bool exists = row < a.rows;
    int rank = 0;
    const Rivals<Sum> rivals = merge_tiles(a, exists, entry, row, rank);
    if (exists && share == 0) factors[at] = finish_row<T>(a, entry, row, rivals, rank);
    __syncthreads();  // All threads see the rows' factors, and have finished with the shares.
    const Sum factor = factors[at];
    if constexpr (kOnTensorCores<T>) {
      if (!a.gradients) continue;
      if (exists && a.keeps_powers()) align_powers(a, entry, row, share, rivals.largest, factor);
      if (exists && a.grad_keys != nullptr && !a.symmetric) scale_query(a, entry, row, factor, share, kSharers);
      __syncthreads();  // The rows' powers are written, and all threads have read the factors.
      if (!exists || share != 0 || !a.keeps_powers()) continue;
      const int64_t target = a.target(entry, row, 0);
      Sum& weight = a.target_weights[a.kept(entry, row)];
      Sum left = 0;  // What rounding loses, in units of the powers; finish_values() adds it to the query's gradient.
      if (target >= 0 && factor != 0) {
        const Sum exact = weight / factor;
        const T rounded = Narrow<T>::from(exact);
        a.row_of_powers(entry, row)[target] = rounded;
        if (finite<Sum>(exact) == exact) left = exact - widen<Sum>(rounded);
      }
      weight = left;
    }
  }
}

// --- The other direction of a symmetric contrast ---

// Merges a group's rows into the columns of a chunk.
template <class Sum>
__global__ void __launch_bounds__(kThreads) merge_columns(const __grid_constant__ Group<Sum> a) {
  each_of_grid(a.entries * a.key_count, [&](int64_t i) {
    const int64_t entry = i / a.key_count, key = i % a.key_count, column = entry * a.n + a.first_key + key;
    const Rivals<Sum> before = a.first_row > 0 ? a.columns[column] : Rivals<Sum>();
    a.columns.set(column, merged(before, a.column_parts_of_group(),
                                 [&](int64_t part) { return a.column_parts[a.column_part(entry, part, key)]; }));
  });
}

// Adds the columns' results to those of the rows.
template <class Sum>
__global__ void __launch_bounds__(kThreads) finish_columns(const __grid_constant__ Group<Sum> a) {
  each_of_grid(a.entries * a.rows, [&](int64_t i) {
    const int64_t entry = i / a.rows, row = i % a.rows, index = a.index(entry, row), kept = a.kept(entry, row);
    const PositivesOfRow<Sum> positives(a, entry, row);
    const Outcome<Sum, PositivesOfRow<Sum>> outcome(a.measure, a.columns[kept], positives);
    if (a.losses != nullptr) a.losses[index] = (a.losses[index] + outcome.loss()) / 2;
    if (a.slopes != nullptr) a.slopes[index] = (a.slopes[index] + outcome.slope()) / 2;
    if (!a.gradients) return;
    const Sum weight = a.weights[kept];
    a.column_factors[kept] = outcome.factor_of_rivals(weight);
    a.target_weights[a.kept(entry, row, 0)] += outcome.weight_of_positive(0, weight);
  });
}
// --- Gradients ---

// Puts the weights of positives among those of their rivals, where their entries are still 0.
template <class T>
__global__ void __launch_bounds__(kThreads) put_positives(const __grid_constant__ Arguments<T> a) {
  each_of_grid(a.entries * a.places * a.rows, [&](int64_t i) {
    const int64_t entry = i / (a.places * a.rows), j = i / a.rows % a.places, row = i % a.rows;
    const int64_t target = a.target(entry, row, j) - a.first_key;
    if (target >= 0 && target < a.key_count && a.has_gradients(entry, row))
      a.row_of_powers(entry, row)[target] = Narrow<T>::from(a.unit() * a.target_weights[a.kept(entry, row, j)]);
  });
}

// Sums up the parts of a few values of the gradient of queries or keys.
template <class T>
constexpr int kFinishedValues = kChunk<SumOf<T>>;
template <class T>
__device__ void finish_values(const Arguments<T>& a, bool of_keys, int64_t i) {
  using Sum = SumOf<T>;
  constexpr int kCount = kFinishedValues<T>;
  const int64_t rows = of_keys ? a.n : a.rows, across = divide_up(a.d, kCount);
  const int64_t of_all = i / across, column = (i - of_all * across) * kCount;
  const int64_t entry = of_all < rows ? 0 : of_all / rows, row = of_all - entry * rows;
  const int64_t parts = of_keys ? a.key_parts : a.n > 0 ? a.query_parts : 0;
  const int64_t pitch = (of_keys ? a.n : a.pitch_rows) * a.pitch_d;  // From one part to the next.
  const Sum* sums = (of_keys ? a.key_sums : a.query_sums) + entry * parts * pitch + row * a.pitch_d + column;
  Sum total[kCount] = {};
#pragma unroll 1
  for (int64_t part = 0; part < parts; ++part, sums += pitch) {
    const Pack<Sum, kCount> of_part = pack_at<kCount>(sums);
#pragma unroll
    for (int k = 0; k < kCount; ++k) total[k] += of_part.v[k];
  }
  const Sum factor = of_keys ? a.scale() / a.unit() : a.row_factors[a.kept(entry, row)];
  if (const Sum left = of_keys || !a.keeps_powers() ? Sum(0) : a.target_weights[a.kept(entry, row)]; left != 0) {
    Sum key[kCount] = {};
    load_run(key, a.key_rows(entry) + a.target(entry, row, 0) * a.d + column, 1, how_many(a.d - column, kCount));
#pragma unroll
    for (int k = 0; k < kCount; ++k) total[k] += left * key[k];
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) total[k] = factor != 0 ? total[k] * factor : Sum(0);
  T* const to =
      of_keys ? a.grad_keys + ((a.first_entry + entry) * a.n + row) * a.d : a.grad_queries + a.index(entry, row) * a.d;
  store_run(to + column, total, how_many(a.d - column, kCount));
}

// Computes gradients from their sums: of the group's queries and, after the last group, of all keys.
template <class T>
__global__ void __launch_bounds__(kThreads)
    finish_gradients(const __grid_constant__ Arguments<T> a, int64_t of_queries, int64_t of_keys) {
  each_of_grid(of_queries + of_keys,
               [&](int64_t i) { finish_values(a, i >= of_queries, i >= of_queries ? i - of_queries : i); });
}

// Adds a group's rows to the gradient of a chunk's biases.
template <class Sum>
__global__ void __launch_bounds__(kThreads) add_to_bias(const __grid_constant__ Group<Sum> a) {
  each_of_grid(a.entries * a.key_count, [&](int64_t i) {
    const int64_t entry = i / a.key_count, key = i % a.key_count;
    Sum& gradient = a.grad_bias[(a.first_entry + entry) * a.n + a.first_key + key];
    Sum sum = a.adds_keys ? gradient : Sum(0);
    for (int64_t part = 0; part < a.column_parts_of_group(); ++part)
      sum += a.bias_parts[a.column_part(entry, part, key)];
    gradient = sum;
  });
}

}  // namespace cpc::info_nce::cuda
