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
#include "core/cuda/warp_product.cuh"
#include "core/workspace.h"
#include "info_nce/info_nce.h"
#include "info_nce/outcome.h"

namespace cpc::info_nce::cuda {
namespace {

using namespace cpc::cuda;

// --- A block's product: a tile of 64 x 64, by warps of 32 x 32 ---

constexpr int kTile = 64, kThreads = 128, kRowTiles = 2, kWarpsAcross = kTile / kWarpColumns;
// While one slice is multiplied, the next is in shared memory and the one after that on its way to registers.
constexpr int kStages = 2, kTileBytes = kTile * kSliceBytes, kStageBytes = 2 * kTileBytes;

template <class Value>
using Chunk = Pack<Value, kChunk<Value>>;
template <class Math>
using Sums = WarpSums<Math, kRowTiles>;
// Blocks of a multiprocessor, at least, of scores and of gradients: bounds the registers.
template <class Math>
constexpr int kScoreBlocks = !Math::kTensorCores                 ? 2
                             : sizeof(typename Math::Value) == 2 ? 4
                                                                 : 5;
template <class Math>
constexpr int kGradBlocks = Math::kTensorCores ? 4 : 2;
template <class T>
constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

__device__ inline int warp_row() { return threadIdx.x / kWarp / kWarpsAcross * (16 * kRowTiles); }
__device__ inline int warp_column() { return threadIdx.x / kWarp % kWarpsAcross * kWarpColumns; }

// sums += A B over `depth`. load_a(i, k) and load_b give the chunk of the operand's layout that begins at element i of
// the tile's side and depth k.
template <class Math, class A, class B, class LoadA, class LoadB>
__device__ void multiply(Sums<Math>& sums, int64_t depth, const LoadA& load_a, const LoadB& load_b) {
  using Value = typename Math::Value;
  constexpr int kChunks = kTileBytes / kChunkBytes / kThreads;
  Chunk<Value> of_a[kChunks], of_b[kChunks];  // A thread's.
  const auto each_chunk = [&](const auto& work) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int chunk = static_cast<int>(threadIdx.x) + c * kThreads;
      work(of_a[c], A::chunk(chunk), of_b[c], B::chunk(chunk));
    }
  };
  const auto fetch = [&](int64_t begin) {
    if (begin >= depth) return;
    each_chunk([&](Chunk<Value>& a, const ChunkPlace& in_a, Chunk<Value>& b, const ChunkPlace& in_b) {
      a = load_a(in_a.side, begin + in_a.depth);
      b = load_b(in_b.side, begin + in_b.depth);
    });
  };
  fetch(0);
  unsigned char* tiles = dynamic_shared();
  for (int64_t begin = 0; begin < depth; begin += kDepth<Value>) {
    each_chunk([&](const Chunk<Value>& a, const ChunkPlace& in_a, const Chunk<Value>& b, const ChunkPlace& in_b) {
      *reinterpret_cast<Chunk<Value>*>(tiles + in_a.at) = a;
      *reinterpret_cast<Chunk<Value>*>(tiles + kTileBytes + in_b.at) = b;
    });
    fetch(begin + kDepth<Value>);
    __syncthreads();  // This stage is there for all, and the other, which is stored to next, is free.
    add_product<Math, kRowTiles>(sums, A(tiles, warp_row()), B(tiles + kTileBytes, warp_column()));
    tiles = dynamic_shared() + (tiles == dynamic_shared() ? kStageBytes : 0);
  }
  __syncthreads();  // Shared memory is free again.
}

// Calls use(row, column, value) for each sum of the lane.
template <class Math, class Use>
__device__ void each_sum(const Sums<Math>& sums, const Use& use) {
  const int lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        use(warp_row() + 16 * i + 8 * (r / 2) + g, warp_column() + 8 * j + 2 * t + r % 2, sums[i][j][r]);
}

// Columns from `column` on of a row of [rows, d], zeros outside.
template <class Value, class T>
__device__ Chunk<Value> load_chunk(const T* matrix, int64_t row, int64_t rows, int64_t column, int64_t d) {
  constexpr int kCount = kChunk<Value>;
  Chunk<Value> chunk = {};
  const int64_t left = d - column;
  if (row < rows) load_run(chunk.v, matrix + row * d + column, 1, static_cast<int>(left < kCount ? left : kCount));
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
  __device__ Sum weight(int64_t entry, int64_t row) const {
    return weight_of(row_index(entry, row), factor, row_weights);
  }
  __device__ int64_t stat(int64_t entry, int64_t tile, int64_t row) const {
    return (entry * key_tiles + tile) * pitch_rows + row;
  }
};

