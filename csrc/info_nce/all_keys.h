// InfoNCE of all keys on the CPU: computes losses and all gradients in one call.
// The scores of some hundred queries (a superblock) against all keys stay in the cache, transposed, so that each lane
// of a register is a query. The softmax thus needs no sums across lanes, and all three matrix products read the keys
// and write their gradient in place; only the few queries are packed. Scores become powers of e relative to the largest
// of a block of keys at once, and probabilities once all blocks are known. Where there are too many keys for the cache,
// they are taken in chunks, whose scores are computed again for the gradients. A symmetric contrast knows its
// probabilities only after all queries. It then reads their dot products again, from memory as far as they are kept, or
// computes them once more. So does a self-contrast, whose scores are those of its columns too: a superblock of queries
// meets only the keys from its own first query on, and the pairs' weights in both directions are multiplied with the
// queries and with the keys. Where the processor multiplies pairs of bfloat16, queries and keys of that type are
// multiplied without conversion, and the weights of the gradients are rounded to bfloat16. Scores and all sums are in
// float. Included only by sources that are compiled once per instruction set level.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>

#include "core/gemm.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "info_nce/info_nce.h"
#include "info_nce/outcome.h"
#include "info_nce/scores.h"

namespace cpc::info_nce::cpu::CPC_ISA {

// Nanoseconds to pack one feature of a query, and to convert one value.
constexpr double kPackNanoseconds = 1, kConvertNanoseconds = 0.25;
// Multiplications and additions per nanosecond, where the time includes the powers of e between the products.
constexpr double kContrastFlops = 24;

// Calls body(i) for every i in [0, n), on up to `threads` workers.
template <class Body>
void each(int threads, int64_t n, const Body& body) {
  if (threads > 1)
    parallel_for(n, [&](int64_t i, int) { body(i); }, threads);
  else
    for (int64_t i = 0; i < n; ++i) body(i);
}

// to[i] = factor * from[i].
template <class S, class Storage>
void widen_run(S* to, const Storage* from, int64_t n, S factor = 1) {
  for (int64_t i = 0; i < n; ++i) to[i] = factor * widen(from[i]);
}

// Converts a row's values to elements, padded with zeros to whole steps of depth.
template <class E, class Storage>
void to_padded_elements(E* to, const Storage* from, int64_t n) {
  if constexpr (std::is_same_v<E, Storage>)
    std::copy_n(from, n, to);
  else
    widen_run(to, from, n);
  std::fill(to + n, to + padded_depth<E>(n), E{});
}

// The scale: the number in the problem times the factor in `scales`, if there is one.
template <class S>
S scale_of(const Problem& problem) {
  const auto* const factor = problem.scales.as<const S>();
  return static_cast<S>(problem.scale) * (factor != nullptr ? *factor : S(1));
}

// A row's places for positives, for Outcome.
template <class S>
struct PositivesOfRow {
  int64_t places;
  const int64_t* targets;  // Null for one positive, the key `own`.
  int64_t own;
  const S* dots;
  S scale;
  const S* bias;  // All keys' biases; null for 0.

  int64_t key(int64_t j) const { return targets != nullptr ? targets[j] : own; }
  bool present(int64_t j) const { return key(j) >= 0; }
  S dot(int64_t j) const { return dots[j]; }
  // Uses exactly the arithmetic of TileOfScores, so that equal keys have equal scores.
  S score(int64_t j) const {
    const S added = bias != nullptr ? bias[key(j)] : S(0);
    return dots[j] * scale + added;
  }
};

// Keys of a block: powers of e are relative to the largest score of a block, and a task takes one block.
constexpr int64_t kBlockKeys = 8 * kTileRows;
// The blocks of keys that a tile of the queries' gradient sums at a time, and the features that a tile of scores does.
constexpr int64_t kSliceBlocks = 6, kDepthBlock = 320;
// Bytes of a superblock's scores: what the last-level cache holds beside the keys.
constexpr int64_t kScoresBytes = int64_t{6} << 20;
// The most queries of a superblock. Where fewer than kMinRows would fit, the superblock takes the keys in chunks
// instead.
constexpr int64_t kMaxRows = 384, kMinRows = 96;
// With fewer blocks of keys per worker than this, a block is divided into several tasks.
constexpr int64_t kFewBlocks = 4;
// With no more workers than this, one of them finishes the sums of all rows.
constexpr int64_t kFewWorkers = 4;
// Values that are converted at a time.
constexpr int64_t kConvertedValues = 512;
// Tiles of the queries' gradient that a task takes: three cache lines of a key.
constexpr int64_t kTaskTiles = 8;

// E is the type in which queries and keys are multiplied. Only the code that reads or writes them depends on their type
// in memory, `Storage`; everything else is compiled once for all types that share an E.
template <class E>
class AllKeys {
  using S = Sum<E>;
  using R = Register<S>;
  static constexpr int64_t kLane = kLaneColumns<E>, kColumns = kTileColumns<E>, kStep = kDepthStep<E>;
  // A superblock's own queries, as keys, are whole blocks.
  static_assert(kMaxRows % kColumns == 0 && kMaxRows % kBlockKeys == 0);

 public:
  explicit AllKeys(const Problem& problem)
      : problem_(problem),
        m_(problem.rows()),
        n_(problem.keys_count()),
        d_(problem.dim()),
        depth_(padded_depth<E>(d_)),
        places_(problem.positives()),
        scale_(scale_of<S>(problem)),
        blocks_(divide_up(n_, kBlockKeys)) {
    const int64_t row_bytes = n_ * static_cast<int64_t>(sizeof(S));
    rows_ = std::min(kScoresBytes / std::max<int64_t>(row_bytes, 1), kMaxRows);
    chunk_blocks_ = blocks_;
    if (rows_ < kMinRows || problem.self_contrast) {
      rows_ = kMaxRows;
      // Scores that are kept, or computed again, need not all fit into the cache.
      const int64_t bytes = problem.self_contrast ? kScoresBytes / 3 : kScoresBytes;
      chunk_blocks_ = bytes / (rows_ * kBlockKeys * static_cast<int64_t>(sizeof(S))) / kSliceBlocks * kSliceBlocks;
    }
    rows_ = std::max(rows_ / kColumns * kColumns, kColumns);
    rows_ = std::min(rows_, divide_up(m_, kLane) * kLane);
    panels_ = divide_up(rows_, kColumns);
    // Whole superblocks are kept.
    const int64_t bytes = problem.symmetric ? kKeptBytes : problem.self_contrast ? kKeptOfSelfBytes : 0;
    const int64_t most = problem.wants_gradients() ? bytes / static_cast<int64_t>(sizeof(S)) : 0;
    for (int64_t first = 0; first < m_ && kept_before(first + rows_) <= most; first += rows_)
      kept_rows_ = first + rows_;
  }

  int64_t workspace() const {
    Parts parts(nullptr);
    Buffers(parts, *this);
    return parts.used();
  }

  // Nanoseconds that a batch entry takes.
  double nanoseconds() const {
    const double half = problem_.self_contrast ? 0.5 : 1;  // A self-contrast computes half of the scores.
    const double products = half + wants_queries() + half * wants_keys();
    return products * 2 * static_cast<double>(m_ * d_) * static_cast<double>(n_) / kContrastFlops;
  }

