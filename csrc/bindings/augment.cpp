// Binds the augmentation kernels; see csrc/augment/augment.h.
#include "augment/augment.h"

#include "bindings/dispatch.h"
#include "bindings/ops.h"

namespace cpc::bindings {
namespace {

int64_t augment_workspace([[maybe_unused]] const TensorArg& images, [[maybe_unused]] const TensorArg& patches,
                          [[maybe_unused]] int64_t patch_size) {
#if defined(CPC_WITH_CUDA)
  if (on_cuda(patches.device)) {
    patches::Problem extraction;
    extraction.images = images.view;
    extraction.patches = patches.view;
    extraction.geometry.patch = patch_size;
    return on_device_of(patches.device, [&] { return augment::cuda::workspace_bytes(extraction); });
  }
#endif
  return 0;
}

void augment_patches(const TensorArg& images, const TensorArg& patches, int64_t patch_size, int64_t stride,
                     int64_t height, int64_t width, const OptionalTensor& offsets, const OptionalTensor& flip,
                     bool gray, bool patch_norm, bool channels_last, std::vector<double> scale,
                     std::vector<double> shift, const TensorArg& codes, const TensorArg& parameters,
                     const OptionalTensor& partners, const OptionalTensor& displacements, int64_t fill,
                     const TensorArg& workspace) {
  const DLDevice device = common_device({{"images", images},
                                         {"offsets", offsets},
                                         {"flip", flip},
                                         {"codes", codes},
                                         {"parameters", parameters},
                                         {"partners", partners},
                                         {"displacements", displacements}},
                                        {{"patches", patches}, {"workspace", workspace}});
  augment::Problem problem{
      .extraction = {.geometry = {patch_size, stride, height, width, gray, patch_norm, channels_last},
                     .images = images.view,
                     .offsets = view(offsets),
                     .flip = view(flip),
                     .patches = patches.view,
                     .scale = std::move(scale),
                     .shift = std::move(shift)},
      .codes = codes.view,
      .parameters = parameters.view,
      .partners = view(partners),
      .displacements = view(displacements),
      .fill = fill,
      .workspace = workspace.view};
  augment::check(problem, readable(device));
  if (!is_workspace(workspace.view, augment_workspace(images, patches, patch_size)))
    throw std::invalid_argument("workspace must be dense uint8 of the size that augment_patches_workspace tells");
  run(problem, patches, augment::cpu::augment, augment::cuda::augment);
}

}  // namespace

void bind_augment(py::module_& module) {
  module.def("augment_patches_workspace", &augment_workspace, py::arg("images"), py::arg("patches"),
             py::arg("patch_size"), "Size of the workspace that augment_patches needs.");
  module.def("augment_patches", &augment_patches, py::arg("images"), py::arg("patches"), py::arg("patch_size"),
             py::arg("stride"), py::arg("height"), py::arg("width"), py::arg("offsets"), py::arg("flip"),
             py::arg("gray"), py::arg("patch_norm"), py::arg("channels_last"), py::arg("scale"), py::arg("shift"),
             py::arg("codes"), py::arg("parameters"), py::arg("partners"), py::arg("displacements"), py::arg("fill"),
             py::arg("workspace"), "Fills patches; see csrc/augment/augment.h.");
}

}  // namespace cpc::bindings
