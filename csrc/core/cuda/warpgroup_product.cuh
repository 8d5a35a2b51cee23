// The product of product.cuh by warpgroups, with the wgmma instructions of compute capability 9.0 (wgmma.cuh), for
// 16-bit values. No op uses it, as no GPU has run it; tests/csrc/product_check.cu tests it.
#pragma once

#include "core/cuda/product.cuh"
#include "core/cuda/wgmma.cuh"

namespace cpc::cuda {

template <class Math, class Tile, class A, class B, class Depth>
class WarpgroupLoop;

// A block's tile, divided among warpgroups of four warps with 64 rows and all columns each. kStages slices are in
// shared memory or being copied there, and the first of them is multiplied; the slice before it may still be read in an
// additional stage. For 16-bit values.
template <int kRows_, int kColumns_, int kStages_, int kBlocks_>
struct WarpgroupTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kRowTiles = 1, kColumnTiles = kColumns / 8;  // Of a warp.
  static constexpr int kThreads = kRows / 16 * kWarp, kTeams = 1, kTeamThreads = kThreads;
  static constexpr bool kAligned = true;
  template <class T, int kWidth>
  using Lines = LineBlocks<T, kWidth>;
  template <class Math, class Tile, class A, class B, class Depth>
  using Loop = WarpgroupLoop<Math, Tile, A, B, Depth>;
  static constexpr int whole_blocks(int side) { return (side + 63) / 64 * 64; }
  static constexpr int kABytes = whole_blocks(kRows) * kSliceBytes;
  static constexpr int kBothBytes = kABytes + whole_blocks(kColumns) * kSliceBytes;
  static constexpr int kStageBytes = kBothBytes, kSharedBytes = (kStages + 1) * kStageBytes;
  static_assert(kRows % 64 == 0 && kStageBytes % 1024 == 0);

  __device__ static int warp_row() { return static_cast<int>(threadIdx.x) / kWarp * 16; }
  __device__ static int warp_column() { return 0; }
};
// Two blocks per multiprocessor, so that one multiplies while the other stores.
using SquareGroups = WarpgroupTile<128, 128, 5, 2>;
// Reads the fewest bytes of memory per product.
using WideGroups = WarpgroupTile<128, 256, 7, 1>;

// Starts the products of a slice once it is in shared memory, and waits for them after starting those of the next
// slice. A stage is thus filled again one slice later than by MainLoop.
template <class Math, class Tile, class A, class B, class Depth>
class WarpgroupLoop : public SliceCopies<Math, Tile, A, B, Depth> {
 public:
  using Base = SliceCopies<Math, Tile, A, B, Depth>;
  using Base::Base;
  using typename Base::T;
  using Sums = WarpTileSums<Tile>;

  __device__ void enter() {
    wait_for_copies<Tile::kStages - 1>();
    pass();
  }
  __device__ void add_slice(Sums& sums) {
    start_products(sums);
    wait_for_copies<Tile::kStages - 2>();
    wait_for_all_but<1>(sums);
    pass();  // The next slice is there for all, and all have read the one before.
    this->start(stage_ == 0 ? kRing - 1 : stage_ - 1);
    stage_ = next(stage_);
  }
  __device__ void finish(Sums& sums) { wait_for_all_but<0>(sums); }
  __device__ void go_on() {}

 private:
  static constexpr int kRing = Tile::kStages + 1;
  __device__ static int next(int stage) { return stage == kRing - 1 ? 0 : stage + 1; }

  static constexpr bool kOutermostA = Base::OfA::kOutermost, kOutermostB = Base::OfB::kOutermost;
  using OfA = Description<kOutermostA>;
  using OfB = Description<kOutermostB>;
  // The operands of the calling warpgroup in a stage: 64 rows of A and all columns of B.
  __device__ uint64_t describe_a(int stage, uint32_t shared) const {
    constexpr int kGroupBytes = 64 * kSliceBytes;
    static_assert(kGroupBytes == kBlockBytes);  // The same for both positions of the depth.
    const int group = static_cast<int>(threadIdx.x) / (4 * kWarp);
    return OfA::of(shared + stage * Tile::kStageBytes + group * kGroupBytes, kBlockBytes);
  }
  __device__ static uint64_t describe_b(int stage, uint32_t shared) {
    return OfB::of(shared + stage * Tile::kStageBytes + Tile::kABytes, kBlockBytes);
  }
  static constexpr int kBlockBytes = LineBlocks<T, Tile::kColumns>::kBlockBytes, kSteps = kDepth<T> / 16;

#if defined(CPC_WGMMA)
  __device__ static void pass() {
    show_copies();
    __syncthreads();
  }
  __device__ void start_products(Sums& sums) {
    const uint32_t shared = shared_address(dynamic_shared<1024>());
    const uint64_t a = describe_a(stage_, shared), b = describe_b(stage_, shared);
    hold(sums[0]);
    begin_products();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      multiply_group<T, kOutermostA, kOutermostB>(sums[0], OfA::after(a, step), OfB::after(b, step));
    commit_products();
  }
  template <int kGroups>
  __device__ static void wait_for_all_but(Sums& sums) {
    wait_for_products<kGroups>(sums[0]);
  }
#else
  // The same by warps. wgmma may read its operands at any time from its start to the end of the wait for it. The
  // emulation therefore reads them at both times, so that races show.
  __device__ static void pass() { __syncthreads(); }
  __device__ void start_products(Sums&) {
#if defined(CPC_CUDA_EMULATION)
    for (int step = 0; step < kSteps; ++step) read(stage_, step);
#endif
    if (started_ == 0) oldest_ = stage_;
    ++started_;
  }
  __device__ Fragments<Math, Tile> read(int stage, int step) const {
    const unsigned char* const shared = dynamic_shared<1024>();
    const DescribedOperand a(shared, OfA::after(describe_a(stage, 0), step));
    const DescribedOperand b(shared, OfB::after(describe_b(stage, 0), step));
    Fragments<Math, Tile> fragments;
    a.template load_fragments<true>(fragments.a[0], Tile::warp_row() % 64 / 16);
#pragma unroll
    for (int j = 0; j < Tile::kColumnTiles / 2; ++j) b.template load_fragments<false>(fragments.b[j], j);
    return fragments;
  }
  template <int kGroups>
  __device__ void wait_for_all_but(Sums& sums) {
    for (; started_ > kGroups; --started_, oldest_ = next(oldest_))
      for (int step = 0; step < kSteps; ++step) multiply_fragments<Math, Tile>(sums, read(oldest_, step));
  }
  int started_ = 0, oldest_ = 0;
#endif

  int stage_ = 0;
};

}  // namespace cpc::cuda
