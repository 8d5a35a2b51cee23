// Extraction of transformed patches. A block takes tiles: some rows of neighbouring patches in one row of one image.
// The pixels that the patches share are transformed into shared memory, each once; from there every patch is written in
// stores of up to 16 bytes. If the images have an ordinary layout and are not float64, asynchronous copies bring the
// next tile's pixels while the block works on this one's.
#pragma once

#include <bit>
#include <type_traits>

#include "core/cuda/copy_part.cuh"
#include "patches/problem.cuh"

namespace cpc::patches::cuda {

// Pixels that a thread transforms at a time.
constexpr int kGroup = 4;
constexpr int kTileThreads = 128;  // Few, as every warp computes where its tile lies.
constexpr int kStages = 2;         // Tiles in flight.
constexpr int kBlocks = 8;         // Per multiprocessor at least, which bounds the registers.

template <class Real>
struct TileArguments {
  Common<Real> common;
  void* patches;
  DType patches_dtype;
  int64_t first_image;  // Of this launch.
  int32_t tiles;        // Likewise.
  int32_t patch, stride;
  // Patches of a tile, and rows of each patch; the last tile along an axis may have fewer.
  int32_t cols, rows;
  int32_t across, bands;  // Tiles along a row of patches, and along a patch.
  // The layout of a tile in shared memory: `planes` planes of `rows` rows of `row` values, with pixels `step` values
  // apart. A patch has `planes` planes of `patch` runs of `run` values.
  int32_t planes, row, step, run;
  int32_t vector;   // Values that a thread stores at a time, which never cross a run.
  int32_t abreast;  // Patches that a block's threads store at a time.
  bool aligned;     // Whether vectors are aligned in shared memory, too.
  bool fours;       // Whether runs are whole groups of four, aligned in shared memory.
  // The layout of copied pixels before they are transformed: lines of `pitch` bytes, one per row of the tile, or per
  // row and channel. Then the bytes of a stage, and the distances in the images of pixels, rows and channels.
  int32_t pitch, stage_bytes, pixel_bytes, row_bytes, channel_bytes;
  int32_t copy_bytes, copies;                     // Bytes of a copy, 16 or 4, and how many a stage takes.
  int32_t groups;                                 // Groups of pixels of a tile.
  int32_t image_lines;                            // Channels of the image that have lines of their own.
  FastDivide by_across, by_bands, by_patch_rows;  // From a tile's number to its place.
  FastDivide by_chunks, by_run, by_rows;          // From a stored vector to (patch, plane, y, x).
  FastDivide by_run_of_values, by_run_of_fours;   // From a single value, or four, to (plane and y, x).
  FastDivide by_groups, by_pieces;                // From a group of pixels, or a copy, to (line, x).

