// Patch extraction on the CPU: from images to normalised overlapping patches, and the gradient back.
// A task is one image and a run of its patch rows. It transforms the image rows they need into a buffer that stays in
// the cache, each pixel once, then every patch is a series of short copies from there. With the buffer in the order of
// the patches (planes of rows, or rows of interleaved channels), both memory formats are the same copies.
#include <algorithm>
#include <type_traits>

#include "core/huge_pages.h"
#include "core/parallel.h"
#include "core/simd.h"
#include "patches/patches.h"
#include "patches/rows.h"
#include "patches/window.h"

namespace cpc::patches::cpu::CPC_ISA {
namespace {

// The rows of a task's buffer should fit the second-level cache beside the patches being written.
constexpr int64_t kBufferBytes = 128 << 10;
// Results larger than this have left the cache before they are read, so they are written past it.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

// Estimated nanoseconds per value of a patch, without and with patch_norm: forward, then backward.
constexpr double kNanoseconds = 0.25, kNormNanoseconds = 0.75, kGradNanoseconds = 0.7, kNormGradNanoseconds = 3;

// --- Forward ---

// A task: patch rows [first, last) of image b.
struct Task {
  int64_t b, first, last;
};

// Splits the patch rows of every image into runs whose window rows fit the buffer, and into enough of them for the
// threads.
class Tasks {
 public:
  Tasks(const Problem& problem, int64_t window_row_bytes, int threads) : rows_(problem.rows()) {
    const Geometry& g = problem.geometry;
    const int64_t fitting = (kBufferBytes / window_row_bytes - g.patch) / g.stride + 1;
    const int64_t balanced = problem.batch() * rows_ / (4 * threads);
    per_task_ = std::clamp(std::min(fitting, balanced), int64_t{1}, rows_);
    per_image_ = (rows_ + per_task_ - 1) / per_task_;
    window_rows_ = (per_task_ - 1) * g.stride + g.patch;
    count_ = problem.batch() * per_image_;
  }
  int64_t count() const { return count_; }
  int64_t window_rows() const { return window_rows_; }  // The most of one task.
  Task operator[](int64_t i) const {
    const int64_t first = i % per_image_ * per_task_;
    return {i / per_image_, first, std::min(first + per_task_, rows_)};
  }

