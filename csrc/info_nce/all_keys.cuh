// InfoNCE on the GPU, all keys contrasted: from queries and keys to losses and, formed at once, all gradients.
// What a group of queries scores against all keys stays in the L2 cache, as powers relative to the largest score of each
// tile. So scores are multiplied once, a tile needs nothing of the others, and once the tiles' maxima and sums are
// combined, two further products turn powers into gradients, each power scaled on its way to shared memory. Where there
// are too many keys for that, or a power alone does not tell its weight (several positives, a symmetric contrast), scores
// are computed again and become the gradients' weights, chunk by chunk.
// Positives are multiplied first, by the very same product, so that ranks can be counted while a tile is at hand and
// equal keys have equal scores. No sum depends on the order in which blocks run.
#pragma once

#include <algorithm>

#include "core/cuda/device.h"
#include "core/workspace.h"
#include "info_nce/block_product.cuh"

namespace cpc::info_nce::cuda {

// Rivals in memory, one array for each of what is known of them; moments only where slopes are wanted.
template <class Sum>
struct Stats {
  Sum *largest, *sum, *moment;

  void take(Parts& parts, int64_t count, bool moments) {
    largest = parts.take<Sum>(count);
    sum = parts.take<Sum>(count);
    moment = moments ? parts.take<Sum>(count) : nullptr;
  }
  __device__ Rivals<Sum> operator[](int64_t at) const {
    return {largest[at], sum[at], moment != nullptr ? moment[at] : Sum(0)};
  }
  __device__ void set(int64_t at, const Rivals<Sum>& rivals) const {
    largest[at] = rivals.largest;
    sum[at] = rivals.sum;
    if (moment != nullptr) moment[at] = rivals.moment;
  }
};

// Rivals and further parts of them as one, summed in order.
template <class Sum, class Part>
__device__ Rivals<Sum> merged(const Rivals<Sum>& rivals, int64_t parts, const Part& part) {
  Rivals<Sum> all;
  all.largest = rivals.largest;
  for (int64_t i = 0; i < parts; ++i) {
    const Sum largest = part(i).largest;
    all.largest = largest > all.largest ? largest : all.largest;
  }
  const auto add = [&](const Rivals<Sum>& more) {
    const Sum factor = exp(more.largest - all.largest);
    all.sum += more.sum * factor;
    all.moment += more.moment * factor;
  };
  add(rivals);
  for (int64_t i = 0; i < parts; ++i) add(part(i));
  return all;
}

// Powers of a group of queries: what the second-level cache of an A100 or H100, 40 or 50 MB, holds beside the rest.
constexpr int64_t kPowersBytes = int64_t{32} << 20;
// Beyond this many keys a group is of kChunkRows queries, and its keys come chunk by chunk.
constexpr int64_t kWholeKeys = 8192, kChunkRows = 1024;
// Blocks that fill a GPU, and keys that a block should sum over at least.
constexpr int64_t kFullGrid = 256, kMinPartKeys = 512;
// Rows of a tile that a thread measures for a column of a symmetric contrast.
constexpr int kColumnRows = kTile * kTile / kThreads;

// A group of queries, a chunk of its keys, and what is taken of the batch at a time.
struct Cuts {
  int64_t rows, keys, entries;
  int64_t part_keys, query_parts;  // The depth of the queries' gradient is summed in parts, for enough blocks.

