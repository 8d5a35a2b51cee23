// Patch extraction on the GPU: of normalised overlapping patches (extract.cuh), of plain copies (copy.cuh), and the
// gradient (gradient.cuh). This file chooses the kernel for a problem and divides the work among blocks.
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "core/workspace.h"
#include "patches/copy.cuh"
#include "patches/extract.cuh"
#include "patches/gradient.cuh"

namespace cpc::patches::cuda {
namespace {

// The shared memory of a block that lets several blocks run on a multiprocessor, so that their loads and stores
// overlap.
constexpr int64_t kPreferredSharedBytes = 32 << 10;
constexpr int64_t kMaxValue = INT32_MAX;

constexpr int64_t round_up(int64_t v, int64_t to) { return divide_up(v, to) * to; }
FastDivide by(int64_t divisor) { return FastDivide(static_cast<uint32_t>(divisor)); }

// --- Patches that are plain copies ---

// kBytes: the bytes of a piece.
template <int kBytes>
void launch_copy(const Problem& problem, CopyArguments a, int64_t line_bytes, void* stream) {
  const int64_t places = a.patch_bytes / kBytes, groups = divide_up(problem.cols(), int64_t{kNeighbours});
  const int64_t of_image = problem.rows() * groups * places, part = std::max<int64_t>(1, kMaxItems / of_image);
  a.by_places = by(places);
  a.by_groups = by(groups);
  a.by_pieces = by(line_bytes / kBytes);
  for (int64_t first = 0; first < problem.batch(); first += part) {
    const int64_t items = std::min(part, problem.batch() - first) * of_image;
    a.items = static_cast<int32_t>(items);
    launch("copy_patches", &copy_patches<kBytes>, {divide_up(items, int64_t{kThreads}), dim3(kThreads)}, stream, a);
    a.images += part * a.image_bytes;
    a.patches += part * problem.rows() * problem.cols() * a.patch_bytes;
  }
}

// Launches the copy if it can, and returns whether it did. Patches must be the images' bits in the images' order, and
// all pieces aligned to 8 or 16 bytes.
bool launch_copy(const Problem& problem, void* stream) {
  const Geometry& g = problem.geometry;
  const TensorView& images = problem.images;
  const int64_t channels = problem.channels(), size = size_of(images.dtype);
  const auto all = [](const std::vector<double>& values, double v) {
    return std::all_of(values.begin(), values.end(), [v](double each) { return each == v; });
  };
  if (images.dtype != problem.patches.dtype || channels != images.shape[1] || g.patch_norm ||
      problem.offsets.ndim != 0 || problem.flip.ndim != 0 || !all(problem.scale, 1) || !all(problem.shift, 0))
    return false;
  const bool planar = images.strides[3] == 1 && (channels == 1 || !g.channels_last);
  const bool interleaved = images.strides[3] == channels && images.strides[1] == 1 && g.channels_last;
  if (!planar && !interleaved) return false;
  const int64_t pixel_bytes = images.strides[3] * size, line_bytes = g.patch * pixel_bytes;
  const Window window = window_of(g, images, problem.offsets, problem.flip, 0);
  CopyArguments a{};
  a.row_bytes = images.strides[2] * size;
  a.images = images.as<char>() + window.y * a.row_bytes + window.x * pixel_bytes;
  a.patches = problem.patches.as<char>();
  a.image_bytes = images.strides[0] * size;
  a.channel_bytes = planar ? images.strides[1] * size : 0;
  a.col_bytes = g.stride * pixel_bytes;
  a.patch_bytes = g.patch * g.patch * channels * size;
  a.cols = static_cast<int32_t>(problem.cols());
  a.stride = static_cast<int32_t>(g.stride);
  a.by_patch_rows = by(problem.rows());
  a.by_lines = by(g.patch);
  int64_t together = std::gcd(reinterpret_cast<intptr_t>(a.images), reinterpret_cast<intptr_t>(a.patches));
  for (const int64_t bytes : {line_bytes, a.row_bytes, a.image_bytes, a.channel_bytes, a.col_bytes})
    together = std::gcd(together, bytes);
  // The kernel counts the bytes of an image's patches in 32 bits.
  if (together % 8 != 0 || problem.rows() * problem.cols() * a.patch_bytes > kMaxValue) return false;
  if (together % 16 == 0)
    launch_copy<16>(problem, a, line_bytes, stream);
  else
    launch_copy<8>(problem, a, line_bytes, stream);
  return true;
}

// --- Transformed patches ---

// How asynchronous copies bring the lines of images to shared memory.
struct CopyLayout {
  int64_t bytes = 0;  // Bytes of a copy; 0 where pixels must be gathered one by one.
  int64_t slack = 0;  // Bytes before a line's first pixel, at most.
  int64_t pixel_bytes = 0, row_bytes = 0, channel_bytes = 0;
  int64_t lines = 0;  // Lines per row: one, or one for each channel.
};

CopyLayout copy_layout(const Problem& problem) {
  const TensorView& images = problem.images;
  const int64_t channels = images.shape[1], size = size_of(images.dtype);
  const bool planar = images.strides[3] == 1;
  const bool interleaved = !planar && channels > 1 && images.strides[1] == 1 && images.strides[3] == channels;
  if (!(planar || interleaved)) return {};
  CopyLayout layout;
  layout.pixel_bytes = images.strides[3] * size;
  layout.row_bytes = images.strides[2] * size;
  layout.channel_bytes = planar && channels > 1 ? images.strides[1] * size : 0;
  layout.lines = planar ? channels : 1;
  // All lines of a tile must have the same misalignment, and their offsets must fit 32 bits.
  const int64_t together = std::gcd(layout.row_bytes, layout.channel_bytes);
  if (std::abs(layout.row_bytes) * problem.geometry.patch + std::abs(layout.channel_bytes) * channels > kMaxValue)
    return {};
  layout.bytes = together % 16 == 0 ? 16 : together % 4 == 0 ? 4 : 0;
  if (layout.bytes == 0) return {};
  // If all images have the same crop, and a tile is as wide as a row of patches, the alignment of lines is known.
  const Geometry& g = problem.geometry;
  const int64_t left_over = problem.flip.ndim == 0 ? 0 : (g.width - g.patch) % g.stride;
  const int64_t first = reinterpret_cast<intptr_t>(images.data) + (images.shape[3] - g.width) / 2 * layout.pixel_bytes;
  const bool aligned = problem.offsets.ndim == 0 && first % layout.bytes == 0 &&
                       left_over * layout.pixel_bytes % layout.bytes == 0 &&
                       images.strides[0] * size % layout.bytes == 0;
  layout.slack = aligned ? 0 : layout.bytes - size;
  return layout;
}

// The layout in shared memory of tiles of `cols` patches and `rows` rows of each.
struct TileShape {
  int64_t cols, rows;
  int64_t row;                         // Values of a row.
  int64_t pitch = 0, stage_bytes = 0;  // Bytes of a line and of a stage.
  int64_t shared_bytes = 0;
};

// staged_size, real_size: bytes of a value in shared memory, and of a value that is computed.
class Tiling {
 public:
  Tiling(const Problem& problem, const CopyLayout& copies, int64_t staged_size, int64_t real_size)
      : g_(problem.geometry), copies_(copies), staged_(staged_size), real_(real_size), all_cols_(problem.cols()) {
    const int64_t channels = problem.channels();
    planes_ = g_.channels_last ? 1 : channels;
    step_ = g_.channels_last ? channels : 1;
  }

