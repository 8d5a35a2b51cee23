// The bindings of every op, a file each.
#pragma once

#include <pybind11/pybind11.h>

namespace cpc::bindings {

void bind_augment(pybind11::module_& module);
void bind_info_nce(pybind11::module_& module);
void bind_logistic_mixture(pybind11::module_& module);
void bind_masked_conv(pybind11::module_& module);
void bind_patches(pybind11::module_& module);
void bind_pixel_steps(pybind11::module_& module);

}  // namespace cpc::bindings
