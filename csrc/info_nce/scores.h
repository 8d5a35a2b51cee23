// What becomes of a tile of scores on the CPU: [keys][columns], a query a lane of a register. Included only by sources
// that are compiled once per instruction set level.
//
// A tile holds dot products at first. Keys that a query does not contrast as rivals are marked by kLeftOut in its place.
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

// A dot product that no queries and keys have in practice. Unlike an infinity it stays one number whatever the scale is.
template <class S>
constexpr S kLeftOut = -kLargest<S>;

template <class S>
struct TileOfScores {
  S* values;
  int64_t keys, columns;
  S scale;
  const S* bias;       // Biases from the first key on; null: 0.
  bool marked = true;  // Whether keys may be left out.

  static constexpr int64_t kLane = kRegisterLanes<S>;
  using R = Register<S>;

  R dots(int64_t key, int64_t c) const { return load_register(values + key * columns + c); }
  R bias_of(int64_t key) const { return bias != nullptr ? in_all_lanes(bias[key]) : R{}; }
  // The score of what is left out is -inf.
  R score(R dot, int64_t key) const {
    const R value = dot * scale + bias_of(key);
    return marked ? (dot == R{} + kLeftOut<S> ? R{} - kInfinity<S> : value) : value;
  }
};

// --- How values lie in registers and memory ---

// A register in the storage type, without the loops of narrow() for any number of values.
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

// --- Which keys are left out ---

// Keys outside of [begin, end) of each lane, as numbers from the tile's first key on.
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

// Groups of a register's queries. Where lanes are narrower than the numbers, these come in two halves.
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
  // All bits of the lanes whose group that is.
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

// --- What the scores come to, by rows and by columns ---

// Numbers of a row, a lane each: what its powers are relative to, their sum, the sum of them times the dots, and how
// many rivals are not below its best positive.
template <class S>
struct RowSums {
  S *maxima, *sums, *moments, *counts;
};

// Lanes where a score that is not left out, as `marked` ones may be, is not below the best: as ones.
template <class S>
Register<S> reached(bool marked, Register<S> dot, Register<S> score, Register<S> best) {
  const Register<S> one = Register<S>{} + S(1);
  const Register<S> all = score < best ? Register<S>{} : one;  // Not a number is not below.
  return marked ? (dot == Register<S>{} + kLeftOut<S> ? Register<S>{} : all) : all;
}

// Powers of e of a register's column of scores relative to their largest, which are stored in place of the dots where
// kStores; moments and counts only where kFirst.
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

// log(1 + x) of x in [0, 1]. What 1 + x rounds off is made good by a factor.
inline Register<float> log1p(Register<float> x) {
  const Register<float> one = Register<float>{} + 1.f, u = x + one;
  const Register<float> v = log(u) * (x / (u - one));
  return u == one ? x : v;
}
inline Register<double> log1p(Register<double> x) {
  return by_lane(x, [](double v) { return std::log1p(v); });
}

// The same for the sigmoid measure: the logistic function of the scores in place of powers, and sums of their losses.
template <bool kFirst, class S>
void logistics(const TileOfScores<S> tile, int64_t c, const S* bests, const RowSums<S>& to) {
  using R = Register<S>;
  R sum = {}, moment = {}, count = {};
  const R best = kFirst ? load_register(bests + c) : R{};
  for (int64_t key = 0; key < tile.keys; ++key) {
    const R dot = tile.dots(key, c), score = tile.score(dot, key);
    // One power, of what is not above 0, gives both the slope and the loss.
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

// What the scores of a column, a key's with the queries of the tile, come to: in a self-contrast with all of them, and
// counted where they reach `of_each`, the key's best; otherwise with those that are present, for which `of_each` is not 0.
template <bool kSelf, class S>
void sum_columns(TileOfScores<S> tile, const S* of_each, const RowSums<S>& to) {
  using R = Register<S>;
  if constexpr (!kSelf) tile.marked = true;  // Queries that are absent are, also where no key is left out.
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

// Adds a tile's column sums of `count` keys, a multiple of a register's lanes, to those of the tiles before.
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
