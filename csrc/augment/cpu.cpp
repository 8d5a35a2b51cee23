// Per-patch augmentation on the CPU: from uint8 images to normalised patches, each transformed in its own way. A task
// is one patch. It is cut into planes of bytes that stay in the first-level cache, and is transformed there: vectors
// map pixels to new values, and a table of places moves pixels. The code of patch extraction then normalises the bytes
// to the result.
#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "augment/augment.h"
#include "augment/transform.h"
#include "core/huge_pages.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "patches/rows.h"

namespace cpc::augment::cpu::CPC_ISA {
namespace {

namespace rows = patches::cpu::CPC_ISA;
using patches::Window;

// Estimated nanoseconds per byte of a patch, for each transform, and for cutting and normalising together.
constexpr double kStepNanoseconds = 1;

// The bytes of a patch: planes of side x side pixels, `plane` apart, with room for one pixel after each, the fill.
struct Layout {
  explicit Layout(const patches::Problem& problem)
      : channels(static_cast<int>(problem.images.shape[1])),
        side(static_cast<int32_t>(problem.geometry.patch)),
        area(side * side),
        plane(divide_up(area + 1, 64) * 64),
        bytes(channels * plane) {}
  // Entries of the table of places: one per pixel, or eight per pixel of one row (deform()).
  int64_t places() const { return std::max(area, 8 * side); }
  int channels;
  int32_t side, area;
  int64_t plane, bytes;
};

// --- Image to bytes ---

// Reads a patch of the batch, cropped and mirrored.
class Cutter {
 public:
  explicit Cutter(const patches::Problem& problem) : problem_(problem) {}

  void cut(uint8_t* to, const Layout& layout, int64_t index) const {
    const patches::Geometry& g = problem_.geometry;
    const TensorView& images = problem_.images;
    const int64_t cols = problem_.cols(), per_image = problem_.rows() * cols, b = index / per_image;
    const int64_t r = index % per_image / cols, c = index % cols;
    const Window window = patches::window_of(g, images, problem_.offsets, problem_.flip, b);
    const int64_t x = window.flip ? g.width - 1 - c * g.stride : c * g.stride;
    const int64_t step = window.flip ? -images.strides[3] : images.strides[3];
    const uint8_t* const first = images.as<uint8_t>() + b * images.strides[0] +
                                 (window.y + r * g.stride) * images.strides[2] + (window.x + x) * images.strides[3];
    for (int k = 0; k < layout.channels; ++k) {
      uint8_t* out = to + k * layout.plane;
      const uint8_t* in = first + k * images.strides[1];
      for (int32_t y = 0; y < layout.side; ++y, out += layout.side, in += images.strides[2]) {
        if (step == 1)
          std::memcpy(out, in, layout.side);
        else
          for (int32_t i = 0; i < layout.side; ++i) out[i] = in[i * step];
      }
    }
  }

 private:
  const patches::Problem& problem_;
};

// --- Bytes to bytes ---

// Where pixels lie between the nodes of an elastic deformation, along either axis.
struct Axis {
  explicit Axis(int32_t side) : node(side), weight(side) {
    for (int32_t i = 0; i < side; ++i) {
      const Between between = between_nodes(i, side);
      node[i] = between.node;
      weight[i] = between.weight;
    }
  }
  std::vector<int32_t> node, weight;
};

// A patch that is being transformed: its pixels, a second buffer for what cannot be done in place, and a table of
// places.
class Patch {
 public:
  Patch(const Layout& layout, const Axis& axis, uint8_t* pixels, uint8_t* other, int32_t* places, uint8_t fill)
      : layout_(layout), axis_(axis), pixels_(pixels), other_(other), places_(places), fill_(fill) {}

  uint8_t* pixels() const { return pixels_; }
  uint8_t* other() const { return other_; }