  Cuts(const Problem& p, int64_t value_bytes) {
    const int64_t padded = divide_up(p.keys_count(), kTile) * kTile, all_rows = divide_up(p.rows(), kTile) * kTile;
    const bool chunks = p.keys_count() > kWholeKeys;
    rows = chunks ? kChunkRows : std::max(kPowersBytes / std::max<int64_t>(padded * value_bytes, 1), int64_t{kTile});
    rows = std::min(rows / kTile * kTile, all_rows);
    keys = std::min(chunks ? kPowersBytes / (kChunkRows * value_bytes) / kTile * kTile : padded, padded);
    entries = std::clamp<int64_t>(kPowersBytes / std::max<int64_t>(rows * keys * value_bytes, 1), 1,
                                  std::max<int64_t>(p.batch(), 1));
    const int64_t blocks = std::max<int64_t>(entries * divide_up(rows, kTile) * divide_up(p.dim(), kTile), 1);
    const int64_t parts = std::clamp<int64_t>(kFullGrid / blocks, 1, std::max<int64_t>(keys / kMinPartKeys, 1));
    part_keys = std::max<int64_t>(divide_up(divide_up(keys, parts), kTile) * kTile, kTile);
    query_parts = divide_up(keys, part_keys);
  }
};

// In some entries of the batch, the queries [first_row, first_row + rows) and keys [first_key, first_key + key_count).
template <class T, class Math>
struct Arguments : Rows<typename Math::Sum> {
  using Value = typename Math::Value;
  using Sum = typename Math::Sum;
  const T *queries, *keys;
  T *grad_queries, *grad_keys;
  bool symmetric;
  bool weighs;  // Whether scores are computed again, for `powers` to hold the gradients' weights.
  int64_t pitch_rows, pitch_keys, key_tiles;  // Sizes of a group and a chunk; tiles of all keys.
  int64_t query_parts, part_keys;
  Value* powers;                 // [entries][pitch_rows][pitch_keys]
  Stats<Sum> tiles = {};         // [entries][key_tiles][pitch_rows]
  Sum* factors;                  // Likewise, of powers that are kept: what makes them the gradients' weights.
  uint8_t* counts;               // Likewise: how many keys of the tile count in the rank.
  Sum *dots, *target_weights;    // [entries][places][M], of positives.
  Sum* weights;                  // [entries][M], of the losses; 0 of rows that are not valid.
  Sum* row_factors;              // [entries][M], of grad_queries.
  Sum *tops, *rival_factors;     // [entries][M], if `weighs`: rivals' largest scores, and what makes powers weights.
  Stats<Sum> column_parts = {};  // [entries][pitch_rows / kColumnRows][pitch_keys]
  Sum* bias_parts;               // Likewise: sums of the gradients' weights.
  Stats<Sum> columns = {};       // [entries][N]
  Sum* column_factors;           // [entries][N]
  Sum *query_sums, *key_sums;    // [entries][parts][pitch_rows][D], [entries][N][D], where needed.
  int64_t first_entry = 0, entries = 0, first_row = 0, rows = 0, first_key = 0, key_count = 0;
  bool adds_queries = false, adds_keys = false, ends_keys = false;  // To what is in memory; to the tensor.

  Arguments(const Problem& p, const Cuts& cuts, Parts& parts)
      : Rows<Sum>(p),
        queries(p.queries.as<const T>()),
        keys(p.keys.as<const T>()),
        grad_queries(p.grad_queries.as<T>()),
        grad_keys(p.grad_keys.as<T>()),
        symmetric(p.symmetric),
        weighs(this->gradients &&
               (cuts.keys < this->n || p.symmetric || this->places > 1 || this->grad_bias != nullptr)),
        pitch_rows(cuts.rows),
        pitch_keys(cuts.keys),
        key_tiles(divide_up(this->n, kTile)),
        query_parts(cuts.query_parts),
        part_keys(cuts.part_keys) {
    const bool moments = this->slopes != nullptr;
    const auto sums = [&](bool needed, int64_t count) { return parts.take<Sum>(needed ? count : 0); };
    const int64_t in_tiles = cuts.entries * key_tiles * cuts.rows, of_rows = cuts.entries * this->m;
    const int64_t of_columns = symmetric ? cuts.entries * this->n : 0;
    powers = parts.take<Value>(this->gradients ? cuts.entries * cuts.rows * cuts.keys : 0);
    tiles.take(parts, in_tiles, moments);
    factors = sums(keeps_powers(), in_tiles);
    counts = parts.take<uint8_t>(this->losses != nullptr ? in_tiles : 0);
    dots = sums(true, of_rows * this->places);
    target_weights = sums(this->gradients, of_rows * this->places);
    weights = sums(this->gradients, of_rows);
    row_factors = sums(this->gradients, of_rows);
    tops = sums(weighs, of_rows);
    rival_factors = sums(weighs, of_rows);
    column_parts.take(parts, symmetric ? cuts.entries * (cuts.rows / kColumnRows) * cuts.keys : 0, moments);
    bias_parts = sums(this->grad_bias != nullptr, cuts.entries * (cuts.rows / kColumnRows) * cuts.keys);
    columns.take(parts, of_columns, moments);
    column_factors = sums(this->gradients, of_columns);
    query_sums = sums(p.grad_queries.ndim != 0, cuts.entries * cuts.rows * cuts.query_parts * this->d);
    key_sums = sums(p.grad_keys.ndim != 0 && cuts.rows < this->m, cuts.entries * this->n * this->d);
  }

