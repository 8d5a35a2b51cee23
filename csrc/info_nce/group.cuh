// Arguments of the kernels that contrast all keys: how a problem is cut into groups of queries, chunks of keys and
// parts of sums, and their buffers in the workspace.
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

// Rivals in memory, an array for each member; moments only where slopes are wanted.
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

// Merges rivals with further parts of them, in order.
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
// The number of keys over which each query has statistics: those of a warp's tile.
constexpr int kTile = 64;
// The number of queries that a thread measures for a key.
constexpr int kColumnRows = kTile * kTile / kThreads;
// Pitches of matrices that products read and write are multiples of a tile's side.
constexpr int64_t kSide = SquareTile::kRows;
static_assert(SquareTile::kColumns == kSide);

// Bytes of a group's powers or dot products. They need not fit into the L2 cache: products that read and write them
// take no longer without it, while smaller groups take more launches and fill a GPU less. In the emulation,
// CPC_EMULATION_POWERS_KIB sets this in KiB, so that small problems have several groups and chunks.
inline int64_t powers_bytes() {
#if defined(CPC_CUDA_EMULATION)
  if (const char* const text = std::getenv("CPC_EMULATION_POWERS_KIB")) return std::strtoll(text, nullptr, 10) << 10;
#endif
  return int64_t{128} << 20;
}
// The least number of queries of a group, unless the problem has fewer. Where their powers would take more than twice
// powers_bytes(), the keys are taken in chunks.
constexpr int64_t kGroupRows = 1024;
// The number of square tiles that fill a GPU, and the least depth of a part of a sum.
constexpr int64_t kFullGrid = 256, kMinPart = 512;

// The sizes of a group of queries, a chunk of keys, and a run of entries of the batch. They depend on the problem's
// sizes only, and so does the order of sums.
struct Cuts {
  int64_t rows, keys, entries;
  // Gradients of queries are sums over keys, and those of keys are sums over queries. With too few tiles to fill a GPU,
  // these sums are divided into parts.
  int64_t query_parts, part_keys, key_parts, part_rows;

  // Whether gradients use wide tiles, which read less from the L2 cache: where these compute no more beyond the last
  // feature than square ones.
  static bool wide(const Problem& p) { return size_of(p.queries.dtype) == 2 && divide_up(p.dim(), kSide) % 2 == 0; }
  // Whether the epilogue of the product measures scores: where only the sums of rows' exponentials are needed.
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

// The power of two that scales the largest weight to near the largest float16, so that the smallest do not underflow.
__device__ inline float unit_of(float largest) {
  int exponent = 0;
  if (!(largest > 0) || largest > kLargest<float>) return 1;
  frexpf(largest, &exponent);
  return ldexpf(1, 15 - (exponent < -100 ? -100 : exponent));
}

// The arguments that do not depend on the type of queries and keys, for some entries of the batch, the queries
// [first_row, first_row + rows) and the keys [first_key, first_key + key_count).
template <class Sum>
struct Group : Rows<Sum> {
  bool symmetric;
  bool fused;   // Whether the product's epilogue measures scores, rather than keeping them as dot products.
  bool weighs;  // Whether a second pass over the scores forms the gradients' weights.
  // Sizes of a group and of a chunk.
  int64_t pitch_rows, pitch_keys;
  int64_t key_tiles;             // Of all keys.
  Sum* dot_matrix;               // [entries][pitch_rows][pitch_keys], where dot products are kept.
  Stats<Sum> tiles = {};         // [entries][key_tiles][pitch_rows]
  uint8_t* counts;               // Likewise: the number of the tile's keys that count in the rank.
  Sum *dots, *target_weights;    // [entries][places][M], of positives. If powers are kept: what rounding lost.
  Sum* limits;                   // [entries][M]: the ranks' thresholds.
  Sum* weights;                  // [entries][M]: the losses' weights; 0 for invalid rows.
  Sum* row_factors;              // [entries][M]: the factors of grad_queries.
  Sum *tops, *rival_factors;     // [entries][M], if `weighs`: the score that powers refer to, and their factor.
  Stats<Sum> column_parts = {};  // [entries][pitch_rows / kColumnRows][pitch_keys]
  Sum* bias_parts;               // Likewise: sums of the gradients' weights.
  Stats<Sum> columns = {};       // [entries][N]
  Sum* column_factors;           // [entries][N]
  float* largest_weight;         // The largest weight of all rows, where weights have a unit; else null.
  int64_t first_entry = 0, entries = 0, first_row = 0, rows = 0, first_key = 0, key_count = 0;
  bool adds_queries = false, adds_keys = false;  // Whether products add to the sums in memory.