  explicit TileArguments(const Problem& problem) : common(problem) {}
  __device__ bool interleaved() const { return image_lines == 1 && common.images.shape[1] != 1; }
};

template <class Real>
struct Moments {
  Real mean, inverse;
};

struct Tile {
  int64_t image;
  int32_t r, c, y;            // Row of patches, first patch, and first row of each.
  int32_t cols, rows, width;  // Patches, rows, and pixels of a row.
};
template <class Real>
__device__ Tile tile_at(const TileArguments<Real>& a, uint32_t t) {
  uint32_t across, band, r;
  const uint32_t image = a.by_patch_rows(a.by_bands(a.by_across(t, across), band), r);
  Tile tile;
  tile.image = a.first_image + image;
  tile.r = static_cast<int32_t>(r);
  tile.c = static_cast<int32_t>(across) * a.cols;
  tile.y = static_cast<int32_t>(band) * a.rows;
  const int32_t cols = static_cast<int32_t>(a.common.cols) - tile.c, rows = a.patch - tile.y;
  tile.cols = cols < a.cols ? cols : a.cols;
  tile.rows = rows < a.rows ? rows : a.rows;
  tile.width = (tile.cols - 1) * a.stride + a.patch;
  return tile;
}

// --- Copying lines of images to shared memory ---

// Where a tile's pixels begin in the lines of its stage, and whether they are mirrored.
struct Lines {
  int32_t head;  // Bytes before a line's first pixel.
  bool flip;
};

// Starts the copies of a tile's lines. A line begins at an aligned address, before its first pixel if necessary, and
// ends with its last pixel.
template <class In, class Real>
__device__ Lines copy_lines(const TileArguments<Real>& a, const Tile& tile, unsigned char* stage) {
  const TensorView& images = a.common.images;
  const Window window = a.common.window(tile.image);
  const int64_t left = tile.c * a.stride;
  const int64_t column = window.x + (window.flip ? a.common.geometry.width - left - tile.width : left);
  const auto* first = reinterpret_cast<const char*>(images.as<In>() + tile.image * images.strides[0] +
                                                    (window.y + tile.r * a.stride + tile.y) * images.strides[2] +
                                                    column * images.strides[3]);
  const auto head = static_cast<int32_t>(reinterpret_cast<uintptr_t>(first) & static_cast<uint32_t>(a.copy_bytes - 1));
  first -= head;
  const int32_t bytes = head + tile.width * a.pixel_bytes;
  for (uint32_t i = threadIdx.x; i < static_cast<uint32_t>(a.copies); i += kTileThreads) {
    uint32_t piece, y;
    const uint32_t line = a.by_pieces(i, piece), channel = a.by_rows(line, y);
    const int32_t at = static_cast<int32_t>(piece) * a.copy_bytes, left_over = bytes - at;
    if (static_cast<int32_t>(y) >= tile.rows || left_over <= 0) continue;
    const char* const from =
        first + (static_cast<int32_t>(channel) * a.channel_bytes + static_cast<int32_t>(y) * a.row_bytes + at);
    unsigned char* const to = stage + line * a.pitch + at;
    const int32_t valid = left_over < a.copy_bytes ? left_over : a.copy_bytes;
    if (a.copy_bytes == 16)
      copy_part_async<16>(to, from, valid);
    else
      copy_part_async<4>(to, from, valid);
  }
  return {head, window.flip};
}

// --- Transforming the pixels of lines ---

// Loads N contiguous values from shared memory, 16 bytes at a time.
template <int N, class T>
__device__ void load_aligned(T (&out)[N], const T* from) {
  constexpr int kWide = N * sizeof(T) <= 16 ? N : 16 / sizeof(T);
#pragma unroll
  for (int i = 0; i < N; i += kWide) {
    const auto wide = pack_at<kWide>(from + i);
#pragma unroll
    for (int s = 0; s < kWide; ++s) out[i + s] = wide.v[s];
  }
}

// Reads pixels x .. x + kGroup - 1 of kColours channels. Pixels beyond the row repeat its last one.
template <int kColours, class In, class Real>
__device__ void read_group(Real (&out)[kColours][kGroup], const In* line, int32_t to_line, int32_t channel_step,
                           int32_t pixel_step, int32_t x, int32_t width, bool flip) {
  // Stages are aligned, so the alignment of a line's elements is that of to_line.
  const int32_t first = to_line + (flip ? width - kGroup - x : x) * pixel_step;
  const bool together = x + kGroup <= width && first % kGroup == 0;
  if (together && pixel_step == 1 && channel_step % kGroup == 0) {
#pragma unroll
    for (int c = 0; c < kColours; ++c) {
      In group[kGroup];
      load_aligned(group, line + first + c * channel_step);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) out[c][i] = widen<Real>(flip ? group[kGroup - 1 - i] : group[i]);
    }
  } else if (kColours > 1 && together && pixel_step == kColours) {
    In pixels[kGroup * kColours];
#pragma unroll
    for (int part = 0; part < kColours; ++part) {
      In group[kGroup];
      load_aligned(group, line + first + part * kGroup);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) pixels[part * kGroup + i] = group[i];
    }
#pragma unroll
    for (int c = 0; c < kColours; ++c)
#pragma unroll
      for (int i = 0; i < kGroup; ++i)
        out[c][i] = widen<Real>(flip ? pixels[(kGroup - 1 - i) * kColours + c] : pixels[i * kColours + c]);
  } else {
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int32_t at = x + i < width ? x + i : width - 1;
      const In* const pixel = line + to_line + (flip ? width - 1 - at : at) * pixel_step;
#pragma unroll
      for (int c = 0; c < kColours; ++c) out[c][i] = widen<Real>(pixel[c * channel_step]);
    }
  }
}

// Stores four values in one access, which the compiler would not always make of four stores.
template <class T>
__device__ void store_four(T* to, const T (&v)[kGroup]) {
  using Word = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  check_alignment<sizeof(Word)>(to);
  Pack<T, kGroup> four;
#pragma unroll
  for (int i = 0; i < kGroup; ++i) four.v[i] = v[i];
  *reinterpret_cast<Word*>(to) = std::bit_cast<Word>(four);
}