  // Whether the powers that a tile is measured by are kept, to become the gradients.
  CPC_HOST_DEVICE bool keeps_powers() const { return this->gradients && !weighs; }
  __device__ const T* query_rows(int64_t entry) const {
    return queries + ((first_entry + entry) * this->m + first_row) * this->d;
  }
  __device__ const T* key_rows(int64_t entry) const { return keys + (first_entry + entry) * this->n * this->d; }
  __device__ int64_t in_entry(int64_t row) const { return first_row + row; }
  __device__ int64_t index(int64_t entry, int64_t row) const { return (first_entry + entry) * this->m + in_entry(row); }
  // Where a row's values are that are kept for all rows of the entries, and those of a place for a positive.
  __device__ int64_t kept(int64_t entry, int64_t row) const { return entry * this->m + in_entry(row); }
  __device__ int64_t kept(int64_t entry, int64_t row, int64_t j) const {
    return (entry * this->places + j) * this->m + in_entry(row);
  }
  __device__ int64_t target(int64_t entry, int64_t row, int64_t j) const {
    return Rows<Sum>::target(index(entry, row), in_entry(row), j);
  }
  __device__ Sum score(Sum scale, Sum dot, int64_t entry, int64_t key) const {
    return Rows<Sum>::score(scale, dot, first_entry + entry, key);
  }
  // Whether a finished row has any. One of weight 0 may have some by the columns of a symmetric contrast.
  __device__ bool has_gradients(int64_t entry, int64_t row) const {
    const int64_t at = kept(entry, row);
    if (weights[at] != 0) return true;
    return this->present != nullptr && this->present[index(entry, row)] != 0 && row_factors[at] == row_factors[at];
  }
  __device__ int64_t stat(int64_t entry, int64_t tile, int64_t row) const {
    return (entry * key_tiles + tile) * pitch_rows + row;
  }
  __device__ int64_t column_parts_of_group() const { return divide_up(rows, kTile) * (kTile / kColumnRows); }
  __device__ int64_t column_part(int64_t entry, int64_t part, int64_t key) const {
    return (entry * (pitch_rows / kColumnRows) + part) * pitch_keys + key;
  }
};

// The positives of a row, as Outcome asks for them.
template <class T, class Math, class Sum = typename Math::Sum>
struct PositivesOfRow {
  const Arguments<T, Math>& a;
  int64_t entry, row, places;