  // Takes the nearest pixels under an affine map.
  void move(const Affine& m) {
    const int32_t side = layout_.side, outside = layout_.area;
    for (int32_t y = 0; y < side; ++y) {
      const int32_t first_x = m.b * y + m.c, first_y = m.e * y + m.f;
      int32_t* __restrict const at = places_ + y * side;
#pragma omp simd
      for (int32_t x = 0; x < side; ++x) {
        const int32_t from_x = (first_x + m.a * x) >> kPlaceBits, from_y = (first_y + m.d * x) >> kPlaceBits;
        const bool inside = static_cast<uint32_t>(from_x) < static_cast<uint32_t>(side) &&
                            static_cast<uint32_t>(from_y) < static_cast<uint32_t>(side);
        at[x] = inside ? from_y * side + from_x : outside;
      }
    }
    for (int k = 0; k < layout_.channels; ++k) {
      uint8_t* const from = plane(pixels_, k);
      uint8_t* __restrict const to = plane(other_, k);
      from[outside] = fill_;
      for (int32_t i = 0; i < layout_.area; ++i) to[i] = from[places_[i]];
    }
    std::swap(pixels_, other_);
  }

  void crop(const Crop& crop) {
    std::memset(other_, fill_, layout_.bytes);
    for (int k = 0; k < layout_.channels; ++k)
      for (int32_t y = 0; y < crop.side; ++y)
        std::memcpy(plane(other_, k) + (crop.at + y) * layout_.side + crop.at,
                    plane(pixels_, k) + (crop.top + y) * layout_.side + crop.left, crop.side);
    std::swap(pixels_, other_);
  }

  void cut_out(const Cutout& cut) {
    if (cut.left >= cut.right) return;
    for (int k = 0; k < layout_.channels; ++k)
      for (int32_t y = cut.top; y < cut.bottom; ++y)
        std::memset(plane(pixels_, k) + y * layout_.side + cut.left, fill_, cut.right - cut.left);
  }

  void deform(const float* displacements) {
    const int32_t side = layout_.side;
    int32_t nodes[2][kNodes][kNodes];
    for (int64_t i = 0; i < 2 * kNodes * kNodes; ++i) (&nodes[0][0][0])[i] = displacement_of(displacements[i]);
    const int32_t *const columns = axis_.node.data(), *const weights = axis_.weight.data();
    // For each pixel of a row: the first of the four pixels that it is mixed from, the offsets of the others, and the
    // weights.
    int32_t* __restrict const first = places_;
    int32_t* __restrict const right = first + side;
    int32_t* __restrict const below = right + side;
    int32_t* __restrict const weight_x = below + side;
    int32_t* __restrict const weight_y = weight_x + side;
    auto* const corners = reinterpret_cast<uint32_t*>(weight_y + side);  // A row per channel: four pixels in 32 bits.
    for (int32_t y = 0; y < side; ++y) {
      int32_t row[2][kNodes];
      for (int which = 0; which < 2; ++which)
        for (int64_t j = 0; j < kNodes; ++j)
          row[which][j] = mix(nodes[which][columns[y]][j], nodes[which][columns[y] + 1][j], weights[y]);
      const int32_t *const row_y = row[0], *const row_x = row[1];
#pragma omp simd
      for (int32_t x = 0; x < side; ++x) {
        const int32_t node = columns[x], weight = weights[x];
        const Sample sample_y = sample_at(y, mix(row_y[node], row_y[node + 1], weight), side);
        const Sample sample_x = sample_at(x, mix(row_x[node], row_x[node + 1], weight), side);
        first[x] = sample_y.low * side + sample_x.low;
        right[x] = sample_x.high - sample_x.low;
        below[x] = (sample_y.high - sample_y.low) * side;
        weight_x[x] = sample_x.weight;
        weight_y[x] = sample_y.weight;
      }
      // Gathers single pixels for all channels first, so that the vector loads below do not wait for these stores.
      for (int k = 0; k < layout_.channels; ++k) {
        const uint8_t* const from = plane(pixels_, k);
        for (int32_t x = 0; x < side; ++x) {
          const uint8_t *const upper = from + first[x], *const lower = upper + below[x];
          corners[k * side + x] = uint32_t{upper[0]} | uint32_t{upper[right[x]]} << 8 | uint32_t{lower[0]} << 16 |
                                  uint32_t{lower[right[x]]} << 24;
        }
      }
      for (int k = 0; k < layout_.channels; ++k) {
        const uint32_t* __restrict const four = corners + k * side;
        uint8_t* __restrict const to = plane(other_, k) + y * side;
#pragma omp simd simdlen(16)  // Rows are short, so take fewer pixels at a time than a vector has bytes.
        for (int32_t x = 0; x < side; ++x)
          to[x] = static_cast<uint8_t>(mix_pixels(four[x] & 255, four[x] >> 8 & 255, four[x] >> 16 & 255, four[x] >> 24,
                                                  weight_x[x], weight_y[x]));
      }
    }
    std::swap(pixels_, other_);
  }

