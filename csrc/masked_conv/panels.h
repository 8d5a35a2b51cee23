// Shared by the CPU's convolution and its weight gradient: output channels are split into panels of tile columns.
// Included only by sources that are compiled once per instruction set level.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/gemm.h"
#include "core/simd.h"
#include "core/workspace.h"
#include "masked_conv/terms.h"

namespace cpc::masked_conv::cpu::CPC_ISA {

using namespace cpc::CPC_ISA;

// The output channels [first, first + count) of a panel. If gated, they are in the first half of its vectors, and their
// gates in the second half.
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
  // The offset of panel i in elements, for products of a given (padded) depth.
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

// The depth of the product over all terms. Each term's channels are padded to whole steps. If there are fewer than
// kJoinedBelow channels, terms are joined instead: the values of all terms are gathered into one row per pixel.
template <class E>
struct ProductDepth {
  static constexpr int64_t kJoinedBelow = 16;

  bool joined;
  int64_t of_term, total;

  ProductDepth(int64_t inputs, int64_t terms)
      : joined(inputs < kJoinedBelow && terms > 1),
        of_term(joined ? inputs : padded_depth<E>(inputs)),
        total(padded_depth<E>(terms * of_term)) {}
};

template <class T, int64_t n>
struct LanesAs {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};
template <class T, int64_t n>
using LanesOf = typename LanesAs<T, n>::type;

// Load and store a register of values, converting from and to the type in which they are stored.
template <class S, class Storage>
inline Register<S> load_widened(const Storage* from) {
  if constexpr (std::is_same_v<S, Storage>) return load_register(from);
  constexpr int64_t kLanes = kRegisterLanes<S>;
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    LanesOf<uint16_t, kLanes> halves;
    std::memcpy(&halves, from, sizeof halves);
    return (Register<S>)(__builtin_convertvector(halves, LanesOf<uint32_t, kLanes>) << 16);
  }
  S values[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) values[i] = widen(from[i]);
  return load_register(values);
}
template <class S, class Storage>
inline void store_narrowed(Storage* to, Register<S> v) {
#if defined(__AVX512BF16__)
  // This flushes denormals to zero, as the bfloat16 products of this instruction set do.
  if constexpr (std::is_same_v<Storage, BFloat16>) {
    const __m256bh narrowed = _mm512_cvtneps_pbh((__m512)v);
    return std::memcpy(to, &narrowed, sizeof narrowed), void();
  }
#endif
  S values[kRegisterLanes<S>];
  store_register(values, v);
  narrow(to, values, kRegisterLanes<S>);
}

// A ReLU that keeps NaN, as torch.relu does.
template <class Storage>
inline Storage relu(Storage v) {
  if constexpr (std::is_same_v<Storage, BFloat16> || std::is_same_v<Storage, Half>) {
    constexpr uint16_t kInfinity = std::is_same_v<Storage, Half> ? 0x7c00 : 0x7f80;
    return Storage{static_cast<uint16_t>(v.bits >= 0x8000 && v.bits <= (0x8000 | kInfinity) ? 0 : v.bits)};
  } else {
    return v < 0 ? Storage{} : v;
  }
}

// Converts a pixel's values to the type in which they are multiplied.
template <class E, class Storage>
inline void to_elements(E* __restrict to, const Storage* __restrict from, int64_t count, bool through_relu) {
  if (through_relu)
    for (int64_t k = 0; k < count; ++k) to[k] = to_element<E>(relu(from[k]));
  else
    for (int64_t k = 0; k < count; ++k) to[k] = to_element<E>(from[k]);
}

// to = one + sign * other, for the values of two pixels, of which `one` may be null for zeros.
template <class E, class Storage>
inline void add(E* __restrict to, const Storage* one, const Storage* other, int64_t count, int sign,
                bool through_relu) {
  using S = Sum<E>;
  constexpr int64_t kLanes = kRegisterLanes<S>;
  const auto add_all = [&](auto read) {
    const auto combine = [&](auto is_sum, auto has_one) {
      const auto value = [&](auto first, auto second) {
        if constexpr (!has_one)
          return is_sum ? second : -second;
        else
          return is_sum ? first + second : first - second;
      };
      int64_t k = 0;
      for (; k + kLanes <= count; k += kLanes) {
        const Register<S> second = read(load_widened<S>(other + k));
        Register<S> first{};
        if constexpr (has_one) first = read(load_widened<S>(one + k));
        store_narrowed<S>(to + k, value(first, second));
      }
      for (; k < count; ++k) {
        S first{};
        if constexpr (has_one) first = read(S{widen(one[k])});
        to[k] = narrow<E>(value(first, read(S{widen(other[k])})));
      }
    };
    using Yes = std::true_type;
    using No = std::false_type;
    if (sign > 0)
      one ? combine(Yes{}, Yes{}) : combine(Yes{}, No{});
    else
      one ? combine(No{}, Yes{}) : combine(No{}, No{});
  };
  if (through_relu)
    add_all([](auto v) { return v < 0 ? decltype(v){} : v; });
  else
    add_all([](auto v) { return v; });
}

