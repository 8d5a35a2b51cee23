// Binds the first layer of waveform encoders; see waveform_conv.h.
#include "bind/op.h"
#include "waveform_conv/waveform_conv.h"

namespace cpc::waveform_conv {

const bind::Ops ops([](pybind11::module_& module) {
  bind::op(module, "waveform_conv1d", "Fills out.", kConvolution, cpu::convolve, nullptr);
  bind::op(module, "waveform_conv1d_backward", "Fills sums.", kGradient, cpu::convolve_backward, nullptr);
});

}  // namespace cpc::waveform_conv