  // Each pixel v of plane k becomes become(v, k).
  template <class Become>
  void each(const Become& become) {
    for (int k = 0; k < layout_.channels; ++k) each(k, [&](int32_t v) { return become(v, k); });
  }
  template <class Become>
  void each(int k, const Become& become) {
    uint8_t* const v = plane(pixels_, k);
#pragma omp simd
    for (int32_t i = 0; i < layout_.area; ++i) v[i] = static_cast<uint8_t>(become(int32_t{v[i]}));
  }

  // Each pixel becomes become(v, u) of it and the pixel of another patch's bytes.
  template <class Become>
  void each_with(const uint8_t* __restrict others, const Become& become) {
    for (int k = 0; k < layout_.channels; ++k) {
      uint8_t* __restrict const v = plane(pixels_, k);
      const uint8_t* __restrict const u = others + k * layout_.plane;
#pragma omp simd
      for (int32_t i = 0; i < layout_.area; ++i) v[i] = static_cast<uint8_t>(become(int32_t{v[i]}, int32_t{u[i]}));
    }
  }

  void autocontrast() {
    for (int k = 0; k < layout_.channels; ++k) {
      const uint8_t* const v = plane(pixels_, k);
      uint8_t low = 255, high = 0;
#pragma omp simd reduction(min : low) reduction(max : high)
      for (int32_t i = 0; i < layout_.area; ++i) {
        low = v[i] < low ? v[i] : low;
        high = v[i] > high ? v[i] : high;
      }
      if (high <= low) continue;
      const float inverse = 1.0f / static_cast<float>(high - low);
      each(k, [low, inverse](int32_t pixel) { return stretch(pixel, low, inverse); });
    }
  }

  void equalize() {
    for (int k = 0; k < layout_.channels; ++k) {
      uint8_t* const v = plane(pixels_, k);
      // Neighbouring pixels are often equal. As they are counted in two histograms in turn, they do not wait for each
      // other's count.
      int32_t histogram[256] = {}, second[256] = {};
      int32_t i = 0;
      for (; i + 1 < layout_.area; i += 2) {
        ++histogram[v[i]];
        ++second[v[i + 1]];
      }
      if (i < layout_.area) ++histogram[v[i]];
      int32_t largest = 0;
      for (int32_t level = 0; level < 256; ++level) {
        histogram[level] += second[level];
        largest = histogram[level] > 0 ? level : largest;
      }
      const int32_t step = (layout_.area - histogram[largest]) / 255;
      if (step == 0) continue;
      uint8_t table[256];
      for (int32_t level = 0, before = 0; level <= largest; before += histogram[level++])
        table[level] = static_cast<uint8_t>(even_level(before, step));
      for (i = 0; i < layout_.area; ++i) v[i] = table[v[i]];
    }
  }

  void contrast(int32_t factor) {
    int32_t sum = 0;
    const uint8_t* const r = plane(pixels_, 0);
    const uint8_t* const g = plane(pixels_, layout_.channels / 2);  // All the same where there is one channel.
    const uint8_t* const b = plane(pixels_, layout_.channels - 1);
#pragma omp simd reduction(+ : sum)
    for (int32_t i = 0; i < layout_.area; ++i) sum += luma(r[i], g[i], b[i]);
    const int32_t mean = mean_level(sum, layout_.area);
    each([mean, factor](int32_t v, int) { return blend(mean, v, factor); });
  }