// Elements between arrays that are written side by side, so that they are not all in the same set of the cache.
template <class E>
constexpr int64_t kApart = 64 / sizeof(E);

// Pixels of a square, by row and column; those outside of the image are rows of zeros.
template <class Storage>
using Square = std::array<std::array<const Storage*, kSums>, kSums>;

// The pixels of image b that products read, from (y, x) on.
template <class Storage>
[[gnu::noinline]] Square<Storage> square_of(const TensorView& view, int64_t b, int64_t y, int64_t x,
                                            const Products& rows, const Products& columns, const Storage* zeros) {
  Square<Storage> square;
  for (int64_t i = 0; i < rows.pixels; ++i)
    for (int64_t j = 0; j < columns.pixels; ++j) {
      const bool inside =
          b < view.shape[0] && y + i >= 0 && y + i < view.shape[2] && x + j >= 0 && x + j < view.shape[3];
      square[i][j] =
          inside ? view.as<Storage>() + b * view.strides[0] + (y + i) * view.strides[2] + (x + j) * view.strides[3]
                 : zeros;
    }
  return square;
}

// Writes what each product of a quad reads from a square of pixels: `count` values from the channel `first` on. Those
// of product i are written at to + places[i]. Products are ordered by rows, then columns.
template <const Products& kRows, const Products& kColumns, class Storage>
[[gnu::noinline]] void read_square(const Square<Storage>& from, int64_t first, int64_t count, bool through_relu,
                                   float* to, const int64_t* places) {
  constexpr int64_t kLanes = kRegisterLanes<float>;
  const float least = through_relu ? 0 : -std::numeric_limits<float>::infinity();
  const auto read_at = [&](auto load, auto store) {
    using V = decltype(load(from[0][0]));
    const auto combine = [](const Reading& reading, const auto& value) {
      const V v = value(reading.at);
      return reading.sign == 0 ? v : reading.sign > 0 ? v + value(reading.other) : v - value(reading.other);
    };
    V rows[kRows.count][kColumns.pixels];
#pragma GCC unroll 4
    for (int x = 0; x < kColumns.pixels; ++x) {
      V pixels[kRows.pixels];
#pragma GCC unroll 4
      for (int y = 0; y < kRows.pixels; ++y) {
        const V v = load(from[y][x]);
        pixels[y] = v < least ? V{} + least : v;  // NaN stays.
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows.count; ++i)
        rows[i][x] = combine(kRows.products[i].reading, [&](int64_t y) { return pixels[y]; });
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows.count; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kColumns.count; ++j)
        store(to + places[i * kColumns.count + j],
              combine(kColumns.products[j].reading, [&](int64_t x) { return rows[i][x]; }));
  };
  int64_t k = 0;
  for (; k + kLanes <= count; k += kLanes)
    read_at([=](const Storage* p) { return load_widened<float>(p + first + k); },
            [k](float* p, Register<float> v) { store_register(p + k, v); });
  for (; k < count; ++k)
    read_at([=](const Storage* p) { return float{widen(p[first + k])}; }, [k](float* p, float v) { p[k] = v; });
}

// Reads what the products of a rectangle of taps multiply.
template <class Storage>
struct RectangleReader {
  Rectangle taps;
  const Products *rows, *columns;
  decltype(&read_square<kProductsOfOne, kProductsOfOne, Storage>) read;
  std::vector<int64_t> places;  // Of the products' values.

  // Reads for the quad at (y, x) of image b; the other arguments are those of square_of() and read_square().
  void operator()(const TensorView& view, int64_t b, int64_t y, int64_t x, const Storage* zeros, int64_t first,
                  int64_t count, bool through_relu, float* to) const {
    const auto square = square_of<Storage>(view, b, y + taps.dy, x + taps.dx, *rows, *columns, zeros);
    read(square, first, count, through_relu, to, places.data());
  }
};

// The readers of rectangles, where the values of term t are `pitch` values after those of the term before.
template <class Storage>
std::vector<RectangleReader<Storage>> readers_of(const Terms& terms, int64_t pitch) {
  std::vector<RectangleReader<Storage>> readers;
  for (const Rectangle& taps : terms.rectangles)
    with_products_of(taps.height, [&](auto rows) {
      with_products_of(taps.width, [&](auto columns) {
        readers.push_back({taps, rows.value, columns.value, &read_square<*rows.value, *columns.value, Storage>, {}});
      });
    });
  for (int64_t t = 0; t < std::ssize(terms.all); ++t) readers[terms.all[t].rectangle].places.push_back(t * pitch);
  return readers;
}

}  // namespace cpc::masked_conv::cpu::CPC_ISA
