// Extraction of patches that are plain copies: of the images' type, neither scaled nor normalised nor mirrored. As
// nothing is computed, nothing passes through shared memory. A thread computes once where its piece of a patch lies,
// and copies that piece for several neighbouring patches. Pixels that these share stay in the first-level cache
// meanwhile.
#pragma once

#include <bit>

#include "patches/problem.cuh"

namespace cpc::patches::cuda {

// Neighbouring patches whose pieces a thread copies: it reads all pieces before it stores the first.
constexpr int kNeighbours = 4;

// A patch consists of lines, one per row, or per row and channel. A line consists of pieces, the bytes that a thread
// moves at a time.
struct CopyArguments {
  const char* images;                             // The window's first pixel in the first image of this launch.
  char* patches;                                  // The first patch of this launch.
  int64_t image_bytes, channel_bytes, row_bytes;  // From one to the next, in the images.
  int64_t col_bytes, patch_bytes;                 // From a patch to its neighbour, in an image and in the result.
  int32_t items;                                  // Of this launch: each a piece of kNeighbours patches.
  int32_t cols, stride;
  // The divisions split an item's number into (group of neighbours, place in a patch), the group's into (row of
  // patches, group in it), the row's into (image, row in it), the place into (line, x), and the line into (channel, y).
  FastDivide by_places, by_groups, by_patch_rows, by_pieces, by_lines;
};

template <int kBytes>
__global__ void __launch_bounds__(kThreads) copy_patches(const __grid_constant__ CopyArguments a) {
  constexpr int kWords = kBytes / sizeof(uint32_t);
#pragma unroll 1  // A single iteration if the grid covers all items.
  for (uint32_t i = blockIdx.x * kThreads + threadIdx.x; i < static_cast<uint32_t>(a.items);
       i += gridDim.x * kThreads) {
    uint32_t place, group, r, x, y;
    const uint32_t row = a.by_groups(a.by_places(i, place), group), image = a.by_patch_rows(row, r);
    const uint32_t channel = a.by_lines(a.by_pieces(place, x), y);
    const auto first = static_cast<int32_t>(group) * kNeighbours;
    const char* const from = a.images + image * a.image_bytes + channel * a.channel_bytes +
                             static_cast<int64_t>(r * static_cast<uint32_t>(a.stride) + y) * a.row_bytes +
                             first * a.col_bytes + x * kBytes;
    char* const to = a.patches + (static_cast<int64_t>(row) * a.cols + first) * a.patch_bytes + int64_t{place} * kBytes;
    Arriving<uint32_t, kWords> pieces[kNeighbours];
#pragma unroll
    for (int k = 0; k < kNeighbours; ++k)
      if (first + k < a.cols) pieces[k] = arriving<kWords>(reinterpret_cast<const uint32_t*>(from + k * a.col_bytes));
#pragma unroll
    for (int k = 0; k < kNeighbours; ++k)
      if (first + k < a.cols)
        pack_at<kWords>(reinterpret_cast<uint32_t*>(to + k * a.patch_bytes)) =
            std::bit_cast<Pack<uint32_t, kWords>>(pieces[k]);
  }
}

}  // namespace cpc::patches::cuda
