// What the kernels that contrast all keys know: how a problem is cut into groups of queries, chunks of keys and parts of
// sums, and where in the workspace what is known of them lies.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <type_traits>

#include "core/cuda/device.h"
#include "core/cuda/product.cuh"
#include "core/workspace.h"
#include "info_nce/rows.cuh"

namespace cpc::info_nce::cuda {

template <class T>
constexpr bool kOnTensorCores = !std::is_same_v<T, double>;

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
// Keys whose scores have statistics of their own, for each query: those of a warp.
constexpr int kTile = 64;
// Queries that a thread measures for a key.
constexpr int kColumnRows = kTile * kTile / kThreads;
// Pitches of what products read and write are whole tiles of theirs.
constexpr int64_t kSide = SquareTile::kRows;
static_assert(SquareTile::kColumns == kSide);

// Bytes of a group's powers, or dot products: where the second-level cache does not hold them, the products that read and
// write them take no longer, while smaller groups take more launches, and have less to fill a GPU with. The emulation's
// are as many KiB as CPC_EMULATION_POWERS_KIB says: so small problems have several groups and chunks.
inline int64_t powers_bytes() {
#if defined(CPC_CUDA_EMULATION)
  if (const char* const text = std::getenv("CPC_EMULATION_POWERS_KIB")) return std::strtoll(text, nullptr, 10) << 10;
#endif
  return int64_t{128} << 20;
}
// Queries of a group, at least, unless there are fewer. Where they have powers of more than twice as many bytes, their keys
// come chunk by chunk.
constexpr int64_t kGroupRows = 1024;
// Square tiles that fill a GPU, and the depth that a part of a sum has at least.
constexpr int64_t kFullGrid = 256, kMinPart = 512;

// A group of queries, a chunk of its keys, and what is taken of the batch at a time. It depends on sizes only, and so do
// the sums.
struct Cuts {
  int64_t rows, keys, entries;
  // Gradients of queries are sums over keys, and those of keys over queries, in parts where there are too few tiles.
  int64_t query_parts, part_keys, key_parts, part_rows;

  // Whether gradients of so many features are wide tiles, which ask the second-level cache for less: where they compute as
  // little beyond the features as square ones.
  static bool wide(const Problem& p) { return size_of(p.queries.dtype) == 2 && divide_up(p.dim(), kSide) % 2 == 0; }
  // Whether a tile of scores is asked for no more than what it is to its rows, by exponentials.
  static bool fuses(const Problem& p) {
    return p.queries.dtype != DType::f64 && p.measure != Measure::sigmoid && !p.symmetric && p.key_bias.ndim == 0;
  }

  explicit Cuts(const Problem& p) {
    const int64_t value_bytes = std::max<int64_t>(size_of(p.queries.dtype), fuses(p) ? 0 : sizeof(float));
    const int64_t bytes = powers_bytes(), padded = divide_up(p.keys_count(), kSide) * kSide;
    const int64_t row_bytes = std::max(padded * value_bytes, kSide);
    const bool chunks = row_bytes > 2 * bytes / kGroupRows;
    const int64_t most = chunks ? kGroupRows : std::max(bytes / row_bytes, kGroupRows);
    const int64_t groups = std::max<int64_t>(divide_up(p.rows(), most), 1);
    rows = divide_up(divide_up(p.rows(), groups), kSide) * kSide;
    keys = chunks ? std::max(bytes / (kGroupRows * value_bytes) / kSide, int64_t{1}) * kSide : padded;
    entries = std::clamp<int64_t>(bytes / std::max<int64_t>(rows * keys * value_bytes, 1), 1,
                                  std::max<int64_t>(p.batch(), 1));
    const int64_t across = entries * divide_up(p.dim(), kSide);
    cut(across * (rows / kSide), keys, query_parts, part_keys);
    cut(across * (keys / kSide), rows, key_parts, part_rows);
  }

