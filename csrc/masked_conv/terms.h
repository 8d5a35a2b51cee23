// The terms of a pixel's sum on the CPU: one for each tap, or fewer where neighbouring pixels are computed together.
//
// Pairs use Winograd's minimal filtering along the rows (arXiv 1509.09308, section 4.1). For a run of three taps g0,
// g1, g2, two neighbouring outputs read the pixels d0 to d3. The outputs
//   y0 = d0 g0 + d1 g1 + d2 g2  and  y1 = d1 g0 + d2 g1 + d3 g2,
// then take four products in place of six,
//   m0 = (d0 - d2) g0, m1 = (d1 + d2) (g0 + g1 + g2) / 2, m2 = (d2 - d1) (g0 - g1 + g2) / 2, m3 = (d3 - d1) g2:
//   y0 = m0 + m1 + m2  and  y1 = m1 - m2 + m3,
// A run of two taps takes three products in place of four, and a single tap takes two, as without pairs. All runs of a
// kernel add to the same four sums, and no output's sums contain a pixel that it does not see.
//
// Quads, squares of 2x2 pixels, use the same filtering along the columns, too: each of a row's sums m0 to m3 is made of
// up to four sums of its own. 3x3 taps take 16 products in place of 36.
#pragma once

#include <array>
#include <type_traits>
#include <vector>

#include "masked_conv/masked_conv.h"

namespace cpc::masked_conv {

constexpr int kSums = 4;           // m0 to m3
constexpr int kSharedSum = 1;      // m1, which is added to both outputs. Its sum starts with the bias.
constexpr int kDifferenceSum = 2;  // m2, which is added to the first output and subtracted from the second one.

// What a term reads along an axis: the pixel at an offset plus `sign` times another one; with a sign of 0, the former
// alone.
struct Reading {
  int64_t at, other = 0;
  int sign = 0;
  bool operator==(const Reading&) const = default;
};

struct Term {
  int sum = 0;  // Of pairs m0 to m3; of quads kSums times the sum of its rows plus that of its columns.
  int64_t rectangle = 0;
  Reading rows, columns;
  // Its weight: the sum of these taps' weights times their factors.
  struct Part {
    int64_t index;  // i * kw + j
    float factor;
  };
  std::vector<Part> weight;
};

// Neighbouring taps whose terms are made together: from (dy, dx) on, `height` by `width` of them, at most three by
// three. Of pairs the height is 1.
struct Rectangle {
  int64_t dy, dx, height, width;
};

struct Terms {
  // Ordered by sum, and within a sum in the order of the taps.
  std::vector<Term> all;
  std::vector<Rectangle> rectangles;
};

// Except with direct filtering, taps must be one pixel apart.
Terms terms_of(const std::vector<Tap>& taps, Filtering filtering);

// The different readings of columns by the terms of pairs, and for each term the index of its own.
struct Forms {
  std::vector<Reading> forms;
  std::vector<int64_t> of_term;
};
Forms forms_of(const std::vector<Term>& terms);

// What the sums of a run of taps multiply along an axis: readings relative to the first tap, and the factors of taps in
// the weight.
struct Product {
  int sum;
  Reading reading;
  std::array<float, 3> factors;
};
struct Products {
  int pixels;  // How many pixels are read.
  int count;
  std::array<Product, kSums> products;
  constexpr const Product* begin() const { return products.data(); }
  constexpr const Product* end() const { return products.data() + count; }
};
inline constexpr Products kProductsOfOne{2, 2, {{{0, {0}, {1}}, {3, {1}, {1}}}}};
inline constexpr Products kProductsOfTwo{3, 3, {{{0, {0, 1, -1}, {1}}, {1, {1}, {1, 1}}, {3, {2, 1, -1}, {0, 1}}}}};
inline constexpr Products kProductsOfThree{4,
                                           4,
                                           {{{0, {0, 2, -1}, {1}},
                                             {1, {1, 2, 1}, {0.5f, 0.5f, 0.5f}},
                                             {2, {2, 1, -1}, {0.5f, -0.5f, 0.5f}},
                                             {3, {3, 1, -1}, {0, 0, 1}}}}};
// The gradients of m0 to m3 as readings of those of y0 and y1, of which y0 = m0 + m1 + m2 and y1 = m1 - m2 + m3.
inline constexpr Products kGradientsOfSums{
    2, 4, {{{0, {0}, {}}, {1, {0, 1, 1}, {}}, {2, {0, 1, -1}, {}}, {3, {1}, {}}}}};

// Calls work(products) with a compile-time constant: those of a run of one to three taps.
template <class Work>
void with_products_of(int64_t taps, const Work& work) {
  switch (taps) {
    case 1: return work(std::integral_constant<const Products*, &kProductsOfOne>{});
    case 2: return work(std::integral_constant<const Products*, &kProductsOfTwo>{});
    default: return work(std::integral_constant<const Products*, &kProductsOfThree>{});
  }
}

}  // namespace cpc::masked_conv
