// What the scores of a row come to: the arithmetic that the CPU and CUDA kernels share.
//
// Powers of e are taken relative to the largest of the others' scores, which is kept finite: infinite scores then have
// infinite sums, and only such have sums that are not numbers. A row of weight 0 has no gradients, whatever its scores.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/tensor_view.h"

namespace cpc::info_nce {

template <class Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
template <class Real>
constexpr Real kLargest = std::numeric_limits<Real>::max();

// The finite number that is nearest to a score, or to each of a register's; NaN stays.
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

template <class Real>
struct Outcome {
  Real positive;  // The positive's score.
  Real largest;   // The largest of the others', finite.
  Real sum;       // The sum of the others' powers.

  CPC_HOST_DEVICE Real loss() const {
    if (positive == kInfinity<Real>) return std::numeric_limits<Real>::quiet_NaN();
    // How far the others lie above the positive: small losses keep their precision.
    const double above = largest + std::log(static_cast<double>(sum)) - positive;
    return static_cast<Real>(above > 0 ? above + std::log1p(std::exp(-above)) : std::log1p(std::exp(above)));
  }

  // Whether the positive is above all others, where no other is the positive's own key.
  CPC_HOST_DEVICE bool right() const {
    const bool others = sum > 0 || largest > -kLargest<Real>;
    return sum < kInfinity<Real> && (positive > largest || !others);
  }

  // What turns the others' powers into their weights in the gradients, of a row with the given weight.
  CPC_HOST_DEVICE Real factor_of_others(Real weight) const {
    return weight == 0 ? Real(0) : 1 / (sum + std::exp(positive - largest)) * weight;
  }
  // The positive's weight in the gradients.
  CPC_HOST_DEVICE Real weight_of_positive(Real factor_of_others) const {
    return factor_of_others == 0 ? Real(0) : -sum * factor_of_others;
  }
};

// The scores of sampled negatives, one after another. The positive's key may be among them, and then is no rival.
template <class Real>
struct Negatives {
  Real largest = -kLargest<Real>;  // Of all.

  CPC_HOST_DEVICE void add(Real score, bool is_rival) {
    const Real bounded = finite<Real>(score);
    largest = bounded > largest ? bounded : largest;
    if (!is_rival) return;
    rivals_ = true;
    nan_ = nan_ || score != score;
    rival_ = score > rival_ ? score : rival_;
  }
  CPC_HOST_DEVICE bool right(Real positive) const { return !nan_ && (positive > rival_ || !rivals_); }

 private:
  Real rival_ = -kLargest<Real>;  // The largest of the rivals.
  bool rivals_ = false, nan_ = false;
};

}  // namespace cpc::info_nce
