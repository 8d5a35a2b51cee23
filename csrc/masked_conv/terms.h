// What a pixel's sum is made of on the CPU: one term for each tap, or, where neighbouring pixels of a row are computed
// in pairs, fewer.
//
// In pairs it is Winograd's minimal filtering along the rows (arXiv 1509.09308, section 4.1). Two outputs of a run of
// taps g0, g1, g2 that read d0 to d3,
//   y0 = d0 g0 + d1 g1 + d2 g2  and  y1 = d1 g0 + d2 g1 + d3 g2,
// take four products in place of six,
//   m0 = (d0 - d2) g0, m1 = (d1 + d2) (g0 + g1 + g2) / 2, m2 = (d2 - d1) (g0 - g1 + g2) / 2, m3 = (d3 - d1) g2:
//   y0 = m0 + m1 + m2  and  y1 = m1 - m2 + m3,
// two taps three in place of four, and a single one its two. All runs of a kernel add to the same four sums, and no
// output's sums hold a pixel that it does not see.
#pragma once

#include <vector>

#include "masked_conv/masked_conv.h"

namespace cpc::masked_conv {

constexpr int kPairSums = 4;   // m0 to m3
constexpr int kSharedSum = 1;  // m1, which both outputs hold once.

struct Term {
  int sum = 0;
  // It reads the pixel (dy, dx) away, plus `sign` times that at (dy, other_dx); a sign of 0: nothing is added.
  int64_t dy, dx;
  int64_t other_dx = 0;
  int sign = 0;
  // Its weight: these taps' weights times factors.
  struct Part {
    int64_t index;  // i * kw + j
    float factor;
  };
  std::vector<Part> weight;
};

// By sums, in the taps' order within. For pairs the taps of a row must be a pixel apart.
std::vector<Term> terms_of(const std::vector<Tap>& taps, bool pairs);

}  // namespace cpc::masked_conv
