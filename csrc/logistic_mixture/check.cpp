// Checks likelihood and sampling problems against the contract in logistic_mixture.h before a kernel touches memory.
#include <string>

#include "core/require.h"
#include "logistic_mixture/logistic_mixture.h"

namespace cpc::logistic_mixture {
namespace {

void require_images(const TensorView& images) {
  require(images.ndim == 4 && (images.shape[1] == 1 || images.shape[1] == 3),
          "images must be [B, 1, H, W] or [B, 3, H, W], got " + shape_of(images));
  require(images.dtype == DType::u8, "images must be uint8");
}

void require_params(const char* name, const TensorView& params, const TensorView& images) {
  const int64_t of_component = params_of_component(images.shape[1]);
  require(params.ndim == 4 && params.shape[1] > 0 && params.shape[1] % of_component == 0,
          std::string(name) + " must be [B, " + std::to_string(of_component) + " K, H, W], got " + shape_of(params));
  require_shape(name, params, {images.shape[0], params.shape[1], images.shape[2], images.shape[3]});
  require(is_floating(params.dtype), std::string(name) + " must be floating");
}

void require_dense_floats(const char* name, const TensorView& view, std::initializer_list<int64_t> shape) {
  require_shape(name, view, shape);
  require(view.dtype == DType::f32, std::string(name) + " must be float32");
  require(view.numel() == 0 || (view.ndim == 1   ? is_dense(view, {0})
                                : view.ndim == 2 ? is_dense(view, {0, 1})
                                                 : is_dense(view, {0, 1, 2, 3})),
          std::string(name) + " must be dense");
}

}  // namespace

void check(const Likelihood& problem, Pass pass, bool on_cuda) {
  const TensorView &images = problem.images, &params = problem.params;
  require_images(images);
  require_params("params", params, images);
  require(params.dtype != DType::f64, "params must not be float64");
  const bool backward = pass == Pass::backward;
  if (backward || problem.normalisers.ndim != 0)
    require_dense_floats("normalisers", problem.normalisers, {images.shape[0], 2, images.shape[2], images.shape[3]});
  if (backward) {
    require_dense_floats("grad", problem.grad, {images.shape[0]});
    const TensorView& grad = problem.params_grad;
    require_params("params_grad", grad, images);
    require(grad.shape[1] == params.shape[1] && grad.dtype == params.dtype, "params_grad must be like params");
    require(is_dense(grad, {0, 2, 3, 1}) || is_dense(grad, {0, 1, 2, 3}) || grad.numel() == 0,
            "params_grad must be dense");
    return;
  }
  require_dense_floats("nll", problem.nll, {images.shape[0]});
  if (on_cuda) require_dense_floats("parts", problem.parts, {images.shape[0], cuda::parts(problem.pixels())});
}

void check(const Sampling& problem) {
  const TensorView &images = problem.images, &noise = problem.noise;
  require_images(images);
  require(is_dense(images, {0, 1, 2, 3}) || images.numel() == 0, "images must be dense");
  require_params("params", problem.params, images);
  require_shape("noise", noise,
                {images.shape[0], problem.components() + images.shape[1], images.shape[2], images.shape[3]});
  require(noise.dtype == DType::f32 || noise.dtype == DType::f64, "noise must be float32 or float64");
}

}  // namespace cpc::logistic_mixture
