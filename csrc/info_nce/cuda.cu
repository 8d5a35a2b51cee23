// InfoNCE on the GPU: from queries and keys to losses and, formed at once, both gradients.
// All keys: what a group of queries scores against all keys stays in the L2 cache, as powers relative to the largest
// score of each tile. So scores are multiplied once, a tile needs nothing of the others, and once the tiles' maxima and
// sums are combined, two further products turn powers into gradients, each power scaled on its way to shared memory.
// Where there are too many keys for that, powers are computed again for the gradients, chunk by chunk. Sampled:
// a warp a query gathers rows; for the keys' gradient a warp a key sums over the queries that name it.
// No sum depends on the order in which blocks run.
#include <algorithm>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "core/cuda/device.h"
#include "core/cuda/kernel.cuh"
#include "core/cuda/mma.cuh"
#include "core/workspace.h"
#include "info_nce/info_nce.h"

namespace cpc::info_nce::cuda {
namespace {

using namespace cpc::cuda;

// --- A block's product: a tile of 64 x 64, by warps of 32 x 32 ---

constexpr int kTile = 64, kThreads = 128, kWarpTile = 32, kWarpsAcross = kTile / kWarpTile;
constexpr int kSliceBytes = 64;  // The bytes of a row's depth that the block holds at a time.
constexpr int kChunkBytes = 16;

// How operands are multiplied: Value is what shared memory holds, Sum what products are summed in.
struct InFloat {
  using Value = float;
  using Sum = float;
};
struct InDouble {
  using Value = double;
  using Sum = double;
};
struct InTf32 {  // For float, and for float16, whose values it holds exactly and whose small weights it does not lose.
  using Value = float;
  using Sum = float;
};
struct InBFloat16 {
  using Value = BFloat16;
  using Sum = float;
};

template <class Math>
constexpr int kSlice = kSliceBytes / sizeof(typename Math::Value);
template <class Value>
constexpr int kChunk = kChunkBytes / sizeof(Value);
template <class Value>
using Chunk = Pack<Value, kChunk<Value>>;

// An operand's slice in shared memory. Along: [64 rows or columns][depth], else [depth][64]. Rows are padded so that
// the lanes of a fragment meet different banks.
template <class Math, bool kAlong>
struct Slice {
  using Value = typename Math::Value;
  static constexpr int kPadding = kAlong || sizeof(Value) == 2 ? 16 : 32;
  static constexpr int kRows = kAlong ? kTile : kSlice<Math>, kColumns = kAlong ? kSlice<Math> : kTile;
  static constexpr int kPitch = kColumns + kPadding / static_cast<int>(sizeof(Value));
  static constexpr int kBytes = kRows * kPitch * static_cast<int>(sizeof(Value));
  static constexpr int kChunksOfRow = kColumns / kChunk<Value>;
  static constexpr int kChunks = kRows * kChunksOfRow / kThreads;  // Chunks of a thread.

  // Element `i` of the tile's side at depth k.
  __device__ static int at(int i, int k) { return kAlong ? i * kPitch + k : k * kPitch + i; }
};

// Sums of a lane, of the warp's 2 x 4 tiles of 16 x 8: see mma.cuh.
template <class Math>
using Sums = typename Math::Sum[2][4][4];

// Four 8 x 8 matrices from a slice, whose elements lie (i, k), (i + 8 * i_step, k + 8 * k_step) and so on.
template <class Math, bool kAlong>
__device__ void load_fragments(uint32_t (&r)[4], const BFloat16* slice, int i, int k, bool i_first) {
  using S = Slice<Math, kAlong>;
  const int lane = threadIdx.x % kWarp, row = lane % 8, matrix = lane / 8;
  i += (i_first ? matrix % 2 : matrix / 2) * 8;
  k += (i_first ? matrix / 2 : matrix % 2) * 8;
  if constexpr (kAlong)
    load_matrices<false>(r, slice + S::at(i + row, k));
  else
    load_matrices<true>(r, slice + S::at(i, k + row));
}

template <class Math, bool kAAlong, bool kBAlong>
__device__ void multiply_slice(Sums<Math>& sums, const typename Math::Value* a, const typename Math::Value* b) {
  using A = Slice<Math, kAAlong>;
  using B = Slice<Math, kBAlong>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
  const int row = warp / kWarpsAcross * kWarpTile, column = warp % kWarpsAcross * kWarpTile;
  if constexpr (std::is_same_v<Math, InBFloat16>) {
#pragma unroll
    for (int k = 0; k < kSlice<Math>; k += 16) {
      uint32_t left[2][4], right[2][4];  // Operands of two tiles of columns each.
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        load_fragments<Math, kAAlong>(left[i], a, row + 16 * i, k, true);
        load_fragments<Math, kBAlong>(right[i], b, column + 16 * i, k, false);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t pair[2] = {right[j / 2][j % 2 * 2], right[j / 2][j % 2 * 2 + 1]};
          multiply_add<BFloat16>(sums[i][j], left[i], pair);
        }
    }
  } else if constexpr (std::is_same_v<Math, InTf32>) {
    const auto bits = [](float v) { return static_cast<uint32_t>(__float_as_int(v)); };
#pragma unroll
    for (int k = 0; k < kSlice<Math>; k += 8) {
      uint32_t left[2][4], right[4][2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) left[i][e] = bits(a[A::at(row + 16 * i + e % 2 * 8 + g, k + e / 2 * 4 + t)]);
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) right[j][e] = bits(b[B::at(column + 8 * j + g, k + 4 * e + t)]);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_add<float>(sums[i][j], left[i], right[j]);
    }
  } else {
#pragma unroll
    for (int k = 0; k < kSlice<Math>; ++k) {
      typename Math::Value left[4], right[8];
#pragma unroll
      for (int i = 0; i < 4; ++i) left[i] = a[A::at(row + 8 * i + g, k)];
#pragma unroll
      for (int j = 0; j < 8; ++j) right[j] = b[B::at(column + j / 2 * 8 + 2 * t + j % 2, k)];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sums[i / 2][j / 2][i % 2 * 2 + j % 2] += left[i] * right[j];
    }
  }
}