  TileShape shape(int64_t cols, int64_t rows) const {
    TileShape tile{cols, rows, 0};
    const int64_t width = (cols - 1) * g_.stride + g_.patch, run = g_.patch * step_;
    tile.row = round_up(round_up(width, kGroup) * step_, 16 / staged_);
    // Each row begins one run after the last one, modulo the 32 banks, so that neighbouring runs of a patch do not
    // conflict. Not so where it would misalign copied pixels, which are stored 16 bytes at a time.
    const int64_t banks = 128 / staged_;
    if (copies_.bytes == 0 || run * staged_ % 16 == 0) tile.row += ((run - tile.row) % banks + banks) % banks;
    if (copies_.bytes > 0) {
      const int64_t slack = cols == all_cols_ ? copies_.slack : copies_.bytes - 1;
      tile.pitch = round_up(slack + width * copies_.pixel_bytes, 16);
      tile.stage_bytes = copies_.lines * rows * tile.pitch;
    }
    tile.shared_bytes = kStages * tile.stage_bytes + round_up(planes_ * rows * tile.row * staged_, 16) +
                        (g_.patch_norm ? cols * 2 * real_ : 0);
    return tile;
  }

  // The tile with the most neighbouring patches that fits kPreferredSharedBytes. Unless moments need whole patches, it
  // has fewer rows rather than fewer patches.
  TileShape best() const {
    int64_t across = 1, bands = 1;
    TileShape tile = shape(all_cols_, g_.patch);
    while (tile.shared_bytes > kPreferredSharedBytes) {
      if (!g_.patch_norm && tile.rows > 1)
        ++bands;
      else if (tile.cols > 1)
        ++across;
      else
        break;
      tile = shape(divide_up(all_cols_, across), divide_up(g_.patch, bands));
    }
    return tile;
  }

