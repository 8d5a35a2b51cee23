// Masked convolution at stride 1 with zero padding: the contract of the CPU and CUDA kernels. The CPU's kernels also have
// strides, paddings of any width and a ReLU of what they read, for conv2d/conv2d.h, which has no mask.
//
// Forward. With `before(k) = dilation * (k - 1) / 2` rows (or columns) of padding before the first, tap (i, j) of the
// kernel reads the input's pixel (y + dy, x + dx), dy = i * dilation - before(kh) and dx likewise; zero outside. For
// image b, pixel (y, x) and output channel n of N:
//   a[n] = bias[n] + condition[b, n, y, x]
//          + sum over taps and channels k of weight[n, k, i, j] * input[b, k, y + dy, x + dx],
//   output[n] = a[n], or max(a[n], 0) where relu, or tanh(a[n]) * sigmoid(a[n + N / 2]) for n < N / 2 where gated.
// Only the taps in `taps` are summed: those that a mask leaves visible to some channel and that reach the input. Where
// the mask differs between channels, it has been multiplied into the packed weights. Sums run over taps in their order
// and over channels within, in one chain of additions, or on CUDA where it says so in two that are added, so that a pixel
// computed alone is bit for bit the same; not so in pairs of pixels (terms.h), which take fewer multiplications.
//
// Gradients. In the input: the same convolution with the weight transposed and dy, dx negated. In the weight: for each
// tap the product of shifted input and output gradient, times the mask, zero for taps not in `taps`. All sums are in
// float, in double where the tensors are; in a fixed order, the same for any number of threads. A ReLU keeps NaN, and
// its derivative there is 1, as in PyTorch.
//
// Who owns memory: the caller, all of it. Kernels allocate only bounded scratch memory.
#pragma once

#include <array>
#include <optional>
#include <vector>

#include "core/fields.h"
#include "core/isa.h"
#include "core/tensor_view.h"

namespace cpc::masked_conv {

struct Tap {
  int64_t index;   // i * kw + j
  int64_t dy, dx;  // Where it reads, relative to the output's pixel times the stride.
};

enum class Activation { none, relu, gated };
constexpr auto names_of(Activation) { return std::array{"none", "relu", "gated"}; }

// Weights to the order in which a kernel reads them, which is the device's own. Kernels read nothing but this.
struct Packing {
  TensorView weight;  // [O, C, kh, kw], floating, any strides.
  TensorView mask;    // [kh, kw] or [O, C, kh, kw], boolean, any strides. On the CPU absent where taps say it all.
  TensorView packed;  // packed_bytes(...), aligned to 64.
  std::vector<Tap> taps;
  bool transposed = false;  // From O to C channels, for the gradient in the input. Else from C to O.
  bool gated = false;       // The CPU needs outputs n and n + N / 2 together.
  bool pairs = false;       // For a convolution in pairs.

  int64_t outputs() const { return weight.shape[transposed ? 1 : 0]; }
  int64_t inputs() const { return weight.shape[transposed ? 0 : 1]; }
  int64_t taps_count() const { return static_cast<int64_t>(taps.size()); }
};

struct Convolution {
  TensorView input;          // [B, K, H, W], floating, channels innermost and dense.
  TensorView packed;         // What a packing with N outputs and K inputs made, in the input's type. Absent on CUDA
                             // where reads_in_place() or reads_transposed(), which need the two that follow.
  TensorView weight;         // As of the packing.
  TensorView mask;           // [kh, kw], as of the packing.
  TensorView bias;           // [N] of the input's type, dense, or absent.
  TensorView condition;      // [B, N, H, W] of the input's type, any strides, 0 among them; or absent.
  TensorView position;       // [2] i64, dense: row and column of the only pixel to compute. Absent: all of them.
  TensorView positive;       // CPU only: like condition. Results are zero where it is 0 or less: the derivative of a
                             // ReLU, where they are gradients in what came out of it. Or absent.
  TensorView output;         // [B, N or N / 2, H', W'] of the input's type: channel stride 1, else any strides. H' and
                             // W' are H and W but on the CPU.
  TensorView preactivation;  // [B, N, H, W] likewise: a, or absent.
  std::vector<Tap> taps;
  Activation activation = Activation::none;
  int64_t outputs = 0;  // N.
  // CUDA only: whether the weight is to be read transposed, for the gradient in the input, and taps lead the other way.
  bool transposed = false;
  bool tf32 = false;  // Whether CUDA may round float operands to TF32.
  // Whether neighbouring pixels of a row are computed in pairs: on the CPU, of float, all pixels, with taps of a
  // dilation of 1, a stride of 1 and a mask [kh, kw].
  bool pairs = false;
  // CPU only: pixels of the input from one of the output's to the next, and whether the input is read through a ReLU.
  int64_t stride = 1;
  bool relu_input = false;

