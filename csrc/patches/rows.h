// Shared by the CPU kernels that make patches: transforming the rows of a window, and the mean and contrast of a patch
// within them. Included only by sources that are compiled once per instruction set level.
#pragma once

#include <cmath>
#include <type_traits>

#include "core/simd.h"
#include "patches/patches.h"
#include "patches/window.h"

namespace cpc::patches::cpu::CPC_ISA {

using namespace cpc::CPC_ISA;

// --- Image rows to transformed rows ---

// One row of n source pixels with a step between them (negative for a mirrored row).
template <class In>
struct SourceRow {
  const In* pixels;
  int64_t step;
};

// out[i * out_step] = scale * source[i] + shift
template <class In, class Real>
void transform_row(Real* __restrict out, int64_t out_step, SourceRow<In> source, int64_t n, Real scale, Real shift) {
  const In* __restrict in = source.pixels;
  const int64_t step = source.step;
  const auto run = [&](auto in_step, auto to_step) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i * to_step] = scale * static_cast<Real>(widen(in[i * in_step])) + shift;
  };
  // Steps known at compile time let the compiler load and store whole vectors.
  constexpr std::integral_constant<int64_t, 1> forward;
  constexpr std::integral_constant<int64_t, -1> mirrored;
  if (out_step != 1)
    run(step, out_step);
  else if (step == 1)
    run(forward, forward);
  else if (step == -1)
    run(mirrored, forward);
  else
    run(step, forward);
}

template <class In, class Real>
void transform_gray_row(Real* __restrict out, const SourceRow<In> (&rgb)[3], int64_t n, Real scale, Real shift) {
  const In* __restrict red = rgb[0].pixels;
  const In* __restrict green = rgb[1].pixels;
  const In* __restrict blue = rgb[2].pixels;
  const Real r = scale * Real(luma(0)), g = scale * Real(luma(1)), b = scale * Real(luma(2));
  const auto run = [&](auto step) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      out[i] = r * static_cast<Real>(widen(red[i * step])) + g * static_cast<Real>(widen(green[i * step])) +
               b * static_cast<Real>(widen(blue[i * step])) + shift;
  };
  if (rgb[0].step == 1)
    run(std::integral_constant<int64_t, 1>{});
  else if (rgb[0].step == -1)
    run(std::integral_constant<int64_t, -1>{});
  else
    run(rgb[0].step);
}

// Interleaves three planes of n values: the common colour case of channels-last patches.
template <class T>
void interleave3(T* __restrict out, const T* __restrict a, const T* __restrict b, const T* __restrict c, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[3 * i] = a[i];
    out[3 * i + 1] = b[i];
    out[3 * i + 2] = c[i];
  }
}

// Transforms the pixels of windows into planes in the order of patches: a plane per channel, or with channels_last one
// plane of rows of interleaved channels.
template <class Real>
class PlaneReader {
 public:
  explicit PlaneReader(const Problem& problem) : problem_(problem) {}

  // Values of temporary memory that read() needs.
  int64_t temporary() const { return interleaves() ? 3 * problem_.geometry.width : 0; }

  // Writes rows [first, first + count) of plane k of image b's window densely to `out`.
  void read(Real* out, Real* temporary, int64_t b, const Window& window, int64_t k, int64_t first,
            int64_t count) const {
    switch (problem_.images.dtype) {
      case DType::u8: return read_as<uint8_t>(out, temporary, b, window, k, first, count);
      case DType::f16: return read_as<Half>(out, temporary, b, window, k, first, count);
      case DType::bf16: return read_as<BFloat16>(out, temporary, b, window, k, first, count);
      case DType::f32: return read_as<float>(out, temporary, b, window, k, first, count);
      default: return read_as<double>(out, temporary, b, window, k, first, count);
    }
  }

  // The same for images known to be of type In.
  template <class In>
  void read_as(Real* out, Real* temporary, int64_t b, const Window& window, int64_t k, int64_t first,
               int64_t count) const {
    const int64_t row_values = problem_.geometry.width * (problem_.geometry.channels_last ? problem_.channels() : 1);
    for (int64_t y = 0; y < count; ++y) read_row<In>(out + y * row_values, temporary, b, window, k, first + y);
  }

 private:
  bool interleaves() const { return problem_.geometry.channels_last && problem_.channels() == 3; }

