// Masked convolution at stride 1 with zero padding: the contract of the CPU and CUDA kernels. The CPU kernels also
// support strides, padding of any width and a ReLU on the input, for the unmasked convolution of conv2d/conv2d.h.
//
// Forward. The input has `before(k) = dilation * (k - 1) / 2` rows (or columns) of zero padding before the first. Tap
// (i, j) of the kernel reads input pixel (y + dy, x + dx), where dy = i * dilation - before(kh) and dx = j * dilation -
// before(kw). For image b, pixel (y, x) and output channel n of N:
//   a[n] = bias[n] + condition[b, n, y, x]
//          + sum over taps and channels k of weight[n, k, i, j] * input[b, k, y + dy, x + dx],
//   output[n] = a[n], or max(a[n], 0) where relu, or tanh(a[n]) * sigmoid(a[n + N / 2]) for n < N / 2 where gated.
// Only the taps in `taps` are summed: those that the mask leaves visible to some channel and that reach the input. A
// mask that differs between channels is multiplied into the packed weights. A sum is one chain of additions over the
// taps in order, and over the channels within a tap; on CUDA, two such chains are added where two teams of warps share
// a tile (TwoTeams in core/cuda/product.cuh). A pixel computed alone therefore equals, bit for bit, the same pixel
// computed with its image. Convolutions that compute neighbouring pixels together (Filtering) are the exception.
//
// Gradients. The input gradient is the same convolution with the weight transposed and dy, dx negated. The weight
// gradient is, for each tap, the product of the shifted input and the output gradient, times the mask, and zero for
// taps not in `taps`. Sums are in float, or in double for double tensors, and in a fixed order that does not depend on
// the number of threads. A ReLU keeps NaN, and its derivative there is 1, as in PyTorch.
//
// The caller owns all memory. Kernels allocate only bounded scratch memory.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "core/fields.h"
#include "core/isa.h"
#include "core/tensor_view.h"

namespace cpc::masked_conv {

// The pixels that are computed together (terms.h): one, two neighbours of a row, or a square of 2x2. The latter two
// need fewer multiplications.
enum class Filtering { direct, pairs, quads };

struct Tap {
  int64_t index;   // i * kw + j
  int64_t dy, dx;  // The input pixel that it reads, relative to the output pixel times the stride.
};

enum class Activation { none, relu, gated };
constexpr auto names_of(Activation) { return std::array{"none", "relu", "gated"}; }

// Reorders weights into the device-specific order in which a convolution reads them. CUDA kernels can also read weights
// in place: see reads_in_place() and reads_transposed().
struct Packing {
  TensorView weight;  // [O, C, kh, kw], floating, any strides.
  TensorView mask;    // [kh, kw] or [O, C, kh, kw], boolean, any strides. On the CPU absent if `taps` say it all.
  TensorView packed;  // packed_bytes(...), aligned to 64.
  std::vector<Tap> taps;
  bool transposed = false;  // From O to C channels, for the input gradient; otherwise from C to O.
  bool gated = false;       // The CPU packs outputs n and n + N / 2 into the same panel.
  Filtering filtering = Filtering::direct;

  int64_t outputs() const { return weight.shape[transposed ? 1 : 0]; }
  int64_t inputs() const { return weight.shape[transposed ? 0 : 1]; }
  int64_t taps_count() const { return static_cast<int64_t>(taps.size()); }
};

struct Convolution {
  TensorView input;          // [B, K, H, W], floating, channels innermost and dense.
  TensorView packed;         // The result of a Packing with N outputs and K inputs, in the input's type. Absent on CUDA
                             // if reads_in_place() or reads_transposed(), which use weight and mask instead.
  TensorView weight;         // As in Packing.
  TensorView mask;           // [kh, kw], as in Packing.
  TensorView bias;           // [N] of the input's type, dense, or absent.
  TensorView condition;      // [B, N, H, W] of the input's type, any strides, including 0; or absent.
  TensorView position;       // [2] i64, dense: row and column of the only pixel to compute; absent for all.
  TensorView positive;       // CPU only: like condition, or absent. Results are zero where it is 0 or less, which
                             // multiplies gradients by the derivative of a ReLU.
  TensorView output;         // [B, N or N / 2, H', W'] of the input's type: channel stride 1, else any strides.
                             // H' = H and W' = W except on the CPU.
  TensorView preactivation;  // [B, N, H, W], strides likewise: the sums a. Or absent.
  std::vector<Tap> taps;
  Activation activation = Activation::none;
  int64_t outputs = 0;  // N.
  // CUDA only: read `weight` in place and transposed, for the input gradient, whose taps are negated.
  bool transposed = false;
  bool tf32 = false;  // Whether CUDA may round float operands to TF32.
  // Pairs and quads: CPU only, for types that are multiplied as floats, for all pixels, a dilation of 1, a stride of 1,
  // and a mask [kh, kw] or none.
  Filtering filtering = Filtering::direct;
  // CPU only: the stride, and whether a ReLU is applied to the input.
  int64_t stride = 1;
  bool relu_input = false;

