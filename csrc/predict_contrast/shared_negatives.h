// The contrast of predictions whose negatives all steps share, on the CPU. A row's keys serve all of its predictions,
// so the row's operations are matrix products: scores are the product of keys and predictions, where each lane of a
// register is a step; the gradients of predictions are that of weights and keys; those of keys are that of the
// transposed weights and predictions. Included only by sources that are compiled once per instruction set level.
#pragma once

#include <algorithm>
#include <utility>

#include "core/gemm.h"
#include "core/parallel.h"
#include "core/shuffle.h"
#include "core/workspace.h"
#include "info_nce/all_keys.h"
#include "info_nce/scores.h"
#include "predict_contrast/predict_contrast.h"
#include "predict_contrast/products.h"

namespace cpc::predict_contrast::cpu::CPC_ISA {

using namespace cpc::CPC_ISA;

// Multiplications and additions per nanosecond, in products of gathered rows.
constexpr double kSharedFlops = 16;
// The most and the least rows that are contrasted together, and the bytes of their predictions, gradients and weights.
constexpr int64_t kMostRows = 32 * kTileRows, kLeastRows = 4 * kTileRows, kRowsBytes = int64_t{8} << 20;

template <class S>
class SharedNegatives {
  using R = Register<S>;
  static constexpr int64_t kLane = kLaneColumns<S>, kColumns = kTileColumns<S>;

 public:
  // `rows` is the most rows of a block.
  SharedNegatives(const Problem& problem, int64_t rows)
      : problem_(problem),
        rows_(rows),
        steps_(problem.steps()),
        lanes_(divide_up(steps_, kLane) * kLane),
        d_(problem.dim()),
        pitch_(divide_up(d_, kLane) * kLane),
        samples_(problem.samples()),
        scale_(static_cast<S>(problem.scale)) {}

  // Whether this class takes a problem. With few steps, most lanes of the scores' product would be idle; few negatives
  // are not worth the packing.
  static bool takes(const Problem& problem) {
    const int64_t steps = problem.steps();
    return problem.sampled() && problem.negatives.shape[0] == 1 && problem.samples() >= kTileRows &&
           3 * steps >= divide_up(steps, kLane) * kLane;
  }

  static int64_t most_rows(const Problem& problem) {
    const SharedNegatives a(problem, 0);
    const int64_t values = 2 * a.steps_ * a.pitch_ + a.samples_ * a.lanes_;
    return std::clamp(kRowsBytes / std::max<int64_t>(values * static_cast<int64_t>(sizeof(S)), 1), kLeastRows,
                      kMostRows);
  }

  struct Buffers {
    S* predictions;       // [rows][K][pitch]; those without gradients become zeros.
    int64_t* places;      // [rows][K]: the index of a prediction's gradient among those of its step.
    S* grad_predictions;  // [K][rows][D]: for every step, the rows that it uses.
    S* weights;           // [rows][S][lanes]: dot products, then powers, then weights of the gradients.
    S* of_positives;      // [rows][lanes]: dot products, then weights of the positives.
    S* of_workers;        // The buffers of each worker, see OfWorker.

    Buffers() = default;
    Buffers(Parts& parts, const SharedNegatives& a, bool wants_predictions) {
      predictions = parts.take<S>(a.rows_ * a.steps_ * a.pitch_);
      // One register more, because the last row is read in whole registers.
      grad_predictions = parts.take<S>(wants_predictions ? a.rows_ * a.steps_ * a.d_ + kLane : 0);
      places = parts.take<int64_t>(a.rows_ * a.steps_);
      weights = parts.take<S>(a.rows_ * a.samples_ * a.lanes_);
      of_positives = parts.take<S>(a.rows_ * a.lanes_);
      of_workers = parts.take<S>(workers() * a.values_of_worker());
    }
  };