  template <class In>
  void read_row(Real* out, Real* temporary, int64_t b, const Window& window, int64_t k, int64_t y) const {
    const Geometry& g = problem_.geometry;
    const TensorView& images = problem_.images;
    const int64_t n = g.width, channels = problem_.channels();
    const auto row = [&](int64_t channel) {
      const int64_t x = window.x + (window.flip ? n - 1 : 0);
      const int64_t at = b * images.strides[0] + channel * images.strides[1] + (window.y + y) * images.strides[2] +
                         x * images.strides[3];
      return SourceRow<In>{images.as<In>() + at, window.flip ? -images.strides[3] : images.strides[3]};
    };
    const auto transform = [&](Real* to, int64_t step, int64_t channel) {
      transform_row(to, step, row(channel), n, static_cast<Real>(problem_.scale[channel]),
                    static_cast<Real>(problem_.shift[channel]));
    };
    if (g.gray && images.shape[1] == 3) {
      transform_gray_row(out, {row(0), row(1), row(2)}, n, static_cast<Real>(problem_.scale[0]),
                         static_cast<Real>(problem_.shift[0]));
    } else if (interleaves()) {
      for (int64_t channel = 0; channel < 3; ++channel) transform(temporary + channel * n, 1, channel);
      interleave3(out, temporary, temporary + n, temporary + 2 * n, n);
    } else if (g.channels_last) {
      for (int64_t channel = 0; channel < channels; ++channel) transform(out + channel, channels, channel);
    } else {
      transform(out, 1, k);
    }
  }

  const Problem& problem_;
};

// The layout of a patch, in memory and in a buffer of transformed rows: `planes` planes of `height` rows of `run`
// values.
struct Runs {
  explicit Runs(const Problem& problem) {
    const Geometry& g = problem.geometry;
    const int64_t channels = problem.channels();
    planes = g.channels_last ? 1 : channels;
    height = g.patch;
    pixel = g.channels_last ? channels : 1;
    run = g.patch * pixel;
    row = g.width * pixel;
    values = planes * height * run;
  }
  int64_t planes;
  int64_t height;
  int64_t run;
  int64_t pixel;   // Values from one pixel of a row to the next.
  int64_t row;     // Values of one row of the window.
  int64_t values;  // Values of a patch.
};

// --- A patch's own mean and contrast ---

// A patch within a buffer of transformed rows: planes are `plane` values apart.
template <class Real>
struct PatchIn {
  const Real* first;
  int64_t plane;
};

// Calls visit(row) with each row of a patch, in the order of memory.
template <class Real, class Visit>
void for_each_run(const PatchIn<Real>& patch, const Runs& runs, const Visit& visit) {
  for (int64_t k = 0; k < runs.planes; ++k)
    for (int64_t y = 0; y < runs.height; ++y) visit(patch.first + k * patch.plane + y * runs.row);
}

// Sums term(value) over a patch, where term works on a value and on a vector of them. Four rows are added at a time, so
// that additions do not wait for one another.
template <class Real, class Term>
Real sum_over(const PatchIn<Real>& patch, const Runs& runs, const Term& term) {
  constexpr int64_t kRows = 4;
  Vector<Real> lanes[kRows] = {};
  Real rest = 0;
  for (int64_t k = 0; k < runs.planes; ++k) {
    const Real* row = patch.first + k * patch.plane;
    const auto add = [&](auto rows) {
      int64_t i = 0;
      for (; i + kLanes<Real> <= runs.run; i += kLanes<Real>)
        for (int64_t y = 0; y < rows; ++y) lanes[y] += term(load(row + y * runs.row + i));
      for (; i < runs.run; ++i)
        for (int64_t y = 0; y < rows; ++y) rest += term(row[y * runs.row + i]);
      row += rows * runs.row;
    };
    int64_t y = 0;
    for (; y + kRows <= runs.height; y += kRows) add(std::integral_constant<int64_t, kRows>{});
    for (; y < runs.height; ++y) add(std::integral_constant<int64_t, 1>{});
  }
  return sum<Real>(lanes[0] + lanes[1] + (lanes[2] + lanes[3])) + rest;
}

template <class Real>
struct Moments {
  Real mean, deviation;
};

template <class Real>
Moments<Real> moments(const PatchIn<Real>& patch, const Runs& runs) {
  const Real n = static_cast<Real>(runs.values);
  const Real mean = sum_over(patch, runs, [](auto v) { return v; }) / n;
  const Real variance = sum_over(patch, runs, [mean](auto v) { return (v - mean) * (v - mean); }) / n;
  return {mean, std::sqrt(variance)};
}

}  // namespace cpc::patches::cpu::CPC_ISA