  int64_t batch() const { return input.shape[0]; }
  int64_t inputs() const { return input.shape[1]; }
  int64_t height() const { return input.shape[2]; }
  int64_t width() const { return input.shape[3]; }
  int64_t output_height() const { return output.shape[2]; }
  int64_t output_width() const { return output.shape[3]; }
};

// Computes the gradients of the sums a and of the bias from that of the output.
struct ActivationGrad {
  TensorView grad;       // [B, N or N / 2, H, W], channels innermost and dense.
  TensorView saved;      // The output if relu, a if gated; laid out like grad. Absent without an activation.
  TensorView result;     // [B, N, H, W], laid out like grad. Absent without an activation, as it would equal grad.
  TensorView bias_grad;  // [N], dense, of grad's type, or absent.
  // CUDA only: partial sums, kBiasParts * N of the computing type; absent without bias_grad.
  TensorView workspace;
  bool parts_only = false;  // CUDA only: leave adding the partial sums to the weight gradient.
  Activation activation = Activation::none;

  int64_t outputs() const { return activation == Activation::gated ? 2 * grad.shape[1] : grad.shape[1]; }
};

struct WeightGrad {
  TensorView input;        // [B, C, H, W], channels innermost and dense.
  TensorView grad;         // Of a: [B, O, H', W'], type and layout of input. H' = H and W' = W except on the CPU.
  TensorView mask;         // As in Packing.
  TensorView weight_grad;  // [O, C, kh, kw] of the input's type, dense in any order of the dimensions.
  TensorView workspace;    // CUDA only: weight_grad_workspace(...) bytes, aligned to 64.
  TensorView bias_grad;    // CUDA only: that of an ActivationGrad with parts_only, or absent.
  TensorView bias_parts;   // The workspace of that ActivationGrad.
  std::vector<Tap> taps;
  bool tf32 = false;
  // As in Convolution.
  Filtering filtering = Filtering::direct;
  int64_t stride = 1;
  bool relu_input = false;

