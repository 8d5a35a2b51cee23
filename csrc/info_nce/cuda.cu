// InfoNCE and its kin on the GPU: from queries and keys to losses and, formed at once, all gradients.
// All keys: what a group of queries scores against all keys stays in the L2 cache, as powers relative to the largest
// score of each tile. So scores are multiplied once, a tile needs nothing of the others, and once the tiles' maxima and
// sums are combined, two further products turn powers into gradients, each power scaled on its way to shared memory.
// Where there are too many keys for that, or a power alone does not tell its weight (several positives, a symmetric
// contrast), scores are computed again and become the gradients' weights, chunk by chunk. Sampled: a warp a query
// gathers rows; for the keys' gradient a warp a key sums over the queries that name it.
// Positives are multiplied first, by the very same product, so that ranks can be counted while a tile is at hand and
// equal keys have equal scores. No sum depends on the order in which blocks run.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "core/cuda/device.h"
#include "core/cuda/kernel.cuh"
#include "core/cuda/warp_product.cuh"
#include "core/workspace.h"
#include "info_nce/info_nce.h"
#include "info_nce/outcome.h"

namespace cpc::info_nce::cuda {
namespace {

using namespace cpc::cuda;

// --- What rows ask for, whether of all keys or of sampled ones ---

// Calls use(i) for each of a row's positives or exclusions, in a loop that is not unrolled: most often there is one.
template <class Use>
__device__ void each_of(int64_t count, const Use& use) {
#pragma unroll 1
  for (int64_t i = 0; i < count; ++i) use(i);
}

// A row is named by its index in [B, M], and where its place in its entry matters, by that too.
template <class Sum>
struct Rows {
  const int64_t *targets, *exclude, *key_range, *query_groups, *key_groups;
  const Sum *key_bias, *scales, *row_weights, *thresholds, *present;
  Sum *losses, *slopes, *bests, *grad_bias;
  int64_t* ranks;
  int64_t m, n, d, places, excluded;  // Sizes of an entry, and how many positives and exclusions a row may have.
  Sum given_scale, factor;
  Measure measure;
  bool same_groups, gradients;

  explicit Rows(const Problem& p)
      : targets(p.targets.as<const int64_t>()),
        exclude(p.exclude.as<const int64_t>()),
        key_range(p.key_range.as<const int64_t>()),
        query_groups(p.query_groups.as<const int64_t>()),
        key_groups(p.key_groups.as<const int64_t>()),
        key_bias(p.key_bias.as<const Sum>()),
        scales(p.scales.as<const Sum>()),
        row_weights(p.row_weights.as<const Sum>()),
        thresholds(p.thresholds.as<const Sum>()),
        present(p.present.as<const Sum>()),
        losses(p.losses.as<Sum>()),
        slopes(p.slopes.as<Sum>()),
        bests(p.bests.as<Sum>()),
        grad_bias(p.grad_bias.as<Sum>()),
        ranks(p.ranks.as<int64_t>()),
        m(p.rows()),
        n(p.keys_count()),
        d(p.dim()),
        places(p.positives()),
        excluded(p.excluded()),
        given_scale(static_cast<Sum>(p.scale)),
        factor(static_cast<Sum>(p.factor)),
        measure(p.measure),
        same_groups(p.contrast == Groups::same),
        gradients(p.wants_gradients()) {}

  __device__ Sum scale() const { return given_scale * (scales != nullptr ? *scales : Sum(1)); }
  __device__ Sum weight(int64_t index) const { return weight_of(index, factor, row_weights); }
  // Whether a row has gradients, and a place in the columns of a symmetric contrast.
  __device__ bool is_present(int64_t index) const {
    return present != nullptr ? present[index] != 0 : weight(index) != 0;
  }
  // An index, or -1 for one that names no key.
  __device__ int64_t key(int64_t named) const { return named >= 0 && named < n ? named : -1; }
  __device__ int64_t target(int64_t index, int64_t in_entry, int64_t j) const {
    return key(targets != nullptr ? targets[index * places + j] : in_entry);
  }
  __device__ int64_t left_out(int64_t index, int64_t e) const { return key(exclude[index * excluded + e]); }

  // Whether everything that a row is told is as the contract wants it.
  __device__ bool valid(int64_t index, int64_t in_entry) const {
    bool valid = finite<Sum>(scale()) == scale();
    each_of(targets != nullptr ? places : 0,
            [&](int64_t j) { valid = valid && names_key_or_none(targets[index * places + j]); });
    each_of(excluded, [&](int64_t e) {
      valid = valid && names_key_or_none(exclude[index * excluded + e]);
      const int64_t key = left_out(index, e);
      each_of(key >= 0 ? places : 0, [&](int64_t j) { valid = valid && target(index, in_entry, j) != key; });
    });
    if (key_range != nullptr) {
      const int64_t begin = key_range[2 * index], end = key_range[2 * index + 1];
      valid = valid && begin >= 0 && begin <= end && end <= n;
    }
    return valid;
  }