// sums += A B over `depth`. load_a(row, column) and load_b give the chunk of a slice's layout that begins there, rows
// or columns that go along the depth counted from its beginning. The next slice is on its way while one is multiplied.
template <class Math, bool kAAlong, bool kBAlong, class LoadA, class LoadB>
__device__ void multiply(Sums<Math>& sums, int64_t depth, const LoadA& load_a, const LoadB& load_b) {
  using Value = typename Math::Value;
  using A = Slice<Math, kAAlong>;
  using B = Slice<Math, kBAlong>;
  auto* const a = reinterpret_cast<Value*>(dynamic_shared());
  auto* const b = reinterpret_cast<Value*>(dynamic_shared() + A::kBytes);
  Chunk<Value> next_a[A::kChunks], next_b[B::kChunks];
  const auto load = [&](int64_t k) {
#pragma unroll
    for (int c = 0; c < A::kChunks; ++c) {
      const int chunk = static_cast<int>(threadIdx.x) + c * kThreads;
      const int row = chunk / A::kChunksOfRow, column = chunk % A::kChunksOfRow * kChunk<Value>;
      next_a[c] = load_a(row + (kAAlong ? 0 : k), column + (kAAlong ? k : 0));
    }
#pragma unroll
    for (int c = 0; c < B::kChunks; ++c) {
      const int chunk = static_cast<int>(threadIdx.x) + c * kThreads;
      const int row = chunk / B::kChunksOfRow, column = chunk % B::kChunksOfRow * kChunk<Value>;
      next_b[c] = load_b(row + (kBAlong ? 0 : k), column + (kBAlong ? k : 0));
    }
  };
  const auto store = [&](auto slice, Value* to, const auto& chunks) {
    using S = decltype(slice);
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c) {
      const int chunk = static_cast<int>(threadIdx.x) + c * kThreads;
      pack_at<kChunk<Value>>(to + chunk / S::kChunksOfRow * S::kPitch + chunk % S::kChunksOfRow * kChunk<Value>) =
          chunks[c];
    }
  };
  if (depth > 0) load(0);
  for (int64_t k = 0; k < depth; k += kSlice<Math>) {
    __syncthreads();  // The last slice has been multiplied.
    store(A{}, a, next_a);
    store(B{}, b, next_b);
    __syncthreads();
    if (k + kSlice<Math> < depth) load(k + kSlice<Math>);
    multiply_slice<Math, kAAlong, kBAlong>(sums, a, b);
  }
}

// Calls use(row, column, value) for each sum of the lane.
template <class Math, class Use>
__device__ void each_sum(const Sums<Math>& sums, const Use& use) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        use(warp / kWarpsAcross * kWarpTile + 16 * i + e / 2 * 8 + g,
            warp % kWarpsAcross * kWarpTile + 8 * j + 2 * t + e % 2, sums[i][j][e]);
}

template <class Math, class Real>
__device__ typename Math::Value to_value(Real v) {
  if constexpr (std::is_same_v<Math, InTf32>)
    return __int_as_float(static_cast<int>(to_tf32(static_cast<float>(v))));
  else
    return Narrow<typename Math::Value>::from(v);
}

// Columns from `column` on of a row of [rows, d], zeros outside.
template <class Math, class T>
__device__ Chunk<typename Math::Value> load_chunk(const T* matrix, int64_t row, int64_t rows, int64_t column, int64_t d,
                                                  bool whole) {
  using Value = typename Math::Value;
  constexpr bool kAsIs = std::is_same_v<T, Value> && !std::is_same_v<Math, InTf32>;
  Chunk<Value> chunk = {};
  if (row >= rows) return chunk;
  const T* const from = matrix + row * d + column;
  if (whole) {
    if (column >= d) return chunk;
    const auto values = pack_at<kChunk<Value>>(from);
    if constexpr (kAsIs) {
      return values;
    } else {
#pragma unroll
      for (int i = 0; i < kChunk<Value>; ++i) chunk.v[i] = to_value<Math>(widen<typename Math::Sum>(values.v[i]));
      return chunk;
    }
  }
#pragma unroll
  for (int i = 0; i < kChunk<Value>; ++i)
    if (column + i < d) chunk.v[i] = to_value<Math>(widen<typename Math::Sum>(from[i]));
  return chunk;
}

