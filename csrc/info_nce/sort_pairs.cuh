// Sorts the pairs of queries and sampled keys by key, stably, so that each key sums its pairs in their order.
//
// Keys are divided into buckets of neighbouring keys, and pairs into parts of neighbouring pairs. One block per part
// counts the pairs of each bucket, and places them once all parts have been counted. Then one block per bucket does the
// same with the keys of the bucket. Atomic operations only count, and every position follows from counts, so the result
// does not depend on the order of threads.
#pragma once

#include <algorithm>
#include <bit>
#include <stdexcept>

#include "core/cuda/device.h"
#include "core/cuda/kernel.cuh"
#include "core/workspace.h"
#include "info_nce/info_nce.h"

namespace cpc::info_nce::cuda {

using namespace cpc::cuda;

constexpr int kSortThreads = 256, kSortWarps = kSortThreads / kWarp;
constexpr int kLanePairs = 8, kSortTile = kSortThreads * kLanePairs;  // Pairs that are placed together.
// The most digits that are counted at a time, and the most parts, as every block adds up the counts of all parts.
constexpr uint32_t kDigitBits = 10, kMostDigits = 1 << kDigitBits, kMostParts = 256;
// Stands for no key; it is in no bucket, whatever the shift.
constexpr uint32_t kNoKey = 0xffffffffu;

// The keys that pairs name. Pairs of a row are its positives, then its negatives.
struct NamedKeys {
  const int64_t *targets, *negatives;
  int64_t rows, keys, places, pairs;  // Sizes of an entry, and the positives and pairs of a row.

  explicit NamedKeys(const Problem& p)
      : targets(p.targets.as<const int64_t>()),
        negatives(p.negatives.as<const int64_t>()),
        rows(p.rows()),
        keys(p.keys_count()),
        places(p.positives()),
        pairs(p.positives() + p.samples()) {}

  // A pair's key in its entry, or -1 where it names none. `index` is the row's index over all entries.
  __device__ int64_t key(int64_t index, int64_t in_entry, int64_t pair) const {
    int64_t named = in_entry;
    if (pair >= places)
      named = negatives[index * (pairs - places) + pair - places];
    else if (targets != nullptr)
      named = targets[index * places + pair];
    return named >= 0 && named < keys ? named : -1;
  }
};

// The buffers and results of sorting. A pair is given by its index in [B, M, P + S], a key by its index in [B, N].
struct PairOrder {
  bool wanted;  // Whether keys or biases have gradients.
  uint32_t pairs = 0, keys = 0;
  uint32_t parts = 0, part_size = 0, buckets = 0, shift = 0;  // A key's bucket is key >> shift.
  FastDivide by_pairs, by_rows;
  uint32_t* counts = nullptr;    // [parts, buckets]
  uint32_t* begins = nullptr;    // [buckets + 1]: where each bucket's pairs begin in `placed`.
  uint2* placed = nullptr;       // [pairs]: y is the pair, sorted by bucket; x is its key's index in the bucket.
  uint32_t* order = nullptr;     // [pairs]: pairs sorted by key.
  uint32_t* segments = nullptr;  // [keys + 1]: where each key's pairs begin in `order`.

  PairOrder(const Problem& p, Parts& memory) : wanted(p.grad_keys.ndim != 0 || p.grad_bias.ndim != 0) {
    if (!wanted) return;
    const int64_t of_row = p.positives() + p.samples(), all_pairs = p.batch() * p.rows() * of_row,
                  all_keys = p.batch() * p.keys_count();
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;
    if (all_pairs > kMost || all_keys > kMost)
      throw std::invalid_argument("CUDA sorts less than 2^31 positives and negatives by less than 2^31 keys");
    pairs = static_cast<uint32_t>(all_pairs);
    keys = static_cast<uint32_t>(all_keys);
    by_pairs = FastDivide(static_cast<uint32_t>(std::max<int64_t>(of_row, 1)));
    by_rows = FastDivide(static_cast<uint32_t>(std::max<int64_t>(p.rows(), 1)));
    // About as many buckets as keys of a bucket, so that both are few.
    const auto bits = static_cast<uint32_t>(std::bit_width(std::max(keys, 1u) - 1));
    shift = std::max(bits / 2, bits - std::min(bits, kDigitBits));
    buckets = ((std::max(keys, 1u) - 1) >> shift) + 1;
    const int64_t tiles = divide_up(pairs, kSortTile);
    part_size = static_cast<uint32_t>(divide_up(tiles, kMostParts) * kSortTile);
    parts = pairs == 0 ? 1 : static_cast<uint32_t>(divide_up(pairs, part_size));
    counts = memory.take<uint32_t>(int64_t{parts} * buckets);
    begins = memory.take<uint32_t>(buckets + 1);
    placed = memory.take<uint2>(pairs);
    order = memory.take<uint32_t>(pairs);
    segments = memory.take<uint32_t>(int64_t{keys} + 1);
  }

