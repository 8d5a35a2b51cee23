// Makes the terms of terms.h from runs and rectangles of neighbouring taps.
#include "masked_conv/terms.h"

#include <algorithm>
#include <utility>

namespace cpc::masked_conv {
namespace {

constexpr int64_t kLongestRun = 3;
// A tap that is not filtered.
constexpr Products kAlone{1, 1, {{{0, {0}, {1}}}}};

// Taps of a row, each a pixel further than the one before it.
struct Run {
  int64_t dy, dx;
  std::vector<int64_t> indices;
};

std::vector<Run> runs_of(std::vector<Tap> taps) {
  // Taps of an input gradient are ordered from right to left.
  std::stable_sort(taps.begin(), taps.end(),
                   [](const Tap& a, const Tap& b) { return a.dy < b.dy || (a.dy == b.dy && a.dx < b.dx); });
  std::vector<Run> runs;
  for (const Tap& tap : taps) {
    const int64_t length = runs.empty() ? kLongestRun : std::ssize(runs.back().indices);
    if (length == kLongestRun || runs.back().dy != tap.dy || runs.back().dx + length != tap.dx)
      runs.push_back({tap.dy, tap.dx, {}});
    runs.back().indices.push_back(tap.index);
  }
  return runs;
}

Reading moved(const Reading& reading, int64_t by) { return {reading.at + by, reading.other + by, reading.sign}; }

// Adds the terms of runs in successive rows, which begin in the same column and are of the same length.
void add_rectangle(Terms& terms, const std::vector<Run>& runs, Filtering filtering) {
  const Run& first = runs[0];
  const auto add = [&](const Products& of_rows, const Products& of_columns) {
    for (const Product& row : of_rows)
      for (const Product& column : of_columns) {
        Term term{kSums * row.sum + column.sum,
                  std::ssize(terms.rectangles),
                  moved(row.reading, first.dy),
                  moved(column.reading, first.dx),
                  {}};
        for (size_t i = 0; i < runs.size(); ++i)
          for (size_t j = 0; j < first.indices.size(); ++j)
            if (const float factor = row.factors[i] * column.factors[j]; factor != 0)
              term.weight.push_back({runs[i].indices[j], factor});
        terms.all.push_back(term);
      }
  };
  with_products_of(std::ssize(first.indices), [&](auto columns) {
    if (filtering == Filtering::pairs) return add(kAlone, *columns.value);
    with_products_of(std::ssize(runs), [&](auto rows) { add(*rows.value, *columns.value); });
  });
  terms.rectangles.push_back({first.dy, first.dx, std::ssize(runs), std::ssize(first.indices)});
}

}  // namespace

Terms terms_of(const std::vector<Tap>& taps, Filtering filtering) {
  Terms terms;
  if (filtering == Filtering::direct) {
    for (const Tap& tap : taps) terms.all.push_back({0, 0, {tap.dy}, {tap.dx}, {{tap.index, 1}}});
    return terms;
  }
  std::vector<Run> runs = runs_of(taps);
  while (!runs.empty()) {
    std::vector<Run> rectangle{runs[0]};
    runs.erase(runs.begin());
    for (auto run = runs.begin(); filtering == Filtering::quads && run != runs.end();) {
      const bool continues = std::ssize(rectangle) < kLongestRun && run->dy == rectangle.back().dy + 1 &&
                             run->dx == rectangle[0].dx && run->indices.size() == rectangle[0].indices.size();
      if (continues) rectangle.push_back(*run);
      run = continues ? runs.erase(run) : run + 1;
    }
    add_rectangle(terms, rectangle, filtering);
  }
  std::stable_sort(terms.all.begin(), terms.all.end(), [](const Term& a, const Term& b) { return a.sum < b.sum; });
  return terms;
}

Forms forms_of(const std::vector<Term>& terms) {
  Forms forms;
  for (const Term& term : terms) {
    const auto known = std::find(forms.forms.begin(), forms.forms.end(), term.columns);
    forms.of_term.push_back(known - forms.forms.begin());
    if (known == forms.forms.end()) forms.forms.push_back(term.columns);
  }
  return forms;
}

}  // namespace cpc::masked_conv
