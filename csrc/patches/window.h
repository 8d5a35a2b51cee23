// Index arithmetic that the CPU and the CUDA kernels share: where a window lies and which patches contain a pixel.
#pragma once

#include "patches/patches.h"

namespace cpc::patches {

// Top left pixel of image b's window, kept inside the image, and whether the window is mirrored.
struct Window {
  int64_t y, x;
  bool flip;
};

CPC_HOST_DEVICE inline int64_t clamp(int64_t v, int64_t high) { return v < 0 ? 0 : v > high ? high : v; }

CPC_HOST_DEVICE inline Window window_of(const Geometry& g, const TensorView& images, const TensorView& offsets,
                                        const TensorView& flip, int64_t b) {
  const int64_t limit_y = images.shape[2] - g.height, limit_x = images.shape[3] - g.width;
  Window w{limit_y / 2, limit_x / 2, false};
  if (offsets.ndim != 0) {
    const int64_t* o = offsets.as<int64_t>() + b * offsets.strides[0];
    w.y = clamp(o[0], limit_y);
    w.x = clamp(o[offsets.strides[1]], limit_x);
  }
  if (flip.ndim != 0) w.flip = flip.as<bool>()[b * flip.strides[0]];
  return w;
}

// The patches [first, last] along one axis that contain window position `at`; none where last < first.
struct Covering {
  int64_t first, last;
};

CPC_HOST_DEVICE inline Covering covering(int64_t at, int64_t patch, int64_t stride, int64_t patches) {
  const int64_t last = at / stride;
  return {at < patch ? 0 : (at - patch) / stride + 1, last < patches ? last : patches - 1};
}

}  // namespace cpc::patches