// --- All keys ---

// In some entries of the batch, the queries [first_row, first_row + rows) and the keys [first_key, first_key + keys).
template <class T, class Math>
struct Arguments {
  using Value = typename Math::Value;
  using Sum = typename Math::Sum;
  const T *queries, *keys;
  const int64_t *targets, *exclude;
  const Sum* row_weights;
  Sum *losses, *right;
  T *grad_queries, *grad_keys;
  Value* powers;                                  // [entries][pitch_rows][pitch_keys]
  Sum *maxima, *sums, *factors;                   // [entries][all key tiles][pitch_rows]
  Sum *positives, *target_weights, *row_factors;  // [entries][pitch_rows]
  Sum *query_sums, *key_sums;                     // [entries][parts][pitch_rows][D], [entries][N][D], where needed.
  int64_t m, n, d, key_tiles;                     // Sizes of an entry.
  int64_t first_entry, entries, first_row, rows, first_key, key_count;
  int64_t pitch_rows, pitch_keys;
  // The depth of the queries' gradient is summed in parts, for enough blocks.
  int64_t query_parts, part_keys;
  Sum scale, factor;
  bool whole;  // Chunks of rows of D are whole and aligned.
  bool gradients;
  bool adds_queries, adds_keys, ends_keys;  // To what is in memory; to the tensor.

  __device__ const T* query_rows(int64_t entry) const { return queries + ((first_entry + entry) * m + first_row) * d; }
  __device__ const T* key_rows(int64_t entry) const { return keys + ((first_entry + entry) * n + first_key) * d; }
  __device__ int64_t row_index(int64_t entry, int64_t row) const { return (first_entry + entry) * m + first_row + row; }
  // An index, or -1 for one that names no key.
  __device__ int64_t key(int64_t index) const { return index >= 0 && index < n ? index : -1; }
  __device__ int64_t target(int64_t entry, int64_t row) const {
    return key(targets != nullptr ? targets[row_index(entry, row)] : first_row + row);
  }
  __device__ int64_t left_out(int64_t entry, int64_t row) const {
    return exclude != nullptr ? key(exclude[row_index(entry, row)]) : -1;
  }
  // Whether a row has a weight; what is in one that has none does not matter.
  __device__ bool counts(int64_t entry, int64_t row) const {
    return row_weights == nullptr || row_weights[row_index(entry, row)] != 0;
  }
  __device__ int64_t stat(int64_t entry, int64_t tile, int64_t row) const {
    return (entry * key_tiles + tile) * pitch_rows + row;
  }
};

template <class Real>
constexpr Real kInfinity = std::numeric_limits<Real>::infinity();
template <class Real>
constexpr Real kLargest = std::numeric_limits<Real>::max();

// A tile of scores: powers relative to the largest of each row, with the positives and the excluded left out.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads) score(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  using Value = typename Math::Value;
  constexpr int kPitch = kTile + 2;
  auto* const scores = reinterpret_cast<Sum*>(dynamic_shared());
  const int64_t row_tiles = divide_up(a.rows, kTile), key_tiles = divide_up(a.key_count, kTile);
  for (int64_t block = blockIdx.x; block < a.entries * row_tiles * key_tiles; block += gridDim.x) {
    const int64_t entry = block / (row_tiles * key_tiles), first_row = block / key_tiles % row_tiles * kTile,
                  first_key = block % key_tiles * kTile;
    const T *const queries = a.query_rows(entry), *const keys = a.key_rows(entry);
    Sums<Math> sums = {};
    multiply<Math, true, true>(
        sums, a.d,
        [&](int64_t row, int64_t k) { return load_chunk<Math>(queries, first_row + row, a.rows, k, a.d, a.whole); },
        [&](int64_t key, int64_t k) { return load_chunk<Math>(keys, first_key + key, a.key_count, k, a.d, a.whole); });
    __syncthreads();  // Scores take the slices' place.
    each_sum<Math>(sums, [&](int row, int key, Sum v) { scores[row * kPitch + key] = a.scale * v; });
    __syncthreads();
    // Two threads a row, each every other key.
    const int row = threadIdx.x / 2, half = threadIdx.x % 2;
    const bool exists = first_row + row < a.rows;
    const int64_t begin = a.first_key + first_key;
    const int64_t target = exists ? a.target(entry, first_row + row) - begin : -1;
    const int64_t left_out = exists ? a.left_out(entry, first_row + row) - begin : -1;
    Sum largest = -kInfinity<Sum>, sum = 0;
    for (int key = half; key < kTile; key += 2) {
      Sum& v = scores[row * kPitch + key];
      if (key == target && first_key + key < a.key_count) a.positives[entry * a.pitch_rows + first_row + row] = v;
      if (key == target || key == left_out || first_key + key >= a.key_count) v = -kInfinity<Sum>;
      largest = v > largest ? v : largest;
    }
    const Sum other = __shfl_xor_sync(0xffffffffu, largest, 1);
    largest = other > largest ? other : largest;
    // Infinite scores have infinite sums, and only such have sums that are not numbers.
    largest = largest > kLargest<Sum> ? kLargest<Sum> : largest < -kLargest<Sum> ? -kLargest<Sum> : largest;
    for (int key = half; key < kTile; key += 2) {
      Sum& v = scores[row * kPitch + key];
      v = exp(v - largest);
      sum += v;
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if (half == 0 && exists) {
      const int64_t at = a.stat(entry, begin / kTile, first_row + row);
      a.maxima[at] = largest;
      a.sums[at] = sum;
    }
    __syncthreads();
    if (a.gradients)
      for (int chunk = threadIdx.x; chunk < kTile * kTile / kChunk<Value>; chunk += kThreads) {
        const int in_row = chunk / (kTile / kChunk<Value>), key = chunk % (kTile / kChunk<Value>)*kChunk<Value>;
        if (first_row + in_row >= a.rows) continue;
        Chunk<Value> powers;
#pragma unroll
        for (int i = 0; i < kChunk<Value>; ++i) powers.v[i] = Narrow<Value>::from(scores[in_row * kPitch + key + i]);
        pack_at<kChunk<Value>>(a.powers + (entry * a.pitch_rows + first_row + in_row) * a.pitch_keys + first_key +
                               key) = powers;
      }
    __syncthreads();  // The next tile overwrites shared memory.
  }
}

