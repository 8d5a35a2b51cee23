// How a masked convolution is to be computed, decided once for all kernels of a call.
#pragma once

#include <vector>

#include "masked_conv/masked_conv.h"

namespace cpc::masked_conv {

struct Plan {
  std::vector<Tap> taps;
  Filtering filtering = Filtering::direct;
};

// What is computed: the sums of pixels, or the gradient of the weight.
enum class Wanted { pixels, weight_grad };

Plan plan(const Layer& problem, Where where);
// Of pixels of the input gradient, which sums over the same taps, negated; or of the weight gradient.
Plan plan(const LayerGrad& problem, Where where, Wanted wanted);

// The filtering that is fastest on the CPU for these taps at stride 1, if one mask serves all channels.
Filtering filtering_of(const TensorView& weight, const TensorView& images, const std::vector<Tap>& taps,
                       int64_t dilation, Wanted wanted);

// The taps that some channel sees, in order.
std::vector<int64_t> visible_taps(const TensorView& mask);

struct PackedWeight {
  int64_t outputs, inputs;
  DType dtype;
  bool gated;
};
int64_t packed_bytes(const PackedWeight& weight, const std::vector<Tap>& taps, Filtering filtering, Where where);

}  // namespace cpc::masked_conv
