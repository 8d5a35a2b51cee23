// Per-patch augmentation: the contract of the CPU and CUDA kernels.
//
// Patches are cut, scaled and normalised from uint8 images as in patches/patches.h. In between, a sequence of
// transforms works on the uint8 pixels of each patch: transform.h lists them and has their arithmetic. Patch i of the
// batch, in the order of memory, goes through codes[i, 0], codes[i, 1], …, each with parameters[i, t, 0..2]. A
// transform's result is uint8 again, the same on every device.
//
// The caller owns all memory. Kernels allocate only bounded scratch memory.
#pragma once

#include "core/isa.h"
#include "core/tensor_view.h"
#include "patches/patches.h"

namespace cpc::augment {

constexpr int64_t kParameters = 3;
constexpr int64_t kNodes = 4;  // A side of an elastic deformation's grid.
// The largest side for which the transforms' arithmetic fits 32 bits.
constexpr int64_t kMaxPatch = 1024;

struct Problem {
  patches::Problem extraction = {};  // What is read and written, images of 1 or 3 channels.
  TensorView codes = {};
  TensorView parameters = {};
  TensorView partners = {};       // The patch that sample pairing mixes in.
  TensorView displacements = {};  // y then x, in pixels.
  int64_t fill = 0;               // The value of pixels from outside of a patch.
  TensorView workspace = {};

  int64_t count() const { return extraction.batch() * extraction.rows() * extraction.cols(); }
  int64_t steps() const { return codes.shape[3]; }
};

static_assert(kParameters == 3 && kNodes == 4, "as the table says");

void complete(Problem& problem, Sizes& sizes);

constexpr auto kAugmentation = fields_of<Problem>(
    complete, reads<&Problem::extraction, &patches::Problem::images>("images", Type::u8, "B C H W"),
    writes<&Problem::extraction, &patches::Problem::patches>("patches", Type::floating, "B R Q K p p"),
    patches::patch_fields<&Problem::extraction>(), reads<&Problem::codes>("codes", Type::u8, "B R Q T", Layout::dense),
    reads<&Problem::parameters>("parameters", Type::f32, "B R Q T 3", Layout::dense),
    may_read<&Problem::partners>("partners", Type::i64, "B R Q", Layout::dense),
    may_read<&Problem::displacements>("displacements", Type::f32, "B R Q 2 4 4", Layout::dense),
    value<&Problem::fill>("fill"), workspace<&Problem::workspace>("workspace", "augment_patches_workspace"));

// Throws std::invalid_argument where a size is not as above and, on the host, where a code or a partner is out of
// range, or a transform lacks partners or displacements. On CUDA these are harmless: such codes and transforms do
// nothing, and such partners are clamped.
void check(const Problem& problem, Where where);

// On CUDA, the memory in which patches that do not fit shared memory are transformed.
int64_t workspace_bytes(const Problem& problem, Where where);

namespace cpu {
CPC_DECLARE_WITHOUT_BFLOAT16(void augment(const Problem& problem))
inline void augment(const Problem& problem) { CPC_CALL_AT_ISA(augment, problem) }
}  // namespace cpu

namespace cuda {
#if defined(CPC_WITH_CUDA)
int64_t workspace_bytes(const patches::Problem& extraction);
void augment(const Problem& problem, void* stream);
#else
constexpr void (*augment)(const Problem&, void*) = nullptr;
#endif
}  // namespace cuda

}  // namespace cpc::augment
