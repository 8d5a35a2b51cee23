// Checks a call and runs it on the kernels of the masked convolution; see conv2d.h.
#include "masked_conv/plan.h"

#include <algorithm>
#include <string>
#include <vector>

#include "conv2d/conv2d.h"
#include "core/require.h"
#include "masked_conv/masked_conv.h"

namespace cpc::conv2d {
namespace {

using masked_conv::Filtering;
using masked_conv::Tap;
using masked_conv::Wanted;

// The largest side, stride, padding and dilation: the product of two such numbers stays far below 64 bits.
constexpr int64_t kMostPixels = int64_t{1} << 28;

// All taps that reach the input from some pixel of the output.
std::vector<Tap> taps_of(const Geometry& geometry, const TensorView& weight, const TensorView& input,
                         const TensorView& output) {
  std::vector<Tap> taps;
  const auto reaches = [&](int64_t ahead, int dim) {
    return ahead < input.shape[dim] && ahead + (output.shape[dim] - 1) * geometry.stride >= 0;
  };
  for (int64_t i = 0; i < weight.shape[2]; ++i)
    for (int64_t j = 0; j < weight.shape[3]; ++j) {
      const int64_t dy = i * geometry.dilation - geometry.padding_rows,
                    dx = j * geometry.dilation - geometry.padding_columns;
      if (reaches(dy, 2) && reaches(dx, 3)) taps.push_back({i * weight.shape[3] + j, dy, dx});
    }
  return taps;
}

Filtering filtering_of(const Geometry& geometry, const TensorView& weight, const TensorView& images,
                       const std::vector<Tap>& taps, Wanted wanted = Wanted::pixels) {
  if (geometry.stride != 1) return Filtering::direct;
  return masked_conv::filtering_of(weight, images, taps, geometry.dilation, wanted);
}

// The part of the input gradient at the pixels that are a stride apart, from (row, column) on: a convolution of the
// output gradient at stride 1.
struct Phase {
  int64_t row, column;
  std::vector<Tap> taps;
};

std::vector<Phase> phases_of(const LayerGrad& problem) {
  const int64_t stride = problem.geometry.stride;
  const std::vector<Tap> taps = taps_of(problem.geometry, problem.weight, problem.input, problem.grad);
  std::vector<Phase> phases;
  for (int64_t row = 0; row < std::min(stride, problem.input.shape[2]); ++row)
    for (int64_t column = 0; column < std::min(stride, problem.input.shape[3]); ++column) {
      Phase phase{row, column, {}};
      // Output row y reads input row stride * y + dy, so input row stride * u + row gets its gradient from output rows
      // y = u + (row - dy) / stride. The same holds for columns.
      for (const Tap& tap : taps)
        if ((row - tap.dy) % stride == 0 && (column - tap.dx) % stride == 0)
          phase.taps.push_back({tap.index, (row - tap.dy) / stride, (column - tap.dx) / stride});
      phases.push_back(phase);
    }
  return phases;
}

// A view of a phase's pixels in a tensor shaped like the input.
TensorView at_phase(TensorView view, const Phase& phase, int64_t stride) {
  if (view.ndim == 0) return view;
  view.data = static_cast<char*>(view.data) +
              (phase.row * view.strides[2] + phase.column * view.strides[3]) * size_of(view.dtype);
  view.shape[2] = (view.shape[2] - phase.row + stride - 1) / stride;
  view.shape[3] = (view.shape[3] - phase.column + stride - 1) / stride;
  view.strides[2] *= stride;
  view.strides[3] *= stride;
  return view;
}

void check_geometry(const Geometry& geometry, const TensorView& weight, const TensorView& input,
                    const TensorView& output) {
  const auto within = [](const char* name, int64_t value, int64_t least) {
    require(value >= least && value <= kMostPixels, std::string(name) + " must be in " + std::to_string(least) + ".." +
                                                        std::to_string(kMostPixels) + ", got " + std::to_string(value));
  };
  require(weight.numel() > 0, "weight must not be empty, got " + shape_of(weight));
  within("stride", geometry.stride, 1);
  within("padding_rows", geometry.padding_rows, 0);
  within("padding_columns", geometry.padding_columns, 0);
  within("dilation", geometry.dilation, 1);
  for (int dim = 2; dim < 4; ++dim) {
    within("the kernel's side", weight.shape[dim], 1);
    within("the input's side", input.shape[dim], 1);
    const int64_t padding = dim == 2 ? geometry.padding_rows : geometry.padding_columns;
    const int64_t room = input.shape[dim] + 2 * padding - geometry.dilation * (weight.shape[dim] - 1) - 1;
    require(room >= 0, "the kernel must fit into the padded input of " + shape_of(input));
    require(output.shape[dim] == room / geometry.stride + 1,
            "results of this input and kernel must have " + std::to_string(room / geometry.stride + 1) +
                (dim == 2 ? " rows, got " : " columns, got ") + std::to_string(output.shape[dim]));
  }
}

int64_t packed_bytes(const TensorView& weight, bool transposed, const std::vector<Tap>& taps, Filtering filtering) {
  return masked_conv::packed_bytes(
      {weight.shape[transposed ? 1 : 0], weight.shape[transposed ? 0 : 1], weight.dtype, false}, taps, filtering,
      Where::host);
}

}  // namespace

void check(const Layer& problem, Where) {
  check_geometry(problem.geometry, problem.weight, problem.input, problem.output);
}

void check(const LayerGrad& problem, Where) {
  check_geometry(problem.geometry, problem.weight, problem.input, problem.grad);
  require((problem.output.ndim == 0) == (problem.grad_preactivation.ndim == 0),
          "the gradient of a ReLU needs output and grad_preactivation");
}

int64_t workspace_bytes(const Layer& problem, Where) {
  const std::vector<Tap> taps = taps_of(problem.geometry, problem.weight, problem.input, problem.output);
  return packed_bytes(problem.weight, false, taps,
                      filtering_of(problem.geometry, problem.weight, problem.output, taps));
}

int64_t workspace_bytes(const LayerGrad& problem, Where) {
  int64_t bytes = 0;
  if (problem.grad_input.ndim == 0) return bytes;
  for (const Phase& phase : phases_of(problem))
    bytes = std::max(bytes, packed_bytes(problem.weight, true, phase.taps,
                                         filtering_of(problem.geometry, problem.weight, problem.input, phase.taps)));
  return bytes;
}

void cpu::layer(const Layer& problem) {
  const std::vector<Tap> taps = taps_of(problem.geometry, problem.weight, problem.input, problem.output);
  const Filtering filtering = filtering_of(problem.geometry, problem.weight, problem.output, taps);
  masked_conv::cpu::pack(
      {.weight = problem.weight, .mask = {}, .packed = problem.workspace, .taps = taps, .filtering = filtering});
  masked_conv::cpu::convolve(
      {.input = problem.input,
       .packed = problem.workspace,
       .weight = problem.weight,
       .mask = {},
       .bias = problem.bias,
       .condition = problem.residual,
       .position = {},
       .positive = {},
       .output = problem.output,
       .preactivation = {},
       .taps = taps,
       .activation = problem.relu ? masked_conv::Activation::relu : masked_conv::Activation::none,
       .outputs = problem.weight.shape[0],
       .filtering = filtering,
       .stride = problem.geometry.stride,
       .relu_input = problem.relu_input});
}

void cpu::layer_grad(const LayerGrad& problem) {
  const bool relu = problem.output.ndim != 0;
  if (relu || problem.grad_bias.ndim != 0)
    masked_conv::cpu::activation_grad(
        {.grad = problem.grad,
         .saved = problem.output,
         .result = problem.grad_preactivation,
         .bias_grad = problem.grad_bias,
         .workspace = {},
         .activation = relu ? masked_conv::Activation::relu : masked_conv::Activation::none});
  const TensorView& grad = relu ? problem.grad_preactivation : problem.grad;
  const int64_t stride = problem.geometry.stride;
  if (problem.grad_input.ndim != 0) {
    for (const Phase& phase : phases_of(problem)) {
      const Filtering filtering = filtering_of(problem.geometry, problem.weight, problem.input, phase.taps);
      masked_conv::cpu::pack({.weight = problem.weight,
                              .mask = {},
                              .packed = problem.workspace,
                              .taps = phase.taps,
                              .transposed = true,
                              .filtering = filtering});
      masked_conv::cpu::convolve(
          {.input = grad,
           .packed = problem.workspace,
           .weight = problem.weight,
           .mask = {},
           .bias = {},
           .condition = at_phase(problem.passed, phase, stride),
           .position = {},
           .positive = problem.relu_input ? at_phase(problem.input, phase, stride) : TensorView{},
           .output = at_phase(problem.grad_input, phase, stride),
           .preactivation = {},
           .taps = phase.taps,
           .outputs = problem.weight.shape[1],
           .filtering = filtering});
    }
  }
  if (problem.grad_weight.ndim != 0) {
    masked_conv::WeightGrad last;
    last.input = problem.input;
    last.grad = grad;
    last.weight_grad = problem.grad_weight;
    last.taps = taps_of(problem.geometry, problem.weight, problem.input, problem.grad);
    last.filtering = filtering_of(problem.geometry, problem.weight, problem.grad, last.taps, Wanted::weight_grad);
    last.stride = stride;
    last.relu_input = problem.relu_input;
    masked_conv::cpu::weight_grad(last);
  }
}

}  // namespace cpc::conv2d
