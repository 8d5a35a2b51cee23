// InfoNCE of sampled keys on the CPU. It computes dot products of gathered rows; for the keys' gradient it sorts the
// pairs of query and key by key. Included only by sources that are compiled once per instruction set level.
#pragma once

#include "info_nce/all_keys.h"

namespace cpc::info_nce::cpu::CPC_ISA {

// Multiplications and additions per nanosecond on gathered rows.
constexpr double kSampledFlops = 6;
// The queries or keys of a task, and the registers that hold sums over gathered rows at a time.
constexpr int64_t kTaskRows = 16;
constexpr int kSumVectors = 8;

template <class Storage>
class Sampled {
  using S = Sum<Storage>;
  using R = Register<S>;
  static constexpr int64_t kLane = kRegisterLanes<S>;
  static constexpr bool kInPlace = std::is_same_v<S, Storage>;

 public:
  explicit Sampled(const Problem& problem)
      : problem_(problem),
        d_(problem.dim()),
        places_(problem.positives()),
        pairs_(problem.samples() + places_),
        scale_(scale_of<S>(problem)),
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
    if (!wants_sums_of_keys()) return;
    sort(b);
    each(threads, divide_up(keys_, kTaskRows), [&](int64_t task) {
      for (int64_t key = task * kTaskRows; key < std::min(keys_, (task + 1) * kTaskRows); ++key) {
        const int64_t begin = b.segments[key], count = b.segments[key + 1] - begin;
        if (problem_.grad_bias.ndim != 0) {
          S sum = 0;
          for (int64_t i = 0; i < count; ++i) sum += b.weights[b.order[begin + i]];
          problem_.grad_bias.template as<S>()[key] = sum;
        }
        if (problem_.grad_keys.ndim == 0 || (problem_.adds_to_keys && count == 0)) continue;
        Storage* const to = problem_.grad_keys.template as<Storage>() + key * d_;
        sum_rows(to, problem_.adds_to_keys ? to : nullptr, count, [&](int64_t i) {
          const int64_t pair = b.order[begin + i];
          return std::pair(scale_ * b.weights[pair], queries + pair / pairs_ * d_);
        });
      }
    });
  }

 private:
  bool wants_sums_of_keys() const { return problem_.grad_keys.ndim != 0 || problem_.grad_bias.ndim != 0; }

  struct Buffers {
    S* weights;         // [B * M, P + S]: dot products, then weights of the gradients.
    int64_t* named;     // [B * M, P + S]: the keys, b * N + index; B * N for none.
    int64_t* order;     // The pairs of query and key, sorted by key.
    int64_t* segments;  // [B * N + 1]: where the pairs of each key begin.
    S *queries, *keys;  // Converted values, where the tensors are of another type.

