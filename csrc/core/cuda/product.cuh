// The product of two matrices on tensor cores, D = A B, by persistent thread blocks: each computes one tile of D after
// another. Its parts are template parameters:
//
// - one loader for A and one for B (product_loaders.cuh) define where a block's slices of depth come from and their
//   layout in shared memory;
// - the Math (TensorCores<T> and MultiplyAdds<T> of warp_product.cuh, SplitTf32) defines how they are multiplied;
// - the ProductTile defines how much of D a block and a warp hold;
// - the Depth defines which slices a tile needs: all of them, unless some are known to be zeros;
// - an epilogue (product_epilogues.cuh) takes a warp's sums.
//
// The tile also chooses the main loop: MainLoop, or one for other instructions (warpgroup_product.cuh). The main loop
// begins tiles of the operands, starts copies of slices, and multiplies them. multiply_tiles, the order of tiles, the
// loaders and the epilogues are the same for all.
//
// Slices pass through kStages stages of shared memory. A stage is filled again as soon as all warps have read it, also
// from one tile to the next, so that copies run during an epilogue. Warps read a step's fragments while they multiply
// those of the step before. Depth is summed in order, one chain of additions per element.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "core/cuda/async_copy.cuh"
#include "core/cuda/device.h"
#include "core/cuda/warp_product.cuh"

namespace cpc::cuda {

// float32 on tensor cores with nearly the precision of float32: each value is split into two TF32 values, and the
// smallest of their four products is left out. Each product differs from the exact one by at most 2^-20 of it. An
// infinite value gives NaN.
struct SplitTf32 {
  using Value = float;
  using Sum = float;
  static constexpr bool kTensorCores = true;
};

template <class Math, class Tile, class A, class B, class Depth>
class MainLoop;

// A block's tile of D, divided among warps of at most 64 x 64, with kStages slices of the operands in shared memory.
// kBlocks is the least number of blocks per multiprocessor, which bounds the registers.
template <int kRows_, int kColumns_, int kWarpRows, int kWarpColumns, int kStages_, int kBlocks_>
struct ProductTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kWarpColumns / 8;  // Of a warp.
  static constexpr int kWarpsAcross = kColumns / kWarpColumns;
  static constexpr int kThreads = kWarp * kWarpsAcross * (kRows / kWarpRows);
  static constexpr int kTeams = 1, kTeamThreads = kThreads;  // See TwoTeams.
  static constexpr bool kAligned = false;                    // Whether slices must begin at multiples of 1024 bytes.
  template <class T, int kWidth>
  using Lines = WholeLines<T, kWidth>;
  template <class Math, class Tile, class A, class B, class Depth>
  using Loop = MainLoop<Math, Tile, A, B, Depth>;
  static constexpr int kABytes = kRows * kSliceBytes, kBothBytes = kABytes + kColumns * kSliceBytes;
  static constexpr int kStageBytes = kBothBytes, kSharedBytes = kStages * kStageBytes;

  // The first row and column of the calling warp's part of the tile.
  __device__ static int warp_row() { return static_cast<int>(threadIdx.x) / kWarp / kWarpsAcross * kWarpRows; }
  __device__ static int warp_column() { return static_cast<int>(threadIdx.x) / kWarp % kWarpsAcross * kWarpColumns; }
};

// The largest divisor of n that is at most `most`.
constexpr int largest_divisor(int n, int most) {
  int divisor = n < most ? n : most;
  while (n % divisor != 0) --divisor;
  return divisor;
}

// For problems with at most one tile per multiprocessor, which the warps of one block alone would not keep busy. Two
// teams of warps each have their own sums of the whole tile. They take slices in turn: a stage holds one slice of each
// team. In the end each team adds up one half of the tile.
template <class Of>
struct TwoTeams : Of {
  static constexpr int kTeams = 2, kTeamThreads = Of::kThreads, kThreads = kTeams * kTeamThreads;
  static constexpr int kStageBytes = kTeams * Of::kBothBytes;