// What a row's scores come to: see Outcome in cpu.cpp.
template <class Real>
__device__ Real loss_of(Real positive, Real largest, Real sum) {
  const double above = largest + log(static_cast<double>(sum)) - positive;
  if (positive == kInfinity<Real>) return std::numeric_limits<Real>::quiet_NaN();
  return static_cast<Real>(above > 0 ? above + log1p(exp(-above)) : log1p(exp(above)));
}
template <class Real>
__device__ bool is_right(Real positive, Real largest, Real sum) {
  const bool others = sum > 0 || largest > -kLargest<Real>;
  return sum < kInfinity<Real> && (positive > largest || !others);
}

// From the tiles' maxima and sums to losses, and to the factors between powers and the gradients' weights.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads) finish_rows(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  constexpr Sum kNan = std::numeric_limits<Sum>::quiet_NaN();
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.entries * a.rows;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t entry = i / a.rows, row = i % a.rows, index = a.row_index(entry, row);
    const int64_t target = a.target(entry, row), left_out = a.left_out(entry, row);
    const bool valid = target >= 0 && (a.exclude == nullptr || (left_out >= 0 && left_out != target));
    Sum largest = -kLargest<Sum>, sum = 0;
    for (int64_t tile = 0; tile < a.key_tiles; ++tile) {
      const Sum v = a.maxima[a.stat(entry, tile, row)];
      largest = v > largest ? v : largest;
    }
    for (int64_t tile = 0; tile < a.key_tiles; ++tile) {
      const int64_t at = a.stat(entry, tile, row);
      sum += a.sums[at] * exp(a.maxima[at] - largest);
    }
    const int64_t of_row = entry * a.pitch_rows + row;
    const Sum positive = valid ? a.positives[of_row] : Sum(0);
    if (a.losses != nullptr) {
      a.losses[index] = valid ? loss_of(positive, largest, sum) : kNan;
      a.right[index] = valid && is_right(positive, largest, sum) ? Sum(1) : Sum(0);
    }
    if (!a.gradients) continue;
    Sum inverse = 0;
    if (valid) {
      const Sum weight = a.row_weights != nullptr ? a.factor * a.row_weights[index] : a.factor;
      inverse = weight == 0 ? Sum(0) : weight / (sum + exp(positive - largest));
    }
    a.target_weights[of_row] = inverse == 0 ? Sum(0) : -sum * inverse;
    a.row_factors[of_row] = valid ? a.scale : kNan;
    for (int64_t tile = 0; tile < a.key_tiles; ++tile) {
      const int64_t at = a.stat(entry, tile, row);
      a.factors[at] = inverse == 0 ? Sum(0) : exp(a.maxima[at] - largest) * inverse;
    }
  }
}

// The gradients' weights of a row for the keys from `key` of the chunk on.
template <class T, class Math>
__device__ Chunk<typename Math::Value> load_weights(const Arguments<T, Math>& a, int64_t entry, int64_t row,
                                                    int64_t key) {
  using Value = typename Math::Value;
  Chunk<Value> chunk = {};
  if (row >= a.rows || key >= a.pitch_keys) return chunk;
  const auto factor = a.factors[a.stat(entry, (a.first_key + key) / kTile, row)];
  if (factor != 0) {  // Else the powers may be anything.
    const auto powers = pack_at<kChunk<Value>>(a.powers + (entry * a.pitch_rows + row) * a.pitch_keys + key);
#pragma unroll
    for (int i = 0; i < kChunk<Value>; ++i)
      chunk.v[i] = to_value<Math>(factor * widen<typename Math::Sum>(powers.v[i]));
  }
  const int64_t target = a.target(entry, row) - (a.first_key + key);
#pragma unroll
  for (int i = 0; i < kChunk<Value>; ++i)
    if (target == i) chunk.v[i] = to_value<Math>(a.target_weights[entry * a.pitch_rows + row]);
  return chunk;
}