    Buffers(Parts& parts, const Sampled& a) {
      const bool sorts = a.wants_sums_of_keys();
      weights = parts.take<S>(a.queries_ * a.pairs_);
      named = parts.take<int64_t>(a.queries_ * a.pairs_);
      order = parts.take<int64_t>(sorts ? a.queries_ * a.pairs_ : 0);
      segments = parts.take<int64_t>(sorts ? a.keys_ + 3 : 0);
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

  // out = before + sum over i < count of weight * row, where (weight, row) = row_of(i). Rows of weight 0 may contain
  // infinity or NaN. `before` is null for 0.
  template <class RowOf>
  void sum_rows(Storage* out, const Storage* before, int64_t count, const RowOf& row_of) const {
    const auto columns = [&](auto vectors, int64_t k, int64_t width) {
      R sums[vectors] = {};
      if constexpr (kInPlace)
        for (int v = 0; before != nullptr && v < vectors; ++v) sums[v] = load_register(before + k + v * kLane);
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
      S sum = before != nullptr ? widen(before[k]) : S{};
      for (int64_t i = 0; i < count; ++i) {
        const auto [weight, row] = row_of(i);
        if (weight != 0) sum += weight * row[k];
      }
      out[k] = narrow<Storage>(sum);
    }
  }

  // Tells whether a row leaves out a key.
  struct LeftOut {
    const int64_t *exclude, *range, *query_group, *key_groups;
    int64_t excluded;
    Groups contrast;

    bool operator()(int64_t key) const {
      for (int64_t i = 0; i < excluded; ++i)
        if (exclude[i] == key) return true;
      if (range != nullptr && (key < range[0] || key >= range[1])) return true;
      return contrast != Groups::all && (key_groups[key] == *query_group) == (contrast == Groups::other);
    }
  };
  LeftOut left_out_of(int64_t row) const {
    const auto at = [&](const TensorView& all, int64_t i) {
      return all.ndim == 0 ? nullptr : all.template as<const int64_t>() + i;
    };
    const int64_t excluded = problem_.excluded();
    return {.exclude = at(problem_.exclude, row * excluded),
            .range = at(problem_.key_range, 2 * row),
            .query_group = at(problem_.query_groups, row),
            .key_groups = at(problem_.key_groups, row / problem_.rows() * problem_.keys_count()),
            .excluded = excluded,
            .contrast = problem_.contrast};
  }

  PositivesOfRow<S> positives(const Buffers& b, int64_t row) const {
    const auto* const targets = problem_.targets.template as<const int64_t>();
    const auto* const bias = problem_.key_bias.template as<const S>();
    return {.places = places_,
            .targets = targets == nullptr ? nullptr : targets + row * places_,
            .own = row % problem_.rows(),
            .dots = b.weights + row * pairs_,
            .scale = scale_,
            .bias = bias == nullptr ? nullptr : bias + row / problem_.rows() * problem_.keys_count()};
  }

  void contrast(const Buffers& b, const S* queries, const S* keys, int64_t row) const {
    const int64_t first = row / problem_.rows() * problem_.keys_count();
    const PositivesOfRow<S> own = positives(b, row);
    const LeftOut left_out = left_out_of(row);
    const int64_t* const negatives = problem_.negatives.template as<int64_t>() + row * (pairs_ - places_);
    S* const weights = b.weights + row * pairs_;
    int64_t* const named = b.named + row * pairs_;
    for (int64_t i = 0; i < pairs_; ++i) {
      const int64_t key = i < places_ ? own.key(i) : negatives[i - places_];
      const bool counts = i < places_ ? own.present(i) : !left_out(key);
      named[i] = counts ? first + key : keys_;
      weights[i] = counts ? dot(queries + row * d_, keys + named[i] * d_) : S{};
    }
    const Rivals<S> rivals = sum_up(b, row, own);
    const Outcome<S, PositivesOfRow<S>> outcome{problem_.measure, rivals, own};
    if (problem_.losses.ndim != 0) problem_.losses.template as<S>()[row] = outcome.loss();
    if (problem_.slopes.ndim != 0) problem_.slopes.template as<S>()[row] = outcome.slope();
    if (problem_.bests.ndim != 0) problem_.bests.template as<S>()[row] = outcome.best();
    if (!problem_.wants_gradients()) return;
    weigh(b, row, outcome);
    if (problem_.grad_queries.ndim != 0)
      sum_rows(problem_.grad_queries.template as<Storage>() + row * d_, nullptr, pairs_,
               [&](int64_t i) { return std::pair(scale_ * weights[i], keys + named[i] * d_); });
  }
  // Turns the negatives' dot products into powers of their scores relative to the largest, or into logistic functions.
  Rivals<S> sum_up(const Buffers& b, int64_t row, const PositivesOfRow<S>& own) const {
    const bool sigmoid = problem_.measure == Measure::sigmoid;
    const int64_t first = row / problem_.rows() * problem_.keys_count();
    const int64_t* const named = b.named + row * pairs_;
    S* const values = b.weights + row * pairs_;
    const auto counts = [&](int64_t i) { return named[i] != keys_; };
    const auto score = [&](int64_t i) {
      const S added = own.bias != nullptr ? own.bias[named[i] - first] : S(0);
      return values[i] * scale_ + added;
    };
    Rivals<S> rivals;
    if (sigmoid) rivals.largest = 0;
    int64_t reached = 0;
    const S best = threshold(row, own);
    for (int64_t i = places_; i < pairs_; ++i) {
      if (!counts(i)) continue;
      const S bounded = finite<S>(score(i));
      if (!sigmoid && bounded > rivals.largest) rivals.largest = bounded;
      reached += !is_positive(own, named[i] - first) && !(score(i) < best);
    }
    for (int64_t i = places_; i < pairs_; ++i) {
      if (!counts(i)) continue;
      const S of = score(i), power = sigmoid ? logistic(of) : std::exp(of - rivals.largest);
      rivals.sum += sigmoid ? static_cast<S>(softplus(of)) : power;
      rivals.moment += power * values[i];
      values[i] = power;
    }
    if (problem_.ranks.ndim != 0) problem_.ranks.template as<int64_t>()[row] = reached;
    return rivals;
  }

  static bool is_positive(const PositivesOfRow<S>& own, int64_t key) {
    for (int64_t j = 0; j < own.places; ++j)
      if (own.key(j) == key) return true;
    return false;
  }

  S threshold(int64_t row, const PositivesOfRow<S>& own) const {
    if (places_ == 0 && problem_.thresholds.ndim != 0) return problem_.thresholds.template as<const S>()[row];
    return Outcome<S, PositivesOfRow<S>>(problem_.measure, {}, own).best();
  }

  // Turns powers into weights of the gradients.
  void weigh(const Buffers& b, int64_t row, const Outcome<S, PositivesOfRow<S>>& outcome) const {
    const S weight = weight_of(row, static_cast<S>(problem_.factor), problem_.row_weights.template as<const S>());
    const S factor = outcome.factor_of_rivals(weight);
    S* const values = b.weights + row * pairs_;
    for (int64_t i = 0; i < pairs_; ++i) {
      if (b.named[row * pairs_ + i] == keys_)
        values[i] = 0;
      else if (i < places_)
        values[i] = outcome.weight_of_positive(i, weight);
      else
        values[i] = factor == 0 ? S{} : values[i] * factor;
    }
  }

  // Sorts the pairs by the key they name, stably; pairs that name none come last.
  void sort(const Buffers& b) const {
    const int64_t count = queries_ * pairs_;
    int64_t* const begins = b.segments + 1;  // Shifted by one; each begin moves to its end as pairs are placed.
    std::fill_n(b.segments, keys_ + 3, 0);
    for (int64_t i = 0; i < count; ++i) ++begins[b.named[i] + 1];
    for (int64_t key = 0; key <= keys_; ++key) begins[key + 1] += begins[key];
    for (int64_t i = 0; i < count; ++i) b.order[begins[b.named[i]]++] = i;
  }

  const Problem& problem_;
  int64_t d_, places_, pairs_;
  S scale_;
  int64_t queries_, keys_;
};

}  // namespace cpc::info_nce::cpu::CPC_ISA
