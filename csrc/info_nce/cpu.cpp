// InfoNCE on the CPU: from queries and keys to losses and, formed at once, both gradients.
// All keys: the scores of some hundred queries against all keys stay in the cache, transposed, a query a lane of a
// register. So the softmax needs no sums across lanes, and all three matrix products read keys and write their gradient
// where they lie; only the few queries are packed. Scores become powers relative to the largest of a block of keys at
// once, and probabilities when all blocks are known. Where the keys are too many for that, the scores of a part of them
// are computed again for the gradients. Sampled: dot products of gathered rows, and for the keys' gradient the pairs of
// query and key sorted by key.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "core/gemm.h"
#include "core/huge_pages.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "core/simd_math.h"
#include "core/workspace.h"
#include "info_nce/info_nce.h"
#include "info_nce/outcome.h"

namespace cpc::info_nce::cpu::CPC_ISA {
namespace {

using namespace cpc::CPC_ISA;

template <class Storage>
using SumOf = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

// Multiplications and additions of a nanosecond with the powers between the products, and of rows that are gathered.
constexpr double kContrastFlops = 24, kSampledFlops = 6;
// Nanoseconds that a query's feature takes to be packed, and a value to be converted.
constexpr double kPackNanoseconds = 1, kConvertNanoseconds = 0.25;

// Calls body(i) for every i in [0, n), on up to so many workers.
template <class Body>
void each(int threads, int64_t n, const Body& body) {
  if (threads > 1)
    parallel_for(n, [&](int64_t i, int) { body(i); }, threads);
  else
    for (int64_t i = 0; i < n; ++i) body(i);
}

template <class S, class Storage>
void widen_run(S* to, const Storage* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i]);
}

// --- All keys ---

// Keys whose scores are brought to one maximum, and which a task takes.
constexpr int64_t kBlockKeys = 8 * kTileRows;
// Blocks of keys that a tile of the queries' gradient goes through at a time, and features that one of scores does.
constexpr int64_t kSliceBlocks = 6, kDepthBlock = 320;
// Scores of a superblock of queries: what the cache that all cores share holds beside the keys.
constexpr int64_t kScoresBytes = int64_t{6} << 20;
// Queries of a superblock, at most, and where there are so many keys that it takes them part by part.
constexpr int64_t kMaxRows = 384, kMinRows = 96;
// Workers whom the rows' sums are not shared out to.
constexpr int64_t kFewWorkers = 4;
// Tiles of the queries' gradient that a task takes: three cache lines of a key.
constexpr int64_t kTaskTiles = 8;

template <class Storage>
class AllKeys {
  using S = SumOf<Storage>;
  using E = S;
  using R = Register<S>;
  static constexpr int64_t kLane = kLaneColumns<E>, kColumns = kTileColumns<E>;
  static constexpr bool kInPlace = std::is_same_v<S, Storage>;

 public:
  explicit AllKeys(const Problem& problem)
      : problem_(problem),
        m_(problem.rows()),
        n_(problem.keys_count()),
        d_(problem.dim()),
        blocks_(divide_up(n_, kBlockKeys)) {
    const int64_t row_bytes = n_ * static_cast<int64_t>(sizeof(S));
    rows_ = std::min(kScoresBytes / std::max<int64_t>(row_bytes, 1), kMaxRows);
    chunk_blocks_ = blocks_;
    if (rows_ < kMinRows) {
      rows_ = kMaxRows;
      chunk_blocks_ =
          kScoresBytes / (rows_ * kBlockKeys * static_cast<int64_t>(sizeof(S))) / kSliceBlocks * kSliceBlocks;
    }
    rows_ = std::max(rows_ / kColumns * kColumns, kColumns);
    rows_ = std::min(rows_, divide_up(m_, kLane) * kLane);
    panels_ = divide_up(rows_, kColumns);
  }

  int64_t workspace() const {
    Parts parts(nullptr);
    Buffers(parts, *this);
    return parts.used();
  }

