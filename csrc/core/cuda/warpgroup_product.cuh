// The product of product.cuh by groups of four warps, with the tensor cores' instructions of compute capability 9.0 (wgmma.cuh),
// for values of 16 bits. No op uses it: no GPU has run it. tests/csrc/product_check.cu is where it is tried.
#pragma once

#include "core/cuda/product.cuh"
#include "core/cuda/wgmma.cuh"

namespace cpc::cuda {

template <class Math, class Tile, class A, class B, class Depth>
class WarpgroupLoop;

// A block's tile by groups of four warps, 64 rows and all columns each; of kStages slices that are there or under way one is
// multiplied, while the one before it may still be read in a stage beyond them. For values of 16 bits.
template <int kRows_, int kColumns_, int kStages_, int kBlocks_>
struct WarpgroupTile {
  static constexpr int kRows = kRows_, kColumns = kColumns_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kRowTiles = 1, kColumnTiles = kColumns / 8;  // A warp's.
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
// Two blocks a multiprocessor, one of which multiplies while the other stores.
using SquareGroups = WarpgroupTile<128, 128, 5, 2>;
// The fewest bytes of memory a product.
using WideGroups = WarpgroupTile<128, 256, 7, 1>;

// Products of a slice are started when it is there, and waited for when those of the next have been: its stage is filled
// again a slice later than a MainLoop would fill it.
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
  // What the calling group multiplies of a stage: 64 rows of A and all columns of B.
  __device__ uint64_t describe_a(int stage, uint32_t shared) const {
    constexpr int kGroupBytes = 64 * kSliceBytes;
    static_assert(kGroupBytes == kBlockBytes);  // Wherever the depth is.
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
  // The same by warps. Instructions may read operands at once, and as late as they are waited for: they are read twice.
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
