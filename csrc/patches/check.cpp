// Checks beyond the field tables of patches.h: the geometry, layouts that depend on it, and offsets.
#include <algorithm>
#include <string>

#include "core/require.h"
#include "patches/patches.h"

namespace cpc::patches {

void complete(Problem& problem, Sizes& sizes) {
  const Geometry& g = problem.geometry;
  const TensorView& images = problem.images;
  const int64_t channels = images.shape[1];
  require(g.patch >= 1, "patch_size must be at least 1, got " + std::to_string(g.patch));
  require(g.stride >= 1, "stride must be at least 1, got " + std::to_string(g.stride));
  require(g.height >= g.patch && g.width >= g.patch && g.height <= images.shape[2] && g.width <= images.shape[3],
          "the window of " + std::to_string(g.height) + "x" + std::to_string(g.width) + " must hold a patch of " +
              std::to_string(g.patch) + " and lie within images " + shape_of(images));
  require(!g.gray || channels == 1 || channels == 3, "gray needs 1 or 3 channels, got " + std::to_string(channels));
  const int64_t out_channels = g.gray ? 1 : channels;
  for (const auto* values : {&problem.scale, &problem.shift})
    require(static_cast<int64_t>(values->size()) == out_channels, "scale and shift must have one value per channel");
  // A stride beyond the window gives one patch, however large it is. Kernels may keep it in 32 bits, so it is clamped.
  problem.geometry.stride = std::min(g.stride, std::max(g.height, g.width));
  sizes.set("R", (g.height - g.patch) / g.stride + 1);
  sizes.set("Q", (g.width - g.patch) / g.stride + 1);
  sizes.set("K", out_channels);
  sizes.set("p", g.patch);
}

void complete_gradient(Gradient& problem, Sizes& sizes) {
  require(problem.images.ndim != 0 || !problem.geometry.patch_norm, "the backward of patch_norm needs the images");
  if (problem.images.ndim == 0) problem.images = problem.images_grad;  // Only their shape counts.
  complete(problem, sizes);
}

void check(const Problem& problem, Where where) {
  const Geometry& g = problem.geometry;
  const TensorView &images = problem.images, &patches = problem.patches, &offsets = problem.offsets;
  const bool dense = g.channels_last ? is_dense(patches, {0, 1, 2, 4, 5, 3}) : is_dense(patches, {0, 1, 2, 3, 4, 5});
  require(dense || patches.numel() == 0, "patches must be dense in the order that channels_last tells");
  if (offsets.ndim == 0 || where != Where::host) return;
  const int64_t limit[2] = {images.shape[2] - g.height, images.shape[3] - g.width};
  for (int64_t b = 0; b < problem.batch(); ++b)
    for (int64_t d = 0; d < 2; ++d) {
      const int64_t value = offsets.as<int64_t>()[b * offsets.strides[0] + d * offsets.strides[1]];
      if (value < 0 || value > limit[d])
        require(false, "offsets must be in [0, " + std::to_string(limit[0]) + "] x [0, " + std::to_string(limit[1]) +
                           "] for this crop, got " + std::to_string(value) + " for " + (d ? "x" : "y") + " of image " +
                           std::to_string(b));
    }
}

void check(const Gradient& problem, Where where) { check(static_cast<const Problem&>(problem), where); }

int64_t workspace_bytes(const Gradient& problem, Where where) {
  if (where == Where::host || !problem.geometry.patch_norm) return 0;
  return 4 * problem.batch() * problem.rows() * problem.cols() * size_of(problem.in_double() ? DType::f64 : DType::f32);
}

}  // namespace cpc::patches