  __device__ PositivesOfRow(const Arguments<T, Math>& a, int64_t entry, int64_t row)
      : a(a), entry(entry), row(row), places(a.places) {}
  __device__ bool present(int64_t j) const { return a.target(entry, row, j) >= 0; }
  __device__ Sum dot(int64_t j) const { return a.dots[a.kept(entry, row, j)]; }
  __device__ Sum score(int64_t j) const { return a.score(a.scale(), dot(j), entry, a.target(entry, row, j)); }
};

// Dot products of a tile, and what is made of them, in shared memory; and of each row the keys that are no rivals, as
// bits, those with even and with odd numbers apart.
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

// The dot products of a tile: those of a group's rows from `first_row` on with keys of the entry, of which key_of(column)
// is in a column of the tile, or none where that is -1.
template <class T, class Math, class KeyOf>
__device__ void multiply_tile(const Arguments<T, Math>& a, Sums<Math>& sums, int64_t entry, int64_t first_row,
                              const KeyOf& key_of) {
  using Value = typename Math::Value;
  const T *const queries = a.query_rows(entry), *const keys = a.key_rows(entry);
  multiply<Math, DepthInnermost<Value>, DepthInnermost<Value>>(
      sums, a.d, [&](int64_t row, int64_t k) { return load_chunk<Value>(queries, first_row + row, a.rows, k, a.d); },
      [&](int column, int64_t k) {
        const int64_t key = key_of(column);
        return load_chunk<Value>(keys, key, key < 0 ? key : a.n, k, a.d);
      });
}

// The positives' dot products, those of 64 rows by a tile whose diagonal they are.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads, kScoreBlocks<Math>)
    score_positives(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  auto& targets = static_shared<int64_t[kTile], struct TargetsOfTile>();
  const int64_t row_tiles = divide_up(a.rows, kTile);
  for (int64_t block = blockIdx.x; block < a.entries * row_tiles * a.places; block += gridDim.x) {
    const int64_t entry = block / (row_tiles * a.places), first_row = block / a.places % row_tiles * kTile,
                  place = block % a.places;
    const int own = static_cast<int>(threadIdx.x);
    if (own < kTile) targets[own] = first_row + own < a.rows ? a.target(entry, first_row + own, place) : -1;
    __syncthreads();
    Sums<Math> sums = {};
    multiply_tile<T, Math>(a, sums, entry, first_row, [&](int column) { return targets[column]; });
    each_sum<Math>(sums, [&](int row, int column, Sum v) {
      if (row == column && first_row + row < a.rows) a.dots[a.kept(entry, first_row + row, place)] = v;
    });
    __syncthreads();  // The next tile has other targets.
  }
}

// The keys of a tile that are no rivals of a row, as bits: bit i tells of key `begin` + 2 i + odd of the entry.
template <class T, class Math>
__device__ uint32_t find_left_out(const Arguments<T, Math>& a, int64_t entry, int64_t row, int64_t begin, int odd) {
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

// What a tile is to its rows: their rivals, and how many of them count in the ranks. Where scores will not be computed
// again, its dot products become powers. It begins at row `first_row` of the group and key `first_key` of the chunk.
template <class T, class Math, class Sum = typename Math::Sum>
__device__ void measure_rows(const Arguments<T, Math>& a, const Tile<Sum>& tile, int64_t entry, int64_t first_row,
                             int64_t first_key) {
  // Two threads a row, each every other key.
  const int in_tile = static_cast<int>(threadIdx.x) / 2, odd = static_cast<int>(threadIdx.x) % 2;
  const int64_t row = first_row + in_tile, begin = a.first_key + first_key;
  const bool exists = row < a.rows;
  const uint32_t left_out = exists ? find_left_out(a, entry, row, begin, odd) : ~uint32_t{0};
  if (a.symmetric)  // No column has a row that is absent.
    tile.left_out(in_tile, odd) = exists && a.is_present(a.index(entry, row)) ? left_out : ~uint32_t{0};
  const Sum scale = a.scale(),
            threshold = exists && a.losses != nullptr
                            ? a.threshold(a.index(entry, row), PositivesOfRow<T, Math>(a, entry, row))
                            : Sum(0);
  Sum largest = -kInfinity<Sum>;
  int count = 0;
  for (int key = odd; key < kTile; key += 2) {
    if ((left_out >> (key / 2) & 1) != 0) continue;
    const Sum score = a.score(scale, tile(in_tile, key), entry, begin + key);
    largest = score > largest ? score : largest;
    if (!(score < threshold)) ++count;  // What is no number counts.
  }
  const Sum other = __shfl_xor_sync(0xffffffffu, largest, 1);
  Rivals<Sum> rivals;
  rivals.largest = a.bounded(other > largest ? other : largest);
  for (int key = odd; key < kTile; key += 2) {
    Sum& v = tile(in_tile, key);
    Sum power = 0;
    if ((left_out >> (key / 2) & 1) == 0) power = a.add(rivals, a.score(scale, v, entry, begin + key), v);
    if (a.keeps_powers()) v = power;
  }
  rivals.sum += __shfl_xor_sync(0xffffffffu, rivals.sum, 1);
  rivals.moment += __shfl_xor_sync(0xffffffffu, rivals.moment, 1);
  count += __shfl_xor_sync(0xffffffffu, count, 1);
  if (odd != 0 || !exists) return;
  const int64_t at = a.stat(entry, begin / kTile, row);
  a.tiles.set(at, rivals);
  if (a.losses != nullptr) a.counts[at] = static_cast<uint8_t>(count);
}

// What half the rows of a tile are to its keys, in a symmetric contrast: a thread a key and half.
template <class T, class Math, class Sum = typename Math::Sum>
__device__ void measure_columns(const Arguments<T, Math>& a, const Tile<Sum>& tile, int64_t entry, int64_t first_row,
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

// A tile's dot products become the gradients' weights.
template <class T, class Math, class Sum = typename Math::Sum>
__device__ void weigh(const Arguments<T, Math>& a, const Tile<Sum>& tile, int64_t entry, int64_t first_row,
                      int64_t first_key) {
  const int in_tile = static_cast<int>(threadIdx.x) / 2, odd = static_cast<int>(threadIdx.x) % 2;
  const int64_t row = first_row + in_tile, begin = a.first_key + first_key;
  if (row >= a.rows) return;  // Nobody reads them.
  const int64_t kept = a.kept(entry, row);
  const bool counts = a.has_gradients(entry, row);
  const uint32_t left_out = counts ? find_left_out(a, entry, row, begin, odd) : ~uint32_t{0};
  const Sum scale = a.scale(), top = a.tops[kept], factor = a.rival_factors[kept];
  // Powers may be anything where their factor is 0.
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

// Sums half the rows of a tile of weights for each of its keys: as precise as they are before they are rounded.
template <class T, class Math, class Sum = typename Math::Sum>
__device__ void sum_weights(const Arguments<T, Math>& a, const Tile<Sum>& tile, int64_t entry, int64_t first_row,
                            int64_t first_key) {
  const int column = static_cast<int>(threadIdx.x) % kTile, half = static_cast<int>(threadIdx.x) / kTile;
  Sum sum = 0;
  for (int row = half * kColumnRows; row < (half + 1) * kColumnRows; ++row)
    if (first_row + row < a.rows) sum += tile(row, column);
  a.bias_parts[a.column_part(entry, first_row / kColumnRows + half, first_key + column)] = sum;
}

// Copies a tile of powers to memory.
template <class T, class Math, class Sum = typename Math::Sum>
__device__ void store_powers(const Arguments<T, Math>& a, const Tile<Sum>& tile, int64_t entry, int64_t first_row,
                             int64_t first_key) {
  using Value = typename Math::Value;
  constexpr int kChunksAcross = kTile / kChunk<Value>;
  for (int chunk = static_cast<int>(threadIdx.x); chunk < kTile * kChunksAcross; chunk += kThreads) {
    const int row = chunk / kChunksAcross, key = chunk % kChunksAcross * kChunk<Value>;
    if (first_row + row >= a.rows) continue;
    Chunk<Value> powers;
#pragma unroll
    for (int i = 0; i < kChunk<Value>; ++i) powers.v[i] = Narrow<Value>::from(tile(row, key + i));
    pack_at<kChunk<Value>>(a.powers + (entry * a.pitch_rows + first_row + row) * a.pitch_keys + first_key + key) =
        powers;
  }
}

// What to do with a tile of scores.
enum class Stage : uint8_t { measure, weigh };

template <class T, class Math>
__global__ void __launch_bounds__(kThreads, kScoreBlocks<Math>)
    score(const __grid_constant__ Arguments<T, Math> a, Stage stage) {
  using Sum = typename Math::Sum;
  constexpr Tile<Sum> tile{};
  const int64_t row_tiles = divide_up(a.rows, kTile), key_tiles = divide_up(a.key_count, kTile);
  for (int64_t block = blockIdx.x; block < a.entries * row_tiles * key_tiles; block += gridDim.x) {
    const int64_t entry = block / (row_tiles * key_tiles), first_row = block / key_tiles % row_tiles * kTile,
                  first_key = block % key_tiles * kTile;
    Sums<Math> sums = {};
    multiply_tile<T, Math>(a, sums, entry, first_row, [&](int column) {
      return first_key + column < a.key_count ? a.first_key + first_key + column : -1;
    });
    each_sum<Math>(sums, [&](int row, int key, Sum v) { tile(row, key) = v; });
    __syncthreads();  // A row's dot products are there, whoever multiplied them.
    if (stage == Stage::weigh)
      weigh(a, tile, entry, first_row, first_key);
    else
      measure_rows(a, tile, entry, first_row, first_key);
    __syncthreads();
    if (a.symmetric && stage == Stage::measure) measure_columns(a, tile, entry, first_row, first_key);
    if (a.grad_bias != nullptr && stage == Stage::weigh) sum_weights(a, tile, entry, first_row, first_key);
    if (stage == Stage::weigh || a.keeps_powers()) store_powers(a, tile, entry, first_row, first_key);
    __syncthreads();  // The next tile overwrites shared memory.
  }
}

// Rows that a block finishes, and threads among whom it shares out the tiles of each. Neighbours have neighbouring rows, so
// that they read whole sectors together.
constexpr int kFinishedRows = 8, kSharers = 32, kFinishThreads = kFinishedRows * kSharers;

template <class Sum>
struct SharesOfRows {
  Sum largest[kSharers][kFinishedRows], sum[kSharers][kFinishedRows], moment[kSharers][kFinishedRows];
  int rank[kSharers][kFinishedRows];
};

// The rivals of a row and how many of them count in the rank, from those of its tiles. Threads of the first share get all of
// it, the others the largest score only. Sums are in an order that the number of tiles decides.
template <class T, class Math, class Sum = typename Math::Sum>
__device__ Rivals<Sum> merge_tiles(const Arguments<T, Math>& a, bool exists, int64_t entry, int64_t row, int& rank) {
  auto& shared = static_shared<SharesOfRows<Sum>, struct OfFinishedRows>();
  const int at = threadIdx.x % kFinishedRows, share = threadIdx.x / kFinishedRows;
  const int64_t tiles = exists ? a.key_tiles : 0;
  Rivals<Sum> rivals;
  for (int64_t t = share; t < tiles; t += kSharers) {
    const Sum largest = a.tiles.largest[a.stat(entry, t, row)];
    rivals.largest = largest > rivals.largest ? largest : rivals.largest;
  }
  shared.largest[share][at] = rivals.largest;
  __syncthreads();  // The largest of each share are there.
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
  __syncthreads();  // The sums of each share are there.
  for (int i = 1; share == 0 && i < kSharers; ++i) {
    rivals.sum += shared.sum[i][at];
    rivals.moment += shared.moment[i][at];
    rank += shared.rank[i][at];
  }
  return rivals;
}

// A row's results, and what the gradients' weights are made of, from its rivals. In a symmetric contrast these are of the
// one direction only, with half the weight. Gives what makes powers relative to the largest score weights.
template <class T, class Math, class Sum = typename Math::Sum>
__device__ Sum finish_row(const Arguments<T, Math>& a, int64_t entry, int64_t row, const Rivals<Sum>& rivals,
                          int64_t rank) {
  const int64_t index = a.index(entry, row), kept = a.kept(entry, row);
  const PositivesOfRow<T, Math> positives(a, entry, row);
  const Outcome<Sum, PositivesOfRow<T, Math>> outcome(a.measure, rivals, positives);
  const bool valid = a.valid(index, a.in_entry(row));
  a.store_results(index, valid, rank, outcome);
  if (!a.gradients) return 0;
  const Sum given = a.weight(index) * (a.symmetric ? Sum(0.5) : Sum(1));
  const Sum weight = valid && !outcome.lacks_positives() ? given : Sum(0), factor = outcome.factor_of_rivals(weight);
  a.weights[kept] = weight;
  const bool present = a.is_present(index), counts = valid && present && !outcome.lacks_positives();
  a.row_factors[kept] = counts ? a.scale() : present && !valid ? kNan<Sum> : Sum(0);
  each_of(a.places, [&](int64_t j) {
    a.target_weights[a.kept(entry, row, j)] = positives.present(j) ? outcome.weight_of_positive(j, weight) : Sum(0);
  });
  if (a.weighs) {
    a.tops[kept] = rivals.largest;
    a.rival_factors[kept] = factor;
  }
  return factor;
}

template <class T, class Math>
__global__ void __launch_bounds__(kFinishThreads, 2) finish_rows(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  auto& factors = static_shared<Sum[kFinishedRows], struct FactorsOfFinishedRows>();
  const int at = threadIdx.x % kFinishedRows, share = threadIdx.x / kFinishedRows;
  const auto blocks = static_cast<uint32_t>(divide_up(a.rows, kFinishedRows));  // Of an entry.
  for (uint32_t block = blockIdx.x; block < a.entries * blocks; block += gridDim.x) {
    const int64_t entry = block / blocks, row = int64_t{block % blocks} * kFinishedRows + at;
    const bool exists = row < a.rows;
    int rank = 0;
    const Rivals<Sum> rivals = merge_tiles(a, exists, entry, row, rank);
    if (exists && share == 0) factors[at] = finish_row(a, entry, row, rivals, rank);
    __syncthreads();  // The rows' factors are there, and what was shared before is free again.
    if (!exists || !a.keeps_powers()) continue;
    for (int64_t t = share; t < a.key_tiles; t += kSharers) {
      const int64_t stat = a.stat(entry, t, row);
      a.factors[stat] = exp(a.tiles.largest[stat] - rivals.largest) * factors[at];
    }
  }
}

// --- The other direction of a symmetric contrast ---

// Adds a group's rows to what is known of the columns of a chunk.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads) merge_columns(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.entries * a.key_count;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t entry = i / a.key_count, key = i % a.key_count, column = entry * a.n + a.first_key + key;
    const Rivals<Sum> before = a.first_row > 0 ? a.columns[column] : Rivals<Sum>();
    a.columns.set(column, merged(before, a.column_parts_of_group(),
                                 [&](int64_t part) { return a.column_parts[a.column_part(entry, part, key)]; }));
  }
}

// Adds the columns to their rows' results.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads) finish_columns(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.entries * a.rows;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t entry = i / a.rows, row = i % a.rows, index = a.index(entry, row), kept = a.kept(entry, row);
    const PositivesOfRow<T, Math> positives(a, entry, row);
    const Outcome<Sum, PositivesOfRow<T, Math>> outcome(a.measure, a.columns[kept], positives);
    if (a.losses != nullptr) a.losses[index] = (a.losses[index] + outcome.loss()) / 2;
    if (a.slopes != nullptr) a.slopes[index] = (a.slopes[index] + outcome.slope()) / 2;
    if (!a.gradients) continue;
    const Sum weight = a.weights[kept];
    a.column_factors[kept] = outcome.factor_of_rivals(weight);
    a.target_weights[a.kept(entry, row, 0)] += outcome.weight_of_positive(0, weight);
  }
}