  // The half of a warp's tile that its team passes to the epilogue.
  static constexpr bool kByRows = Of::kRowTiles % 2 == 0;
  struct Half {
    static constexpr int kRowTiles = kByRows ? Of::kRowTiles / 2 : Of::kRowTiles;
    static constexpr int kColumnTiles = kByRows ? Of::kColumnTiles : Of::kColumnTiles / 2;
  };
  static_assert(kByRows || Of::kColumnTiles % 4 == 0);  // A feature and its gate stay in one half.
  // The distance from the first team's half to the second's, in tiles.
  static constexpr int kRowsApart = kByRows ? Half::kRowTiles : 0, kColumnsApart = kByRows ? 0 : Half::kColumnTiles;

  // Teams exchange sums in shared memory: 16 rows of every warp, and as many columns at a time as fit on the smallest
  // GPUs.
  static constexpr int kMostBytes = 80 << 10, kTileBytes = kThreads * 4 * int{sizeof(float)};
  static constexpr int kExchangedTiles =
      largest_divisor(Half::kColumnTiles, (kMostBytes - Of::kStages * kStageBytes) / kTileBytes);
  static constexpr int kSharedBytes = Of::kStages * kStageBytes + kExchangedTiles * kTileBytes;

  __device__ static int team() { return static_cast<int>(threadIdx.x) / kTeamThreads; }
  __device__ static int warp_row() {
    return static_cast<int>(threadIdx.x) % kTeamThreads / kWarp / Of::kWarpsAcross * Of::kRowTiles * 16;
  }
};
// Reads the fewest bytes per product from the L2 cache: for A100 and H100, whose tensor cores are faster than that
// cache.
using WideTile = ProductTile<128, 256, 64, 64, 4, 1>;
// Two blocks per multiprocessor, so that one multiplies while the other stores. They fit into 100 KiB of shared memory.
using SquareTile = ProductTile<128, 128, 64, 64, 3, 2>;
// For problems that do not fill the GPU with larger ones.
using LowTile = ProductTile<64, 128, 32, 64, 4, 2>;

// `left` clamped to [0, most].
__device__ inline int how_many(int64_t left, int most) {
  return left < 0 ? 0 : left < most ? static_cast<int>(left) : most;
}

// A lane's sums of a warp's tile: sums[i][j][r] is at row 16 i + 8 (r / 2) + lane / 4 and
// column 8 j + 2 (lane % 4) + r % 2.
template <class Tile, class Sum = float>
using WarpTileSums = Sum[Tile::kRowTiles][Tile::kColumnTiles][4];

// --- The order of tiles ---

// Tiles are ordered in bands of `band` rows of tiles. A band goes column by column from left to right, and each column
// from top to bottom. Blocks that run at the same time thus work on roughly a square of tiles, which needs the fewest
// different rows of A and columns of B in the L2 cache. A batch has several entries, each a product of its own, one
// after another. With `diagonal`, only the tiles on the diagonal of each entry are computed.
struct TileOrder {
  int entries, row_tiles, column_tiles, band;
  bool diagonal = false;

  struct Place {
    int entry, row, column;
  };
  __device__ int count() const { return entries * row_tiles * column_tiles; }
  __device__ Place operator[](int index) const {
    const int of_entry = row_tiles * column_tiles, of_band = band * column_tiles;
    const int entry = index / of_entry;
    index -= entry * of_entry;
    if (diagonal) return {entry, index, index};
    const int above = index / of_band * band, rest = index - above * column_tiles;
    const int height = row_tiles - above < band ? row_tiles - above : band;
    const int column = rest / height;
    return {entry, above + rest - column * height, column};
  }
};

// --- The depth ---
//
// A Depth is a small struct that a kernel takes by value. count(a, row, rows) is the number of slices, at least one,
// that a tile needs for `rows` rows of the loader `a` from `row` on. Each thread has a Walk<kTeams> over its team's
// slices of one tile after another, which loaders may read: begin(row, rows) starts a tile, next() follows each slice,
// and after end() there are no more slices. With two teams, the number of slices must be even.

// All slices. A depth of 0 has one slice of zeros.
struct WholeDepth {
  int slices;