 private:
  static void cut(int64_t tiles, int64_t depth, int64_t& parts, int64_t& part) {
    const int64_t most =
        std::clamp<int64_t>(kFullGrid / std::max<int64_t>(tiles, 1), 1, std::max<int64_t>(depth / kMinPart, 1));
    part = std::max(divide_up(divide_up(depth, most), kTile) * kTile, int64_t{kTile});
    parts = std::max<int64_t>(divide_up(depth, part), 1);
  }
};

// Powers of two that bring weights near the largest numbers of float16, lest the smallest vanish: of the largest weight.
__device__ inline float unit_of(float largest) {
  int exponent = 0;
  if (!(largest > 0) || largest > kLargest<float>) return 1;
  frexpf(largest, &exponent);
  return ldexpf(1, 15 - (exponent < -100 ? -100 : exponent));
}

// What is known of scores, whatever the type of their operands: in some entries of the batch, of the queries
// [first_row, first_row + rows) and keys [first_key, first_key + key_count).
template <class Sum>
struct Group : Rows<Sum> {
  bool symmetric;
  bool fused;   // Whether scores are made use of where they are multiplied, or kept as dot products.
  bool weighs;  // Whether the gradients' weights are formed, for which all scores are gone through again.
  // Sizes of a group and of a chunk.
  int64_t pitch_rows, pitch_keys;
  int64_t key_tiles;             // Of all keys.
  Sum* dot_matrix;               // [entries][pitch_rows][pitch_keys], where they are kept.
  Stats<Sum> tiles = {};         // [entries][key_tiles][pitch_rows]
  uint8_t* counts;               // Likewise: how many keys of the tile count in the rank.
  Sum *dots, *target_weights;    // [entries][places][M], of positives; of powers, in the end, what rounding left.
  Sum* limits;                   // [entries][M]: rivals count in the rank that do not score below.
  Sum* weights;                  // [entries][M], of the losses; 0 of rows that are not valid.
  Sum* row_factors;              // [entries][M], of grad_queries.
  Sum *tops, *rival_factors;     // [entries][M], if `weighs`: what powers are relative to, and what makes them weights.
  Stats<Sum> column_parts = {};  // [entries][pitch_rows / kColumnRows][pitch_keys]
  Sum* bias_parts;               // Likewise: sums of the gradients' weights.
  Stats<Sum> columns = {};       // [entries][N]
  Sum* column_factors;           // [entries][N]
  float* largest_weight;         // That of all rows, where weights have a unit; else null.
  int64_t first_entry = 0, entries = 0, first_row = 0, rows = 0, first_key = 0, key_count = 0;
  bool adds_queries = false, adds_keys = false;  // To what is in memory.

  Group(const Problem& p, const Cuts& cuts, Parts& parts)
      : Rows<Sum>(p),
        symmetric(p.symmetric),
        fused(Cuts::fuses(p)),
        // Where powers alone do not tell their weights, or are no numbers of float16.
        weighs(this->gradients &&
               (!fused || p.queries.dtype == DType::f16 || cuts.keys < this->n || this->places != 1)),
        pitch_rows(cuts.rows),
        pitch_keys(cuts.keys),
        key_tiles(divide_up(this->n, kTile)) {
    const bool moments = this->slopes != nullptr, wanted = this->gradients;
    const auto sums = [&](bool needed, int64_t count) { return parts.take<Sum>(needed ? count : 0); };
    const int64_t in_tiles = cuts.entries * key_tiles * cuts.rows, of_rows = cuts.entries * this->m;
    const int64_t of_columns = symmetric ? cuts.entries * this->n : 0;
    const int64_t in_column_parts = cuts.entries * (cuts.rows / kColumnRows) * cuts.keys;
    dot_matrix = sums(!fused, cuts.entries * cuts.rows * cuts.keys);
    tiles.take(parts, in_tiles, moments);
    counts = parts.take<uint8_t>(this->losses != nullptr ? in_tiles : 0);
    dots = sums(true, of_rows * this->places);
    target_weights = sums(wanted, of_rows * this->places);
    limits = sums(true, of_rows);
    weights = sums(wanted, of_rows);
    row_factors = sums(wanted, of_rows);
    tops = sums(weighs, of_rows);
    rival_factors = sums(weighs, of_rows);
    column_parts.take(parts, symmetric ? in_column_parts : 0, moments);
    bias_parts = sums(this->grad_bias != nullptr, in_column_parts);
    columns.take(parts, of_columns, moments);
    column_factors = sums(wanted, of_columns);
    float* const unit = parts.take<float>(1);
    largest_weight = p.queries.dtype == DType::f16 ? unit : nullptr;
  }

  // Whether the powers that a tile is measured by are kept, to become the gradients.
  CPC_HOST_DEVICE bool keeps_powers() const { return this->gradients && !weighs; }
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
  // What powers of a tile are relative to, given the largest score of its rivals. Where powers are kept, the positive's
  // score where it is near enough for any of them: then no other tile makes them anything else.
  __device__ Sum reference(Sum limit, Sum largest) const {
    constexpr Sum kNear = 40;
    if (keeps_powers() && finite<Sum>(limit) == limit &&
        (largest == -kInfinity<Sum> || (largest - limit <= kNear && limit - largest <= kNear)))
      return limit;
    return this->bounded(largest);
  }
  // Whether a finished row has any. One of weight 0 may have some by the columns of a symmetric contrast.
  __device__ bool has_gradients(int64_t entry, int64_t row) const {
    const int64_t at = kept(entry, row);
    if (weights[at] != 0) return true;
    return this->present != nullptr && this->present[index(entry, row)] != 0 && row_factors[at] == row_factors[at];
  }
  // What weights are multiplied with before they are rounded.
  __device__ Sum unit() const { return largest_weight != nullptr ? Sum(unit_of(*largest_weight)) : Sum(1); }
  __device__ int64_t stat(int64_t entry, int64_t tile, int64_t row) const {
    return (entry * key_tiles + tile) * pitch_rows + row;
  }
  __device__ int64_t column_parts_of_group() const { return divide_up(rows, kColumnRows); }
  __device__ int64_t column_part(int64_t entry, int64_t part, int64_t key) const {
    return (entry * (pitch_rows / kColumnRows) + part) * pitch_keys + key;
  }
};

// The same with the operands of the products, and what they give.
template <class T>
struct Arguments : Group<SumOf<T>> {
  using Sum = SumOf<T>;
  const T *queries, *keys;
  T *grad_queries, *grad_keys;
  bool packs_queries, packs_keys;
  bool wide;        // Tiles of gradients: see Cuts.
  int64_t pitch_d;  // Features in whole chunks of 16 bytes.
  int64_t query_parts, part_keys, key_parts, part_rows;
  T *packed_queries, *packed_keys;  // [entries][M][pitch_d] and [entries][N][pitch_d], where products do not take them.
  T* positive_keys;                 // [entries][places][pitch_rows][pitch_d]: copies of the keys that targets name.
  T* scaled_queries;           // [entries][pitch_rows][pitch_d]: times what makes powers weights; 0 without gradients.
  T* powers;                   // [entries][pitch_rows][pitch_keys]; weights, times the unit, if `weighs`.
  Sum *query_sums, *key_sums;  // [entries][parts][pitch_rows or N][pitch_d]