// --- Gradients of all keys ---

// The gradients' weights of a row for the keys from `key` of the chunk on.
template <class T, class Math>
__device__ Chunk<typename Math::Value> load_weights(const Arguments<T, Math>& a, int64_t entry, int64_t row,
                                                    int64_t key) {
  using Value = typename Math::Value;
  using Sum = typename Math::Sum;
  Chunk<Value> chunk = {};
  if (row >= a.rows || key >= a.pitch_keys) return chunk;
  const Value* const from = a.powers + (entry * a.pitch_rows + row) * a.pitch_keys + key;
  if (a.weighs) return pack_at<kChunk<Value>>(from);
  const Sum factor = a.factors[a.stat(entry, (a.first_key + key) / kTile, row)];
  if (factor != 0) {  // Else the powers may be anything.
    const auto powers = pack_at<kChunk<Value>>(from);
#pragma unroll
    for (int i = 0; i < kChunk<Value>; ++i) chunk.v[i] = Narrow<Value>::from(factor * widen<Sum>(powers.v[i]));
  }
  if (a.places == 0) return chunk;
  const int64_t target = a.target(entry, row, 0) - (a.first_key + key);
#pragma unroll
  for (int i = 0; i < kChunk<Value>; ++i)
    if (target == i) chunk.v[i] = Narrow<Value>::from(a.target_weights[a.kept(entry, row)]);
  return chunk;
}

