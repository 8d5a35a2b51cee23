// Binds the mixture of logistics' kernels; see logistic_mixture.h.
#include "bind/op.h"
#include "logistic_mixture/logistic_mixture.h"

namespace cpc::logistic_mixture {

const bind::Ops ops([](pybind11::module_& module) {
  bind::op(module, "logistic_mixture_nll", "Fills nll and normalisers.", kLikelihood, cpu::nll, cuda::nll);
  bind::op(module, "logistic_mixture_nll_backward", "Fills params_grad.", kGradient, cpu::nll_backward,
           cuda::nll_backward);
  bind::op(module, "sample_logistic_mixture", "Fills images.", kSampling, cpu::sample, cuda::sample);
});

}  // namespace cpc::logistic_mixture