  // Blends each pixel with its luma; a factor of 0 leaves only that.
  void color(int32_t factor) {
    if (layout_.channels != 3) return;
    uint8_t* __restrict const r = plane(pixels_, 0);
    uint8_t* __restrict const g = plane(pixels_, 1);
    uint8_t* __restrict const b = plane(pixels_, 2);
#pragma omp simd
    for (int32_t i = 0; i < layout_.area; ++i) {
      const int32_t gray = luma(r[i], g[i], b[i]);
      r[i] = static_cast<uint8_t>(blend(gray, r[i], factor));
      g[i] = static_cast<uint8_t>(blend(gray, g[i], factor));
      b[i] = static_cast<uint8_t>(blend(gray, b[i], factor));
    }
  }

  void hue(int32_t shift) {
    if (layout_.channels != 3) return;
    uint8_t* __restrict const r = plane(pixels_, 0);
    uint8_t* __restrict const g = plane(pixels_, 1);
    uint8_t* __restrict const b = plane(pixels_, 2);
    uint8_t* __restrict const unsure = plane(other_, 0);
    uint8_t* __restrict const hues = plane(other_, 1);
    uint8_t* __restrict const saturations = plane(other_, 2);
    uint8_t any = 0;
#pragma omp simd reduction(| : any)
    for (int32_t i = 0; i < layout_.area; ++i) {
      const Color color = color_of(r[i], g[i], b[i]);
      hues[i] = static_cast<uint8_t>(color.hue);
      saturations[i] = static_cast<uint8_t>(color.saturation);
      unsure[i] = static_cast<uint8_t>(color.unsure);
      any |= static_cast<uint8_t>(color.unsure);
    }
    if (any)
      for (int32_t i = 0; i < layout_.area; ++i)
        if (unsure[i]) hues[i] = static_cast<uint8_t>(hue_as_pillow(r[i], g[i], b[i]));
#pragma omp simd
    for (int32_t i = 0; i < layout_.area; ++i) {
      const int32_t high = g[i] > b[i] ? g[i] : b[i], value = r[i] > high ? r[i] : high;
      const int32_t turned = (hues[i] + shift) & 255;
      r[i] = static_cast<uint8_t>(channel_of(0, turned, saturations[i], value));
      g[i] = static_cast<uint8_t>(channel_of(1, turned, saturations[i], value));
      b[i] = static_cast<uint8_t>(channel_of(2, turned, saturations[i], value));
    }
  }

  void sharpness(int32_t factor) {
    const int32_t side = layout_.side;
    for (int k = 0; k < layout_.channels; ++k) {
      const uint8_t* __restrict const from = plane(pixels_, k);
      uint8_t* __restrict const to = plane(other_, k);
      std::memcpy(to, from, layout_.area);
      // One loop over all rows, including their ends, which are restored below.
#pragma omp simd
      for (int32_t i = side + 1; i < layout_.area - side - 1; ++i) {
        const uint8_t *const above = from + i - side, *const row = from + i, *const below = row + side;
        const int32_t sum =
            above[-1] + above[0] + above[1] + row[-1] + row[0] + row[1] + below[-1] + below[0] + below[1];
        to[i] = static_cast<uint8_t>(blend(smooth(sum, row[0]), row[0], factor));
      }
      for (int32_t y = 0; y < layout_.area; y += side) {
        to[y] = from[y];
        to[y + side - 1] = from[y + side - 1];
      }
    }
    std::swap(pixels_, other_);
  }

 private:
  uint8_t* plane(uint8_t* pixels, int k) const { return pixels + k * layout_.plane; }

