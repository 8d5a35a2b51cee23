// How a masked convolution is to be computed, decided once for all kernels of a call.
#pragma once

#include <vector>

#include "masked_conv/masked_conv.h"

namespace cpc::masked_conv {

struct Plan {
  std::vector<Tap> taps;
  bool pairs = false;  // Whether neighbouring pixels are computed together (terms.h).
};

Plan plan(const Layer& problem, Where where);
// negated: whether to negate the taps, for the input gradient, which sums over the same taps.
Plan plan(const LayerGrad& problem, Where where, bool negated = false);

// Whether it is faster on the CPU to compute neighbouring pixels of images together, at stride 1.
bool pairs_pay(const TensorView& weight, const TensorView& images, int64_t dilation);

// The taps that some channel sees, in order.
std::vector<int64_t> visible_taps(const TensorView& mask);

struct PackedWeight {
  int64_t outputs, inputs;
  DType dtype;
  bool gated;
};
int64_t packed_bytes(const PackedWeight& weight, const std::vector<Tap>& taps, bool pairs, Where where);

}  // namespace cpc::masked_conv