// Scores of a tile, in shared memory.
template <class Sum>
class TileScores {
  static constexpr int kPitch = kTile + 2;

 public:
  static constexpr int64_t kBytes = kTile * kPitch * sizeof(Sum);
  __device__ Sum& operator()(int row, int key) const {
    return reinterpret_cast<Sum*>(dynamic_shared())[row * kPitch + key];
  }
};

// Turns scores into powers relative to the largest of each row, with the positives and the excluded left out. The tile
// begins at row `first_row` of the group and key `first_key` of the chunk.
template <class T, class Math, class Sum = typename Math::Sum>
__device__ void exponentiate(const Arguments<T, Math>& a, const TileScores<Sum>& scores, int64_t entry,
                             int64_t first_row, int64_t first_key) {
  // Two threads a row, each every other key.
  const int row = threadIdx.x / 2, half = threadIdx.x % 2;
  const bool exists = first_row + row < a.rows;
  const int64_t begin = a.first_key + first_key;
  const int64_t target = exists ? a.target(entry, first_row + row) - begin : -1;
  const int64_t left_out = exists ? a.left_out(entry, first_row + row) - begin : -1;
  Sum largest = -kInfinity<Sum>, sum = 0;
  for (int key = half; key < kTile; key += 2) {
    Sum& v = scores(row, key);
    if (key == target && first_key + key < a.key_count) a.positives[entry * a.pitch_rows + first_row + row] = v;
    if (key == target || key == left_out || first_key + key >= a.key_count) v = -kInfinity<Sum>;
    largest = v > largest ? v : largest;
  }
  const Sum other = __shfl_xor_sync(0xffffffffu, largest, 1);
  largest = finite<Sum>(other > largest ? other : largest);
  for (int key = half; key < kTile; key += 2) {
    Sum& v = scores(row, key);
    v = exp(v - largest);
    sum += v;
  }
  sum += __shfl_xor_sync(0xffffffffu, sum, 1);
  if (half == 0 && exists) {
    const int64_t at = a.stat(entry, begin / kTile, first_row + row);
    a.maxima[at] = largest;
    a.sums[at] = sum;
  }
}

// A tile of scores as powers, which the gradients need, and the tile's maxima and sums.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads, kScoreBlocks<Math>) score(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  using Value = typename Math::Value;
  constexpr int kChunksAcross = kTile / kChunk<Value>;
  constexpr TileScores<Sum> scores{};
  const int64_t row_tiles = divide_up(a.rows, kTile), key_tiles = divide_up(a.key_count, kTile);
  for (int64_t block = blockIdx.x; block < a.entries * row_tiles * key_tiles; block += gridDim.x) {
    const int64_t entry = block / (row_tiles * key_tiles), first_row = block / key_tiles % row_tiles * kTile,
                  first_key = block % key_tiles * kTile;
    const T *const queries = a.query_rows(entry), *const keys = a.key_rows(entry);
    Sums<Math> sums = {};
    multiply<Math, DepthInnermost<Value>, DepthInnermost<Value>>(
        sums, a.d, [&](int64_t row, int64_t k) { return load_chunk<Value>(queries, first_row + row, a.rows, k, a.d); },
        [&](int64_t key, int64_t k) { return load_chunk<Value>(keys, first_key + key, a.key_count, k, a.d); });
    each_sum<Math>(sums, [&](int row, int key, Sum v) { scores(row, key) = a.scale * v; });
    __syncthreads();  // A row's scores are there, whoever multiplied them.
    exponentiate(a, scores, entry, first_row, first_key);
    __syncthreads();
    for (int chunk = threadIdx.x; a.gradients && chunk < kTile * kChunksAcross; chunk += kThreads) {
      const int row = chunk / kChunksAcross, key = chunk % kChunksAcross * kChunk<Value>;
      if (first_row + row >= a.rows) continue;
      Chunk<Value> powers;
#pragma unroll
      for (int i = 0; i < kChunk<Value>; ++i) powers.v[i] = Narrow<Value>::from(scores(row, key + i));
      pack_at<kChunk<Value>>(a.powers + (entry * a.pitch_rows + first_row + row) * a.pitch_keys + first_key + key) =
          powers;
    }
    __syncthreads();  // The next tile overwrites shared memory.
  }
}

