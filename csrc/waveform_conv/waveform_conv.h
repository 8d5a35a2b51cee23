// The first layer of a waveform encoder: a strided convolution of one channel, with bias, normalisation over the
// channels of a frame, and ReLU, in one pass over its output.
//
//   a[b, t, c] = bias[c] + sum over k of weight[c, 0, k] * waveforms[b, 0, t * stride - padding + k]
//
// where samples outside of a waveform are zero. With scale and shift, a is then normalised by its mean and unbiased
// variance over the C channels of frame t (channel norm): (a - mean) / sqrt(variance + eps) * scale[c] + shift[c]. With
// relu, values below zero become zero, and NaN stays. The backward pass gives all gradients but that of the waveforms.
// It recomputes a from the waveform, which takes less time than reading saved values.
//
// Sums are in float and in a fixed order, whatever the number of threads.
#pragma once

#include "core/fields.h"
#include "core/isa.h"
#include "core/tensor_view.h"

namespace cpc::waveform_conv {

struct Problem {
  TensorView waveforms = {};
  TensorView weight = {};
  TensorView bias = {};   // Or absent.
  TensorView scale = {};  // Absent, as shift, without normalisation.
  TensorView shift = {};
  TensorView out = {};  // [B, L, C]; in the backward pass the gradient of the output.
  int64_t stride = 1;
  int64_t padding = 0;
  double eps = 0;
  bool relu = false;

  int64_t batch() const { return waveforms.shape[0]; }
  int64_t samples() const { return waveforms.shape[2]; }
  int64_t channels() const { return weight.shape[0]; }
  int64_t taps() const { return weight.shape[2]; }
  int64_t frames() const { return out.shape[1]; }
  bool normalised() const { return scale.ndim != 0; }
};

struct Gradient : Problem {
  // [C, K + 3]: for each channel the gradients of its K weights, then of bias, scale and shift, whether or not these
  // are given.
  TensorView sums = {};
};

constexpr auto kConvolution = fields_of<Problem>(
    reads<&Problem::waveforms>("waveforms", Type::floating, "B 1 T"),
    reads<&Problem::weight>("weight", Type::same, "C 1 K"), may_read<&Problem::bias>("bias", Type::same, "C"),
    may_read<&Problem::scale>("scale", Type::f32, "C"), may_read<&Problem::shift>("shift", Type::f32, "C"),
    writes<&Problem::out>("out", Type::same, "B L C", Layout::dense), value<&Problem::stride>("stride"),
    value<&Problem::padding>("padding"), value<&Problem::eps>("eps"), value<&Problem::relu>("relu"));

constexpr auto kGradient = fields_of<Gradient>(
    reads<&Gradient::waveforms>("waveforms", Type::floating, "B 1 T"),
    reads<&Gradient::weight>("weight", Type::same, "C 1 K"), may_read<&Gradient::bias>("bias", Type::same, "C"),
    may_read<&Gradient::scale>("scale", Type::f32, "C"), may_read<&Gradient::shift>("shift", Type::f32, "C"),
    reads<&Gradient::out>("grad", Type::same, "B L C", Layout::dense),
    writes<&Gradient::sums>("sums", Type::f32, "C S", Layout::dense), value<&Gradient::stride>("stride"),
    value<&Gradient::padding>("padding"), value<&Gradient::eps>("eps"), value<&Gradient::relu>("relu"));

// Throw std::invalid_argument where sizes do not fit each other, or the type is double.
void check(const Problem& problem, Where where);
void check(const Gradient& problem, Where where);

namespace cpu {
CPC_DECLARE_WITHOUT_BFLOAT16(void convolve(const Problem& problem); void convolve_backward(const Gradient& problem))
inline void convolve(const Problem& problem) { CPC_CALL_AT_ISA(convolve, problem) }
inline void convolve_backward(const Gradient& problem) { CPC_CALL_AT_ISA(convolve_backward, problem) }
}  // namespace cpu

}  // namespace cpc::waveform_conv
