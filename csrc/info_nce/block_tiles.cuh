// Products of a contrast in float64: thread blocks multiply tiles of 64 x 64 with ordinary multiply-adds.
#pragma once

#include "info_nce/block_product.cuh"
#include "info_nce/finish.cuh"

namespace cpc::info_nce::cuda {

// Computes the dot products of a tile: of a group's rows from `first_row` on with keys of the entry. key_of(column) is
// the key of a column, or -1 for none.
template <class T, class KeyOf>
__device__ void multiply_tile(const Arguments<T>& a, Sums<MultiplyAdds<T>>& sums, int64_t entry, int64_t first_row,
                              const KeyOf& key_of) {
  const T *const queries = a.query_rows(entry), *const keys = a.key_rows(entry);
  multiply<MultiplyAdds<T>, DepthInnermost<T>, DepthInnermost<T>>(
      sums, a.d, [&](int64_t row, int64_t k) { return load_chunk<T>(queries, first_row + row, a.rows, k, a.d); },
      [&](int column, int64_t k) {
        const int64_t key = key_of(column);
        return load_chunk<T>(keys, key, key < 0 ? key : a.n, k, a.d);
      });
}

// Computes the positives' dot products. Those of 64 rows are the diagonal of a tile.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) score_positives(const __grid_constant__ Arguments<T> a) {
  using Sum = SumOf<T>;
  auto& targets = static_shared<int64_t[kTile], struct TargetsOfTile>();
  const int64_t row_tiles = divide_up(a.rows, kTile);
  for (int64_t block = blockIdx.x; block < a.entries * row_tiles * a.places; block += gridDim.x) {
    const int64_t entry = block / (row_tiles * a.places), first_row = block / a.places % row_tiles * kTile,
                  place = block % a.places;
    const int own = static_cast<int>(threadIdx.x);
    if (own < kTile) targets[own] = first_row + own < a.rows ? a.target(entry, first_row + own, place) : -1;
    __syncthreads();
    Sums<MultiplyAdds<T>> sums = {};
    multiply_tile<T>(a, sums, entry, first_row, [&](int column) { return targets[column]; });
    each_sum<MultiplyAdds<T>>(sums, [&](int row, int column, Sum v) {
      if (row == column && first_row + row < a.rows) a.dots[a.kept(entry, first_row + row, place)] = v;
    });
    __syncthreads();  // All threads have read the targets, which the next tile overwrites.
  }
}

// Computes all dot products of a group's queries with a chunk's keys.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) score(const __grid_constant__ Arguments<T> a) {
  const int64_t row_tiles = divide_up(a.rows, kTile), key_tiles = divide_up(a.key_count, kTile);
  for (int64_t block = blockIdx.x; block < a.entries * row_tiles * key_tiles; block += gridDim.x) {
    const int64_t entry = block / (row_tiles * key_tiles), first_row = block / key_tiles % row_tiles * kTile,
                  first_key = block % key_tiles * kTile;
    Sums<MultiplyAdds<T>> sums = {};
    multiply_tile<T>(a, sums, entry, first_row, [&](int column) {
      return first_key + column < a.key_count ? a.first_key + first_key + column : -1;
    });
    each_sum<MultiplyAdds<T>>(sums, [&](int row, int key, T v) {
      a.dot_matrix[(entry * a.pitch_rows + first_row + row) * a.pitch_keys + first_key + key] = v;
    });
  }
}

// --- Gradients of all keys ---

// Loads the gradients' weights of a row for the chunk's keys from `key` on.
template <class T>
__device__ Chunk<T> load_weights(const Arguments<T>& a, int64_t entry, int64_t row, int64_t key) {
  if (row >= a.rows || key >= a.pitch_keys) return {};
  return pack_at<kChunk<T>>(a.row_of_powers(entry, row) + key);
}

// Computes tiles of [rows, D] of a part of the queries' gradient: weights times keys.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) add_to_queries(const __grid_constant__ Arguments<T> a) {
  using Sum = SumOf<T>;
  const int64_t row_tiles = divide_up(a.rows, kTile), columns = divide_up(a.d, kTile);
  const int64_t tiles = row_tiles * columns, blocks = a.entries * a.query_parts * tiles;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t entry = block / (a.query_parts * tiles), part = block / tiles % a.query_parts;
    const int64_t first_row = block / columns % row_tiles * kTile, first = block % columns * kTile;
    const int64_t first_key = part * a.part_keys, left = a.key_count - first_key;
    const T* const keys = a.key_rows(entry) + a.first_key * a.d;
    Sums<MultiplyAdds<T>> sums = {};
    multiply<MultiplyAdds<T>, DepthInnermost<T>, DepthOutermost<T, kTile>>(
        sums, left < a.part_keys ? left : a.part_keys,
        [&](int64_t row, int64_t key) { return load_weights(a, entry, first_row + row, first_key + key); },
        [&](int64_t k, int64_t key) { return load_chunk<T>(keys, first_key + key, a.key_count, first + k, a.d); });
    each_sum<MultiplyAdds<T>>(sums, [&](int row, int k, Sum v) {
      const int64_t in_rows = first_row + row, column = first + k;
      if (in_rows >= a.rows || column >= a.d) return;
      Sum* const sum = a.query_sums + ((entry * a.query_parts + part) * a.pitch_rows + in_rows) * a.pitch_d + column;
      *sum = a.adds_queries ? *sum + v : v;
    });
  }
}

// Computes tiles of [keys, D] of the keys' gradient: transposed weights times queries.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) add_to_keys(const __grid_constant__ Arguments<T> a) {
  using Sum = SumOf<T>;
  const int64_t key_tiles = divide_up(a.key_count, kTile), columns = divide_up(a.d, kTile);
  for (int64_t block = blockIdx.x; block < a.entries * key_tiles * columns; block += gridDim.x) {
    const int64_t entry = block / (key_tiles * columns), first_key = block / columns % key_tiles * kTile,
                  first = block % columns * kTile;
    const T* const queries = a.query_rows(entry);
    Sums<MultiplyAdds<T>> sums = {};
    multiply<MultiplyAdds<T>, DepthOutermost<T, kTile>, DepthOutermost<T, kTile>>(
        sums, a.rows, [&](int64_t key, int64_t row) { return load_weights(a, entry, row, first_key + key); },
        [&](int64_t k, int64_t row) {
          const bool counts = row < a.rows && a.has_gradients(entry, row);
          return load_chunk<T>(queries, row, counts ? a.rows : 0, first + k, a.d);
        });
    each_sum<MultiplyAdds<T>>(sums, [&](int key, int k, Sum v) {
      const int64_t in_chunk = first_key + key, column = first + k;
      if (in_chunk >= a.key_count || column >= a.d) return;
      Sum* const sum = a.key_sums + (entry * a.n + a.first_key + in_chunk) * a.pitch_d + column;
      *sum = a.adds_keys ? *sum + v : v;
    });
  }
}

}  // namespace cpc::info_nce::cuda