  int64_t planes() const { return planes_; }
  int64_t step() const { return step_; }

 private:
  const Geometry& g_;
  const CopyLayout& copies_;
  int64_t staged_, real_, all_cols_, planes_, step_;
};

// Values per store: 16 bytes of them if runs are whole multiples and patches are aligned, else one.
int64_t vector_of(const void* patches, int64_t size, int64_t run) {
  const int64_t vector = 16 / size;
  return run % vector == 0 && reinterpret_cast<uintptr_t>(patches) % 16 == 0 ? vector : 1;
}

template <class Real>
TileArguments<Real> tile_arguments(const Problem& problem, const CopyLayout& copies, const Tiling& tiling,
                                   const TileShape& tile, int64_t staged_size) {
  const Geometry& g = problem.geometry;
  TileArguments<Real> a(problem);
  const auto narrow = [](int64_t v) { return static_cast<int32_t>(v); };
  const int64_t out_size = size_of(problem.patches.dtype), run = g.patch * tiling.step();
  const int64_t across = divide_up(problem.cols(), tile.cols), bands = divide_up(g.patch, tile.rows);
  const int64_t vector = vector_of(problem.patches.data, out_size, run);
  const int64_t width = (tile.cols - 1) * g.stride + g.patch;
  a.patches = problem.patches.data;
  a.patches_dtype = problem.patches.dtype;
  a.patch = narrow(g.patch);
  a.stride = narrow(g.stride);
  a.cols = narrow(tile.cols);
  a.rows = narrow(tile.rows);
  a.across = narrow(across);
  a.bands = narrow(bands);
  a.planes = narrow(tiling.planes());
  a.row = narrow(tile.row);
  a.step = narrow(tiling.step());
  a.run = narrow(run);
  a.vector = narrow(vector);
  a.abreast = narrow(std::clamp<int64_t>(kTileThreads / (tiling.planes() * tile.rows * run / vector), 1, tile.cols));
  a.aligned = g.stride * tiling.step() % std::min(vector, 16 / staged_size) == 0;
  a.fours = run % kGroup == 0 && g.stride * tiling.step() % kGroup == 0;
  a.pitch = narrow(tile.pitch);
  a.stage_bytes = narrow(tile.stage_bytes);
  a.pixel_bytes = narrow(copies.pixel_bytes);
  a.row_bytes = narrow(copies.row_bytes);
  a.channel_bytes = narrow(copies.channel_bytes);
  a.copy_bytes = narrow(copies.bytes);
  a.copies = copies.bytes > 0 ? narrow(copies.lines * tile.rows * (tile.pitch / copies.bytes)) : 0;
  a.groups = narrow(tile.rows * divide_up(width, kGroup));
  a.image_lines = narrow(copies.lines);
  a.by_across = by(across);
  a.by_bands = by(bands);
  a.by_patch_rows = by(problem.rows());
  a.by_chunks = by(tiling.planes() * tile.rows * run / vector);
  a.by_run = by(run / vector);
  a.by_rows = by(tile.rows);
  a.by_run_of_values = by(run);
  a.by_run_of_fours = by(std::max<int64_t>(run / kGroup, 1));
  a.by_groups = by(copies.bytes > 0 ? divide_up(width, kGroup) : width);
  a.by_pieces = by(copies.bytes > 0 ? tile.pitch / copies.bytes : 1);
  return a;
}

// Splits the work into launches whose numbers of tiles fit 32 bits. blocks: the most blocks, or 0 for one per tile.
template <class Real>
void launch_each(const char* name, void (*kernel)(TileArguments<Real>), TileArguments<Real> a, const Problem& problem,
                 int64_t shared_bytes, int64_t blocks, void* stream) {
  const int64_t of_image = problem.rows() * a.bands * a.across, part = std::max<int64_t>(1, kMaxItems / of_image);
  for (int64_t first = 0; first < problem.batch(); first += part) {
    const int64_t tiles = std::min(part, problem.batch() - first) * of_image;
    a.first_image = first;
    a.tiles = static_cast<int32_t>(tiles);
    launch(name, kernel, {blocks == 0 ? tiles : std::min(blocks, tiles), dim3(kTileThreads), shared_bytes}, stream, a);
  }
}

// Whether offsets in a tile's patches fit 32 bits, and its pixels fit shared memory.
template <class Kernel>
bool fits(const Problem& problem, const TileShape& tile, Kernel kernel) {
  const Geometry& g = problem.geometry;
  return tile.cols * problem.channels() <= kMaxValue / g.patch / g.patch &&
         tile.shared_bytes <= dynamic_shared_limit(kernel);
}

// Staged, kNorm: see extract_tiles.
template <class In, class Staged, bool kNorm>
bool launch_copied(const Problem& problem, const CopyLayout& copies, void* stream) {
  const auto kernel = &extract_tiles<In, Staged, kNorm>;
  const Tiling tiling(problem, copies, sizeof(Staged), sizeof(float));
  const TileShape tile = tiling.best();
  if (!fits(problem, tile, kernel)) return false;
  launch_each("extract_tiles", kernel, tile_arguments<float>(problem, copies, tiling, tile, sizeof(Staged)), problem,
              tile.shared_bytes, kBlocks * multiprocessors(), stream);
  return true;
}

template <class In>
bool launch_copied(const Problem& problem, const CopyLayout& copies, void* stream) {
  if (problem.geometry.patch_norm) return launch_copied<In, float, true>(problem, copies, stream);
  const DType patches = problem.patches.dtype;
  if (patches == DType::f32) return launch_copied<In, float, false>(problem, copies, stream);
  if constexpr (!std::is_same_v<In, BFloat16>)
    if (patches == DType::f16) return launch_copied<In, Half, false>(problem, copies, stream);
  if constexpr (!std::is_same_v<In, Half>)
    if (patches == DType::bf16) return launch_copied<In, BFloat16, false>(problem, copies, stream);
  // Conversion from one 16-bit type to the other is rare, so it uses the kernel that selects the output type at run
  // time.
  return launch_copied<In, float, true>(problem, copies, stream);
}

template <class Real>
void launch_gathered(const Problem& problem, void* stream) {
  const CopyLayout none;
  const Tiling tiling(problem, none, sizeof(Real), sizeof(Real));
  const TileShape tile = tiling.best();
  if (fits(problem, tile, &extract_gathered<Real>))
    return launch_each("extract_gathered", &extract_gathered<Real>,
                       tile_arguments<Real>(problem, none, tiling, tile, sizeof(Real)), problem, tile.shared_bytes, 0,
                       stream);
  launch("extract_direct", &extract_direct<Real>, {problem.batch() * problem.rows() * problem.cols(), dim3(kThreads)},
         stream, Common<Real>(problem), problem.patches.data, problem.patches.dtype);
}

void launch_extract(const Problem& problem, void* stream) {
  const CopyLayout copies = copy_layout(problem);
  const auto launched = [&] {
    switch (problem.images.dtype) {
      case DType::u8: return launch_copied<uint8_t>(problem, copies, stream);
      case DType::f16: return launch_copied<Half>(problem, copies, stream);
      case DType::bf16: return launch_copied<BFloat16>(problem, copies, stream);
      default: return launch_copied<float>(problem, copies, stream);
    }
  };
  if (copies.bytes == 0 || !launched()) launch_gathered<float>(problem, stream);
}

// --- Backward ---

template <class Real>
SumArguments<Real> sum_arguments(const Problem& problem, const Common<Real>& common, const Real* slopes) {
  const Geometry& g = problem.geometry;
  SumArguments<Real> a(common);
  const int64_t step = g.channels_last ? problem.channels() : 1;
  const auto narrow = [](int64_t v) { return static_cast<int32_t>(v); };
  a.grads = problem.patches.data;
  a.grad_type = problem.patches.dtype;
  a.image_type = problem.images_grad.dtype;
  a.slopes = slopes;
  a.images_grad = problem.images_grad.data;
  a.planes = narrow(g.channels_last ? 1 : problem.channels());
  a.step = narrow(step);
  a.width = narrow(g.width * step);
  a.run = narrow(g.patch * step);
  a.distance = narrow(g.stride * step);
  a.patch = narrow(g.patch);
  a.stride = narrow(g.stride);
  a.grid_rows = narrow(problem.rows());
  a.grid_cols = narrow(problem.cols());
  a.by_height = by(g.height);
  a.by_planes = by(a.planes);
  a.by_stride = by(g.stride);
  a.by_distance = by(a.distance);
  a.by_step = by(step);
  return a;
}

// Grad, N: see sum_patches.
template <class Real, class Grad, int N>
void launch_sum(const Problem& problem, SumArguments<Real> a, void* stream) {
  constexpr int64_t kGroupsOfBlock = 4 * kThreads;
  const int64_t groups = divide_up(a.width, N), of_image = a.planes * problem.geometry.height;
  const int64_t part = std::max<int64_t>(1, kMaxItems / of_image);
  a.by_groups = by(groups);
  a.rows_of_block = static_cast<int32_t>(std::max<int64_t>(1, kGroupsOfBlock / groups));
  for (int64_t first = 0; first < problem.batch(); first += part) {
    const int64_t rows = std::min(part, problem.batch() - first) * of_image;
    a.first_image = first;
    a.rows = static_cast<int32_t>(rows);
    launch("sum_patches", &sum_patches<Real, Grad, N>, {divide_up(rows, a.rows_of_block), dim3(kThreads)}, stream, a);
  }
}

// The gradient values that one access reads. All of them must be contained in the same patches.
constexpr int kGradVector = 4;

template <class Real>
void launch_backward(const Problem& problem, void* stream) {
  const Common<Real> common(problem);
  const Geometry& g = problem.geometry;
  const TensorView& images_grad = problem.images_grad;
  if (common.values > kMaxValue || g.width * problem.channels() > kMaxValue)
    throw std::invalid_argument("the CUDA kernel takes patches of at most 2^31 - 1 values");
  Real* slopes = nullptr;
  if (g.patch_norm) {
    slopes = problem.workspace.as<Real>();
    launch("find_norm_slopes", &find_norm_slopes<Real>,
           {problem.batch() * problem.rows() * problem.cols(), dim3(kThreads)}, stream, common, problem.patches.data,
           problem.patches.dtype, slopes);
  }
  if (g.height < images_grad.shape[2] || g.width < images_grad.shape[3])  // The pixels outside of windows.
    fill_with_zeros(images_grad.data, images_grad.numel() * size_of(images_grad.dtype), stream);
  const SumArguments<Real> a = sum_arguments(problem, common, slopes);
  if constexpr (std::is_same_v<Real, float>) {
    const bool vectors = a.run % kGradVector == 0 && a.distance % kGradVector == 0 &&
                         reinterpret_cast<uintptr_t>(a.grads) % (kGradVector * size_of(a.grad_type)) == 0;
    if (vectors && slopes == nullptr)
      return with_floating(problem.patches.dtype, [&](auto grad) {
        using Grad = decltype(grad);
        if constexpr (!std::is_same_v<Grad, double>) launch_sum<float, Grad, kGradVector>(problem, a, stream);
      });
  }
  launch_sum<Real, void, 1>(problem, a, stream);
}

}  // namespace

void extract(const Problem& problem, void* stream) {
  if (problem.patches.numel() == 0 || launch_copy(problem, stream)) return;
  problem.in_double() ? launch_gathered<double>(problem, stream) : launch_extract(problem, stream);
}

void extract_backward(const Gradient& problem, void* stream) {
  if (problem.images_grad.numel() == 0) return;
  problem.in_double() ? launch_backward<double>(problem, stream) : launch_backward<float>(problem, stream);
}

}  // namespace cpc::patches::cuda