  // Contrasts a batch entry.
  void run(int64_t entry, char* memory, bool parallel) const {
    Parts parts(memory);
    const auto threads = [&](double nanoseconds) { return parallel ? workers_for(nanoseconds) : 1; };
    const auto rows = static_cast<double>(std::min(rows_, m_)), values = static_cast<double>(n_ * d_);
    Call call{.entry = entry,
              .threads = threads(2 * rows * values / kContrastFlops),
              .packers = threads((wants_keys() ? 2 : 1) * kPackNanoseconds * rows * static_cast<double>(d_)),
              .converters = threads(kConvertNanoseconds * values),
              .buffers = Buffers(parts, *this),
              .keys = nullptr,
              .key_pairs = nullptr,
              .grad_keys = nullptr};
    call.keys = reads_keys_in_place() ? problem_.keys.template as<const E>() + entry * n_ * d_ : call.buffers.keys;
    call.key_pairs = kStep == 1 ? call.keys : call.buffers.key_pairs;
    call.grad_keys = call.buffers.grad_keys;
    if (in_place() && wants_keys()) call.grad_keys = grad_keys().template as<S>() + entry * n_ * d_;
    if (!reads_keys_in_place() || multiplies_pairs())
      each(call.converters, blocks_, [&](int64_t block) { pack_keys(call, block); });
    const auto rows_at = [&](int64_t first) { return Rows{first, std::clamp<int64_t>(m_ - first, 0, rows_)}; };
    if (two_ways()) {
      const int64_t all = divide_up(m_, kColumns) * kColumns;
      for (S* part : {call.buffers.largest, call.buffers.of_rows}) std::fill_n(part, all, S{});
    }
    // Ranks count in columns too, so the best positives of all queries must be known before the first superblock.
    for (int64_t first = 0; problem_.self_contrast && first < m_; first += rows_) {
      pack_queries(call, rows_at(first));
      score_positives(call, rows_at(first));
    }
    pack_queries(call, rows_at(0));
    for (int64_t first = 0; first < m_; first += rows_) superblock(call, rows_at(first), rows_at(first + rows_));
    if (two_ways()) {
      if (problem_.symmetric) finish_columns(call);
      if (problem_.wants_gradients()) pack_queries(call, rows_at(0));
      for (int64_t first = 0; problem_.wants_gradients() && first < m_; first += rows_)
        differentiate(call, rows_at(first), rows_at(first + rows_));
    }
    if (n_ == 0 && wants_queries()) clear(problem_.grad_queries, entry, m_);  // There is no block of keys to do it.
    if (m_ == 0 && wants_bias()) std::fill_n(problem_.grad_bias.template as<S>() + entry * n_, n_, S{});
    if (!wants_keys()) return;
    if (m_ == 0) clear(grad_keys(), entry, n_);
    if (sums_keys_aside())
      each(call.converters, m_ == 0 ? 0 : blocks_, [&](int64_t block) {
        const int64_t begin = block * kBlockKeys * d_, end = begin + keys_of(block) * d_;
        S scaled[kConvertedValues];
        for (int64_t at = begin; at < end; at += kConvertedValues) {
          const int64_t count = std::min(kConvertedValues, end - at);
          for (int64_t i = 0; i < count; ++i) scaled[i] = scale_ * call.grad_keys[at + i];
          with_storage([&](auto storage) {
            using Storage = decltype(storage);
            narrow(grad_keys().template as<Storage>() + entry * n_ * d_ + at, scaled, count);
          });
        }
      });
  }

 private:
  // Calls use with a value of the queries' and keys' type, which is one of those that are multiplied as E.
  template <class Use>
  void with_storage(const Use& use) const {
    if constexpr (std::is_same_v<E, float>) {
      if (problem_.queries.dtype == DType::f16) return use(Half{});
      if constexpr (!kMultipliesBFloat16)
        if (problem_.queries.dtype == DType::bf16) return use(BFloat16{});
    }
    use(E{});
  }
  // Whether that type is as wide as the sums': gradients of keys are then summed in the result itself.
  bool in_place() const { return size_of(problem_.queries.dtype) == sizeof(S); }

  void clear(const TensorView& gradient, int64_t entry, int64_t rows) const {
    with_storage([&](auto storage) {
      std::fill_n(gradient.template as<decltype(storage)>() + entry * rows * d_, rows * d_, decltype(storage){});
    });
  }

  bool wants_queries() const { return problem_.grad_queries.ndim != 0; }
  bool wants_keys() const { return grad_keys().ndim != 0; }
  const TensorView& grad_keys() const { return problem_.self_contrast ? problem_.grad_queries : problem_.grad_keys; }
  bool wants_bias() const { return problem_.grad_bias.ndim != 0; }
  bool sigmoid() const { return problem_.measure == Measure::sigmoid; }
  // Whether a pair's weight depends on the sums of both its row and its column.
  bool two_ways() const { return problem_.symmetric || problem_.self_contrast; }
  int64_t keys_of(int64_t block) const { return std::min(kBlockKeys, n_ - block * kBlockKeys); }
  bool reads_keys_in_place() const { return size_of(problem_.keys.dtype) == sizeof(E) && depth_ == d_; }
  // Whether the keys' gradient is summed over several superblocks in another type than its own.
  bool sums_keys_aside() const { return !in_place() && wants_keys() && (m_ > rows_ || problem_.self_contrast); }
  // Whether the queries' gradient is summed over several chunks.
  bool sums_queries_aside() const { return wants_queries() && chunk_blocks_ < blocks_; }
  // Whether keys are multiplied with weights in pairs.
  bool multiplies_pairs() const { return kStep > 1 && (wants_queries() || (problem_.self_contrast && wants_keys())); }
  // The number of parts that a product's features are summed in.
  int64_t parts() const { return std::max<int64_t>(divide_up(depth_, kDepthBlock), 1); }
  int64_t begin_of_part(int64_t part) const { return part * (depth_ / kStep) / parts() * kStep; }
  // The number of dot products kept for the superblocks before the query `first`.
  int64_t kept_before(int64_t first) const {
    const int64_t blocks = first / std::max<int64_t>(rows_, 1),
                  left = problem_.self_contrast ? rows_ * blocks * (blocks - 1) / 2 : 0;
    return rows_ * (blocks * padded_depth<E>(n_) - left);
  }

  struct Buffers {
    S* scores;          // [panels][keys of a chunk][columns]: dots, then powers, then weights of the gradients.
    S* kept;            // Dots in the same layout, for the first kept_rows_ queries, superblock after superblock.
    E* by_feature;      // [panels][D][columns]: queries, as factors of keys.
    E* by_query;        // [panels of features][rows][columns]: queries, scaled where in_place(), as factors of weights.
    S* grad_queries;    // [panels][D][columns], where it is summed over several chunks.
    RowSums<S> stats;   // [blocks][rows]: sums over a block's rivals.
    S* factors;         // [blocks][rows]: factors from powers to weights.
    S *dots, *weights;  // [rows][places]: the positives' dot products and their weights in the gradients.
    S* bests;           // [rows]: the threshold of the rank.
    char* needed;       // [blocks][panels]: whether weights are above zero to the sums' precision.
    E* keys;            // [N][D], where the tensor is of another type, or rows have no whole steps of depth.
    E* key_pairs;       // [N][D]: the factors of weights, where these are multiplied in pairs.
    S* grad_keys;       // [N][D], where the tensor is of another type and summed over several superblocks.
    S *largest, *of_rows;  // [M], with two_ways(): the score that a row's powers are relative to, and their factor.
    S* present;            // [M]: not 0 where the query is contrasted in the columns.
    RowSums<S> of_panels;  // [panels][N]: sums of the columns.
    RowSums<S> columns;    // [N]: the same over all panels so far; `sums` becomes the factor from powers to weights.