 private:
  int64_t rows_, per_task_, per_image_, window_rows_, count_;
};

// Cuts count x cols patches out of transformed rows. Pitches and steps are in bytes, so that one copy of this serves
// all types of patches.
struct Cut {
  int64_t count, cols, planes, height;
  int64_t run, row_pitch, plane_pitch;
  int64_t step_y, step_x;
};

template <class Copy>
void cut_patches(char* __restrict out, const char* __restrict rows, const Cut& cut, const Copy& copy) {
  for (int64_t r = 0; r < cut.count; ++r)
    for (int64_t c = 0; c < cut.cols; ++c)
      for (int64_t k = 0; k < cut.planes; ++k) {
        const char* in = rows + r * cut.step_y + c * cut.step_x + k * cut.plane_pitch;
        for (int64_t y = 0; y < cut.height; ++y, out += cut.run, in += cut.row_pitch) copy(out, in);
      }
}

#if defined(__AVX2__)
// out[i] = scale * in[i] + shift for n >= Width bytes (to the left of `in` where mirrored), in blocks of Width of which
// the last two may overlap; kBlocks, where it is not 0, says at compile time that n is kBlocks * Width.
template <int64_t Width, int64_t kBlocks, bool kMirrored, bool kStreams>
void convert_run(float* __restrict out, const uint8_t* __restrict in, int64_t n, float scale, float shift) {
  const auto block = [&](int64_t at) {
    const uint8_t* from = kMirrored ? in - at : in + at;
    if constexpr (kStreams) {
      alignas(64) float scaled[Width];
      scale_bytes<Width, kMirrored>(scaled, from, scale, shift);
      stream_run(reinterpret_cast<char*>(out + at), reinterpret_cast<const char*>(scaled), sizeof scaled);
    } else {
      scale_bytes<Width, kMirrored>(out + at, from, scale, shift);
    }
  };
  if constexpr (kBlocks > 0) {
    for (int64_t i = 0; i < kBlocks; ++i) block(i * Width);
  } else {
    for (int64_t at = 0; at < n - Width; at += Width) block(at);
    block(n - Width);
  }
}

template <int64_t Width, int64_t kBlocks, bool kStreams>
void convert_patches(const Problem& problem, const Task& task, float* out) {
  // Local copies, so that the compiler need not reload them after every store to `out`.
  const Geometry g = problem.geometry;
  const TensorView images = problem.images;
  const int64_t cols = problem.cols(), channels = problem.channels();
  const Window window = window_of(g, images, problem.offsets, problem.flip, task.b);
  const auto run = [&](auto mirrored) {
    const int64_t x = window.x + (mirrored ? g.width - 1 : 0), step_x = mirrored ? -g.stride : g.stride;
    const uint8_t* const first = images.as<uint8_t>() + task.b * images.strides[0] + window.y * images.strides[2] + x;
    for (int64_t r = task.first; r < task.last; ++r)
      for (int64_t c = 0; c < cols; ++c)
        for (int64_t k = 0; k < channels; ++k) {
          const uint8_t* in = first + k * images.strides[1] + r * g.stride * images.strides[2] + c * step_x;
          const float scale = static_cast<float>(problem.scale[k]), shift = static_cast<float>(problem.shift[k]);
          for (int64_t y = 0; y < g.patch; ++y, in += images.strides[2], out += g.patch)
            convert_run<Width, kBlocks, mirrored, kStreams>(out, in, g.patch, scale, shift);
        }
  };
  if (window.flip)
    run(std::true_type{});
  else
    run(std::false_type{});
}
#endif

// The commonest case, dense rows of bytes to float planes: converting a pixel anew for each patch that contains it
// costs less than fetching it from a buffer of floats that is four times as large. Returns false in other cases.
bool convert([[maybe_unused]] const Problem& problem, [[maybe_unused]] const Task& task, [[maybe_unused]] float* out,
             [[maybe_unused]] bool streams) {
#if defined(__AVX2__)
  const Geometry& g = problem.geometry;
  if (g.patch_norm || g.channels_last || problem.images.dtype != DType::u8 || problem.images.strides[3] != 1 ||
      problem.channels() != problem.images.shape[1] || g.patch < 8 || (streams && g.patch % kFloatLanes != 0))
    return false;
  if (streams)
    convert_patches<kFloatLanes, 0, true>(problem, task, out);
  else if (g.patch == 16)
    convert_patches<kFloatLanes, 16 / kFloatLanes, false>(problem, task, out);
  else if (g.patch >= kFloatLanes)
    convert_patches<kFloatLanes, 0, false>(problem, task, out);
  else
    convert_patches<8, 0, false>(problem, task, out);
  return true;
#else
  return false;
#endif
}

// Copies patches from `pixels`, the rows of a task, whose planes are `plane` values apart.
template <class Out>
void copy_patches(const Problem& problem, const Task& task, const Runs& runs, Out* out, const Out* pixels,
                  int64_t plane, bool streams) {
  const auto in_bytes = [](int64_t values) { return values * int64_t{sizeof(Out)}; };
  const int64_t stride = problem.geometry.stride, run_bytes = in_bytes(runs.run);
  const Cut cut{.count = task.last - task.first,
                .cols = problem.cols(),
                .planes = runs.planes,
                .height = runs.height,
                .run = run_bytes,
                .row_pitch = in_bytes(runs.row),
                .plane_pitch = in_bytes(plane),
                .step_y = in_bytes(stride * runs.row),
                .step_x = in_bytes(stride * runs.pixel)};
  const auto run = [&](const auto& copy) {
    cut_patches(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(pixels), cut, copy);
  };
  if (streams)
    run([run_bytes](char* to, const char* from) { stream_run(to, from, run_bytes); });
  else
    with_copy(run_bytes, run);
}

template <class Out, class Real>
void extract_as(const Problem& problem) {
  const Geometry& g = problem.geometry;
  const Runs runs(problem);
  const PlaneReader<Real> reader(problem);
  const int64_t cols = problem.cols();
  const int threads =
      workers_for((g.patch_norm ? kNormNanoseconds : kNanoseconds) * static_cast<double>(problem.patches.numel()));
  const Tasks tasks(problem, runs.planes * runs.row * sizeof(Real), threads);
  // A worker's memory: the pixels as read; the same converted, if patches are plain copies of another type;
  // temporaries.
  const bool casts = !g.patch_norm && !std::is_same_v<Out, Real>;
  const int64_t pixel_values = runs.planes * tasks.window_rows() * runs.row;
  const int64_t temporary_values = std::max(reader.temporary(), runs.run);
  const Scratch scratch((pixel_values + temporary_values) * sizeof(Real) + (casts ? pixel_values * sizeof(Out) : 0) +
                        runs.run * sizeof(Out));
  const auto in_bytes = [](int64_t values) { return values * int64_t{sizeof(Out)}; };
  const int64_t run_bytes = in_bytes(runs.run), bytes = in_bytes(problem.patches.numel());
  const bool streams =
      bytes > kStreamBytes && run_bytes % 16 == 0 && reinterpret_cast<uintptr_t>(problem.patches.data) % 16 == 0;
  advise_huge_pages(problem.patches.data, bytes);

  const auto extract_task = [&](int64_t i, int worker) {
    const Task task = tasks[i];
    Real* const temporary = scratch.of<Real>(worker);
    Real* const pixels = temporary + temporary_values;
    Out* const normalised = reinterpret_cast<Out*>(pixels + pixel_values);
    Out* const cast = normalised + runs.run;
    const int64_t window_row = task.first * g.stride;
    const int64_t window_rows = (task.last - task.first - 1) * g.stride + g.patch, plane = window_rows * runs.row;
    const Window window = window_of(g, problem.images, problem.offsets, problem.flip, task.b);
    Out* out = problem.patches.as<Out>() + (task.b * problem.rows() + task.first) * cols * runs.values;

    if constexpr (std::is_same_v<Out, float> && std::is_same_v<Real, float>)
      if (convert(problem, task, out, streams)) return streams ? stream_fence() : void();
    for (int64_t k = 0; k < runs.planes; ++k)
      reader.read(pixels + k * plane, temporary, task.b, window, k, window_row, window_rows);

    if (!g.patch_norm) {
      if (casts) narrow(cast, pixels, runs.planes * plane);
      copy_patches(problem, task, runs, out, casts ? cast : reinterpret_cast<const Out*>(pixels), plane, streams);
    } else {
      for (int64_t r = 0; r < task.last - task.first; ++r)
        for (int64_t c = 0; c < cols; ++c) {
          const PatchIn<Real> patch{pixels + r * g.stride * runs.row + c * g.stride * runs.pixel, plane};
          const auto [mean, deviation] = moments(patch, runs);
          const Real inverse = 1 / (deviation + Real(kContrastFloor));
          for_each_run(patch, runs, [&, mean = mean](const Real* row) {
            Out* const to = streams ? normalised : out;
            Real* const values = std::is_same_v<Out, Real> ? reinterpret_cast<Real*>(to) : temporary;
#pragma omp simd
            for (int64_t x = 0; x < runs.run; ++x) values[x] = (row[x] - mean) * inverse;
            if constexpr (!std::is_same_v<Out, Real>) narrow(to, values, runs.run);
            if (streams) stream_run(reinterpret_cast<char*>(out), reinterpret_cast<const char*>(to), run_bytes);
            out += runs.run;
          });
        }
    }
    if (streams) stream_fence();
  };
  parallel_for(tasks.count(), extract_task, threads);
}

// --- Backward ---

// The gradient of a pixel v before patch_norm is a * g + b * v + c, where g is the gradient after it.
template <class Real>
struct NormSlopes {
  Real a, b, c;
};

// With d = v - mu, s = sigma + 0.1 and n values, y = d / s has the gradient
//   (g - mean(g)) / s - d * sum(g * d) / (n * sigma * s^2);
// a flat patch has d = 0 throughout and loses the second term.
template <class Grad, class Real>
NormSlopes<Real> norm_slopes(const PatchIn<Real>& patch, const Runs& runs, const Grad* grad) {
  const Moments<Real> m = moments(patch, runs);
  Real grad_sum = 0, grad_dot = 0;
  for_each_run(patch, runs, [&](const Real* row) {
    for (int64_t x = 0; x < runs.run; ++x) {
      const Real value = static_cast<Real>(widen(grad[x]));
      grad_sum += value;
      grad_dot += value * (row[x] - m.mean);
    }
    grad += runs.run;
  });
  const Real n = static_cast<Real>(runs.values), inverse = 1 / (m.deviation + Real(kContrastFloor));
  const Real b = m.deviation == 0 ? 0 : -grad_dot * inverse * inverse / (n * m.deviation);
  return {inverse, b, -inverse * (grad_sum / n) - b * m.mean};
}

// Writes the sums of a window's row, which are in patch order, to the image: undoes interleaving, mirror, scale and
// grey.
template <class Out, class Real>
void write_row(const Problem& problem, const Runs& runs, const Window& window, int64_t image, int64_t y,
               const Real* total) {
  const Geometry& g = problem.geometry;
  const TensorView& images = problem.images_grad;
  const int64_t channels = images.shape[1];
  for (int64_t channel = 0; channel < channels; ++channel) {
    const bool to_gray = g.gray && channels == 3;
    const int64_t k = to_gray ? 0 : channel;
    const Real scale = static_cast<Real>(problem.scale[k] * (to_gray ? luma(channel) : 1.0));
    const Real* sums = total + (g.channels_last ? k : k * runs.row);
    Out* row =
        images.as<Out>() + ((image * channels + channel) * images.shape[2] + window.y + y) * images.shape[3] + window.x;
    for (int64_t x = 0; x < g.width; ++x)
      row[window.flip ? g.width - 1 - x : x] = narrow<Out>(scale * sums[x * runs.pixel]);
  }
}

template <class Out, class Grad, class Real>
void extract_backward_as(const Problem& problem) {
  const Geometry& g = problem.geometry;
  const TensorView& images = problem.images_grad;
  const Runs runs(problem);
  const PlaneReader<Real> reader(problem);
  const int64_t rows = problem.rows(), cols = problem.cols(), row_values = runs.planes * runs.row;
  // A task is an image. With patch_norm it keeps the slopes of all its patches and the window's pixels.
  const int64_t slope_values = g.patch_norm ? 3 * rows * cols : 0;
  const int64_t pixel_values = g.patch_norm ? g.height * row_values : 0;
  const Scratch scratch((reader.temporary() + row_values + slope_values + pixel_values) * sizeof(Real));

  const auto sum_image = [&](int64_t image, int worker) {
    Real* const temporary = scratch.of<Real>(worker);
    Real* const total = temporary + reader.temporary();
    auto* const slopes = reinterpret_cast<NormSlopes<Real>*>(total + row_values);
    Real* const pixels = total + row_values + slope_values;
    const int64_t plane = g.height * runs.row;
    const Window window = window_of(g, problem.images, problem.offsets, problem.flip, image);
    const Grad* const grads = problem.patches.as<Grad>() + image * rows * cols * runs.values;

    if (g.patch_norm) {
      for (int64_t k = 0; k < runs.planes; ++k)
        reader.read(pixels + k * plane, temporary, image, window, k, 0, g.height);
      for (int64_t i = 0; i < rows * cols; ++i) {
        const int64_t at = i / cols * g.stride * runs.row + i % cols * g.stride * runs.pixel;
        const PatchIn<Real> patch{pixels + at, plane};
        slopes[i] = norm_slopes(patch, runs, grads + i * runs.values);
      }
    }

    const int64_t values = images.shape[1] * images.shape[2] * images.shape[3];
    std::fill_n(images.as<Out>() + image * values, values, Out{});
    for (int64_t y = 0; y < g.height; ++y) {
      std::fill_n(total, row_values, Real(0));
      const Covering covers = covering(y, g.patch, g.stride, rows);
      for (int64_t r = covers.first; r <= covers.last; ++r)
        for (int64_t c = 0; c < cols; ++c) {
          const Grad* grad = grads + (r * cols + c) * runs.values + (y - r * g.stride) * runs.run;
          for (int64_t k = 0; k < runs.planes; ++k, grad += g.patch * runs.run) {
            const int64_t at = k * runs.row + c * g.stride * runs.pixel;
            Real* __restrict sums = total + at;
            if (g.patch_norm) {
              const NormSlopes<Real> s = slopes[r * cols + c];
              const Real* values = pixels + k * plane + y * runs.row + c * g.stride * runs.pixel;
              for (int64_t x = 0; x < runs.run; ++x)
                sums[x] += s.a * static_cast<Real>(widen(grad[x])) + s.b * values[x] + s.c;
            } else {
              for (int64_t x = 0; x < runs.run; ++x) sums[x] += static_cast<Real>(widen(grad[x]));
            }
          }
        }
      write_row<Out>(problem, runs, window, image, y, total);
    }
  };
  const double nanoseconds = g.patch_norm ? kNormGradNanoseconds : kGradNanoseconds;
  parallel_for(problem.batch(), sum_image, workers_for(nanoseconds * static_cast<double>(problem.patches.numel())));
}

}  // namespace

void extract(const Problem& problem) {
  if (problem.patches.numel() == 0) return;
  with_floating(problem.patches.dtype, [&](auto out) {
    using Out = decltype(out);
    if (problem.in_double())
      extract_as<Out, double>(problem);
    else if constexpr (!std::is_same_v<Out, double>)
      extract_as<Out, float>(problem);
  });
}

void extract_backward(const Gradient& problem) {
  if (problem.images_grad.numel() == 0) return;
  with_floating(problem.images_grad.dtype, [&](auto out) {
    with_floating(problem.patches.dtype, [&](auto grad) {
      using Out = decltype(out);
      using Grad = decltype(grad);
      constexpr bool in_double = std::is_same_v<Out, double> || std::is_same_v<Grad, double>;
      extract_backward_as<Out, Grad, std::conditional_t<in_double, double, float>>(problem);
    });
  });
}

}  // namespace cpc::patches::cpu::CPC_ISA
