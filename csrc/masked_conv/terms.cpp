// Makes the terms of terms.h from runs of at most three neighbouring taps.
#include "masked_conv/terms.h"

#include <algorithm>
#include <utility>

namespace cpc::masked_conv {
namespace {

// Adds the terms of up to three taps, each a pixel further than the one before it.
void add_run(std::vector<Term>& terms, const Tap* taps, int64_t count) {
  const int64_t dy = taps[0].dy, d0 = taps[0].dx, d1 = d0 + 1, d2 = d0 + 2, d3 = d0 + 3;
  const int64_t g0 = taps[0].index, last = taps[count - 1].index;
  const auto add = [&](int sum, int64_t dx, int sign, int64_t other_dx, std::vector<Term::Part> weight) {
    terms.push_back({sum, dy, dx, other_dx, sign, std::move(weight)});
  };
  if (count == 1) {
    add(0, d0, 0, 0, {{g0, 1}});
    add(3, d1, 0, 0, {{g0, 1}});
  } else if (count == 2) {
    add(0, d0, -1, d1, {{g0, 1}});
    add(1, d1, 0, 0, {{g0, 1}, {last, 1}});
    add(3, d2, -1, d1, {{last, 1}});
  } else {
    const int64_t g1 = taps[1].index;
    add(0, d0, -1, d2, {{g0, 1}});
    add(1, d1, 1, d2, {{g0, 0.5f}, {g1, 0.5f}, {last, 0.5f}});
    add(2, d2, -1, d1, {{g0, 0.5f}, {g1, -0.5f}, {last, 0.5f}});
    add(3, d3, -1, d1, {{last, 1}});
  }
}

}  // namespace

std::vector<Term> terms_of(const std::vector<Tap>& taps, bool pairs) {
  std::vector<Term> terms;
  if (!pairs) {
    for (const Tap& tap : taps) terms.push_back({0, tap.dy, tap.dx, 0, 0, {{tap.index, 1}}});
    return terms;
  }
  std::vector<Tap> ordered = taps;  // Taps of an input gradient are ordered from right to left.
  std::stable_sort(ordered.begin(), ordered.end(),
                   [](const Tap& a, const Tap& b) { return a.dy < b.dy || (a.dy == b.dy && a.dx < b.dx); });
  for (size_t begin = 0, end; begin < ordered.size(); begin = end) {
    for (end = begin + 1; end < ordered.size() && end - begin < 3; ++end)
      if (ordered[end].dy != ordered[begin].dy || ordered[end].dx != ordered[end - 1].dx + 1) break;
    add_run(terms, &ordered[begin], static_cast<int64_t>(end - begin));
  }
  std::stable_sort(terms.begin(), terms.end(), [](const Term& a, const Term& b) { return a.sum < b.sum; });
  return terms;
}

Forms forms_of(const std::vector<Term>& terms) {
  Forms forms;
  for (const Term& term : terms) {
    const Term::Form form{term.dx, term.other_dx, term.sign};
    const auto known = std::find(forms.forms.begin(), forms.forms.end(), form);
    forms.of_term.push_back(known - forms.forms.begin());
    if (known == forms.forms.end()) forms.forms.push_back(form);
  }
  return forms;
}

}  // namespace cpc::masked_conv