  int64_t batch() const { return input.shape[0]; }
  int64_t inputs() const { return input.shape[1]; }
  int64_t height() const { return input.shape[2]; }
  int64_t width() const { return input.shape[3]; }
  int64_t output_height() const { return output.shape[2]; }
  int64_t output_width() const { return output.shape[3]; }
};

// From the gradient in the output to that in a, and the bias's.
struct ActivationGrad {
  TensorView grad;       // [B, N or N / 2, H, W], channels innermost and dense.
  TensorView saved;      // The output where relu, a where gated; like grad. Absent where there is no activation.
  TensorView result;     // [B, N, H, W] like grad. Absent where there is no activation: it would be grad.
  TensorView bias_grad;  // [N], dense, of grad's type, or absent.
  // CUDA only: partial sums, kBiasParts * N of the computing type; absent without bias_grad.
  TensorView workspace;
  bool parts_only = false;  // CUDA only: whether the weight's gradient sums the parts.
  Activation activation = Activation::none;

  int64_t outputs() const { return activation == Activation::gated ? 2 * grad.shape[1] : grad.shape[1]; }
};

struct WeightGrad {
  TensorView input;        // [B, C, H, W], channels innermost and dense.
  TensorView grad;         // In a: [B, O, H', W'], of the input's type, likewise. H' and W' are H and W but on the CPU.
  TensorView mask;         // As of the packing.
  TensorView weight_grad;  // [O, C, kh, kw] of the input's type, dense in any order of the dimensions.
  TensorView workspace;    // CUDA only: weight_grad_workspace(...) bytes, aligned to 64.
  TensorView bias_grad;    // CUDA only: as of the activation's gradient with parts_only, or absent.
  TensorView bias_parts;   // Its workspace.
  std::vector<Tap> taps;
  bool tf32 = false;
  // As of the convolution.
  bool pairs = false;
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

// --- What Python calls: the kernels above, one after another on one workspace, as plan.cpp decides ---

// A convolution of weights as they are.
struct Layer {
  TensorView weight, mask, input, bias, condition, output, preactivation, workspace;
  // The taps to sum, by their indices. Absent, the host looks at the mask.
  std::optional<std::vector<int64_t>> visible;
  int64_t dilation = 1;
  Activation activation = Activation::none;
  bool tf32 = false;
};

// Its gradients, those that are not absent.
struct LayerGrad {
  TensorView weight, mask, grad, input;
  TensorView saved, grad_preactivation;  // As saved and result of an activation's gradient.
  TensorView grad_input, grad_weight, grad_bias, workspace;
  std::optional<std::vector<int64_t>> visible;
  int64_t dilation = 1;
  Activation activation = Activation::none;
  bool tf32 = false;
};

// A packing for pixels alone of images of a size, and a convolution with it.
struct PixelPacking : Packing {
  std::vector<int64_t> visible;
  int64_t dilation = 1, height = 0, width = 0;
};
struct PixelConvolution : Convolution {
  std::vector<int64_t> visible;
  int64_t kernel_height = 0, kernel_width = 0, dilation = 1;
};

// Set the sizes of results, and the taps. Throw std::invalid_argument for taps that there are not.
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

// The taps of a kernel by their indices, but for those that see nothing but padding in images of a size. Throws
// std::invalid_argument for one that there is not.
std::vector<Tap> taps_of(const std::vector<int64_t>& indices, int64_t kh, int64_t kw, int64_t dilation, bool negated,
                         int64_t height, int64_t width);

namespace cpu {
CPC_DECLARE_AT_EACH_ISA(int64_t packed_bytes(int64_t outputs, int64_t inputs, int64_t terms, DType dtype, bool gated);
                        void pack(const Packing& problem); void convolve(const Convolution& problem);
                        void activation_grad(const ActivationGrad& problem);
                        void weight_grad(const WeightGrad& problem))
inline int64_t packed_bytes(int64_t outputs, int64_t inputs, int64_t terms, DType dtype, bool gated) {
  CPC_CALL_AT_ISA_OF(dtype, packed_bytes, outputs, inputs, terms, dtype, gated)
}
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
// Whether a convolution from C to O channels takes weights as they are: channels innermost and one mask for all of them.
bool reads_in_place(const TensorView& weight, const TensorView& mask, int64_t dilation);
// Likewise for the gradient in the input from that in the outputs.
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
