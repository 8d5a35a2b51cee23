// Weighs queries and reduces their losses on the GPU; see reduction.h. One block takes all rows where these are few,
// because a further launch would take longer than their sums.
#include <cmath>

#include "core/cuda/device.h"
#include "core/cuda/kernel.cuh"
#include "reduction/reduction.h"

namespace cpc::reduction::cuda {
namespace {

using namespace cpc::cuda;

constexpr int kThreads = 512;

// --- Rows, which the sums are over ---

template <class Real>
struct Losses {
  const Real *losses, *weights;
  const int64_t* ranks;
  int64_t count;

  struct Row {
    Real loss, weight;
    int64_t rank;
  };
  __device__ Row row(int64_t at) const { return {losses[at], weights != nullptr ? weights[at] : Real(1), ranks[at]}; }
  __device__ static void add(const Row& row, Sums& sums) {
    const double weight = row.weight, loss = row.loss;
    sums.loss += weight != 0 || std::isfinite(loss) ? weight * loss : 0.0;
    sums.right += row.rank == 0 ? weight : 0.0;
    sums.weight += weight;
  }
};

template <class Real>
struct Weights {
  const Real* weights;
  const int64_t* targets;
  int64_t count, places;  // The number of a row's targets; -1 without targets, where all rows are present.

  using Row = Real;
  __device__ Row row(int64_t at) const {
    const Real weight = weights != nullptr ? weights[at] : Real(1);
    bool present = places < 0;
#pragma unroll 1
    for (int64_t i = 0; i < places; ++i) present = present || targets[at * places + i] != -1;
    return present ? weight : Real(0);
  }
  __device__ static void add(Row weight, Sums& sums) { sums.weight += weight; }
};

// --- Sums ---

// The sums over the threads of a block, in every thread. One warp adds up the sums of all warps, because GPUs have few
// units for double.
__device__ Sums sum_over_block(Sums sums) {
  constexpr int kWarps = kThreads / kWarp;
  auto& of_warp = static_shared<Sums[kWarps], struct SumsOfWarps>();
  const auto sum_over_warp = [](const Sums& v) {
    return Sums{warp_sum(v.loss), warp_sum(v.right), warp_sum(v.weight)};
  };
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  sums = sum_over_warp(sums);
  __syncthreads();  // All threads have finished with of_warp from the call before.
  if (lane == 0) of_warp[warp] = sums;
  __syncthreads();
  if (warp == 0) {
    sums = sum_over_warp(lane < kWarps ? of_warp[lane] : Sums{});
    if (lane == 0) of_warp[0] = sums;
  }
  __syncthreads();
  return of_warp[0];
}

// The block's sums over its rows, in every thread: thread t takes every step-th row from first + t on.
template <class Rows>
__device__ Sums sum_rows(const Rows& rows, int64_t first, int64_t step) {
  constexpr int kAhead = 4;  // Rows that a thread loads at once.
  Sums sums;
  int64_t at = first + threadIdx.x;
#pragma unroll 1
  for (; at + (kAhead - 1) * step < rows.count; at += kAhead * step) {
    typename Rows::Row some[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) some[i] = rows.row(at + i * step);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) Rows::add(some[i], sums);
  }
#pragma unroll 1
  for (; at < rows.count; at += step) Rows::add(rows.row(at), sums);
  return sum_over_block(sums);
}

template <class Rows>
__global__ void __launch_bounds__(kThreads)
    sum_parts_of_rows(const __grid_constant__ Rows rows, Sums* parts, int64_t count) {
  for (int64_t part = blockIdx.x; part < count; part += gridDim.x) {
    const Sums sums = sum_rows(rows, part * kThreads, count * kThreads);
    if (threadIdx.x == 0) parts[part] = sums;
  }
}

// The sums over all rows. Where these are in several parts, each thread takes one part.
static_assert(kMostParts <= kThreads);
template <class Rows>
__device__ Sums sum_all(const Rows& rows, const Sums* parts, int64_t count) {
  if (count == 1) return sum_rows(rows, 0, kThreads);
  return sum_over_block(threadIdx.x < count ? parts[threadIdx.x] : Sums{});
}

// --- Results ---

template <class Real>
__global__ void __launch_bounds__(kThreads) finish_sums(const __grid_constant__ Losses<Real> rows, const Sums* parts,
                                                        int64_t count, Real* loss, Real* accuracy, bool mean) {
  const Sums sums = sum_all(rows, parts, count);
  if (threadIdx.x != 0) return;
  *loss = static_cast<Real>(sums.loss / (mean ? sums.divisor() : 1));
  *accuracy = static_cast<Real>(sums.right / sums.divisor());
}

template <class Real>
__global__ void __launch_bounds__(kThreads) weigh_rows(const __grid_constant__ Weights<Real> rows, const Sums* parts,
                                                       int64_t count, Real* row_weights, bool mean) {
  const auto divisor = mean ? static_cast<Real>(sum_all(rows, parts, count).divisor()) : Real(1);
#pragma unroll 1
  for (int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x; at < rows.count; at += int64_t{gridDim.x} * kThreads)
    row_weights[at] = rows.row(at) / divisor;
}

// Returns the number of parts that the rows are summed in. Where there are several, launches the kernel that sums them.
template <class Rows>
int64_t launch_parts(const Rows& rows, Sums* parts, void* stream) {
  const int64_t count = parts_of(rows.count);
  if (count > 1)
    launch("sum_parts_of_rows", &sum_parts_of_rows<Rows>, {count, dim3(kThreads)}, stream, rows, parts, count);
  return count;
}

template <class Real>
void weigh_as(const RowWeights& problem, void* stream) {
  const Weights<Real> rows{.weights = problem.weights.as<const Real>(),
                           .targets = problem.targets.as<const int64_t>(),
                           .count = problem.row_weights.numel(),
                           .places = problem.targets.ndim != 0 ? problem.targets.shape[2] : -1};
  auto* const parts = problem.workspace.as<Sums>();
  const int64_t count = problem.mean ? launch_parts(rows, parts, stream) : 0;
  const int64_t blocks = count == 1 && rows.count > 0 ? 1 : divide_up(rows.count, kThreads);
  launch("weigh_rows", &weigh_rows<Real>, {blocks, dim3(kThreads)}, stream, rows, parts, count,
         problem.row_weights.as<Real>(), problem.mean);
}

template <class Real>
void reduce_as(const Reduction& problem, void* stream) {
  const Losses<Real> rows{.losses = problem.losses.as<const Real>(),
                          .weights = problem.weights.as<const Real>(),
                          .ranks = problem.ranks.as<const int64_t>(),
                          .count = problem.losses.numel()};
  auto* const parts = problem.workspace.as<Sums>();
  const int64_t count = launch_parts(rows, parts, stream);
  launch("finish_sums", &finish_sums<Real>, {1, dim3(kThreads)}, stream, rows, parts, count, problem.loss.as<Real>(),
         problem.accuracy.as<Real>(), problem.mean);
}

}  // namespace

void weigh(const RowWeights& problem, void* stream) {
  problem.row_weights.dtype == DType::f64 ? weigh_as<double>(problem, stream) : weigh_as<float>(problem, stream);
}

void reduce(const Reduction& problem, void* stream) {
  problem.losses.dtype == DType::f64 ? reduce_as<double>(problem, stream) : reduce_as<float>(problem, stream);
}

}  // namespace cpc::reduction::cuda
