// Plain convolution, fused with the ReLUs, the bias and the sum around it in a residual block: the contract. The CPU
// uses the kernels of the masked convolution (masked_conv/masked_conv.h), which also says how sums are made; there are
// none for CUDA.
//
// Forward. With stride s, padding (p, q) and dilation e, for image b, pixel (y, x) and output channel o:
//   a[o] = bias[o] + residual[b, o, y, x]
//          + sum over i, j and channels c of weight[o, c, i, j] * r(input[b, c, s y + e i - p, s x + e j - q]),
// where the input is zero outside, and r is max(., 0) with relu_input, else the identity. output[o] is max(a[o], 0)
// with relu, else a[o].
//
// Gradients. That of a is grad, or zero where the output is 0 or less, with relu. With relu_input, the input gradient
// is zero where the input is 0 or less; `passed`, the gradient that reaches the input on other paths, is added after
// that. Sums of gradients are in a fixed order, the same for any number of threads.
#pragma once

#include "core/fields.h"
#include "core/tensor_view.h"

namespace cpc::conv2d {

struct Geometry {
  int64_t stride = 1, padding_rows = 0, padding_columns = 0, dilation = 1;
};

struct Layer {
  TensorView weight, input, bias, residual, output, workspace;
  Geometry geometry;
  bool relu_input = false, relu = false;
};

// Gradients that are absent are not computed.
struct LayerGrad {
  TensorView weight, grad, input;
  TensorView output;              // With relu, else absent.
  TensorView grad_preactivation;  // Likewise: the gradient of a.
  TensorView passed;              // Added to grad_input, or absent.
  TensorView grad_input, grad_weight, grad_bias, workspace;
  Geometry geometry;
  bool relu_input = false;
};

constexpr auto kLayer =
    fields_of<Layer>(reads<&Layer::weight>("weight", Type::floating, "O C kh kw"),
                     reads<&Layer::input>("input", Type::same, "B C H W", Layout::channels_last),
                     may_read<&Layer::bias>("bias", Type::same, "O", Layout::dense),
                     may_read<&Layer::residual>("residual", Type::same, "B O y x"),
                     writes<&Layer::output>("output", Type::same, "B O y x", Layout::channels_innermost),
                     value<&Layer::geometry, &Geometry::stride>("stride"),
                     value<&Layer::geometry, &Geometry::padding_rows>("padding_rows"),
                     value<&Layer::geometry, &Geometry::padding_columns>("padding_columns"),
                     value<&Layer::geometry, &Geometry::dilation>("dilation"), value<&Layer::relu_input>("relu_input"),
                     value<&Layer::relu>("relu"), workspace<&Layer::workspace>("workspace", "conv2d_workspace"));

constexpr auto kLayerGrad = fields_of<LayerGrad>(
    reads<&LayerGrad::weight>("weight", Type::floating, "O C kh kw"),
    reads<&LayerGrad::grad>("grad", Type::same, "B O y x", Layout::channels_last),
    reads<&LayerGrad::input>("input", Type::same, "B C H W", Layout::channels_last),
    may_read<&LayerGrad::output>("output", Type::same, "B O y x", Layout::channels_last),
    may_write<&LayerGrad::grad_preactivation>("grad_preactivation", Type::same, "B O y x", Layout::channels_last),
    may_read<&LayerGrad::passed>("passed", Type::same, "B C H W"),
    may_write<&LayerGrad::grad_input>("grad_input", Type::same, "B C H W", Layout::channels_innermost),
    may_write<&LayerGrad::grad_weight>("grad_weight", Type::same, "O C kh kw", Layout::dense_in_any_order),
    may_write<&LayerGrad::grad_bias>("grad_bias", Type::same, "O", Layout::dense),
    value<&LayerGrad::geometry, &Geometry::stride>("stride"),
    value<&LayerGrad::geometry, &Geometry::padding_rows>("padding_rows"),
    value<&LayerGrad::geometry, &Geometry::padding_columns>("padding_columns"),
    value<&LayerGrad::geometry, &Geometry::dilation>("dilation"), value<&LayerGrad::relu_input>("relu_input"),
    workspace<&LayerGrad::workspace>("workspace", "conv2d_backward_workspace"));

// Throw std::invalid_argument where sizes do not fit each other.
void check(const Layer& problem, Where where);
void check(const LayerGrad& problem, Where where);

int64_t workspace_bytes(const Layer& problem, Where where);
int64_t workspace_bytes(const LayerGrad& problem, Where where);

namespace cpu {
void layer(const Layer& problem);
void layer_grad(const LayerGrad& problem);
}  // namespace cpu

}  // namespace cpc::conv2d