// A tile of [rows, D] of a part of the queries' gradient: weights times keys.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads) add_to_queries(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  const int64_t row_tiles = divide_up(a.rows, kTile), columns = divide_up(a.d, kTile);
  const int64_t tiles = row_tiles * columns, blocks = a.entries * a.query_parts * tiles;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t entry = block / (a.query_parts * tiles), part = block / tiles % a.query_parts;
    const int64_t first_row = block / columns % row_tiles * kTile, first = block % columns * kTile;
    const int64_t first_key = part * a.part_keys, left = a.key_count - first_key;
    const T* const keys = a.key_rows(entry);
    Sums<Math> sums = {};
    multiply<Math, true, false>(
        sums, left < a.part_keys ? left : a.part_keys,
        [&](int64_t row, int64_t key) { return load_weights(a, entry, first_row + row, first_key + key); },
        [&](int64_t key, int64_t k) {
          return load_chunk<Math>(keys, first_key + key, a.key_count, first + k, a.d, a.whole);
        });
    each_sum<Math>(sums, [&](int row, int k, Sum v) {
      const int64_t in_rows = first_row + row, column = first + k;
      if (in_rows >= a.rows || column >= a.d) return;
      Sum* const sum = a.query_sums + ((entry * a.query_parts + part) * a.pitch_rows + in_rows) * a.d + column;
      *sum = a.adds_queries ? *sum + v : v;
    });
  }
}

// The queries' gradient of its parts.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads) finish_queries(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < a.entries * a.rows * a.d;
       i += int64_t{gridDim.x} * kThreads) {
    const int64_t entry = i / (a.rows * a.d), row = i / a.d % a.rows, column = i % a.d;
    Sum total = 0;
    for (int64_t part = 0; part < a.query_parts; ++part)
      total += a.query_sums[((entry * a.query_parts + part) * a.pitch_rows + row) * a.d + column];
    a.grad_queries[a.row_index(entry, row) * a.d + column] =
        Narrow<T>::from(a.counts(entry, row) ? total * a.row_factors[entry * a.pitch_rows + row] : Sum(0));
  }
}

// A tile of [keys, D] of the keys' gradient: transposed weights times queries.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads) add_to_keys(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  const int64_t key_tiles = divide_up(a.key_count, kTile), columns = divide_up(a.d, kTile);
  for (int64_t block = blockIdx.x; block < a.entries * key_tiles * columns; block += gridDim.x) {
    const int64_t entry = block / (key_tiles * columns), first_key = block / columns % key_tiles * kTile,
                  first = block % columns * kTile;
    const T* const queries = a.query_rows(entry);
    Sums<Math> sums = {};
    multiply<Math, false, false>(
        sums, a.rows, [&](int64_t row, int64_t key) { return load_weights(a, entry, row, first_key + key); },
        [&](int64_t row, int64_t k) {
          const bool counts = row < a.rows && a.counts(entry, row);
          return load_chunk<Math>(queries, row, counts ? a.rows : 0, first + k, a.d, a.whole);
        });
    each_sum<Math>(sums, [&](int key, int k, Sum v) {
      const int64_t in_chunk = first_key + key, column = first + k;
      if (in_chunk >= a.key_count || column >= a.d) return;
      const int64_t in_entry = a.first_key + in_chunk;
      Sum* const sum = a.key_sums + (entry * a.n + in_entry) * a.d + column;
      if (a.adds_keys) v += *sum;
      if (a.ends_keys)
        a.grad_keys[((a.first_entry + entry) * a.n + in_entry) * a.d + column] = Narrow<T>::from(v * a.scale);
      else
        *sum = v;
    });
  }
}

// For tensors that no block reaches.
template <class T>
__global__ void __launch_bounds__(kThreads) fill_zeros(T* values, int64_t n) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n; i += int64_t{gridDim.x} * kThreads)
    values[i] = T{};
}

// Powers of a group of queries: what the second-level cache of an A100 or H100, 40 or 50 MB, holds beside the rest.
constexpr int64_t kPowersBytes = int64_t{32} << 20;
// Beyond this many keys a group is of kChunkRows queries, and its keys come chunk by chunk.
constexpr int64_t kWholeKeys = 8192, kChunkRows = 1024;
// Blocks that fill a GPU, and keys that a block should sum over at least.
constexpr int64_t kFullGrid = 256, kMinPartKeys = 512;

template <class T, class Math>
class AllKeys {
  using Value = typename Math::Value;
  using Sum = typename Math::Sum;