  // The most digits that are counted at a time.
  CPC_HOST_DEVICE uint32_t digits() const {
    const uint32_t of_bucket = shift < kDigitBits ? 1u << shift : kMostDigits;
    return of_bucket > buckets ? of_bucket : buckets;
  }
  // A pair's key over all entries, or kNoKey.
  __device__ uint32_t key(const NamedKeys& named, uint32_t pair) const {
    uint32_t in_row, in_entry;
    const uint32_t index = by_pairs(pair, in_row), entry = by_rows(index, in_entry);
    const int64_t key = named.key(index, in_entry, in_row);
    return key < 0 ? kNoKey : entry * static_cast<uint32_t>(named.keys) + static_cast<uint32_t>(key);
  }
  __device__ uint32_t part_end(uint32_t part) const { return std::min((part + 1) * part_size, pairs); }
};

// The shared memory of a block.
struct Digits {
  uint32_t* cursors;   // [digits]: the position of the next item of each digit.
  uint32_t* of_warps;  // [kSortWarps, digits]: the number of each warp's items in a tile, then where they begin.

  __device__ explicit Digits(uint32_t digits)
      : cursors(reinterpret_cast<uint32_t*>(dynamic_shared())), of_warps(cursors + digits) {}
  static int64_t bytes(uint32_t digits) {
    return int64_t{1 + kSortWarps} * digits * static_cast<int64_t>(sizeof(uint32_t));
  }
};

// Sets the cursors to the number of pairs of [begin, end) with each digit.
template <class DigitOf>
__device__ void count_digits(const Digits& d, uint32_t digits, uint32_t begin, uint32_t end, const DigitOf& digit_of) {
  __syncthreads();  // All threads have finished with the cursors.
  for (uint32_t digit = threadIdx.x; digit < digits; digit += kSortThreads) d.cursors[digit] = 0;
  __syncthreads();
  for (uint32_t pair = begin + threadIdx.x; pair < end; pair += kSortThreads)
    if (const uint32_t digit = digit_of(pair); digit < digits) atomicAdd(&d.cursors[digit], 1u);
  __syncthreads();
}

// Replaces each digit's cursor by `first` plus the sum of the cursors before it, and returns the sum of all cursors.
__device__ inline uint32_t sum_cursors(const Digits& d, uint32_t digits, uint32_t first) {
  auto& of_warp = static_shared<uint32_t[kSortWarps], struct OfWarpsCursors>();
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const uint32_t of_thread = (digits + kSortThreads - 1) / kSortThreads;
  const uint32_t begin = std::min(threadIdx.x * of_thread, digits), end = std::min(begin + of_thread, digits);
  __syncthreads();  // All threads see the cursors.
  uint32_t own = 0;
  for (uint32_t digit = begin; digit < end; ++digit) own += d.cursors[digit];
  uint32_t up_to = own;  // Inclusive prefix sum over the warp.
  for (unsigned step = 1; step < kWarp; step *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, up_to, step);
    if (lane >= step) up_to += other;
  }
  if (lane == kWarp - 1) of_warp[warp] = up_to;
  __syncthreads();
  uint32_t before = up_to - own, total = first;
  for (unsigned w = 0; w < kSortWarps; ++w) {
    if (w == warp) before += total;
    total += of_warp[w];
  }
  for (uint32_t digit = begin; digit < end; ++digit) {
    const uint32_t count = d.cursors[digit];
    d.cursors[digit] = before;
    before += count;
  }
  __syncthreads();
  return total - first;
}

// Calls store(place, item) for those items load(i), i in [begin, end), that have a digit. An item's place is its
// digit's cursor, which it then increments; items of a digit keep their order.
template <class Load, class DigitOf, class Store>
__device__ void place_items(const Digits& d, uint32_t digits, uint32_t begin, uint32_t end, const Load& load,
                            const DigitOf& digit_of, const Store& store) {
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  uint32_t* const own = d.of_warps + warp * digits;
  for (uint32_t tile = begin; tile < end; tile += kSortTile) {
    for (uint32_t digit = lane; digit < digits; digit += kWarp) own[digit] = 0;
    __syncwarp();
    const uint32_t first = tile + warp * kLanePairs * kWarp + lane;
    uint2 items[kLanePairs];
    uint32_t ranks[kLanePairs];
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i)
      items[i] = first + i * kWarp < end ? load(first + i * kWarp) : uint2{kNoKey, 0};
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i) {
      const uint32_t digit = digit_of(items[i]);
      const unsigned same = __match_any_sync(0xffffffffu, digit);
      ranks[i] = (digit < digits ? own[digit] : 0) + __popc(same & ((1u << lane) - 1));
      __syncwarp();
      if (digit < digits && same >> lane == 1) own[digit] = ranks[i] + 1;  // By the last lane with this digit.
      __syncwarp();
    }
    __syncthreads();
    for (uint32_t digit = threadIdx.x; digit < digits; digit += kSortThreads) {
      uint32_t at = d.cursors[digit];
      for (unsigned w = 0; w < kSortWarps; ++w) {
        const uint32_t count = d.of_warps[w * digits + digit];
        d.of_warps[w * digits + digit] = at;
        at += count;
      }
      d.cursors[digit] = at;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kLanePairs; ++i)
      if (const uint32_t digit = digit_of(items[i]); digit < digits) store(own[digit] + ranks[i], items[i]);
    __syncwarp();  // All lanes have read the warp's digits before the next tile overwrites them.
  }
}