  explicit WholeDepth(int64_t slices) : slices(static_cast<int>(std::max<int64_t>(slices, 1))) {}
  template <class A>
  __device__ int count(const A&, int64_t, int) const {
    return slices;
  }
  template <int kTeams>
  class Walk {
   public:
    static_assert(kTeams == 1, "Loaders that do not look at the walk go along the depth slice by slice.");
    template <class A>
    __device__ Walk(const WholeDepth&, const A&, int) {}
    __device__ void begin(int64_t, int) {}
    __device__ void next() {}
    __device__ void end() {}
  };
};

// --- One step: 32 bytes of depth ---

template <class Math, class Tile>
struct Fragments {
  using T = typename Math::Value;
  uint32_t a[Tile::kRowTiles][4];
  uint32_t b[Tile::kColumnTiles / 2][4];  // Two neighbouring tiles each.

  template <class A, class B>
  __device__ void load(const A& of_a, const B& of_b, int depth) {
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) of_a.template load_fragments<true>(a[i], i, depth);
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles / 2; ++j) of_b.template load_fragments<false>(b[j], j, depth);
  }
};

// A register of a fragment, rounded to the type that tensor cores take.
template <class T>
__device__ uint32_t rounded(uint32_t bits) {
  if constexpr (sizeof(T) == 4)
    return to_tf32(__int_as_float(static_cast<int>(bits)));
  else
    return bits;
}

// The TF32 value nearest to a float, and the remainder.
struct Split {
  uint32_t large, small;
};
__device__ inline Split split(uint32_t bits) {
  const float value = __int_as_float(static_cast<int>(bits));
  const uint32_t large = to_tf32(value);
  return {large, static_cast<uint32_t>(__float_as_int(value - __int_as_float(static_cast<int>(large))))};
}

template <class Math, class Tile>
__device__ void multiply_fragments(WarpTileSums<Tile>& sums, const Fragments<Math, Tile>& f) {
  using T = typename Math::Value;
  if constexpr (std::is_same_v<Math, SplitTf32>) {
    Split a[Tile::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
      for (int m = 0; m < 4; ++m) a[i][m] = split(f.a[i][m]);
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
      const Split b[2] = {split(f.b[j / 2][j % 2 * 2]), split(f.b[j / 2][j % 2 * 2 + 1])};
      const uint32_t large_b[2] = {b[0].large, b[1].large}, small_b[2] = {b[0].small, b[1].small};
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) {
        const uint32_t large_a[4] = {a[i][0].large, a[i][1].large, a[i][2].large, a[i][3].large};
        const uint32_t small_a[4] = {a[i][0].small, a[i][1].small, a[i][2].small, a[i][3].small};
        multiply_add<float>(sums[i][j], small_a, large_b);
        multiply_add<float>(sums[i][j], large_a, small_b);
        multiply_add<float>(sums[i][j], large_a, large_b);
      }
    }
  } else {
    uint32_t a[Tile::kRowTiles][4];
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
      for (int m = 0; m < 4; ++m) a[i][m] = rounded<T>(f.a[i][m]);
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles; ++j) {
      const uint32_t b[2] = {rounded<T>(f.b[j / 2][j % 2 * 2]), rounded<T>(f.b[j / 2][j % 2 * 2 + 1])};
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles; ++i) multiply_add<T>(sums[i][j], a[i], b);
    }
  }
}

// --- Teams ---

// The team of the calling thread.
template <class Tile>
__device__ int team() {
  if constexpr (Tile::kTeams > 1)
    return Tile::team();
  else
    return 0;
}

