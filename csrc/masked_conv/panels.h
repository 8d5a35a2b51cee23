// What the CPU's convolution and its weight gradient share: output channels in panels of tile columns. Included only by
// sources that are compiled once per instruction set level.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "core/gemm.h"
#include "core/simd.h"
#include "core/workspace.h"

namespace cpc::masked_conv::cpu::CPC_ISA {

using namespace cpc::CPC_ISA;

// The output channels of a panel. Gated, its vectors are two halves: `count` channels from `first` on, and the ones
// that gate them.
struct Panel {
  int64_t first, count;
  int64_t vectors;
};

template <class E>
class Panels {
 public:
  Panels(int64_t outputs, bool gated)
      : halves_(gated ? 2 : 1), channels_(outputs / halves_), width_(kTileColumns<E> / halves_) {}

  int64_t count() const { return divide_up(channels_, width_); }
  Panel operator[](int64_t i) const {
    const int64_t first = i * width_, count = std::min(width_, channels_ - first);
    return {first, count, halves_ * divide_up(count, kLaneColumns<E>)};
  }
  // Elements in all panels before i, for products of some (padded) depth.
  int64_t offset(int64_t i, int64_t depth) const {
    if (i < count()) return i * kTileColumns<E> * depth;
    return (i - 1) * kTileColumns<E> * depth + (*this)[i - 1].vectors * kLaneColumns<E> * depth;
  }
  // The output channel of a panel's column, or -1 for a column of padding.
  int64_t channel(const Panel& panel, int64_t column) const {
    const int64_t half_width = panel.vectors / halves_ * kLaneColumns<E>;
    const int64_t half = column / half_width, within = column % half_width;
    return within < panel.count ? half * channels_ + panel.first + within : -1;
  }

 private:
  int64_t halves_, channels_, width_;
};

template <class E, class Storage>
inline E to_element(Storage v) {
  if constexpr (std::is_same_v<E, Storage>)
    return v;
  else
    return widen(v);
}

}  // namespace cpc::masked_conv::cpu::CPC_ISA