  int64_t batch() const { return input.shape[0]; }
  int64_t channels() const { return input.shape[1]; }
  int64_t outputs() const { return grad.shape[1]; }
  int64_t height() const { return input.shape[2]; }
  int64_t width() const { return input.shape[3]; }
  int64_t output_height() const { return grad.shape[2]; }
  int64_t output_width() const { return grad.shape[3]; }
};

// --- The functions that Python calls. They run the kernels above, one after another on one workspace (plan.cpp) ---

// A convolution with weights that are not packed.
struct Layer {
  TensorView weight, mask, input, bias, condition, output, preactivation, workspace;
  // Indices of the taps to sum. If absent, the host finds them in the mask, or sums all taps if it cannot read the
  // mask.
  std::optional<std::vector<int64_t>> visible;
  int64_t dilation = 1;
  Activation activation = Activation::none;
  bool tf32 = false;
};

// The gradients of a Layer. Absent ones are not computed.
struct LayerGrad {
  TensorView weight, mask, grad, input;
  TensorView saved, grad_preactivation;  // `saved` and `result` of the ActivationGrad.
  TensorView grad_input, grad_weight, grad_bias, workspace;
  std::optional<std::vector<int64_t>> visible;
  int64_t dilation = 1;
  Activation activation = Activation::none;
  bool tf32 = false;
};

// Weights packed for repeated use on images of one size, and a convolution with them, of a single pixel or of all.
struct PixelPacking : Packing {
  std::vector<int64_t> visible;
  int64_t dilation = 1, height = 0, width = 0;
};
struct PixelConvolution : Convolution {
  std::vector<int64_t> visible;
  int64_t kernel_height = 0, kernel_width = 0, dilation = 1;
};

// Set the sizes of results, and the taps. Throw std::invalid_argument for taps outside the kernel.
void complete(Layer& problem, Sizes& sizes);
void complete_grad(LayerGrad& problem, Sizes& sizes);
void complete_packing(PixelPacking& problem, Sizes& sizes);
void complete_pixel(PixelConvolution& problem, Sizes& sizes);

constexpr auto kLayer = fields_of<Layer>(
    complete, reads<&Layer::weight>("weight", Type::floating, "O C kh kw"),
    reads<&Layer::mask>("mask", Type::boolean, "kh kw | O C kh kw"),
    reads<&Layer::input>("input", Type::same, "B C H W", Layout::channels_last),
    may_read<&Layer::bias>("bias", Type::same, "O", Layout::dense),
    may_read<&Layer::condition>("condition", Type::same, "B O H W"),
    writes<&Layer::output>("output", Type::same, "B R H W", Layout::channels_innermost),
    may_write<&Layer::preactivation>("preactivation", Type::same, "B O H W", Layout::channels_innermost),
    value<&Layer::visible>("taps"), value<&Layer::dilation>("dilation"), value<&Layer::activation>("activation"),
    value<&Layer::tf32>("tf32"), workspace<&Layer::workspace>("workspace", "masked_conv2d_workspace"));

constexpr auto kLayerGrad = fields_of<LayerGrad>(
    complete_grad, reads<&LayerGrad::weight>("weight", Type::floating, "O C kh kw"),
    reads<&LayerGrad::mask>("mask", Type::boolean, "kh kw | O C kh kw"),
    reads<&LayerGrad::grad>("grad", Type::same, "B R H W", Layout::channels_last),
    may_read<&LayerGrad::input>("input", Type::same, "B C H W", Layout::channels_last),
    may_read<&LayerGrad::saved>("saved", Type::same, "B O H W", Layout::channels_last),
    may_write<&LayerGrad::grad_preactivation>("grad_preactivation", Type::same, "B O H W", Layout::channels_last),
    may_write<&LayerGrad::grad_input>("grad_input", Type::same, "B C H W", Layout::channels_innermost),
    may_write<&LayerGrad::grad_weight>("grad_weight", Type::same, "O C kh kw", Layout::dense_in_any_order),
    may_write<&LayerGrad::grad_bias>("grad_bias", Type::same, "O", Layout::dense), value<&LayerGrad::visible>("taps"),
    value<&LayerGrad::dilation>("dilation"), value<&LayerGrad::activation>("activation"),
    value<&LayerGrad::tf32>("tf32"), workspace<&LayerGrad::workspace>("workspace", "masked_conv2d_backward_workspace"));

constexpr auto kPixelPacking = fields_of<PixelPacking>(
    complete_packing, reads<&PixelPacking::weight>("weight", Type::floating, "O C kh kw"),
    reads<&PixelPacking::mask>("mask", Type::boolean, "kh kw | O C kh kw"), value<&PixelPacking::visible>("taps"),
    value<&PixelPacking::dilation>("dilation"), value<&PixelPacking::height>("height"),
    value<&PixelPacking::width>("width"), value<&PixelPacking::gated>("gated"),
    workspace<&PixelPacking::packed>("packed", "masked_conv2d_packed_bytes"));

constexpr auto kPixelConvolution = fields_of<PixelConvolution>(
    complete_pixel, reads<&PixelConvolution::input>("input", Type::floating, "B C H W", Layout::channels_last),
    reads<&PixelConvolution::packed>("packed", Type::u8, "P", Layout::dense),
    may_read<&PixelConvolution::bias>("bias", Type::same, "O", Layout::dense),
    may_read<&PixelConvolution::condition>("condition", Type::same, "B O H W"),
    may_read<&PixelConvolution::position>("position", Type::i64, "2", Layout::dense),
    writes<&PixelConvolution::output>("output", Type::same, "B R H W", Layout::channels_innermost),
    value<&PixelConvolution::outputs>("outputs"), value<&PixelConvolution::visible>("taps"),
    value<&PixelConvolution::kernel_height>("kh"), value<&PixelConvolution::kernel_width>("kw"),
    value<&PixelConvolution::dilation>("dilation"), value<&PixelConvolution::activation>("activation"),
    value<&PixelConvolution::tf32>("tf32"));

// Throw std::invalid_argument where fields do not fit each other, or a position is not in the image.
void check(const Layer& problem, Where where);
void check(const LayerGrad& problem, Where where);
void check(const PixelPacking& problem, Where where);
void check(const PixelConvolution& problem, Where where);

int64_t workspace_bytes(const Layer& problem, Where where);
int64_t workspace_bytes(const LayerGrad& problem, Where where);
int64_t workspace_bytes(const PixelPacking& problem, Where where);

// Returns the taps with these indices, except those that read nothing but padding in images of height x width. Throws
// std::invalid_argument for an index outside the kernel.
std::vector<Tap> taps_of(const std::vector<int64_t>& indices, int64_t kh, int64_t kw, int64_t dilation, bool negated,
                         int64_t height, int64_t width);

namespace cpu {
CPC_DECLARE_AT_EACH_ISA(int64_t packed_bytes(int64_t outputs, int64_t inputs, int64_t terms, DType dtype, bool gated);
                        bool multiplies_floats(DType dtype); void pack(const Packing& problem);
                        void convolve(const Convolution& problem); void activation_grad(const ActivationGrad& problem);
                        void weight_grad(const WeightGrad& problem))
inline int64_t packed_bytes(int64_t outputs, int64_t inputs, int64_t terms, DType dtype, bool gated) {
  CPC_CALL_AT_ISA_OF(dtype, packed_bytes, outputs, inputs, terms, dtype, gated)
}
// Whether tensors of this type are multiplied as floats, as pairs and quads are.
inline bool multiplies_floats(DType dtype) { CPC_CALL_AT_ISA_OF(dtype, multiplies_floats, dtype) }
inline void pack(const Packing& problem) { CPC_CALL_AT_ISA_OF(problem.weight.dtype, pack, problem) }
inline void convolve(const Convolution& problem) { CPC_CALL_AT_ISA_OF(problem.input.dtype, convolve, problem) }
inline void activation_grad(const ActivationGrad& problem) {
  CPC_CALL_AT_ISA_OF(problem.grad.dtype, activation_grad, problem)
}
inline void weight_grad(const WeightGrad& problem) { CPC_CALL_AT_ISA_OF(problem.input.dtype, weight_grad, problem) }
void layer(const Layer& problem);
void layer_grad(const LayerGrad& problem);
}  // namespace cpu

namespace cuda {
constexpr int64_t kBiasParts = 128;
#if defined(CPC_WITH_CUDA)
int64_t packed_bytes(int64_t outputs, int64_t inputs, int64_t taps, DType dtype);
// Whether a convolution from C to O channels reads its weights in place. Their channels must be innermost, and the mask
// the same for all channels; lies_in_place() in cuda.cu has all conditions.
bool reads_in_place(const TensorView& weight, const TensorView& mask, int64_t dilation);
// The same for the input gradient.
bool reads_transposed(const TensorView& weight, const TensorView& mask, int64_t dilation, const TensorView& grad);
int64_t weight_grad_workspace(const WeightGrad& problem);
void pack(const Packing& problem, void* stream);
void convolve(const Convolution& problem, void* stream);
void activation_grad(const ActivationGrad& problem, void* stream);
void weight_grad(const WeightGrad& problem, void* stream);
void layer(const Layer& problem, void* stream);
void layer_grad(const LayerGrad& problem, void* stream);
#else
constexpr void (*pack)(const Packing&, void*) = nullptr;
constexpr void (*convolve)(const Convolution&, void*) = nullptr;
constexpr void (*layer)(const Layer&, void*) = nullptr;
constexpr void (*layer_grad)(const LayerGrad&, void*) = nullptr;
#endif
}  // namespace cuda

}  // namespace cpc::masked_conv