    Buffers(Parts& parts, const AllKeys& a) {
      const bool gradients = a.problem_.wants_gradients(), two_ways = a.two_ways();
      scores = parts.take<S>(a.panels_ * kColumns * a.keys_of_chunk());
      kept = parts.take<S>(a.kept_before(a.kept_rows_));
      by_feature = parts.take<E>(a.panels_ * kColumns * a.depth_);
      by_query = parts.take<E>(a.wants_keys() ? divide_up(a.d_, kColumns) * kColumns * a.rows_ : 0);
      grad_queries = parts.take<S>(a.sums_queries_aside() ? a.panels_ * kColumns * a.d_ : 0);
      const int64_t padded = a.panels_ * kColumns;
      for (S** part : {&stats.maxima, &stats.sums, &stats.moments, &stats.counts})
        *part = parts.take<S>(a.blocks_ * padded);
      factors = parts.take<S>(gradients ? a.blocks_ * padded : 0);
      const int64_t all_rows = two_ways ? divide_up(a.m_, kColumns) * kColumns : padded;
      dots = parts.take<S>(all_rows * a.places_);
      weights = parts.take<S>(all_rows * a.places_);
      bests = parts.take<S>(all_rows);
      needed = parts.take<char>(a.blocks_ * a.panels_);
      keys = parts.take<E>(a.reads_keys_in_place() ? 0 : a.n_ * a.depth_);
      key_pairs = parts.take<E>(a.multiplies_pairs() ? padded_depth<E>(a.n_) * a.d_ : 0);
      grad_keys = parts.take<S>(a.sums_keys_aside() ? a.n_ * a.d_ : 0);
      for (S** part : {&largest, &of_rows}) *part = parts.take<S>(two_ways ? all_rows : 0);
      present = parts.take<S>(a.problem_.symmetric ? all_rows : 0);
      const int64_t all_keys = two_ways ? a.padded_keys() : 0;
      for (S** part : {&of_panels.maxima, &of_panels.sums, &of_panels.moments, &of_panels.counts})
        *part = parts.take<S>(all_keys * a.panels_);
      for (S** part : {&columns.maxima, &columns.sums, &columns.moments, &columns.counts})
        *part = parts.take<S>(all_keys);
    }
  };

  struct Call {
    int64_t entry;
    int threads;              // For a superblock's products.
    int packers, converters;  // For packing its queries, and for converting all keys.
    Buffers buffers;
    const E *keys, *key_pairs;
    S* grad_keys;
  };

  // A run of `count` queries from `first` on.
  struct Rows {
    int64_t first, count;
    int64_t panels() const { return divide_up(count, kColumns); }
    int64_t in(int64_t panel) const { return std::min(kColumns, count - panel * kColumns); }
    int64_t vectors(int64_t panel) const { return divide_up(in(panel), kLane); }
    int64_t columns(int64_t panel) const { return vectors(panel) * kLane; }
  };

  // The number of keys, rounded up to whole blocks.
  int64_t padded_keys() const { return blocks_ * kBlockKeys; }
  // The index of a superblock's row in the buffers of positives.
  int64_t kept_row(const Rows& rows, int64_t row) const { return (two_ways() ? rows.first : 0) + row; }
  // The first block of keys that a superblock meets. In a self-contrast, earlier keys have met its queries already, and
  // the blocks up to end_of_own() are its own queries, which meet each other in both directions.
  int64_t first_block(const Rows& rows) const { return problem_.self_contrast ? rows.first / kBlockKeys : 0; }
  int64_t end_of_own(const Rows& rows) const {
    return problem_.self_contrast ? divide_up(rows.first + rows.count, kBlockKeys) : 0;
  }
  bool is_kept(const Rows& rows) const { return rows.first + rows.count <= kept_rows_; }

  // The index of a row in the tensors of queries.
  int64_t index(const Call& call, const Rows& rows, int64_t row) const { return call.entry * m_ + rows.first + row; }
  const S* bias_of(const Call& call) const {
    return problem_.key_bias.ndim == 0 ? nullptr : problem_.key_bias.template as<const S>() + call.entry * n_;
  }
  PositivesOfRow<S> positives(const Call& call, const Rows& rows, int64_t row) const {
    const auto* const targets = problem_.targets.template as<const int64_t>();
    return {.places = places_,
            .targets = targets == nullptr ? nullptr : targets + index(call, rows, row) * places_,
            .own = rows.first + row,
            .dots = call.buffers.dots + kept_row(rows, row) * places_,
            .scale = scale_,
            .bias = bias_of(call)};
  }

  // There are few parallel loops, because all workers wait for the last one at the end of each. The next queries are
  // packed during the last product of these, which no longer reads the packed queries.
  void superblock(const Call& call, const Rows& rows, const Rows& next) const {
    if (!problem_.self_contrast) score_positives(call, rows);
    for (int64_t chunk = first_block(rows); chunk < blocks_; chunk += chunk_blocks_) {
      score(call, rows, chunk, Pass::first);
      if (two_ways())
        each(call.threads, chunk_end(chunk) - chunk, [&](int64_t i) { merge_columns_of(call, rows, chunk + i); });
    }
    // This is little work, worth a parallel loop only with many workers.
    each(workers() > kFewWorkers ? call.threads : 1, rows.panels(),
         [&](int64_t panel) { finish_rows(call, rows, panel); });
    if (two_ways() || !problem_.wants_gradients()) return pack_queries(call, next);
    differentiate(call, rows, next);
  }

  // The number of keys that a chunk's tiles have room for.
  int64_t keys_of_chunk() const { return padded_depth<E>(std::min(chunk_blocks_ * kBlockKeys, n_)); }
  int64_t chunk_end(int64_t chunk) const { return std::min(blocks_, chunk + chunk_blocks_); }

  // The gradients' part of a superblock whose rows, and columns, are finished.
  void differentiate(const Call& call, const Rows& rows, const Rows& next) const {
    for (int64_t chunk = first_block(rows); chunk < blocks_; chunk += chunk_blocks_) {
      if (two_ways() ? !is_kept(rows) : chunk_blocks_ < blocks_) score(call, rows, chunk, Pass::again);
      const int64_t end = chunk_end(chunk);
      const int64_t blocks = end - chunk;
      if (call.threads > 1 && blocks < kFewBlocks * call.threads && wants_keys() && !wants_bias()) {
        // There are too few blocks to keep all workers busy.
        const int64_t panels = rows.panels(), parts = divide_up(d_, kColumns);
        each(call.threads, blocks * panels,
             [&](int64_t i) { weigh(call, rows, chunk, chunk + i / panels, i % panels); });
        each(call.threads, blocks * parts, [&](int64_t i) {
          const int64_t block = chunk + i / parts, first = i % parts * kColumns;
          if (block >= end_of_own(rows)) add_to_keys(call, rows, chunk, block, first, std::min(d_, first + kColumns));
        });
      } else {
        each(call.threads, blocks, [&](int64_t i) {
          for (int64_t panel = 0; panel < rows.panels(); ++panel) weigh(call, rows, chunk, chunk + i, panel);
          if (wants_bias()) add_to_bias(call, rows, chunk, chunk + i);
          if (wants_keys() && chunk + i >= end_of_own(rows)) add_to_keys(call, rows, chunk, chunk + i, 0, d_);
        });
      }
      // A task takes all panels, so that they read a tile's part of the keys from the cache, unless workers would be
      // idle.
      const int64_t tiles = divide_up(d_, kTileRows), groups = divide_up(tiles, kTaskTiles);
      const int64_t shares = groups >= 2 * call.threads || call.threads == 1 ? 1 : rows.panels();
      if (!wants_queries()) {
        if (end == blocks_) pack_queries(call, next);
        continue;
      }
      // Every task has a part of both the product and the packing, because the first workers get the first tasks.
      const int64_t tasks = groups * shares, packs = end == blocks_ ? next.panels() : 0;
      each(call.threads, tasks, [&](int64_t task) {
        const int64_t group = task % groups, share = task / groups;
        add_to_queries(call, rows, chunk, end, group * tiles / groups, (group + 1) * tiles / groups,
                       share * rows.panels() / shares, (share + 1) * rows.panels() / shares);
        for (int64_t panel = task * packs / tasks; panel < (task + 1) * packs / tasks; ++panel)
          pack_queries(call, next, panel);
      });
    }
  }

