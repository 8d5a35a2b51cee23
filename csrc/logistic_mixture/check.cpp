// Checks beyond the field tables of logistic_mixture.h: numbers of channels must match.
#include <string>

#include "core/require.h"
#include "logistic_mixture/logistic_mixture.h"

namespace cpc::logistic_mixture {
namespace {

void require_channels(const TensorView& images, const TensorView& params) {
  const int64_t channels = images.shape[1], of_component = params_of_component(channels);
  require(channels == 1 || channels == 3, "images must be [B, 1, H, W] or [B, 3, H, W], got " + shape_of(images));
  require(params.shape[1] > 0 && params.shape[1] % of_component == 0,
          "params must be [B, " + std::to_string(of_component) + " K, H, W], got " + shape_of(params));
}

}  // namespace

void check(const Likelihood& problem, Where) {
  require_channels(problem.images, problem.params);
  require(problem.params.dtype != DType::f64, "params must not be float64");
}

void check(const Gradient& problem, Where where) {
  check(static_cast<const Likelihood&>(problem), where);
  const TensorView& grad = problem.params_grad;
  require(is_dense(grad, {0, 2, 3, 1}) || is_dense(grad, {0, 1, 2, 3}) || grad.numel() == 0,
          "params_grad must be dense");
}

void check(const Sampling& problem, Where) {
  require_channels(problem.images, problem.params);
  const int64_t uniforms = problem.components() + problem.images.shape[1];
  require(problem.noise.shape[1] == uniforms,
          "noise must have " + std::to_string(uniforms) + " channels, got " + shape_of(problem.noise));
}

int64_t workspace_bytes(const Likelihood& problem, Where where) {
  return where == Where::cuda ? problem.batch() * cuda::parts(problem.pixels()) * int64_t{sizeof(float)} : 0;
}

}  // namespace cpc::logistic_mixture
