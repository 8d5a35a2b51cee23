// Kernels that work on dot products in memory; each block takes a tile of 64 x 64 of them. They serve contrasts that
// need more from a tile than its rows' sums (symmetric ones, and those with biases), the sigmoid measure, whose powers
// are no exponentials, and float64.
#pragma once

#include "info_nce/finish.cuh"

namespace cpc::info_nce::cuda {

// A tile in shared memory: its dot products, then powers or weights; and for each row the keys that are no rivals, as
// bits in one word for even and one for odd keys.
template <class Sum>
class Tile {
  static constexpr int kPitch = kTile + 2;
  static constexpr int64_t kValueBytes = kTile * kPitch * sizeof(Sum);

 public:
  static constexpr int64_t kBytes = kValueBytes + kTile * 2 * sizeof(uint32_t);
  __device__ Sum& operator()(int row, int key) const {
    return reinterpret_cast<Sum*>(dynamic_shared())[row * kPitch + key];
  }
  __device__ uint32_t& left_out(int row, int odd) const {
    return reinterpret_cast<uint32_t*>(dynamic_shared() + kValueBytes)[2 * row + odd];
  }
};

// The keys of a tile that are no rivals of a row, as bits: bit i is that of key `begin` + 2 i + odd of the entry.
template <class Sum>
__device__ uint32_t find_left_out(const Group<Sum>& a, int64_t entry, int64_t row, int64_t begin, int odd) {
  const int64_t index = a.index(entry, row);
  const auto within = [&](int64_t key) {
    return static_cast<int>((key < begin ? begin : key > begin + kTile ? begin + kTile : key) - begin);
  };
  const auto below = [&](int end) {  // The bits of keys below `end`.
    const int count = (end - odd + 1) / 2;
    return count == kTile / 2 ? ~uint32_t{0} : (uint32_t{1} << count) - 1;
  };
  uint32_t rivals = below(within(a.first_key + a.key_count));
  if (a.key_range != nullptr)
    rivals &= below(within(a.key_range[2 * index + 1])) & ~below(within(a.key_range[2 * index]));
  if (a.query_groups != nullptr) {
    const int64_t* const groups = a.key_groups + (a.first_entry + entry) * a.n + begin + odd;
    for (uint32_t left = rivals, i = 0; left != 0; left >>= 1, ++i)
      if ((left & 1) != 0 && (groups[2 * i] == a.query_groups[index]) != a.same_groups) rivals &= ~(uint32_t{1} << i);
  }
  const auto leave_out = [&](int64_t key) {
    const int64_t at = key - begin;
    if (key >= 0 && at >= 0 && at < kTile && at % 2 == odd) rivals &= ~(uint32_t{1} << (at / 2));
  };
  each_of(a.places, [&](int64_t j) { leave_out(a.target(entry, row, j)); });
  each_of(a.excluded, [&](int64_t e) { leave_out(a.left_out(index, e)); });
  return ~rivals;
}

// Computes a tile's part of its rows' rivals, and the number of those that count in the ranks. The tile begins at row
// `first_row` of the group and key `first_key` of the chunk.
template <class Sum>
__device__ void measure_rows(const Group<Sum>& a, const Tile<Sum>& tile, int64_t entry, int64_t first_row,
                             int64_t first_key) {
  // Each row has two threads, one for even and one for odd keys.
  const int in_tile = static_cast<int>(threadIdx.x) / 2, odd = static_cast<int>(threadIdx.x) % 2;
  const int64_t row = first_row + in_tile, begin = a.first_key + first_key;
  const bool exists = row < a.rows;
  const uint32_t left_out = exists ? find_left_out(a, entry, row, begin, odd) : ~uint32_t{0};
  if (a.symmetric)  // Absent rows are left out of all columns.
    tile.left_out(in_tile, odd) = exists && a.is_present(a.index(entry, row)) ? left_out : ~uint32_t{0};
  const Sum scale = a.scale(), threshold = exists && a.losses != nullptr
                                               ? a.threshold(a.index(entry, row), PositivesOfRow<Sum>(a, entry, row))
                                               : Sum(0);
  Sum largest = -kInfinity<Sum>;
  int count = 0;
  for (int key = odd; key < kTile; key += 2) {
    if ((left_out >> (key / 2) & 1) != 0) continue;
    const Sum score = a.score(scale, tile(in_tile, key), entry, begin + key);
    largest = score > largest ? score : largest;
    if (!(score < threshold)) ++count;  // NaN counts.
  }
  const Sum other = __shfl_xor_sync(0xffffffffu, largest, 1);
  Rivals<Sum> rivals;
  rivals.largest = a.bounded(other > largest ? other : largest);
  for (int key = odd; key < kTile; key += 2) {
    const Sum dot = tile(in_tile, key);
    if ((left_out >> (key / 2) & 1) == 0) a.add(rivals, a.score(scale, dot, entry, begin + key), dot);
  }
  rivals.sum += __shfl_xor_sync(0xffffffffu, rivals.sum, 1);
  rivals.moment += __shfl_xor_sync(0xffffffffu, rivals.moment, 1);
  count += __shfl_xor_sync(0xffffffffu, count, 1);
  if (odd != 0 || !exists) return;
  const int64_t at = a.stat(entry, begin / kTile, row);
  a.tiles.set(at, rivals);
  if (a.losses != nullptr) a.counts[at] = static_cast<uint8_t>(count);
}

// Computes the part that half of a tile's rows have in its columns, in a symmetric contrast. A thread has one key and
// half.
template <class Sum>
__device__ void measure_columns(const Group<Sum>& a, const Tile<Sum>& tile, int64_t entry, int64_t first_row,
                                int64_t first_key) {
  const int column = static_cast<int>(threadIdx.x) % kTile, half = static_cast<int>(threadIdx.x) / kTile;
  const int64_t key = a.first_key + first_key + column;
  if (first_key + column >= a.key_count) return;
  const auto each_score = [&](const auto& use) {
    const Sum scale = a.scale();
    for (int row = half * kColumnRows; row < (half + 1) * kColumnRows; ++row) {
      const bool left_out = (tile.left_out(row, column % 2) >> (column / 2) & 1) != 0;
      if (!left_out) use(a.score(scale, tile(row, column), entry, key), tile(row, column));
    }
  };
  Sum largest = -kInfinity<Sum>;
  each_score([&](Sum score, Sum) { largest = score > largest ? score : largest; });
  Rivals<Sum> rivals;
  rivals.largest = a.bounded(largest);
  each_score([&](Sum score, Sum dot) { a.add(rivals, score, dot); });
  a.column_parts.set(a.column_part(entry, first_row / kColumnRows + half, first_key + column), rivals);
}

// Turns a tile's dot products into the gradients' weights.
template <class Sum>
__device__ void weigh(const Group<Sum>& a, const Tile<Sum>& tile, int64_t entry, int64_t first_row, int64_t first_key) {
  const int in_tile = static_cast<int>(threadIdx.x) / 2, odd = static_cast<int>(threadIdx.x) % 2;
  const int64_t row = first_row + in_tile, begin = a.first_key + first_key;
  if (row >= a.rows) return;  // Such rows are not read.
  const int64_t kept = a.kept(entry, row);
  const bool counts = a.has_gradients(entry, row);
  const uint32_t left_out = counts ? find_left_out(a, entry, row, begin, odd) : ~uint32_t{0};
  const Sum scale = a.scale(), top = a.tops[kept], factor = a.rival_factors[kept];
  // Powers may be infinite or NaN where their factor is 0.
  const auto weight = [&](Sum score, Sum top, Sum factor) {
    return factor == 0 ? Sum(0) : factor * a.power(score, top);
  };
  for (int key = odd; key < kTile; key += 2) {
    Sum& v = tile(in_tile, key);
    if ((left_out >> (key / 2) & 1) != 0) {
      v = 0;
      continue;
    }
    const Sum score = a.score(scale, v, entry, begin + key);
    v = weight(score, top, factor);
    if (!a.symmetric) continue;
    const int64_t column = entry * a.n + begin + key;
    v += weight(score, a.columns.largest[column], a.column_factors[column]);
  }
  each_of(counts ? a.places : 0, [&](int64_t j) {
    const int64_t at = a.target(entry, row, j) - begin;
    if (at >= 0 && at < kTile && at % 2 == odd)
      tile(in_tile, static_cast<int>(at)) = a.target_weights[a.kept(entry, row, j)];
  });
}

// Sums half the rows of a tile of weights for each of its keys, before the weights are rounded.
template <class Sum>
__device__ void sum_weights(const Group<Sum>& a, const Tile<Sum>& tile, int64_t entry, int64_t first_row,
                            int64_t first_key) {
  const int column = static_cast<int>(threadIdx.x) % kTile, half = static_cast<int>(threadIdx.x) / kTile;
  Sum sum = 0;
  for (int row = half * kColumnRows; row < (half + 1) * kColumnRows; ++row)
    if (first_row + row < a.rows) sum += tile(row, column);
  a.bias_parts[a.column_part(entry, first_row / kColumnRows + half, first_key + column)] = sum;
}

// Copies a tile of weights to memory, times the unit.
template <class T, class Sum = SumOf<T>>
__device__ void store_powers(const Arguments<T>& a, const Tile<Sum>& tile, int64_t entry, int64_t first_row,
                             int64_t first_key) {
  constexpr int kChunksAcross = kTile / kChunk<T>;
  const Sum unit = a.unit();
  for (int chunk = static_cast<int>(threadIdx.x); chunk < kTile * kChunksAcross; chunk += kThreads) {
    const int row = chunk / kChunksAcross, key = chunk % kChunksAcross * kChunk<T>;
    if (first_row + row >= a.rows) continue;
    Pack<T, kChunk<T>> powers;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) powers.v[i] = Narrow<T>::from(tile(row, key + i) * unit);
    pack_at<kChunk<T>>(a.row_of_powers(entry, first_row + row) + first_key + key) = powers;
  }
}

