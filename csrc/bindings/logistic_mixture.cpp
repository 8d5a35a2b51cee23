// Binds the mixture of logistics' kernels; see csrc/logistic_mixture/logistic_mixture.h.
#include "logistic_mixture/logistic_mixture.h"

#include "bindings/dispatch.h"
#include "bindings/ops.h"

namespace cpc::bindings {
namespace {

void nll(const TensorArg& images, const TensorArg& params, const TensorArg& nll, const OptionalTensor& normalisers,
         const TensorArg& parts) {
  const DLDevice device = common_device({{"images", images}, {"params", params}},
                                        {{"nll", nll}, {"normalisers", normalisers}, {"parts", parts}});
  const logistic_mixture::Likelihood problem{.images = images.view,
                                             .params = params.view,
                                             .normalisers = view(normalisers),
                                             .nll = nll.view,
                                             .parts = parts.view};
  logistic_mixture::check(problem, logistic_mixture::Pass::forward, on_cuda(device));
  run(problem, nll, logistic_mixture::cpu::nll, logistic_mixture::cuda::nll);
}

void nll_backward(const TensorArg& grad, const TensorArg& images, const TensorArg& params, const TensorArg& normalisers,
                  const TensorArg& params_grad) {
  const DLDevice device =
      common_device({{"grad", grad}, {"images", images}, {"params", params}, {"normalisers", normalisers}},
                    {{"params_grad", params_grad}});
  const logistic_mixture::Likelihood problem{.images = images.view,
                                             .params = params.view,
                                             .normalisers = normalisers.view,
                                             .grad = grad.view,
                                             .params_grad = params_grad.view};
  logistic_mixture::check(problem, logistic_mixture::Pass::backward, on_cuda(device));
  run(problem, params_grad, logistic_mixture::cpu::nll_backward, logistic_mixture::cuda::nll_backward);
}

void sample(const TensorArg& params, const TensorArg& noise, const TensorArg& images, double temperature) {
  common_device({{"params", params}, {"noise", noise}}, {{"images", images}});
  const logistic_mixture::Sampling problem{
      .params = params.view, .noise = noise.view, .images = images.view, .temperature = temperature};
  logistic_mixture::check(problem);
  run(problem, images, logistic_mixture::cpu::sample, logistic_mixture::cuda::sample);
}

}  // namespace

void bind_logistic_mixture(py::module_& module) {
  module.attr("logistic_mixture_tile_pixels") = logistic_mixture::cuda::kTilePixels;
  module.def("logistic_mixture_nll", &nll, py::arg("images"), py::arg("params"), py::arg("nll"), py::arg("normalisers"),
             py::arg("parts"), "Fills nll and normalisers; see csrc/logistic_mixture/logistic_mixture.h.");
  module.def("logistic_mixture_nll_backward", &nll_backward, py::arg("grad"), py::arg("images"), py::arg("params"),
             py::arg("normalisers"), py::arg("params_grad"),
             "Fills params_grad; see csrc/logistic_mixture/logistic_mixture.h.");
  module.def("sample_logistic_mixture", &sample, py::arg("params"), py::arg("noise"), py::arg("images"),
             py::arg("temperature"), "Fills images; see csrc/logistic_mixture/logistic_mixture.h.");
}

}  // namespace cpc::bindings