// A tile of [rows, D] of a part of the queries' gradient: weights times keys.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads, kGradBlocks<Math>)
    add_to_queries(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  using Value = typename Math::Value;
  const int64_t row_tiles = divide_up(a.rows, kTile), columns = divide_up(a.d, kTile);
  const int64_t tiles = row_tiles * columns, blocks = a.entries * a.query_parts * tiles;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t entry = block / (a.query_parts * tiles), part = block / tiles % a.query_parts;
    const int64_t first_row = block / columns % row_tiles * kTile, first = block % columns * kTile;
    const int64_t first_key = part * a.part_keys, left = a.key_count - first_key;
    const T* const keys = a.key_rows(entry) + a.first_key * a.d;
    Sums<Math> sums = {};
    multiply<Math, DepthInnermost<Value>, DepthOutermost<Value, kTile>>(
        sums, left < a.part_keys ? left : a.part_keys,
        [&](int64_t row, int64_t key) { return load_weights(a, entry, first_row + row, first_key + key); },
        [&](int64_t k, int64_t key) { return load_chunk<Value>(keys, first_key + key, a.key_count, first + k, a.d); });
    each_sum<Math>(sums, [&](int row, int k, Sum v) {
      const int64_t in_rows = first_row + row, column = first + k;
      if (in_rows >= a.rows || column >= a.d) return;
      Sum* const sum = a.query_sums + ((entry * a.query_parts + part) * a.pitch_rows + in_rows) * a.d + column;
      *sum = a.adds_queries ? *sum + v : v;
    });
  }
}