// Loads the dot products of each of the block's tiles to shared memory and calls work(tile, entry, first_row,
// first_key).
template <class Sum, class Work>
__device__ void each_stored_tile(const Group<Sum>& a, const Work& work) {
  constexpr Tile<Sum> tile{};
  const int64_t row_tiles = divide_up(a.rows, kTile), key_tiles = divide_up(a.key_count, kTile);
  for (int64_t block = blockIdx.x; block < a.entries * row_tiles * key_tiles; block += gridDim.x) {
    const int64_t entry = block / (row_tiles * key_tiles), first_row = block / key_tiles % row_tiles * kTile,
                  first_key = block % key_tiles * kTile;
    const Sum* const dots = a.dot_matrix + (entry * a.pitch_rows + first_row) * a.pitch_keys + first_key;
    for (int pair = static_cast<int>(threadIdx.x); pair < kTile * kTile / 2; pair += kThreads) {
      const int row = pair / (kTile / 2), key = pair % (kTile / 2) * 2;
      pack_at<2>(&tile(row, key)) = pack_at<2>(dots + row * a.pitch_keys + key);
    }
    __syncthreads();  // A row's dot products are there, whoever copied them.
    work(tile, entry, first_row, first_key);
    __syncthreads();  // All threads have finished with shared memory, which the next tile overwrites.
  }
}

template <class Sum>
__global__ void __launch_bounds__(kThreads, 4) measure_tiles(const __grid_constant__ Group<Sum> a) {
  each_stored_tile(a, [&](const auto& tile, int64_t entry, int64_t first_row, int64_t first_key) {
    measure_rows(a, tile, entry, first_row, first_key);
    if (!a.symmetric) return;
    __syncthreads();  // All threads see the keys that rows leave out.
    measure_columns(a, tile, entry, first_row, first_key);
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 4) weigh_tiles(const __grid_constant__ Arguments<T> a) {
  each_stored_tile(a, [&](const auto& tile, int64_t entry, int64_t first_row, int64_t first_key) {
    weigh(a, tile, entry, first_row, first_key);
    __syncthreads();  // All threads see the weights.
    if (a.grad_bias != nullptr) sum_weights(a, tile, entry, first_row, first_key);
    store_powers(a, tile, entry, first_row, first_key);
  });
}

}  // namespace cpc::info_nce::cuda