// Adds up the sums of both teams in the half of the calling warp's tile that its team finishes. All threads of the
// block must take part.
template <class Tile>
__device__ void add_teams(const WarpTileSums<Tile>& sums, WarpTileSums<typename Tile::Half>& half,
                          unsigned char* shared) {
  using Four = Pack<float, 4>;
  using Half = typename Tile::Half;
  constexpr int kTiles = Tile::kExchangedTiles, kDown = Tile::kRowsApart, kRight = Tile::kColumnsApart;
  static_assert(Half::kColumnTiles % kTiles == 0);
  const bool first_team = Tile::team() == 0;
  const int thread = static_cast<int>(threadIdx.x), other = (thread + Tile::kTeamThreads) % Tile::kThreads;
  const auto place = [&](int of, int j) { return reinterpret_cast<Four*>(shared) + j * Tile::kThreads + of; };
#pragma unroll
  for (int i = 0; i < Half::kRowTiles; ++i)
#pragma unroll
    for (int first = 0; first < Half::kColumnTiles; first += kTiles) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        Four given;
#pragma unroll
        for (int r = 0; r < 4; ++r)
          given.v[r] = first_team ? sums[kDown + i][kRight + first + j][r] : sums[i][first + j][r];
        *place(thread, j) = given;
      }
      __syncthreads();  // What the other team gives is there.
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const Four got = *place(other, j);
#pragma unroll
        for (int r = 0; r < 4; ++r)
          half[i][first + j][r] =
              (first_team ? sums[i][first + j][r] : sums[kDown + i][kRight + first + j][r]) + got.v[r];
      }
      __syncthreads();  // What follows overwrites it.
    }
}

// --- The main loop ---

// The copying part of a main loop.
template <class Math, class Tile, class A, class B, class Depth>
class SliceCopies {
 public:
  using T = typename Math::Value;
  static_assert(std::is_same_v<typename A::Value, T> && std::is_same_v<typename B::Value, T>);

  __device__ SliceCopies(const A& a, const B& b, const Depth& depth, unsigned char* shared)
      : a_(a), b_(b), walk_(depth, a, team<Tile>()), shared_(shared + team<Tile>() * Tile::kBothBytes) {}

  // From now on, copies are of slices of these rows of A and columns of B, and after end() of nothing.
  __device__ void begin(const TileOrder::Place& place) {
    walk_.begin(int64_t{place.row} * Tile::kRows, Tile::kRows);
    a_.begin(place.entry, int64_t{place.row} * Tile::kRows);
    b_.begin(place.entry, int64_t{place.column} * Tile::kColumns);
  }
  __device__ void end() {
    walk_.end();
    a_.end();
    b_.end();
  }

  // Starts copies of the next slice into a stage that no thread reads any more.
  __device__ void start(int stage) {
    a_.start(shared_ + stage * Tile::kStageBytes, walk_);
    b_.start(shared_ + stage * Tile::kStageBytes + Tile::kABytes, walk_);
    walk_.next();
    commit_copies();
  }
  __device__ void leave() { wait_for_copies<0>(); }

 protected:
  using OfA = typename A::template Operand<Tile::kRows, Tile::template Lines>;
  using OfB = typename B::template Operand<Tile::kColumns, Tile::template Lines>;
  __device__ OfA of_a(int stage) const { return OfA(shared_ + stage * Tile::kStageBytes, Tile::warp_row()); }
  __device__ OfB of_b(int stage) const {
    return OfB(shared_ + stage * Tile::kStageBytes + Tile::kABytes, Tile::warp_column());
  }

 private:
  typename A::template Copies<Tile::kRows, Tile::kTeamThreads, Tile::template Lines> a_;
  typename B::template Copies<Tile::kColumns, Tile::kTeamThreads, Tile::template Lines> b_;
  typename Depth::template Walk<Tile::kTeams> walk_;
  unsigned char* shared_;  // Of the team.
};

template <class Math, class Tile, class A, class B, class Depth>
class MainLoop : public SliceCopies<Math, Tile, A, B, Depth> {
 public:
  using Base = SliceCopies<Math, Tile, A, B, Depth>;
  using Base::Base;
  using typename Base::T;

  // Waits for the first of the kStages slices whose copies were started.
  __device__ void enter() {
    wait_for_copies<Tile::kStages - 1>();
    __syncthreads();  // The first slice is there for all.
    if constexpr (kAhead) load(0);
  }

