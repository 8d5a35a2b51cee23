// Matrix products of the predictions and of their gradients on the CPU: the right operand packed in panels once, the left
// one read where it lies, the result stored to, or added to, rows that lie anywhere.
// Included only by sources that are compiled once per instruction set level.
#pragma once

#include <algorithm>

#include "core/gemm.h"
#include "core/workspace.h"

namespace cpc::predict_contrast::cpu::CPC_ISA {

using namespace cpc::CPC_ISA;

// Depth that a tile goes through at a time: a panel's part of it stays in the first-level cache.
constexpr int64_t kDepthBlock = 256;
// Rows of a result that a task makes of a panel.
constexpr int64_t kTaskRows = 16 * kTileRows;

// The columns of a right operand [depth, columns], panel after panel: [depth][columns of the panel], of which the last are
// filled up to a register.
template <class S>
struct Panels {
  static constexpr int64_t kLane = kLaneColumns<S>, kColumns = kTileColumns<S>;
  S* values;
  int64_t depth, columns;

  static int64_t size(int64_t depth, int64_t columns) { return depth * (divide_up(columns, kLane) * kLane); }
  int64_t count() const { return divide_up(columns, kColumns); }
  int64_t width(int64_t panel) const { return std::min(kColumns, columns - panel * kColumns); }
  int64_t padded(int64_t panel) const { return divide_up(width(panel), kLane) * kLane; }
  S* panel(int64_t i) const { return values + i * kColumns * depth; }

  // Packs a panel of a matrix whose rows begin `pitch` values apart.
  template <class Storage>
  void pack(int64_t i, const Storage* from, int64_t pitch) const {
    const int64_t in = width(i), out = padded(i);
    S* const to = panel(i);
    from += i * kColumns;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t c = 0; c < in; ++c) to[k * out + c] = widen(from[k * pitch + c]);
      for (int64_t c = in; c < out; ++c) to[k * out + c] = 0;
    }
  }

  // Packs a panel of a matrix whose columns begin `pitch` values apart.
  template <class Storage>
  void pack_transposed(int64_t i, const Storage* from, int64_t pitch) const {
    // Columns go in groups of a cache line, lest every value touch another.
    constexpr int64_t kGroup = 8;
    const int64_t in = width(i), out = padded(i);
    S* const to = panel(i);
    from += i * kColumns * pitch;
    for (int64_t first = 0; first < out; first += kGroup)
      for (int64_t k = 0; k < depth; ++k)
        for (int64_t c = first; c < std::min(out, first + kGroup); ++c)
          to[k * out + c] = c < in ? widen(from[c * pitch + k]) : S{};
  }
};

// A left operand: left[row, k] is at first + row * pitch + k, or, transposed, at first + k * pitch + row.
template <class S, bool kTransposed>
struct Left {
  const S* first;
  int64_t pitch;
};

// Rows [begin, end) of the panel's columns of left * right, added to what is at row_of(row) + column, where kAdds.
template <bool kAdds, class S, bool kTransposed, class RowOf>
void multiply(const Left<S, kTransposed>& left, const Panels<S>& right, int64_t panel, int64_t begin, int64_t end,
              const RowOf& row_of) {
  constexpr int64_t kColumns = kTileColumns<S>;
  const int64_t width = right.width(panel), padded = right.padded(panel), lanes = padded / kLaneColumns<S>;
  const int64_t parts = std::max<int64_t>(divide_up(right.depth, kDepthBlock), 1);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t from = part * right.depth / parts, depth = (part + 1) * right.depth / parts - from;
    const S* const values = right.panel(panel) + from * padded;
    for (int64_t row = begin; row < end; row += kTileRows)
      with_tile(std::min<int64_t>(kTileRows, end - row), lanes, [&](auto height, auto vectors) {
        Tile<S, height, vectors> tile;
        S outside[kColumns];  // Where the last columns of a panel are none.
        S* rows[height];
        for (int r = 0; r < height; ++r) rows[r] = row_of(row + r) + panel * kColumns;
        tile.clear();
        if (kAdds || part > 0)
          for (int r = 0; r < height; ++r) {
            const S* from_row = rows[r];
            if (width < padded) from_row = std::copy_n(rows[r], width, outside) - width;
            for (int v = 0; v < vectors; ++v) tile.sums[r][v] = load_register(from_row + v * kLaneColumns<S>);
          }
        const S* const first = left.first + (kTransposed ? from * left.pitch + row : row * left.pitch + from);
        tile.multiply([first, pitch = left.pitch](
                          int r, int64_t k) { return kTransposed ? first + k * pitch + r : first + r * pitch + k; },
                      values, depth);
        for (int r = 0; r < height; ++r) {
          S* const to_row = width < padded ? outside : rows[r];
          for (int v = 0; v < vectors; ++v) store_register(to_row + v * kLaneColumns<S>, tile.sums[r][v]);
          if (width < padded) std::copy_n(outside, width, rows[r]);
        }
      });
  }
}

}  // namespace cpc::predict_contrast::cpu::CPC_ISA