  S* prediction(const Buffers& b, int64_t i, int64_t step) const {
    return b.predictions + (i * steps_ + step) * pitch_;
  }
  // The predictions of a step, for the indices `rows`, where the block begins at row `first`.
  Rows<S> predictions(const Buffers& b, int64_t step, const int64_t* rows, int64_t first) const {
    return {prediction(b, 0, step), steps_ * pitch_, rows, first};
  }
  int64_t& place(const Buffers& b, int64_t i, int64_t step) const { return b.places[i * steps_ + step]; }
  S* gradients(const Buffers& b, int64_t step) const { return b.grad_predictions + step * rows_ * d_; }

  // Contrasts the predictions of rows [first, end). `grad_keys` is null where it is not wanted.
  void run(const Buffers& b, const S* keys, S* grad_keys, bool wants_predictions, int64_t first, int64_t end) const {
    const Call call{b, keys, grad_keys, wants_predictions, first};
    const int64_t count = end - first;
    const double product = 2. * static_cast<double>(count * steps_) * static_cast<double>((samples_ + 1) * d_);
    const auto contrast_row = [&](int64_t i, int worker) {
      contrast(call, i, OfWorker(b.of_workers + worker * values_of_worker(), *this));
    };
    parallel_for(count, contrast_row, workers_for((wants_predictions ? 2 : 1) * product / kSharedFlops));
    if (grad_keys == nullptr || d_ == 0) return;
    // A task takes some columns, and where these are too few for all workers, only some keys. In either case a key's
    // sum goes row by row.
    const int threads = workers_for(product / kSharedFlops);
    const int64_t panels = divide_up(d_, kColumns), parts = threads > 1 ? divide_up(2 * threads, panels) : 1,
                  keys_count = problem_.keys_count();
    info_nce::cpu::CPC_ISA::each(threads, panels * parts, [&](int64_t task) {
      const int64_t part = task / panels, begin_of_part = part * keys_count / parts,
                    end_of_part = (part + 1) * keys_count / parts;
      for (int64_t i = 0; i < count; ++i) add_to_keys(call, i, task % panels, begin_of_part, end_of_part);
    });
  }

 private:
  struct Call {
    const Buffers& buffers;
    const S* keys;
    S* grad_keys;
    bool wants_predictions;
    int64_t first;
  };

  int64_t values_of_worker() const { return divide_up((d_ + 6) * lanes_, kLanes<S>) * kLanes<S>; }
  struct OfWorker {
    S *panel, *bests, *factors;  // [D][lanes]: the row's predictions; the others are [lanes].
    info_nce::cpu::CPC_ISA::RowSums<S> sums;

    OfWorker(S* memory, const SharedNegatives& a) {
      panel = memory;
      memory += a.d_ * a.lanes_;
      for (S** part : {&bests, &factors, &sums.maxima, &sums.sums, &sums.moments, &sums.counts})
        *part = std::exchange(memory, memory + a.lanes_);
    }
  };

  const int64_t& target(int64_t step, int64_t row) const {
    return problem_.targets.template as<const int64_t>()[step * problem_.rows() + row];
  }
  bool is_present(int64_t step, int64_t row) const { return target(step, row) >= 0; }
  bool is_used(int64_t row) const {
    for (int64_t step = 0; step < steps_; ++step)
      if (is_present(step, row)) return true;
    return false;
  }
  // The number of vectors of a tile that begins at `column`.
  static int64_t vectors_from(int64_t column, int64_t columns) {
    return std::min<int64_t>(kTileVectors, divide_up(columns - column, kLane));
  }

  void contrast(const Call& call, int64_t i, const OfWorker& own) const {
    const int64_t row = call.first + i;
    if (!is_used(row)) return;
    for (int64_t step = 0; step < steps_; ++step)
      if (!is_present(step, row)) std::fill_n(prediction(call.buffers, i, step), pitch_, S{});
    pack(prediction(call.buffers, i, 0), own.panel);
    multiply_positives(call, i, own);
    multiply_negatives(call, i, own);
    sum_up(call, i, own);
    finish(call, i, own);
    if (!call.wants_predictions && call.grad_keys == nullptr) return;
    weigh(call, i, own);
    if (call.wants_predictions) add_to_predictions(call, i, own);
    // A prediction without gradients must not reach the keys' gradient, even if it has infinities or NaN.
    for (int64_t step = 0; step < steps_; ++step)
      if (own.factors[step] == 0) std::fill_n(prediction(call.buffers, i, step), pitch_, S{});
  }

