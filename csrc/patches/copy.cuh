// From images to patches that are made of the images' very bits: of their type, neither scaled nor normalised nor
// mirrored. As nothing is computed, nothing passes through shared memory: a thread finds out once where its piece of a
// patch lies, and copies it for some neighbours. What these share stays in the first-level cache meanwhile.
#pragma once

#include <bit>

#include "patches/problem.cuh"

namespace cpc::patches::cuda {

// Neighbours whose pieces a thread copies: it reads all of them before it stores the first.
constexpr int kNeighbours = 4;

// A patch is lines, one for a row, or for a row and channel, and a line is pieces of as many bytes as a thread moves.
struct CopyArguments {
  const char* images;  // First of this launch: the window's first pixel, and the patches.
  char* patches;
  int64_t image_bytes, channel_bytes, row_bytes;  // Of the images, from one to the next.
  int64_t col_bytes, patch_bytes;                 // From a patch to its neighbour: in an image, and of the patches.
  int32_t items;                                  // Of this launch: each a piece of some neighbours.
  int32_t cols, stride;
  // From an item's number to its neighbours and the place in each of them; from there to (row of patches, which of its
  // groups of neighbours), (image, row of it), (line, x) and (channel, y).
  FastDivide by_places, by_groups, by_patch_rows, by_pieces, by_lines;
};

template <int kBytes>
__global__ void __launch_bounds__(kThreads) copy_patches(const __grid_constant__ CopyArguments a) {
  constexpr int kWords = kBytes / sizeof(uint32_t);
#pragma unroll 1  // There is one turn, where the grid is as large as the work.
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