  // Nanoseconds that a batch entry takes.
  double nanoseconds() const {
    const int products = 1 + wants_queries() + wants_keys();
    return products * 2. * static_cast<double>(m_ * d_) * static_cast<double>(n_) / kContrastFlops;
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
              .grad_keys = nullptr};
    const Storage* const keys = problem_.keys.template as<Storage>() + entry * n_ * d_;
    if constexpr (kInPlace) {
      call.keys = keys;
      if (wants_keys()) call.grad_keys = problem_.grad_keys.template as<S>() + entry * n_ * d_;
    } else {
      each(call.converters, blocks_, [&](int64_t block) {
        const int64_t first = block * kBlockKeys * d_, count = keys_of(block) * d_;
        widen_run(call.buffers.keys + first, keys + first, count);
      });
      call.keys = call.buffers.keys;
      call.grad_keys = call.buffers.grad_keys;
    }
    const auto rows_at = [&](int64_t first) { return Rows{first, std::clamp<int64_t>(m_ - first, 0, rows_)}; };
    pack_queries(call, rows_at(0));
    for (int64_t first = 0; first < m_; first += rows_) superblock(call, rows_at(first), rows_at(first + rows_));
    if (!wants_keys()) return;
    if (m_ == 0) std::fill_n(problem_.grad_keys.template as<Storage>() + entry * n_ * d_, n_ * d_, Storage{});
    if constexpr (!kInPlace)
      each(call.converters, m_ == 0 ? 0 : blocks_, [&](int64_t block) {
        const int64_t at = block * kBlockKeys * d_;
        narrow(problem_.grad_keys.template as<Storage>() + entry * n_ * d_ + at, call.grad_keys + at,
               keys_of(block) * d_);
      });
  }

 private:
  bool wants_queries() const { return problem_.grad_queries.ndim != 0; }
  bool wants_keys() const { return problem_.grad_keys.ndim != 0; }
  int64_t keys_of(int64_t block) const { return std::min(kBlockKeys, n_ - block * kBlockKeys); }

  struct Buffers {
    S* scores;            // [panels][keys of a chunk][columns]: scores, then powers, then weights of the gradients.
    S* by_feature;        // [panels][D][columns]: scaled queries, to multiply keys with.
    S* by_query;          // [panels of features][rows][columns]: the same, to multiply weights with.
    S* grad_queries;      // [panels][D][columns]
    S *maxima, *sums;     // [blocks][rows]: of a block's scores, without the positive's.
    S* factors;           // [blocks][rows]: from powers to weights.
    S* positives;         // [rows]
    S* targets_weight;    // [rows]: the positive's.
    char* needed;         // [blocks][panels]: whether weights are more than zeros to the sums' precision.
    S *keys, *grad_keys;  // [N][D], where the tensors are of another type.

    Buffers(Parts& parts, const AllKeys& a) {
      const bool gradients = a.problem_.wants_gradients();
      scores = parts.take<S>(a.panels_ * kColumns * std::min(a.chunk_blocks_ * kBlockKeys, a.n_));
      by_feature = parts.take<S>(a.panels_ * kColumns * a.d_);
      by_query = parts.take<S>(a.wants_keys() ? divide_up(a.d_, kColumns) * kColumns * a.rows_ : 0);
      grad_queries = parts.take<S>(a.wants_queries() ? a.panels_ * kColumns * a.d_ : 0);
      const int64_t padded = a.panels_ * kColumns;
      maxima = parts.take<S>(a.blocks_ * padded);
      sums = parts.take<S>(a.blocks_ * padded);
      factors = parts.take<S>(gradients ? a.blocks_ * padded : 0);
      positives = parts.take<S>(padded);
      targets_weight = parts.take<S>(padded);
      needed = parts.take<char>(a.blocks_ * a.panels_);
      keys = parts.take<S>(kInPlace ? 0 : a.n_ * a.d_);
      grad_keys = parts.take<S>(kInPlace || !a.wants_keys() ? 0 : a.n_ * a.d_);
    }
  };

  struct Call {
    int64_t entry;
    int threads;              // For a product of a superblock.
    int packers, converters;  // To pack its queries, to convert all keys.
    Buffers buffers;
    const S* keys;
    S* grad_keys;
  };

  // Some queries: `count` of them from `first` on.
  struct Rows {
    int64_t first, count;
    int64_t panels() const { return divide_up(count, kColumns); }
    int64_t in(int64_t panel) const { return std::min(kColumns, count - panel * kColumns); }
    int64_t vectors(int64_t panel) const { return divide_up(in(panel), kLane); }
    int64_t columns(int64_t panel) const { return vectors(panel) * kLane; }
  };

  int64_t target_of(const Call& call, int64_t row) const {
    return problem_.targets.ndim == 0 ? row : problem_.targets.template as<int64_t>()[call.entry * m_ + row];
  }

  // Few parallel loops, as at the end of each all workers wait for the last. The next queries are packed beside the
  // last product of these, which does not need what these were packed to.
  void superblock(const Call& call, const Rows& rows, const Rows& next) const {
    for (int64_t chunk = 0; chunk < blocks_; chunk += chunk_blocks_) score(call, rows, chunk);
    // Little work, not worth another loop but for many.
    each(workers() > kFewWorkers ? call.threads : 1, rows.panels(),
         [&](int64_t panel) { finish_rows(call, rows, panel); });
    if (!problem_.wants_gradients()) return pack_queries(call, next);
    for (int64_t chunk = 0; chunk < blocks_; chunk += chunk_blocks_) {
      if (chunk_blocks_ < blocks_) score(call, rows, chunk);
      const int64_t end = std::min(blocks_, chunk + chunk_blocks_);
      each(call.threads, end - chunk, [&](int64_t i) {
        weigh(call, rows, chunk, chunk + i);
        if (wants_keys()) add_to_keys(call, rows, chunk, chunk + i);
      });
      // A tile's part of the keys serves all panels while it is in the cache, unless that leaves workers idle.
      const int64_t tiles = divide_up(d_, kTileRows), groups = divide_up(tiles, kTaskTiles);
      const int64_t shares = groups >= 2 * call.threads || call.threads == 1 ? 1 : rows.panels();
      if (!wants_queries()) {
        if (end == blocks_) pack_queries(call, next);
        continue;
      }
      // Every task takes its part of both, as the first workers get the first tasks.
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
    const S scale = static_cast<S>(problem_.scale);
    const int64_t columns = rows.columns(panel), in = rows.in(panel);
    S* const by_feature = call.buffers.by_feature + panel * kColumns * d_;
    for (int64_t c = 0; c < columns; ++c) {
      if (c >= in) {
        for (int64_t k = 0; k < d_; ++k) by_feature[k * columns + c] = 0;
        continue;
      }
      const int64_t row = panel * kColumns + c;
      const Storage* const query = problem_.queries.template as<Storage>() + (call.entry * m_ + rows.first + row) * d_;
      for (int64_t k = 0; k < d_; ++k) by_feature[k * columns + c] = scale * widen(query[k]);
      if (!wants_keys()) continue;
      const bool counts = weight_of_row(call.entry * m_ + rows.first + row) != 0;
      for (int64_t k = 0; k < d_; k += kColumns) {
        const int64_t width = divide_up(std::min(kColumns, d_ - k), kLane) * kLane;
        S* const out = call.buffers.by_query + k * rows_ + row * width;
        for (int64_t j = 0; j < width; ++j) out[j] = counts && k + j < d_ ? scale * widen(query[k + j]) : S{};
      }
    }
  }

  S* scores_of(const Call& call, const Rows& rows, int64_t chunk, int64_t block, int64_t panel) const {
    const int64_t keys = std::min(chunk_blocks_ * kBlockKeys, n_);
    return call.buffers.scores + panel * kColumns * keys + (block - chunk) * kBlockKeys * rows.columns(panel);
  }

  // Scores of a chunk's blocks as powers relative to their largest.
  void score(const Call& call, const Rows& rows, int64_t chunk) const {
    const int64_t count = std::min(blocks_, chunk + chunk_blocks_) - chunk, panels = rows.panels();
    each(call.threads, count * panels, [&](int64_t task) {
      const int64_t block = chunk + task / panels, panel = task % panels, keys = keys_of(block);
      const int64_t columns = rows.columns(panel);
      S* const scores = scores_of(call, rows, chunk, block, panel);
      const S* const by_feature = call.buffers.by_feature + panel * kColumns * d_;
      const int64_t parts = std::max<int64_t>(divide_up(d_, kDepthBlock), 1);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = part * d_ / parts, depth = (part + 1) * d_ / parts - begin;
        for (int64_t key = 0; key < keys; key += kTileRows)
          with_tile(std::min<int64_t>(kTileRows, keys - key), rows.vectors(panel), [&](auto count, auto vectors) {
            Tile<E, count, vectors> tile;
            tile.clear();
            const S* const left = call.keys + (block * kBlockKeys + key) * d_ + begin;
            tile.multiply([left, d = d_](int r, int64_t k) { return left + r * d + k; }, by_feature + begin * columns,
                          depth);
            S* const to = scores + key * columns;
            if (part > 0) add(tile, to, columns);
            tile.store(to, columns);
          });
      }
      set_apart(call, rows, block, panel, scores);
      exponentiate(call, rows, block, panel, scores);
    });
  }

  // Adds what is in memory to a tile.
  template <int Count, int Vectors>
  static void add(Tile<E, Count, Vectors>& tile, const S* from, int64_t pitch) {
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) tile.sums[r][v] += load_register(from + r * pitch + v * kLane);
  }

  // Takes the positives' scores out of a block, and those that are excluded.
  void set_apart(const Call& call, const Rows& rows, int64_t block, int64_t panel, S* scores) const {
    const int64_t begin = block * kBlockKeys, keys = keys_of(block), columns = rows.columns(panel);
    for (int64_t c = 0; c < rows.in(panel); ++c) {
      const int64_t row = panel * kColumns + c;
      const int64_t target = target_of(call, rows.first + row) - begin;
      if (target >= 0 && target < keys) {
        call.buffers.positives[row] = scores[target * columns + c];
        scores[target * columns + c] = -kInfinity<S>;
      }
      if (problem_.exclude.ndim == 0) continue;
      const int64_t left_out = problem_.exclude.template as<int64_t>()[call.entry * m_ + rows.first + row] - begin;
      if (left_out >= 0 && left_out < keys) scores[left_out * columns + c] = -kInfinity<S>;
    }
  }

  // Scores to powers of e relative to the largest, and their sums.
  void exponentiate(const Call& call, const Rows& rows, int64_t block, int64_t panel, S* scores) const {
    const int64_t keys = keys_of(block), columns = rows.columns(panel);
    const int64_t stats = block * panels_ * kColumns + panel * kColumns;
    for (int64_t c = 0; c < columns; c += kLane) {
      R largest = R{} - kInfinity<S>, sum = {};
      for (int64_t key = 0; key < keys; ++key) {
        const R v = load_register(scores + key * columns + c);
        largest = v > largest ? v : largest;
      }
      largest = finite<S>(largest);
      for (int64_t key = 0; key < keys; ++key) {
        const R v = exp_below_zero(load_register(scores + key * columns + c) - largest);
        sum += v;
        store_register(scores + key * columns + c, v);
      }
      store_register(call.buffers.maxima + stats + c, largest);
      store_register(call.buffers.sums + stats + c, sum);
    }
  }

  // From the blocks' maxima and sums to losses, and to the factors between powers and the gradients' weights.
  void finish_rows(const Call& call, const Rows& rows, int64_t panel) const {
    const Buffers& b = call.buffers;
    const int64_t pitch = panels_ * kColumns, in = rows.in(panel);
    for (int64_t c = 0; c < rows.columns(panel); c += kLane) {
      const int64_t at = panel * kColumns + c;
      R largest = R{} - kLargest<S>, sum = {};
      for (int64_t block = 0; block < blocks_; ++block) {
        const R v = load_register(b.maxima + block * pitch + at);
        largest = v > largest ? v : largest;
      }
      for (int64_t block = 0; block < blocks_; ++block)
        sum += load_register(b.sums + block * pitch + at) * exp(load_register(b.maxima + block * pitch + at) - largest);
      R factors = {};  // From powers relative to the largest of all blocks to weights.
      for (int64_t i = 0; i < kLane && c + i < in; ++i) {
        const int64_t row = call.entry * m_ + rows.first + at + i;
        const Outcome<S> outcome{b.positives[at + i], largest[i], sum[i]};
        if (problem_.losses.ndim != 0) {
          problem_.losses.template as<S>()[row] = outcome.loss();
          problem_.right.template as<S>()[row] = outcome.right();
        }
        factors[i] = outcome.factor_of_others(weight_of_row(row));
        b.targets_weight[at + i] = outcome.weight_of_positive(factors[i]);
      }
      if (!problem_.wants_gradients()) continue;
      // What all blocks below this leave out together is less than the sums resolve.
      const R small = sum * (std::numeric_limits<S>::epsilon() / 8 / static_cast<S>(blocks_));
      for (int64_t block = 0; block < blocks_; ++block) {
        const R share = exp(load_register(b.maxima + block * pitch + at) - largest);
        store_register(b.factors + block * pitch + at, share * factors);
        const R mass = load_register(b.sums + block * pitch + at) * share;
        char needed = 0;
        for (int64_t i = 0; i < kLane && c + i < in; ++i) needed |= !(mass[i] <= small[i]) && factors[i] != 0;
        char& of_panel = b.needed[block * panels_ + panel];
        of_panel = c == 0 ? needed : of_panel | needed;
      }
    }
    for (int64_t c = 0; problem_.wants_gradients() && c < in; ++c) {
      const int64_t block = target_of(call, rows.first + panel * kColumns + c) / kBlockKeys;
      b.needed[block * panels_ + panel] |= b.targets_weight[panel * kColumns + c] != 0;
    }
  }

  S weight_of_row(int64_t row) const {
    return weight_of(row, static_cast<S>(problem_.factor), problem_.row_weights.template as<const S>());
  }

  // Powers to weights of the gradients.
  void weigh(const Call& call, const Rows& rows, int64_t chunk, int64_t block) const {
    const int64_t keys = keys_of(block), begin = block * kBlockKeys;
    for (int64_t panel = 0; panel < rows.panels(); ++panel) {
      if (!call.buffers.needed[block * panels_ + panel]) continue;
      const int64_t columns = rows.columns(panel), at = panel * kColumns;
      S* const scores = scores_of(call, rows, chunk, block, panel);
      for (int64_t c = 0; c < columns; c += kLane) {
        const R factor = load_register(call.buffers.factors + block * panels_ * kColumns + at + c);
        bool zeros = false;  // The powers of such rows may be anything.
        for (int64_t i = 0; i < kLane; ++i) zeros |= factor[i] == 0;
        for (int64_t key = 0; key < keys; ++key) {
          S* const score = scores + key * columns + c;
          const R weight = load_register(score) * factor;
          store_register(score, zeros ? (factor != R{} ? weight : R{}) : weight);
        }
      }
      for (int64_t c = 0; c < rows.in(panel); ++c) {
        const int64_t target = target_of(call, rows.first + at + c) - begin;
        if (target >= 0 && target < keys) scores[target * columns + c] = call.buffers.targets_weight[at + c];
      }
    }
  }

  // The part of a block's keys' gradient that comes from some queries.
  void add_to_keys(const Call& call, const Rows& rows, int64_t chunk, int64_t block) const {
    const int64_t keys = keys_of(block);
    for (int64_t k = 0; k < d_; k += kColumns) {
      const int64_t width = std::min(kColumns, d_ - k), vectors = divide_up(width, kLane);
      const S* const by_query = call.buffers.by_query + k * rows_;
      for (int64_t key = 0; key < keys; key += kTileRows)
        with_tile(std::min<int64_t>(kTileRows, keys - key), vectors, [&](auto count, auto of_width) {
          Tile<E, count, of_width> tile;
          tile.clear();
          for (int64_t panel = 0; panel < rows.panels(); ++panel) {
            if (!call.buffers.needed[block * panels_ + panel]) continue;
            const int64_t columns = rows.columns(panel);
            const S* const left = scores_of(call, rows, chunk, block, panel) + key * columns;
            tile.multiply([left, columns](int r, int64_t i) { return left + r * columns + i; },
                          by_query + panel * kColumns * of_width * kLane, rows.in(panel));
          }
          S* const to = call.grad_keys + (block * kBlockKeys + key) * d_ + k;
          const bool first = rows.first == 0;
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

  // The part of the queries' gradient, transposed, that comes from a chunk: tiles of features [first, last) of some
  // panels.
  void add_to_queries(const Call& call, const Rows& rows, int64_t chunk, int64_t end, int64_t first, int64_t last,
                      int64_t first_panel, int64_t last_panel) const {
    for (int64_t slice = chunk; slice < end; slice += kSliceBlocks)
      for (int64_t i = first; i < last; ++i)
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
          const int64_t k = i * kTileRows, columns = rows.columns(panel);
          S* const sums = call.buffers.grad_queries + panel * kColumns * d_ + k * columns;
          with_tile(std::min<int64_t>(kTileRows, d_ - k), rows.vectors(panel), [&](auto count, auto vectors) {
            Tile<E, count, vectors> tile;
            tile.clear();
            for (int64_t block = slice; block < std::min(end, slice + kSliceBlocks); ++block) {
              if (!call.buffers.needed[block * panels_ + panel]) continue;
              const S* const left = call.keys + block * kBlockKeys * d_ + k;
              tile.multiply([left, d = d_](int r, int64_t key) { return left + key * d + r; },
                            scores_of(call, rows, chunk, block, panel), keys_of(block));
            }
            if (slice > 0) add(tile, sums, columns);
            tile.store(sums, columns);
          });
        }
    if (end < blocks_) return;
    for (int64_t panel = first_panel; panel < last_panel; ++panel)
      write_queries(call, rows, panel, first * kTileRows, std::min(d_, last * kTileRows));
  }

  void write_queries(const Call& call, const Rows& rows, int64_t panel, int64_t begin, int64_t end) const {
    const int64_t columns = rows.columns(panel);
    const S* const sums = call.buffers.grad_queries + panel * kColumns * d_;
    const S scale = static_cast<S>(problem_.scale);
    for (int64_t c = 0; c < rows.in(panel); ++c) {
      Storage* const to =
          problem_.grad_queries.template as<Storage>() + (call.entry * m_ + rows.first + panel * kColumns + c) * d_;
      const bool counts = weight_of_row(call.entry * m_ + rows.first + panel * kColumns + c) != 0;
      for (int64_t k = begin; k < end; ++k) to[k] = counts ? narrow<Storage>(scale * sums[k * columns + c]) : Storage{};
    }
  }

  const Problem& problem_;
  int64_t m_, n_, d_, blocks_;
  int64_t rows_, panels_, chunk_blocks_;  // Sizes of a superblock; a chunk is the blocks of keys it takes at a time.
};

// --- Sampled negatives ---

// Queries or keys of a task, and registers that sums over gathered rows are held in at a time.
constexpr int64_t kTaskRows = 16;
constexpr int kSumVectors = 8;

template <class Storage>
class Sampled {
  using S = SumOf<Storage>;
  using R = Register<S>;
  static constexpr int64_t kLane = kRegisterLanes<S>;
  static constexpr bool kInPlace = std::is_same_v<S, Storage>;

 public:
  explicit Sampled(const Problem& problem)
      : problem_(problem),
        d_(problem.dim()),
        pairs_(problem.samples() + 1),
        queries_(problem.batch() * problem.rows()),
        keys_(problem.batch() * problem.keys_count()) {}

  int64_t workspace() const {
    Parts parts(nullptr);
    Buffers(parts, *this);
    return parts.used();
  }

  void run(char* memory) const {
    Parts parts(memory);
    Buffers b(parts, *this);
    const int threads =
                  workers_for(2. * static_cast<double>(queries_ * pairs_) * static_cast<double>(d_) / kSampledFlops),
              converters = workers_for(kConvertNanoseconds * static_cast<double>(std::max(queries_, keys_) * d_));
    const S *queries, *keys;
    if constexpr (kInPlace) {
      queries = problem_.queries.template as<S>();
      keys = problem_.keys.template as<S>();
    } else {
      each(converters, queries_,
           [&](int64_t i) { widen_run(b.queries + i * d_, problem_.queries.template as<Storage>() + i * d_, d_); });
      each(converters, keys_,
           [&](int64_t i) { widen_run(b.keys + i * d_, problem_.keys.template as<Storage>() + i * d_, d_); });
      queries = b.queries;
      keys = b.keys;
    }
    each(threads, divide_up(queries_, kTaskRows), [&](int64_t task) {
      for (int64_t row = task * kTaskRows; row < std::min(queries_, (task + 1) * kTaskRows); ++row)
        contrast(b, queries, keys, row);
    });
    if (problem_.grad_keys.ndim == 0) return;
    sort(b);
    each(threads, divide_up(keys_, kTaskRows), [&](int64_t task) {
      for (int64_t key = task * kTaskRows; key < std::min(keys_, (task + 1) * kTaskRows); ++key) {
        const int64_t begin = b.segments[key], count = b.segments[key + 1] - begin;
        sum_rows(problem_.grad_keys.template as<Storage>() + key * d_, count, [&](int64_t i) {
          const int64_t pair = b.order[begin + i];
          return std::pair(b.weights[pair], queries + pair / pairs_ * d_);
        });
      }
    });
  }

 private:
  struct Buffers {
    S* weights;         // [B * M, 1 + S]: of the gradients, the scale in them.
    int64_t* named;     // [B * M, 1 + S]: the keys, b * N + index.
    int64_t* order;     // Pairs of a query and a key, by key.
    int64_t* segments;  // [B * N + 1]: where each key's begin.
    S *queries, *keys;  // Where the tensors are of another type.

    Buffers(Parts& parts, const Sampled& a) {
      const bool sorts = a.problem_.grad_keys.ndim != 0;
      weights = parts.take<S>(a.queries_ * a.pairs_);
      named = parts.take<int64_t>(a.queries_ * a.pairs_);
      order = parts.take<int64_t>(sorts ? a.queries_ * a.pairs_ : 0);
      segments = parts.take<int64_t>(sorts ? a.keys_ + 2 : 0);
      queries = parts.take<S>(kInPlace ? 0 : a.queries_ * a.d_);
      keys = parts.take<S>(kInPlace ? 0 : a.keys_ * a.d_);
    }
  };

  S dot(const S* a, const S* b) const {
    constexpr int kChains = 4;
    R sums[kChains] = {};
    int64_t k = 0;
    for (; k + kChains * kLane <= d_; k += kChains * kLane)
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) sums[i] += load_register(a + k + i * kLane) * load_register(b + k + i * kLane);
    for (; k + kLane <= d_; k += kLane) sums[0] += load_register(a + k) * load_register(b + k);
    const R together = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    S total = 0;
    for (int64_t i = 0; i < kLane; ++i) total += together[i];
    for (; k < d_; ++k) total += a[k] * b[k];
    return total;
  }

  // out = sum over i < count of weight * row, of row_of(i) = (weight, row); rows of weight 0 may hold anything.
  template <class RowOf>
  void sum_rows(Storage* out, int64_t count, const RowOf& row_of) const {
    const auto columns = [&](auto vectors, int64_t k, int64_t width) {
      R sums[vectors] = {};
      for (int64_t i = 0; i < count; ++i) {
        const auto [weight, row] = row_of(i);
        if (weight == 0) continue;
        for (int v = 0; v < vectors; ++v) sums[v] += weight * load_register(row + k + v * kLane);
      }
      S narrowed[vectors * kLane];
      for (int v = 0; v < vectors; ++v) store_register(narrowed + v * kLane, sums[v]);
      narrow(out + k, narrowed, width);
    };
    int64_t k = 0;
    for (; k + kSumVectors * kLane <= d_; k += kSumVectors * kLane)
      columns(std::integral_constant<int, kSumVectors>{}, k, kSumVectors * kLane);
    for (; k + kLane <= d_; k += kLane) columns(std::integral_constant<int, 1>{}, k, kLane);
    for (; k < d_; ++k) {
      S sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        const auto [weight, row] = row_of(i);
        if (weight != 0) sum += weight * row[k];
      }
      out[k] = narrow<Storage>(sum);
    }
  }

  void contrast(const Buffers& b, const S* queries, const S* keys, int64_t row) const {
    const int64_t samples = pairs_ - 1, m = problem_.rows(), first = row / m * problem_.keys_count();
    const int64_t target = problem_.targets.ndim == 0 ? row % m : problem_.targets.template as<int64_t>()[row];
    const int64_t left_out = problem_.exclude.ndim == 0 ? -1 : problem_.exclude.template as<int64_t>()[row];
    const int64_t* const negatives = problem_.negatives.template as<int64_t>() + row * samples;
    const S scale = static_cast<S>(problem_.scale);
    const S* const query = queries + row * d_;
    S* const weights = b.weights + row * pairs_;
    int64_t* const named = b.named + row * pairs_;
    named[0] = first + target;
    const S positive = scale * dot(query, keys + named[0] * d_);
    Negatives<S> scores;
    for (int64_t s = 0; s < samples; ++s) {
      named[s + 1] = first + negatives[s];
      S& score = weights[s + 1];
      score = negatives[s] == left_out ? -kInfinity<S> : scale * dot(query, keys + named[s + 1] * d_);
      scores.add(score, negatives[s] != target && negatives[s] != left_out);
    }
    S sum = 0;
    for (int64_t s = 1; s < pairs_; ++s) sum += weights[s] = std::exp(weights[s] - scores.largest);
    const Outcome<S> outcome{positive, scores.largest, sum};
    if (problem_.losses.ndim != 0) {
      problem_.losses.template as<S>()[row] = outcome.loss();
      problem_.right.template as<S>()[row] = scores.right(positive);
    }
    if (!problem_.wants_gradients()) return;
    const auto* const row_weights = problem_.row_weights.template as<const S>();
    const S factor = outcome.factor_of_others(weight_of(row, static_cast<S>(problem_.factor), row_weights)) * scale;
    weights[0] = outcome.weight_of_positive(factor);
    for (int64_t s = 1; s < pairs_; ++s) weights[s] = factor == 0 ? S{} : weights[s] * factor;
    if (problem_.grad_queries.ndim != 0)
      sum_rows(problem_.grad_queries.template as<Storage>() + row * d_, pairs_,
               [&](int64_t i) { return std::pair(weights[i], keys + named[i] * d_); });
  }

  // The pairs by the key they name, those of a key in their own order.
  void sort(const Buffers& b) const {
    const int64_t count = queries_ * pairs_;
    int64_t* const begins = b.segments + 1;  // One further, until all are in place.
    std::fill_n(b.segments, keys_ + 2, 0);
    for (int64_t i = 0; i < count; ++i) ++begins[b.named[i] + 1];
    for (int64_t key = 0; key < keys_; ++key) begins[key + 1] += begins[key];
    for (int64_t i = 0; i < count; ++i) b.order[begins[b.named[i]]++] = i;
  }

  const Problem& problem_;
  int64_t d_, pairs_, queries_, keys_;
};