  // Packs the predictions of a row as the right operand of a product over features: [D][lanes].
  void pack(const S* predictions, S* panel) const {
    for (int64_t c = 0; c < lanes_; c += kLane)
      for (int64_t k = 0; k < d_; k += kLane) {
        R block[kLane];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLane; ++i)
          block[i] = c + i < steps_ ? load_register(predictions + (c + i) * pitch_ + k) : R{};
        transpose<S>(block);
        const int64_t count = std::min(kLane, d_ - k);
        for (int64_t i = 0; i < count; ++i) store_register(panel + (k + i) * lanes_ + c, block[i]);
      }
  }

  // Computes the dot products of `count` keys with the steps from `c` on, in rows `pitch` values apart.
  void multiply(const Call& call, const OfWorker& own, const int64_t* keys, int64_t count, int64_t c, S* dots,
                int64_t pitch) const {
    with_tile(count, vectors_from(c, lanes_), [&](auto height, auto vectors) {
      Tile<S, height, vectors> tile;
      const S* rows[height];
      for (int r = 0; r < height; ++r) rows[r] = call.keys + keys[r] * d_;
      tile.clear();
      tile.multiply([&rows](int r, int64_t k) { return rows[r] + k; }, own.panel + c, d_, lanes_);
      tile.store(dots, pitch);
    });
  }

  void multiply_negatives(const Call& call, int64_t i, const OfWorker& own) const {
    const int64_t* const negatives = problem_.negatives_of(0, call.first + i);
    S* const dots = call.buffers.weights + i * samples_ * lanes_;
    for (int64_t c = 0; c < lanes_; c += kColumns)
      for (int64_t s = 0; s < samples_; s += kTileRows)
        multiply(call, own, negatives + s, std::min<int64_t>(kTileRows, samples_ - s), c, dots + s * lanes_ + c,
                 lanes_);
  }

  // Multiplies all steps with all positives, with the same arithmetic as for negatives, and keeps each step's product
  // with its own positive. Equal keys thus have equal scores.
  void multiply_positives(const Call& call, int64_t i, const OfWorker& own) const {
    S* const dots = call.buffers.of_positives + i * lanes_;
    for (int64_t c = 0; c < lanes_; c += kColumns)
      for (int64_t first = c; first < std::min(steps_, c + kColumns); first += kTileRows) {
        const int64_t count = std::min<int64_t>({kTileRows, steps_ - first, c + kColumns - first});
        S every[kTileRows * kColumns];
        int64_t keys[kTileRows];
        for (int64_t r = 0; r < count; ++r) keys[r] = std::max<int64_t>(target(first + r, call.first + i), 0);
        multiply(call, own, keys, count, c, every, kColumns);
        for (int64_t r = 0; r < count; ++r) dots[first + r] = every[r * kColumns + first - c + r];
      }
  }

  info_nce::cpu::CPC_ISA::PositivesOfRow<S> positive(const Call& call, int64_t i, int64_t step) const {
    return {.places = 1,
            .targets = &target(step, call.first + i),
            .own = 0,
            .dots = call.buffers.of_positives + i * lanes_ + step,
            .scale = scale_,
            .bias = nullptr};
  }

  // Turns dot products into powers of the scores relative to each step's largest, and sums them.
  void sum_up(const Call& call, int64_t i, const OfWorker& own) const {
    for (int64_t step = 0; step < lanes_; ++step)
      own.bests[step] = step < steps_ && is_present(step, call.first + i) ? positive(call, i, step).score(0) : S{};
    const info_nce::cpu::CPC_ISA::TileOfScores<S> tile{.values = call.buffers.weights + i * samples_ * lanes_,
                                                       .keys = samples_,
                                                       .columns = lanes_,
                                                       .scale = scale_,
                                                       .bias = nullptr,
                                                       .marked = false};
    for (int64_t c = 0; c < lanes_; c += kLane) {
      const auto& all = own.sums;
      info_nce::cpu::CPC_ISA::exponentiate<true, true>(tile, c, own.bests,
                                                       {all.maxima, all.sums, all.moments, all.counts});
    }
  }

