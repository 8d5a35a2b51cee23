// Per-patch augmentation: the contract of the CPU and CUDA kernels.
//
// From uint8 images to patches as patches/patches.h cuts, scales and normalises them, with a sequence of transforms of
// each patch in between, on its uint8 pixels: transform.h lists them and has their arithmetic. Patch i of the batch, in
// the order of memory, goes through codes[i, 0], codes[i, 1], …, each with parameters[i, t, 0..2]. A transform's result
// is uint8 again, the same on every device.
//
// Who owns memory: the caller, all of it. Kernels allocate only bounded scratch memory.
#pragma once

#include "core/isa.h"
#include "core/tensor_view.h"
#include "patches/patches.h"

namespace cpc::augment {

constexpr int64_t kParameters = 3;
constexpr int64_t kNodes = 4;  // A side of an elastic deformation's grid.
// Up to this side the transforms' arithmetic in 32 bits holds.
constexpr int64_t kMaxPatch = 1024;

struct Problem {
  // What is read and written, images u8 of 1 or 3 channels.
  patches::Problem extraction = {};
  TensorView codes = {};          // [B, rows, cols, T] u8, dense.
  TensorView parameters = {};     // [B, rows, cols, T, kParameters] f32, dense.
  TensorView partners = {};       // [B, rows, cols] i64, dense, or absent: the patch that sample pairing mixes in.
  TensorView displacements = {};  // [B, rows, cols, 2, kNodes, kNodes] f32, dense, or absent: y then x, in pixels.
  int64_t fill = 0;               // The pixel from outside of a patch.
  TensorView workspace = {};      // [workspace_bytes] u8.

  int64_t count() const { return extraction.batch() * extraction.rows() * extraction.cols(); }
  int64_t steps() const { return codes.shape[3]; }
};

// Throws std::invalid_argument naming the argument where a shape, type or layout is not as above, and, if the plan can
// be read from here, where a code or a partner stands for nothing, or a transform lacks partners or displacements. What
// cannot be read is harmless: such codes do nothing, such partners are clamped.
void check(const Problem& problem, bool on_host);

namespace cpu {
CPC_DECLARE_WITHOUT_BFLOAT16(void augment(const Problem& problem))
inline void augment(const Problem& problem) { CPC_CALL_AT_ISA(augment, problem) }
}  // namespace cpu

namespace cuda {
#if defined(CPC_WITH_CUDA)
// Memory that patches too large for shared memory are transformed in.
int64_t workspace_bytes(const patches::Problem& extraction);
void augment(const Problem& problem, void* stream);
#else
constexpr void (*augment)(const Problem&, void*) = nullptr;
#endif
}  // namespace cuda

}  // namespace cpc::augment
