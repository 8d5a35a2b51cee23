// Checks beyond the field tables of waveform_conv.h: the number of frames, and tensors that must come together.
#include <string>

#include "core/require.h"
#include "waveform_conv/waveform_conv.h"

namespace cpc::waveform_conv {

void check(const Problem& problem, Where) {
  require(problem.waveforms.dtype != DType::f64, "waveforms must not be float64");
  require(problem.stride >= 1, "stride must be at least 1, got " + std::to_string(problem.stride));
  constexpr int64_t kMostSamples = int64_t{1} << 48;  // The limit of a tensor's elements: sums fit 64 bits.
  require(problem.padding >= 0 && problem.padding <= kMostSamples,
          "padding must be in 0.." + std::to_string(kMostSamples) + ", got " + std::to_string(problem.padding));
  require((problem.scale.ndim == 0) == (problem.shift.ndim == 0), "scale and shift must be given together");
  require(!problem.normalised() || problem.channels() > 1, "normalisation needs at least 2 channels");
  const int64_t padded = problem.samples() + 2 * problem.padding;
  require(problem.taps() >= 1 && padded >= problem.taps(), "waveforms of " + std::to_string(problem.samples()) +
                                                               " samples are shorter than the kernel of " +
                                                               std::to_string(problem.taps()) + " taps");
  const int64_t frames = (padded - problem.taps()) / problem.stride + 1;
  require(problem.frames() == frames,
          "out must have " + std::to_string(frames) + " frames, got " + std::to_string(problem.frames()));
}

void check(const Gradient& problem, Where where) {
  check(static_cast<const Problem&>(problem), where);
  require(problem.sums.shape[1] == problem.taps() + 3,
          "sums must be [C, " + std::to_string(problem.taps() + 3) + "], got " + shape_of(problem.sums));
}

}  // namespace cpc::waveform_conv
