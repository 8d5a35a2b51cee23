// Operations on a tile of scores on the CPU, [keys][columns], where each lane of a register is a query. Included only
// by sources that are compiled once per instruction set level.
//
// A tile holds dot products at first. The entries of keys that a query does not contrast as rivals are set to kLeftOut.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "core/gemm.h"
#include "core/shuffle.h"
#include "core/simd_math.h"
#include "info_nce/outcome.h"

namespace cpc::info_nce::cpu::CPC_ISA {

using namespace cpc::CPC_ISA;

// A dot product that does not occur in practice. Unlike infinity it does not become NaN with a scale of 0.
template <class S>
constexpr S kLeftOut = -kLargest<S>;

template <class S>
struct TileOfScores {
  S* values;
  int64_t keys, columns;
  S scale;
  const S* bias;       // Biases, from that of the first key on; null for 0.
  bool marked = true;  // Whether the tile may contain kLeftOut.

  static constexpr int64_t kLane = kRegisterLanes<S>;
  using R = Register<S>;

  R dots(int64_t key, int64_t c) const { return load_register(values + key * columns + c); }
  R bias_of(int64_t key) const { return bias != nullptr ? in_all_lanes(bias[key]) : R{}; }
  // Keys that are left out score -inf.
  R score(R dot, int64_t key) const {
    const R value = dot * scale + bias_of(key);
    return marked ? (dot == R{} + kLeftOut<S> ? R{} - kInfinity<S> : value) : value;
  }
};

// --- Conversion ---

// Stores a register in the storage type. Unlike narrow(), it needs no loop over a number of values.
template <class Storage, class R>
inline void narrow_register(Storage* to, R v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Storage) == 2) {
    const __m256i narrowed = narrow_vector<Storage>((__m512)v);
    std::memcpy(to, &narrowed, sizeof narrowed);
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Storage) == 2) {
    const __m128i narrowed = narrow_vector<Storage>((__m256)v);
    std::memcpy(to, &narrowed, sizeof narrowed);
    return;
  }
#endif
  if constexpr (sizeof(Storage) == sizeof(v[0]))
    std::memcpy(to, &v, sizeof v);
  else
    for (size_t i = 0; i < sizeof v / sizeof v[0]; ++i) to[i] = narrow<Storage>(v[i]);
}

// --- Leaving out keys ---

// Leaves out the keys outside of each lane's [begin, end), counted from the tile's first key.
template <class S>
void leave_out_of_range(const TileOfScores<S>& tile, int64_t c, const int64_t* begins, const int64_t* ends) {
  using R = Register<S>;
  R begin = {}, end = {};
  bool whole = true;
  for (int64_t i = 0; i < tile.kLane; ++i) {
    begin[i] = static_cast<S>(std::clamp<int64_t>(begins[i], 0, tile.keys));
    end[i] = static_cast<S>(std::clamp<int64_t>(ends[i], 0, tile.keys));
    whole = whole && begin[i] == 0 && end[i] == static_cast<S>(tile.keys);
  }
  if (whole) return;
  for (int64_t key = 0; key < tile.keys; ++key) {
    const R at = in_all_lanes(static_cast<S>(key)), dot = tile.dots(key, c);
    const R from_begin = at >= begin ? dot : R{} + kLeftOut<S>;
    store_register(tile.values + key * tile.columns + c, at < end ? from_begin : R{} + kLeftOut<S>);
  }
}

// The groups of a register's queries. Where lanes are narrower than the groups' numbers, these are kept in two halves.
template <class S>
class LaneGroups {
  using Int = std::conditional_t<sizeof(S) == 8, int64_t, int32_t>;
  typedef Int Ints __attribute__((vector_size(kRegisterBytes)));
  static constexpr int kParts = sizeof(int64_t) / sizeof(Int);

 public:
  LaneGroups(const int64_t* groups, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      for (int part = 0; part < kParts; ++part) parts_[part][i] = part_of(groups[i], part);
  }
  // All bits set in the lanes that have this group.
  Ints equal(int64_t group) const {
    Ints all = parts_[0] == part_of(group, 0);
    for (int part = 1; part < kParts; ++part) all &= parts_[part] == part_of(group, part);
    return all;
  }

 private:
  static Int part_of(int64_t group, int part) {
    return static_cast<Int>(static_cast<uint64_t>(group) >> (part * 8 * sizeof(Int)) &
                            ~uint64_t{0} >> (64 - 8 * sizeof(Int)));
  }
  Ints parts_[kParts] = {};
};

template <class S>
void leave_out_groups(const TileOfScores<S>& tile, int64_t c, const LaneGroups<S>& groups, const int64_t* of_keys,
                      bool leaves_own) {
  using R = Register<S>;
  for (int64_t key = 0; key < tile.keys; ++key) {
    const R dot = tile.dots(key, c), none = R{} + kLeftOut<S>;
    const auto own = groups.equal(of_keys[key]);
    store_register(tile.values + key * tile.columns + c, leaves_own ? (own ? none : dot) : (own ? dot : none));
  }
}

// --- Sums of the scores, by rows and by columns ---

// Sums of rows, one lane each: the score that the row's powers of e are relative to, the sum of the powers, the sum of
// powers times dots, and the number of rivals that are not below the best positive.
template <class S>
struct RowSums {
  S *maxima, *sums, *moments, *counts;
};

// 1 in the lanes whose score is not below the best and is not left out (only `marked` tiles leave any out), else 0.
template <class S>
Register<S> reached(bool marked, Register<S> dot, Register<S> score, Register<S> best) {
  const Register<S> one = Register<S>{} + S(1);
  const Register<S> all = score < best ? Register<S>{} : one;  // NaN counts as not below.
  return marked ? (dot == Register<S>{} + kLeftOut<S> ? Register<S>{} : all) : all;
}