  const Layout& layout_;
  const Axis& axis_;
  uint8_t *pixels_, *other_;
  int32_t* places_;
  uint8_t fill_;
};

void apply(Patch& patch, const Problem& problem, const Cutter& cutter, const Layout& layout, int64_t index,
           Transform transform, const float* parameters) {
  switch (transform) {
    case Transform::none:
    case Transform::count: return;
    case Transform::shear_x:
    case Transform::shear_y:
    case Transform::translate_x:
    case Transform::translate_y:
    case Transform::rotate: return patch.move(affine_of(transform, parameters[0], layout.side));
    case Transform::autocontrast: return patch.autocontrast();
    case Transform::invert: return patch.each([](int32_t v, int) { return 255 - v; });
    case Transform::equalize: return patch.equalize();
    case Transform::solarize: {
      const int32_t threshold = solarize_threshold(parameters[0]);
      return patch.each([threshold](int32_t v, int) { return v < threshold ? v : 255 - v; });
    }
    case Transform::posterize: {
      const int32_t mask = posterize_mask(parameters[0]);
      return patch.each([mask](int32_t v, int) { return v & mask; });
    }
    case Transform::contrast: return patch.contrast(factor_of(parameters[0]));
    case Transform::color: return patch.color(factor_of(parameters[0]));
    case Transform::brightness: {
      const int32_t factor = factor_of(parameters[0]);
      return patch.each([factor](int32_t v, int) { return blend(0, v, factor); });
    }
    case Transform::sharpness: return patch.sharpness(factor_of(parameters[0]));
    case Transform::cutout: return patch.cut_out(cutout_of(parameters, layout.side));
    case Transform::sample_pairing: {
      if (problem.partners.ndim == 0) return;
      const int64_t partner = patches::clamp(problem.partners.as<int64_t>()[index], problem.count() - 1);
      cutter.cut(patch.other(), layout, partner);
      const int32_t share = factor_of(parameters[0], 1);
      return patch.each_with(patch.other(), [share](int32_t v, int32_t u) { return blend(v, u, share); });
    }
    case Transform::elastic: {
      if (problem.displacements.ndim == 0) return;
      return patch.deform(problem.displacements.as<float>() + index * 2 * kNodes * kNodes);
    }
    case Transform::tone_curve: {
      const int32_t bends[3] = {bend_of(parameters[0]), bend_of(parameters[1]), bend_of(parameters[2])};
      return patch.each([&bends](int32_t v, int k) { return bend(v, bends[k]); });
    }
    case Transform::hue: return patch.hue(hue_shift(parameters[0]));
    case Transform::gray: return patch.color(0);
    case Transform::crop: return patch.crop(crop_of(parameters, layout.side));
  }
}

// --- Bytes to values ---

// Normalises the bytes of a patch as extraction normalises pixels, in the same order of operations.
template <class Out, class Real>
class Finish {
 public:
  // Worker w's bytes begin at bytes + w * pitch.
  Finish(const patches::Problem& problem, const Layout& layout, uint8_t* bytes, int64_t pitch)
      : as_rows_(problem), as_one_row_(problem), runs_(problem), reader_(as_one_row_) {
    patches::Geometry& g = as_rows_.geometry;
    g.stride = 1;
    g.height = g.width = g.patch;
    runs_ = rows::Runs(as_rows_);
    // Elementwise, a plane is one long row.
    as_one_row_.geometry = g;
    as_one_row_.geometry.height = 1;
    as_one_row_.geometry.width = layout.area;
    TensorView& images = as_one_row_.images;
    images.data = bytes;
    images.shape[2] = 1;
    images.shape[3] = layout.area;
    images.strides[0] = pitch;
    images.strides[1] = layout.plane;
    images.strides[2] = layout.area;
    images.strides[3] = 1;
  }

  Finish(const Finish&) = delete;  // The reader refers to a member.
  Finish& operator=(const Finish&) = delete;

  int64_t values() const { return runs_.values; }
  // Real values of temporary memory.
  int64_t temporary() const { return reader_.temporary() + runs_.values; }

