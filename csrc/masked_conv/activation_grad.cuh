// The gradients of the activation's input and of the bias, from the gradient of the output. The kernel is bound by
// memory: threads move 16 bytes at a time. The bias gradient, a sum over all pixels, takes two steps: kBiasParts
// partial sums, then their sum, which the last kernel of the weight gradient computes if there is one.
#pragma once

#include "masked_conv/tile.cuh"

namespace cpc::masked_conv::cuda {

template <class Real>
__device__ Real sigmoid(Real v) {
  return 1 / (1 + exp(-v));
}

constexpr int kActivationThreads = 512;

template <class T>
struct ActivationGradArguments {
  const T *grad, *saved;
  T* result;       // Null where it would equal grad.
  SumOf<T>* sums;  // [parts, N], or null.
  int64_t rows, parts, rows_of_part;
  int64_t channels;  // Channels of grad.
  int64_t column_blocks;
  Activation activation;
};

// Block (part, column block): a thread takes kValues neighbouring channels of every blockDim.y-th row.
template <class T>
__global__ void __launch_bounds__(kActivationThreads, 2)
    differentiate_activation(const __grid_constant__ ActivationGradArguments<T> a) {
  using Sum = SumOf<T>;
  constexpr int kValues = kChunk<T>;
  const bool gated = a.activation == Activation::gated;
  const int64_t outputs = gated ? 2 * a.channels : a.channels;
  auto* const shared = reinterpret_cast<Sum*>(dynamic_shared());
  for (int64_t block = blockIdx.x; block < a.parts * a.column_blocks; block += gridDim.x) {
    const int64_t part = block / a.column_blocks;
    const int64_t first_column = block % a.column_blocks * blockDim.x * kValues;
    const int64_t column = first_column + threadIdx.x * kValues;
    const int64_t left = a.channels - column;
    const int count = static_cast<int>(left < 0 ? 0 : left < kValues ? left : kValues);
    const int64_t first = part * a.rows_of_part;
    const int64_t last = first + a.rows_of_part < a.rows ? first + a.rows_of_part : a.rows;
    Sum sums[2][kValues] = {};
    for (int64_t row = first + threadIdx.y; row < last && count > 0; row += blockDim.y) {
      Sum features[kValues] = {}, gates[kValues] = {};  // Their gradients; without gates, only the former.
      load_run(features, a.grad + row * a.channels + column, 1, count);
      if (a.activation == Activation::relu) {
        Sum output[kValues] = {};
        load_run(output, a.saved + row * outputs + column, 1, count);
#pragma unroll
        for (int k = 0; k < kValues; ++k)
          if (output[k] <= 0) features[k] = 0;
      } else if (gated) {
        Sum feature[kValues] = {}, gate[kValues] = {};
        load_run(feature, a.saved + row * outputs + column, 1, count);
        load_run(gate, a.saved + row * outputs + a.channels + column, 1, count);
#pragma unroll
        for (int k = 0; k < kValues; ++k) {
          const Sum f = tanh(feature[k]), s = sigmoid(gate[k]);
          gates[k] = features[k] * f * s * (1 - s);
          features[k] *= s * (1 - f * f);
        }
      }
      if (a.result != nullptr) {
        store_run(a.result + row * outputs + column, features, count);
        if (gated) store_run(a.result + row * outputs + a.channels + column, gates, count);
      }
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        sums[0][k] += features[k];
        sums[1][k] += gates[k];
      }
    }
    if (a.sums == nullptr) continue;
    const int columns = static_cast<int>(blockDim.x) * kValues;
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int k = 0; k < kValues; ++k)
        shared[(threadIdx.y * 2 + u) * columns + k * blockDim.x + threadIdx.x] = sums[u][k];
    __syncthreads();
    const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    for (int e = thread; e < (gated ? 2 : 1) * columns; e += kActivationThreads) {
      const int u = e / columns, c = e % columns;
      Sum total = 0;
      for (unsigned y = 0; y < blockDim.y; ++y) total += shared[(y * 2 + u) * columns + c];
      const int64_t channel = first_column + c % blockDim.x * kValues + c / blockDim.x;
      if (channel < a.channels) a.sums[part * outputs + u * a.channels + channel] = total;
    }
    __syncthreads();  // The next block of the problem overwrites shared memory.
  }
}

