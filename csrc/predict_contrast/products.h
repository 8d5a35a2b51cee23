// Matrix products of the predictions and of their gradients on the CPU: the right operand packed in panels once, the left
// one read where it lies, the result stored to, or added to, rows that lie anywhere.
// Included only by sources that are compiled once per instruction set level.
#pragma once

#include <algorithm>

#include "core/gemm.h"
#include "core/workspace.h"

namespace cpc::predict_contrast::cpu::CPC_ISA {

using namespace cpc::CPC_ISA;

// Steps of depth that a tile goes through at a time, each a pair of values where they go in pairs: a panel's part of them
// stays in the cache.
constexpr int64_t kStepsBlock = 256;
// Rows of a result that a task makes of a panel.
constexpr int64_t kTaskRows = 16 * kTileRows;

// The columns of a right operand [depth, columns], panel after panel: [depth][columns of the panel], of which the last are
// filled up to a register, or [depth / 2][columns][2] where steps of depth go in pairs, of which the last is filled up.
template <class E>
struct Panels {
  static constexpr int64_t kLane = kLaneColumns<E>, kColumns = kTileColumns<E>, kStep = kDepthStep<E>;
  E* values;
  int64_t depth, columns;

  static int64_t size(int64_t depth, int64_t columns) {
    return padded_depth<E>(depth) * (divide_up(columns, kLane) * kLane);
  }
  int64_t count() const { return divide_up(columns, kColumns); }
  int64_t width(int64_t panel) const { return std::min(kColumns, columns - panel * kColumns); }
  int64_t padded(int64_t panel) const { return divide_up(width(panel), kLane) * kLane; }
  E* panel(int64_t i) const { return values + i * kColumns * padded_depth<E>(depth); }

  // Packs a panel of a matrix whose rows begin `pitch` values apart.
  template <class Storage>
  void pack(int64_t i, const Storage* from, int64_t pitch) const {
    const int64_t in = width(i), out = padded(i);
    E* to = panel(i);
    from += i * kColumns;
    static constexpr E kZeros[kColumns] = {};
    for (int64_t k = 0; k < depth; k += kStep, from += kStep * pitch, to += kStep * out) {
      if constexpr (kStep > 1)
        interleave(to, from, k + 1 < depth ? from + pitch : kZeros, in);
      else
        for (int64_t c = 0; c < in; ++c) to[c] = to_element<E>(from[c]);
      std::fill(to + kStep * in, to + kStep * out, E{});
    }
  }

  // Packs a panel of a matrix whose columns begin `pitch` values apart.
  template <class Storage>
  void pack_transposed(int64_t i, const Storage* from, int64_t pitch) const {
    // Columns go in groups of a cache line, lest every value touch another.
    constexpr int64_t kGroup = 8;
    const int64_t in = width(i), out = padded(i);
    E* const to = panel(i);
    from += i * kColumns * pitch;
    for (int64_t first = 0; first < out; first += kGroup)
      for (int64_t k = 0; k < padded_depth<E>(depth); k += kStep)
        for (int64_t c = first; c < std::min(out, first + kGroup); ++c)
          for (int64_t step = 0; step < kStep; ++step)
            to[k * out + c * kStep + step] =
                c < in && k + step < depth ? to_element<E>(from[c * pitch + k + step]) : E{};
  }
};

// A left operand: left[row, k] is at first + row * pitch + k, or, transposed, at first + k * pitch + row; where steps of
// depth go in pairs, both values of a row's pair are beside each other, and the last pair is filled up.
template <class E, bool kTransposed>
struct Left {
  const E* first;
  int64_t pitch;
};

// Where the rows of a result are: one after another, or those of some indices, which are told from `begin` on.
template <class S>
struct Rows {
  S* first;
  int64_t pitch;
  const int64_t* indices = nullptr;
  int64_t begin = 0;

  S* operator[](int64_t row) const { return first + (indices != nullptr ? indices[row] - begin : row) * pitch; }
};

// Rows [begin, end) of the panel's columns of left * right, stored to or added to those of a result. Whether it adds, and
// where rows lie, is no parameter of the template: each of its values would be compiled for every shape of a tile.
template <class E, bool kTransposed>
void multiply(const Left<E, kTransposed>& left, const Panels<E>& right, int64_t panel, int64_t begin, int64_t end,
              const Rows<Sum<E>>& result, bool adds) {
  using S = Sum<E>;
  constexpr int64_t kColumns = kTileColumns<E>, kLane = kLaneColumns<E>, kStep = kDepthStep<E>;
  const int64_t width = right.width(panel), padded = right.padded(panel), lanes = padded / kLane;
  const int64_t steps = divide_up(right.depth, kStep), parts = std::max<int64_t>(divide_up(steps, kStepsBlock), 1);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t from = part * steps / parts * kStep, depth = (part + 1) * steps / parts * kStep - from;
    const E* const values = right.panel(panel) + from * padded;
    for (int64_t row = begin; row < end; row += kTileRows)
      with_tile(std::min<int64_t>(kTileRows, end - row), lanes, [&](auto height, auto vectors) {
        Tile<E, height, vectors> tile;
        S outside[kColumns];  // Where the last columns of a panel are none.
        S* rows[height];
        for (int r = 0; r < height; ++r) rows[r] = result[row + r] + panel * kColumns;
        tile.clear();
        if (adds || part > 0)
          for (int r = 0; r < height; ++r) {
            const S* from_row = rows[r];
            if (width < padded) from_row = std::copy_n(rows[r], width, outside) - width;
            for (int v = 0; v < vectors; ++v) tile.sums[r][v] = load_register(from_row + v * kLane);
          }
        const E* const first = left.first + (kTransposed ? from * left.pitch + row * kStep : row * left.pitch + from);
        tile.multiply(
            [first, pitch = left.pitch](int r, int64_t k) {
              return kTransposed ? first + k * pitch + r * kDepthStep<E> : first + r * pitch + k;
            },
            values, depth);
        for (int r = 0; r < height; ++r) {
          S* const to_row = width < padded ? outside : rows[r];
          for (int v = 0; v < vectors; ++v) store_register(to_row + v * kLane, tile.sums[r][v]);
          if (width < padded) std::copy_n(outside, width, rows[r]);
        }
      });
  }
}

}  // namespace cpc::predict_contrast::cpu::CPC_ISA