  // A score of a dot product, everywhere by the same arithmetic: a rank compares those of different kernels.
  __device__ Sum score(Sum scale, Sum dot, int64_t entry, int64_t key) const {
    return fma(scale, dot, key_bias != nullptr ? key_bias[entry * n + key] : Sum(0));
  }
  // What a score becomes, relative to the largest of its rivals'.
  __device__ Sum power(Sum score, Sum largest) const {
    return measure == Measure::sigmoid ? logistic(score) : exp(score - largest);
  }
  // Adds a score to rivals whose largest is known.
  __device__ Sum add(Rivals<Sum>& rivals, Sum score, Sum dot) const {
    const Sum power = this->power(score, rivals.largest);
    rivals.sum += measure == Measure::sigmoid ? softplus(score) : power;
    if (slopes != nullptr && power != 0) rivals.moment += power * dot;
    return power;
  }
  // What powers are relative to, of rivals with this largest score.
  __device__ Sum bounded(Sum largest) const { return measure == Measure::sigmoid ? Sum(0) : finite<Sum>(largest); }

  // Rivals count in the rank that do not score below this.
  template <class Positives>
  __device__ Sum threshold(int64_t index, const Positives& positives) const {
    bool any = false;
    each_of(places, [&](int64_t j) { any = any || positives.present(j); });
    if (!any) return thresholds != nullptr ? thresholds[index] : -kInfinity<Sum>;
    return Outcome<Sum, Positives>(measure, {}, positives).best();
  }

  template <class Positives>
  __device__ void store_results(int64_t index, bool valid, int64_t rank, const Outcome<Sum, Positives>& outcome) const {
    if (losses == nullptr) return;
    losses[index] = valid ? outcome.loss() : kNan<Sum>;
    ranks[index] = valid ? rank : -1;
    if (slopes != nullptr) slopes[index] = valid ? outcome.slope() : kNan<Sum>;
    if (bests != nullptr) bests[index] = valid ? outcome.best() : kNan<Sum>;
  }

 private:
  __device__ bool names_key_or_none(int64_t named) const { return named >= -1 && named < n; }
};

// --- A block's product: a tile of 64 x 64, by warps of 32 x 32 ---

constexpr int kTile = 64, kThreads = 128, kRowTiles = 2, kWarpsAcross = kTile / kWarpColumns;
// While one slice is multiplied, the next is in shared memory and the one after that on its way to registers.
constexpr int kStages = 2, kTileBytes = kTile * kSliceBytes, kStageBytes = 2 * kTileBytes;

template <class Value>
using Chunk = Pack<Value, kChunk<Value>>;
template <class Math>
using Sums = WarpSums<Math, kRowTiles>;
// Blocks of a multiprocessor, at least, of scores and of gradients: bounds the registers.
template <class Math>
constexpr int kScoreBlocks = !Math::kTensorCores                 ? 2
                             : sizeof(typename Math::Value) == 2 ? 4
                                                                 : 5;
template <class Math>
constexpr int kGradBlocks = Math::kTensorCores ? 4 : 2;
__device__ inline int warp_row() { return threadIdx.x / kWarp / kWarpsAcross * (16 * kRowTiles); }
__device__ inline int warp_column() { return threadIdx.x / kWarp % kWarpsAcross * kWarpColumns; }

// sums += A B over `depth`. load_a(i, k) and load_b give the chunk of the operand's layout that begins at element i of
// the tile's side and depth k.
template <class Math, class A, class B, class LoadA, class LoadB>
__device__ void multiply(Sums<Math>& sums, int64_t depth, const LoadA& load_a, const LoadB& load_b) {
  using Value = typename Math::Value;
  constexpr int kChunks = kTileBytes / kChunkBytes / kThreads;
  Chunk<Value> of_a[kChunks], of_b[kChunks];  // A thread's.
  const auto each_chunk = [&](const auto& work) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = static_cast<int>(threadIdx.x) + c * kThreads;
      work(of_a[c], A::chunk(chunk), of_b[c], B::chunk(chunk));
    }
  };
  const auto fetch = [&](int64_t begin) {
    if (begin >= depth) return;
    each_chunk([&](Chunk<Value>& a, const ChunkPlace& in_a, Chunk<Value>& b, const ChunkPlace& in_b) {
      a = load_a(in_a.side, begin + in_a.depth);
      b = load_b(in_b.side, begin + in_b.depth);
    });
  };
  fetch(0);
  unsigned char* tiles = dynamic_shared();
  for (int64_t begin = 0; begin < depth; begin += kDepth<Value>) {
    each_chunk([&](const Chunk<Value>& a, const ChunkPlace& in_a, const Chunk<Value>& b, const ChunkPlace& in_b) {
      *reinterpret_cast<Chunk<Value>*>(tiles + in_a.at) = a;
      *reinterpret_cast<Chunk<Value>*>(tiles + kTileBytes + in_b.at) = b;
    });
    fetch(begin + kDepth<Value>);
    __syncthreads();  // This stage is there for all, and the other, which is stored to next, is free.
    add_product<Math, kRowTiles>(sums, A(tiles, warp_row()), B(tiles + kTileBytes, warp_column()));
    tiles = dynamic_shared() + (tiles == dynamic_shared() ? kStageBytes : 0);
  }
  __syncthreads();  // Shared memory is free again.
}