 public:
  explicit AllKeys(const Problem& problem)
      : problem_(problem), m_(problem.rows()), n_(problem.keys_count()), d_(problem.dim()) {
    const int64_t padded = divide_up(n_, kTile) * kTile, all_rows = divide_up(m_, kTile) * kTile;
    const int64_t row_bytes = padded * static_cast<int64_t>(sizeof(Value));
    rows_ = n_ > kWholeKeys ? kChunkRows : std::max(kPowersBytes / std::max<int64_t>(row_bytes, 1), int64_t{kTile});
    rows_ = std::min(rows_ / kTile * kTile, all_rows);
    keys_ =
        n_ > kWholeKeys ? kPowersBytes / (kChunkRows * static_cast<int64_t>(sizeof(Value))) / kTile * kTile : padded;
    keys_ = std::min(keys_, padded);
    entries_ = std::clamp<int64_t>(kPowersBytes / std::max<int64_t>(rows_ * keys_ * sizeof(Value), 1), 1,
                                   std::max<int64_t>(problem.batch(), 1));
    const int64_t blocks = std::max<int64_t>(entries_ * divide_up(rows_, kTile) * divide_up(d_, kTile), 1);
    const int64_t parts = std::clamp<int64_t>(kFullGrid / blocks, 1, std::max<int64_t>(keys_ / kMinPartKeys, 1));
    part_keys_ = std::max<int64_t>(divide_up(divide_up(keys_, parts), kTile) * kTile, kTile);
  }

  int64_t workspace() const {
    Parts parts(nullptr);
    arguments(parts);
    return parts.used();
  }

  void run(void* stream) const {
    if (m_ == 0) {
      const int64_t count = problem_.grad_keys.ndim != 0 ? problem_.grad_keys.numel() : 0;
      return launch("fill_zeros", &fill_zeros<T>, {divide_up(count, kThreads), dim3(kThreads)}, stream,
                    problem_.grad_keys.as<T>(), count);
    }
    Parts parts(problem_.workspace.as<char>());
    Arguments<T, Math> a = arguments(parts);
    for (a.first_entry = 0; a.first_entry < problem_.batch(); a.first_entry += entries_)
      for (a.first_row = 0; a.first_row < m_; a.first_row += rows_) {
        a.entries = std::min(entries_, problem_.batch() - a.first_entry);
        a.rows = std::min(rows_, m_ - a.first_row);
        group(a, stream);
      }
  }

 private:
  bool in_chunks() const { return keys_ < n_; }

  Arguments<T, Math> arguments(Parts& parts) const {
    const Problem& p = problem_;
    Arguments<T, Math> a = {};
    a.queries = p.queries.as<const T>();
    a.keys = p.keys.as<const T>();
    a.targets = p.targets.as<const int64_t>();
    a.exclude = p.exclude.as<const int64_t>();
    a.row_weights = p.row_weights.as<const Sum>();
    a.losses = p.losses.as<Sum>();
    a.right = p.right.as<Sum>();
    a.grad_queries = p.grad_queries.as<T>();
    a.grad_keys = p.grad_keys.as<T>();
    a.m = m_;
    a.n = n_;
    a.d = d_;
    a.key_tiles = divide_up(n_, kTile);
    a.pitch_rows = rows_;
    a.pitch_keys = keys_;
    a.query_parts = divide_up(keys_, part_keys_);
    a.part_keys = part_keys_;
    a.scale = static_cast<Sum>(p.scale);
    a.factor = static_cast<Sum>(p.factor);
    a.gradients = p.wants_gradients();
    constexpr int64_t kAlignment = kChunk<Value> * sizeof(T);
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kAlignment == 0; };
    a.whole = d_ % kChunk<Value> == 0 && aligned(a.queries) && aligned(a.keys);
    const int64_t stats = entries_ * a.key_tiles * rows_, of_rows = entries_ * rows_;
    a.powers = parts.take<Value>(a.gradients ? entries_ * rows_ * keys_ : 0);
    a.maxima = parts.take<Sum>(stats);
    a.sums = parts.take<Sum>(stats);
    a.factors = parts.take<Sum>(a.gradients ? stats : 0);
    a.positives = parts.take<Sum>(of_rows);
    a.target_weights = parts.take<Sum>(of_rows);
    a.row_factors = parts.take<Sum>(of_rows);
    a.query_sums = parts.take<Sum>(p.grad_queries.ndim != 0 ? of_rows * a.query_parts * d_ : 0);
    a.key_sums = parts.take<Sum>(p.grad_keys.ndim != 0 && rows_ < m_ ? entries_ * n_ * d_ : 0);
    return a;
  }

  void group(Arguments<T, Math>& a, void* stream) const {
    const int64_t row_tiles = divide_up(a.rows, kTile), columns = divide_up(d_, kTile);
    constexpr int64_t kSlices = 2 * Slice<Math, true>::kBytes;
    static_assert(Slice<Math, false>::kBytes <= Slice<Math, true>::kBytes);
    constexpr int64_t kScoreBytes = std::max<int64_t>(kSlices, kTile * (kTile + 2) * sizeof(Sum));
    const auto each_chunk = [&](const auto& work) {
      for (a.first_key = 0; a.first_key < n_; a.first_key += keys_) {
        a.key_count = std::min(keys_, n_ - a.first_key);
        work(divide_up(a.key_count, kTile));
      }
    };
    const auto score_chunk = [&](int64_t key_tiles) {
      launch("score", &score<T, Math>, {a.entries * row_tiles * key_tiles, dim3(kThreads), kScoreBytes}, stream, a);
    };
    each_chunk(score_chunk);
    launch("finish_rows", &finish_rows<T, Math>, {divide_up(a.entries * a.rows, kThreads), dim3(kThreads)}, stream, a);
    if (!a.gradients) return;
    each_chunk([&](int64_t key_tiles) {
      if (in_chunks()) score_chunk(key_tiles);
      a.adds_queries = a.first_key > 0;
      a.adds_keys = a.first_row > 0;
      a.ends_keys = a.first_row + a.rows == m_;
      if (a.grad_queries != nullptr)
        launch("add_to_queries", &add_to_queries<T, Math>,
               {a.entries * a.query_parts * row_tiles * columns, dim3(kThreads), kSlices}, stream, a);
      if (a.grad_keys != nullptr)
        launch("add_to_keys", &add_to_keys<T, Math>, {a.entries * key_tiles * columns, dim3(kThreads), kSlices}, stream,
               a);
    });
    if (a.grad_queries != nullptr)
      launch("finish_queries", &finish_queries<T, Math>, {divide_up(a.entries * a.rows * d_, kThreads), dim3(kThreads)},
             stream, a);
  }

  const Problem& problem_;
  int64_t m_, n_, d_;
  int64_t rows_, keys_, entries_;  // A group of queries, a chunk of its keys, and what is taken of the batch at a time.
  int64_t part_keys_;
};