// The queries' gradient of its parts.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads) finish_queries(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.entries * a.rows * a.d;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t entry = i / (a.rows * a.d), row = i / a.d % a.rows, column = i % a.d;
    Sum total = 0;
    for (int64_t part = 0; part < a.query_parts; ++part)
      total += a.query_sums[((entry * a.query_parts + part) * a.pitch_rows + row) * a.d + column];
    const Sum factor = a.row_factors[a.kept(entry, row)];
    a.grad_queries[a.index(entry, row) * a.d + column] = Narrow<T>::from(factor != 0 ? total * factor : Sum(0));
  }
}

// A tile of [keys, D] of the keys' gradient: transposed weights times queries.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads, kGradBlocks<Math>)
    add_to_keys(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  using Value = typename Math::Value;
  const int64_t key_tiles = divide_up(a.key_count, kTile), columns = divide_up(a.d, kTile);
  for (int64_t block = blockIdx.x; block < a.entries * key_tiles * columns; block += gridDim.x) {
    const int64_t entry = block / (key_tiles * columns), first_key = block / columns % key_tiles * kTile,
                  first = block % columns * kTile;
    const T* const queries = a.query_rows(entry);
    Sums<Math> sums = {};
    multiply<Math, DepthOutermost<Value, kTile>, DepthOutermost<Value, kTile>>(
        sums, a.rows, [&](int64_t key, int64_t row) { return load_weights(a, entry, row, first_key + key); },
        [&](int64_t k, int64_t row) {
          const bool counts = row < a.rows && a.has_gradients(entry, row);
          return load_chunk<Value>(queries, row, counts ? a.rows : 0, first + k, a.d);
        });
    const Sum scale = a.scale();
    each_sum<Math>(sums, [&](int key, int k, Sum v) {
      const int64_t in_chunk = first_key + key, column = first + k;
      if (in_chunk >= a.key_count || column >= a.d) return;
      const int64_t in_entry = a.first_key + in_chunk;
      Sum* const sum = a.key_sums + (entry * a.n + in_entry) * a.d + column;
      if (a.adds_keys) v += *sum;
      if (a.ends_keys)
        a.grad_keys[((a.first_entry + entry) * a.n + in_entry) * a.d + column] = Narrow<T>::from(v * scale);
      else
        *sum = v;
    });
  }
}

// Adds a group's rows to the biases' gradient of a chunk.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads) add_to_bias(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.entries * a.key_count;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t entry = i / a.key_count, key = i % a.key_count;
    Sum& gradient = a.grad_bias[(a.first_entry + entry) * a.n + a.first_key + key];
    Sum sum = a.adds_keys ? gradient : Sum(0);
    for (int64_t part = 0; part < a.column_parts_of_group(); ++part)
      sum += a.bias_parts[a.column_part(entry, part, key)];
    gradient = sum;
  }
}

template <class T, class Math>
class AllKeys {
  using Value = typename Math::Value;
  using Sum = typename Math::Sum;

 public:
  explicit AllKeys(const Problem& problem) : problem_(problem), cuts_(problem, sizeof(Value)) {}

  int64_t workspace() const {
    Parts parts(nullptr);
    Arguments<T, Math>(problem_, cuts_, parts);
    return parts.used();
  }

