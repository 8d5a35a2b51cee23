// Epilogues of a convolution (core/cuda/product_epilogues.cuh says what an epilogue is). They add bias and condition,
// apply the activation and store the results.
#pragma once

#include <cstdint>

#include "core/cuda/product_epilogues.cuh"
#include "masked_conv/filters.cuh"

namespace cpc::masked_conv::cuda {

template <class T>
__device__ T* channels_of(const TensorView& view, const Pixel& pixel) {
  return view.as<T>() + pixel.image * view.strides[0] + pixel.y * view.strides[2] + pixel.x * view.strides[3];
}

// Stores the outputs from `from` on that the four lanes of a row hold, except those not below `count`. All lanes must
// take part.
template <class T, class Sum, int kTiles>
__device__ void store_outputs(T* row, const Sum (&v)[kTiles][2], int from, int count) {
  const int in_quad = static_cast<int>(threadIdx.x) % 4;
  if constexpr (sizeof(T) == 2 && kTiles > 2) {  // Lanes exchange values of four tiles to store whole chunks.
#pragma unroll
    for (int j = 0; j < kTiles; j += 4) {
      uint32_t pairs[4] = {};
#pragma unroll
      for (int k = 0; k < 4 && j + k < kTiles; ++k) pairs[k] = pair_of<T>(v[j + k]);
      transpose_quad(pairs);
      const int first = from + (j + in_quad) * kTogether;
      if (first < count) store_pairs(row + first, pairs, how_many(count - first, kTogether));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      const int first = from + j * kTogether + in_quad * 2;
      if (first < count) store_run(row + first, v[j], how_many(count - first, 2));
    }
  }
}

template <class T>
struct FinishOutputs {
  using Sum = SumOf<T>;

  const T* bias;
  TensorView condition, output, preactivation;
  int64_t rows;
  Pixels pixels;
  OutputOrder outputs;
  Activation activation;

  template <class Tile>
  __device__ void take(const WarpTileSums<Tile, Sum>& sums, int, int64_t row, int64_t column) const {
    outputs.gated ? take_rows<Tile, 2>(sums, row, static_cast<int>(column))
                  : take_rows<Tile, 1>(sums, row, static_cast<int>(column));
  }

 private:
  // With kHalves = 2, every other tile of 8 outputs holds gates. Up to four tiles of results are finished at a time:
  // lanes of 16-bit values exchange four tiles to store whole chunks, and more would need too many registers.
  template <class Tile, int kHalves>
  __device__ void take_rows(const WarpTileSums<Tile, Sum>& sums, int64_t row, int column) const {
    constexpr int kAll = Tile::kColumnTiles / kHalves, kTiles = kAll < 4 ? kAll : 4;
    const int end = (column + Tile::kColumnTiles * kTogether) / kHalves;  // Other warps take what follows.
    Pixel pixel = {};
    each_row<Tile, kHalves * kTiles>(sums, [&](int in_tile, int of_group, const Sum(&v)[kHalves* kTiles][2]) {
      const int64_t at = row + in_tile;
      const bool exists = at < rows;
      if (of_group == 0) pixel = pixels[exists ? at : 0];
      finish<kHalves, kTiles>(v, pixel, (column + of_group) / kHalves, end, exists);
    });
  }

  // Finishes a row's outputs in [from, end), which its four lanes hold.
  template <int kHalves, int kTiles>
  __device__ void finish(const Sum (&sums)[kHalves * kTiles][2], const Pixel& pixel, int from, int end,
                         bool exists) const {
    const int half = outputs.outputs / kHalves, mine = from + static_cast<int>(threadIdx.x) % 4 * 2;
    const int last = !exists ? 0 : half < end ? half : end;
    Sum v[kHalves][kTiles][2];
#pragma unroll
    for (int u = 0; u < kHalves; ++u) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const int output = mine + j * kTogether, count = how_many(last - output, 2);
        Sum of_bias[2] = {}, of_condition[2] = {};
        if (bias != nullptr) load_run(of_bias, bias + u * half + output, 1, count);
        if (condition.data != nullptr)
          load_run(of_condition, channels_of<T>(condition, pixel) + (u * half + output) * condition.strides[1],
                   condition.strides[1], count);
#pragma unroll
        for (int e = 0; e < 2; ++e) v[u][j][e] = sums[j * kHalves + u][e] + (of_bias[e] + of_condition[e]);
      }
      if (preactivation.data != nullptr)
        store_outputs(channels_of<T>(preactivation, pixel) + u * half, v[u], from, last);
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if constexpr (kHalves == 2) v[0][j][e] = tanh(v[0][j][e]) * sigmoid(v[1][j][e]);
        if (activation == Activation::relu && v[0][j][e] < 0) v[0][j][e] = 0;  // NaN stays.
      }
    store_outputs(channels_of<T>(output, pixel), v[0], from, last);
  }
};

// Stores the sums of all pixels without bias or activation, rounded to T.
template <class T>
struct StorePixels {
  using Sum = SumOf<T>;

  TensorView output;
  int64_t rows;
  Pixels pixels;
  int columns;

  template <class Tile>
  __device__ void take(const WarpTileSums<Tile, Sum>& sums, int, int64_t row, int64_t column) const {
    const int first = static_cast<int>(column), end = first + Tile::kColumnTiles * kTogether;
    const int last = columns < end ? columns : end;  // Other warps take what follows.
    each_row<Tile, Tile::kColumnTiles>(sums, [&](int in_tile, int, const Sum(&v)[Tile::kColumnTiles][2]) {
      const int64_t at = row + in_tile;
      const bool exists = at < rows;
      store_outputs(channels_of<T>(output, pixels[exists ? at : 0]), v, first, exists ? last : 0);
    });
  }
};

}  // namespace cpc::masked_conv::cuda