// From the tiles' maxima and sums to losses, and to the factors between powers and the gradients' weights.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads) finish_rows(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
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
    const Outcome<Sum> outcome{valid ? a.positives[of_row] : Sum(0), largest, sum};
    if (a.losses != nullptr) {
      a.losses[index] = valid ? outcome.loss() : kNan<Sum>;
      a.right[index] = valid && outcome.right() ? Sum(1) : Sum(0);
    }
    if (!a.gradients) continue;
    const Sum factor = valid ? outcome.factor_of_others(a.weight(entry, row)) : Sum(0);
    a.target_weights[of_row] = outcome.weight_of_positive(factor);
    a.row_factors[of_row] = valid ? a.scale : kNan<Sum>;
    for (int64_t tile = 0; tile < a.key_tiles; ++tile) {
      const int64_t at = a.stat(entry, tile, row);
      a.factors[at] = exp(a.maxima[at] - largest) * factor;
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
      chunk.v[i] = Narrow<Value>::from(factor * widen<typename Math::Sum>(powers.v[i]));
  }
  const int64_t target = a.target(entry, row) - (a.first_key + key);
#pragma unroll
  for (int i = 0; i < kChunk<Value>; ++i)
    if (target == i) chunk.v[i] = Narrow<Value>::from(a.target_weights[entry * a.pitch_rows + row]);
  return chunk;
}

// A tile of [rows, D] of a part of the queries' gradient: weights times keys.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads, kGradBlocks<Math>)
    add_to_queries(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  using Value = typename Math::Value;
  const int64_t row_tiles = divide_up(a.rows, kTile), columns = divide_up(a.d, kTile);
  const int64_t tiles = row_tiles * columns, blocks = a.entries * a.query_parts * tiles;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t entry = block / (a.query_parts * tiles), part = block / tiles % a.query_parts;
    const int64_t first_row = block / columns % row_tiles * kTile, first = block % columns * kTile;
    const int64_t first_key = part * a.part_keys, left = a.key_count - first_key;
    const T* const keys = a.key_rows(entry);
    Sums<Math> sums = {};
    multiply<Math, DepthInnermost<Value>, DepthOutermost<Value, kTile>>(
        sums, left < a.part_keys ? left : a.part_keys,
        [&](int64_t row, int64_t key) { return load_weights(a, entry, first_row + row, first_key + key); },
        [&](int64_t k, int64_t key) { return load_chunk<Value>(keys, first_key + key, a.key_count, first + k, a.d); });
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
        Narrow<T>::from(a.weight(entry, row) != 0 ? total * a.row_factors[entry * a.pitch_rows + row] : Sum(0));
  }
}

