// Contrasts of all keys on tensor cores: the epilogues of core/cuda/product.cuh for scores and for gradients. A warp
// has the scores of 64 queries and 64 keys in its registers; statistics are kept per such tile. The lanes hold the
// scores as in mma.cuh: a tile has slots of 8 rows, a lane has one row of each slot, and four neighbouring lanes share
// a row's columns.
#pragma once

#include "core/cuda/product_epilogues.cuh"
#include "core/cuda/product_loaders.cuh"
#include "info_nce/finish.cuh"

namespace cpc::info_nce::cuda {

// --- Scores ---

// The keys of a tile that are no rivals of a row, as bits: bit i is that of key `begin` + i of the entry.
template <class Sum>
__device__ uint64_t find_left_out(const Group<Sum>& a, int64_t entry, int64_t row, int64_t begin) {
  const int64_t index = a.index(entry, row);
  const auto below = [&](int64_t end) {  // The bits of keys below `end`.
    const int64_t count = end - begin;
    return count >= kTile ? ~uint64_t{0} : count <= 0 ? 0 : (uint64_t{1} << count) - 1;
  };
  uint64_t rivals = below(a.first_key + a.key_count);
  if (a.key_range != nullptr) rivals &= below(a.key_range[2 * index + 1]) & ~below(a.key_range[2 * index]);
  if (a.query_groups != nullptr) {
    const int64_t* const groups = a.key_groups + (a.first_entry + entry) * a.n + begin;
    const int64_t own = a.query_groups[index];
    const int count = how_many(a.n - begin, kTile);
#pragma unroll 1
    for (int i = 0; i < count; ++i)
      if ((groups[i] == own) != a.same_groups) rivals &= ~(uint64_t{1} << i);
  }
  const auto leave_out = [&](int64_t key) {
    if (key >= begin && key < begin + kTile) rivals &= ~(uint64_t{1} << (key - begin));
  };
  each_of(a.places, [&](int64_t j) { leave_out(a.target(entry, row, j)); });
  each_of(a.excluded, [&](int64_t e) { leave_out(a.left_out(index, e)); });
  return ~rivals;
}

// A power of two, precise enough for 16-bit values.
__device__ inline float quick_exp2(float v) {
#if defined(CPC_CUDA_EMULATION)
  return std::exp2(v);
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(v));
  return power;
#endif
}

// e to a power, precise enough for values of type T.
constexpr float kLog2E = 1.44269504f;
template <class T>
__device__ float quick_exp(float v) {
  if constexpr (sizeof(T) == 2)
    return quick_exp2(v * kLog2E);
  else
    return exp(v);
}

// The epilogue of scores, which depends on the stage: see group.cuh.
template <class T>
struct TakeScores {
  Arguments<T> a;
  Stage stage;
  int64_t place = 0;  // The place of the positives that are multiplied.

  template <class Tile>
  __device__ void take(WarpTileSums<Tile>& sums, int entry, int64_t row, int64_t column) const {
    static_assert(8 * Tile::kColumnTiles == kTile && 16 * Tile::kRowTiles == kTile);
    if (stage == Stage::positives) return keep_diagonal<Tile>(sums, entry, row, column);
    if (__all_sync(kAll, row >= a.rows || column >= a.key_count)) return;
    if (stage == Stage::keep) return store(a.dot_matrix, sums, entry, row, column);
    contrast<Tile>(sums, entry, row, column);
    if (stage == Stage::weigh || a.keeps_powers()) store(a.powers, sums, entry, row, column);
  }

 private:
  static constexpr unsigned kAll = 0xffffffffu;
  static constexpr int kSlots = kTile / 8;
  using Sums = float[kSlots / 2][kSlots][4];
  __device__ static int lane() { return static_cast<int>(threadIdx.x) % kWarp; }

  // A value for each of a warp's rows: value i of a lane belongs to row 32 i + lane.
  template <class V>
  using OfRows = V[kTile / kWarp];
  // The value of the calling lane's row of a slot.
  template <class V>
  __device__ static V of_slot(const OfRows<V>& values, int slot) {
    return __shfl_sync(kAll, values[slot / 4], 8 * (slot % 4) + lane() / 4);
  }
  __device__ static float quad_sum(float v) {
    v += __shfl_xor_sync(kAll, v, 1);
    return v + __shfl_xor_sync(kAll, v, 2);
  }