// --- Sampled negatives ---

template <class T, class Sum>
struct SampledArguments {
  const T *queries, *keys;
  const int64_t *targets, *negatives, *exclude;
  const Sum* row_weights;
  Sum *losses, *right;
  T *grad_queries, *grad_keys;
  const int64_t *order, *segments;
  Sum* weights;  // [B * M, 1 + S]: scores, then the gradients' weights.
  int64_t rows, all_rows, n, all_keys, d, pairs;
  Sum scale, factor;
  bool gradients;

  // The key of a pair: its positive first.
  __device__ int64_t key(int64_t row, int64_t pair) const {
    if (pair > 0) return negatives[row * (pairs - 1) + pair - 1];
    return targets != nullptr ? targets[row] : row % rows;
  }
};

// Columns of a row that a lane sums at a time.
constexpr int kLaneColumns = 4;

// A warp a query.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) contrast_sampled(const __grid_constant__ SampledArguments<T, Sum> a) {
  constexpr Sum kNan = std::numeric_limits<Sum>::quiet_NaN();
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; row < a.all_rows;
       row += int64_t{gridDim.x} * (kThreads / kWarp)) {
    const T *const query = a.queries + row * a.d, *const keys = a.keys + row / a.rows * a.n * a.d;
    const int64_t target = a.key(row, 0), left_out = a.exclude != nullptr ? a.exclude[row] : -1;
    Sum* const weights = a.weights + row * a.pairs;
    bool valid = a.exclude == nullptr || (left_out >= 0 && left_out < a.n && left_out != target);
    // The largest of all negatives' scores, and of those of other keys than the positive.
    Sum positive = 0, largest = -kLargest<Sum>, rival = -kLargest<Sum>, sum = 0;
    bool rivals = false, nan = false;
    for (int64_t pair = 0; pair < a.pairs; ++pair) {
      const int64_t key = a.key(row, pair);
      const bool exists = key >= 0 && key < a.n;
      valid = valid && exists;
      Sum score = 0;
      if (exists)
        for (int64_t k = lane; k < a.d; k += kWarp) score += widen<Sum>(query[k]) * widen<Sum>(keys[key * a.d + k]);
      score = a.scale * warp_sum(score);
      if (pair == 0) {
        positive = score;
        continue;
      }
      if (key == left_out) score = -kInfinity<Sum>;
      const Sum finite = score > kLargest<Sum> ? kLargest<Sum> : score;
      largest = finite > largest ? finite : largest;
      if (key != target && key != left_out) {
        rivals = true;
        nan = nan || score != score;
        rival = score > rival ? score : rival;
      }
      if (lane == pair % kWarp) weights[pair] = score;
    }
    for (int64_t pair = lane == 0 ? kWarp : lane; pair < a.pairs; pair += kWarp) {
      const Sum power = exp(weights[pair] - largest);
      weights[pair] = power;
      sum += power;
    }
    sum = warp_sum(sum);
    if (a.losses != nullptr && lane == 0) {
      a.losses[row] = valid ? loss_of(positive, largest, sum) : kNan;
      a.right[row] = valid && !nan && (positive > rival || !rivals) ? Sum(1) : Sum(0);
    }
    if (!a.gradients) continue;
    const Sum weight = a.row_weights != nullptr ? a.factor * a.row_weights[row] : a.factor;
    Sum inverse = 0;
    if (valid && weight != 0) inverse = weight * a.scale / (sum + exp(positive - largest));
    if (lane == 0) weights[0] = inverse == 0 ? Sum(0) : -sum * inverse;
    for (int64_t pair = lane == 0 ? kWarp : lane; pair < a.pairs; pair += kWarp)
      weights[pair] = inverse == 0 ? Sum(0) : weights[pair] * inverse;
    __syncwarp();
    if (a.grad_queries == nullptr) continue;
    for (int64_t first = lane; first < a.d; first += kWarp * kLaneColumns) {
      Sum sums[kLaneColumns] = {};
      for (int64_t pair = 0; inverse != 0 && pair < a.pairs; ++pair) {
        const Sum by = weights[pair];
        const T* const from = keys + a.key(row, pair) * a.d;
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i)
          if (first + i * kWarp < a.d) sums[i] += by * widen<Sum>(from[first + i * kWarp]);
      }
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i)
        if (first + i * kWarp < a.d)
          a.grad_queries[row * a.d + first + i * kWarp] = Narrow<T>::from(valid || weight == 0 ? sums[i] : kNan);
    }
  }
}

