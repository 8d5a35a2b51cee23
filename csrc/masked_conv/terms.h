// The terms of a pixel's sum on the CPU: one for each tap, or fewer where neighbouring pixels of a row are computed in
// pairs.
//
// Pairs use Winograd's minimal filtering along the rows (arXiv 1509.09308, section 4.1). For a run of three taps g0,
// g1, g2, two neighbouring outputs read the pixels d0 to d3. The outputs
//   y0 = d0 g0 + d1 g1 + d2 g2  and  y1 = d1 g0 + d2 g1 + d3 g2,
// then take four products in place of six,
//   m0 = (d0 - d2) g0, m1 = (d1 + d2) (g0 + g1 + g2) / 2, m2 = (d2 - d1) (g0 - g1 + g2) / 2, m3 = (d3 - d1) g2:
//   y0 = m0 + m1 + m2  and  y1 = m1 - m2 + m3,
// A run of two taps takes three products in place of four, and a single tap takes two, as without pairs. All runs of a
// kernel add to the same four sums, and no output's sums contain a pixel that it does not see.
#pragma once

#include <vector>

#include "masked_conv/masked_conv.h"

namespace cpc::masked_conv {

constexpr int kPairSums = 4;       // m0 to m3
constexpr int kSharedSum = 1;      // m1, which is added to both outputs. Its sum starts with the bias.
constexpr int kDifferenceSum = 2;  // m2, which is added to the left output and subtracted from the right one.

struct Term {
  int sum = 0;
  // It multiplies the pixel at offset (dy, dx) plus `sign` times the one at (dy, other_dx); with a sign of 0, the
  // former alone.
  int64_t dy, dx;
  int64_t other_dx = 0;
  int sign = 0;
  // Its weight: the sum of these taps' weights times their factors.
  struct Part {
    int64_t index;  // i * kw + j
    float factor;
  };
  std::vector<Part> weight;

  // The pixels of a row that it multiplies; several terms of a kernel have the same.
  struct Form {
    int64_t dx, other_dx;
    int sign;
    bool operator==(const Form&) const = default;
  };
};

// The different forms of terms, and for each term the index of its own.
struct Forms {
  std::vector<Term::Form> forms;
  std::vector<int64_t> of_term;
};
Forms forms_of(const std::vector<Term>& terms);

// Returns the terms ordered by sum, and within a sum in the order of the taps. With pairs, taps of a row must be one
// pixel apart.
std::vector<Term> terms_of(const std::vector<Tap>& taps, bool pairs);

}  // namespace cpc::masked_conv