  // Keeps the dot products of positives, which are on the diagonal of a square of queries and keys.
  template <class Tile>
  __device__ void keep_diagonal(const Sums& sums, int entry, int64_t row, int64_t column) const {
    const int g = lane() / 4, r = g % 2;
    if (row != column || lane() % 4 != g / 2) return;
    float dots[kSlots];
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot)
      dots[slot] = r == 0 ? sums[slot / 2][slot][slot % 2 * 2] : sums[slot / 2][slot][slot % 2 * 2 + 1];
#pragma unroll 1
    for (int64_t own = row + g; own < a.rows && own < row + kTile; own += 8) {
      a.dots[a.kept(entry, own, place)] = dots[0];
      if (a.places == 1)
        a.limits[a.kept(entry, own)] = a.threshold(a.index(entry, own), PositivesOfRow<float>(a, entry, own));
#pragma unroll
      for (int i = 1; i < kSlots; ++i) dots[i - 1] = dots[i];  // Registers cannot be indexed at run time.
    }
  }

  // A lane's row of a slot: its sums, and the keys that are left out of it. A plain row leaves out none.
  template <bool kPlain>
  struct Row {
    Sums& sums;
    int slot;
    uint32_t lower, upper;  // Bit 8 (j % 4) + r is set where sum [j][r] is left out; `upper` has j from 4 on.
    float scale;

    // Calls use(dot, score), with scores of -inf where keys are left out.
    template <class Use>
    __device__ void each(const Use& use) const {
#pragma unroll
      for (int j = 0; j < kSlots; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const bool is_out = !kPlain && ((j < 4 ? lower : upper) >> (8 * (j % 4) + r) & 1) != 0;
          float& dot = sums[slot / 2][j][slot % 2 * 2 + r];
          use(dot, is_out ? -kInfinity<float> : scale * dot);
        }
    }
    __device__ int left_out() const {
      constexpr uint32_t kOwn = 0x03030303;
      return __popc(lower & kOwn) + __popc(upper & kOwn);
    }
  };

  // Turns dot products into powers, relative to a score that is kept for each row of the tile, or into weights times
  // the unit, of rivals only.
  template <class Tile>
  __device__ void contrast(Sums& sums, int entry, int64_t row, int64_t column) const {
    const int64_t begin = a.first_key + column;
    const bool measures = stage == Stage::measure;
    OfRows<uint64_t> left_out;
    OfRows<float> limits, factors;  // `limits` are the ranks' thresholds, or the scores that weights' powers refer to.
#pragma unroll 1
    for (int i = 0; i < kTile / kWarp; ++i) {
      const int64_t own = row + kWarp * i + lane(), kept = a.kept(entry, own);
      const bool counts = own < a.rows && (measures || (a.has_gradients(entry, own) && a.rival_factors[kept] != 0));
      left_out[0] = left_out[1];  // Registers cannot be indexed at run time.
      limits[0] = limits[1];
      factors[0] = factors[1];
      left_out[1] = counts ? find_left_out(a, entry, own, begin) : ~uint64_t{0};
      limits[1] = !counts ? 0 : measures ? a.limits[kept] : a.tops[kept];
      factors[1] = counts && !measures ? a.unit() * a.rival_factors[kept] : 0;
    }
    if constexpr (sizeof(T) == 2)
      if (__all_sync(kAll, (left_out[0] | left_out[1]) == 0) && a.slopes == nullptr)  // Usual, and takes half as long.
        return contrast_rows<Tile, true>(sums, entry, row, column, left_out, limits, factors);
    contrast_rows<Tile, false>(sums, entry, row, column, left_out, limits, factors);
  }

  // With kPlain, all keys are rivals of all rows, and moments are not wanted.
  template <class Tile, bool kPlain>
  __device__ void contrast_rows(Sums& sums, int entry, int64_t row, int64_t column, const OfRows<uint64_t>& left_out,
                                const OfRows<float>& limits, const OfRows<float>& factors) const {
    const bool measures = stage == Stage::measure;
    const int shift = lane() % 4 * 2, rows = how_many(a.rows - row, kTile);
    const int64_t stat = a.stat(entry, (a.first_key + column) / kTile, row + lane() / 4);
    const float scale = a.scale();
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const uint64_t bits = kPlain ? 0 : of_slot(left_out, slot);
      const Row<kPlain> of_lane{sums, slot, static_cast<uint32_t>(bits) >> shift,
                                static_cast<uint32_t>(bits >> 32) >> shift, scale};
      const float limit = of_slot(limits, slot), factor = of_slot(factors, slot);
      Rivals<float> rivals;
      rivals.largest = limit;
      int count = 0;
      if (measures) rivals.largest = a.reference(limit, find_largest(of_lane, limit, count));
      // Scores so large that this product is infinite are equal, or too far apart for powers of any base.
      const bool huge = fabsf(rivals.largest * kLog2E) > kLargest<float>;
      const float base = huge ? 1 : kLog2E, exponents = scale * base, subtracted = rivals.largest * base;
      of_lane.each([&](float& dot, float score) {
        const float power = kPlain ? quick_exp2(dot * exponents - subtracted) : quick_exp<T>(score - rivals.largest);
        rivals.sum += power;
        if (!kPlain && power != 0) rivals.moment += power * dot;
        dot = power;
      });
      if (measures) {
        keep_rivals(stat + 8 * slot, 8 * slot + lane() / 4 < rows, rivals, count);
      } else {
#pragma unroll
        for (int j = 0; j < kSlots; ++j)
#pragma unroll
          for (int r = 0; r < 2; ++r) sums[slot / 2][j][slot % 2 * 2 + r] *= factor;
      }
    }
  }

  // Returns the largest score of the rivals, and adds to `count` those of the lane that count in the rank.
  template <bool kPlain>
  __device__ static float find_largest(const Row<kPlain>& of_lane, float limit, int& count) {
    float largest = -kInfinity<float>;
    of_lane.each([&](float, float score) {
      largest = fmaxf(largest, score);
      count += score < limit ? 0 : 1;  // NaN counts.
    });
    if (!kPlain && !(-kInfinity<float> < limit)) count -= of_lane.left_out();
#pragma unroll
    for (int mask = 1; mask <= 2; mask *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAll, largest, mask));
    return largest;
  }

  __device__ void keep_rivals(int64_t at, bool exists, Rivals<float> rivals, int count) const {
    rivals.sum = quad_sum(rivals.sum);
    rivals.moment = quad_sum(rivals.moment);
    count += __shfl_xor_sync(kAll, count, 1);
    count += __shfl_xor_sync(kAll, count, 2);
    if (lane() % 4 != 0 || !exists) return;
    a.tiles.set(at, rivals);
    if (a.losses != nullptr) a.counts[at] = static_cast<uint8_t>(count);
  }

  // Stores a whole tile; the matrix has room for values beyond the last row and key.
  template <class Out>
  __device__ void store(Out* matrix, const Sums& sums, int entry, int64_t row, int64_t column) const {
    Out* const first = matrix + (entry * a.pitch_rows + row + lane() / 4) * a.pitch_keys + column;
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      Out* const to = first + 8 * slot * a.pitch_keys;
#pragma unroll
      for (int j = 0; j < kSlots; j += 4) {
        if constexpr (sizeof(Out) == 2) {
          uint32_t pairs[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float* const pair = &sums[slot / 2][j + k][slot % 2 * 2];
            pairs[k] = Narrow<Out>::from(pair[0]).bits | static_cast<uint32_t>(Narrow<Out>::from(pair[1]).bits) << 16;
          }
          transpose_quad(pairs);
          store_chunk(to + 8 * (j + lane() % 4), pairs);
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float* const pair = &sums[slot / 2][j + k][slot % 2 * 2];
            const Pack<Out, 2> values = {pair[0], pair[1]};
            pack_at<2>(to + 8 * (j + k) + 2 * (lane() % 4)) = values;
          }
        }
      }
    }
  }
};

// --- Gradients ---

// Stores rows of sums, or adds them to those in memory. The pitch must be even.
struct AddToSums {
  float* sums;
  int64_t entry_stride, rows;
  int pitch;
  bool adds;

  template <class Tile>
  __device__ void take(const WarpTileSums<Tile>& of_warp, int entry, int64_t row, int64_t column) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int64_t own = row + lane / 4, k = column + 2 * (lane % 4);
    const int left = how_many(rows - own, kTile), across = how_many(pitch - k, kTile);
    float* to = sums + entry * entry_stride + own * pitch + k;
#pragma unroll
    for (int slot = 0; slot < 2 * Tile::kRowTiles; ++slot) {
      if (8 * slot >= left) break;
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j) {
        if (8 * j >= across) break;
        auto& kept = pack_at<2>(to + 8 * j);
        const float* const pair = &of_warp[slot / 2][j][slot % 2 * 2];
        const Pack<float, 2> before = adds ? kept : Pack<float, 2>{};
        const Pack<float, 2> after = {before.v[0] + pair[0], before.v[1] + pair[1]};
        kept = after;
      }
      to += 8 * pitch;
    }
  }
};

}  // namespace cpc::info_nce::cuda