  // Computes losses and ranks from the sums, and the factors from powers to weights.
  void finish(const Call& call, int64_t i, const OfWorker& own) const {
    const int64_t row = call.first + i, rows = problem_.rows();
    const int64_t* const negatives = problem_.negatives_of(0, row);
    std::fill_n(own.factors, lanes_, S{});
    for (int64_t step = 0; step < steps_; ++step) {
      S& of_positive = call.buffers.of_positives[i * lanes_ + step];
      const int64_t at = step * rows + row;
      if (!is_present(step, row)) {
        of_positive = 0;
        continue;
      }
      const auto own_positive = positive(call, i, step);
      const info_nce::Outcome outcome{
          info_nce::Measure::softmax,
          info_nce::Rivals<S>{own.sums.maxima[step], own.sums.sums[step], own.sums.moments[step]}, own_positive};
      problem_.losses.template as<S>()[at] = outcome.loss();
      // Negatives that are the positive key count in the loss but not in the rank.
      problem_.ranks.template as<int64_t>()[at] =
          static_cast<int64_t>(own.sums.counts[step]) - std::count(negatives, negatives + samples_, target(step, row));
      const S weight = problem_.row_weights.template as<const S>()[at];
      own.factors[step] = scale_ * outcome.factor_of_rivals(weight);
      of_positive = scale_ * outcome.weight_of_positive(0, weight);
    }
  }

  // Turns powers into weights. Powers of steps without gradients may be infinite or NaN.
  void weigh(const Call& call, int64_t i, const OfWorker& own) const {
    S* const weights = call.buffers.weights + i * samples_ * lanes_;
    for (int64_t c = 0; c < lanes_; c += kLane) {
      const R factor = load_register(own.factors + c);
      for (int64_t s = 0; s < samples_; ++s) {
        S* const at = weights + s * lanes_ + c;
        store_register(at, factor != R{} ? load_register(at) * factor : R{});
      }
    }
  }

  void add_to_predictions(const Call& call, int64_t i, const OfWorker& own) const {
    int64_t k = 0;
    for (; k + kLane <= d_; k += std::min<int64_t>(kTileVectors, (d_ - k) / kLane) * kLane)
      multiply_keys(call, i, own, k, std::min<int64_t>(kTileVectors, (d_ - k) / kLane));
    if (k == d_) return;
    // The last columns overlap those before, so that no register reaches beyond the last key.
    if (d_ >= kLane) return multiply_keys(call, i, own, d_ - kLane, 1);
    const int64_t* const negatives = problem_.negatives_of(0, call.first + i);
    const S* const weights = call.buffers.weights + i * samples_ * lanes_;
    for (int64_t step = 0; step < steps_; ++step) {
      if (!is_present(step, call.first + i)) continue;
      const S of_positive = call.buffers.of_positives[i * lanes_ + step];
      for (k = 0; k < d_; ++k) {
        S sum = 0;
        for (int64_t s = 0; s < samples_ && own.factors[step] != 0; ++s)
          sum += weights[s * lanes_ + step] * call.keys[negatives[s] * d_ + k];
        if (own.factors[step] != 0) sum += of_positive * call.keys[target(step, call.first + i) * d_ + k];
        gradient(call, i, step)[k] = sum;
      }
    }
  }

  S* gradient(const Call& call, int64_t i, int64_t step) const {
    return gradients(call.buffers, step) + place(call.buffers, i, step) * d_;
  }

