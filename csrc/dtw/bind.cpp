// Binds dynamic time warping, which runs on the CPU alone; see dtw.h.
#include "bind/op.h"
#include "dtw/dtw.h"

namespace cpc::dtw {

const bind::Ops ops([](pybind11::module_& module) {
  bind::op(module, "dtw_distances", "Fills distances.", kDistances, cpu::distances, nullptr);
});

}  // namespace cpc::dtw