// Computes the powers of e of a register's column of scores, relative to the largest of them, and their sums. kStores
// stores the powers in place of the dots; kFirst also computes moments and counts.
template <bool kFirst, bool kStores, class S>
void exponentiate(const TileOfScores<S> tile, int64_t c, const S* bests, const RowSums<S>& to) {
  using R = Register<S>;
  R largest = R{} - kInfinity<S>, sum = {}, moment = {}, count = {};
  for (int64_t key = 0; key < tile.keys; ++key) {
    const R score = tile.score(tile.dots(key, c), key);
    largest = score > largest ? score : largest;
  }
  largest = finite<S>(largest);
  const R best = kFirst ? load_register(bests + c) : R{};
  for (int64_t key = 0; key < tile.keys; ++key) {
    const R dot = tile.dots(key, c), score = tile.score(dot, key);
    const R power = exp_below_zero(score - largest);
    sum += power;
    if constexpr (kFirst) {
      moment += power * dot;
      count += reached<S>(tile.marked, dot, score, best);
    }
    if constexpr (kStores) store_register(tile.values + key * tile.columns + c, power);
  }
  store_register(to.maxima + c, largest);
  store_register(to.sums + c, sum);
  if constexpr (!kFirst) return;
  store_register(to.moments + c, moment);
  store_register(to.counts + c, count);
}

// log(1 + x) of x in [0, 1]. A factor corrects for the rounding of 1 + x.
inline Register<float> log1p(Register<float> x) {
  const Register<float> one = Register<float>{} + 1.f, u = x + one;
  const Register<float> v = log(u) * (x / (u - one));
  return u == one ? x : v;
}
inline Register<double> log1p(Register<double> x) {
  return by_lane(x, [](double v) { return std::log1p(v); });
}

// The same for the sigmoid measure, with the logistic function of the scores in place of powers, and sums of the
// losses.
template <bool kFirst, class S>
void logistics(const TileOfScores<S> tile, int64_t c, const S* bests, const RowSums<S>& to) {
  using R = Register<S>;
  R sum = {}, moment = {}, count = {};
  const R best = kFirst ? load_register(bests + c) : R{};
  for (int64_t key = 0; key < tile.keys; ++key) {
    const R dot = tile.dots(key, c), score = tile.score(dot, key);
    // One power of e, with an exponent of at most 0, gives both the slope and the loss.
    const R power = exp_below_zero(score > R{} ? -score : score), share = S(1) / (power + S(1));
    const R slope = score > R{} ? share : power * share;
    if constexpr (kFirst) {
      sum += (score > R{} ? score : R{}) + log1p(power);
      moment += slope * dot;
      count += reached<S>(tile.marked, dot, score, best);
    }
    store_register(tile.values + key * tile.columns + c, slope);
  }
  store_register(to.maxima + c, R{});
  if constexpr (!kFirst) return;
  store_register(to.sums + c, sum);
  store_register(to.moments + c, moment);
  store_register(to.counts + c, count);
}

// Sums the scores of each column, those of a key with the queries of the tile. In a self-contrast this takes all
// queries, and counts the scores that are not below of_each[key], the key's best. Otherwise it takes the queries that
// are present, those with of_each[query] != 0.
template <bool kSelf, class S>
void sum_columns(TileOfScores<S> tile, const S* of_each, const RowSums<S>& to) {
  using R = Register<S>;
  if constexpr (!kSelf) tile.marked = true;  // Absent queries are left out, even where no key is.
  const auto of_present = [&](R dot, int64_t c) {
    if constexpr (kSelf)
      return dot;
    else
      return load_register(of_each + c) != R{} ? dot : R{} + kLeftOut<S>;
  };
  for (int64_t key = 0; key < tile.keys; ++key) {
    R most = R{} - kInfinity<S>;
    for (int64_t c = 0; c < tile.columns; c += tile.kLane) {
      const R score = tile.score(of_present(tile.dots(key, c), c), key);
      most = score > most ? score : most;
    }
    const S largest = finite<S>(across_lanes<S>(most, [](R a, R b) { return a > b ? a : b; }));
    R sum = {}, moment = {}, count = {};
    for (int64_t c = 0; c < tile.columns; c += tile.kLane) {
      const R dot = of_present(tile.dots(key, c), c), score = tile.score(dot, key);
      const R power = exp_below_zero(score - largest);
      sum += power;
      moment += power * dot;
      if constexpr (kSelf) count += reached<S>(tile.marked, dot, score, in_all_lanes(of_each[key]));
    }
    const auto add = [](R a, R b) { return a + b; };
    to.maxima[key] = largest;
    to.sums[key] = across_lanes<S>(sum, add);
    to.moments[key] = across_lanes<S>(moment, add);
    to.counts[key] = across_lanes<S>(count, add);
  }
}

// Merges a tile's column sums of `count` keys, a multiple of a register's lanes, into those of the tiles before.
template <class S>
void merge_columns(int64_t count, const RowSums<S>& from, const RowSums<S>& to) {
  using R = Register<S>;
  for (int64_t i = 0; i < count; i += kRegisterLanes<S>) {
    const R before = load_register(to.maxima + i), now = load_register(from.maxima + i);
    const R largest = now > before ? now : before;
    const R keep = exp_below_zero(before - largest), take = exp_below_zero(now - largest);
    store_register(to.maxima + i, largest);
    store_register(to.sums + i, load_register(to.sums + i) * keep + load_register(from.sums + i) * take);
    store_register(to.moments + i, load_register(to.moments + i) * keep + load_register(from.moments + i) * take);
    store_register(to.counts + i, load_register(to.counts + i) + load_register(from.counts + i));
  }
}

}  // namespace cpc::info_nce::cpu::CPC_ISA