  // Adds the product of the next slice, and starts copies of a later slice into its stage.
  __device__ void add_slice(WarpTileSums<Tile, typename Math::Sum>& sums) {
    if constexpr (!Math::kTensorCores) {
      static_assert(Tile::kColumnTiles == 4);
      add_product<Math, Tile::kRowTiles>(sums, this->of_a(stage_), this->of_b(stage_));
      this->start(leave_stage());
    } else {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if constexpr (!kAhead) load(step);
        const bool last = step == kSteps - 1;
        const int free = last ? leave_stage() : 0;
        if constexpr (kAhead) load((step + 1) % kSteps);  // Before the copies, as the compiler keeps their order.
        if (last) this->start(free);
        multiply_fragments<Math, Tile>(sums, fragments_[kAhead ? step % 2 : 0]);
      }
    }
  }

  // After the last slice of a tile.
  __device__ void finish(WarpTileSums<Tile, typename Math::Sum>&) {}
  // Repeats the fragment load ahead after an epilogue, which would otherwise have to keep those registers.
  __device__ void go_on() {
    if constexpr (kAhead) load(0);
  }

 private:
  static constexpr int kStepDepth = 2 * kChunk<T>, kSteps = kDepth<T> / kStepDepth;
  // Whether fragments are read one step ahead. Split TF32 has no registers for this, and its products take long anyway.
  static constexpr bool kAhead =
      Math::kTensorCores && !std::is_same_v<Math, SplitTf32> && Tile::kRowTiles * Tile::kColumnTiles <= 32;
  static_assert(!kAhead || kSteps % 2 == 0);

  // Moves to the next stage once all threads see its slice. Returns the stage before, which all threads have read by
  // then.
  __device__ int leave_stage() {
    const int free = stage_;
    wait_for_copies<Tile::kStages - 2>();
    __syncthreads();  // The next slice is there for all, and all have read this one.
    stage_ = stage_ == Tile::kStages - 1 ? 0 : stage_ + 1;
    return free;
  }

  __device__ void load(int step) {
    fragments_[kAhead ? step % 2 : 0].load(this->of_a(stage_), this->of_b(stage_), step * kStepDepth);
  }

  int stage_ = 0;
  Fragments<Math, Tile> fragments_[kAhead ? 2 : 1];
};

// --- The kernel ---

template <class A, class B, class Depth, class Epilogue>
struct Product {
  A a;
  B b;
  Depth depth;
  Epilogue epilogue;
  TileOrder order;
};

// Computes all tiles of a product that belong to this block.
template <class Math, class Tile, class A, class B, class Depth, class Epilogue>
__device__ void multiply_tiles(const Product<A, B, Depth, Epilogue>& p) {
  typename Tile::template Loop<Math, Tile, A, B, Depth> loop(p.a, p.b, p.depth,
                                                             dynamic_shared<Tile::kAligned ? 1024 : 16>());
  const int tiles = p.order.count(), step = static_cast<int>(gridDim.x);
  const auto slices_of = [&](const TileOrder::Place& place) {  // Per team.
    return (p.depth.count(p.a, int64_t{place.row} * Tile::kRows, Tile::kRows) + Tile::kTeams - 1) / Tile::kTeams;
  };
  int tile = static_cast<int>(blockIdx.x), copied = tile;  // The tile being summed, and the next one to copy.
  if (tile >= tiles) return;
  int to_copy = 0, to_add = slices_of(p.order[tile]);
  int filled = 0;  // Stages.
  WarpTileSums<Tile, typename Math::Sum> sums = {};
#pragma unroll 1
  for (;;) {
    if (to_copy == 0) {
      if (copied < tiles) {
        const TileOrder::Place place = p.order[copied];
        loop.begin(place);
        to_copy = slices_of(place);
      } else {
        loop.end();
        to_copy = std::numeric_limits<int>::max();
      }
      copied += step;
    }
    if (filled < Tile::kStages) {
      const int slices = to_copy < Tile::kStages - filled ? to_copy : Tile::kStages - filled;
      to_copy -= slices;
#pragma unroll 1
      for (int i = 0; i < slices; ++i) loop.start(filled++);
      if (filled == Tile::kStages) loop.enter();
      continue;
    }
    const int slices = to_copy < to_add ? to_copy : to_add;
#pragma unroll 1
    for (int i = 0; i < slices; ++i) loop.add_slice(sums);
    to_copy -= slices;
    to_add -= slices;
    if (to_add > 0) continue;
    loop.finish(sums);
    const TileOrder::Place place = p.order[tile];
    const int64_t row = int64_t{place.row} * Tile::kRows + Tile::warp_row();
    const int64_t column = int64_t{place.column} * Tile::kColumns + Tile::warp_column();
    if constexpr (Tile::kTeams == 1) {
      p.epilogue.template take<Tile>(sums, place.entry, row, column);
    } else {
      using Half = typename Tile::Half;
      WarpTileSums<Half> half;
      add_teams<Tile>(sums, half, dynamic_shared() + Tile::kStages * Tile::kStageBytes);
      p.epilogue.template take<Half>(half, place.entry, row + Tile::team() * Tile::kRowsApart * 16,
                                     column + Tile::team() * Tile::kColumnsApart * 8);
    }
    tile += step;
    if (tile >= tiles) break;
    to_add = slices_of(p.order[tile]);
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kColumnTiles; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[i][j][r] = 0;
    loop.go_on();
  }
  loop.leave();
}