// Counts the pairs of each bucket, with one block per part.
__global__ void __launch_bounds__(kSortThreads)
    count_buckets(const __grid_constant__ PairOrder o, const __grid_constant__ NamedKeys named) {
  const Digits d(o.digits());
  for (uint32_t part = blockIdx.x; part < o.parts; part += gridDim.x) {
    count_digits(d, o.buckets, part * o.part_size, o.part_end(part),
                 [&](uint32_t pair) { return o.key(named, pair) >> o.shift; });
    for (uint32_t bucket = threadIdx.x; bucket < o.buckets; bucket += kSortThreads)
      o.counts[int64_t{part} * o.buckets + bucket] = d.cursors[bucket];
  }
}

// Places pairs by bucket, with one block per part.
__global__ void __launch_bounds__(kSortThreads)
    place_by_bucket(const __grid_constant__ PairOrder o, const __grid_constant__ NamedKeys named) {
  const Digits d(o.digits());
  for (uint32_t part = blockIdx.x; part < o.parts; part += gridDim.x) {
    __syncthreads();  // All threads have finished with the digits.
    for (uint32_t bucket = threadIdx.x; bucket < o.buckets; bucket += kSortThreads) {
      uint32_t before = 0, total = 0;
#pragma unroll 8
      for (uint32_t other = 0; other < o.parts; ++other) {
        const uint32_t count = o.counts[int64_t{other} * o.buckets + bucket];
        total += count;
        before += other < part ? count : 0;
      }
      d.cursors[bucket] = total;
      d.of_warps[bucket] = before;
    }
    const uint32_t total = sum_cursors(d, o.buckets, 0);
    for (uint32_t bucket = threadIdx.x; bucket < o.buckets; bucket += kSortThreads) {
      if (part == 0) o.begins[bucket] = d.cursors[bucket];
      d.cursors[bucket] += d.of_warps[bucket];
    }
    if (part == 0 && threadIdx.x == 0) o.begins[o.buckets] = total;
    __syncthreads();
    place_items(
        d, o.buckets, part * o.part_size, o.part_end(part),
        [&](uint32_t pair) { return uint2{o.key(named, pair), pair}; },
        [&](const uint2& item) { return item.x >> o.shift; },
        [&](uint32_t place, const uint2& item) { o.placed[place] = {item.x & ((1u << o.shift) - 1), item.y}; });
  }
}

// Sorts the pairs of each bucket by key, with one block per bucket.
__global__ void __launch_bounds__(kSortThreads) sort_buckets(const __grid_constant__ PairOrder o) {
  const Digits d(o.digits());
  for (uint32_t bucket = blockIdx.x; bucket < o.buckets; bucket += gridDim.x) {
    const uint32_t begin = o.begins[bucket], end = o.begins[bucket + 1], first_key = bucket << o.shift;
    const uint32_t keys = std::min(1u << o.shift, o.keys - first_key);
    uint32_t at = begin;
    for (uint32_t first = 0; first < keys; first += kMostDigits) {
      const uint32_t digits = std::min(keys - first, uint32_t{kMostDigits});
      count_digits(d, digits, begin, end, [&](uint32_t i) { return o.placed[i].x - first; });
      const uint32_t total = sum_cursors(d, digits, at);
      for (uint32_t digit = threadIdx.x; digit < digits; digit += kSortThreads)
        o.segments[first_key + first + digit] = d.cursors[digit];
      __syncthreads();
      place_items(
          d, digits, begin, end, [&](uint32_t i) { return o.placed[i]; },
          [&](const uint2& item) { return item.x - first; },
          [&](uint32_t place, const uint2& item) { o.order[place] = item.y; });
      at += total;
    }
    if (bucket == o.buckets - 1 && threadIdx.x == 0) o.segments[o.keys] = end;
  }
}

inline void launch_sort(const PairOrder& order, const NamedKeys& named, void* stream) {
  if (order.keys == 0) return;
  // Blocks write to positions that the launch before has computed.
  const auto shape = [&](uint32_t blocks) {
    return LaunchShape{blocks, dim3(kSortThreads), Digits::bytes(order.digits()), Blocks::whole};
  };
  launch("count_buckets", &count_buckets, shape(order.parts), stream, order, named);
  launch("place_by_bucket", &place_by_bucket, shape(order.parts), stream, order, named);
  launch("sort_buckets", &sort_buckets, shape(order.buckets), stream, order);
}

}  // namespace cpc::info_nce::cuda
