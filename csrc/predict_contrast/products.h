// Matrix products of the predictions and of their gradients on the CPU. The right operand is packed in panels once, the
// left one is read in place, and the result is stored to, or added to, rows at any addresses.
// Included only by sources that are compiled once per instruction set level.
#pragma once

#include <algorithm>

#include "core/gemm.h"
#include "core/workspace.h"

namespace cpc::predict_contrast::cpu::CPC_ISA {

using namespace cpc::CPC_ISA;

// The steps of depth (each of kDepthStep values) that a tile sums at a time, so that this part of a panel stays in the
// cache.
constexpr int64_t kStepsBlock = 256;
// The rows of a result that a task computes for a panel.
constexpr int64_t kTaskRows = 16 * kTileRows;

// A right operand [depth, columns], packed panel after panel: [depth][columns of the panel], or [depth / 2][columns][2]
// where depth goes in pairs. The columns of the last panel are padded to whole registers, and the depth to whole pairs.
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
    // Columns go in groups of a cache line: one by one, every write would touch another line; all at once, every read.
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

// A left operand: left[row, k] is at first + row * pitch + k, or, transposed, at first + k * pitch + row. Where depth
// goes in pairs, the two values of a row's pair are contiguous, and the last pair is padded.
template <class E, bool kTransposed>
struct Left {
  const E* first;
  int64_t pitch;
};

// The rows of a result: successive ones, or those of `indices`, which count from `begin`.
template <class S>
struct Rows {
  S* first;
  int64_t pitch;
  const int64_t* indices = nullptr;
  int64_t begin = 0;

  S* operator[](int64_t row) const { return first + (indices != nullptr ? indices[row] - begin : row) * pitch; }
};

// Computes rows [begin, end) of left * right for a panel's columns, and stores them to or adds them to a result. `adds`
// and the kind of rows are not template parameters, because each value would be compiled for every shape of a tile.
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
        S outside[kColumns];  // A row of the tile, where the panel has padded columns that the result lacks.
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
