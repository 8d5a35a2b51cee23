// Runs the parallel CPU kernels under ThreadSanitizer, on std::thread instead of OpenMP (core/parallel.h).
//   race_check NAME    prints "done"; if there is a race, ThreadSanitizer reports it and exits with 66.
// The parallel structure does not depend on the instruction set, so one level is enough.
#include <cstdio>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "augment/cpu.cpp"
#include "dtw/cpu.cpp"
#include "info_nce/cpu.cpp"
#include "logistic_mixture/cpu.cpp"
#include "masked_conv/cpu.cpp"
#include "masked_conv/terms.h"
#include "patches/cpu.cpp"
#include "pixel_steps/cpu.cpp"
#include "predict_contrast/cpu.cpp"
#include "waveform_conv/cpu.cpp"

namespace cpc {
namespace {

TensorView dense(void* data, DType dtype, std::initializer_list<int64_t> shape) {
  TensorView view;
  view.data = data;
  view.dtype = dtype;
  for (const int64_t size : shape) view.shape[view.ndim++] = size;
  int64_t stride = 1;
  for (int d = view.ndim - 1; d >= 0; stride *= view.shape[d--]) view.strides[d] = stride;
  return view;
}

// Patches of a batch, forward and backward, in every way that the kernels share work and scratch memory.
void patches() {
  constexpr int64_t kBatch = 5, kChannels = 3, kSize = 32, kPatch = 8, kStride = 4,
                    kGrid = (kSize - kPatch) / kStride + 1;
  std::vector<uint8_t> bytes(kBatch * kChannels * kSize * kSize);
  std::iota(bytes.begin(), bytes.end(), uint8_t{0});
  std::vector<float> pixels(bytes.begin(), bytes.end()), grad(pixels.size());
  for (const bool patch_norm : {false, true})
    for (const bool gray : {false, true})
      for (const DType dtype : {DType::f32, DType::bf16}) {
        const int64_t channels = gray ? 1 : kChannels;
        std::vector<float> memory(kBatch * kGrid * kGrid * channels * kPatch * kPatch);
        patches::Gradient problem;
        problem.geometry = {kPatch, kStride, kSize, kSize, gray, patch_norm, false};
        problem.images = dense(bytes.data(), DType::u8, {kBatch, kChannels, kSize, kSize});
        problem.patches = dense(memory.data(), dtype, {kBatch, kGrid, kGrid, channels, kPatch, kPatch});
        problem.scale.assign(channels, 0.5);
        problem.shift.assign(channels, 0.25);
        patches::cpu::CPC_ISA::extract(problem);
        problem.images = dense(pixels.data(), DType::f32, {kBatch, kChannels, kSize, kSize});
        problem.images_grad = dense(grad.data(), DType::f32, {kBatch, kChannels, kSize, kSize});
        patches::cpu::CPC_ISA::extract_backward(problem);
      }
}

// Every transform, with different ones for each patch of a batch.
void augment_kernels() {
  constexpr int64_t kBatch = 5, kSize = 32, kPatch = 8, kStride = 4, kGrid = (kSize - kPatch) / kStride + 1,
                    kPatches = kBatch * kGrid * kGrid, kSteps = 2;
  std::vector<uint8_t> bytes(kBatch * 3 * kSize * kSize), codes(kPatches * kSteps);
  std::iota(bytes.begin(), bytes.end(), uint8_t{0});
  for (size_t i = 0; i < codes.size(); ++i)
    codes[i] = static_cast<uint8_t>(i * 7 % static_cast<size_t>(augment::Transform::count));
  std::vector<float> parameters(codes.size() * augment::kParameters, 0.75f),
      displacements(kPatches * 2 * augment::kNodes * augment::kNodes, 0.5f);
  std::vector<int64_t> partners(kPatches);
  std::iota(partners.rbegin(), partners.rend(), int64_t{0});
  for (const bool patch_norm : {false, true})
    for (const DType dtype : {DType::f32, DType::bf16}) {
      std::vector<float> memory(kPatches * 3 * kPatch * kPatch);
      augment::Problem problem;
      problem.extraction.geometry = {kPatch, kStride, kSize, kSize, false, patch_norm, patch_norm};
      problem.extraction.images = dense(bytes.data(), DType::u8, {kBatch, 3, kSize, kSize});
      problem.extraction.patches = dense(memory.data(), dtype, {kBatch, kGrid, kGrid, 3, kPatch, kPatch});
      problem.extraction.scale.assign(3, 0.5);
      problem.extraction.shift.assign(3, 0.25);
      problem.codes = dense(codes.data(), DType::u8, {kBatch, kGrid, kGrid, kSteps});
      problem.parameters = dense(parameters.data(), DType::f32, {kBatch, kGrid, kGrid, kSteps, augment::kParameters});
      problem.partners = dense(partners.data(), DType::i64, {kBatch, kGrid, kGrid});
      problem.displacements =
          dense(displacements.data(), DType::f32, {kBatch, kGrid, kGrid, 2, augment::kNodes, augment::kNodes});
      augment::cpu::CPC_ISA::augment(problem);
    }
}

// All keys and sampled ones, with the workers sharing each entry or taking one each, keys whole or in chunks, and
// symmetric contrasts.
void info_nce_kernels() {
  struct Sizes {
    int64_t batch, rows, keys, dim, samples;
    bool symmetric = false;
  };
  for (const Sizes& z : {Sizes{1, 70, 110, 33, 0}, Sizes{1, 3, 8300, 100, 0}, Sizes{5, 20, 30, 8, 0},
                         Sizes{2, 130, 50, 40, 60}, Sizes{1, 150, 150, 33, 0, true}, Sizes{5, 30, 30, 8, 0, true}})
    for (const DType dtype : {DType::f32, DType::bf16}) {
      std::vector<float> queries(z.batch * z.rows * z.dim), keys(z.batch * z.keys * z.dim), grad_queries(queries),
          grad_keys(keys), losses(z.batch * z.rows), slopes(losses), bias(z.batch * z.keys), grad_bias(bias);
      std::vector<int64_t> ranks(z.batch * z.rows);
      std::vector<int64_t> indices(z.batch * z.rows * std::max<int64_t>(z.samples, 1));
      for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<int64_t>(i) * 7 % z.keys;
      info_nce::Problem problem;
      problem.queries = dense(queries.data(), dtype, {z.batch, z.rows, z.dim});
      problem.keys = dense(keys.data(), dtype, {z.batch, z.keys, z.dim});
      problem.grad_queries = dense(grad_queries.data(), dtype, {z.batch, z.rows, z.dim});
      problem.grad_keys = dense(grad_keys.data(), dtype, {z.batch, z.keys, z.dim});
      problem.losses = dense(losses.data(), DType::f32, {z.batch, z.rows});
      problem.ranks = dense(ranks.data(), DType::i64, {z.batch, z.rows});
      problem.slopes = dense(slopes.data(), DType::f32, {z.batch, z.rows});
      problem.key_bias = dense(bias.data(), DType::f32, {z.batch, z.keys});
      problem.grad_bias = dense(grad_bias.data(), DType::f32, {z.batch, z.keys});
      problem.symmetric = z.symmetric;
      if (!z.symmetric) problem.targets = dense(indices.data(), DType::i64, {z.batch, z.rows, 1});
      if (z.samples > 0) problem.negatives = dense(indices.data(), DType::i64, {z.batch, z.rows, z.samples});
      std::vector<double> workspace(info_nce::cpu::CPC_ISA::workspace_bytes(problem) / 8 + 1);
      problem.workspace.data = workspace.data();
      info_nce::cpu::CPC_ISA::contrast(problem);
    }
}

// More contexts than a block has, of which steps use some, with all keys, and with sampled keys that steps share or
// not.
void predict_contrast_kernel() {
  constexpr int64_t kRows = 450, kChannels = 70, kSteps = 2, kDim = 33, kKeys = 110, kSamples = 7;
  for (const int64_t draws : {int64_t{0}, int64_t{1}, kSteps})
    for (const DType dtype : {DType::f32, DType::bf16}) {
      std::vector<float> contexts(kRows * kChannels), weights(kSteps * kDim * kChannels), keys(kKeys * kDim),
          row_weights(kSteps * kRows, 1.f), losses(kSteps * kRows), grad_contexts(contexts), grad_weights(weights),
          grad_keys(keys);
      std::vector<int64_t> targets(kSteps * kRows), ranks(targets), negatives(draws * kRows * kSamples);
      for (size_t i = 0; i < targets.size(); ++i) targets[i] = static_cast<int64_t>(i) % (kKeys + 1) - 1;
      for (size_t i = 0; i < negatives.size(); ++i) negatives[i] = static_cast<int64_t>(i) * 7 % kKeys;
      predict_contrast::Problem problem;
      problem.contexts = dense(contexts.data(), dtype, {kRows, kChannels});
      problem.weights = dense(weights.data(), dtype, {kSteps, kDim, kChannels});
      problem.keys = dense(keys.data(), dtype, {kKeys, kDim});
      problem.targets = dense(targets.data(), DType::i64, {kSteps, kRows});
      if (draws > 0) problem.negatives = dense(negatives.data(), DType::i64, {draws, kRows, kSamples});
      problem.row_weights = dense(row_weights.data(), DType::f32, {kSteps, kRows});
      problem.losses = dense(losses.data(), DType::f32, {kSteps, kRows});
      problem.ranks = dense(ranks.data(), DType::i64, {kSteps, kRows});
      problem.grad_contexts = dense(grad_contexts.data(), dtype, {kRows, kChannels});
      problem.grad_weights = dense(grad_weights.data(), dtype, {kSteps, kDim, kChannels});
      problem.grad_keys = dense(grad_keys.data(), dtype, {kKeys, kDim});
      std::vector<double> workspace(predict_contrast::cpu::CPC_ISA::workspace_bytes(problem) / 8 + 1);
      problem.workspace = dense(workspace.data(), DType::u8, {static_cast<int64_t>(workspace.size()) * 8});
      predict_contrast::cpu::CPC_ISA::predict_and_contrast(problem);
    }
}

// Likelihoods, their gradient and samples, in both layouts, with more tiles than threads.
void logistic_mixture() {
  constexpr int64_t kBatch = 3, kChannels = 3, kSize = 13, kParams = 20;
  std::vector<uint8_t> bytes(kBatch * kChannels * kSize * kSize);
  std::iota(bytes.begin(), bytes.end(), uint8_t{0});
  std::vector<float> params(kBatch * kParams * kSize * kSize, 0.5f), gradients(params), nll(kBatch), grad(kBatch, 1.f),
      normalisers(kBatch * 2 * kSize * kSize), noise(kBatch * 5 * kSize * kSize, 0.5f);
  for (const bool channels_last : {false, true}) {
    const auto parameters = [&](std::vector<float>& values) {
      TensorView view = dense(values.data(), DType::f32, {kBatch, kParams, kSize, kSize});
      if (channels_last) view.strides[1] = 1, view.strides[2] = kSize * kParams, view.strides[3] = kParams;
      return view;
    };
    logistic_mixture::Gradient problem;
    problem.images = dense(bytes.data(), DType::u8, {kBatch, kChannels, kSize, kSize});
    problem.params = parameters(params);
    problem.normalisers = dense(normalisers.data(), DType::f32, {kBatch, 2, kSize, kSize});
    problem.nll = dense(nll.data(), DType::f32, {kBatch});
    logistic_mixture::cpu::CPC_ISA::nll(problem);
    problem.grad = dense(grad.data(), DType::f32, {kBatch});
    problem.params_grad = parameters(gradients);
    logistic_mixture::cpu::CPC_ISA::nll_backward(problem);
    logistic_mixture::Sampling sampling;
    sampling.params = problem.params;
    sampling.noise = dense(noise.data(), DType::f32, {kBatch, 5, kSize, kSize});
    sampling.images = problem.images;
    logistic_mixture::cpu::CPC_ISA::sample(sampling);
  }
}

// A convolution and its gradients, with more blocks, panels and slices than threads. Through a ReLU each block copies
// the pixels that it reads.
void masked_conv_of(masked_conv::Filtering filtering, bool relu_input) {
  constexpr int64_t kBatch = 7, kIn = 20, kOut = 70, kSize = 9;
  const auto floats = [](int64_t n) { return std::vector<float>(n, 0.5f); };
  std::vector<float> input = floats(kBatch * kIn * kSize * kSize), output = floats(kBatch * kOut * kSize * kSize),
                     kept = output, weight = floats(kOut * kIn * 9), bias = floats(kOut);
  const bool visible[9] = {true, true, true, true, true, false, false, false, false};
  const auto images = [&](std::vector<float>& values, int64_t channels) {
    TensorView view = dense(values.data(), DType::f32, {kBatch, kSize, kSize, channels});
    std::swap(view.shape[1], view.shape[3]), std::swap(view.strides[1], view.strides[3]);  // [B, C, W, H]
    std::swap(view.shape[2], view.shape[3]), std::swap(view.strides[2], view.strides[3]);
    return view;
  };
  masked_conv::Packing packing;
  packing.weight = dense(weight.data(), DType::f32, {kOut, kIn, 3, 3});
  packing.mask = dense(const_cast<bool*>(visible), DType::boolean, {3, 3});
  packing.taps = masked_conv::taps_of({0, 1, 2, 3, 4}, 3, 3, 1, false, kSize, kSize);
  packing.filtering = filtering;
  const auto terms = static_cast<int64_t>(masked_conv::terms_of(packing.taps, filtering).all.size());
  std::vector<char> packed(masked_conv::cpu::CPC_ISA::packed_bytes(kOut, kIn, terms, DType::f32, false));
  packing.packed = dense(packed.data(), DType::u8, {static_cast<int64_t>(packed.size())});
  masked_conv::cpu::CPC_ISA::pack(packing);
  masked_conv::Convolution convolution;
  convolution.input = images(input, kIn);
  convolution.packed = packing.packed;
  convolution.output = images(output, kOut);
  convolution.taps = packing.taps;
  convolution.outputs = kOut;
  convolution.filtering = filtering;
  convolution.relu_input = relu_input;
  masked_conv::cpu::CPC_ISA::convolve(convolution);
  masked_conv::ActivationGrad activation;
  activation.grad = images(output, kOut);
  activation.saved = activation.grad;
  activation.result = images(kept, kOut);
  activation.bias_grad = dense(bias.data(), DType::f32, {kOut});
  activation.activation = masked_conv::Activation::relu;
  masked_conv::cpu::CPC_ISA::activation_grad(activation);
  masked_conv::WeightGrad gradient;
  gradient.input = convolution.input;
  gradient.grad = activation.result;
  gradient.mask = packing.mask;
  gradient.weight_grad = packing.weight;
  gradient.taps = packing.taps;
  gradient.filtering = filtering;
  gradient.relu_input = relu_input;
  masked_conv::cpu::CPC_ISA::weight_grad(gradient);
}

void masked_conv() {
  using masked_conv::Filtering;
  for (const Filtering filtering : {Filtering::direct, Filtering::pairs, Filtering::quads})
    for (const bool relu_input : {false, true}) masked_conv_of(filtering, relu_input);
}

// Two steps that read what steps of other pixels wrote, with work enough for all threads.
void pixel_steps_kernel() {
  constexpr int64_t kBatch = 7, kFeatures = 64, kSide = 8, kHigh = kSide + pixel_steps::kAbove,
                    kWide = kSide + 2 * pixel_steps::kBeside;
  std::vector<float> raw(kBatch * kHigh * kWide * kFeatures), elu(2 * raw.size()),
      weight(8 * kFeatures * 2 * kFeatures, 0.01f), bias(2 * kFeatures, 0.1f);
  const auto map = [&](std::vector<float>& values, int64_t channels) {
    return dense(values.data(), DType::f32, {kBatch, kHigh, kWide, channels});
  };
  pixel_steps::Network network;
  network.batch = kBatch;
  network.height = network.width = kSide;
  for (const bool gated : {false, true}) {
    pixel_steps::Step step;
    step.sources.push_back({map(elu, 2 * kFeatures), 1, {{-1, -1}, {-1, 0}, {-1, 1}, {0, -1}}});
    const int64_t outputs = gated ? 2 * kFeatures : kFeatures;
    step.weight = dense(weight.data(), DType::f32, {8 * kFeatures, outputs});
    step.bias = dense(bias.data(), DType::f32, {outputs});
    step.raw = map(raw, kFeatures);
    step.elu = map(elu, 2 * kFeatures);
    if (gated) step.residual = step.raw;
    network.steps.push_back(std::move(step));
  }
  pixel_steps::check(network);
  pixel_steps::cpu::CPC_ISA::pack(network);
  for (int64_t row = 0; row < kSide; ++row) {
    if (row % 2) pixel_steps::cpu::CPC_ISA::run({.network = network, .row = row, .whole_row = true});
    for (int64_t col = 0; row % 2 == 0 && col < kSide; ++col)
      pixel_steps::cpu::CPC_ISA::run({.network = network, .row = row, .col = col});
  }
}

// Pairs of items that share a second one or not, in more tasks than threads.
void dtw_kernel() {
  constexpr int64_t kItems = 40, kLength = 9, kDim = 5;
  std::vector<float> frames(kItems * kLength * kDim, 0.4f), distances(kItems * kItems);
  std::vector<int64_t> first(kItems), count(kItems, kLength), pairs;
  for (int64_t k = 0; k < kItems; ++k) first[k] = k * kLength;
  for (int64_t k = 0; k < kItems * kItems; ++k) pairs.insert(pairs.end(), {k % kItems, k / kItems});
  const dtw::Problem problem{.frames = dense(frames.data(), DType::f32, {kItems * kLength, kDim}),
                             .first = dense(first.data(), DType::i64, {kItems}),
                             .count = dense(count.data(), DType::i64, {kItems}),
                             .pairs = dense(pairs.data(), DType::i64, {kItems * kItems, 2}),
                             .distances = dense(distances.data(), DType::f32, {kItems * kItems})};
  dtw::check(problem, Where::host);
  dtw::cpu::CPC_ISA::distances(problem);
}

// Blocks of several waveforms, forward and backward, each of all channels.
void waveform_conv_kernels() {
  constexpr int64_t kBatch = 3, kSamples = 2000, kChannels = 6, kTaps = 10, kFrames = (kSamples - kTaps) / 5 + 1;
  for (const bool norm : {false, true})
    for (const DType dtype : {DType::f32, DType::bf16}) {
      std::vector<float> waveforms(kBatch * kSamples, 0.5f), weight(kChannels * kTaps),
          out(kBatch * kChannels * kFrames), scale(kChannels, 1.f), sums(kChannels * (kTaps + 3));
      waveform_conv::Gradient problem;
      problem.waveforms = dense(waveforms.data(), dtype, {kBatch, 1, kSamples});
      problem.weight = dense(weight.data(), dtype, {kChannels, 1, kTaps});
      problem.bias = dense(weight.data(), dtype, {kChannels});
      if (norm) problem.scale = problem.shift = dense(scale.data(), DType::f32, {kChannels});
      problem.out = dense(out.data(), dtype, {kBatch, kFrames, kChannels});
      problem.sums = dense(sums.data(), DType::f32, {kChannels, kTaps + 3});
      problem.stride = 5;
      problem.relu = true;
      waveform_conv::cpu::CPC_ISA::convolve(problem);
      waveform_conv::cpu::CPC_ISA::convolve_backward(problem);
    }
}

// A planted race: all iterations add to one number.
void planted_race() {
  int64_t total = 0;
  parallel_for(1000, [&](int64_t i, int) { total += i; });
  std::printf("%ld\n", static_cast<long>(total));
}

const std::map<std::string, std::function<void()>> checks = {
    {"augment", augment_kernels},        {"dtw", dtw_kernel},
    {"info_nce", info_nce_kernels},      {"logistic_mixture", logistic_mixture},
    {"masked_conv", masked_conv},        {"patches", patches},
    {"pixel_steps", pixel_steps_kernel}, {"predict_contrast", predict_contrast_kernel},
    {"planted_race", planted_race},      {"waveform_conv", waveform_conv_kernels}};

}  // namespace
}  // namespace cpc

int main(int argc, char** argv) {
  const auto found = cpc::checks.find(argc == 2 ? argv[1] : "");
  if (found == cpc::checks.end()) return 2;
  found->second();
  std::puts("done");
  return 0;
}