// A tile of [keys, D] of the keys' gradient: transposed weights times queries.
template <class T, class Math>
__global__ void __launch_bounds__(kThreads, kGradBlocks<Math>)
    add_to_keys(const __grid_constant__ Arguments<T, Math> a) {
  using Sum = typename Math::Sum;
  using Value = typename Math::Value;
  const int64_t key_tiles = divide_up(a.key_count, kTile), columns = divide_up(a.d, kTile);
  for (int64_t block = blockIdx.x; block < a.entries * key_tiles * columns; block += gridDim.x) {
    const int64_t entry = block / (key_tiles * columns), first_key = block / columns % key_tiles * kTile,
                  first = block % columns * kTile;
    const T* const queries = a.query_rows(entry);
    Sums<Math> sums = {};
    multiply<Math, DepthOutermost<Value, kTile>, DepthOutermost<Value, kTile>>(
        sums, a.rows, [&](int64_t key, int64_t row) { return load_weights(a, entry, row, first_key + key); },
        [&](int64_t k, int64_t row) {
          const bool counts = row < a.rows && a.weight(entry, row) != 0;
          return load_chunk<Value>(queries, row, counts ? a.rows : 0, first + k, a.d);
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
    const TensorView& grad_keys = problem_.grad_keys;
    if (m_ == 0)  // No block reaches them.
      return fill_with_zeros(grad_keys.data, grad_keys.ndim == 0 ? 0 : grad_keys.numel() * int64_t{sizeof(T)}, stream);
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
    constexpr int64_t kSlices = kStages * kStageBytes, kScoreBytes = std::max(kSlices, TileScores<Sum>::kBytes);
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

// A warp's sum over i in [0, count) of weight * row, of row_of(i) = (weight, row), and of `sum`, 0 or NaN. Rows
// of weight 0 may hold anything.
template <class T, class Sum>
struct WeightedRow {
  Sum weight;
  const T* row;
};
template <class T, class Sum, class RowOf>
__device__ void sum_rows(T* to, int64_t d, Sum sum, int64_t count, const RowOf& row_of) {
  for (int64_t first = threadIdx.x % kWarp; first < d; first += kWarp * kLaneColumns) {
    Sum sums[kLaneColumns];
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) sums[i] = sum;
    for (int64_t n = 0; n < count; ++n) {
      const WeightedRow<T, Sum> from = row_of(n);
      if (from.weight == 0) continue;
#pragma unroll
      for (int i = 0; i < kLaneColumns; ++i)
        if (first + i * kWarp < d) sums[i] += from.weight * widen<Sum>(from.row[first + i * kWarp]);
    }
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i)
      if (first + i * kWarp < d) to[first + i * kWarp] = Narrow<T>::from(sums[i]);
  }
}

// A warp scores a query's pairs; false where an index names no key. The scores of the negatives also go to a.weights,
// that of pair i from lane i % kWarp.
template <class T, class Sum>
__device__ bool score_pairs(const SampledArguments<T, Sum>& a, int64_t row, Sum& positive, Negatives<Sum>& negatives) {
  const int lane = threadIdx.x % kWarp;
  const T *const query = a.queries + row * a.d, *const keys = a.keys + row / a.rows * a.n * a.d;
  const int64_t target = a.key(row, 0), left_out = a.exclude != nullptr ? a.exclude[row] : -1;
  bool valid = a.exclude == nullptr || (left_out >= 0 && left_out < a.n && left_out != target);
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
    negatives.add(score, key != target && key != left_out);
    if (lane == pair % kWarp) a.weights[row * a.pairs + pair] = score;
  }
  return valid;
}

// A warp a query.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) contrast_sampled(const __grid_constant__ SampledArguments<T, Sum> a) {
  const int lane = threadIdx.x % kWarp, first = lane == 0 ? kWarp : lane;  // Of the lane's negatives.
  for (int64_t row = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; row < a.all_rows;
       row += int64_t{gridDim.x} * (kThreads / kWarp)) {
    Sum* const weights = a.weights + row * a.pairs;
    Negatives<Sum> negatives;
    Sum positive, sum = 0;
    const bool valid = score_pairs(a, row, positive, negatives), right = valid && negatives.right(positive);
    for (int64_t pair = first; pair < a.pairs; pair += kWarp) {
      const Sum power = exp(weights[pair] - negatives.largest);
      weights[pair] = power;
      sum += power;
    }
    const Outcome<Sum> outcome{positive, negatives.largest, warp_sum(sum)};
    if (a.losses != nullptr && lane == 0) {
      a.losses[row] = valid ? outcome.loss() : kNan<Sum>;
      a.right[row] = right ? Sum(1) : Sum(0);
    }
    if (!a.gradients) continue;
    const Sum weight = weight_of(row, a.factor, a.row_weights);
    const Sum factor = valid ? outcome.factor_of_others(weight) * a.scale : Sum(0);
    if (lane == 0) weights[0] = outcome.weight_of_positive(factor);
    for (int64_t pair = first; pair < a.pairs; pair += kWarp)
      weights[pair] = factor == 0 ? Sum(0) : weights[pair] * factor;
    __syncwarp();
    if (a.grad_queries == nullptr) continue;
    const T* const keys = a.keys + row / a.rows * a.n * a.d;
    sum_rows(a.grad_queries + row * a.d, a.d, valid || weight == 0 ? Sum(0) : kNan<Sum>, factor == 0 ? 0 : a.pairs,
             [&](int64_t pair) { return WeightedRow<T, Sum>{weights[pair], keys + a.key(row, pair) * a.d}; });
  }
}

// A warp a key: the queries of its pairs, in order.
template <class T, class Sum>
__global__ void __launch_bounds__(kThreads) sum_sampled_keys(const __grid_constant__ SampledArguments<T, Sum> a) {
  for (int64_t key = int64_t{blockIdx.x} * (kThreads / kWarp) + threadIdx.x / kWarp; key < a.all_keys;
       key += int64_t{gridDim.x} * (kThreads / kWarp)) {
    const int64_t begin = a.segments[key];
    sum_rows(a.grad_keys + key * a.d, a.d, Sum(0), a.segments[key + 1] - begin, [&](int64_t i) {
      const int64_t pair = a.order[begin + i];
      return WeightedRow<T, Sum>{a.weights[pair], a.queries + pair / a.pairs * a.d};
    });
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
    case DType::bf16: return work(AllKeys<BFloat16, TensorCores<BFloat16>>(problem));
    case DType::f16: return work(AllKeys<Half, TensorCores<float>>(problem));  // TF32 keeps small weights.
    case DType::f32:
      if (problem.tf32) return work(AllKeys<float, TensorCores<float>>(problem));
      return work(AllKeys<float, MultiplyAdds<float>>(problem));
    default: return work(AllKeys<double, MultiplyAdds<double>>(problem));
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