// Writes transformed pixels from x on to a row of an output channel in shared memory. Rows have room for whole groups.
template <class Staged, class Real>
__device__ void stage_group(Staged* row, const Real (&v)[kGroup], int32_t x) {
  Staged four[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) four[i] = Narrow<Staged>::from(v[i]);
  store_four(row + x, four);
}

// The same for all channels, interleaved.
template <int kColours, class Staged, class Real>
__device__ void stage_colours(Staged* row, const Real (&v)[kColours][kGroup], int32_t x) {
#pragma unroll
  for (int part = 0; part < kColours; ++part) {
    Staged four[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int e = part * kGroup + i;
      four[i] = Narrow<Staged>::from(v[e % kColours][e / kColours]);
    }
    store_four(row + x * kColours + part * kGroup, four);
  }
}

// Transforms the pixels of a tile's lines, kColours channels of the image together: all three of colour images, or one
// after another of any number.
template <int kColours, class In, class Staged, class Real>
__device__ void stage_lines(const TileArguments<Real>& a, const Tile& tile, const Lines& lines,
                            const unsigned char* stage, Staged* pixels) {
  const Common<Real>& p = a.common;
  const auto* const elements = reinterpret_cast<const In*>(stage);
  const int32_t pitch = a.pitch / static_cast<int32_t>(sizeof(In)),
                head = lines.head / static_cast<int32_t>(sizeof(In));
  const bool interleaved = a.interleaved();
  const int32_t channels = kColours == 1 ? static_cast<int32_t>(p.channels) : kColours;
  const int32_t channel_step = interleaved ? 1 : a.rows * pitch, pixel_step = interleaved ? channels : 1;
  for (uint32_t i = threadIdx.x; i < static_cast<uint32_t>(a.groups); i += kTileThreads) {
    uint32_t group;
    const auto y = static_cast<int32_t>(a.by_groups(i, group)), x = static_cast<int32_t>(group) * kGroup;
    if (y >= tile.rows || x >= tile.width) continue;
    for (int32_t k = 0; k < channels; k += kColours) {
      Real v[kColours][kGroup];
      read_group(v, elements, y * pitch + head + k * channel_step, channel_step, pixel_step, x, tile.width, lines.flip);
      Staged* const row = pixels + y * a.row;
      if (kColours == 3 && p.to_gray()) {
        Real gray[kGroup] = {};
#pragma unroll
        for (int c = 0; c < kColours; ++c)
#pragma unroll
          for (int j = 0; j < kGroup; ++j) gray[j] += Real(luma(c)) * v[c][j];
#pragma unroll
        for (int j = 0; j < kGroup; ++j) gray[j] = p.scale[0] * gray[j] + p.shift[0];
        stage_group(row, gray, x);
        continue;
      }
#pragma unroll
      for (int c = 0; c < kColours; ++c)
#pragma unroll
        for (int j = 0; j < kGroup; ++j) v[c][j] = p.scale[k + c] * v[c][j] + p.shift[k + c];
      if (a.step == 1) {
#pragma unroll
        for (int c = 0; c < kColours; ++c) stage_group(row + (k + c) * a.rows * a.row, v[c], x);
      } else if constexpr (kColours > 1) {
        stage_colours(row, v, x);
      } else {
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
          if (x + j < tile.width) row[(x + j) * a.step + k] = Narrow<Staged>::from(v[0][j]);
      }
    }
  }
}

// Transforms a tile's pixels value by value, from images of any type and strides.
template <class Real>
__device__ void gather_pixels(const TileArguments<Real>& a, const Tile& tile, Real* pixels) {
  const Common<Real>& p = a.common;
  const Window window = p.window(tile.image);
  const uint32_t width = static_cast<uint32_t>((a.cols - 1) * a.stride + a.patch);
  const uint32_t values = static_cast<uint32_t>(p.channels) * a.rows * width;
#pragma unroll 1  // The body is long enough.
  for (uint32_t i = threadIdx.x; i < values; i += kTileThreads) {
    uint32_t x, y;
    const auto k = static_cast<int32_t>(a.by_rows(a.by_groups(i, x), y));
    if (static_cast<int32_t>(y) >= tile.rows || static_cast<int32_t>(x) >= tile.width) continue;
    const int32_t plane = a.planes == 1 ? 0 : k, within = a.planes == 1 ? k : 0;
    pixels[(plane * a.rows + static_cast<int32_t>(y)) * a.row + static_cast<int32_t>(x) * a.step + within] =
        p.pixel(tile.image, window, k, tile.r * a.stride + tile.y + static_cast<int32_t>(y),
                tile.c * a.stride + static_cast<int32_t>(x));
  }
}

