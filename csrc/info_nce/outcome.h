// Losses, slopes and gradient weights of a row from sums over its scores: arithmetic that the CPU and CUDA kernels
// share.
//
// Powers of e are relative to the largest of the rivals' scores, clamped to a finite number: rows with infinite scores
// then have infinite sums, and only such rows can have sums that are NaN. Their gradients are NaN. A row of weight 0
// has no gradients, whatever its scores.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/tensor_view.h"
#include "info_nce/info_nce.h"

namespace cpc::info_nce {

template <class Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
template <class Real>
constexpr Real kLargest = std::numeric_limits<Real>::max();
template <class Real>
constexpr Real kNan = std::numeric_limits<Real>::quiet_NaN();

// The finite number nearest to a score, or to each score of a register; NaN stays.
template <class Real, class Scores>
CPC_HOST_DEVICE inline Scores finite(Scores scores) {
  return scores > kLargest<Real>    ? Scores{} + kLargest<Real>
         : scores < -kLargest<Real> ? Scores{} - kLargest<Real>
                                    : scores;
}

// A row's weight in the sum of the losses.
template <class Real>
CPC_HOST_DEVICE inline Real weight_of(int64_t row, Real factor, const Real* row_weights) {
  return row_weights != nullptr ? factor * row_weights[row] : factor;
}

// log(1 + exp(x)).
template <class Real>
CPC_HOST_DEVICE inline Real softplus(Real x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

template <class Real>
CPC_HOST_DEVICE inline Real logistic(Real x) {
  return x < 0 ? std::exp(x) / (1 + std::exp(x)) : 1 / (1 + std::exp(-x));
}

// Sums over a row's rivals. A score is scale * dot + bias.
template <class Real>
struct Rivals {
  Real largest = -kLargest<Real>;  // The largest score, clamped to a finite number, which powers of e are relative to.
  Real sum = 0;                    // Sum of the powers; for the sigmoid measure, of the rivals' losses.
  Real moment = 0;                 // Sum of powers (for the sigmoid measure, logistic functions) times dots.
};

// The outcome of a row: its loss, its slope and the weights of its gradients. Positives has places for positives,
//   int64_t places, bool present(j), Real score(j), Real dot(j);
// score and dot are valid for present places only.
template <class Real, class Positives>
class Outcome {
 public:
  CPC_HOST_DEVICE Outcome(Measure measure, const Rivals<Real>& rivals, const Positives& positives)
      : measure_(measure), rivals_(rivals), positives_(positives) {
    each([&](int64_t j) {
      const Real score = positives.score(j);
      ++count_;
      best_ = best_ != best_ || score <= best_ ? best_ : score;
      scores_ += score;
      dots_ += positives.dot(j);
    });
    if (measure == Measure::sigmoid) return;
    top_ = count_ > 0 && best_ > rivals.largest ? best_ : rivals.largest;
    powers_ = rivals.sum * std::exp(rivals.largest - top_);
    if (count_ > 0) each([&](int64_t j) { powers_ += std::exp(positives_.score(j) - top_); });
  }

  // The best positive's score; NaN where one is NaN, -inf where there is none.
  CPC_HOST_DEVICE Real best() const { return best_; }
  CPC_HOST_DEVICE bool lacks_positives() const { return count_ == 0 && measure_ != Measure::log_sum; }

  CPC_HOST_DEVICE Real loss() const {
    if (lacks_positives()) return 0;
    if (measure_ == Measure::log_sum) return static_cast<Real>(log_sum_of_rivals());
    if (measure_ == Measure::sigmoid) {
      double sum = rivals_.sum;
      each([&](int64_t j) { sum += softplus(-static_cast<double>(positives_.score(j))); });
      return static_cast<Real>(sum);
    }
    if (count_ > 1) return static_cast<Real>(top_ + std::log(powers_) - scores_ / static_cast<double>(count_));
    if (best_ == kInfinity<Real>) return kNan<Real>;
    // The difference of rivals and positive is taken in double, so that small losses keep their precision.
    return static_cast<Real>(softplus(log_sum_of_rivals() - best_));
  }

  // The derivative of the loss with respect to the scale.
  CPC_HOST_DEVICE Real slope() const {
    if (lacks_positives()) return 0;
    if (measure_ == Measure::sigmoid) {
      double sum = rivals_.moment;
      each([&](int64_t j) { sum -= logistic(-static_cast<double>(positives_.score(j))) * positives_.dot(j); });
      return static_cast<Real>(sum);
    }
    if (powers_ == 0) return 0;
    const double share = std::exp(rivals_.largest - top_) / powers_;
    // Sums differences of dots, because a small slope would be lost in the difference of large sums.
    if (count_ == 1) return static_cast<Real>((rivals_.moment - rivals_.sum * dots_) * share);
    double sum = rivals_.moment * share;
    each([&](int64_t j) { sum += std::exp(positives_.score(j) - top_) / powers_ * positives_.dot(j); });
    return static_cast<Real>(count_ == 0 ? sum : sum - dots_ / static_cast<double>(count_));
  }

  // The factor from the rivals' powers to their weights in the gradients, for a row of the given weight.
  CPC_HOST_DEVICE Real factor_of_rivals(Real weight) const {
    if (weight == 0 || lacks_positives()) return 0;
    if (measure_ == Measure::sigmoid) return weight;
    if (rivals_.sum == kInfinity<Real>) return kNan<Real>;
    return powers_ == 0 ? Real(0) : static_cast<Real>(std::exp(rivals_.largest - top_) / powers_ * weight);
  }
  // A present positive's weight in the gradients.
  CPC_HOST_DEVICE Real weight_of_positive(int64_t j, Real weight) const {
    if (weight == 0) return 0;
    if (measure_ == Measure::sigmoid) return -logistic(-positives_.score(j)) * weight;
    if (count_ == 1) {
      const Real factor = factor_of_rivals(weight);
      return factor == 0 ? Real(0) : -rivals_.sum * factor;
    }
    const double share = std::exp(positives_.score(j) - top_) / powers_;
    return static_cast<Real>((share - 1 / static_cast<double>(count_)) * weight);
  }

 private:
  template <class Use>
  CPC_HOST_DEVICE void each(const Use& use) const {
#if defined(__CUDACC__)
#pragma unroll 1  // Usually there is only one.
#endif
    for (int64_t j = 0; j < positives_.places; ++j)
      if (positives_.present(j)) use(j);
  }
  CPC_HOST_DEVICE double log_sum_of_rivals() const {
    return rivals_.largest + std::log(static_cast<double>(rivals_.sum));
  }

  Measure measure_;
  Rivals<Real> rivals_;
  const Positives& positives_;
  int64_t count_ = 0;
  Real best_ = -kInfinity<Real>;
  double scores_ = 0, dots_ = 0;  // Sums.
  double top_ = 0;                // The largest of all scores, which the powers, also the positives', are relative to.
  double powers_ = 0;             // Their sum.
};

}  // namespace cpc::info_nce