  // Computes columns of the gradients of a row's predictions: `registers` registers from `k` on.
  void multiply_keys(const Call& call, int64_t i, const OfWorker& own, int64_t k, int64_t registers) const {
    const int64_t* const negatives = problem_.negatives_of(0, call.first + i);
    const S* const weights = call.buffers.weights + i * samples_ * lanes_;
    const S* const keys = call.keys + k;
    for (int64_t first = 0; first < steps_; first += kTileRows)
      with_tile(std::min<int64_t>(kTileRows, steps_ - first), registers, [&](auto height, auto vectors) {
        Tile<S, height, vectors> tile;
        tile.clear();
        const S* of_step = weights + first;
        for (int64_t s = 0; s < samples_; ++s, of_step += lanes_)
          tile.multiply([of_step](int r, int64_t) { return of_step + r; }, keys + negatives[s] * d_, 1);
        for (int r = 0; r < height; ++r) {
          const int64_t step = first + r;
          if (!is_present(step, call.first + i)) continue;
          const S* const key = keys + target(step, call.first + i) * d_;
          const S of_positive = call.buffers.of_positives[i * lanes_ + step];
          S* const to = gradient(call, i, step) + k;
          for (int v = 0; v < vectors; ++v)
            store_register(to + v * kLane, own.factors[step] == 0
                                               ? R{}
                                               : tile.sums[r][v] + of_positive * load_register(key + v * kLane));
        }
      });
  }

  // Adds a row's part to the gradient of keys [begin, end), for a panel of columns.
  void add_to_keys(const Call& call, int64_t i, int64_t panel, int64_t begin, int64_t end) const {
    const int64_t row = call.first + i, k = panel * kColumns;
    if (!is_used(row)) return;
    const S* const predictions = prediction(call.buffers, i, 0) + k;
    S* const sums = call.grad_keys + k;
    const int64_t width = std::min(kColumns, d_ - k);
    for (int64_t step = 0; step < steps_; ++step) {
      const int64_t key = target(step, row);
      const S weight = call.buffers.of_positives[i * lanes_ + step];
      if (key < begin || key >= end) continue;
      for (int64_t c = 0; c < width; ++c) sums[key * d_ + c] += weight * predictions[step * pitch_ + c];
    }
    const int64_t* const negatives = problem_.negatives_of(0, row);
    const S* const weights = call.buffers.weights + i * samples_ * lanes_;
    const S* some[kTileRows];
    S* to[kTileRows];
    int64_t count = 0;
    const auto add = [&] {
      with_tile(count, divide_up(width, kLane), [&](auto height, auto vectors) {
        Tile<S, height, vectors> tile;
        tile.clear();
        tile.multiply([&some](int r, int64_t step) { return some[r] + step; }, predictions, steps_, pitch_);
        add_rows(tile, to, width);
      });
      count = 0;
    };
    for (int64_t s = 0; s < samples_; ++s) {
      if (negatives[s] < begin || negatives[s] >= end) continue;
      some[count] = weights + s * lanes_;
      to[count] = sums + negatives[s] * d_;
      if (++count == kTileRows) add();
    }
    if (count > 0) add();
  }

  // Adds the first `width` columns of a tile to rows, one row after another, because several may be the same.
  template <int Count, int Vectors>
  static void add_rows(const Tile<S, Count, Vectors>& tile, S* const* rows, int64_t width) {
    if (width < Vectors * kLane) {
      S every[Count * Vectors * kLane];
      tile.store(every, Vectors * kLane);
      for (int r = 0; r < Count; ++r)
        for (int64_t c = 0; c < width; ++c) rows[r][c] += every[r * Vectors * kLane + c];
      return;
    }
#pragma GCC unroll 8
    for (int r = 0; r < Count; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v)
        store_register(rows[r] + v * kLane, load_register(rows[r] + v * kLane) + tile.sums[r][v]);
  }

  const Problem& problem_;
  int64_t rows_, steps_, lanes_;
  int64_t d_, pitch_;  // The number of features, and the pitch of predictions.
  int64_t samples_;
  S scale_;
};

}  // namespace cpc::predict_contrast::cpu::CPC_ISA