  Arguments(const Problem& p, const Cuts& cuts, Parts& parts)
      : Group<Sum>(p, cuts, parts),
        queries(p.queries.as<const T>()),
        keys(p.keys.as<const T>()),
        grad_queries(p.grad_queries.as<T>()),
        grad_keys(p.grad_keys.as<T>()),
        packs_queries(is_packed(queries)),
        packs_keys(is_packed(keys)),
        wide(Cuts::wide(p)),
        pitch_d(divide_up(this->d, kChunk<T>) * kChunk<T>),
        query_parts(cuts.query_parts),
        part_keys(cuts.part_keys),
        key_parts(kOnTensorCores<T> ? cuts.key_parts : 1),
        part_rows(cuts.part_rows) {
    const auto values = [&](bool needed, int64_t count) { return parts.take<T>(needed ? count : 0); };
    const auto sums = [&](bool needed, int64_t count) { return parts.take<Sum>(needed ? count : 0); };
    const bool of_queries = p.grad_queries.ndim != 0, of_keys = p.grad_keys.ndim != 0;
    packed_queries = values(packs_queries, cuts.entries * this->m * pitch_d);
    packed_keys = values(packs_keys, cuts.entries * this->n * pitch_d);
    positive_keys =
        values(kOnTensorCores<T> && this->targets != nullptr, cuts.entries * this->places * cuts.rows * pitch_d);
    scaled_queries = values(kOnTensorCores<T> && of_keys, cuts.entries * cuts.rows * pitch_d);
    powers = values(this->gradients, cuts.entries * cuts.rows * cuts.keys);
    query_sums = sums(of_queries, cuts.entries * query_parts * cuts.rows * pitch_d);
    key_sums = sums(of_keys, cuts.entries * key_parts * this->n * pitch_d);
  }

  // The matrices that products take, from the group's first row and the chunk's first key on.
  const T* query_matrix() const {
    return packs_queries ? packed_queries + this->first_row * pitch_d
                         : queries + (this->first_entry * this->m + this->first_row) * this->d;
  }
  const T* key_matrix() const {
    return packs_keys ? packed_keys + this->first_key * pitch_d
                      : keys + (this->first_entry * this->n + this->first_key) * this->d;
  }
  __device__ const T* query_rows(int64_t entry) const {
    return queries + ((this->first_entry + entry) * this->m + this->first_row) * this->d;
  }
  __device__ const T* key_rows(int64_t entry) const { return keys + (this->first_entry + entry) * this->n * this->d; }
  __device__ T* row_of_powers(int64_t entry, int64_t row) const {
    return powers + (entry * this->pitch_rows + row) * this->pitch_keys;
  }

 private:
  bool is_packed(const T* matrix) const {
    const bool fits = this->d > 0 && this->d % kChunk<T> == 0 && reinterpret_cast<uintptr_t>(matrix) % kChunkBytes == 0;
    return kOnTensorCores<T> && !fits;
  }
};

// What to do with scores: keep positives' dot products, or all of them; measure what tiles are to rows, as powers; or make
// the gradients' weights of them.
enum class Stage : uint8_t { positives, keep, measure, weigh };

// The positives of a row, as Outcome asks for them.
template <class Sum>
struct PositivesOfRow {
  const Group<Sum>& a;
  int64_t entry, row, places;

  __device__ PositivesOfRow(const Group<Sum>& a, int64_t entry, int64_t row)
      : a(a), entry(entry), row(row), places(a.places) {}
  __device__ bool present(int64_t j) const { return a.target(entry, row, j) >= 0; }
  __device__ Sum dot(int64_t j) const { return a.dots[a.kept(entry, row, j)]; }
  __device__ Sum score(int64_t j) const { return a.score(a.scale(), dot(j), entry, a.target(entry, row, j)); }
};

}  // namespace cpc::info_nce::cuda
