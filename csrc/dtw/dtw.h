// Distances of sequences of frames under dynamic time warping: the contract of the CPU kernel.
//
// Item k is `count[k]` rows of `frames` from row `first[k]` on, each of norm 1 or all zeros. For a pair of items, with
// x_i and y_j their rows:
//   d[i, j] = arccos(x_i . y_j, clamped to -1..1) / pi
//   cost[i, j] = d[i, j] + the least of cost[i - 1, j - 1], cost[i, j - 1] and cost[i - 1, j], of those that there are
//   distance = the last cost, divided by the number of cells on its path.
// Among predecessors of equal cost, the path takes the first in the order above, as the tools of the ZeroSpeech
// challenges do.
//
// Consecutive pairs with the same second item share its packing. The caller owns all memory. The kernel allocates only
// bounded scratch memory.
#pragma once

#include "core/fields.h"
#include "core/isa.h"
#include "core/tensor_view.h"

namespace cpc::dtw {

struct Problem {
  TensorView frames = {};
  TensorView first = {}, count = {};
  TensorView pairs = {};
  TensorView distances = {};
};

constexpr auto kDistances = fields_of<Problem>(reads<&Problem::frames>("frames", Type::f32, "F D", Layout::dense),
                                               reads<&Problem::first>("first", Type::i64, "N", Layout::dense),
                                               reads<&Problem::count>("count", Type::i64, "N", Layout::dense),
                                               reads<&Problem::pairs>("pairs", Type::i64, "P 2", Layout::dense),
                                               writes<&Problem::distances>("distances", Type::f32, "P", Layout::dense));

// Throws std::invalid_argument where an item is empty or leaves the frames, or a pair names no item.
void check(const Problem& problem, Where where);

namespace cpu {
CPC_DECLARE_WITHOUT_BFLOAT16(void distances(const Problem& problem))
inline void distances(const Problem& problem) { CPC_CALL_AT_ISA(distances, problem) }
}  // namespace cpu

}  // namespace cpc::dtw