  void finish(Out* out, Real* temporary, int worker) const {
    const patches::Geometry& g = as_rows_.geometry;
    const bool direct = std::is_same_v<Out, Real> && !g.patch_norm;
    Real* const values = direct ? reinterpret_cast<Real*>(out) : temporary + reader_.temporary();
    const int64_t plane = runs_.height * runs_.run;
    for (int64_t k = 0; k < runs_.planes; ++k)
      reader_.template read_as<uint8_t>(values + k * plane, temporary, worker, {0, 0, false}, k, 0, 1);
    if (g.patch_norm) {
      const auto moments = rows::moments(rows::PatchIn<Real>{values, plane}, runs_);
      const Real mean = moments.mean, inverse = 1 / (moments.deviation + Real(patches::kContrastFloor));
      Real* const normalised = std::is_same_v<Out, Real> ? reinterpret_cast<Real*>(out) : values;
#pragma omp simd
      for (int64_t i = 0; i < runs_.values; ++i) normalised[i] = (values[i] - mean) * inverse;
    }
    if constexpr (!std::is_same_v<Out, Real>) cpc::CPC_ISA::narrow(out, values, runs_.values);
  }

 private:
  patches::Problem as_rows_, as_one_row_;
  rows::Runs runs_;
  rows::PlaneReader<Real> reader_;
};

template <class Out, class Real>
void augment_as(const Problem& problem) {
  const patches::Problem& extraction = problem.extraction;
  const Layout layout(extraction);
  const Cutter cutter(extraction);
  const int64_t steps = problem.steps(), place_bytes = layout.places() * int64_t{sizeof(int32_t)};
  const int64_t byte_buffers = 2 * layout.bytes;
  const Axis axis(layout.side);

  // A worker's memory: two buffers of bytes, the table of places, and the temporary memory of Finish.
  const int64_t temporary = Finish<Out, Real>(extraction, layout, nullptr, 0).temporary();
  const int64_t pitch = divide_up(byte_buffers + place_bytes, 64) * 64 + divide_up(temporary * sizeof(Real), 64) * 64;
  const Scratch scratch(pitch);
  uint8_t* const memory = scratch.of<uint8_t>(0);
  const Finish<Out, Real> finish[2] = {{extraction, layout, memory, pitch},
                                       {extraction, layout, memory + layout.bytes, pitch}};
  const int64_t values = finish[0].values();
  advise_huge_pages(extraction.patches.data, extraction.patches.numel() * int64_t{sizeof(Out)});

  const auto augment_patch = [&](int64_t i, int worker) {
    uint8_t* const first = scratch.of<uint8_t>(worker);
    auto* const places = reinterpret_cast<int32_t*>(first + byte_buffers);
    auto* const reals = reinterpret_cast<Real*>(first + divide_up(byte_buffers + place_bytes, 64) * 64);
    Patch patch(layout, axis, first, first + layout.bytes, places, static_cast<uint8_t>(problem.fill));
    cutter.cut(first, layout, i);
    for (int64_t t = i * steps; t < (i + 1) * steps; ++t)
      apply(patch, problem, cutter, layout, i, static_cast<Transform>(problem.codes.as<uint8_t>()[t]),
            problem.parameters.as<float>() + t * kParameters);
    finish[patch.pixels() != first].finish(extraction.patches.as<Out>() + i * values, reals, worker);
  };
  const auto bytes = static_cast<double>(problem.count() * layout.channels * layout.area);
  parallel_for(problem.count(), augment_patch, workers_for(kStepNanoseconds * bytes * static_cast<double>(steps + 1)));
}

}  // namespace

void augment(const Problem& problem) {
  if (problem.extraction.patches.numel() == 0) return;
  with_floating(problem.extraction.patches.dtype, [&](auto out) {
    using Out = decltype(out);
    augment_as<Out, std::conditional_t<std::is_same_v<Out, double>, double, float>>(problem);
  });
}

}  // namespace cpc::augment::cpu::CPC_ISA