  void pack_queries(const Call& call, const Rows& rows) const {
    each(call.packers, rows.panels(), [&](int64_t panel) { pack_queries(call, rows, panel); });
  }

  void pack_queries(const Call& call, const Rows& rows, int64_t panel) const {
    with_storage([&](auto storage) {
      pack_queries(call, rows, panel,
                   problem_.queries.template as<decltype(storage)>() + index(call, rows, panel * kColumns) * d_);
    });
  }
  template <class Storage>
  void pack_queries(const Call& call, const Rows& rows, int64_t panel, const Storage* queries) const {
    const int64_t columns = rows.columns(panel), in = rows.in(panel);
    E* const by_feature = call.buffers.by_feature + panel * kColumns * depth_;
    for (int64_t k = 0; k < depth_; k += kLane * kStep)
      for (int64_t c = 0; c < columns; c += kLane) {
        R block[kLane];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLane; ++i) block[i] = c + i < in ? steps_of(queries + (c + i) * d_ + k, d_ - k) : R{};
        transpose<S>(block);
        const int64_t count = std::min(kLane, (depth_ - k) / kStep);
        for (int64_t i = 0; i < count; ++i)
          std::memcpy(by_feature + (k + i * kStep) * columns + c * kStep, &block[i], sizeof(R));
      }
    if (!wants_keys()) return;
    static constexpr E kZeros[kColumns] = {};
    for (int64_t row = 0; row < in; row += kStep) {
      bool there[kStep];
      for (int64_t i = 0; i < kStep; ++i)
        there[i] = row + i < in && is_present(index(call, rows, panel * kColumns + row + i));
      for (int64_t k = 0; k < d_; k += kColumns) {
        const int64_t given = std::min(kColumns, d_ - k), width = divide_up(given, kLane) * kLane;
        E* const out = call.buffers.by_query + k * rows_ + (panel * kColumns + row) * width;
        const Storage* const from = queries + row * d_ + k;
        if constexpr (kStep > 1)
          interleave(out, there[0] ? from : kZeros, there[1] ? from + d_ : kZeros, given);
        else if (there[0])
          widen_run(out, from, given, in_place() ? scale_ : S(1));
        else
          std::fill_n(out, given, E{});
        std::fill(out + given * kStep, out + width * kStep, E{});
      }
    }
  }

  // Loads a register from `count` values, kStep in each lane, padded with zeros.
  static R steps_of(const E* from, int64_t count) {
    R values = {};
    if (count >= kLane * kStep)
      std::memcpy(&values, from, sizeof values);
    else
      std::memcpy(&values, from, count * sizeof(E));
    return values;
  }
  // The same for values of another type.
  template <class Other>
  static R steps_of(const Other* from, int64_t count) {
    E wide[kLane * kStep];
    const int64_t given = std::min(count, kLane * kStep);
    widen_run(wide, from, given);
    return steps_of(wide, given);
  }

  // Converts a block's keys to the layouts of the products, where the tensor does not have them.
  void pack_keys(const Call& call, int64_t block) const {
    with_storage([&](auto storage) {
      pack_keys(call, block,
                problem_.keys.template as<decltype(storage)>() + (call.entry * n_ + block * kBlockKeys) * d_);
    });
  }
  template <class Storage>
  void pack_keys(const Call& call, int64_t block, const Storage* keys) const {
    const int64_t first = block * kBlockKeys, count = keys_of(block);
    if (!reads_keys_in_place())
      for (int64_t key = 0; key < count; ++key) {
        to_padded_elements(call.buffers.keys + (first + key) * depth_, keys + key * d_, d_);
      }
    if constexpr (kStep > 1)
      for (int64_t key = 0; multiplies_pairs() && key < count; key += 2) {
        E* const to = call.buffers.key_pairs + (first + key) * d_;
        if (key + 1 < count) {
          interleave(to, keys + key * d_, keys + (key + 1) * d_, d_);
          continue;
        }
        for (int64_t i = 0; i < 2 * d_; ++i) to[i] = i % 2 == 0 ? keys[key * d_ + i / 2] : E{};
      }
  }

  S* scores_of(const Call& call, const Rows& rows, int64_t chunk, int64_t block, int64_t panel) const {
    const bool kept = is_kept(rows);
    const int64_t begin = kept ? first_block(rows) : chunk;
    const int64_t keys = kept ? padded_depth<E>(n_ - begin * kBlockKeys) : keys_of_chunk();
    S* const first = kept ? call.buffers.kept + kept_before(rows.first) : call.buffers.scores;
    return first + panel * kColumns * keys + (block - begin) * kBlockKeys * rows.columns(panel);
  }
  TileOfScores<S> tile_of(const Call& call, const Rows& rows, int64_t chunk, int64_t block, int64_t panel) const {
    const S* const bias = bias_of(call);
    return {.values = scores_of(call, rows, chunk, block, panel),
            .keys = keys_of(block),
            .columns = rows.columns(panel),
            .scale = scale_,
            .bias = bias == nullptr ? nullptr : bias + block * kBlockKeys};
  }
  // The sums of one block and panel.
  RowSums<S> stats_of(const Call& call, int64_t block, int64_t panel) const {
    const int64_t at = (block * panels_ + panel) * kColumns;
    const RowSums<S>& all = call.buffers.stats;
    return {all.maxima + at, all.sums + at, all.moments + at, all.counts + at};
  }
  RowSums<S> column_stats_of(const Call& call, int64_t block, int64_t panel) const {
    const int64_t at = panel * padded_keys() + block * kBlockKeys;
    const RowSums<S>& all = call.buffers.of_panels;
    return {all.maxima + at, all.sums + at, all.moments + at, all.counts + at};
  }

  void score_positives(const Call& call, const Rows& rows) const {
    each(call.packers, rows.panels(), [&](int64_t panel) { score_positives(call, rows, panel); });
  }

  // Computes the dot products of a panel's queries with their positives, and the thresholds of their ranks.
  void score_positives(const Call& call, const Rows& rows, int64_t panel) const {
    const auto* const thresholds = problem_.thresholds.template as<const S>();
    for (int64_t c = 0; c < rows.columns(panel); c += kLane) {
      const int64_t first = panel * kColumns + c, count = std::clamp<int64_t>(rows.count - first, 0, kLane);
      for (int64_t j = 0; n_ > 0 && count > 0 && j < places_; ++j) multiply_positives(call, rows, first, count, j);
      for (int64_t i = 0; i < kLane; ++i) {
        S& best = call.buffers.bests[kept_row(rows, first + i)];
        best = kInfinity<S>;
        if (i < count)
          best = thresholds != nullptr && places_ == 0 ? thresholds[index(call, rows, first + i)]
                                                       : outcome(call, rows, first + i, {}).best();
        if (problem_.symmetric)
          call.buffers.present[rows.first + first + i] = i < count && is_present(index(call, rows, first + i));
      }
    }
  }