// Calls use(row, column, value) for each sum of the lane.
template <class Math, class Use>
__device__ void each_sum(const Sums<Math>& sums, const Use& use) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        use(warp_row() + 16 * i + 8 * (r / 2) + g, warp_column() + 8 * j + 2 * t + r % 2, sums[i][j][r]);
}

// Columns from `column` on of a row of [rows, d], zeros outside.
template <class Value, class T>
__device__ Chunk<Value> load_chunk(const T* matrix, int64_t row, int64_t rows, int64_t column, int64_t d) {
  constexpr int kCount = kChunk<Value>;
  Chunk<Value> chunk = {};
  const int64_t left = d - column;
  if (row < rows) load_run(chunk.v, matrix + row * d + column, 1, static_cast<int>(left < kCount ? left : kCount));
  return chunk;
}

// --- All keys ---

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

// From the tiles' rivals to a row's results, and to what the gradients' weights are made of. In a symmetric contrast
// these are of the one direction only, with half the weight.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads) finish_rows(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.entries * a.rows;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t entry = i / a.rows, row = i % a.rows, index = a.index(entry, row), kept = a.kept(entry, row);
    const auto tile = [&](int64_t tile) { return a.stat(entry, tile, row); };
    const Rivals<Sum> rivals = merged(Rivals<Sum>(), a.key_tiles, [&](int64_t t) { return a.tiles[tile(t)]; });
    const PositivesOfRow<T, Math> positives(a, entry, row);
    const Outcome<Sum, PositivesOfRow<T, Math>> outcome(a.measure, rivals, positives);
    const bool valid = a.valid(index, a.in_entry(row));
    int64_t rank = 0;
    for (int64_t t = 0; a.losses != nullptr && t < a.key_tiles; ++t) rank += a.counts[tile(t)];
    a.store_results(index, valid, rank, outcome);
    const Sum given = a.weight(index) * (a.symmetric ? Sum(0.5) : Sum(1));
    const Sum weight = valid && !outcome.lacks_positives() ? given : Sum(0), factor = outcome.factor_of_rivals(weight);
    if (!a.gradients) continue;
    a.weights[kept] = weight;
    const bool present = a.is_present(index), counts = valid && present && !outcome.lacks_positives();
    a.row_factors[kept] = counts ? a.scale() : present && !valid ? kNan<Sum> : Sum(0);
    each_of(a.places, [&](int64_t j) {
      a.target_weights[a.kept(entry, row, j)] = positives.present(j) ? outcome.weight_of_positive(j, weight) : Sum(0);
    });
    if (a.weighs) {
      a.tops[kept] = rivals.largest;
      a.rival_factors[kept] = factor;
    } else {
      for (int64_t t = 0; t < a.key_tiles; ++t)
        a.factors[tile(t)] = exp(a.tiles.largest[tile(t)] - rivals.largest) * factor;
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
    launch_each("finish_rows", &finish_rows<T, Math>, a.entries * a.rows, a, stream);
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

// --- Sampled negatives ---

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

// Calls work with the class that contrasts all keys.
template <class Work>
void with_all_keys(const Problem& problem, const Work& work) {
  switch (problem.queries.dtype) {
    case DType::bf16: return work(AllKeys<BFloat16, TensorCores<BFloat16>>(problem));
    case DType::f16: return work(AllKeys<Half, TensorCores<float>>(problem));  // TF32 keeps small weights.
    case DType::f32:
      if (problem.tf32) return work(AllKeys<float, TensorCores<float>>(problem));
      return work(AllKeys<float, MultiplyAdds<float>>(problem));
    default: return work(AllKeys<double, MultiplyAdds<double>>(problem));
  }
}

}  // namespace

int64_t workspace_bytes(const Problem& problem) {
  if (problem.sampled()) {
    const int64_t size = problem.queries.dtype == DType::f64 ? sizeof(double) : sizeof(float);
    return problem.batch() * problem.rows() * (problem.positives() + problem.samples()) * size;
  }
  int64_t bytes = 0;
  with_all_keys(problem, [&](const auto& all) { bytes = all.workspace(); });
  return bytes;
}

void contrast(const Problem& problem, void* stream) {
  if (!problem.sampled()) return with_all_keys(problem, [&](const auto& all) { all.run(stream); });
  with_floating(problem.queries.dtype, [&](auto storage) {
    using T = decltype(storage);
    launch_sampled<T, std::conditional_t<std::is_same_v<T, double>, double, float>>(problem, stream);
  });
}

}  // namespace cpc::info_nce::cuda