// Adds up the partial sums [kBiasParts, outputs] of the bias gradient.
template <class T>
struct BiasSums {
  static constexpr int kRows = kThreads / kWarp;

  const SumOf<T>* parts;  // Null where there is no such gradient.
  int64_t outputs;
  T* bias_grad;

  // Each block of kThreads threads sums the parts of kWarp outputs.
  __host__ __device__ int64_t blocks() const { return parts == nullptr ? 0 : divide_up(outputs, kWarp); }

  // Lane l of each warp takes an output, warp w the parts w, w + kRows, ….
  __device__ void sum(int64_t block) const {
    using Sum = SumOf<T>;
    auto& of_warp = static_shared<Sum[kRows][kWarp], struct BiasParts>();
    const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int64_t output = block * kWarp + lane;
    Sum total = 0;
    if (output < outputs) {
#pragma unroll 8
      for (int64_t part = warp; part < kBiasParts; part += kRows) total += parts[part * outputs + output];
    }
    of_warp[warp][lane] = total;
    __syncthreads();
    if (warp == 0 && output < outputs) {
      for (int w = 1; w < kRows; ++w) total += of_warp[w][lane];
      bias_grad[output] = Narrow<T>::from(total);
    }
    __syncthreads();  // The next sum overwrites shared memory.
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) sum_bias_parts(const BiasSums<T> sums) {
  for (int64_t block = blockIdx.x; block < sums.blocks(); block += gridDim.x) sums.sum(block);
}

template <class T>
void launch_bias_sums(const BiasSums<T>& sums, void* stream) {
  launch("sum_bias_parts", &sum_bias_parts<T>, {sums.blocks(), dim3(kThreads)}, stream, sums);
}

template <class T>
void launch_activation_grad(const ActivationGrad& problem, void* stream) {
  const TensorView& grad = problem.grad;
  const bool summed = problem.bias_grad.data != nullptr;
  ActivationGradArguments<T> a{.grad = grad.as<T>(),
                               .saved = problem.saved.as<T>(),
                               .result = problem.activation == Activation::none ? nullptr : problem.result.as<T>(),
                               .sums = summed ? problem.workspace.as<SumOf<T>>() : nullptr,
                               .rows = grad.shape[0] * grad.shape[2] * grad.shape[3],
                               .parts = kBiasParts,
                               .rows_of_part = 0,
                               .channels = grad.shape[1],
                               .column_blocks = 0,
                               .activation = problem.activation};
  if (a.rows == 0) {
    fill_with_zeros(problem.bias_grad.data, summed ? problem.outputs() * int64_t{sizeof(T)} : 0, stream);
    return;
  }
  const int64_t chunks = divide_up(a.channels, kChunk<T>);
  unsigned across = 1;
  while (across < kWarp && across < chunks) across *= 2;
  const dim3 threads(across, kActivationThreads / across);
  constexpr int64_t kRowsOfThread = 4;  // Enough to amortise starting a block.
  if (!summed) a.parts = divide_up(a.rows, threads.y * kRowsOfThread);
  a.rows_of_part = divide_up(a.rows, a.parts);
  a.column_blocks = divide_up(chunks, across);
  launch(
      "differentiate_activation", &differentiate_activation<T>,
      {a.parts * a.column_blocks, threads, summed ? 2 * kActivationThreads * kChunk<T> * int64_t{sizeof(SumOf<T>)} : 0},
      stream, a);
  if (summed && !problem.parts_only)
    launch_bias_sums(BiasSums<T>{a.sums, problem.outputs(), problem.bias_grad.as<T>()}, stream);
}

}  // namespace cpc::masked_conv::cuda