  // Computes the dot products of a register's queries with their positives at place j. Every lane is the same chain
  // over a part's features as in multiply(), so that equal keys have equal scores.
  void multiply_positives(const Call& call, const Rows& rows, int64_t first, int64_t count, int64_t j) const {
    const int64_t panel = first / kColumns, columns = rows.columns(panel);
    const E* const by_feature = call.buffers.by_feature + panel * kColumns * depth_ + first % kColumns * kStep;
    const E* keys[kLane];
    for (int64_t i = 0; i < kLane; ++i)  // Any key serves where there is no positive: the product is not used.
      keys[i] = call.keys + std::max<int64_t>(positives(call, rows, first + std::min(i, count - 1)).key(j), 0) * depth_;
    R dots = {};
    for (int64_t part = 0; part < parts(); ++part) {
      R sums = {};
      const int64_t end = begin_of_part(part + 1);
      for (int64_t k = begin_of_part(part); k < end; k += kLane * kStep) {
        R block[kLane];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLane; ++i) block[i] = steps_of(keys[i] + k, end - k);
        transpose<S>(block);
        const E* const queries = by_feature + k * columns;
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLane; ++i) {
          if (k + i * kStep >= end) break;
          R query;
          std::memcpy(&query, queries + i * kStep * columns, sizeof query);
          sums = multiply_add<E>(sums, block[i], query);
        }
      }
      dots = part > 0 ? sums + dots : sums;
    }
    for (int64_t i = 0; i < count; ++i) call.buffers.dots[kept_row(rows, first + i) * places_ + j] = dots[i];
  }

  enum class Pass { first, again };

  // Computes the scores of a chunk's blocks, marks the keys that are left out, and sums them up.
  void score(const Call& call, const Rows& rows, int64_t chunk, Pass pass) const {
    const int64_t count = chunk_end(chunk) - chunk, panels = rows.panels();
    each(call.threads, count * panels, [&](int64_t task) {
      const int64_t block = chunk + task / panels, panel = task % panels;
      TileOfScores<S> tile = tile_of(call, rows, chunk, block, panel);
      if (is_out_of_range(call, rows, block, panel)) {
        std::fill_n(tile.values, tile.keys * tile.columns, kLeftOut<S>);
      } else {
        multiply(call, rows, block, panel, tile.values);
        tile.marked = leave_out(call, rows, block, panel, tile);
      }
      sum_up(call, rows, block, panel, tile, pass);
    });
  }

  void multiply(const Call& call, const Rows& rows, int64_t block, int64_t panel, S* scores) const {
    const int64_t keys = keys_of(block), columns = rows.columns(panel);
    const E* const by_feature = call.buffers.by_feature + panel * kColumns * depth_;
    for (int64_t part = 0; part < parts(); ++part) {
      const int64_t begin = begin_of_part(part), depth = begin_of_part(part + 1) - begin;
      for (int64_t key = 0; key < keys; key += kTileRows)
        with_tile(std::min<int64_t>(kTileRows, keys - key), rows.vectors(panel), [&](auto count, auto vectors) {
          Tile<E, count, vectors> tile;
          tile.clear();
          const E* const left = call.keys + (block * kBlockKeys + key) * depth_ + begin;
          tile.multiply([left, pitch = depth_](int r, int64_t k) { return left + r * pitch + k; },
                        by_feature + begin * columns, depth);
          S* const to = scores + key * columns;
          if (part > 0) add(tile, to, columns);
          tile.store(to, columns);
        });
    }
  }

  void sum_up(const Call& call, const Rows& rows, int64_t block, int64_t panel, const TileOfScores<S>& tile,
              Pass pass) const {
    const RowSums<S> stats = stats_of(call, block, panel);
    const S* const bests = call.buffers.bests + kept_row(rows, panel * kColumns);
    const bool first = pass == Pass::first;
    if (problem_.symmetric && first)
      sum_columns<false>(tile, call.buffers.present + rows.first + panel * kColumns,
                         column_stats_of(call, block, panel));
    if (problem_.self_contrast && first && block >= end_of_own(rows))
      sum_columns<true>(tile, call.buffers.bests + block * kBlockKeys, column_stats_of(call, block, panel));
    for (int64_t c = 0; c < tile.columns; c += kLane) {
      if (two_ways()) {
        if (first) exponentiate<true, false>(tile, c, bests, stats);
      } else if (sigmoid()) {
        first ? logistics<true>(tile, c, bests, stats) : logistics<false>(tile, c, bests, stats);
      } else {
        first ? exponentiate<true, true>(tile, c, bests, stats) : exponentiate<false, true>(tile, c, bests, stats);
      }
    }
  }

  // Adds sums in memory to a tile.
  template <int Count, int Vectors>
  static void add(Tile<E, Count, Vectors>& tile, const S* from, int64_t pitch) {
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) tile.sums[r][v] += load_register(from + r * pitch + v * kLane);
  }

  // --- Leaving out keys ---

  // Whether the ranges of a panel's queries exclude all keys of a block.
  bool is_out_of_range(const Call& call, const Rows& rows, int64_t block, int64_t panel) const {
    if (problem_.key_range.ndim == 0) return false;
    const int64_t first = block * kBlockKeys, last = first + keys_of(block);
    const int64_t* const ranges = problem_.key_range.template as<int64_t>() + 2 * index(call, rows, panel * kColumns);
    for (int64_t c = 0; c < rows.in(panel); ++c)
      if (std::max(ranges[2 * c], first) < std::min(ranges[2 * c + 1], last)) return false;
    return true;
  }

  // Marks the keys that are left out. Returns whether there may be any.
  bool leave_out(const Call& call, const Rows& rows, int64_t block, int64_t panel, const TileOfScores<S>& tile) const {
    const int64_t begin = block * kBlockKeys, in = rows.in(panel);
    bool some = problem_.key_range.ndim != 0 || problem_.contrast != Groups::all;
    const int64_t row = index(call, rows, panel * kColumns);
    for (int64_t c = 0; c < in; c += kLane) {
      const int64_t count = std::min(kLane, in - c);
      if (problem_.key_range.ndim != 0) {
        const int64_t* const ranges = problem_.key_range.template as<int64_t>() + 2 * (row + c);
        int64_t begins[kLane] = {}, ends[kLane] = {};
        for (int64_t i = 0; i < count; ++i) {
          begins[i] = ranges[2 * i] - begin;
          ends[i] = ranges[2 * i + 1] - begin;
        }
        leave_out_of_range(tile, c, begins, ends);
      }
      if (problem_.contrast != Groups::all)
        leave_out_groups(tile, c, LaneGroups<S>(problem_.query_groups.template as<int64_t>() + row + c, count),
                         problem_.key_groups.template as<int64_t>() + call.entry * n_ + begin,
                         problem_.contrast == Groups::other);
    }
    const auto mark = [&](int64_t key, int64_t c) {
      tile.values[key * tile.columns + c] = kLeftOut<S>;
      some = true;
    };
    each_positive(call, rows, block, panel, [&](int64_t key, int64_t c, int64_t) { mark(key, c); });
    const int64_t excluded = problem_.excluded();
    const auto* const exclude = problem_.exclude.template as<const int64_t>();
    for (int64_t c = 0; excluded > 0 && c < in; ++c)
      for (int64_t j = 0; j < excluded; ++j) {
        const int64_t key = exclude[(row + c) * excluded + j] - begin;
        if (key >= 0 && key < tile.keys) mark(key, c);
      }
    return some;
  }

  // Calls use(key, column, place) for the positives of a panel's queries that are a block's keys.
  template <class Use>
  void each_positive(const Call& call, const Rows& rows, int64_t block, int64_t panel, const Use& use) const {
    const int64_t first_key = block * kBlockKeys, first_row = rows.first + panel * kColumns;
    if (problem_.targets.ndim == 0) {
      if (places_ == 0) return;
      const int64_t begin = std::max(first_key, first_row),
                    end = std::min(first_key + keys_of(block), first_row + rows.in(panel));
      for (int64_t i = begin; i < end; ++i) use(i - first_key, i - first_row, 0);
      return;
    }
    for (int64_t c = 0; c < rows.in(panel); ++c) {
      const PositivesOfRow<S> own = positives(call, rows, panel * kColumns + c);
      for (int64_t j = 0; j < places_; ++j)
        if (own.key(j) >= first_key && own.key(j) < first_key + keys_of(block)) use(own.key(j) - first_key, c, j);
    }
  }

  // --- From sums to losses and weights ---

  Outcome<S, PositivesOfRow<S>> outcome(const Call& call, const Rows& rows, int64_t row,
                                        const Rivals<S>& rivals) const {
    return {problem_.measure, rivals, positives(call, rows, row)};
  }

  // Computes losses from the blocks' sums, and the factors from powers to the gradients' weights.
  void finish_rows(const Call& call, const Rows& rows, int64_t panel) const {
    const Buffers& b = call.buffers;
    const int64_t pitch = panels_ * kColumns;
    for (int64_t c = 0; c < rows.columns(panel); c += kLane) {
      const int64_t at = panel * kColumns + c;
      R largest = R{} - kLargest<S>, sum = {}, moment = {};
      int64_t reached_by[kLane] = {};  // Integers, as there may be more keys than a float can count.
      const auto each_part = [&](const auto& use) {
        if (problem_.self_contrast) use(b.columns, rows.first + at);
        for (int64_t block = first_block(rows); block < blocks_; ++block) use(b.stats, block * pitch + at);
      };
      each_part([&](const RowSums<S>& part, int64_t i) {
        const R v = load_register(part.maxima + i);
        largest = v > largest ? v : largest;
      });
      each_part([&](const RowSums<S>& part, int64_t i) {
        const R share = exp(load_register(part.maxima + i) - largest);
        sum += load_register(part.sums + i) * share;
        moment += load_register(part.moments + i) * share;
        for (int64_t lane = 0; lane < kLane; ++lane) reached_by[lane] += static_cast<int64_t>(part.counts[i + lane]);
      });
      R factors = {};  // From powers relative to the largest of all blocks to weights.
      for (int64_t i = 0; i < kLane && at + i < rows.count; ++i)
        factors[i] = finish_row(call, rows, at + i, {largest[i], sum[i], moment[i]}, reached_by[i]);
      if (problem_.wants_gradients() && !two_ways())
        share_out(call, panel, c, largest, sum, factors, rows.in(panel) - c);
    }
    for (int64_t c = 0; problem_.wants_gradients() && !two_ways() && c < rows.in(panel); ++c) {
      const PositivesOfRow<S> own = positives(call, rows, panel * kColumns + c);
      for (int64_t j = 0; j < places_; ++j)
        if (own.present(j) && b.weights[(panel * kColumns + c) * places_ + j] != 0)
          b.needed[own.key(j) / kBlockKeys * panels_ + panel] = 1;
    }
  }

  // Writes a row's results and returns the factor from its powers to its weights.
  S finish_row(const Call& call, const Rows& rows, int64_t row, const Rivals<S>& rivals, int64_t reached_by) const {
    const Buffers& b = call.buffers;
    const int64_t i = index(call, rows, row), kept = kept_row(rows, row);
    const PositivesOfRow<S> own = positives(call, rows, row);
    const Outcome<S, PositivesOfRow<S>> outcome{problem_.measure, rivals, own};
    if (problem_.losses.ndim != 0) {
      problem_.losses.template as<S>()[i] = outcome.loss();
      problem_.ranks.template as<int64_t>()[i] = reached_by;
    }
    if (problem_.slopes.ndim != 0) problem_.slopes.template as<S>()[i] = outcome.slope();
    if (problem_.bests.ndim != 0) problem_.bests.template as<S>()[i] = outcome.best();
    const S weight = weight_of_row(i);
    S factor = outcome.factor_of_rivals(weight);
    for (int64_t j = 0; j < places_; ++j)
      b.weights[kept * places_ + j] = own.present(j) ? outcome.weight_of_positive(j, weight) : S{};
    // The gradient of a bias is a sum of unrounded weights, so these need no balance.
    if (!two_ways() && !sigmoid() && !wants_bias()) factor *= balance(b.weights + kept * places_);
    if (two_ways()) {
      b.largest[kept] = rivals.largest;
      b.of_rows[kept] = factor;
    }
    return factor;
  }

  // Rounds a row's weights of positives as the products do, and returns the factor of its rivals' weights that makes
  // all weights sum to zero again. Otherwise the component that all keys have in common, which may be far larger than
  // their differences, would remain in the gradients, with the same sign in every row.
  S balance(S* weights) const {
    if constexpr (kStep == 1) return 1;
    S exact = 0, rounded = 0;
    for (int64_t j = 0; j < places_; ++j) {
      exact += weights[j];
      weights[j] = widen(narrow<E>(weights[j]));
      rounded += weights[j];
    }
    // If the positives' weights nearly cancel, the rivals have hardly any weight, and the ratio means nothing.
    const S ratio = exact != 0 ? rounded / exact : S(1);
    return std::abs(ratio - 1) < S(1) / 64 ? ratio : S(1);
  }

  // Computes the factors of a register's rows for each block, and which blocks are needed: those that are not
  // contribute less, all together, than the precision of the sums.
  void share_out(const Call& call, int64_t panel, int64_t c, R largest, R sum, R factors, int64_t count) const {
    const Buffers& b = call.buffers;
    const R small = sigmoid() ? R{} : sum * (std::numeric_limits<S>::epsilon() / 8 / static_cast<S>(blocks_));
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t at = (block * panels_ + panel) * kColumns + c;
      const R share = exp(load_register(b.stats.maxima + at) - largest);
      store_register(b.factors + at, share * factors);
      const R mass = load_register(b.stats.sums + at) * share;
      char needed = 0;
      for (int64_t i = 0; i < std::min(kLane, count); ++i)
        needed |= factors[i] != factors[i] || (!(mass[i] <= small[i]) && factors[i] != 0);
      char& of_panel = b.needed[block * panels_ + panel];
      of_panel = c == 0 ? needed : of_panel | needed;
    }
  }

  // --- Columns of a symmetric contrast, and of a self-contrast ---

  void merge_columns_of(const Call& call, const Rows& rows, int64_t block) const {
    const RowSums<S>& all = call.buffers.columns;
    const int64_t at = block * kBlockKeys;
    const RowSums<S> to{all.maxima + at, all.sums + at, all.moments + at, all.counts + at};
    if (rows.first == 0) {
      std::fill_n(to.maxima, kBlockKeys, -kLargest<S>);
      for (S* const sums : {to.sums, to.moments, to.counts}) std::fill_n(sums, kBlockKeys, S{});
    }
    if (block < end_of_own(rows)) return;
    for (int64_t panel = 0; panel < rows.panels(); ++panel)
      merge_columns(kBlockKeys, column_stats_of(call, block, panel), to);
  }

  // Adds the columns' half to losses and slopes, and turns the columns' sums into factors from powers to weights.
  void finish_columns(const Call& call) const {
    const Buffers& b = call.buffers;
    for (int64_t key = 0; key < n_; ++key) {
      const Rows one{key, 1};
      const int64_t i = call.entry * m_ + key;
      const Outcome<S, PositivesOfRow<S>> column =
          outcome(call, one, 0, {b.columns.maxima[key], b.columns.sums[key], b.columns.moments[key]});
      const auto halve = [&](const TensorView& of_rows, S of_column) {
        if (of_rows.ndim == 0) return;
        S& value = of_rows.template as<S>()[i];
        value = (value + of_column) / 2;
      };
      halve(problem_.losses, column.loss());
      halve(problem_.slopes, column.slope());
      const S half = weight_of_row(i) / 2;
      b.columns.sums[key] = column.factor_of_rivals(half);
      b.weights[key] = b.weights[key] / 2 + column.weight_of_positive(0, half);
      b.of_rows[key] /= 2;
    }
  }

  // Whether a row has gradients and takes part in the columns of a symmetric contrast. In a self-contrast every row
  // does, as a key.
  bool is_present(int64_t row) const {
    if (problem_.self_contrast) return true;
    if (problem_.present.ndim != 0) return problem_.present.template as<const S>()[row] != 0;
    return weight_of_row(row) != 0;
  }
  S weight_of_row(int64_t row) const {
    return weight_of(row, static_cast<S>(problem_.factor), problem_.row_weights.template as<const S>());
  }

  // Turns powers, or dot products with two_ways(), into weights of the gradients. Weights that biases need too are
  // rounded only by add_to_bias().
  void weigh(const Call& call, const Rows& rows, int64_t chunk, int64_t block, int64_t panel) const {
    char& needed = call.buffers.needed[block * panels_ + panel];
    if (two_ways()) needed = 1;
    if (!needed) return;
    const TileOfScores<S> tile = tile_of(call, rows, chunk, block, panel);
    for (int64_t c = 0; c < tile.columns; c += kLane)
      problem_.self_contrast ? weigh_both_directions(call, rows, block, panel, tile, c)
      : problem_.symmetric   ? weigh_both_ways(call, rows, block, panel, tile, c)
                             : weigh_powers(call, block, panel, tile, c);
    if (problem_.self_contrast)
      weigh_positives_both_directions(call, rows, block, panel, tile);
    else
      each_positive(call, rows, block, panel, [&](int64_t key, int64_t c, int64_t j) {
        tile.values[key * tile.columns + c] = call.buffers.weights[kept_row(rows, panel * kColumns + c) * places_ + j];
      });
    if (!wants_bias()) round_weights(rows, panel, tile);
  }

  void weigh_powers(const Call& call, int64_t block, int64_t panel, const TileOfScores<S>& tile, int64_t c) const {
    const R factor = load_register(call.buffers.factors + (block * panels_ + panel) * kColumns + c);
    bool zeros = false;  // The powers of rows with a factor of 0 may be infinite or NaN.
    for (int64_t i = 0; i < kLane; ++i) zeros |= factor[i] == 0;
    for (int64_t key = 0; key < tile.keys; ++key) {
      S* const score = tile.values + key * tile.columns + c;
      const R weight = load_register(score) * factor;
      store_register(score, zeros ? (factor != R{} ? weight : R{}) : weight);
    }
  }

  void weigh_both_ways(const Call& call, const Rows& rows, int64_t block, int64_t panel, const TileOfScores<S>& tile,
                       int64_t c) const {
    const Buffers& b = call.buffers;
    const int64_t row = rows.first + panel * kColumns + c, first = block * kBlockKeys;
    const R largest = load_register(b.largest + row), of_row = load_register(b.of_rows + row),
            present = load_register(b.present + row);
    for (int64_t key = 0; key < tile.keys; ++key) {
      const R score = tile.score(tile.dots(key, c), key);
      const R weight = exp_below_zero(score - largest) * of_row +
                       exp_below_zero(score - b.columns.maxima[first + key]) * b.columns.sums[first + key];
      store_register(tile.values + key * tile.columns + c, present != R{} ? weight : R{});
    }
  }

  // Computes a pair's weight as query and key plus its weight in the other direction.
  void weigh_both_directions(const Call& call, const Rows& rows, int64_t block, int64_t panel,
                             const TileOfScores<S>& tile, int64_t c) const {
    const Buffers& b = call.buffers;
    const int64_t row = rows.first + panel * kColumns + c, first = block * kBlockKeys;
    const R largest = load_register(b.largest + row), of_row = load_register(b.of_rows + row);
    for (int64_t key = 0; key < tile.keys; ++key) {
      const R score = tile.score(tile.dots(key, c), key), factor = in_all_lanes(b.of_rows[first + key]);
      // Powers with a factor of 0 may be infinite or NaN.
      const R own = exp_below_zero(score - largest) * of_row;
      const R other = exp_below_zero(score - b.largest[first + key]) * factor;
      store_register(tile.values + key * tile.columns + c, (of_row != R{} ? own : R{}) + (factor != R{} ? other : R{}));
    }
  }

  // Adds the weights of positives, whose weights are still 0 because they are not rivals.
  void weigh_positives_both_directions(const Call& call, const Rows& rows, int64_t block, int64_t panel,
                                       const TileOfScores<S>& tile) const {
    const int64_t first_row = rows.first + panel * kColumns, first_key = block * kBlockKeys;
    const auto each_pair = [&](int64_t first, int64_t count, int64_t others, int64_t end, const auto& use) {
      for (int64_t i = 0; i < count; ++i) {
        const PositivesOfRow<S> own = positives(call, {first, count}, i);
        for (int64_t j = 0; j < places_; ++j)
          if (own.key(j) >= others && own.key(j) < end)
            use(i, own.key(j) - others, call.buffers.weights[(first + i) * places_ + j]);
      }
    };
    each_pair(first_row, rows.in(panel), first_key, first_key + tile.keys,
              [&](int64_t c, int64_t key, S weight) { tile.values[key * tile.columns + c] += weight; });
    each_pair(first_key, tile.keys, first_row, first_row + rows.in(panel),
              [&](int64_t key, int64_t c, S weight) { tile.values[key * tile.columns + c] += weight; });
  }

  // Where products take pairs, rounds a tile's weights in place, in two layouts for each pair of keys: its two rows, as
  // factors of queries, and these interleaved, as factors of keys. Weights of columns beyond the last query become
  // zeros.
  void round_weights(const Rows& rows, int64_t panel, const TileOfScores<S>& tile) const {
    if constexpr (kStep > 1)
      for (int64_t key = 0; key < tile.keys; key += 2) {
        S* const at = tile.values + key * tile.columns;
        E* const to = reinterpret_cast<E*>(at);
        R pair[2][kTileVectors];
        for (int64_t v = 0; v < tile.columns / kLane; ++v) {
          pair[0][v] = load_register(at + v * kLane);
          pair[1][v] = key + 1 < tile.keys ? load_register(at + tile.columns + v * kLane) : R{};
        }
        for (int64_t v = 0; v < tile.columns / kLane; ++v)
          round_pair(pair[0][v], pair[1][v], rows.in(panel) - v * kLane, to + v * kLane, tile.columns,
                     to + 2 * (tile.columns + v * kLane));
      }
  }

  void add_to_bias(const Call& call, const Rows& rows, int64_t chunk, int64_t block) const {
    S* const to = problem_.grad_bias.template as<S>() + call.entry * n_ + block * kBlockKeys;
    for (int64_t key = 0; key < keys_of(block); ++key) {
      R sum = {};
      for (int64_t panel = 0; panel < rows.panels(); ++panel) {
        if (!call.buffers.needed[block * panels_ + panel]) continue;
        const TileOfScores<S> tile = tile_of(call, rows, chunk, block, panel);
        for (int64_t c = 0; c < tile.columns; c += kLane) sum += tile.dots(key, c);
      }
      to[key] = (rows.first == 0 ? S{} : to[key]) + across_lanes<S>(sum, [](R a, R b) { return a + b; });
    }
    for (int64_t panel = 0; panel < rows.panels(); ++panel)
      if (call.buffers.needed[block * panels_ + panel])
        round_weights(rows, panel, tile_of(call, rows, chunk, block, panel));
  }

  // Adds a superblock's part to the gradient of a block's keys, for features [begin, end), in panels.
  void add_to_keys(const Call& call, const Rows& rows, int64_t chunk, int64_t block, int64_t begin, int64_t end) const {
    const int64_t keys = keys_of(block);
    for (int64_t k = begin; k < end; k += kColumns) {
      const int64_t width = std::min(kColumns, d_ - k), vectors = divide_up(width, kLane);
      const E* const by_query = call.buffers.by_query + k * rows_;
      for (int64_t key = 0; key < keys; key += kTileRows)
        with_tile(std::min<int64_t>(kTileRows, keys - key), vectors, [&](auto count, auto of_width) {
          Tile<E, count, of_width> tile;
          tile.clear();
          for (int64_t panel = 0; panel < rows.panels(); ++panel) {
            if (!call.buffers.needed[block * panels_ + panel]) continue;
            const int64_t columns = rows.columns(panel);
            // Each kStep rows of weights are followed by as many interleaved ones, see round_weights().
            const S* const weights = scores_of(call, rows, chunk, block, panel) + key * columns;
            const E* const left = reinterpret_cast<const E*>(weights);
            tile.multiply(
                [left, columns](int r, int64_t i) {
                  return left + (r / kStep * kStep * kStep + r % kStep) * columns + i;
                },
                by_query + panel * kColumns * of_width * kLane, padded_depth<E>(rows.in(panel)));
          }
          const int64_t at = (block * kBlockKeys + key) * d_ + k;
          if (!in_place() && !sums_keys_aside()) {
            S sums[kTileRows * kColumns];
            tile.store(sums, kColumns);
            return write_keys(call.entry * n_ * d_ + at, sums, count, width);
          }
          S* const to = call.grad_keys + at;
          const bool first = rows.first == 0 && !problem_.adds_to_keys;
          if (width == of_width * kLane) {
            if (!first) add(tile, to, d_);
            tile.store(to, d_);
          } else {
            S sums[kTileRows * kColumns];
            tile.store(sums, kColumns);
            for (int r = 0; r < count; ++r)
              for (int64_t j = 0; j < width; ++j)
                to[r * d_ + j] = (first ? S{} : to[r * d_ + j]) + sums[r * kColumns + j];
          }
        });
    }
  }

  // Writes the sums of `count` keys of a tile. Not inlined, because that would repeat the code for every size of tile.
  [[gnu::noinline]] void write_keys(int64_t at, const S* sums, int64_t count, int64_t width) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < width; c += kLane)
        narrow_lanes(problem_.grad_keys, at + r * d_ + c, load_register(sums + r * kColumns + c) * scale_, width - c);
  }

  // Adds a chunk's part to the queries' gradient, transposed, for tiles [first, last) of features and some panels.
  void add_to_queries(const Call& call, const Rows& rows, int64_t chunk, int64_t end, int64_t first, int64_t last,
                      int64_t first_panel, int64_t last_panel) const {
    const int64_t begin = first * kTileRows;
    alignas(64) S of_task[kMaxRows * kTaskTiles * kTileRows];
    const auto sums_of = [&](int64_t panel) {
      return sums_queries_aside() ? call.buffers.grad_queries + panel * kColumns * d_ + begin * rows.columns(panel)
                                  : of_task + panel * kColumns * kTaskTiles * kTileRows;
    };
    for (int64_t slice = chunk; slice < end; slice += kSliceBlocks)
      for (int64_t i = first; i < last; ++i)
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
          const int64_t k = i * kTileRows, columns = rows.columns(panel);
          S* const sums = sums_of(panel) + (k - begin) * columns;
          with_tile(std::min<int64_t>(kTileRows, d_ - k), rows.vectors(panel), [&](auto count, auto vectors) {
            Tile<E, count, vectors> tile;
            tile.clear();
            for (int64_t block = slice; block < std::min(end, slice + kSliceBlocks); ++block) {
              if (!call.buffers.needed[block * panels_ + panel]) continue;
              const E* const left = call.key_pairs + block * kBlockKeys * d_ + k * kStep;
              const S* const weights = scores_of(call, rows, chunk, block, panel);
              const E* const right = reinterpret_cast<const E*>(weights) + (kStep - 1) * kStep * columns;
              tile.multiply([left, d = d_](int r, int64_t key) { return left + key * d + r * kStep; }, right,
                            padded_depth<E>(keys_of(block)), kStep * kStep * vectors * kLane);
            }
            if (slice > first_block(rows)) add(tile, sums, columns);
            tile.store(sums, columns);
          });
        }
    if (end < blocks_) return;
    for (int64_t panel = first_panel; panel < last_panel; ++panel)
      write_queries(call, rows, panel, begin, std::min(d_, last * kTileRows), sums_of(panel));
  }

  // Writes features [begin, end) of a panel's queries from their sums, [features][columns].
  void write_queries(const Call& call, const Rows& rows, int64_t panel, int64_t begin, int64_t end,
                     const S* sums) const {
    const int64_t columns = rows.columns(panel);
    for (int64_t c = 0; c < rows.in(panel); c += kLane) {
      const int64_t row = panel * kColumns + c, count = std::min(kLane, rows.in(panel) - c);
      bool there[kLane];
      for (int64_t i = 0; i < count; ++i) there[i] = is_present(index(call, rows, row + i));
      for (int64_t k = begin; k < end; k += kLane) {
        const int64_t given = std::min(kLane, end - k);
        R block[kLane];
        if (given == kLane) {
#pragma GCC unroll 16
          for (int64_t i = 0; i < kLane; ++i) block[i] = load_register(sums + (k - begin + i) * columns + c);
        } else {
          for (int64_t i = 0; i < kLane; ++i)
            block[i] = i < given ? load_register(sums + (k - begin + i) * columns + c) : R{};
        }
        transpose<S>(block);
        for (int64_t i = 0; i < count; ++i) write_query(call, rows, row + i, there[i], k, given, block[i]);
      }
    }
  }

  // Features [k, k + count) of a query's gradient.
  void write_query(const Call& call, const Rows& rows, int64_t row, bool there, int64_t k, int64_t count,
                   R sums) const {
    if (problem_.self_contrast) {
      S values[kLane];
      store_register(values, in_place() ? sums * scale_ : sums);
      S* const to = call.grad_keys + (rows.first + row) * d_ + k;
      for (int64_t i = 0; i < count; ++i) to[i] = (rows.first == 0 ? S{} : to[i]) + values[i];
      return;
    }
    narrow_lanes(problem_.grad_queries, index(call, rows, row) * d_ + k, there ? sums * scale_ : R{}, count);
  }

  // Writes the first `count` lanes of a register, or all, to a gradient.
  void narrow_lanes(const TensorView& gradient, int64_t at, R values, int64_t count) const {
    with_storage([&](auto storage) {
      auto* const to = gradient.template as<decltype(storage)>() + at;
      if (count >= kLane) return narrow_register(to, values);
      S lanes[kLane];
      store_register(lanes, values);
      narrow(to, lanes, count);
    });
  }

  const Problem& problem_;
  int64_t m_, n_, d_;
  int64_t depth_;  // The number of features, padded to whole steps of a product's depth.
  int64_t places_;
  S scale_;
  int64_t blocks_;
  int64_t kept_rows_ = 0;
  int64_t rows_, panels_, chunk_blocks_;  // Sizes of a superblock. A chunk is the blocks of keys it takes at a time.
};

}  // namespace cpc::info_nce::cpu::CPC_ISA
