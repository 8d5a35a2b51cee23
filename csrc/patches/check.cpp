// Checks a patch problem against the contract in patches.h before a kernel touches memory.
#include <string>

#include "core/require.h"
#include "patches/patches.h"

namespace cpc::patches {

void check(const Problem& problem, bool backward, bool offsets_on_host) {
  const Geometry& g = problem.geometry;
  const TensorView& images = problem.images;
  require(images.ndim == 4, "images must be [B, C, H, W], got " + shape_of(images));
  require(images.dtype == DType::u8 || is_floating(images.dtype), "images must be uint8 or floating");
  const int64_t batch = images.shape[0], channels = images.shape[1];
  require(g.patch >= 1, "patch_size must be at least 1, got " + std::to_string(g.patch));
  require(g.stride >= 1, "stride must be at least 1, got " + std::to_string(g.stride));
  require(g.height >= g.patch && g.width >= g.patch && g.height <= images.shape[2] && g.width <= images.shape[3],
          "the window of " + std::to_string(g.height) + "x" + std::to_string(g.width) + " must hold a patch of " +
              std::to_string(g.patch) + " and lie within images " + shape_of(images));
  require(!g.gray || channels == 1 || channels == 3, "gray needs 1 or 3 channels, got " + std::to_string(channels));
  const int64_t out_channels = g.gray ? 1 : channels;

  const TensorView& patches = problem.patches;
  require(is_floating(patches.dtype), "patches must be floating");
  require_shape(
      "patches", patches,
      {batch, (g.height - g.patch) / g.stride + 1, (g.width - g.patch) / g.stride + 1, out_channels, g.patch, g.patch});
  const bool dense = g.channels_last ? is_dense(patches, {0, 1, 2, 4, 5, 3}) : is_dense(patches, {0, 1, 2, 3, 4, 5});
  require(dense || patches.numel() == 0, "patches must be dense in the order that channels_last tells");
  for (const auto* values : {&problem.scale, &problem.shift})
    require(static_cast<int64_t>(values->size()) == out_channels, "scale and shift must have one value per channel");

  if (problem.flip.ndim != 0) {
    require_shape("flip", problem.flip, {batch});
    require(problem.flip.dtype == DType::boolean, "flip must be bool");
  }
  if (problem.offsets.ndim != 0) {
    const TensorView& offsets = problem.offsets;
    require_shape("offsets", offsets, {batch, 2});
    require(offsets.dtype == DType::i64, "offsets must be int64");
    const int64_t limit[2] = {images.shape[2] - g.height, images.shape[3] - g.width};
    for (int64_t b = 0; offsets_on_host && b < batch; ++b)
      for (int64_t d = 0; d < 2; ++d) {
        const int64_t value = offsets.as<int64_t>()[b * offsets.strides[0] + d * offsets.strides[1]];
        require(value >= 0 && value <= limit[d], "offsets must be in [0, " + std::to_string(limit[0]) + "] x [0, " +
                                                     std::to_string(limit[1]) + "] for this crop, got " +
                                                     std::to_string(value) + " for " + (d ? "x" : "y") + " of image " +
                                                     std::to_string(b));
      }
  }
  if (backward) {
    require_shape("images_grad", problem.images_grad, {batch, channels, images.shape[2], images.shape[3]});
    require(is_floating(problem.images_grad.dtype) &&
                (is_dense(problem.images_grad, {0, 1, 2, 3}) || problem.images_grad.numel() == 0),
            "images_grad must be floating and dense");
    if (problem.norm_slopes.ndim != 0) {
      const bool in_double = problem.images_grad.dtype == DType::f64 || patches.dtype == DType::f64;
      require_shape("norm_slopes", problem.norm_slopes, {batch, problem.rows(), problem.cols(), 3});
      require(problem.norm_slopes.dtype == (in_double ? DType::f64 : DType::f32),
              "norm_slopes must have the computing type");
      require(is_dense(problem.norm_slopes, {0, 1, 2, 3}) || problem.norm_slopes.numel() == 0,
              "norm_slopes must be dense");
    }
  }
}

}  // namespace cpc::patches
