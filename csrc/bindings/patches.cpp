// Binds the patch kernels; see csrc/patches/patches.h.
#include "patches/patches.h"

#include "bindings/dispatch.h"
#include "bindings/ops.h"

namespace cpc::bindings {
namespace {

void extract_patches(const TensorArg& images, const TensorArg& patches, int64_t patch_size, int64_t stride,
                     int64_t height, int64_t width, const OptionalTensor& offsets, const OptionalTensor& flip,
                     bool gray, bool patch_norm, bool channels_last, std::vector<double> scale,
                     std::vector<double> shift) {
  const DLDevice device =
      common_device({{"images", images}, {"offsets", offsets}, {"flip", flip}}, {{"patches", patches}});
  const patches::Problem problem{.geometry = {patch_size, stride, height, width, gray, patch_norm, channels_last},
                                 .images = images.view,
                                 .offsets = view(offsets),
                                 .flip = view(flip),
                                 .patches = patches.view,
                                 .scale = std::move(scale),
                                 .shift = std::move(shift)};
  patches::check(problem, /*backward=*/false, readable(device));
  run(problem, patches, patches::cpu::extract, patches::cuda::extract);
}

void extract_patches_backward(const TensorArg& patches_grad, const TensorArg& images_grad, const OptionalTensor& images,
                              const OptionalTensor& norm_slopes, int64_t patch_size, int64_t stride, int64_t height,
                              int64_t width, const OptionalTensor& offsets, const OptionalTensor& flip, bool gray,
                              bool patch_norm, bool channels_last, std::vector<double> scale,
                              std::vector<double> shift) {
  const DLDevice device =
      common_device({{"patches_grad", patches_grad}, {"images", images}, {"offsets", offsets}, {"flip", flip}},
                    {{"images_grad", images_grad}, {"norm_slopes", norm_slopes}});
  if (patch_norm && !images) throw std::invalid_argument("the backward of patch_norm needs the images");
  const patches::Problem problem{.geometry = {patch_size, stride, height, width, gray, patch_norm, channels_last},
                                 // Without patch_norm only their shape counts.
                                 .images = images ? images->view : images_grad.view,
                                 .offsets = view(offsets),
                                 .flip = view(flip),
                                 .patches = patches_grad.view,
                                 .images_grad = images_grad.view,
                                 .norm_slopes = view(norm_slopes),
                                 .scale = std::move(scale),
                                 .shift = std::move(shift)};
  patches::check(problem, /*backward=*/true, readable(device));
  run(problem, images_grad, patches::cpu::extract_backward, patches::cuda::extract_backward);
}

}  // namespace

void bind_patches(py::module_& module) {
  module.def("extract_patches", &extract_patches, py::arg("images"), py::arg("patches"), py::arg("patch_size"),
             py::arg("stride"), py::arg("height"), py::arg("width"), py::arg("offsets"), py::arg("flip"),
             py::arg("gray"), py::arg("patch_norm"), py::arg("channels_last"), py::arg("scale"), py::arg("shift"),
             "Fills patches; see csrc/patches/patches.h.");
  module.def("extract_patches_backward", &extract_patches_backward, py::arg("patches_grad"), py::arg("images_grad"),
             py::arg("images"), py::arg("norm_slopes"), py::arg("patch_size"), py::arg("stride"), py::arg("height"),
             py::arg("width"), py::arg("offsets"), py::arg("flip"), py::arg("gray"), py::arg("patch_norm"),
             py::arg("channels_last"), py::arg("scale"), py::arg("shift"),
             "Fills images_grad; see csrc/patches/patches.h.");
}

}  // namespace cpc::bindings