// --- Writing patches ---

// Finds the mean and contrast of each patch. A warp takes a patch, a lane N neighbouring values at a time.
template <int N, class Real>
__device__ void find_moments(const TileArguments<Real>& a, const Tile& tile, const Real* pixels,
                             Moments<Real>* moments) {
  const auto values = static_cast<uint32_t>(a.common.values);
  const int lane = threadIdx.x % kWarp;
  for (int j = threadIdx.x / kWarp; j < tile.cols; j += kTileThreads / kWarp) {
    const Real* const first = pixels + j * a.stride * a.step;
    const auto visit = [&](const auto& use) {
      for (uint32_t e = lane; e < values / N; e += kWarp) {
        uint32_t x;
        const uint32_t run = N == 1 ? a.by_run_of_values(e, x) : a.by_run_of_fours(e, x);
        Real v[N];
        load_aligned(v, first + run * a.row + x * N);
#pragma unroll
        for (int i = 0; i < N; ++i) use(v[i]);
      }
    };
    Real total = 0, squares = 0;
    visit([&](Real v) { total += v; });
    const Real mean = warp_sum(total) / static_cast<Real>(values);
    visit([&](Real v) { squares += (v - mean) * (v - mean); });
    const Real deviation = sqrt(warp_sum(squares) / static_cast<Real>(values));
    if (lane == 0) moments[j] = {mean, 1 / (deviation + Real(kContrastFloor))};
  }
}

// Stores N values at a time, all of one run of a patch. A thread computes once where they lie, and stores them for
// every `abreast`th patch.
template <int N, class Out, class Staged, class Real>
__device__ void store_vectors(const TileArguments<Real>& a, const Tile& tile, const Staged* pixels,
                              const Moments<Real>* moments) {
  const Common<Real>& p = a.common;
  Out* const out =
      static_cast<Out*>(a.patches) + ((tile.image * p.rows + tile.r) * p.cols + tile.c) * p.values + tile.y * a.run;
  const auto values = static_cast<int32_t>(p.values);
  const uint32_t of_patch = static_cast<uint32_t>(a.planes * a.rows * a.run) / N, count = a.abreast * of_patch;
  for (uint32_t i = threadIdx.x; i < count; i += kTileThreads) {
    uint32_t within, x;
    const auto first = static_cast<int32_t>(a.by_chunks(i, within)), run = static_cast<int32_t>(a.by_run(within, x));
    auto place = static_cast<int32_t>(within) * N;
    if (a.bands > 1) {
      uint32_t y;
      const auto plane = static_cast<int32_t>(a.by_rows(run, y));
      if (static_cast<int32_t>(y) >= tile.rows) continue;
      place = (plane * a.patch + static_cast<int32_t>(y)) * a.run + static_cast<int32_t>(x) * N;
    }
    const int32_t distance = a.stride * a.step;
    const Staged* from = pixels + run * a.row + x * N + first * distance;
    Out* to = out + (place + first * values);
    for (int32_t j = first; j < tile.cols; j += a.abreast) {
      Staged v[N];
      if (N > 1 && a.aligned) {
        load_aligned(v, from);
      } else {
#pragma unroll
        for (int s = 0; s < N; ++s) v[s] = from[s];
      }
      Pack<Out, N> chunk;
      if constexpr (std::is_same_v<Staged, Real>) {
        if (moments != nullptr && p.geometry.patch_norm) {
          const Moments<Real> m = moments[j];
#pragma unroll
          for (int s = 0; s < N; ++s) v[s] = (v[s] - m.mean) * m.inverse;
        }
#pragma unroll
        for (int s = 0; s < N; ++s) chunk.v[s] = Narrow<Out>::from(v[s]);
      } else {
#pragma unroll
        for (int s = 0; s < N; ++s) chunk.v[s] = v[s];
      }
      pack_at<N>(to) = chunk;
      from += a.abreast * distance;
      to += static_cast<int64_t>(a.abreast) * values;
    }
  }
}