// Whether a batch's entries go to workers one each, rather than all workers to one after another.
bool shares_entries(const Problem& problem) { return problem.batch() > 1 && problem.batch() >= workers(); }

}  // namespace

int64_t workspace_bytes(const Problem& problem) {
  int64_t bytes = 0;
  with_floating(problem.queries.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if (problem.sampled())
      bytes = Sampled<Storage>(problem).workspace();
    else
      bytes = AllKeys<Storage>(problem).workspace() * (shares_entries(problem) ? workers() : 1);
  });
  return bytes;
}

void contrast(const Problem& problem) {
  for (const TensorView* written : {&problem.grad_queries, &problem.grad_keys, &problem.workspace})
    if (written->ndim != 0) advise_huge_pages(written->data, written->numel() * size_of(written->dtype));
  with_floating(problem.queries.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    char* const memory = problem.workspace.as<char>();
    if (problem.sampled()) return Sampled<Storage>(problem).run(memory);
    const AllKeys<Storage> all(problem);
    if (shares_entries(problem)) {
      const auto run = [&](int64_t entry, int worker) { all.run(entry, memory + worker * all.workspace(), false); };
      return parallel_for(problem.batch(), run, workers_for(static_cast<double>(problem.batch()) * all.nanoseconds()));
    }
    for (int64_t entry = 0; entry < problem.batch(); ++entry) all.run(entry, memory, true);
  });
}

}  // namespace cpc::info_nce::cpu::CPC_ISA
