// Sampling of one pixel, which the CPU and CUDA kernels share. In double, so that devices whose logarithms differ in
// their last bits still draw the same values.
#pragma once

#include <cmath>

#include "logistic_mixture/logistic_mixture.h"

namespace cpc::logistic_mixture {

CPC_HOST_DEVICE inline double clamped(double v, double low, double high) { return v < low ? low : v > high ? high : v; }

// Draws pixel i of image b. load(view, at) gives element `at` of params or noise.
template <class Load>
CPC_HOST_DEVICE inline void sample_pixel(const Sampling& problem, int64_t b, int64_t i, const Load& load) {
  const int64_t components = problem.components(), channels = problem.channels(), width = problem.width();
  const auto value_at = [&](const TensorView& view, int64_t channel) {
    return load(view, b * view.strides[0] + channel * view.strides[1] + pixel_offset(view, width, i));
  };
  const auto uniform = [&](int64_t n) { return clamped(value_at(problem.noise, n), kLeastNoise, 1 - kLeastNoise); };

  int64_t chosen = 0;
  double best = 0;
  for (int64_t k = 0; k < components; ++k) {
    const double score = value_at(problem.params, k) - problem.temperature * log(-log(uniform(k)));
    if (k == 0 || score > best) {
      chosen = k;
      best = score;
    }
  }
  const int64_t kinds = channels == 3 ? 3 : 2;
  const auto chosen_param = [&](int64_t color, int64_t kind) {
    return value_at(problem.params, components * (1 + color * kinds + kind) + chosen);
  };
  uint8_t* const image = problem.images.as<uint8_t>() + b * channels * problem.pixels() + i;
  double drawn[3] = {};
  for (int64_t c = 0; c < channels; ++c) {
    const double u = uniform(components + c), log_scale = chosen_param(c, 1);
    double x = chosen_param(c, 0) +
               problem.temperature * exp(log_scale < kLeastLogScale ? kLeastLogScale : log_scale) * log(u / (1 - u));
    const int64_t first = c * (c - 1) / 2;  // Green has coefficient 0, blue 1 and 2.
    for (int64_t earlier = 0; earlier < c; ++earlier) x += tanh(chosen_param(first + earlier, 2)) * drawn[earlier];
    const double value = rint((clamped(x, -1, 1) + 1) * 127.5);
    drawn[c] = value / 127.5 - 1;
    image[c * problem.pixels()] = static_cast<uint8_t>(value);
  }
}

}  // namespace cpc::logistic_mixture
