// Overlapping-patch extraction: the contract of the CPU and CUDA kernels.
//
// Forward. For image b, patch row r and column c, output channel k and pixel (y, x) of the patch:
//   window pixel (Y, X) = (r * stride + y, c * stride + x), mirrored to X' = width - 1 - X where flip[b];
//   v = scale[k] * source(b, k, oy + Y, ox + X') + shift[k],
// where source is the image's channel k, or with gray the ITU-R BT.601 luma of its three channels, and (oy, ox) is
// offsets[b], the centred window where there are none. With patch_norm, v becomes (v - mu) / (sigma + 0.1), mu and the
// population sigma over all of the patch. Arithmetic is in double where images or patches are, else in float.
//
// Backward. Every image pixel gets the sum over the patches that contain it, in the order of the patches, zero outside
// the window. No atomics: the result is the same on every run.
//
// Who owns memory: the caller, all of it. Kernels allocate only bounded scratch memory.
#pragma once

#include <vector>

#include "core/isa.h"
#include "core/tensor_view.h"

namespace cpc::patches {

struct Geometry {
  int64_t patch = 0;              // Side of a patch.
  int64_t stride = 0;             // Distance of neighbouring patches.
  int64_t height = 0, width = 0;  // The window.
  bool gray = false;
  bool patch_norm = false;
  bool channels_last = false;  // A patch lies in memory as (y, x, k) instead of (k, y, x).
};

struct Problem {
  Geometry geometry = {};
  // [B, C, H, W], u8 or floating, any strides. Backward: the pixels are read only with patch_norm.
  TensorView images = {};
  TensorView offsets = {};  // [B, 2] i64, or absent.
  TensorView flip = {};     // [B] boolean, or absent.
  // [B, rows, cols, K, p, p], floating, dense in the order that channels_last tells. Backward: the gradient.
  TensorView patches = {};
  TensorView images_grad = {};  // Backward only: [B, C, H, W], floating, dense.
  // Backward with patch_norm on CUDA only: [B, rows, cols, 3] of the computing type, workspace.
  TensorView norm_slopes = {};
  std::vector<double> scale, shift;  // K each.

  int64_t batch() const { return patches.shape[0]; }
  int64_t rows() const { return patches.shape[1]; }
  int64_t cols() const { return patches.shape[2]; }
  int64_t channels() const { return patches.shape[3]; }
  bool in_double() const { return images.dtype == DType::f64 || patches.dtype == DType::f64; }
};

constexpr double kContrastFloor = 0.1;
// The share of red, green and blue in BT.601 luma, as Pillow's convert("L") uses it.
constexpr double luma(int64_t channel) { return channel == 0 ? 0.299 : channel == 1 ? 0.587 : 0.114; }

// Throws std::invalid_argument naming the argument where a shape, type or layout is not as above, and, if the offsets
// can be read from here, where one leaves its image.
void check(const Problem& problem, bool backward, bool offsets_on_host);

namespace cpu {
CPC_DECLARE_WITHOUT_BFLOAT16(void extract(const Problem& problem); void extract_backward(const Problem& problem))
inline void extract(const Problem& problem) { CPC_CALL_AT_ISA(extract, problem) }
inline void extract_backward(const Problem& problem) { CPC_CALL_AT_ISA(extract_backward, problem) }
}  // namespace cpu

namespace cuda {
// The most output channels that the kernels take: their scale and shift travel with the launch.
constexpr int kMaxChannels = 64;
#if defined(CPC_WITH_CUDA)
void extract(const Problem& problem, void* stream);
void extract_backward(const Problem& problem, void* stream);
#else
constexpr void (*extract)(const Problem&, void*) = nullptr;
constexpr void (*extract_backward)(const Problem&, void*) = nullptr;
#endif
}  // namespace cuda

}  // namespace cpc::patches