template <class Out, class Staged, class Real>
__device__ void store_patches(const TileArguments<Real>& a, const Tile& tile, const Staged* pixels,
                              const Moments<Real>* moments) {
  constexpr int kVector = 16 / sizeof(Out);
  if (a.vector == kVector)
    store_vectors<kVector, Out>(a, tile, pixels, moments);
  else
    store_vectors<1, Out>(a, tile, pixels, moments);
}

// Writes patches, whose type is known only at run time, from pixels in the type that they are computed in. Applies
// patch_norm.
template <class Real>
__device__ void finish_patches(const TileArguments<Real>& a, const Tile& tile, const Real* pixels,
                               Moments<Real>* moments) {
  if (a.common.geometry.patch_norm) {
    if (a.fours)
      find_moments<kGroup>(a, tile, pixels, moments);
    else
      find_moments<1>(a, tile, pixels, moments);
    __syncthreads();
  }
  switch (a.patches_dtype) {
    case DType::f16: return store_patches<Half>(a, tile, pixels, moments);
    case DType::bf16: return store_patches<BFloat16>(a, tile, pixels, moments);
    case DType::f32: return store_patches<float>(a, tile, pixels, moments);
    default:
      if constexpr (std::is_same_v<Real, double>) store_patches<double>(a, tile, pixels, moments);
  }
}

// --- Kernels ---

// Staged: the type of transformed pixels in shared memory. That is the type of the patches or, with kNorm, the type in
// which they are computed, for patches of any type and for patch_norm.
template <class In, class Staged, bool kNorm>
__global__ void __launch_bounds__(kTileThreads, kBlocks) extract_tiles(const __grid_constant__ TileArguments<float> a) {
  unsigned char* const stages = dynamic_shared();
  Staged* const pixels = reinterpret_cast<Staged*>(stages + kStages * a.stage_bytes);
  uint32_t at = blockIdx.x - gridDim.x;  // The tile whose copies were started last.
  Lines lines, next{};
  pipeline<kStages>(
      [&](int stage) {
        lines = next;
        at += gridDim.x;
        if (at >= static_cast<uint32_t>(a.tiles)) return false;
        next = copy_lines<In>(a, tile_at(a, at), stages + stage * a.stage_bytes);
        return true;
      },
      [&](int stage) {
        const Tile tile = tile_at(a, at - gridDim.x);
        const unsigned char* const from = stages + stage * a.stage_bytes;
        if (a.common.images.shape[1] == 3)
          stage_lines<3, In>(a, tile, lines, from, pixels);
        else
          stage_lines<1, In>(a, tile, lines, from, pixels);
        __syncthreads();  // All pixels are transformed.
        if constexpr (kNorm)
          finish_patches(a, tile, pixels, reinterpret_cast<Moments<float>*>(pixels + a.planes * a.rows * a.row));
        else
          store_patches<Staged, Staged, float>(a, tile, pixels, nullptr);
      });
}

template <class Real>
__global__ void __launch_bounds__(kTileThreads) extract_gathered(const __grid_constant__ TileArguments<Real> a) {
  Real* const pixels = reinterpret_cast<Real*>(dynamic_shared());
  for (uint32_t t = blockIdx.x; t < static_cast<uint32_t>(a.tiles); t += gridDim.x) {
    const Tile tile = tile_at(a, t);
    gather_pixels(a, tile, pixels);
    __syncthreads();
    finish_patches(a, tile, pixels, reinterpret_cast<Moments<Real>*>(pixels + a.planes * a.rows * a.row));
    __syncthreads();  // The next tile overwrites shared memory.
  }
}

// For patches that do not fit shared memory: a block takes a patch and reads each value from the image.
template <class Real>
__global__ void __launch_bounds__(kThreads)
    extract_direct(const __grid_constant__ Common<Real> p, void* patches, DType patches_dtype) {
  for (int64_t i = blockIdx.x; i < p.batch * p.rows * p.cols; i += gridDim.x) {
    const PatchIndex at = patch_at(p, i);
    const Window window = p.window(at.b);
    Real mean = 0, inverse = 1;
    if (p.geometry.patch_norm) {
      Real deviation;
      block_moments(p, at, window, mean, deviation);
      inverse = 1 / (deviation + Real(kContrastFloor));
    }
#pragma unroll 1
    for (int64_t e = threadIdx.x; e < p.values; e += kThreads)
      store_as(patches, patches_dtype, i * p.values + e, (patch_value(p, at, window, e) - mean) * inverse);
  }
}

}  // namespace cpc::patches::cuda
