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
// The caller owns all memory. Kernels allocate only bounded scratch memory.
#pragma once

#include <vector>

#include "core/fields.h"
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
  TensorView images = {};  // Backward: the pixels are read only with patch_norm, and may be absent without.
  TensorView offsets = {};
  TensorView flip = {};
  TensorView patches = {};           // Dense in the order of channels_last. Backward: the gradient.
  TensorView images_grad = {};       // Backward only.
  TensorView workspace = {};         // Backward only.
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

struct Gradient : Problem {
  bool in_double() const { return images_grad.dtype == DType::f64 || patches.dtype == DType::f64; }
};

// The fields that determine the patches of an image. `path` leads to a Problem.
template <auto... path>
constexpr auto patch_fields() {
  return std::tuple(value<path..., &Problem::geometry, &Geometry::patch>("patch_size"),
                    value<path..., &Problem::geometry, &Geometry::stride>("stride"),
                    value<path..., &Problem::geometry, &Geometry::height>("height"),
                    value<path..., &Problem::geometry, &Geometry::width>("width"),
                    may_read<path..., &Problem::offsets>("offsets", Type::i64, "B 2"),
                    may_read<path..., &Problem::flip>("flip", Type::boolean, "B"),
                    value<path..., &Problem::geometry, &Geometry::gray>("gray"),
                    value<path..., &Problem::geometry, &Geometry::patch_norm>("patch_norm"),
                    value<path..., &Problem::geometry, &Geometry::channels_last>("channels_last"),
                    value<path..., &Problem::scale>("scale"), value<path..., &Problem::shift>("shift"));
}

// Set the sizes of the grid, the patches and their channels. Throw std::invalid_argument where the window does not hold
// a patch or leaves the images.
void complete(Problem& problem, Sizes& sizes);
void complete_gradient(Gradient& problem, Sizes& sizes);

constexpr auto kExtraction =
    fields_of<Problem>(complete, reads<&Problem::images>("images", Type::u8_or_floating, "B C H W"),
                       writes<&Problem::patches>("patches", Type::floating, "B R Q K p p"), patch_fields<>());

constexpr auto kGradient = fields_of<Gradient>(
    complete_gradient, writes<&Problem::images_grad>("images_grad", Type::floating, "B C H W", Layout::dense),
    reads<&Problem::patches>("patches_grad", Type::floating, "B R Q K p p"),
    may_read<&Problem::images>("images", Type::u8_or_floating, "B C H W"), patch_fields<>(),
    workspace<&Problem::workspace>("workspace", "extract_patches_backward_workspace"));

// Throw std::invalid_argument where a layout or the number of channels is not as above, and, on the host, where an
// offset leaves its image.
void check(const Problem& problem, Where where);
void check(const Gradient& problem, Where where);

// On CUDA with patch_norm, four values per patch in the type that the kernel computes in.
int64_t workspace_bytes(const Gradient& problem, Where where);

namespace cpu {
CPC_DECLARE_WITHOUT_BFLOAT16(void extract(const Problem& problem); void extract_backward(const Gradient& problem))
inline void extract(const Problem& problem) { CPC_CALL_AT_ISA(extract, problem) }
inline void extract_backward(const Gradient& problem) { CPC_CALL_AT_ISA(extract_backward, problem) }
}  // namespace cpu

namespace cuda {
// The most output channels that the kernels take, as their scale and shift are kernel parameters.
constexpr int kMaxChannels = 64;
#if defined(CPC_WITH_CUDA)
void extract(const Problem& problem, void* stream);
void extract_backward(const Gradient& problem, void* stream);
#else
constexpr void (*extract)(const Problem&, void*) = nullptr;
constexpr void (*extract_backward)(const Gradient&, void*) = nullptr;
#endif
}  // namespace cuda

}  // namespace cpc::patches