template <class Math, class Tile, class A, class B, class Depth, class Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks)
    multiply(const __grid_constant__ Product<A, B, Depth, Epilogue> product) {
  multiply_tiles<Math, Tile>(product);
}

// --- The launch ---

// The number of blocks that a GPU runs at the same time, so that none waits for another to finish.
template <class Tile>
int64_t product_blocks() {
  const int64_t reserved = 1 << 10;  // Shared memory of every block that the system reserves.
  const int64_t shared = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin) + reserved;  // Per multiprocessor.
  return multiprocessors() * std::clamp<int64_t>(shared / (Tile::kSharedBytes + reserved), 1, Tile::kBlocks);
}

// The number of slices of a depth.
template <class T>
int64_t slices_of(int64_t depth) {
  return (depth + kDepth<T> - 1) / kDepth<T>;
}

// The tiles of a product that are computed.
enum class Tiles : uint8_t { all, diagonal };

// Queues D = A B on a stream for each of `entries` entries; errors call it `name`. The operands must satisfy fits().
template <class Math, class Tile, class A, class B, class Depth, class Epilogue>
void launch_product(const char* name, const A& a, const B& b, const Depth& depth, const Epilogue& epilogue,
                    int64_t entries, void* stream, Tiles tiles = Tiles::all) {
  if (!a.fits() || !b.fits()) throw std::invalid_argument(std::string(name) + ": operands that no product takes");
  const int64_t row_tiles = (a.count + Tile::kRows - 1) / Tile::kRows;
  const bool diagonal = tiles == Tiles::diagonal;
  const int64_t column_tiles = diagonal ? 1 : (b.count + Tile::kColumns - 1) / Tile::kColumns;
  constexpr int64_t kMost = 1 << 30;  // So that the index after the last tile does not overflow an int.
  if (entries > 0 && row_tiles > 0 && (row_tiles > kMost / entries || column_tiles > kMost / entries / row_tiles))
    throw std::invalid_argument(std::string(name) + ": more than 2^30 tiles of results");
  const int64_t blocks = std::min(entries * row_tiles * column_tiles, product_blocks<Tile>());
  const double square = std::sqrt(static_cast<double>(blocks) * Tile::kColumns / Tile::kRows);
  const TileOrder order{static_cast<int>(entries), static_cast<int>(row_tiles), static_cast<int>(column_tiles),
                        static_cast<int>(std::clamp<int64_t>(std::llround(square), 1, std::max<int64_t>(row_tiles, 1))),
                        diagonal};
  launch(name, &multiply<Math, Tile, A, B, Depth, Epilogue>, {blocks, dim3(Tile::kThreads), Tile::kSharedBytes}, stream,
         Product<A, B, Depth, Epilogue>{a, b, depth, epilogue, order});
}

}  // namespace cpc::cuda