  Group(const Problem& p, const Cuts& cuts, Parts& parts)
      : Rows<Sum>(p),
        symmetric(p.symmetric),
        fused(Cuts::fuses(p)),
        // Where powers do not determine their weights, or do not fit into float16.
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

  // Whether the powers of the first pass are kept for the gradients.
  CPC_HOST_DEVICE bool keeps_powers() const { return this->gradients && !weighs; }
  __device__ int64_t in_entry(int64_t row) const { return first_row + row; }
  __device__ int64_t index(int64_t entry, int64_t row) const { return (first_entry + entry) * this->m + in_entry(row); }
  // The index of a row's value in arrays over [entries][M], and of a positive's in [entries][places][M].
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
  // The score that a tile's powers of a row are relative to, given the largest score of its rivals. Where powers are
  // kept, it is the positive's score unless that is too far away: all tiles then have the same one.
  __device__ Sum reference(Sum limit, Sum largest) const {
    constexpr Sum kNear = 40;
    if (keeps_powers() && finite<Sum>(limit) == limit &&
        (largest == -kInfinity<Sum> || (largest - limit <= kNear && limit - largest <= kNear)))
      return limit;
    return this->bounded(largest);
  }
  // Whether a finished row has gradients. A row of weight 0 may have some from the columns of a symmetric contrast.
  __device__ bool has_gradients(int64_t entry, int64_t row) const {
    const int64_t at = kept(entry, row);
    if (weights[at] != 0) return true;
    return this->present != nullptr && this->present[index(entry, row)] != 0 && row_factors[at] == row_factors[at];
  }
  // The factor of weights before they are rounded.
  __device__ Sum unit() const { return largest_weight != nullptr ? Sum(unit_of(*largest_weight)) : Sum(1); }
  __device__ int64_t stat(int64_t entry, int64_t tile, int64_t row) const {
    return (entry * key_tiles + tile) * pitch_rows + row;
  }
  __device__ int64_t column_parts_of_group() const { return divide_up(rows, kColumnRows); }
  __device__ int64_t column_part(int64_t entry, int64_t part, int64_t key) const {
    return (entry * (pitch_rows / kColumnRows) + part) * pitch_keys + key;
  }
};

// All arguments: the above with the operands and results of the products.
template <class T>
struct Arguments : Group<SumOf<T>> {
  using Sum = SumOf<T>;
  const T *queries, *keys;
  T *grad_queries, *grad_keys;
  bool packs_queries, packs_keys;
  bool wide;        // See Cuts.
  int64_t pitch_d;  // The number of features, padded to whole chunks of 16 bytes.
  int64_t query_parts, part_keys, key_parts, part_rows;
  T *packed_queries, *packed_keys;  // [entries][M or N][pitch_d], where products cannot read the tensors.
  T* positive_keys;                 // [entries][places][pitch_rows][pitch_d]: copies of the keys that targets name.
  T* scaled_queries;                // [entries][pitch_rows][pitch_d]: times the factor of powers; 0 without gradients.
  T* powers;                        // [entries][pitch_rows][pitch_keys]; weights times the unit, if `weighs`.
  Sum *query_sums, *key_sums;       // [entries][parts][pitch_rows or N][pitch_d]

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

  // The operands of products, from the group's first row and the chunk's first key on.
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

// What is done with scores: keep the positives' dot products; keep all dot products; measure tiles, turning scores into
// powers; or turn them into the gradients' weights.
enum class Stage : uint8_t { positives, keep, measure, weigh };

// The positives of a row, as Outcome takes them.
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