  void run(void* stream) const {
    const Problem& p = problem_;
    if (p.rows() == 0) {  // No block reaches them.
      for (const TensorView* of_keys : {&p.grad_keys, &p.grad_bias})
        fill_with_zeros(of_keys->data, of_keys->ndim == 0 ? 0 : of_keys->numel() * size_of(of_keys->dtype), stream);
      return;
    }
    Parts parts(p.workspace.as<char>());
    Arguments<T, Math> a(p, cuts_, parts);
    for (a.first_entry = 0; a.first_entry < p.batch(); a.first_entry += cuts_.entries) {
      a.entries = std::min(cuts_.entries, p.batch() - a.first_entry);
      if (a.symmetric) {  // Columns are known when all rows are.
        each_group(a, [&] { measure(a, stream); });
        finish(a, stream);
        each_group(a, [&] { form_gradients(a, stream); });
      } else {
        each_group(a, [&] {
          measure(a, stream);
          form_gradients(a, stream);
        });
      }
    }
  }

 private:
  // Calls work for one group of queries after another.
  template <class Work>
  void each_group(Arguments<T, Math>& a, const Work& work) const {
    for (a.first_row = 0; a.first_row < a.m; a.first_row += cuts_.rows) {
      a.rows = std::min(cuts_.rows, a.m - a.first_row);
      work();
    }
  }
  // Calls work for one chunk of keys after another, with the number of its tiles.
  template <class Work>
  void each_chunk(Arguments<T, Math>& a, const Work& work) const {
    for (a.first_key = 0; a.first_key < a.n; a.first_key += cuts_.keys) {
      a.key_count = std::min(cuts_.keys, a.n - a.first_key);
      work(divide_up(a.key_count, kTile));
    }
  }

  void score_chunk(const Arguments<T, Math>& a, int64_t key_tiles, Stage stage, void* stream) const {
    constexpr int64_t kBytes = std::max(kSlices, Tile<Sum>::kBytes);
    launch("score", &score<T, Math>, {a.entries * divide_up(a.rows, kTile) * key_tiles, dim3(kThreads), kBytes}, stream,
           a, stage);
  }

  // Forms a group's results, and what the gradients' weights are made of.
  void measure(Arguments<T, Math>& a, void* stream) const {
    launch("score_positives", &score_positives<T, Math>,
           {a.entries * divide_up(a.rows, kTile) * a.places, dim3(kThreads), kSlices}, stream, a);
    each_chunk(a, [&](int64_t key_tiles) {
      score_chunk(a, key_tiles, Stage::measure, stream);
      if (a.symmetric) launch_each("merge_columns", &merge_columns<T, Math>, a.entries * a.key_count, a, stream);
    });
    launch("finish_rows", &finish_rows<T, Math>, {a.entries * divide_up(a.rows, kFinishedRows), dim3(kFinishThreads)},
           stream, a);
  }

  // Adds the other direction, once all groups are measured.
  void finish(Arguments<T, Math>& a, void* stream) const {
    a.first_row = 0;
    a.rows = a.m;
    launch_each("finish_columns", &finish_columns<T, Math>, a.entries * a.rows, a, stream);
  }

  void form_gradients(Arguments<T, Math>& a, void* stream) const {
    if (!a.gradients) return;
    const int64_t row_tiles = divide_up(a.rows, kTile), columns = divide_up(a.d, kTile);
    each_chunk(a, [&](int64_t key_tiles) {
      if (a.weighs) score_chunk(a, key_tiles, Stage::weigh, stream);
      a.adds_queries = a.first_key > 0;
      a.adds_keys = a.first_row > 0;
      a.ends_keys = a.first_row + a.rows == a.m;
      if (a.grad_queries != nullptr)
        launch("add_to_queries", &add_to_queries<T, Math>,
               {a.entries * a.query_parts * row_tiles * columns, dim3(kThreads), kSlices}, stream, a);
      if (a.grad_keys != nullptr)
        launch("add_to_keys", &add_to_keys<T, Math>, {a.entries * key_tiles * columns, dim3(kThreads), kSlices}, stream,
               a);
      if (a.grad_bias != nullptr) launch_each("add_to_bias", &add_to_bias<T, Math>, a.entries * a.key_count, a, stream);
    });
    if (a.grad_queries != nullptr)
      launch_each("finish_queries", &finish_queries<T, Math>, a.entries * a.rows * a.d, a, stream);
  }

  // A kernel with a thread for each of `count`.
  static void launch_each(const char* name, void (*kernel)(Arguments<T, Math>), int64_t count,
                          const Arguments<T, Math>& a, void* stream) {
    launch(name, kernel, {divide_up(count, kThreads), dim3(kThreads)}, stream, a);
  }

  static constexpr int64_t kSlices = kStages * kStageBytes;
  const Problem& problem_;
  Cuts cuts_;
};

}  // namespace cpc::info_nce::cuda
