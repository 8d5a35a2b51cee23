// The rows of a contrast on the GPU, with all keys or sampled ones: their parameters, checks, scores and results.
#pragma once

#include "core/cuda/kernel.cuh"
#include "info_nce/info_nce.h"
#include "info_nce/outcome.h"

namespace cpc::info_nce::cuda {

using namespace cpc::cuda;

constexpr int kThreads = 128;

// Calls use(i) for each of a row's positives or exclusions. The loop is not unrolled, as usually there is only one.
template <class Use>
__device__ void each_of(int64_t count, const Use& use) {
#pragma unroll 1
  for (int64_t i = 0; i < count; ++i) use(i);
}

// A row is given by its index in [B, M], and where needed also by its index in its entry.
template <class Sum>
struct Rows {
  const int64_t *targets, *exclude, *key_range, *query_groups, *key_groups;
  const Sum *key_bias, *scales, *row_weights, *thresholds, *present;
  Sum *losses, *slopes, *bests, *grad_bias;
  int64_t* ranks;
  int64_t m, n, d, places, excluded;  // Sizes of an entry, and the most positives and exclusions of a row.
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
  // Whether a row has gradients and takes part in the columns of a symmetric contrast.
  __device__ bool is_present(int64_t index) const {
    return present != nullptr ? present[index] != 0 : weight(index) != 0;
  }
  // The index, or -1 where it names no key.
  __device__ int64_t key(int64_t named) const { return named >= 0 && named < n ? named : -1; }
  __device__ int64_t target(int64_t index, int64_t in_entry, int64_t j) const {
    return key(targets != nullptr ? targets[index * places + j] : in_entry);
  }
  __device__ int64_t left_out(int64_t index, int64_t e) const { return key(exclude[index * excluded + e]); }

  // Whether a row's indices, its range and the scale satisfy the contract, except for its negatives.
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

  // The score of a dot product. All kernels use this arithmetic, because ranks compare scores of different kernels.
  __device__ Sum score(Sum scale, Sum dot, int64_t entry, int64_t key) const {
    return fma(scale, dot, key_bias != nullptr ? key_bias[entry * n + key] : Sum(0));
  }
  // The power of e of a score relative to the rivals' largest, or its logistic function.
  __device__ Sum power(Sum score, Sum largest) const {
    return measure == Measure::sigmoid ? logistic(score) : exp(score - largest);
  }
  // Adds a score to rivals whose largest score is known, and returns its power.
  __device__ Sum add(Rivals<Sum>& rivals, Sum score, Sum dot) const {
    const Sum power = this->power(score, rivals.largest);
    rivals.sum += measure == Measure::sigmoid ? softplus(score) : power;
    if (slopes != nullptr && power != 0) rivals.moment += power * dot;
    return power;
  }
  // The score that powers are relative to, where `largest` is the rivals' largest.
  __device__ Sum bounded(Sum largest) const { return measure == Measure::sigmoid ? Sum(0) : finite<Sum>(largest); }

  // The threshold of the rank, which counts the rivals that do not score below it.
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

}  // namespace cpc::info_nce::cuda