// A warp a key: the queries of its pairs, in order.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) sum_sampled_keys(const __grid_constant__ SampledArguments<T, Sum> a) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t key = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; key < a.all_keys;
       key += int64_t{gridDim.x} * (kThreads / kWarp)) {
    const int64_t begin = a.segments[key], end = a.segments[key + 1];
    for (int64_t first = lane; first < a.d; first += kWarp * kLaneColumns) {
      Sum sums[kLaneColumns] = {};
      for (int64_t i = begin; i < end; ++i) {
        const int64_t pair = a.order[i];
        const Sum by = a.weights[pair];
        if (by == 0) continue;
        const T* const from = a.queries + pair / a.pairs * a.d;
#pragma unroll
        for (int j = 0; j < kLaneColumns; ++j)
          if (first + j * kWarp < a.d) sums[j] += by * widen<Sum>(from[first + j * kWarp]);
      }
#pragma unroll
      for (int j = 0; j < kLaneColumns; ++j)
        if (first + j * kWarp < a.d) a.grad_keys[key * a.d + first + j * kWarp] = Narrow<T>::from(sums[j]);
    }
  }
}

template <class T, class Sum>
void launch_sampled(const Problem& p, void* stream) {
  SampledArguments<T, Sum> a = {};
  a.queries = p.queries.as<const T>();
  a.keys = p.keys.as<const T>();
  a.targets = p.targets.as<const int64_t>();
  a.negatives = p.negatives.as<const int64_t>();
  a.exclude = p.exclude.as<const int64_t>();
  a.row_weights = p.row_weights.as<const Sum>();
  a.losses = p.losses.as<Sum>();
  a.right = p.right.as<Sum>();
  a.grad_queries = p.grad_queries.as<T>();
  a.grad_keys = p.grad_keys.as<T>();
  a.order = p.order.as<const int64_t>();
  a.segments = p.segments.as<const int64_t>();
  a.weights = p.workspace.as<Sum>();
  a.rows = p.rows();
  a.all_rows = p.batch() * p.rows();
  a.n = p.keys_count();
  a.all_keys = p.batch() * p.keys_count();
  a.d = p.dim();
  a.pairs = p.samples() + 1;
  a.scale = static_cast<Sum>(p.scale);
  a.factor = static_cast<Sum>(p.factor);
  a.gradients = p.wants_gradients();
  constexpr int64_t kWarps = kThreads / kWarp;
  launch("contrast_sampled", &contrast_sampled<T, Sum>, {divide_up(a.all_rows, kWarps), dim3(kThreads)}, stream, a);
  if (a.grad_keys == nullptr) return;
  if (p.order.ndim == 0) throw std::invalid_argument("order and segments are needed for the keys' gradient");
  launch("sum_sampled_keys", &sum_sampled_keys<T, Sum>, {divide_up(a.all_keys, kWarps), dim3(kThreads)}, stream, a);
}

// Calls work with the class that contrasts all keys.
template <class Work>
void with_all_keys(const Problem& problem, const Work& work) {
  switch (problem.queries.dtype) {
    case DType::bf16: return work(AllKeys<BFloat16, InBFloat16>(problem));
    case DType::f16: return work(AllKeys<Half, InTf32>(problem));
    case DType::f32:
      if (problem.tf32) return work(AllKeys<float, InTf32>(problem));
      return work(AllKeys<float, InFloat>(problem));
    default: return work(AllKeys<double, InDouble>(problem));
  }
}

}  // namespace

int64_t workspace_bytes(const Problem& problem) {
  if (problem.sampled()) {
    const int64_t size = problem.queries.dtype == DType::f64 ? sizeof(double) : sizeof(float);
    return problem.batch() * problem.rows() * (problem.samples() + 1) * size;
  }
  int64_t bytes = 0;
  with_all_keys(problem, [&](const auto& all) { bytes = all.workspace(); });
  return bytes;
}

void contrast(const Problem& problem, void* stream) {
  if (!problem.sampled()) return with_all_keys(problem, [&](const auto& all) { all.run(stream); });
  with_floating(problem.queries.dtype, [&](auto storage) {
    using T = decltype(storage);
    launch_sampled<T, std::conditional_t<std::is_same_v<T, double>, double, float>>(problem, stream);
  });
}

}  // namespace cpc::info_nce::cuda
