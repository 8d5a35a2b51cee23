// The discretized mixture of logistics: the contract of the CPU and CUDA kernels.
//
// Parameters. For K components, every pixel has K logits, then for each of C colours K means, K log-scales and, if C is
// 3, K coefficients. P = 3 K for one channel, 10 K for three.
//
// Likelihood. A value v of an image stands for x = (2 v - 255) / 255. With component k's
//   s = max(log-scale, -7);
//   mean of green += tanh(coefficient 0) * x of red,
//   mean of blue += tanh(coefficient 1) * x of red + tanh(coefficient 2) * x of green,
// the value's mass is, with m = (x - mean) / e^s and h = e^-s / 255,
//   sigmoid(m + h) for v = 0, sigmoid(h - m) for v = 255, and between them
//   sigmoid(m + h) - sigmoid(m - h), or where that is not above 1e-5, 2 h sigmoid(m) sigmoid(-m).
// For the narrowest scales, the two differ by up to a factor of 9 there: a mass that is 1e-5 up to rounding may be
// computed in either way.
// nll[b] = - sum over pixels of log(sum over k of softmax(logits)[k] * product over colours of the mass).
//
// If `normalisers` is given, it receives two numbers per pixel for the backward pass: a peak and a total such that the
// logarithm of the sum over k of e^(logit - largest logit) * product of masses is peak + log(total).
//
// Gradient. The gradient of nll[b] in the parameters, times grad[b]. It is zero for log-scales below -7.
//
// Sampling. The component is the one with the largest logit + temperature * gumbel, the first of equals. Then each
// colour in turn is the value nearest to mean + temperature * e^s * logistic, where means are shifted as above by the
// colours already drawn. All of it is in double. From a uniform u, clamped to [1e-5, 1 - 1e-5], gumbel is -log(-log(u))
// and logistic is log(u / (1 - u)).
//
// The caller owns all memory. Kernels allocate only bounded scratch memory. There are no atomics, and sums are in a
// fixed order: results are the same on every run and for any number of threads.
#pragma once

#include "core/fields.h"
#include "core/isa.h"
#include "core/tensor_view.h"

namespace cpc::logistic_mixture {

// Parameters of a component.
constexpr int64_t params_of_component(int64_t channels) { return channels == 3 ? 10 : 3; }

struct Likelihood {
  TensorView images = {};
  TensorView params = {};  // Of any floating type but double.
  TensorView normalisers = {};
  TensorView nll = {};
  TensorView workspace = {};

  CPC_HOST_DEVICE int64_t batch() const { return images.shape[0]; }
  CPC_HOST_DEVICE int64_t channels() const { return images.shape[1]; }
  CPC_HOST_DEVICE int64_t width() const { return images.shape[3]; }
  CPC_HOST_DEVICE int64_t pixels() const { return images.shape[2] * images.shape[3]; }
  CPC_HOST_DEVICE int64_t components() const { return params.shape[1] / params_of_component(channels()); }
};

struct Gradient : Likelihood {
  TensorView grad = {};
  TensorView params_grad = {};  // Dense with the channels last or in the order of the dimensions.
};

struct Sampling {
  TensorView params = {};
  TensorView noise = {};  // Uniform numbers for the K components, then for the C colours.
  TensorView images = {};
  double temperature = 1;

  CPC_HOST_DEVICE int64_t batch() const { return images.shape[0]; }
  CPC_HOST_DEVICE int64_t channels() const { return images.shape[1]; }
  CPC_HOST_DEVICE int64_t width() const { return images.shape[3]; }
  CPC_HOST_DEVICE int64_t pixels() const { return images.shape[2] * images.shape[3]; }
  CPC_HOST_DEVICE int64_t components() const { return params.shape[1] / params_of_component(channels()); }
};

constexpr double kHalfBin = 1. / 255;
constexpr double kLeastLogScale = -7;
constexpr double kLeastMass = 1e-5;
constexpr double kLeastNoise = 1e-5;

// The offset in elements of pixel i, counted along rows, from the first pixel of its image.
CPC_HOST_DEVICE inline int64_t pixel_offset(const TensorView& view, int64_t width, int64_t i) {
  return i / width * view.strides[2] + i % width * view.strides[3];
}

enum class Pass { forward, backward };

constexpr auto kLikelihood =
    fields_of<Likelihood>(reads<&Likelihood::images>("images", Type::u8, "B C H W"),
                          reads<&Likelihood::params>("params", Type::floating, "B P H W"),
                          writes<&Likelihood::nll>("nll", Type::f32, "B", Layout::dense),
                          may_write<&Likelihood::normalisers>("normalisers", Type::f32, "B 2 H W", Layout::dense),
                          workspace<&Likelihood::workspace>("workspace", "logistic_mixture_nll_workspace"));

constexpr auto kGradient =
    fields_of<Gradient>(reads<&Gradient::images>("images", Type::u8, "B C H W"),
                        reads<&Gradient::params>("params", Type::floating, "B P H W"),
                        reads<&Gradient::normalisers>("normalisers", Type::f32, "B 2 H W", Layout::dense),
                        reads<&Gradient::grad>("grad", Type::f32, "B", Layout::dense),
                        writes<&Gradient::params_grad>("params_grad", Type::same, "B P H W"));

constexpr auto kSampling = fields_of<Sampling>(reads<&Sampling::params>("params", Type::floating, "B P H W"),
                                               reads<&Sampling::noise>("noise", Type::f32_or_f64, "B U H W"),
                                               writes<&Sampling::images>("images", Type::u8, "B C H W", Layout::dense),
                                               value<&Sampling::temperature>("temperature"));

// Throw std::invalid_argument where the channels do not fit each other, or a layout is not as above.
void check(const Likelihood& problem, Where where);
void check(const Gradient& problem, Where where);
void check(const Sampling& problem, Where where);

// On CUDA, one partial sum per tile of an image.
int64_t workspace_bytes(const Likelihood& problem, Where where);

namespace cpu {
CPC_DECLARE_WITHOUT_BFLOAT16(void nll(const Likelihood& problem); void nll_backward(const Gradient& problem);
                             void sample(const Sampling& problem))
inline void nll(const Likelihood& problem) { CPC_CALL_AT_ISA(nll, problem) }
inline void nll_backward(const Gradient& problem) { CPC_CALL_AT_ISA(nll_backward, problem) }
inline void sample(const Sampling& problem) { CPC_CALL_AT_ISA(sample, problem) }
}  // namespace cpu

namespace cuda {
// Pixels of an image that a block takes, and the resulting number of partial sums per image.
constexpr int kTilePixels = 128;
constexpr int64_t parts(int64_t pixels) { return (pixels + kTilePixels - 1) / kTilePixels; }
#if defined(CPC_WITH_CUDA)
void nll(const Likelihood& problem, void* stream);
void nll_backward(const Gradient& problem, void* stream);
void sample(const Sampling& problem, void* stream);
#else
constexpr void (*nll)(const Likelihood&, void*) = nullptr;
constexpr void (*nll_backward)(const Gradient&, void*) = nullptr;
constexpr void (*sample)(const Sampling&, void*) = nullptr;
#endif
}  // namespace cuda

}  // namespace cpc::logistic_mixture
